"""What a codec is apart from its weights."""

from __future__ import annotations

from collections.abc import Callable

from mantis_core.architecture import ModelConfig
from mantis_core.codec.spec import model_spec
from mantis_core.tasks import Problem
from mantis_core.teachers.teacher import Teacher


def test_the_spec_of_a_codec_fits_the_teachers_features(
    problem: Problem, teacher: Teacher, small_config: Callable[..., ModelConfig]
) -> None:
    spec = model_spec(small_config(), teacher, problem)
    assert (spec.split_shape, spec.last_shape) == ((128, 4, 4), (512, 1, 1))
    assert (spec.teacher, spec.split, spec.classes) == ("resnet18", "layer2", problem.classes)
