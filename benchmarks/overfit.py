"""Compares a stage's losses on images it was trained on with those on other images.

    python -m benchmarks.overfit SHARDS --config C [--stage stage1] [--images 2500] [key=value ...]

SHARDS is the folder that `mantis prepare` wrote. The losses of a finished stage 1 or stage 2 are
measured on validation images and on as many training images, without augmentation. Equal losses
mean that the stage does not overfit and more training would help. Trains nothing: the stage is read
from `storage.root`, whatever code trained it. The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.program import count, one_message
from data_prep.errors import DataError
from data_prep.manifest import Manifest, read_manifest
from data_prep.read.batches import local_batches
from data_prep.reading import ReadingConfig
from mantis_core.tasks import Batch
from mantis_core.training.meter import Meter
from mantis_core.training.recipe import Recipe
from pipelines.chain.plan import make_plan
from pipelines.settings.reading import load_settings
from pipelines.stages.record import stage_state
from pipelines.stages.spec import upstream_folders
from pipelines.storage import Store
from pipelines.training.problem import problem_of
from pipelines.training.weights import SavedWeights, stage_tensors

BATCH = 125
SPLITS = ("val", "train")


@torch.no_grad()
def losses(recipe: Recipe, batches: Iterable[Batch]) -> dict[str, float]:
    """Returns the recipe's figures in eval mode, as means over images."""
    recipe.eval()
    meter = Meter()
    for batch in batches:
        meter.add(recipe(batch, 1.0), batch.image.shape[2] * batch.image.shape[3])
    figures = meter.figures("of")
    return {name.removeprefix("of/"): round(value, 4) for name, value in figures.items()}


def first_images(
    shards: str, manifest: Manifest, reading: ReadingConfig, split: str, images: int
) -> Iterator[Batch]:
    """Yields the first `images` images of a split without augmentation, or all if it has fewer."""
    for arrays in local_batches(
        shards, manifest, reading, split=split, global_batch=BATCH, threads=1
    ):
        batch = Batch.from_arrays({name: values[:images] for name, values in arrays.items()})
        yield batch
        images -= len(batch)
        if images <= 0:
            return


@one_message
def main() -> int:
    """Measures the losses on both splits and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", help="folder that `mantis prepare` wrote")
    parser.add_argument("--config", required=True, help="the config that the stage was trained by")
    parser.add_argument("--stage", choices=("stage1", "stage2"), default="stage1")
    parser.add_argument(
        "--images", type=count, metavar="N", default=2500, help="at most N images of each split"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the config's"
    )
    arguments = parser.parse_intermixed_args()
    plan = make_plan(load_settings(arguments.config, arguments.overrides), adopt=True)
    spec = plan.by_name[arguments.stage]
    settings = spec.settings
    if stage_state(Store(settings.storage.root), spec, settings.tracking.uri) != "done":
        raise DataError(
            f"{settings.storage.root} has no finished {spec.name} of this config: train it first, "
            "or give the key=value overrides that it was trained with"
        )
    manifest = read_manifest(arguments.shards)
    problem = problem_of(manifest, settings.data.stored_short_side)
    assert spec.stage.recipe is not None
    weights = SavedWeights(upstream_folders(spec, plan.by_name))
    recipe = spec.stage.recipe(settings, problem, weights)
    # A stage stores only the tensors it trained. The recipe has loaded the teacher's tensors.
    found = recipe.student.load_state_dict(stage_tensors(spec.folder), strict=False)
    assert not found.unexpected_keys, found
    images = min(arguments.images, *(manifest.split(split).rows for split in SPLITS))
    sides = {
        split: losses(
            recipe, first_images(arguments.shards, manifest, settings.data.reading, split, images)
        )
        for split in SPLITS
    }
    shown = Table(spec.name, "not trained on", "trained on")
    for name, value in sides["val"].items():
        shown.add_row(name, str(value), str(sides["train"][name]))
    Console(stderr=True).print(shown)
    print(json.dumps({"stage": spec.folder, "images": images, **sides}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
