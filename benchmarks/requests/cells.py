"""Defines the cells of the study: data with several questions an image, arms and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings

COLOURS = ("red", "green", "blue", "yellow", "violet", "cyan", "orange", "grey")
"""The tasks of the source `scenes`, in its order."""
WITHOUT_BOUND = ("oracle", "none", "local", "teacher")
"""Arms of every cell, beside MANTiS."""
RIVALS = (*WITHOUT_BOUND, "per_task")
"""Those and the bound: a codec for each task, which takes as many trainings as there are tasks."""
PARTS = ("none_prior", "channels", "channels_prior", "film", "film_prior")
"""Arms with a part of MANTiS's conditioning: the request's prior, channel sets or FiLM, alone or
with the prior."""

CODECS = "{webp: [0, 5, 20, 40, 75], jpeg: [5, 15, 30, 60], avif: [15, 30, 50, 70]}"
SCALES = "[1.0, 0.75, 0.625, 0.5]"
"""Image codecs of every cell, and the sides at which they code, for an upper envelope."""


@dataclass(frozen=True)
class Cell:
    """One experiment of the study, with the arms in `baselines`.

    `questions` is how many an image has. `independent` says whether each has evidence of its own:
    then a request for one can save 1 - 1 / questions of the payload, and no more.
    """

    config: str
    questions: int
    overrides: tuple[str, ...] = ()
    baselines: tuple[str, ...] = RIVALS
    independent: bool = True


def _scenes(things: int, *baselines: str) -> Cell:
    tasks = ", ".join(f"{{name: {name}, classes_from: scenes}}" for name in COLOURS[:things])
    overrides = (f"data.sources.0.things={things}", f"tasks=[{tasks}]")
    return Cell(
        "configs/scenes.yaml",
        things,
        (*overrides, f"model.max_active_tasks={things}"),
        (*RIVALS, *baselines),
    )


CELLS = {
    "scenes-2": _scenes(2),
    "scenes-4": _scenes(4, *PARTS),
    "scenes-8": _scenes(8),
    "mosaic": Cell("configs/mosaic.yaml", 4),
    "attributes": Cell("configs/attributes.yaml", 5, baselines=WITHOUT_BOUND, independent=False),
    "camvid": Cell("configs/camvid.yaml", 9, baselines=WITHOUT_BOUND, independent=False),
    "nettewoof": Cell("configs/nettewoof.yaml", 3, baselines=WITHOUT_BOUND, independent=False),
}


def settings_of(cell: Cell, seed: int, overrides: Sequence[str]) -> Settings:
    """Returns the settings of a cell's experiment with a seed. `overrides` come last."""
    own = [
        *cell.overrides,
        f"evaluate.baselines=[{', '.join(cell.baselines)}]",
        f"evaluate.codecs={CODECS}",
        f"evaluate.codec_scales={SCALES}",
        f"seed={seed}",
        *overrides,
    ]
    return load_settings(cell.config, own)
