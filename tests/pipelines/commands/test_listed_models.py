"""`mantis models`: what it prints, with a registry made up."""

from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app


def model(version: int, **fields: Any) -> dict[str, Any]:
    """A model as the registry lists it."""
    known = {
        "model": f"models:/mantis/{version}",
        "version": str(version),
        "aliases": [],
        "top1": 0.75,
        "bpp": 0.5,
        "level": None,
        "levels": [],
        "stream_id": "9f95d016",
        "config": "base",
        "trial": None,
        "overrides": {},
    }
    return {**known, **fields}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Models that the registry lists; the test puts them in."""
    found: list[dict[str, Any]] = []
    tracker = SimpleNamespace(place="the store")
    monkeypatch.setattr("pipelines.commands.models.tracker_of", lambda root: tracker)

    def listed(of: Any, max_bpp: float | None = None, min_top1: float | None = None) -> Any:
        assert of is tracker
        return [each for each in found if max_bpp is None or each["bpp"] <= max_bpp]

    monkeypatch.setattr("pipelines.tracking.registry.models", listed)
    return found


def mantis(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_model_is_listed_with_the_id_that_its_streams_carry(
    registered: list[dict[str, Any]],
) -> None:
    registered += [model(2, aliases=["candidate"]), model(1, stream_id=None)]
    lines = mantis("models").stdout.splitlines()
    assert lines == [
        "models:/mantis/2  9f95d016  top1 0.75  bpp 0.5  base  @candidate",
        "models:/mantis/1  -  top1 0.75  bpp 0.5  base",
    ]


def test_a_model_of_several_rates_is_listed_with_the_level_of_the_figures(
    registered: list[dict[str, Any]],
) -> None:
    levels = [{"level": level, "top1": 0.75, "bpp": 0.5} for level in (0, 4, 8)]
    registered.append(model(4, level=4, levels=levels))
    (line,) = mantis("models").stdout.splitlines()
    assert line == "models:/mantis/4  9f95d016  top1 0.75  bpp 0.5  level 4 of 8  base"


def test_a_tuned_model_shows_its_trial_and_values(registered: list[dict[str, Any]]) -> None:
    registered.append(model(3, trial=7, overrides={"stage2.rate_weight": 0.004}))
    assert "base, trial 7: stage2.rate_weight=0.004" in mantis("models").stdout


def test_an_empty_answer_says_so(registered: list[dict[str, Any]]) -> None:
    none = mantis("models")
    assert (none.exit_code, none.stdout) == (0, "")
    assert none.stderr.startswith("no model is registered in the store. `mantis run")
    registered.append(model(1))
    assert (
        mantis("models", "--max-bpp", "0.1").stderr == "none of 1 models is within these bounds\n"
    )
    assert mantis("models", "--json", "--max-bpp", "0.1").stdout == '{"models": []}\n'
