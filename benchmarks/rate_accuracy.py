"""The study: does knowing the tasks pay? Trains what is missing, gives points, BD figures, floors.

    python -m benchmarks.rate_accuracy --config configs/tiny_imagenet.yaml --protocol full \
        data.root=FOLDER teacher.weights=FILE

Every seed is one run of the stage chain (`mantis evaluate`), resumable and keyed, so that nothing
is trained twice. A finished point is a row of results/rate_accuracy.csv and its images' sizes and
hits a file below results/images. A point is named by its recipe, all that its config says of it:
one that is there is not trained again, whatever commit made it, which its row tells. The last line
is one JSON object. `--data PATH` then scores the models on other images.

`--seeds 0 --phases 1` does a part of it, to be gone on with later or elsewhere; `--kinds` and
`--rates` with `--plain` a smaller one.

`--plain SHARDS --jobs N` trains and measures without Ray and MLflow, N processes at once, on shards
that `mantis prepare` wrote: for a machine with a GPU and little else. It writes each point as soon
as it is measured.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.program import count, listed, one_message, say
from benchmarks.study_points import (
    COLUMNS,
    FIGURES,
    RESULTS,
    append_rows,
    bd_figures,
    plot,
    read_rows,
    summarise,
    times_smaller,
    write_images,
)
from benchmarks.study_tables import show_factors, show_points
from pipelines.evaluation import LABELS
from pipelines.plan import Arm, StageSpec, plan_arms
from pipelines.settings import load_settings
from pipelines.split_pass import Evaluated, arm_figures
from pipelines.stages import Plan, make_plan

IMAGE_COLUMNS = ("row_id", "class_label", "class_index", "wire_bytes", "payload_bytes")
CODECS = "{jpeg: [5, 10, 20, 40, 75], webp: [0, 5, 10, 20, 40, 75], avif: [20, 30, 40, 55, 75]}"


@dataclass(frozen=True)
class Protocol:
    """`baselines` by phase: a later phase is begun when every seed has the earlier one.

    The first of `rates` is the main arm's.
    `exits`: confidence by rate weight, at which arms are measured with early exit too. The lower
    the rate, the less a latent adds to the client's own answer, and the sooner that is enough.
    """

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    phases: tuple[tuple[str, ...], ...]
    overrides: tuple[str, ...] = ()
    codecs: str = "{}"
    exits: tuple[tuple[float, float], ...] = ()


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
    # Trained longer: how near to the teacher, and does conditioning still pay?
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
    """One run of the chain: a seed with some baselines, its arms and the stages they come from.

    Steps of one `phase` may run side by side."""

    phase: int
    seed: int
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    plan: Plan
    name: str

    @property
    def specs(self) -> Mapping[str, StageSpec]:
        return {spec.name: spec for spec in self.plan.specs}

    def point_of(self, arm: Arm) -> str:
        """Names a point by the recipe of the weights it measures, for ever."""
        stage = self.specs[arm.stage].recipe[:12] if arm.stage else f"seed{arm.seed}"
        quality = "" if arm.quality is None else f"-q{arm.quality}"
        if arm.exit_confidence is not None:
            quality = f"-c{arm.exit_confidence:g}"
        return f"{self.name}-{arm.kind}-{stage}{quality}"


def steps(protocol: Protocol, config: str, overrides: Sequence[str]) -> Iterator[Step]:
    """The runs of a study, phase by phase, all seeds in each."""
    main, *others = protocol.rates
    exits = ", ".join(f"{rate!r}: {sure!r}" for rate, sure in protocol.exits)
    if not load_settings(config, overrides).model.detector.classes:
        exits = ""
    for number, baselines in enumerate(protocol.phases):
        for seed in protocol.seeds:
            own = [
                *overrides,
                *protocol.overrides,
                f"seed={seed}",
                f"stage2.rate_weight={main!r}",
                f"evaluate.rate_weights={others!r}",
                f"evaluate.baseline_rate_weights={list(protocol.rates)!r}",
                f"evaluate.baselines=[{', '.join(baselines)}]",
                "evaluate.seeds=[]",
                f"evaluate.early_exit={{{exits}}}",
            ]
            once = number == 1 and seed == protocol.seeds[0]
            own.append(f"evaluate.codecs={protocol.codecs if once else '{}'}")
            own.append("evaluate.codec_teachers=true")
            settings = load_settings(config, own)
            arms = tuple(plan_arms(settings))
            yield Step(number, seed, tuple(own), arms, make_plan(settings), Path(config).stem)


def run_step(step: Step, config: str) -> None:
    """Trains and measures what the step lacks by the stage chain; ends the program if it fails."""
    command = [sys.executable, "-m", "pipelines", "evaluate", "--config", config, *step.overrides]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def run_plainly(
    missing: Sequence[Step], arguments: argparse.Namespace, table: Path, known: set[str]
) -> None:
    """The steps' unknown points without Ray; each is written as soon as it is measured."""
    from benchmarks.plain_chain import adopt, run_plain

    if arguments.reuse:
        missing = [replace(step, plan=adopt(step.plan)) for step in missing]

    def keep(number: int, arm: Arm, found: Evaluated) -> None:
        own, step = found.answers[arm.name], missing[number]
        figures = arm_figures(found, arm.name)["metrics"]
        row = point_row(
            step, arm, arguments.protocol, figures, own, single_class=found.single_class
        )
        append_rows(table, [row])
        known.add(step.point_of(arm))

    run_plain(
        [step.plan for step in missing],
        prepared=arguments.plain,
        jobs=arguments.jobs,
        say=say,
        skip=lambda number, arm: not _wanted(missing[number], arm, arguments, known),
        on_measured=keep,
    )


