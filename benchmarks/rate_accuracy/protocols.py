"""Defines the protocols of the study: arms, rates, seeds and epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.chain.plan import Plan, make_plan
from pipelines.evaluation.arms import Arm
from pipelines.settings.reading import load_settings
from pipelines.stages.spec import StageSpec

EXITS_WERE_CHOSEN = (
    "Early exit: the confidences of every protocol were fixed after a look at validation images, "
    "of `none` at the highest rate weight. The figures with early exit come from the same images, "
    "so they may be slightly too good."
)
"""Goes with every figure of an arm with early exit."""

CODECS = "{jpeg: [5, 10, 20, 40, 75], webp: [0, 5, 10, 20, 40, 75], avif: [20, 30, 40, 55, 75]}"


@dataclass(frozen=True)
class Protocol:
    """The arms, rates and seeds of a study.

    `phases` lists the baselines of each phase. A phase begins when every seed has finished the
    previous one. The first of `rates` is the rate weight of the main arm. `exits` holds pairs of
    rate weight and confidence; arms at these weights are measured again with early exit. At a
    higher weight the latent adds less to the client's own answer, so a lower confidence is enough.
    How they were chosen: EXITS_WERE_CHOSEN. With `levels` one model is trained for all rates.
    """

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    phases: tuple[tuple[str, ...], ...]
    overrides: tuple[str, ...] = ()
    codecs: str = "{}"
    exits: tuple[tuple[float, float], ...] = ()
    levels: bool = False


PROTOCOLS = {
    "screen": Protocol(
        (0,),
        (1e-3, 4e-3),
        (("none",),),
        overrides=("data.train_rows=10000",),
        exits=((1e-3, 0.35), (4e-3, 0.2)),
    ),
    "full": Protocol(
        (0, 1, 2),
        (3e-4, 1e-3, 3e-3, 1e-2, 1e-4),
        (("none",), ("none", "none_prior", "student", "oracle", "teacher"), ("per_task",)),
        overrides=("stage1.epochs=6",),
        codecs=CODECS,
        exits=((1e-4, 0.65), (3e-4, 0.5), (1e-3, 0.35), (3e-3, 0.2), (1e-2, 0.1)),
    ),
    # The client's answer beside the latent: what is it worth, with conditioning and without?
    "answers": Protocol(
        (0, 1),
        (1e-3, 3e-3, 1e-2, 3e-4),
        (("none", "answer", "none_answer"),),
        overrides=("stage1.epochs=6",),
        exits=((3e-4, 0.5), (1e-3, 0.35), (3e-3, 0.2), (1e-2, 0.1)),
    ),
    # One model for every rate, of each kind: what do five trainings give that it does not?
    "levels": Protocol(
        (0, 1, 2),
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        (("none", "answer", "none_answer"), ("features_prior", "student_wide", "local")),
        overrides=("stage1.epochs=6", "stage2.epochs=6"),
        exits=((1e-4, 0.65), (3e-4, 0.5), (1e-3, 0.35), (3e-3, 0.2), (1e-2, 0.1)),
        levels=True,
    ),
    # Longer training: how close is top1 to the teacher's, and does conditioning still help?
    "long": Protocol(
        (0, 1, 2),
        (1e-4, 1e-3, 3e-5, 3e-4, 3e-3, 1e-2),
        (("none",),),
        overrides=("stage1.epochs=16", "stage1.rate_weight=3.e-4"),
        exits=((1e-4, 0.65), (3e-4, 0.5), (1e-3, 0.35), (3e-3, 0.2), (1e-2, 0.1)),
    ),
}


@dataclass(frozen=True)
class Step:
    """One run of the stage chain: a seed with the baselines of a phase.

    Steps of the same `phase` may run at the same time.
    """

    phase: int
    seed: int
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    plan: Plan
    name: str

    @property
    def specs(self) -> Mapping[str, StageSpec]:
        return self.plan.by_name

    def point_of(self, arm: Arm) -> str:
        """Returns the name of an arm's point, which holds the recipe of the measured weights."""
        return named(self.name, arm, self.specs[arm.stage].recipe if arm.stage else "")


def named(config: str, arm: Arm, recipe: str) -> str:
    """Builds the name of a point from config, arm and recipe.

    An arm that trains nothing has no recipe, so its seed is used.
    """
    stage = recipe[:12] or f"seed{arm.seed}"
    quality = "" if arm.quality is None else f"-q{arm.quality}"
    if arm.level is not None:
        stage += f"-l{arm.level}"
    if arm.scale is not None:
        quality += f"-s{arm.scale:g}"
    if arm.exit_confidence is not None:
        quality = f"-c{arm.exit_confidence:g}"
    return f"{config}-{arm.kind}-{stage}{quality}"


def steps(protocol: Protocol, config: str, overrides: Sequence[str]) -> Iterator[Step]:
    """Yields the runs of a study, phase by phase, with all seeds in each phase."""
    main, *others = protocol.rates
    of_rates = [
        f"stage2.rate_weights={sorted(protocol.rates)!r}",
        "evaluate.rate_weights=[]",
        "evaluate.baseline_rate_weights=null",
    ]
    if not protocol.levels:
        of_rates = [
            f"stage2.rate_weight={main!r}",
            f"evaluate.rate_weights={others!r}",
            f"evaluate.baseline_rate_weights={list(protocol.rates)!r}",
        ]
    exits = ", ".join(f"{rate!r}: {sure!r}" for rate, sure in protocol.exits)
    if not load_settings(config, overrides).model.detector.classes:
        exits = ""
    for number, baselines in enumerate(protocol.phases):
        for seed in protocol.seeds:
            own = [
                *overrides,
                *protocol.overrides,
                f"seed={seed}",
                *of_rates,
                f"evaluate.baselines=[{', '.join(baselines)}]",
                "evaluate.seeds=[]",
                f"evaluate.early_exit={{{exits}}}",
            ]
            once = number == 1 and seed == protocol.seeds[0]
            own.append(f"evaluate.codecs={protocol.codecs if once else '{}'}")
            own.append("evaluate.codec_teachers=true")
            plan = make_plan(load_settings(config, own))
            yield Step(number, seed, tuple(own), plan.arms, plan, Path(config).stem)
