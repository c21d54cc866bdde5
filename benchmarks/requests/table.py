"""Rows of the study, and what they say: bytes by request, and what asking saves with intervals."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rate_accuracy.points import RESULTS, read_images, read_rows, write_images
from mantis_core.measure.bd_rate import Curve, CurveError, over_seeds, size_at
from mantis_core.tasks import TaskSpec
from pipelines.evaluation.split_pass import Evaluated, arm_figures
from pipelines.report.figures import task_metric

REPLICATES = 400
TABLE = RESULTS / "requests.csv"
FIGURES = {
    "accuracy": "val/task_top1",
    "wire_bytes": "val/wire_bytes",
    "session_bytes": "val/session_bytes",
    "payload_bytes": "val/payload_bytes",
    "client_macs": "val/client_macs",
    "client_bytes": "val/client_bytes",
}
COLUMNS = (
    "point",
    "cell",
    "kind",
    "seed",
    "rate_weight",
    "level",
    "quality",
    "scale",
    "commit",
    "key",
    *FIGURES,
    "questions",
    "by_request",
)
COMPARISONS = (
    *(
        (kind, "none")
        for kind in (
            "mantis",
            "film_prior",
            "film",
            "channels_prior",
            "channels",
            "none_prior",
            "per_task",
        )
    ),
    ("mantis", "per_task"),
    ("oracle", "none"),
    ("mantis", "codecs"),
    ("none", "codecs"),
)
"""The arm under test and the arm it stands against: how many more bytes does it need?

"codecs" are the image codecs in front of the teacher, of all sizes and qualities together.
"""
CODECS = {"codecs": ("jpeg", "webp", "avif")}
"""Kinds that stand together for one curve, the envelope of their points."""


def row_of(about: Mapping[str, Any], found: Evaluated, name: str) -> dict[str, Any]:
    """Returns the row of one arm, and writes the sizes and right answers of its images.

    `by_request` holds for each task the bytes of a reply in a session and the accuracy, as JSON.
    """
    own, metrics = found.answers[name], arm_figures(found, name)["metrics"]
    sizes = (own["wire_bytes"], own["payload_bytes"], own["session_bytes"])
    write_images(str(about["point"]), sizes[0], sizes[1], shares_right(own, found.tasks), sizes[2])
    by_request = {}
    for task in found.tasks:
        size = metrics.get(f"val/task/{task.name}/session_bytes", metrics.get("val/session_bytes"))
        value = metrics.get(task_metric({"name": task.name, "kind": task.kind}))
        by_request[task.name] = [_rounded(size, 2), _rounded(value, 4)]
    row = {column: metrics.get(metric) for column, metric in FIGURES.items()}
    row["questions"] = sum(task.is_classification for task in found.tasks)
    return {**about, **row, "by_request": json.dumps(by_request)}


def newest(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the last row of each kind, seed and rate: later recipes replace others.

    Of an image codec, of each quality and scale.
    """
    named = ("kind", "seed", "rate_weight", "quality", "scale")
    return list({tuple(row[name] for name in named): dict(row) for row in rows}.values())


def shares_right(own: Mapping[str, NDArray[Any]], tasks: Sequence[TaskSpec]) -> NDArray[np.float64]:
    """Returns which share of an image's classification tasks an arm answers right, (N,)."""
    named = np.array([task.is_classification for task in tasks])
    asked = own["task_mask"].astype(bool) & named
    right = (own["predicted"] == own["labels"]) & own["decoded"].astype(bool) & asked
    return np.asarray(right.sum(axis=1) / np.maximum(1, asked.sum(axis=1)), dtype=np.float64)


def append(row: Mapping[str, Any], path: Path = TABLE) -> None:
    """Appends a row to the table. The first row creates it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path = TABLE) -> list[dict[str, Any]]:
    """Reads the table's rows, `by_request` as a dict."""
    return [{**row, "by_request": json.loads(row["by_request"])} for row in read_rows(path)]


def curves(rows: Sequence[Mapping[str, Any]], kind: str, size: str) -> dict[int, Curve]:
    """Maps each seed to the curve of a kind, or of those in CODECS.

    `size` is "payload_bytes" or "session_bytes".
    """
    found = {}
    kinds = CODECS.get(kind, (kind,))
    for seed in sorted({row["seed"] for row in rows if row["kind"] in kinds}):
        own = [row for row in rows if row["kind"] in kinds and row["seed"] == seed]
        images = [read_images(row["point"]) for row in sorted(own, key=lambda row: row[size])]
        found[seed] = Curve(
            np.array([each[size] for each in images]), np.array([each["hit"] for each in images])
        )
    return found


