"""Options and arguments that several commands have."""

from __future__ import annotations

import os
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
        help="Storage root of the runs. The default is the server at MLFLOW_TRACKING_URI, or "
        "./runs.",
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="MLflow run id of a pipeline, or `latest`.")
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="models:/mantis@ALIAS, models:/mantis/VERSION or a checkpoint folder.",
    ),
]
StreamFile = Annotated[Path, typer.Argument(metavar="FILE.mts", help="Stream of coded images.")]


def joined(overrides: Sequence[str] | None, address: str | None) -> list[str]:
    """Returns the overrides of the config, with the address of a cluster last."""
    own = [] if address is None else [f"cluster.address={address}"]
    return [*(overrides or ()), *own]


def model_folder(model: str, root: str | None) -> Path:
    """Returns the local checkpoint folder of a MODEL argument; downloads a registered model."""
    if not model.startswith("models:"):
        return Path(model)
    from pipelines.tracking.registry import resolve_model

    return resolve_model(model, tracker_of(root).location.uri)


def tracker_of(root: str | None) -> Tracker:
    """Returns the tracker of a command without a config.

    Uses --root, else MLFLOW_TRACKING_URI, else ./runs. Raises Stopped if there are no runs.
    """
    from pipelines.storage import absolute_root
    from pipelines.tracking.runs import Tracker, locate_tracking

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
