"""What a codec is apart from its weights."""

from __future__ import annotations

from collections.abc import Callable

from mantis_core.architecture import ModelConfig
from mantis_core.codec.spec import model_spec
from mantis_core.tasks import Problem
from mantis_core.teachers.teacher import Teacher
from tests.mantis_core.narrow_resnet import NAME, WIDTHS


def test_the_spec_of_a_codec_fits_the_teachers_features(
    problem: Problem, teacher: Teacher, small_config: Callable[..., ModelConfig]
) -> None:
    spec = model_spec(small_config(), teacher, problem)
    assert (spec.split_shape, spec.last_shape) == ((WIDTHS[1], 4, 4), (WIDTHS[3], 1, 1))
    assert (spec.teacher, spec.split, spec.classes) == (NAME, "layer2", problem.classes)
