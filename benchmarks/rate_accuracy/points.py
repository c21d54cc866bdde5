"""Reads and writes a study's points and computes means, BD figures, floors and curves from them.

Trains and measures nothing; __main__.py does that.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mantis_core.measure.bd_rate import (
    Curve,
    CurveError,
    Demand,
    label_floor_bits,
    over_seeds,
    size_at,
)
from pipelines.report.figures import rd_figure, styled, to_png
from pipelines.settings.arms import TUNED, image_codecs

Array = NDArray[Any]
RESULTS = Path("results")
IMAGE_FIGURES = ("wire_bytes", "payload_bytes", "hit", "session_bytes")

FIGURES = {
    "top1": "val/top1",
    "wire_bytes": "val/wire_bytes",
    "payload_bytes": "val/payload_bytes",
    "session_bytes": "val/session_bytes",
    "estimated_bytes": "val/estimated_bytes",
    "coverage": "val/detection/coverage",
    "active_tasks": "val/detection/active_tasks",
    "answered": "val/answered",
    "answered_top1": "val/answered_top1",
    "first_task": "val/detection/first",
    "client_top1": "val/client_top1",
    "client_macs": "val/client_macs",
    "client_bytes": "val/client_bytes",
}

COLUMNS = (
    "point",
    "config",
    "protocol",
    "kind",
    "seed",
    "rate_weight",
    "quality",
    "scale",
    "exit_confidence",
    "commit",
    "key",
)


COMPARISONS = (
    *(
        ("conditioning", "mantis", kind)
        for kind in ("features_prior", "features", "none_prior", "none", "student_wide", "student")
    ),
    ("conditioning, early exit in both", "early_exit", "none_exit"),
    ("conditioning, early exit in both", "early_exit", "student_exit"),
    ("conditioning, the client's answer sent by both", "answer", "none_answer"),
    ("the client's answer sent", "answer", "mantis"),
    ("the client's answer sent", "none_answer", "none"),
    ("early exit", "early_exit", "mantis"),
    ("early exit", "answer_exit", "answer"),
    ("early exit", "none_exit", "none"),
    ("early exit", "student_exit", "student"),
    ("the true tasks given", "oracle", "none_told"),
    ("the true tasks given", "oracle", "per_task"),
    *(("image codecs", "mantis", kind) for name in image_codecs() for kind in (name, name + TUNED)),
)
"""What is compared with what: a question, the arm under test, the arm it stands against.

The two arms differ in what the question names, and in nothing else that saves bytes: neither has
early exit or knows the true tasks where the other does not.
"""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the table's rows. Numeric cells become numbers, empty ones None."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {name: _parsed(value) for name, value in row.items()} for row in csv.DictReader(file)
        ]


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to the table. The first rows create it."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *FIGURES, "classes"], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def write_images(point: str, wire: Array, payload: Array, hits: Array, session: Array) -> None:
    """Writes the sizes of each image and whether its answer was right, as a compressed CSV.

    A size of -1 means that there is no stream. Of an image with several questions `hits` is the
    share that was answered right.
    """
    (RESULTS / "images").mkdir(parents=True, exist_ok=True)
    columns = (wire, payload, hits.astype(float), session)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    lines = [",".join(IMAGE_FIGURES), *(f"{w:g},{p:.10g},{h:.6g},{s:g}" for w, p, h, s in rows)]
    text = "\n".join([*lines, ""]).encode()
    (RESULTS / "images" / f"{point}.csv.gz").write_bytes(gzip.compress(text, mtime=0))


def read_images(point: str) -> dict[str, Array]:
    """Reads the columns that `write_images` wrote. Earlier files have no `session_bytes`."""
    data = gzip.decompress((RESULTS / "images" / f"{point}.csv.gz").read_bytes()).decode()
    header, *lines = data.splitlines()
    values = np.loadtxt(lines, delimiter=",", ndmin=2)
    return dict(zip(header.split(","), values.T, strict=True))


def curves(rows: Sequence[Mapping[str, Any]], size: str) -> dict[str, dict[int, Curve]]:
    """Maps kind to seed to curve, for kinds that send bytes.

    `size` is "wire_bytes", "session_bytes" or "payload_bytes". Rows without that size are left out.
    """
    found: dict[str, dict[int, Curve]] = {}
    sized = [row for row in rows if row[size] is not None]
    for kind, seed in sorted({(row["kind"], row["seed"]) for row in sized}):
        own = [row for row in sized if (row["kind"], row["seed"]) == (kind, seed)]
        sizes, hits = [], []
        for row in sorted(own, key=lambda row: row["wire_bytes"]):
            images = read_images(row["point"])
            sizes.append(images[size].astype(float))
            hits.append(images["hit"].astype(bool))
        found.setdefault(kind, {})[seed] = Curve(np.array(sizes), np.array(hits))
    return found


def worth_sending(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows whose server is right at least as often as their client is alone.

    A stream with a worse answer than the client's own is not worth sending, at any size. Rows that
    do not say how often their client is right are kept.
    """
    return [row for row in rows if row["client_top1"] is None or row["top1"] >= row["client_top1"]]


