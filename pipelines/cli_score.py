"""The command score: measures one model on images that no experiment names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli_chain import Address, AsJson, Overrides
from pipelines.cli_errors import ending_well, print_json
from pipelines.cli_models import Model, model_folder

if TYPE_CHECKING:
    from pipelines.settings import Settings


@ending_well
def score(
    model: Model,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Parquet files or a folder of images by class")
    ],
    overrides: Overrides = None,
    root: Annotated[
        str | None, typer.Option("--root", help="where `models:/...` is looked up")
    ] = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """One model on other images of its classes, by real streams."""
    from pipelines.cluster import connect
    from pipelines.logs import captured_output
    from pipelines.settings import with_overrides
    from pipelines.storage import absolute_root

    folder = model_folder(model, root)
    joined = [*(overrides or ()), *([f"cluster.address={address}"] if address else ())]
    settings = with_overrides(_settings_around(folder), joined)
    runs = absolute_root(root or settings.storage.root)
    logs = Path("runs/logs") if "://" in runs else Path(runs) / "logs"
    with captured_output(logs), connect(settings.cluster, runs):
        from pipelines.evaluation import evaluate_model  # imports ray: what it reads is set by now

        measured = evaluate_model(folder, absolute_root(data), settings)
    if as_json:
        print_json(measured)
        return
    typer.echo(f"{measured['rows']} images, {measured['rejected']} rejected")
    for name, value in measured["metrics"].items():
        typer.echo(f"{name}  {value:.6g}")


COMMANDS = (score,)


def _settings_around(folder: Path) -> Settings:
    """Default settings over a model's own data and tasks; `evaluate` and `cluster` count."""
    import yaml

    from mantis_core.checkpoint import read_meta
    from pipelines.settings import Settings

    preparation = read_meta(folder)["preparation"]
    spec = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    tasks = []
    for task in spec["tasks"]:
        labels = {"labels": task["labels"]}
        if task["kind"] == "classification":
            labels = {"classes": [spec["classes"][index] for index in task["classes"]]}
        tasks.append({"name": task["name"], "kind": task["kind"], **labels})
    evaluate = {"batch_size": preparation["batch_size"]}
    return Settings.model_validate(
        {"data": preparation["data"], "tasks": tasks, "evaluate": evaluate}
    )
