"""A codec of another teacher than a ResNet, at a size that no stride divides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from mantis_core.architecture import EncoderConfig, ModelConfig
from mantis_core.codec.checkpoint import load_model, read_spec, save_model
from mantis_core.config import Stage1Config, Stage2Config
from mantis_core.tasks import Batch
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.stage1 import stage1_recipe
from mantis_core.training.stage2 import stage2_recipe
from tests.mantis_core.conftest import QUICK, make_batch, make_codec, make_problem
from tests.mantis_core.recipe_checks import train


def test_a_mobilenet_is_distilled_with_its_signs_and_the_codec_keeps_them(
    small_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    problem = replace(make_problem(single_class=False), image_size=(28, 20), short_side=20)
    model = small_config(encoder=EncoderConfig(channels=8, latent_channels=4, stride=16))
    torch.manual_seed(0)
    teacher = Teacher("mobilenet_v2", split="features.3", tasks=problem.tasks, image_size=(28, 20))
    first: Any = stage1_recipe(Stage1Config(**QUICK), model, teacher, problem, seed=0)  # type: ignore[arg-type]
    batch = cut(make_batch(problem), 28, 20)
    train(first, [batch])
    rebuilt = first.student.eval()(torch.randn(2, 3, 28, 20)).split
    assert rebuilt.shape[2:] == (7, 5)
    assert (rebuilt < 0).any()
    second: Any = stage2_recipe(
        Stage2Config(**QUICK),  # type: ignore[arg-type]
        model,
        teacher,
        problem,
        first.student.shipped(),
        seed=0,
    )
    train(second, [batch])
    second.save(second.student.eval(), tmp_path, "stage2", {})
    codec = load_model(tmp_path)
    assert (codec.spec.split_signed, codec.spec.last_signed) == (True, False)
    assert codec.server.decoder.signed
    streams = codec.encode(batch.image)
    ours, theirs = (model.decode(streams) for model in (codec, second.student))
    assert [a.to_dict() for a in ours] == [a.to_dict() for a in theirs]
    assert all(a.segmentation["ground"].shape == (28, 20) for a in ours if a.segmentation)
    codec.decode(codec.encode(cut(batch, 17, 20).image))  # a stream of another shape


def test_a_model_that_was_saved_before_signs_were_known_has_none(tmp_path: Path) -> None:
    save_model(tmp_path, make_codec(make_problem()), {})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for field in ("split_signed", "last_signed"):
        assert config.pop(field) is False
    spec = read_spec(config)
    assert (spec.split_signed, spec.last_signed) == (False, False)


def cut(batch: Batch, height: int, width: int) -> Batch:
    return replace(
        batch,
        image=batch.image[..., :height, :width],
        segmentation={k: v[..., :height, :width] for k, v in batch.segmentation.items()},
    )
