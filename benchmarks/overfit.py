"""Is a codec held back by too little training, or by what it was trained on?

    python -m benchmarks.overfit SHARDS --config C [--stage stage1] [--images 2500] [key=value ...]

The losses of a finished stage 1 or stage 2 of this config on photographs that it was not trained
on, and on as many that it was, none of them augmented. SHARDS is the folder `mantis prepare` wrote.
Equal losses say that more training is what is missing. Trains nothing: the stage is taken from
`storage.root`, whatever code trained it. The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.plain_chain import adopt, upstream_folders
from benchmarks.program import count, one_message
from data_prep.reader import local_batches
from data_prep.schema import DataConfig, DataError, Manifest, read_manifest
from mantis_core.recipes import Recipe
from mantis_core.tasks import Batch
from mantis_core.training import Meter
from pipelines.run_record import stage_state
from pipelines.settings import load_settings
from pipelines.stages import make_plan
from pipelines.storage import Store
from pipelines.worker import build_recipe, stage_tensors

BATCH = 125
SPLITS = ("val", "train")


@torch.no_grad()
def losses(recipe: Recipe, batches: Iterable[Batch]) -> dict[str, float]:
    """The recipe's figures in eval mode, means in which every image weighs the same."""
    recipe.eval()
    meter = Meter()
    for batch in batches:
        meter.add(recipe(batch, 1.0), batch.image.shape[2] * batch.image.shape[3])
    figures = meter.figures("of")
    return {name.removeprefix("of/"): round(value, 4) for name, value in figures.items()}


def first_images(
    shards: str, manifest: Manifest, data: DataConfig, split: str, images: int
) -> Iterator[Batch]:
    """The first `images` of a split, or all if it has fewer, not augmented."""
    for arrays in local_batches(shards, manifest, data, split=split, global_batch=BATCH, threads=1):
        batch = Batch.from_arrays({name: values[:images] for name, values in arrays.items()})
        yield batch
        images -= len(batch)
        if images <= 0:
            return


@one_message
def main() -> int:
    """Both splits once, side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--config", required=True)
    parser.add_argument("--stage", choices=("stage1", "stage2"), default="stage1")
    parser.add_argument("--images", type=count, default=2500, help="of either split, at most")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    plan = adopt(make_plan(load_settings(arguments.config, arguments.overrides)))
    spec = next(each for each in plan.specs if each.name == arguments.stage)
    settings = spec.settings
    if stage_state(Store(settings.storage.root), spec, settings.tracking.uri) != "done":
        raise DataError(
            f"{settings.storage.root} has no finished {spec.name} of this config: train it first, "
            "or name the keys it was trained with"
        )
    manifest = read_manifest(arguments.shards)
    recipe = build_recipe(spec.kind, settings, manifest, upstream_folders(spec, plan))
    # A stage leaves what it trained; the teacher's part of its student is there already.
    found = recipe.student.load_state_dict(stage_tensors(spec.folder), strict=False)
    assert not found.unexpected_keys, found
    images = min(arguments.images, *(manifest.split(split).rows for split in SPLITS))
    sides = {
        split: losses(
            recipe, first_images(arguments.shards, manifest, settings.data, split, images)
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
