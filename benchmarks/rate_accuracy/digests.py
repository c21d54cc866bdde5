"""Renames points in results/ whose names come from recipes of earlier code.

    python -m benchmarks.rate_accuracy.digests --config configs/tiny_imagenet.yaml \
        --fingerprint 7fac9c9ffa1fa87b21b4478b2c1f54d9e42e952c8e54acd7b1a2891d7d6fed91 \
        data.root=FOLDER teacher.weights=FILE

A point is named by the recipe of the weights it measures. Recipes changed twice on 2026-11-28. They
held every field of the config, and now leave out fields at their default; four fields have since
been removed. The fingerprint of the data knew Parquet files by name and size, and now by their
labels too. Old and new recipe follow from the same config and data, so rows are renamed and nothing
is trained. A second run changes nothing.
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
from pipelines.chain.plan import plan_stages


def renamed(step: Step, fingerprint: str | None = None) -> Iterator[tuple[str, str]]:
    """Yields each old name of each point of a step with the new one.

    `fingerprint` is what earlier code made of the same data; None if it was the one of today.
    """
    earlier = step.plan.specs
    if fingerprint is not None:
        earlier = plan_stages(step.plan.settings, step.plan.table, fingerprint)
    for recipes in (recipes_before(earlier), {spec.name: spec.recipe for spec in earlier}):
        for arm in step.arms:
            yield named(step.name, arm, recipes[arm.stage] if arm.stage else ""), step.point_of(arm)


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
        "--fingerprint", help="of the data by earlier code: data_fingerprint in STARTED of prepare"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the config's"
    )
    arguments = parser.parse_intermixed_args()
    names: dict[str, str] = {}
    for protocol in PROTOCOLS.values():
        for step in steps(protocol, arguments.config, arguments.overrides):
            names |= dict(renamed(step, arguments.fingerprint))
    say(f"{rename(RESULTS, names)} rows renamed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
