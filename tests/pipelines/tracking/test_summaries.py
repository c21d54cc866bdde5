"""Tags of registered versions, and the level of a model of several rates that a look-up names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.tracking.summaries import summary, tags_of

STAGES = {name: SimpleNamespace(key=f"{name}-1") for name in ("prepare", "stage2", "evaluate")}
POINTS = [(0, 1e-3, 0.80, 0.40), (4, 1e-2, 0.75, 0.20), (8, 1e-1, 0.50, 0.05)]


def evaluation(*points: tuple[int | None, float, float, float]) -> dict[str, Any]:
    """A model measured at these levels, and another arm."""
    arms = [
        {
            "kind": kind,
            "stage_key": "stage2-1",
            "level": level,
            "rate_weight": rate,
            "metrics": {"val/top1": top1, "val/bpp": bpp, "val/wire_bytes": 100 * bpp},
        }
        for kind in ("mantis", "oracle")
        for level, rate, top1, bpp in points
    ]
    return {"tasks": [{"name": "a"}], "arms": arms}


def registered(*points: tuple[int | None, float, float, float]) -> Any:
    tags = tags_of(evaluation(*points), STAGES, "quickstart")
    return SimpleNamespace(name="mantis", version=3, run_id="r", tags=tags)


@pytest.mark.parametrize(
    ("bounds", "level"),
    [
        ({}, 0),
        ({"max_bpp": 0.3}, 4),
        ({"max_bpp": 0.3, "min_top1": 0.7}, 4),
        ({"min_top1": 0.7}, 4),
        ({"min_top1": 0.4}, 8),
        ({"max_bpp": 0.01}, 0),
    ],
)
def test_a_look_up_names_the_level_within_its_bounds(bounds: dict[str, float], level: int) -> None:
    found = summary(registered(*POINTS), [], **bounds)
    wanted = next(point for point in POINTS if point[0] == level)
    assert (found["level"], found["rate_weight"], found["top1"], found["bpp"]) == wanted
    assert found["wire_bytes"] == pytest.approx(100 * wanted[3])
    assert [each["level"] for each in found["levels"]] == [0, 4, 8]


def test_a_model_of_one_rate_has_no_levels() -> None:
    version = registered((None, 1e-3, 0.8, 0.4))
    assert "mantis.levels" not in version.tags
    found = summary(version, ["champion"], max_bpp=0.1)
    assert (found["level"], found["levels"]) == (None, [])
    assert (found["top1"], found["bpp"], found["aliases"]) == (0.8, 0.4, ["champion"])
