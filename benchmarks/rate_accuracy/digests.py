"""Renames points in results/ whose names come from recipes with fields at their default value.

    python -m benchmarks.rate_accuracy.digests --config configs/tiny_imagenet.yaml \
        data.root=FOLDER teacher.weights=FILE

A point is named by the recipe of the weights it measures. Until 2026-11-28 a recipe held every
field of the config, and four of these fields have since been removed. The old and the new recipe
follow from the same config, so rows are renamed and nothing is trained. A second run changes
nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.program import one_message, say
from benchmarks.rate_accuracy.points import RESULTS
from benchmarks.rate_accuracy.protocols import PROTOCOLS, Step, named, steps
from pipelines.chain.earlier import recipes_before


def renamed(step: Step) -> Iterator[tuple[str, str]]:
    """Yields the old and the new name of each point of a step."""
    before = recipes_before(step.plan.specs)
    for arm in step.arms:
        old = before[arm.stage] if arm.stage else ""
        yield named(step.name, arm, old), step.point_of(arm)


def rename(results: Path, names: dict[str, str]) -> int:
    """Rewrites the table and renames the files of images. Returns the number of renamed rows."""
    table = results / "rate_accuracy.csv"
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    changed = 0
    for row in rows[1:]:
        new = names.get(row[0], row[0])
        if new != row[0]:
            images = results / "images"
            (images / f"{row[0]}.csv.gz").rename(images / f"{new}.csv.gz")
            row[0] = new
            changed += 1
    with table.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return changed


@one_message
def main() -> int:
    """Renames the points of one config in all protocols."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the config's"
    )
    arguments = parser.parse_intermixed_args()
    names: dict[str, str] = {}
    for protocol in PROTOCOLS.values():
        for step in steps(protocol, arguments.config, arguments.overrides):
            names |= dict(renamed(step))
    say(f"{rename(RESULTS, names)} rows renamed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