def bd_figures(
    rows: Sequence[Mapping[str, Any]], size: str, *, accuracy: bool
) -> list[dict[str, Any]]:
    """Returns a BD figure for each of COMPARISONS that the rows allow, or why there is none.

    A figure has the `question` it answers, the arms `test` and `against`, a mean, its 95 % interval
    by bootstrap over images and seeds (`low`, `high`), the t interval over seeds (`t_low`,
    `t_high`; None for one seed) and the value of each seed. Points below the client's own accuracy
    are left out. A seed with too few points is left out and listed as `unfinished`.
    """
    by_kind = curves(worth_sending(rows), size)
    codecs = {row["kind"] for row in rows if row["quality"] is not None}
    found = []
    for question, test, anchor in COMPARISONS:
        if test in by_kind and anchor in by_kind:
            ours, theirs = by_kind[test], by_kind[anchor]
            if anchor in codecs:  # image codecs give the same files for every seed
                theirs = dict.fromkeys(ours, next(iter(theirs.values())))
            own = {"question": question, "test": test, "against": anchor}
            found.append({**own, **_interval(ours, theirs, accuracy=accuracy)})
    return found


def _interval(
    ours: Mapping[int, Curve], theirs: Mapping[int, Curve], *, accuracy: bool
) -> dict[str, Any]:
    both = sorted(ours.keys() & theirs.keys())
    needed = Demand().points
    seeds = [s for s in both if min(len(ours[s].sizes), len(theirs[s].sizes)) >= needed]
    try:
        if not seeds:
            raise CurveError(f"no seed has both curves at {needed} rates")
        found = over_seeds([theirs[s] for s in seeds], [ours[s] for s in seeds], accuracy=accuracy)
    except CurveError as error:
        return {"refused": str(error)}
    out: dict[str, Any] = {
        "mean": round(found.mean, 2),
        "low": round(found.low, 2),
        "high": round(found.high, 2),
        "t_low": None if found.over_seeds is None else round(found.over_seeds[0], 2),
        "t_high": None if found.over_seeds is None else round(found.over_seeds[1], 2),
        "seeds": {s: round(v, 2) for s, v in zip(seeds, found.seeds, strict=True)},
    }
    if len(seeds) < len(both):
        out["unfinished"] = [s for s in both if s not in seeds]
    return out


def times_smaller(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the size of each image codec relative to MANTiS at the same top1.

    There is one row per point of MANTiS, with means over seeds. A factor is None if the codec's
    curve does not reach that top1.
    """
    found = []
    codecs = sorted({row["kind"] for row in rows if row["quality"] is not None})
    for point in summarise([row for row in rows if row["kind"] in ("mantis", "early_exit")]):
        own: dict[str, Any] = {
            name: point[name]
            for name in ("kind", "rate_weight", "seeds", "top1", "wire_bytes", "payload_bytes")
        }
        for size in ("wire_bytes", "payload_bytes"):
            factors = {}
            for codec in codecs:
                curve = np.array([(r[size], 100 * r["top1"]) for r in rows if r["kind"] == codec])
                needed = size_at(curve, 100 * point["top1"])
                factors[codec] = None if needed is None else round(needed / point[size], 2)
            own[size.replace("bytes", "factor")] = factors
        found.append(own)
    return found


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one point per kind, rate, quality and scale: means, deviations and the floor.

    Both are over seeds. The floor is the bits that the label alone needs at that top1.
    """
    points = []
    named = ("kind", "rate_weight", "quality", "scale")
    groups = {tuple(row[name] for name in named) for row in rows}
    for group in sorted(groups, key=str):
        own = [row for row in rows if tuple(row[name] for name in named) == group]
        point: dict[str, Any] = {
            **dict(zip(named, group, strict=True)),
            "seeds": sorted(row["seed"] for row in own),
        }
        for name in FIGURES:
            values = [row[name] for row in own if row[name] is not None]
            if values:
                point[name] = round(float(np.mean(values)), 5)
            if len(values) > 1:
                point[f"{name}_std"] = round(float(np.std(values, ddof=1)), 5)
        if own[0]["classes"] and "payload_bytes" in point:
            floor = label_floor_bits(int(own[0]["classes"]), point["top1"])
            point["floor_bits"] = round(floor, 3)
            point["payload_over_floor"] = (
                round(8 * point["payload_bytes"] / floor, 1) if floor else None
            )
        points.append(point)
    return points


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws the rate-accuracy curves of all kinds as a PNG. Single seeds are small marks."""
    arms = [
        {
            "kind": row["kind"],
            "rate_weight": row["rate_weight"],
            "quality": row["quality"],
            "scale": row["scale"],
            "metrics": {FIGURES[name]: row[name] for name in FIGURES if row[name] is not None},
        }
        for row in rows
    ]
    with styled():
        return to_png(rd_figure(arms, width=8.0))


def _parsed(value: str) -> Any:
    if value == "":
        return None
    try:
        return int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            return value
