"""The command `mantis score`: measures one model on images outside its experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.errors import MISTAKE, Stopped, ending_well, print_json
from pipelines.commands.options import Address, AsJson, Model, Overrides, joined, model_folder

if TYPE_CHECKING:
    from pipelines.settings.sections import Settings


@ending_well
def score(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Parquet or tar files (a file, a folder or a pattern), or a folder with one "
            "folder of images for each class.",
        ),
    ],
    overrides: Overrides = None,
    root: Annotated[
        str | None,
        typer.Option("--root", help="Storage root in which `models:/...` is looked up."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="Label file of a folder without class folders: CSV, or lines `file class`.",
        ),
    ] = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Measure one model on other images of its classes.

    Encodes every image to a real stream and decodes it. A model of several rates is measured at
    each of them, level 0 first.

    Example: mantis score models:/mantis@champion photos/
    """
    from pipelines.cluster.connect import connect
    from pipelines.cluster.preflight import check_room
    from pipelines.settings.reading import with_overrides
    from pipelines.storage import absolute_root
    from pipelines.terminal.logs import captured_output

    folder = model_folder(model, root)
    settings = with_overrides(_settings_around(folder), joined(overrides, address))
    runs = absolute_root(root or settings.storage.root)
    check_room(runs)
    logs = Path("runs/logs") if "://" in runs else Path(runs) / "logs"
    with captured_output(logs), connect(settings.cluster, runs):
        # Imports ray, so it stands after connect, which sets what ray reads at import.
        from pipelines.evaluation.score import evaluate_model

        measured = evaluate_model(
            folder,
            absolute_root(data),
            settings,
            runs,
            labels=None if labels is None else absolute_root(labels),
        )
    if as_json:
        print_json(measured)
        return
    counts = f"{measured['rows']} images, {measured['rejected']} rejected"
    typer.echo(f"{counts}, {measured['unassigned']} without a class of the model")
    for remark in measured["remarks"]:
        typer.echo(f"note: {remark}")
    for name, value in measured["metrics"].items():
        typer.echo(f"{name}  {value:.6g}")
    for each in measured["levels"][1:]:
        typer.echo(f"level {each['level']}, rate weight {each['rate_weight']:g}")
        for name in ("val/top1", "val/miou", "val/wire_bytes"):
            if name in each["metrics"]:
                typer.echo(f"  {name}  {each['metrics'][name]:.6g}")
    if measured["chance"] is not None:
        typer.echo(f"chance  {measured['chance']:.6g}")


COMMANDS = (score,)


def _settings_around(folder: Path) -> Settings:
    """Returns default settings with the data and tasks of a model.

    Scoring reads only `evaluate` and `cluster` of the other sections.
    """
    import yaml

    from mantis_core.folders import read_meta
    from pipelines.settings.sections import Settings

    preparation = read_meta(folder).get("preparation")
    if preparation is None:
        raise Stopped(
            f"error: {folder} is not the checkpoint of a stage 2: it does not say how its images "
            "were prepared. Give such a checkpoint, or models:/mantis@candidate.",
            MISTAKE,
        )
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
