"""Plans the arms of an experiment: what `evaluate` measures, at which rates and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from mantis_core.rates import levels_of
from pipelines.settings.arms import ARM_KINDS, TUNED, ArmKind

if TYPE_CHECKING:
    from pipelines.settings.sections import Settings

SPLIT = "val"
EXAMPLES = 8
"""Number of images of each batch whose whole answer is kept for the report."""
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Arm:
    """One line of the evaluation: a codec or baseline at one rate and seed.

    `kind` is a key of ARM_KINDS. `quality` is set for an image codec, `scale` too where it codes
    images at a share of their sides, `exit_confidence` for an arm with early exit, `level` for a
    model of several rates. `stage` is the planned stage whose checkpoint the arm measures, "" for a
    teacher with given weights.
    """

    name: str
    kind: str
    rate_weight: float | None
    seed: int
    stage: str
    quality: int | None = None
    exit_confidence: float | None = None
    scale: float | None = None
    level: int | None = None

    @property
    def trains(self) -> str:
        """The kind of the stage that trains for this arm; "" if it uses the weights of another."""
        return self.stage.partition("/")[0] if self.stage == self.name else ""

    @property
    def suffix(self) -> str:
        """The name of the arm without the kind of its stage."""
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class ArmSource:
    """An arm and the folder of its weights.

    `folder` is that of a stage or a model, None for a teacher with given weights. `quality` and
    `scale` are those of an image codec; `exit_confidence` and `level` go to `ClientCodec.encode`.
    """

    name: str
    kind: str
    folder: str | None
    quality: int | None = None
    exit_confidence: float | None = None
    scale: float | None = None
    level: int | None = None


def plan_arms(settings: Settings) -> Iterator[Arm]:
    """Yields the arms that `evaluate` measures, the main arm first. The settings are validated."""
    evaluate, main_rate = settings.evaluate, settings.stage2.rate_weight
    seeds = (settings.seed, *evaluate.seeds)
    of_levels: list[tuple[float, int | None]] = [
        *zip(settings.stage2.rate_weights, levels_of(settings.stage2.rate_weights), strict=True)
    ]
    rates = evaluate.baseline_rate_weights
    rates = (main_rate,) if rates is None else rates
    own_points, points = (
        of_levels or [(rate, None) for rate in trained_at]
        for trained_at in ((main_rate, *evaluate.rate_weights), rates)
    )
    asked = [ARM_KINDS[name] for name in ARM_KINDS if name in evaluate.baselines]
    trained = {"mantis", *(kind.name for kind in asked if kind.measures == "own")}
    exits = [
        kind
        for kind in ARM_KINDS.values()
        if kind.asked_by == "early_exit" and kind.measures in trained - {"mantis"}
    ]

    def named(kind: str, rate: float, seed: int) -> str:
        own = ARM_KINDS[kind].measures == "own"
        parts = [
            *([kind] if own and kind != "mantis" else []),
            *([f"rate-{rate!r}"] if rate != main_rate else []),
            *([f"seed-{seed}"] if seed != settings.seed else []),
        ]
        first = "stage2" if own else kind
        return f"{first}/{'-'.join(parts)}" if parts else first

    def arm(
        kind: str, rate: float, level: int | None, seed: int, exits: float | None = None
    ) -> Arm:
        measures = ARM_KINDS[kind].measures
        whose = kind if measures == "own" else measures
        trained_at = rate if level is None else main_rate
        name = named(kind, trained_at, seed)
        if level:
            name = f"{kind}/level-{level}" + (f"-seed-{seed}" if seed != settings.seed else "")
        return Arm(
            name,
            kind,
            rate,
            seed,
            named(whose, trained_at, seed),
            exit_confidence=exits,
            level=level,
        )

    for seed in seeds:
        for rate, level in own_points:
            yield arm("mantis", rate, level, seed)
            if rate in evaluate.early_exit:
                yield arm("early_exit", rate, level, seed, evaluate.early_exit[rate])
    for seed in seeds:
        for rate, level in points:
            for kind in asked:
                if kind.measures == "own":
                    yield arm(kind.name, rate, level, seed)
            for kind in exits if rate in evaluate.early_exit else ():
                yield arm(kind.name, rate, level, seed, evaluate.early_exit[rate])
            for kind in asked:
                if kind.measures in trained:
                    yield arm(kind.name, rate, level, seed)
        for kind in asked:
            if kind.measures in ("local", "individual"):
                name = named(kind.name, main_rate, seed)
                yield Arm(name, kind.name, None, seed, name)
    yield from _of_the_teacher(settings, asked)


def _of_the_teacher(settings: Settings, asked: list[ArmKind]) -> Iterator[Arm]:
    """Yields the arms of the teacher, with and without image codecs, for the main seed alone."""
    evaluate, seed = settings.evaluate, settings.seed
    teacher = "teacher" if settings.teacher.weights == "train" else ""
    for codec, qualities in evaluate.codecs.items():
        tuned = codec + TUNED
        for quality, scale in product(qualities, evaluate.codec_scales):
            end = f"quality-{quality}" + (f"-scale-{scale!r}" if scale != 1 else "")
            own = scale if scale != 1 else None
            yield Arm(f"{codec}/{end}", codec, None, seed, teacher, quality, scale=own)
            if evaluate.codec_teachers:
                stage = f"codec_teacher/{codec}"
                yield Arm(f"{tuned}/{end}", tuned, None, seed, stage, quality, scale=own)
    for kind in asked:
        if kind.measures == "teacher":
            yield Arm(kind.name, kind.name, None, seed, teacher)


def arm_settings(settings: Settings, arm: Arm) -> Settings:
    """Returns the settings of the stage that an arm trains, without its section `evaluate`."""
    overrides = [f"seed={arm.seed}", *ARM_KINDS[arm.kind].overrides]
    if arm.rate_weight is not None and arm.level is None:
        overrides.append(f"stage2.rate_weight={arm.rate_weight!r}")
    if arm.stage.startswith("codec_teacher/"):
        codec = arm.kind.removesuffix(TUNED)
        qualities = list(settings.evaluate.codecs[codec])
        scales = list(settings.evaluate.codec_scales)
        overrides += [f"codec_teacher.codec={codec}", f"codec_teacher.qualities={qualities}"]
        overrides += [f"codec_teacher.scales={scales}"]
    return overridden(settings, overrides)


def overridden(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Returns settings with overrides of an arm, and without their section `evaluate`."""
    from pipelines.settings.reading import with_overrides
    from pipelines.settings.sections import EvaluateConfig

    alone = settings.model_copy(update={"evaluate": EvaluateConfig()})
    return with_overrides(alone, overrides)


def by_model(arms: Iterable[Arm]) -> list[list[Arm]]:
    """Returns arms that code with one model together, each of the others alone."""
    together: dict[tuple[bool, str], list[Arm]] = {}
    for arm in arms:
        codes = ARM_KINDS[arm.kind].loads == "codec"
        together.setdefault((codes, arm.stage if codes else arm.name), []).append(arm)
    return list(together.values())