def collect(step: Step, protocol: str, known: set[str]) -> list[dict[str, Any]]:
    """The rows of a finished step's points that are not known yet; writes their images' files."""
    folder = Path(step.specs["evaluate"].folder)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    predictions = pq.read_table(folder / "predictions.parquet", columns=["arm", *IMAGE_COLUMNS])
    measured = {arm["name"]: arm["metrics"] for arm in evaluation["arms"]}
    rows = []
    for arm in step.arms:
        if step.point_of(arm) not in known:
            own = predictions.filter(pc.equal(predictions["arm"], arm.name)).sort_by("row_id")
            images = {name: own[name].to_numpy() for name in IMAGE_COLUMNS}
            rows.append(
                point_row(
                    step,
                    arm,
                    protocol,
                    measured[arm.name],
                    images,
                    single_class=evaluation["single_class"],
                )
            )
            known.add(step.point_of(arm))
    return rows


def point_row(
    step: Step,
    arm: Arm,
    protocol: str,
    figures: Mapping[str, Any],
    images: Mapping[str, NDArray[Any]],
    *,
    single_class: bool,
) -> dict[str, Any]:
    """One point's row; writes its images' sizes and hits, in the order of their row ids."""
    point = step.point_of(arm)
    named = images["class_index"] == images["class_label"]
    write_images(
        point,
        images["wire_bytes"],
        images["payload_bytes"],
        named & (images["class_label"] >= 0),
    )
    commit = _git("rev-parse", "--short=12", "HEAD")
    if _git("status", "--porcelain", "--untracked-files=no", "--", f":!{RESULTS}"):
        commit += "-dirty"
    key = step.specs[arm.stage].key if arm.stage else None
    own = (arm.kind, arm.seed, arm.rate_weight, arm.quality, arm.exit_confidence)
    row = dict(zip(COLUMNS, (point, step.name, protocol, *own, commit, key), strict=True))
    row |= {name: figures.get(metric) for name, metric in FIGURES.items()}
    row["classes"] = len(step.plan.table.classes) if single_class else None
    return row


