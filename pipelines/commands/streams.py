"""`mantis encode`, `decode`, `predict` and `info`: the codec on files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.errors import MISTAKE, Stopped, Tally, ending_well, print_json
from pipelines.commands.options import (
    AsJson,
    ExitConfidence,
    Images,
    Level,
    MaxBytes,
    Model,
    Root,
    StreamFile,
    Tasks,
    model_folder,
)

if TYPE_CHECKING:
    from mantis_core.device.files import Found, Source
    from pipelines.coding.work import Decoded


@ending_well
def encode(
    model: Model,
    paths: Images,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="OUT.mts for one stream of all images, or a folder for one stream for each. The "
            "tree of a folder PATH is repeated in it.",
        ),
    ],
    task: Tasks = None,
    exit_confidence: ExitConfidence = None,
    level: Level = None,
    max_bytes: MaxBytes = None,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing", help="Leave out images that have a stream of this model in OUT."
        ),
    ] = False,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Encode images to streams, as a client sends them.

    MODEL may be a whole codec or its client half. Streams are written one by one.

    An image that cannot be read is named and left out. The exit code is then 3.

    Example: mantis encode models:/mantis@champion photos/ -o streams/
    """
    from mantis_core.device import files
    from pipelines.coding import work
    from pipelines.terminal.counting import counting

    together = output.suffix == ".mts" and not output.is_dir()
    if together and skip_existing:
        raise Stopped("error: --skip-existing needs a folder as OUT.", MISTAKE)
    if skip_existing and level is not None:
        raise Stopped(
            "error: --skip-existing cannot see the level of a stream. Leave one of --skip-existing "
            "and --level out.",
            MISTAKE,
        )
    if together and max_bytes is not None:
        raise Stopped("error: --max-bytes needs a folder as OUT: it is for a stream each.", MISTAKE)
    found = find_images(paths, output)
    sources = found.sources
    streams: dict[Source, Path] = {}
    if together:
        work.check_together(len(sources))
    else:
        streams = {source: t for t, source in _targets(sources, output, ".mts").items()}
    codec = _load("client", model, root).for_tasks(task)
    if together:
        work.check_room(codec, len(sources))
    if skip_existing:
        sources = [
            each for each in sources if not work.is_stream_of(codec, streams[each], max_bytes)
        ]
    asked = work.Asked(tuple(task) if task else None, exit_confidence, level, max_bytes)
    encoded = work.encode_together if together else work.encode_each
    written: list[dict[str, Any]] = []
    with counting("images", len(sources)) as counter:
        tally = Tally(found, counter)
        tally.done = known = len(found.sources) - len(sources)
        for result in encoded(codec, sources, asked):
            counter.step()
            if isinstance(result, files.Failure):
                tally.fail(result)
            elif isinstance(result, work.Coded):
                target = output if together else streams[result.images[0]]
                files.write_whole(target, result.data)
                tally.done += 1
                images = [files.shown(image.path) for image in result.images]
                size = len(result.data)
                of_each = f", {size / len(images):.1f} an image" if len(images) > 1 else ""
                if as_json:
                    name = files.shown(target)
                    written.append({"file": name, "wire_bytes": size, "images": images})
                else:
                    counter.line(f"{files.shown(target)}  {size} bytes{of_each}")
    if as_json:
        print_json({"streams": written, "skipped": known, "failures": tally.listed()})
    elif known:
        typer.echo(f"{known:,} images had a stream of this model")
    tally.end()


@ending_well
def decode(
    model: Model,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Streams (.mts), or folders whose streams are taken."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write: answers.csv, and masks as PNG."),
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Decode streams to the answers of the server.

    MODEL may be a whole codec or its server half.

    A stream that cannot be decoded is named and left out. The exit code is then 3.

    Example: mantis decode models:/mantis@champion streams/ -o answers/
    """
    from mantis_core.device import files
    from pipelines.coding import answers, work
    from pipelines.terminal.counting import counting

    if output is not None and output.is_file():
        raise Stopped(f"error: {files.shown(output)} is a file. Give a folder.", MISTAKE)
    found = _find(paths, files.STREAM_SUFFIXES, "stream", output)
    if output is not None:
        _targets(found.sources, output, ".png")
    codec = _load("server", model, root)
    table = None
    if output is not None:
        table = answers.Table(output / "answers.csv", codec.spec.every_task, numbered=True)
        answers.write_labels(output, codec.spec.every_task)
    streams: list[dict[str, Any]] = []
    with counting("streams", len(found.sources)) as counter, table or nullcontext():
        tally = Tally(found, counter, table)
        for result in work.decode_each(codec, found.sources):
            counter.step()
            if isinstance(result, files.Failure):
                tally.fail(result)
                continue
            tally.done += 1
            if table is not None and output is not None:
                table.add(result.source.path, result.answers)
                answers.write_masks(output, result.source.place, result.answers)
            if as_json:
                images = [answer.to_dict() for answer in result.answers]
                name, size = files.shown(result.source.path), result.wire_bytes
                streams.append({"file": name, "wire_bytes": size, "images": images})
            elif table is None:
                counter.line(_told(result, named=len(found.sources) > 1))
    if as_json:
        print_json({"streams": streams, "failures": tally.listed()})
    elif table is not None:
        typer.echo(f"{files.shown(table.name)}  {tally.summary('streams')}")
    tally.end()


@ending_well
def predict(
    model: Model,
    paths: Images,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Table to write: .csv, or .jsonl for one JSON object a line. The default prints "
            "CSV.",
        ),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Folder for masks as PNG, one for each task.")
    ] = None,
    task: Tasks = None,
    exit_confidence: ExitConfidence = None,
    level: Level = None,
    max_bytes: MaxBytes = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Answer images through their streams: encode and decode in one.

    MODEL is a whole codec. The table has a row for each image: class, tasks, bytes.

    An image that cannot be read has a row that says why. The exit code is then 3.

    Example: mantis predict models:/mantis@champion photos/ -o answers.csv
    """
    from mantis_core.device import files
    from pipelines.coding import answers, work
    from pipelines.terminal.counting import counting

    if output is not None:
        answers.check_table(output)
    found = find_images(paths, masks)
    if masks is not None:
        _targets(found.sources, masks, ".png")
    folder = str(model_folder(model, root))
    client, server = _load("client", folder, root), _load("server", folder, root)
    client = client.for_tasks(task)
    asked = work.Asked(tuple(task) if task else None, exit_confidence, level, max_bytes)
    tasks = server.spec.every_task
    table = None if as_json and output is None else answers.Table(output, tasks)
    if masks is not None:
        answers.write_labels(masks, tasks)
    images: list[dict[str, Any]] = []
    with counting("images", len(found.sources)) as counter, table or nullcontext():
        tally = Tally(found, counter, table)
        for result in work.predict_each(client, server, found.sources, asked):
            counter.step()
            if isinstance(result, files.Failure):
                tally.fail(result)
            else:
                tally.done += 1
                if masks is not None:
                    answers.write_masks(masks, result.source.place, result.answers)
                if table is not None:
                    table.add(result.source.path, result.answers)
                else:
                    name, (answer,) = files.shown(result.source.path), result.answers
                    images.append({"file": name, **answer.to_dict()})
            if table is not None and output is None:
                counter.line(table.take())
    if as_json:
        shown: dict[str, Any] = {"images": images}
        if output is not None:
            shown = {"answers": files.shown(output), "images": tally.done}
        print_json({**shown, "failures": tally.listed()})
    elif output is not None:
        typer.echo(f"{files.shown(output)}  {tally.summary('images')}")
    tally.end()


