"""Compares answers with chance: what always giving the most frequent answer would bring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TOP1 = "val/top1"
SURE = 1.96
"""Standard errors above chance from which answers count as better: 95 % of guesses lie below."""


def chance_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns what chance is, and whether the main arm and its teacher are no better.

    `evaluation` is the content of evaluation.json. Empty where nothing is classified, or where
    earlier code wrote the evaluation, which did not know its chance.
    """
    chance = evaluation.get("chance")
    if chance is None:
        return []
    said = [f"chance is {chance:.1%} top1: what always giving the most frequent answer would bring"]
    main = next((arm for arm in evaluation["arms"] if arm["kind"] == "mantis"), None)
    if main is None or not is_a_guess(evaluation, main):
        return said
    if _most_guesses(evaluation) >= 1:
        rows = evaluation["rows"]
        said.append(
            f"{rows} val image{'s' * (rows != 1)} cannot tell answers from guesses, even if all "
            "are right: measure on more, with more images or a larger data.val_fraction"
        )
        return said
    said.append(
        f"{main['name']} answers no better than chance ({main['metrics'][TOP1]:.1%} top1): its "
        "bytes carry no answer"
    )
    teacher = next((arm for arm in evaluation["arms"] if arm["kind"] == "teacher"), None)
    if teacher is not None and is_a_guess(evaluation, teacher):
        said.append(
            "its teacher is no better, so begin there: more images, a larger "
            "teacher.training.epochs or a smaller teacher.training.batch_size"
        )
    else:
        said.append(
            "the codec needs more steps or more bytes: larger stage1.epochs and stage2.epochs, a "
            "smaller batch_size of both, or a smaller rate weight of stage2"
        )
    return said


def is_a_guess(evaluation: Mapping[str, Any], arm: Mapping[str, Any]) -> bool:
    """Returns whether an arm's top1 could be that of guesses, for so few images."""
    top1 = arm["metrics"].get(TOP1)
    if evaluation.get("chance") is None or top1 is None or not evaluation["rows"]:
        return False
    return bool(top1 <= _most_guesses(evaluation))


def _most_guesses(evaluation: Mapping[str, Any]) -> float:
    """Returns the top1 that 95 % of guesses stay below on so many images; it may be above 1."""
    chance: float = evaluation["chance"]
    return chance + SURE * math.sqrt(chance * (1 - chance) / evaluation["rows"])
