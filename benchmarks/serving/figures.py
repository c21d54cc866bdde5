"""What the records of a load say: rates, percentiles, losses; and the tables of all parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.serving.load import Loaded, Sent

NAMES = {
    "mantis_serve": "mantis serve",
    "fastapi": "FastAPI, a stream at a time",
    "jpeg": "JPEG to the teacher",
}


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of all values, from 0 to 1, do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def of_load(loaded: Loaded) -> dict[str, Any]:
    """Requests, those that were lost with their statuses, the rate, and times in ms."""
    times = [1000 * (each.ended - each.began) for each in loaded.sent]
    lost = [each for each in loaded.sent if each.lost]
    return {
        "requests": len(times),
        "lost": len(lost),
        "lost_statuses": counts(str(each.status) for each in lost),
        "seconds": round(loaded.seconds, 2),
        "per_second": round((len(times) - len(lost)) / loaded.seconds, 1),
        "p50_ms": rounded(percentile(times, 0.5)),
        "p99_ms": rounded(percentile(times, 0.99)),
        "most_ms": rounded(max(times, default=math.nan)),
        "load_cpu": round(loaded.cpu_s / loaded.seconds, 3),
    }


def cpu_per_request(
    before: Mapping[str, float], after: Mapping[str, float], requests: int
) -> dict[str, float]:
    """Milliseconds of CPU for each request, by part of the service and in all."""
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    spent["all"] = sum(spent.values())
    return {name: round(1000 * value / max(1, requests), 3) for name, value in spent.items()}


def in_flight(sent: Sequence[Sent], moment: float) -> int:
    """How many requests had been sent at a moment and were not answered yet."""
    return sum(each.began <= moment < each.ended for each in sent)


def first_answer_of(sent: Sequence[Sent], answer: int, since: float) -> float | None:
    """Seconds from a moment to the first right answer of one model; None if it gave none."""
    return next(
        (each.ended - since for each in sent if each.answer == answer and each.ended >= since), None
    )


def counts(words: Any) -> dict[str, int]:
    """How often each word is there, in order of the words."""
    found: dict[str, int] = {}
    for word in sorted(words):
        found[word] = found.get(word, 0) + 1
    return found


def lost_anywhere(result: Mapping[str, Any]) -> int:
    """The good requests that all parts have lost, and the server errors on hostile ones."""
    total = 0
    for name, value in result.items():
        if isinstance(value, Mapping):
            total += lost_anywhere(value)
        elif name in ("lost", "server_errors"):
            total += int(value)
    return total


def rounded(value: float) -> float | None:
    """A figure for JSON, which has no NaN."""
    return None if math.isnan(value) else round(value, 2)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for each part that was measured."""
    makers = {
        "throughput": _throughput,
        "hostile": _hostile,
        "kill": _kill,
        "promotion": _promotion,
    }
    return [made for name, make in makers.items() if name in result for made in make(result[name])]


def _throughput(part: Mapping[str, Any]) -> list[Table]:
    table = Table(title="good requests of concurrent connections")
    _columns(
        table, "service", "requests/s", "p50\nms", "p99\nms", "CPU ms\na request", "idle\nCPU",
        "load's\nCPU", "bytes\na request", "lost",
    )  # fmt: skip
    for name, row in part.items():
        note = ", random weights" if row.get("random_weights") else ""
        table.add_row(
            NAMES[name] + note,
            *_cells(row, "per_second", "p50_ms", "p99_ms"),
            _text(row["cpu_ms"]["all"]),
            *_cells(row, "idle_cpu", "load_cpu", "bytes", "lost"),
        )
    return [table]


def _hostile(part: Mapping[str, Any]) -> list[Table]:
    good = Table(title="good requests beside hostile ones")
    _columns(good, "", "requests/s", "p50\nms", "p99\nms", "longest\nms", "requests", "lost")
    for label, name in (("without", "without"), ("with", "with")):
        names = ("per_second", "p50_ms", "p99_ms", "most_ms", "requests", "lost")
        good.add_row(label, *_cells(part[name], *names))
    statuses = sorted({status for each in part["kinds"].values() for status in each})
    title = f"{part['sent']} hostile requests in {part['seconds']} s by status (0: no reply)"
    bad = Table(title=title)
    _columns(bad, "kind", *statuses)
    for kind, found in sorted(part["kinds"].items()):
        bad.add_row(kind, *(str(found.get(status, "")) for status in statuses))
    memory = Table(title="resident memory in MiB")
    _columns(memory, "part", "before", "after")
    for name, value in part["memory_before"].items():
        memory.add_row(name, _text(value), _text(part["memory_after"].get(name)))
    return [good, bad, memory]


def _kill(part: Mapping[str, Any]) -> list[Table]:
    table = Table(title="one of two replicas killed")
    _columns(table, "requests", "lost", "in flight", "asked\nagain", "longest\nms")
    table.add_column("new one reached\nafter s", justify="right")
    table.add_column("both work\nafter s", justify="right")
    names = ("requests", "lost", "in_flight", "asked_again", "most_ms")
    late = f"over {part['waited_s']:g}"
    after = [part[name] or late for name in ("connected_s", "both_again_s")]
    table.add_row(*_cells(part, *names), *map(_text, after))
    return [table]


def _promotion(part: Mapping[str, Any]) -> list[Table]:
    table = Table(title="the alias moved under load")
    _columns(table, "requests", "lost", "p99\nms", "longest\nms", "new model answers\nafter s")
    after = ", ".join(_text(each) for each in part["answers_after_s"])
    table.add_row(*_cells(part, "requests", "lost", "p99_ms", "most_ms"), after)
    return [table]


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)


def _cells(row: Mapping[str, Any], *names: str) -> list[str]:
    return [_text(row[name]) for name in names]


def _text(value: Any) -> str:
    return "" if value is None else str(value)