@ending_well
def info(file: StreamFile, as_json: AsJson = False) -> None:
    """Show the header of a stream. Needs no model.

    Example: mantis info photo.mts
    """
    from mantis_core.bitstream.container import peek
    from mantis_core.device.files import read

    found = peek(read(file))
    if as_json:
        print_json(found)
        return
    shape = found["input_shape"]
    found["flags"] = ", ".join(found["flags"]) or "none"
    found["input_shape"] = "the model's own" if shape is None else f"{shape[0]}x{shape[1]}"
    for name, value in found.items():
        typer.echo(f"{name}: {value}")


COMMANDS = (encode, decode, predict, info)


def _load(half: str, model: str, root: str | None) -> Any:
    """Loads the `client` or `server` half of a codec. The folder may hold the whole codec."""
    from mantis_core.codec.checkpoint import load_client, load_server

    folder = model_folder(model, root)
    return load_client(folder) if half == "client" else load_server(folder)


def find_images(paths: Sequence[Path], output: Path | None) -> Found:
    """Returns the images of a command, also those in Parquet files and tars."""
    from mantis_core.device.files import IMAGE_SUFFIXES, find
    from pipelines.coding.packed import PACKED_SUFFIXES, expand

    suffixes = IMAGE_SUFFIXES | PACKED_SUFFIXES
    found = find(paths, suffixes, outputs=[output] if output else [])
    return _require(expand(found, paths), paths, suffixes, "image")


def _find(paths: Sequence[Path], suffixes: frozenset[str], what: str, output: Path | None) -> Found:
    """Returns the files of a command. Raises Stopped if there is none."""
    from mantis_core.device.files import find

    found = find(paths, suffixes, outputs=[output] if output else [])
    return _require(found, paths, suffixes, what)


def _require(found: Found, paths: Sequence[Path], suffixes: frozenset[str], what: str) -> Found:
    from mantis_core.device.files import shown

    if not found.sources:
        said = [failure.reason for failure in found.failures] or [
            f"there is no {what} in {', '.join(shown(path) for path in paths)} "
            f"({found.left_out() or 'nothing is there'}). Give files, or folders that hold "
            f"{' '.join(sorted(suffixes))}."
        ]
        raise Stopped("\n".join(f"error: {each}" for each in said), MISTAKE)
    return found


def _targets(sources: Sequence[Source], folder: Path, suffix: str) -> dict[Path, Source]:
    """Maps output files to their sources. Raises Stopped if `folder` is a file."""
    from mantis_core.device.files import shown, targets

    if folder.is_file():
        raise Stopped(f"error: {shown(folder)} is a file. Give OUT.mts or a folder.", MISTAKE)
    return targets(sources, folder, suffix)


def _told(decoded: Decoded, *, named: bool) -> str:
    """Returns the answers of a stream as lines. A stream of several images numbers them."""
    from mantis_core.device.files import shown

    lines = []
    count = len(decoded.answers)
    for number, answer in enumerate(decoded.answers, start=1):
        of_file = [shown(decoded.source.path)] if named else []
        of_image = [f"image {number} of {count}"] if count > 1 else []
        if of_file or of_image:
            lines.append(", ".join(of_file + of_image))
        if answer.class_name is not None:
            whose = ", the client's own answer" if answer.answered else ""
            lines.append(f"class: {answer.class_name} ({answer.class_probability:.3f}{whose})")
        masks = answer.to_dict()["segmentation"]
        for name in answer.tasks:
            label = answer.label_names.get(name) or masks.get(name)
            own = ", the client's own answer" if answer.answered and not answer.class_name else ""
            lines.append(f"{name}: {label} (task {answer.task_probability[name]:.3f}{own})")
        lines.append(f"{answer.wire_bytes:.4g} bytes, {answer.payload_bytes:.1f} of them payload")
    return "\n".join(lines)
