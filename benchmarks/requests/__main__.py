"""Runs the study of requests: what does it save that the server asks?

    python -m benchmarks.requests scenes-4 storage.root=FOLDER
    python -m benchmarks.requests mosaic attributes camvid storage.root=FOLDER data.root=FOLDER \
        teacher.start=FILE
    python -m benchmarks.requests nettewoof storage.root=FOLDER data.root=FOLDER

Each cell is one experiment with several questions about every image, see cells.py, and three seeds.
It is trained and measured without Ray, `--jobs N` processes at once. A point that is measured is a
row of results/requests.csv, with the sizes and right answers of its images in results/images/. The
same command later goes on with those that are missing. `--report-only` trains nothing. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.program import commit, count, listed, one_message, say
from benchmarks.rate_accuracy.points import RESULTS
from benchmarks.rate_accuracy.protocols import named
from benchmarks.requests.cells import CELLS, Cell, settings_of
from benchmarks.requests.plot import plot
from benchmarks.requests.table import CODECS, TABLE, append, newest, points, read, row_of, savings
from pipelines.chain.plan import Plan, make_plan, with_adopted
from pipelines.evaluation.arms import Arm
from pipelines.evaluation.split_pass import Evaluated
from pipelines.settings.arms import ARM_KINDS

WIDTH = 200  # characters of a table that goes to a file


def run(name: str, cell: Cell, arguments: argparse.Namespace) -> None:
    """Trains and measures the points of a cell that the table does not have yet."""
    from pipelines.chain.plain import prepare_plain, run_plain

    plans = [make_plan(settings_of(cell, seed, arguments.overrides)) for seed in arguments.seeds]
    if arguments.reuse:
        plans = [
            replace(plan, specs=with_adopted(plan.specs, plan.settings, search=True))
            for plan in plans
        ]
    known = {row["point"] for row in read()}
    strangers = set(arguments.kinds or ()) - {arm.kind for plan in plans for arm in plan.arms}
    if strangers:
        raise SystemExit(f"--kinds {', '.join(sorted(strangers))}: {name} has no such arm")

    def skipped(number: int, arm: Arm) -> bool:
        wanted = arguments.kinds is None or arm.kind in arguments.kinds
        once = arm.seed == arguments.seeds[0] or ARM_KINDS[arm.kind].measures != "teacher"
        return not (wanted and once) or point_of(name, plans[number], arm) in known

    def keep(number: int, arm: Arm, found: Evaluated) -> None:
        plan = plans[number]
        about = {
            "point": point_of(name, plan, arm),
            "cell": name,
            "kind": arm.kind,
            "seed": arm.seed,
            "rate_weight": arm.rate_weight,
            "level": arm.level,
            "quality": arm.quality,
            "scale": arm.scale,
            "commit": commit(RESULTS),
            "key": plan.by_name[arm.stage].key if arm.stage else None,
        }
        append(row_of(about, found, arm.name))

    if all(skipped(number, arm) for number, plan in enumerate(plans) for arm in plan.arms):
        return
    # Seed 0's, whichever are asked for: intervals need the same images for all seeds.
    first = make_plan(settings_of(cell, 0, arguments.overrides))
    prepared = prepare_plain(first, jobs=arguments.jobs, say=say)
    run_plain(
        plans,
        prepared=prepared,
        jobs=arguments.jobs,
        say=lambda line: say(f"{name}: {line}"),
        skip=skipped,
        on_measured=keep,
        any_seed=True,
    )


def point_of(name: str, plan: Plan, arm: Arm) -> str:
    """Returns the name of an arm's point, which holds the recipe of the measured weights."""
    return named(name, arm, plan.by_name[arm.stage].recipe if arm.stage else "")


def show(name: str, cell: Cell, found: Mapping[str, Any]) -> None:
    """Prints the points of a cell by request, and what asking saves."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)
    tasks = list(found["points"][0]["by_request"])
    table = Table(title=f"{name}: bytes of a reply in a session, and accuracy in %")
    for column in ("arm", "client\nMMAC", "mean\nB", "\n%"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for task in tasks:
        table.add_column(f"{task}\nB", justify="right", no_wrap=True)
        table.add_column("\n%", justify="right", no_wrap=True)
    for point in found["points"]:
        which = point["rate_weight"] if point["quality"] is None else f"q{point['quality']}"
        if point["scale"] is not None:
            which = f"{which}, {point['scale']:g} of the sides"
        label = ARM_KINDS[point["kind"]].label_for("asked")
        macs = "" if point["client_macs"] is None else f"{point['client_macs'] / 1e6:.1f}"
        cells = [f"{label}{'' if which is None else f', {which}'}", macs]
        for size, value in (
            (point["session_bytes"], point["accuracy"]),
            *(point["by_request"][task] for task in tasks),
        ):
            cells += ["" if size is None else f"{size:.1f}", _percent(value)]
        table.add_row(*cells)
    console.print(table)
    if cell.independent:
        share = 100 / cell.questions
        console.print(
            f"{cell.questions} independent questions: asking for one can save {100 - share:.0f} %"
        )
    for each in found["savings"]:
        pair = " against ".join(_label(each[name]) for name in ("test", "against"))
        figure = each.get("refused") or (
            f"{each['mean']:+.1f} % ({each['low']:+.1f} to {each['high']:+.1f})"
        )
        if each["at"]:
            at = each["at"]
            figure += f"; at {at['accuracy']:.1f} % right {at['mean']:+.1f} % "
            figure += f"({at['low']:+.1f} to {at['high']:+.1f})"
            if len(at["by_seed"]) > 1:
                figure += f", by seed {', '.join(f'{each:+.1f}' for each in at['by_seed'])}"
        console.print(f"{each['size'].replace('_', ' ')}, {pair}: {figure}")


def _label(kind: str) -> str:
    return "image codecs" if kind in CODECS else ARM_KINDS[kind].label_for("asked")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


@one_message
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the missing points of the cells, then prints tables and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL or key=value", help=", ".join(CELLS))
    parser.add_argument("--seeds", type=listed(int), metavar="S,S", default=(0, 1, 2))
    parser.add_argument("--kinds", type=listed(str), metavar="K,K", help="only arms of these kinds")
    parser.add_argument("--jobs", type=count, metavar="N", default=1, help="N processes at once")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a plot of the curves")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="use models that other code has trained by the same recipe",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides = [word for word in arguments.cells if "=" in word]
    names = [word for word in arguments.cells if "=" not in word] or list(CELLS)
    if unknown := [name for name in names if name not in CELLS]:
        parser.error(f"there is no cell {unknown[0]}; the cells are {', '.join(CELLS)}")
    if not arguments.report_only:
        for name in names:
            run(name, CELLS[name], arguments)
    rows = read() if TABLE.is_file() else []
    result = {}
    for name in names:
        own = newest([row for row in rows if row["cell"] == name])
        if own:
            sizes = ("payload_bytes", "session_bytes")
            result[name] = {
                "points": points(own),
                "savings": [each for size in sizes for each in savings(own, size)],
            }
            show(name, CELLS[name], result[name])
    if arguments.plot and result:
        arguments.plot.write_bytes(plot(result))
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
