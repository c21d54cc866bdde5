"""What is said where answers are no better than always giving the most frequent one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.report.chance import chance_sentences, is_a_guess
from pipelines.report.report import write_report
from tests.pipelines.report.test_report import arm, evaluation, text_of


def measured(top1: float, teacher: float | None = None, **fields: Any) -> dict[str, Any]:
    arms = [arm("mantis", name="stage2", rate=0.01, size=64.0, top1=top1)]
    if teacher is not None:
        arms.append(arm("teacher", top1=teacher))
    return evaluation(*arms, chance=0.2, **fields)


def test_a_page_names_chance_and_a_good_codec_gets_no_warning(tmp_path: Path) -> None:
    seen = text_of(write_report(measured(0.5), tmp_path).html)
    assert "interval 45.1 to 54.9); chance is 20.0 %" in seen
    assert "always giving the most frequent answer" in seen
    assert "smaller than the raw pixels" in seen
    assert "no better than chance" not in seen


def test_a_codec_at_chance_is_not_praised_for_its_size(tmp_path: Path) -> None:
    seen = text_of(write_report(measured(0.22, teacher=0.43), tmp_path).html)
    assert "Stage2 answers no better than chance (22.0% top1)" in seen
    assert "The codec needs more steps or more bytes" in seen
    assert "smaller than the raw pixels" not in seen


def test_a_teacher_at_chance_is_blamed_first() -> None:
    first, codec, teacher = chance_sentences(measured(0.19, teacher=0.21))
    assert first.startswith("chance is 20.0% top1")
    assert codec.startswith("stage2 answers no better than chance")
    assert teacher.startswith("its teacher is no better, so begin there")
    assert len(chance_sentences(measured(0.6, teacher=0.6))) == 1


def test_so_few_images_blame_nobody() -> None:
    made = {**measured(0.0, teacher=1.0, rows=2), "chance": 0.5}
    first, few = chance_sentences(made)
    assert first.startswith("chance is 50.0% top1")
    assert few.startswith("2 val images cannot tell answers from guesses, even if all are right")


@pytest.mark.parametrize(("rows", "guess"), [(20, True), (400, False)])
def test_few_images_cannot_tell_a_codec_from_a_guess(rows: int, guess: bool) -> None:
    made = measured(0.3, rows=rows)
    assert is_a_guess(made, made["arms"][0]) is guess


def test_an_evaluation_of_earlier_code_and_one_of_masks_say_nothing() -> None:
    assert chance_sentences(evaluation()) == []
    assert chance_sentences(evaluation(chance=None)) == []
