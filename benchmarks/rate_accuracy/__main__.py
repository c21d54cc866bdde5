"""Runs the rate-accuracy study: trains missing models and prints points, BD figures and floors.

    python -m benchmarks.rate_accuracy --config configs/tiny_imagenet.yaml --protocol full \
        data.root=FOLDER teacher.weights=FILE

The study asks whether a codec gains from knowing the tasks. Every seed is one run of the stage
chain (`mantis evaluate`), which can be resumed and trains nothing twice. A finished point is a row
of results/rate_accuracy.csv; the sizes and hits of its images are a file in results/images/. A
point is named by its recipe, which follows from the config. A point in the table is not trained
again, whatever commit made it; its row names that commit. The last line is one JSON object.
`--data PATH` also scores the models on other images.

`--seeds 0 --phases 1` runs a part of the study, which can be continued later or on another machine.
`--kinds` and `--rates` with `--plain` select an even smaller part.

`--plain SHARDS --jobs N` trains and measures without Ray and MLflow, N processes at once, on shards
that `mantis prepare` wrote. It suits a machine with a GPU and few CPUs. It writes each point as
soon as it is measured. All seeds are trained and measured on SHARDS: they have the same images in
the same order, as the intervals need it, and one holdout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.program import commit, count, listed, one_message, say
from benchmarks.rate_accuracy.points import (
    COLUMNS,
    FIGURES,
    RESULTS,
    append_rows,
    bd_figures,
    plot,
    read_rows,
    summarise,
    times_smaller,
    worth_sending,
    write_images,
)
from benchmarks.rate_accuracy.protocols import EXITS_WERE_CHOSEN, PROTOCOLS, Step, steps
from benchmarks.rate_accuracy.tables import show_factors, show_intervals, show_points
from pipelines.evaluation.arms import Arm
from pipelines.evaluation.split_pass import Evaluated, arm_figures
from pipelines.settings.arms import ARM_KINDS

IMAGE_COLUMNS = (
    "row_id",
    "class_label",
    "class_index",
    "wire_bytes",
    "payload_bytes",
    "session_bytes",
)


def run_step(step: Step, config: str) -> None:
    """Runs the missing stages of a step in the pipeline. Exits if the pipeline fails."""
    command = [sys.executable, "-m", "pipelines", "evaluate", "--config", config, *step.overrides]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def run_plainly(
    missing: Sequence[Step], arguments: argparse.Namespace, table: Path, known: set[str]
) -> None:
    """Measures the missing points without Ray. Writes each point as soon as it is measured."""
    from pipelines.chain.plain import run_plain
    from pipelines.chain.plan import with_adopted

    if arguments.reuse:
        missing = [
            replace(
                step,
                plan=replace(
                    step.plan,
                    specs=with_adopted(step.plan.specs, step.plan.settings, search=True),
                ),
            )
            for step in missing
        ]

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
        any_seed=True,
    )


def collect(step: Step, protocol: str, known: set[str]) -> list[dict[str, Any]]:
    """Returns the rows of a finished step's new points, and writes the files of their images."""
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
    """Returns the row of one point, and writes the sizes and hits of its images by row id."""
    point = step.point_of(arm)
    named = images["class_index"] == images["class_label"]
    write_images(
        point,
        images["wire_bytes"],
        images["payload_bytes"],
        named & (images["class_label"] >= 0),
        images["session_bytes"],
    )
    key = step.specs[arm.stage].key if arm.stage else None
    own = (arm.kind, arm.seed, arm.rate_weight, arm.quality, arm.scale, arm.exit_confidence)
    row = dict(zip(COLUMNS, (point, step.name, protocol, *own, commit(RESULTS), key), strict=True))
    row |= {name: figures.get(metric) for name, metric in FIGURES.items()}
    row["classes"] = len(step.plan.table.classes) if single_class else None
    return row


