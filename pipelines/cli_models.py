"""Commands on what runs have left: report, register, promote, models, lineage; encode, decode,
info; check. They run no stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli_errors import FAILURE, MISTAKE, Stopped, ending_well, print_json

if TYPE_CHECKING:
    from pipelines.tracking import Tracker

BATCH = 32  # images encoded together

AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]
Root = Annotated[
    str | None,
    typer.Option(
        "--root", help="storage root of the run; default MLFLOW_TRACKING_URI, else ./runs"
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="MLflow run id of a pipeline, or `latest`")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="models:/mantis@ALIAS, models:/mantis/VERSION or a checkpoint folder"
    ),
]
StreamFile = Annotated[Path, typer.Argument(metavar="FILE.mts", help="a stream of coded images")]


@ending_well
def report(
    run: Run = "latest",
    root: Root = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder; default report-<run>")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Writes the rate-accuracy table (CSV, JSON), the plot and one HTML page of a run."""
    from pipelines.report import write_report
    from pipelines.storage import Store

    tracker = _tracker(root)
    found = tracker.find_pipeline(run)
    stage = tracker.stages(found).get("evaluate")
    if stage is None or not Store(stage.folder).exists("evaluation.json"):
        raise Stopped(
            f"error: run {found.info.run_id} has no finished evaluation; finish it with "
            "`mantis run`, then report",
            MISTAKE,
        )
    folder = output or Path(f"report-{found.info.run_id[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_report(Store(stage.folder).read_json("evaluation.json"), folder)
    written = {name: str(path) for name, path in vars(paths).items()}
    if as_json:
        print_json({"run_id": found.info.run_id, **written})
    else:
        typer.echo("\n".join(written.values()))


@ending_well
def register(run: Run = "latest", root: Root = None, as_json: AsJson = False) -> None:
    """Registers a run's main arm; the alias `candidate` moves to it."""
    from pipelines import registry

    result = registry.register(_tracker(root), run)
    print_json(result) if as_json else typer.echo(result["model"])


@ending_well
def promote(
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="one that `mantis models` lists")
    ],
    alias: Annotated[str, typer.Option("--alias")] = "champion",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Moves an alias to a version."""
    from pipelines import registry

    result = registry.promote(_tracker(root), version, alias)
    print_json(result) if as_json else typer.echo(f"models:/mantis@{alias} is {result['model']}")


@ending_well
def models(
    max_bpp: Annotated[float | None, typer.Option("--max-bpp", min=0)] = None,
    min_top1: Annotated[float | None, typer.Option("--min-top1", min=0, max=1)] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Lists the registered models, newest first; with --max-bpp the most accurate first."""
    from pipelines import registry

    found = registry.models(_tracker(root), max_bpp=max_bpp, min_top1=min_top1)
    if as_json:
        print_json({"models": found})
    for entry in [] if as_json else found:
        aliases = " ".join(f"@{alias}" for alias in entry["aliases"])
        figures = f"top1 {_figure(entry['top1'])}  bpp {_figure(entry['bpp'])}"
        typer.echo(f"{entry['model']}  {figures}  {entry['config']}  {aliases}".rstrip())


@ending_well
def lineage(run: Run = "latest", root: Root = None, as_json: AsJson = False) -> None:
    """What a run was made of: commit, versions, stages and their ancestors, models."""
    import yaml

    from pipelines import registry

    found = registry.lineage(_tracker(root), run)
    print_json(found) if as_json else typer.echo(yaml.safe_dump(found, sort_keys=False).rstrip())


@ending_well
def encode(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="JPEG or PNG files")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="OUT.mts, one stream of all images; or a folder, of IMAGE.mts for each",
        ),
    ],
    task: Annotated[
        list[str] | None, typer.Option("--task", help="send this task only; default: detect them")
    ] = None,
    exit_confidence: Annotated[
        float | None,
        typer.Option(
            "--exit-confidence",
            help="answer on the client, and send no latent, where its detector is that sure of an "
            "image's class (0 to 1)",
        ),
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Codes images: what a client would send. MODEL may be a client alone."""
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
    written = []
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
    """Answers a stream: what the server would say. MODEL may be a server alone."""
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
    """What a stream says of itself, without its model."""
    from mantis_core.bitstream import peek

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
    """A self-test with random data through every component, in seconds."""
    from pipelines.selfcheck import run

    result = run()
    if as_json:
        print_json(result)
    for name, value in {} if as_json else result.items():
        typer.echo(f"{name}: {value}")
    if not result.get("ok", True):
        raise Stopped("the self-test failed", FAILURE)


COMMANDS = (report, register, promote, models, lineage, encode, decode, info, check)


def model_folder(model: str, root: str | None) -> Path:
    """The local checkpoint folder of a MODEL argument."""
    if not model.startswith("models:"):
        return Path(model)
    from pipelines.registry import resolve_model

    return resolve_model(model, _tracker(root).location.uri)


def _tracker(root: str | None) -> Tracker:
    """Tracking of commands without a config: --root, else MLFLOW_TRACKING_URI, else ./runs."""
    from pipelines.storage import absolute_root
    from pipelines.tracking import Tracker, locate_tracking

    uri = None if root else os.environ.get("MLFLOW_TRACKING_URI")
    where = absolute_root(root or "./runs")
    location = locate_tracking(uri, where)
    store = location.uri.removeprefix("sqlite:///")
    if store != location.uri and not Path(store).is_file():
        raise Stopped(
            f"error: there are no runs in {where}. Give --root, set MLFLOW_TRACKING_URI, or make "
            "one with `mantis run --config ...`",
            MISTAKE,
        )
    return Tracker(location, "mantis")


def _load(half: str, model: str, root: str | None) -> Any:
    """The half of a codec that a command needs, from the whole or from that half alone."""
    from mantis_core.checkpoint import load_client, load_server

    folder = model_folder(model, root)
    return load_client(folder) if half == "client" else load_server(folder)


def _encoded_names(images: list[Path], folder: Path) -> dict[Path, Path]:
    if folder.is_file():
        raise Stopped(f"error: {folder} is a file; give OUT.mts or a folder", MISTAKE)
    targets = {image: folder / f"{image.stem}.mts" for image in images}
    if len(set(targets.values())) < len(images):
        raise Stopped(
            "error: two images have one name; encode them into OUT.mts or into two folders", MISTAKE
        )
    return targets


def _read_image(codec: Any, image: Path) -> Any:
    data = _read(image)
    try:
        return codec.prepare_image(data)
    except (OSError, ValueError) as error:
        reason = str(error).partition(" <")[0]  # Pillow ends with an object in memory
        raise Stopped(f"error: {image} is no readable image: {reason}", MISTAKE) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Stopped(f"error: cannot read {file}: {error.strerror}", MISTAKE) from error


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