def savings(rows: Sequence[Mapping[str, Any]], size: str) -> list[dict[str, Any]]:
    """Returns for each of COMPARISONS that the rows allow the bytes more at equal accuracy.

    In per cent, below 0 for a saving, over the mean of the requests: a BD-rate with its 95 %
    interval by bootstrap over images and seeds, and the t interval over seeds. Empty where one of
    the requests is for a segmentation: that has no right answers to count.
    """
    found = []
    if any(len(row["by_request"]) != row["questions"] for row in rows):
        return []  # the sizes of a mask's requests count, and its accuracy does not
    for test, against in COMPARISONS:
        ours, theirs = curves(rows, test, size), curves(rows, against, size)
        if against in CODECS and theirs:  # the same files for every seed
            theirs = dict.fromkeys(ours, next(iter(theirs.values())))
        both = sorted(ours.keys() & theirs.keys())
        if not both:
            continue
        about: dict[str, Any] = {"test": test, "against": against, "size": size, "seeds": both}
        pairs = [(ours[seed], theirs[seed]) for seed in both]
        about |= {"at": at_equal_accuracy(pairs)}
        try:
            interval = over_seeds([theirs[s] for s in both], [ours[s] for s in both])
        except CurveError as error:
            found.append({**about, "refused": str(error)})
            continue
        t_low, t_high = interval.over_seeds or (None, None)
        values = (interval.mean, interval.low, interval.high, t_low, t_high)
        names = ("mean", "low", "high", "t_low", "t_high")
        found.append({**about, **{n: _rounded(v, 2) for n, v in zip(names, values, strict=True)}})
    return found


def at_equal_accuracy(pairs: Sequence[tuple[Curve, Curve]]) -> dict[str, Any] | None:
    """Returns the bytes more of the first curve of each pair, where both answer equally well.

    The accuracy is a point below the most that all of them reach: there a codec is used, and a
    BD-rate may lack the range. Where a curve begins above that, it is the middle of the range that
    all have. In per cent, the mean over the pairs, with a 95 % interval by bootstrap over images,
    which are the same for all curves, and over pairs, one a seed. None where the curves have no
    range in common.
    """
    reached = [curve.points()[:, 1] for pair in pairs for curve in pair]
    best, least = min(map(np.max, reached)), max(map(np.min, reached))
    accuracy = float(best - 1.0 if least <= best - 1.0 else (least + best) / 2)

    def more(images: NDArray[np.int64] | None) -> list[float] | None:
        found = []
        for ours, theirs in pairs:
            own = size_at(ours.points(images), accuracy)
            other = size_at(theirs.points(images), accuracy)
            if own is None or other is None:
                return None
            found.append(100 * (own / other - 1))
        return found

    by_seed = more(None)
    if by_seed is None:
        return None
    mean = float(np.mean(by_seed))
    random, count = np.random.default_rng(0), pairs[0][0].sizes.shape[1]
    drawn = [more(random.integers(count, size=count)) for _ in range(REPLICATES)]
    known = [random.choice(each, len(each)).mean() for each in drawn if each is not None]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (mean, mean)
    return {
        "accuracy": round(accuracy, 2),
        "mean": round(mean, 2),
        "low": round(float(low), 2),
        "high": round(float(high), 2),
        "by_seed": [round(each, 2) for each in by_seed],
        "left_out": len(drawn) - len(known),
    }


def points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one point for each kind and rate: means over the seeds, by request too."""
    found = []
    named = ("kind", "rate_weight", "quality", "scale")
    order = list(dict.fromkeys(tuple(row[name] for name in named) for row in rows))
    for group in order:
        own = [row for row in rows if tuple(row[name] for name in named) == group]
        point: dict[str, Any] = dict(zip(named, group, strict=True))
        point["seeds"] = sorted(row["seed"] for row in own)
        for name in FIGURES:
            values = [row[name] for row in own if row[name] is not None]
            point[name] = _rounded(float(np.mean(values)), 5) if values else None
        point["by_request"] = {
            task: [_mean([row["by_request"][task][place] for row in own]) for place in (0, 1)]
            for task in own[0]["by_request"]
        }
        found.append(point)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(float(np.mean(known)), 4) if known else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
