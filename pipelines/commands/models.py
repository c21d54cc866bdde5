"""Commands on results of runs: report, register, promote, models, lineage, export, patch, ui."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipelines.commands.errors import MISTAKE, Stopped, ending_well, print_json
from pipelines.commands.options import (
    AsJson,
    Experiment,
    Model,
    Root,
    Run,
    model_folder,
    tracker_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mantis_core.codec.client_codec import ClientCodec

MOST = 2_500
CALIBRATING = 200
"""Images that int8 is calibrated by, of those that are given."""


@ending_well
def report(
    run: Run = "latest",
    root: Root = None,
    experiment: Experiment = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write. The default is report-RUN."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run: HTML page, plot and table.

    The table of rates and accuracies is written as CSV and as JSON.

    Example: mantis report latest --output report
    """
    from pipelines.report.report import write_report
    from pipelines.settings.tracking import experiment_name
    from pipelines.storage import Store
    from pipelines.tracking import lookup

    tracker = tracker_of(root)
    found = lookup.find_pipeline(tracker, run, experiment_name(experiment))
    stage = lookup.stages(tracker, found).get("evaluate")
    if stage is None or not Store(stage.folder).exists("evaluation.json"):
        where = "" if stage is None else f": there is no {stage.folder}/evaluation.json"
        raise Stopped(
            f"error: run {found.info.run_id} has no finished evaluation{where}. Finish it with "
            "`mantis run`, then run `mantis report` again.",
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
def register(
    run: Run = "latest",
    root: Root = None,
    experiment: Experiment = None,
    as_json: AsJson = False,
) -> None:
    """Register the main arm of a run as a new version of the model.

    Moves the alias `candidate` to the new version. A version that was registered before keeps its
    number; its files are written again if they are lost.

    Example: mantis register latest
    """
    from pipelines.settings.tracking import experiment_name
    from pipelines.tracking import registry

    result = registry.register(tracker_of(root), run, experiment_name(experiment))
    print_json(result) if as_json else typer.echo(result["model"])


@ending_well
def promote(
    version: Annotated[
        str,
        typer.Argument(
            metavar="VERSION", help="Version as `mantis models` lists it: models:/mantis/3, or 3."
        ),
    ],
    alias: Annotated[str, typer.Option("--alias", help="Alias to move.")] = "champion",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Move an alias to a registered version.

    Example: mantis promote 3 --alias champion
    """
    from pipelines.tracking import registry

    result = registry.promote(tracker_of(root), version, alias)
    print_json(result) if as_json else typer.echo(
        f"models:/{result['name']}@{alias} is {result['model']}"
    )


@ending_well
def models(
    max_bpp: Annotated[
        float | None,
        typer.Option("--max-bpp", min=0, help="Largest rate to list, in bits per pixel."),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option("--min-top1", min=0, max=1, help="Lowest top-1 accuracy to list, 0 to 1."),
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """List the registered models, newest first.

    Shows the id that streams carry, the figures, the config and the aliases.

    With --max-bpp the most accurate model comes first. Of a model of several rates the
    level is named that keeps within the bounds.

    Example: mantis models --max-bpp 0.1
    """
    from pipelines.tracking import registry

    tracker = tracker_of(root)
    found = registry.models(tracker, max_bpp=max_bpp, min_top1=min_top1)
    if as_json:
        print_json({"models": found})
        return
    for entry in found:
        typer.echo(_model_line(entry))
    if found:
        return
    bounded = max_bpp is not None or min_top1 is not None
    known = len(registry.models(tracker)) if bounded else 0
    typer.echo(
        f"none of {known} models is within these bounds"
        if known
        else f"no model is registered in {tracker.place}. `mantis run --config ...` registers one.",
        err=True,
    )


@ending_well
def lineage(
    run: Run = "latest",
    root: Root = None,
    experiment: Experiment = None,
    as_json: AsJson = False,
) -> None:
    """Show the commit, versions, stages and models of a run.

    Lists each stage with the stages it was built on.

    Example: mantis lineage latest
    """
    import yaml

    from pipelines.settings.tracking import experiment_name
    from pipelines.tracking import registry

    found = registry.lineage(tracker_of(root), run, experiment_name(experiment))
    print_json(found) if as_json else typer.echo(yaml.safe_dump(found, sort_keys=False).rstrip())


@ending_well
def export(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write, a new one or an export.")
    ],
    half: Annotated[
        Literal["client", "server"],
        typer.Option("--half", help="The client for a device, or the server's networks."),
    ] = "client",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the client to 8-bit integers.")
    ] = False,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            help="Photographs, or folders, Parquet files and tars of them: int8 is calibrated by "
            f"{CALIBRATING} of them, and up to {MOST:,} are coded by torch and by onnxruntime to "
            "compare the streams. The default compares images made by a rule.",
        ),
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Export a client to ONNX, for devices without torch.

    The folder holds two graphs, the coding tables, and golden cases that `mantis-lite check` codes
    on the device. With `--half server` it holds the server's networks as one graph instead.

    Example: mantis export models:/mantis@champion -o client/ --images photos/
    """
    from mantis_core.codec.checkpoint import load_client, load_server
    from mantis_core.device.files import shown
    from pipelines.export.folders import check_target

    if half == "server":
        if int8 or images:
            raise Stopped("error: --int8 and --images are for the client.", MISTAKE)
        from pipelines.export.folders import unexported
        from pipelines.export.server import export_server

        server = load_server(model_folder(model, root))
        files = export_server(server, output)
        exported = {"folder": shown(output), "half": half, "files": files}
        _tell(as_json, exported, unexported(server.families))
        return
    if int8 and not images:
        raise Stopped(
            "error: --int8 is calibrated by photographs: give some with --images.", MISTAKE
        )
    if sys.version_info >= (3, 13):
        raise Stopped(
            "error: the exporter of ONNX and CompressAI share no numpy on Python 3.13 and newer: "
            "export with Python 3.11 or 3.12.",
            MISTAKE,
        )
    from pipelines.export.write import FILES, export_client

    check_target(output, FILES)  # before the images are read
    codec = load_client(model_folder(model, root))
    pictures, failures = _pictures(codec, images or [])
    found = export_client(
        codec,
        output,
        images=pictures,
        int8=int8,
        calibrating=CALIBRATING,
        say=lambda line: typer.echo(line, err=True),
    )
    told = {
        "folder": shown(found.folder),
        "half": half,
        "precision": "int8" if int8 else "float32",
        "files": found.files,
        "bytes": sum(found.files.values()),
        "golden": found.golden,
        "compared": found.compared,
        "equal": found.equal,
        "stream_id": codec.ids.stream.hex(),
    }
    _tell(as_json, told, failures)


@ending_well
def ui(
    root: Root = None,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port of this machine to serve on.")
    ] = 5000,
) -> None:
    """Show the runs and models in a browser: MLflow's pages, until Ctrl-C.

    Only this machine can open them. A store that is a server already is only named.

    Example: mantis ui --root runs
    """
    from pipelines.tracking.store.ui import UiFailed, serve

    uri = tracker_of(root).location.uri
    if uri.startswith("http"):
        typer.echo(f"MLflow serves its pages at {uri}")
        return
    try:
        serve(uri, port, started=typer.echo)
    except UiFailed as error:
        raise Stopped(f"error: {error}", error.exit_code) from None


@ending_well
def patch(
    model: Annotated[
        str,
        typer.Argument(metavar="CLIENT", help="Client half or whole codec that shall be patched."),
    ],
    change: Annotated[
        str,
        typer.Argument(
            metavar="PATCH",
            help="Folder of a patch, or the model that `add-task --grade row` or `adapter` made.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write: the patched client half.")
    ],
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Give a client the tasks that were added to its codec with the grade row or adapter.

    Works offline. Refuses a patch of another client, and a damaged one. What the client sent before
    it sends as before, to the bit.

    Example: mantis patch client/ patch/ -o client-2/
    """
    from mantis_core.device.files import shown
    from mantis_core.patch import apply_patch

    folder = model_folder(model, root)
    made = apply_patch(folder, model_folder(change, root), output)
    tasks = [task.name for task in made.extension.tasks]
    told = {"folder": shown(output), "tasks": tasks, "stream_id": made.child_id}
    if as_json:
        print_json(told)
        return
    typer.echo(f"{told['folder']}  {', '.join(tasks)}: streams {made.child_id}")


COMMANDS = (report, register, promote, models, lineage, export, patch, ui)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _model_line(entry: dict[str, Any]) -> str:
    """Returns the line of `mantis models` for a model."""
    figures = f"top1 {_figure(entry['top1'])}  bpp {_figure(entry['bpp'])}"
    if entry["level"] is not None:
        figures += f"  level {entry['level']} of {entry['levels'][-1]['level']}"
    config = str(entry["config"])
    if entry["trial"] is not None:
        values = " ".join(f"{name}={value}" for name, value in entry["overrides"].items())
        config = f"{config}, trial {entry['trial']}: {values}"
    aliases = " ".join(f"@{alias}" for alias in entry["aliases"])
    stream_id = entry["stream_id"] or "-"
    return f"{entry['model']}  {stream_id}  {figures}  {config}  {aliases}".rstrip()


def _pictures(codec: ClientCodec, paths: list[Path]) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Returns up to MOST images (3, H, W), evenly from all that were found, and what failed."""
    from mantis_core.device.files import FilesError, shown
    from mantis_core.pixels import ImageError
    from pipelines.coding.packed import read_image
    from pipelines.commands.streams import find_images
    from pipelines.export.write import evenly

    if not paths:
        return [], []
    found = find_images(paths, None)
    pictures, failures = [], [failure.reason for failure in found.failures]
    for source in evenly(found.sources, MOST):
        try:
            pictures.append(codec.prepare_image(read_image(source)).numpy())
        except FilesError as error:
            failures.append(str(error))
        except ImageError as error:
            failures.append(f"{shown(source.path)} is no readable image: {error}")
    if not pictures:
        raise Stopped("\n".join(f"error: {each}" for each in failures), MISTAKE)
    return pictures, failures


def _tell(as_json: bool, told: Mapping[str, object], failures: list[str]) -> None:
    for failure in failures:
        typer.echo(f"left out: {failure}", err=True)
    if as_json:
        print_json({**told, "failures": failures})
        return
    files = told["files"]
    assert isinstance(files, dict)
    for name, size in files.items():
        typer.echo(f"{told['folder']}/{name}  {size:,} bytes")
    if "compared" in told:
        typer.echo(
            f"{told['equal']} of {told['compared']} images give the stream that torch gives; "
            f"{told['golden']} golden cases"
        )
