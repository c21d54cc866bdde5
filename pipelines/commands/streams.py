"""`mantis encode`, `decode`, `info` and `check`: the codec on files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.errors import FAILURE, MISTAKE, Stopped, ending_well, print_json
from pipelines.commands.options import AsJson, Model, Root, StreamFile, model_folder

BATCH = 32  # images encoded together


@ending_well
def encode(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="OUT.mts for one stream of all images, or a folder for one IMAGE.mts each.",
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Task to send; repeat it for several. The default detects the tasks of each "
            "image.",
        ),
    ] = None,
    exit_confidence: Annotated[
        float | None,
        typer.Option(
            "--exit-confidence",
            help="Confidence (0 to 1) from which the client answers by itself. It then sends the "
            "class and no latent.",
        ),
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Encode images to streams, as a client sends them.

    MODEL may be a whole codec or its client half.

    Example: mantis encode models:/mantis@champion photo.jpg -o photo.mts
    """
    together = output.suffix == ".mts" and not output.is_dir()
    targets = {} if together else _encoded_names(images, output)
    codec = _load("client", model, root)
    import torch

    seen = []
    for start in range(0, len(images), BATCH):
        group = images[start : start + BATCH]
        batch = torch.stack([_read_image(codec, image) for image in group])
        seen += codec.look(batch, task or None, exit_confidence=exit_confidence)
    if together:
        streams = {output: codec.write_together(seen)}
    else:
        streams = {
            targets[image]: codec.write_together([each])
            for image, each in zip(images, seen, strict=True)
        }
    written: list[dict[str, Any]] = []
    for number, (file, data) in enumerate(streams.items()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        inside = [str(image) for image in (images if together else [images[number]])]
        written.append({"file": str(file), "wire_bytes": len(data), "images": inside})
    if as_json:
        print_json({"streams": written})
    for entry in [] if as_json else written:
        count = len(entry["images"])
        of_each = f", {entry['wire_bytes'] / count:.1f} an image" if count > 1 else ""
        typer.echo(f"{entry['file']}  {entry['wire_bytes']} bytes{of_each}")


@ending_well
def decode(model: Model, file: StreamFile, root: Root = None, as_json: AsJson = False) -> None:
    """Decode a stream to the answers of the server.

    MODEL may be a whole codec or its server half.

    Example: mantis decode models:/mantis@champion photo.mts
    """
    data = _read(file)
    answers = [answer.to_dict() for answer in _load("server", model, root).decode([data])]
    if as_json:
        print_json({"wire_bytes": len(data), "images": answers})
        return
    for number, answer in enumerate(answers, start=1):
        if len(answers) > 1:
            typer.echo(f"image {number} of {len(answers)}")
        if answer["class_name"] is not None:
            whose = ", the client's own answer" if answer["answered"] else ""
            sure = f"({answer['class_probability']:.3f}{whose})"
            typer.echo(f"class: {answer['class_name']} {sure}")
        for name in answer["tasks"]:
            label = answer["label_names"].get(name) or answer["segmentation"].get(name)
            typer.echo(f"{name}: {label} (task {answer['task_probability'][name]:.3f})")
        typer.echo(
            f"{answer['wire_bytes']:.4g} bytes, {answer['payload_bytes']:.1f} of them payload"
        )


@ending_well
def info(file: StreamFile, as_json: AsJson = False) -> None:
    """Show the header of a stream. Needs no model.

    Example: mantis info photo.mts
    """
    from mantis_core.bitstream.container import peek

    found = peek(_read(file))
    if as_json:
        print_json(found)
        return
    shape = found["input_shape"]
    found["flags"] = " ".join(found["flags"]) or "none"
    found["input_shape"] = "the model's own" if shape is None else f"{shape[0]}x{shape[1]}"
    for name, value in found.items():
        typer.echo(f"{name}: {value}")


@ending_well
def check(as_json: AsJson = False) -> None:
    """Test the installation in seconds.

    Runs random images through every component.

    Example: mantis check
    """
    from pipelines.commands.selfcheck import run

    result = run()
    if as_json:
        print_json(result)
    for name, value in {} if as_json else result.items():
        typer.echo(f"{name}: {value}")
    if not result.get("ok", True):
        raise Stopped("the self-test failed", FAILURE)


COMMANDS = (encode, decode, info, check)


def _load(half: str, model: str, root: str | None) -> Any:
    """Loads the `client` or `server` half of a codec. The folder may hold the whole codec."""
    from mantis_core.codec.checkpoint import load_client, load_server

    folder = model_folder(model, root)
    return load_client(folder) if half == "client" else load_server(folder)


def _encoded_names(images: list[Path], folder: Path) -> dict[Path, Path]:
    if folder.is_file():
        raise Stopped(f"error: {folder} is a file. Give OUT.mts or a folder.", MISTAKE)
    targets = {image: folder / f"{image.stem}.mts" for image in images}
    if len(set(targets.values())) < len(images):
        raise Stopped(
            "error: two images have one name. Encode them into OUT.mts or into two folders.",
            MISTAKE,
        )
    return targets


def _read_image(codec: Any, image: Path) -> Any:
    from mantis_core.pixels import ImageError

    data = _read(image)
    try:
        return codec.prepare_image(data)
    except ImageError as error:
        raise Stopped(f"error: {image} is no readable image: {error}", MISTAKE) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Stopped(f"error: cannot read {file}: {error.strerror}", MISTAKE) from error