def score_elsewhere(done: Sequence[Step], data: str) -> list[dict[str, Any]]:
    """Scores every trained codec of the study on other images with the same classes."""
    scored = []
    for folder in sorted({s.specs[a.stage].folder for s in done for a in s.arms if a.stage}):
        model = Path(folder) / "checkpoint"
        if "stage2" not in folder or "per_task" in folder or not model.is_dir():
            continue
        command = [sys.executable, "-m", "pipelines", "score", str(model), data, "--json"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        measured = json.loads(answer.splitlines()[-1])
        for each in measured["levels"] or [{"level": None, "metrics": measured["metrics"]}]:
            about = {"model": Path(folder).name, "level": each["level"]}
            scored.append({**about, **{n: each["metrics"].get(m) for n, m in FIGURES.items()}})
    return scored


@one_message
def main() -> None:
    """Runs the study's missing steps, then prints the points and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--data", metavar="PATH", help="also score the models on these images")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a plot of the curves")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--seeds", type=listed(int), metavar="S,S", help="only these seeds of the protocol"
    )
    parser.add_argument(
        "--phases", type=count, metavar="N", help="only the first N phases of the protocol"
    )
    parser.add_argument(
        "--plain", metavar="SHARDS", help="run without Ray and MLflow on these prepared shards"
    )
    parser.add_argument(
        "--jobs", type=count, metavar="N", default=1, help="with --plain: N processes at once"
    )
    parser.add_argument(
        "--kinds", type=listed(str), metavar="K,K", help="with --plain: only arms of these kinds"
    )
    parser.add_argument(
        "--rates", type=listed(float), metavar="R,R", help="with --plain: only these rate weights"
    )
    parser.add_argument(
        "--qualities",
        type=listed(int),
        metavar="Q,Q",
        help="with --plain: only these qualities of image codecs",
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="with --plain: use models that other code has trained by the same recipe",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the config's"
    )
    arguments = parser.parse_intermixed_args()
    parts = (arguments.kinds, arguments.rates, arguments.qualities, arguments.reuse)
    if any(parts) and not arguments.plain:
        parser.error("--kinds, --rates, --qualities and --reuse need --plain")
    unknown = set(arguments.kinds or ()) - set(ARM_KINDS)
    if unknown:
        parser.error(
            f"--kinds {', '.join(sorted(unknown))}: there is no such kind; the kinds are "
            f"{', '.join(ARM_KINDS)}"
        )
    protocol = PROTOCOLS[arguments.protocol]
    for name in ("seeds", "rates"):
        allowed = getattr(protocol, name)
        strangers = sorted(set(getattr(arguments, name) or ()) - set(allowed))
        if strangers:
            parser.error(
                f"--{name} {strangers}: the protocol {arguments.protocol} has only {allowed}"
            )
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
    files = [row for row in study if row["quality"] is not None]  # equal in every protocol
    smaller = times_smaller([row for row in rows if row["quality"] is None] + files)
    points = summarise(rows)
    show_points(points)
    show_factors(smaller)
    sent = {row["point"] for row in worth_sending(rows)}
    result: dict[str, Any] = {
        "points": points,
        "bd_rate": bd_figures(rows, "wire_bytes", accuracy=False),
        "bd_rate_session": bd_figures(rows, "session_bytes", accuracy=False),
        "bd_rate_payload": bd_figures(rows, "payload_bytes", accuracy=False),
        "bd_top1": bd_figures(rows, "wire_bytes", accuracy=True),
        "not_worth_sending": [row["point"] for row in rows if row["point"] not in sent],
        "times_smaller": smaller,
        "notes": [EXITS_WERE_CHOSEN] if any(r["exit_confidence"] is not None for r in rows) else [],
    }
    show_intervals("BD-rate (%), wire bytes", result["bd_rate"])
    show_intervals("BD-rate (%), bytes in a session", result["bd_rate_session"])
    if result["not_worth_sending"]:
        say(
            f"{len(result['not_worth_sending'])} points are below their own client's accuracy, and "
            "in no BD figure"
        )
    for note in result["notes"]:
        say(note)
    if arguments.plot:
        arguments.plot.write_bytes(plot(rows))
    if arguments.data:
        result["elsewhere"] = score_elsewhere(done, arguments.data)
    print(json.dumps(result, allow_nan=False))


def _wanted(step: Step, arm: Arm, arguments: argparse.Namespace, known: set[str]) -> bool:
    """Returns True if the options select a point that is not in the table yet."""
    asked = arguments.kinds is None or arm.kind in arguments.kinds
    asked &= arguments.rates is None or arm.rate_weight in arguments.rates
    asked &= arguments.qualities is None or arm.quality in arguments.qualities
    return asked and step.point_of(arm) not in known


if __name__ == "__main__":
    main()
