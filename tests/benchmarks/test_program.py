"""benchmarks/program.py: how the programs end where the user made the mistake."""

from __future__ import annotations

import argparse
import sys

import pytest

from benchmarks import overfit
from benchmarks.program import count, listed, one_message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--config", "nope.yaml"], "cannot read the config nope.yaml"),
        (
            ["--config", "configs/quickstart.yaml", "nowhere", "stage2.epoch=3"],
            "stage2.epoch: unknown key; did you mean 'epochs'?",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["overfit", *arguments])
    with pytest.raises(SystemExit) as ended:
        overfit.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


def test_another_error_keeps_its_traceback() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        one_message(broken)()


def test_an_interrupted_program_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        one_message(interrupted)()
    assert ended.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted. The same command keeps")


def test_a_count_is_one_or_more() -> None:
    assert count("12") == 12
    for text in ("0", "-1", "1.5", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not a count"):
            count(text)


def test_several_values_are_given_with_commas_so_that_overrides_may_follow() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=listed(int))
    parser.add_argument("overrides", nargs="*")
    found = parser.parse_args(["--seeds", "0,2", "a.b=1"])
    assert found.seeds == (0, 2)
    assert found.overrides == ["a.b=1"]


def test_a_list_of_something_else_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", type=listed(float))
    with pytest.raises(SystemExit):
        parser.parse_args(["--rates", "1e-3 3e-3"])
    assert (
        "1e-3 3e-3 is not a list of float: give values separated by commas"
        in capsys.readouterr().err
    )
