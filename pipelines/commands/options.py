"""Options and arguments that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.errors import MISTAKE, Stopped

if TYPE_CHECKING:
    from pipelines.tracking.runs import Tracker
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Overrides of config fields, such as stage2.rate_weight=0.01."
    ),
]
Config = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the experiment.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the config and the plan, run nothing.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Ray cluster to join. The default is RAY_ADDRESS, or a local Ray."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")
]
Root = Annotated[
    str | None,
    typer.Option(
        "--root",
        help="Storage root of the runs. The default is the store at MLFLOW_TRACKING_URI, or "
        "./runs.",
    ),
]
Experiment = Annotated[
    str | None,
    typer.Option(
        "--experiment",
        help="MLflow experiment in which `latest` is looked up. The default is "
        "MLFLOW_EXPERIMENT_NAME, or all experiments.",
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="MLflow run id of a pipeline, or `latest`.")
]
Images = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH",
        help="Image files, Parquet files or tars of images, or folders whose images are taken.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="Task to send; repeat it for several. The default detects the tasks of each image.",
    ),
]
ExitConfidence = Annotated[
    float | None,
    typer.Option(
        "--exit-confidence",
        help="Confidence (0 to 1) from which the client answers by itself. It then sends the "
        "class and no latent.",
    ),
]
Level = Annotated[
    int | None,
    typer.Option(
        "--level",
        help="Rate level of a model of several rates. 0, the default, gives the largest streams "
        "and the best answers.",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        "--max-bytes",
        help="Most bytes of each stream. The model's lowest level that fits is taken, image by "
        "image.",
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint folder. NAME is mantis, or "
        "the config's tracking.model.",
    ),
]
StreamFile = Annotated[Path, typer.Argument(metavar="FILE.mts", help="Stream of coded images.")]


def joined(overrides: Sequence[str] | None, address: str | None) -> list[str]:
    """Returns the overrides of the config, with the address of a cluster last."""
    own = [] if address is None else [f"cluster.address={address}"]
    return [*(overrides or ()), *own]


def model_folder(model: str, root: str | None) -> Path:
    """Returns the local checkpoint folder of a MODEL argument; downloads a registered model.

    Raises Stopped or StorageError for a URI.
    """
    if not model.startswith("models:"):
        if "://" in model:
            from pipelines.storage import absolute_root

            raise Stopped(
                f"error: {absolute_root(model)} is a URI: copy that folder to this machine, or "
                "give models:/mantis@champion",
                MISTAKE,
            )
        return Path(model)
    from pipelines.tracking.store.versions import resolve_model

    return resolve_model(model, tracker_of(root).location.uri)


def tracker_of(root: str | None) -> Tracker:
    """Returns the tracker of a command without a config, for look-ups.

    Uses --root, else MLFLOW_TRACKING_URI, else ./runs. Raises Stopped if there is no store.
    """
    from dataclasses import replace

    from pipelines.settings.tracking import store_uri
    from pipelines.storage import absolute_root
    from pipelines.tracking.runs import Tracker, locate_tracking
    from pipelines.tracking.store.client import sqlite_file

    uri = store_uri(None, ask=root is None)
    where = absolute_root(root or "./runs")
    location = locate_tracking(uri, where)
    file = sqlite_file(location.uri)
    if uri is not None:  # ./runs has nothing to do with that store
        location = replace(location, root=None if file is None else str(file.parent))
    if file is not None and (not file.is_file() or not file.stat().st_size):
        state = "is empty" if file.is_file() else "does not exist"
        raise Stopped(f"error: {_no_runs(where, file, state, named=uri is not None)}", MISTAKE)
    return Tracker(location, "mantis")


def _no_runs(where: str, file: Path, state: str, *, named: bool) -> str:
    """Returns a message that says where runs were looked for, and where they may be."""
    from pipelines.settings.tracking import URI_VARIABLE
    from pipelines.stages.record import recorded_in
    from pipelines.storage import Store

    if named:
        return (
            f"there are no runs in {file}, which {URI_VARIABLE} names: it {state}. Give --root, or "
            f"change {URI_VARIABLE}."
        )
    text = f"there are no runs in {where}: {file} {state}."
    if store := recorded_in(Store(where)):
        return (
            f"{text} What ran there is recorded in {store}: set {URI_VARIABLE} to it, and leave "
            "out --root."
        )
    return f"{text} Give --root, set {URI_VARIABLE}, or make a run with `mantis run --config ...`"