def score_elsewhere(done: Sequence[Step], data: str) -> list[dict[str, Any]]:
    """Every trained codec of the study on other images of its classes."""
    scored = []
    for folder in sorted({s.specs[a.stage].folder for s in done for a in s.arms if a.stage}):
        model = Path(folder) / "checkpoint"
        if "stage2" not in folder or "per_task" in folder or not model.is_dir():
            continue
        command = [sys.executable, "-m", "pipelines", "score", str(model), data, "--json"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        metrics = json.loads(answer.splitlines()[-1])["metrics"]
        scored.append(
            {"model": Path(folder).name, **{n: metrics.get(m) for n, m in FIGURES.items()}}
        )
    return scored


@one_message
def main() -> None:
    """Runs the study's missing steps, then prints points and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--data", help="score the trained models on these images too")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves there")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--seeds", type=listed(int), metavar="S,S", help="only these of the protocol's"
    )
    parser.add_argument("--phases", type=count, help="only the first so many of the protocol's")
    parser.add_argument("--plain", metavar="SHARDS", help="without Ray, on these prepared shards")
    parser.add_argument("--jobs", type=count, default=1, help="with --plain: processes at once")
    parser.add_argument(
        "--kinds", type=listed(str), metavar="K,K", help="with --plain: only arms of these kinds"
    )
    parser.add_argument(
        "--rates", type=listed(float), metavar="R,R", help="with --plain: only these weights"
    )
    parser.add_argument(
        "--qualities", type=listed(int), metavar="Q,Q", help="with --plain: only these of files"
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="with --plain: take what other code has trained by the same recipe",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    parts = (arguments.kinds, arguments.rates, arguments.qualities, arguments.reuse)
    if any(parts) and not arguments.plain:
        parser.error("--kinds, --rates, --qualities and --reuse go with --plain")
    unknown = set(arguments.kinds or ()) - set(LABELS)
    if unknown:
        parser.error(f"--kinds {', '.join(sorted(unknown))}: known are {', '.join(LABELS)}")
    protocol = PROTOCOLS[arguments.protocol]
    for name in ("seeds", "rates"):
        allowed = getattr(protocol, name)
        strangers = sorted(set(getattr(arguments, name) or ()) - set(allowed))
        if strangers:
            parser.error(f"--{name} {strangers}: protocol {arguments.protocol} has {allowed}")
    table = RESULTS / "rate_accuracy.csv"
    done: list[Step] = []
    if not arguments.report_only:
        done = [
            step
            for step in steps(protocol, arguments.config, arguments.overrides)
            if (arguments.seeds is None or step.seed in arguments.seeds)
            and (arguments.phases is None or step.phase < arguments.phases)
        ]
        for _, phase in itertools.groupby(done, key=lambda step: step.phase):
            known = {row["point"] for row in read_rows(table)}
            missing = [s for s in phase if any(_wanted(s, a, arguments, known) for a in s.arms)]
            if arguments.plain and missing:
                run_plainly(missing, arguments, table, known)
            for step in [] if arguments.plain else missing:
                run_step(step, arguments.config)
                append_rows(table, collect(step, arguments.protocol, known))
    name = Path(arguments.config).stem
    study = [row for row in read_rows(table) if row["config"] == name]
    rows = [row for row in study if row["protocol"] == arguments.protocol]
    files = [row for row in study if row["quality"] is not None]  # the same in every protocol
    smaller = times_smaller([row for row in rows if row["quality"] is None] + files)
    points = summarise(rows)
    show_points(points)
    show_factors(smaller)
    result: dict[str, Any] = {
        "points": points,
        "bd_rate": bd_figures(rows, "wire_bytes", accuracy=False),
        "bd_rate_payload": bd_figures(rows, "payload_bytes", accuracy=False),
        "bd_top1": bd_figures(rows, "wire_bytes", accuracy=True),
        "bd_rate_without_exit": bd_figures(
            [row for row in rows if row["exit_confidence"] is None], "wire_bytes", accuracy=False
        ),
        "times_smaller": smaller,
    }
    if arguments.plot:
        arguments.plot.write_bytes(plot(rows))
    if arguments.data:
        result["elsewhere"] = score_elsewhere(done, arguments.data)
    print(json.dumps(result))


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _wanted(step: Step, arm: Arm, arguments: argparse.Namespace, known: set[str]) -> bool:
    """Whether a point is asked for and not there yet."""
    asked = arguments.kinds is None or arm.kind in arguments.kinds
    asked &= arguments.rates is None or arm.rate_weight in arguments.rates
    asked &= arguments.qualities is None or arm.quality in arguments.qualities
    return asked and step.point_of(arm) not in known


if __name__ == "__main__":
    main()
