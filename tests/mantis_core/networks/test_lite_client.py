"""The client of EfficientNet-Lite0's first blocks: cost, weights, training, streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mantis_core.architecture import (
    ConditioningConfig,
    DetectorConfig,
    EncoderConfig,
    ModelConfig,
)
from mantis_core.baselines.local import local_classifier, local_recipe
from mantis_core.codec.checkpoint import load_client, load_server, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.config import Stage1Config
from mantis_core.errors import ModelError
from mantis_core.networks.client import Client, latent_size
from mantis_core.networks.cost import macs_of
from mantis_core.networks.lite import LiteBlocks, LiteStem, folded_state
from mantis_core.networks.preprocessing import normalise
from mantis_core.training.optim import parameter_groups
from mantis_core.training.stage1 import stage1_recipe
from tests.mantis_core.conftest import (
    SIZE,
    make_batch,
    make_codec,
    make_config,
    make_problem,
    make_stage1,
    make_stage2,
    make_teacher,
)
from tests.mantis_core.lite_package import install
from tests.mantis_core.recipe_checks import without_gradient

PROBLEM = make_problem()
SMALL = EncoderConfig(channels=8, blocks=0, latent_channels=4, stride=16)
PACKAGE = Stage1Config(epochs=1, batch_size=4, start="package")


def lite(**changes: Any) -> ModelConfig:
    detector = DetectorConfig(blocks=1, hidden=8)
    return make_config(client="lite0", **{"encoder": SMALL, "detector": detector, **changes})


def asked(**changes: Any) -> ModelConfig:
    return lite(requests="asked", prior="request", **changes)


def test_the_trunk_takes_the_multiply_adds_that_are_stated() -> None:
    one = EncoderConfig(channels=32, blocks=0, latent_channels=24, stride=16)
    client = macs_of(asked(encoder=one), 2, (224, 224), None)
    with torch.device("meta"):
        encoder = Client(asked(encoder=one), 2).encoder
    at_14 = 14 * 14 * sum(p.numel() for p in encoder.parameters() if p.ndim == 4)
    assert client.detector == 0
    assert (client.client - at_14) / 1e6 == pytest.approx(113.8, abs=0.2)
    assert client.client < 120e6
    detects = macs_of(lite(encoder=one), 2, (224, 224), None)
    assert detects.client - client.client == detects.detector > 10e6


@pytest.mark.parametrize(("stride", "size"), [(8, (72, 100)), (16, (72, 100)), (16, (64, 64))])
def test_the_latent_has_its_stride_and_every_kind_conditions_it(
    stride: int, size: tuple[int, int]
) -> None:
    encoder = SMALL.model_copy(update={"stride": stride, "blocks": 1})
    for kind in ("film", "attention", "gated", "none"):
        config = lite(encoder=encoder, conditioning=ConditioningConfig(kind=kind, hidden=4))
        client = Client(config, 3).eval()
        with torch.no_grad():
            view = client(torch.randn(2, 3, *size))
            latent = client.encode(view, torch.ones(2, 3))
        assert view.detected.shape == (2, 40 + 80, -(-size[0] // 8), -(-size[1] // 8))
        assert latent.shape == (2, 4, *latent_size(size, stride))


def test_trunk_and_detector_begin_as_the_package_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = install(tmp_path, monkeypatch)
    images = normalise(make_batch(PROBLEM, 2).image)
    config = lite(detector=DetectorConfig(blocks=2, hidden=8))
    recipe = stage1_recipe(PACKAGE, config, make_teacher(PROBLEM), PROBLEM, seed=0)
    client: Any = recipe.student.client
    with torch.no_grad():
        x = images
        for name in net.names[: 1 + LiteStem.blocks]:
            x = net.get_submodule(name)(x)
        torch.testing.assert_close(client.stem(images), x, atol=1e-4, rtol=1e-4)
        deep = net.block6(net.block5(x))
        torch.testing.assert_close(client.detector.deep(x), deep, atol=1e-4, rtol=1e-4)
    groups = parameter_groups(recipe.student, loaded=recipe.loaded)
    tuned = {**groups["fine_tuned"], **groups["fine_tuned_no_decay"]}
    parts = {".".join(name.split(".")[1:3]) for name in tuned}
    assert parts == {"stem.stem", *(f"stem.block{k}" for k in range(5)), "detector.deep"}
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in client.modules())


def test_a_channel_that_its_norm_has_switched_off_gives_its_bias_alone() -> None:
    state = {
        "a.conv.weight": torch.ones(2, 1, 1, 1),
        "a.norm.weight": torch.tensor([1e-6, 0.5]),
        "a.norm.bias": torch.tensor([0.25, -1.0]),
        "a.norm.running_mean": torch.tensor([3.0, 2.0]),
        "a.norm.running_var": torch.full((2,), 1.0 - 1e-3),
    }
    found = folded_state(state)
    assert found["a.conv.weight"].flatten().tolist() == [0.0, 0.5]
    torch.testing.assert_close(found["a.conv.bias"], torch.tensor([0.25, -2.0]), atol=1e-5, rtol=0)


def test_all_of_it_learns_in_both_stages() -> None:
    for config in (lite(), asked()):
        for recipe in (make_stage1(PROBLEM, config), make_stage2(PROBLEM, config)):
            recipe.train()
            recipe(make_batch(PROBLEM), 0.5).loss.backward()
            assert without_gradient(recipe) == []


def test_its_streams_are_read_by_a_server_of_their_own(tmp_path: Path) -> None:
    codec: Mantis = make_codec(PROBLEM, lite())
    save_model(tmp_path / "whole", codec, {})
    for half in ("client", "server"):
        save_half(tmp_path / half, tmp_path / "whole", half)
    images = make_batch(PROBLEM, 3).image
    sent = load_client(tmp_path / "client").encode(images)
    assert sent == codec.encode(images)
    answers = load_server(tmp_path / "server").decode(sent)
    assert [a.labels for a in answers] == [a.labels for a in codec.decode(sent)]
    assert codec.client_codec().describe()["client_bytes"] < 1e6


def test_the_classifier_on_the_device_has_the_same_trunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = install(tmp_path, monkeypatch)
    config, teacher = lite(), make_teacher(PROBLEM)
    recipe: Any = local_recipe(config, teacher, PROBLEM, seed=0, start="package")
    images = normalise(make_batch(PROBLEM, 2).image)
    with torch.no_grad():
        x = images
        for name in net.names[: 1 + LiteStem.blocks]:
            x = net.get_submodule(name)(x)
        torch.testing.assert_close(recipe.student.stem(images), x, atol=1e-4, rtol=1e-4)
    assert all(name.startswith("stem.") for name in recipe.loaded)
    recipe.train()(make_batch(PROBLEM), 0.5).loss.backward()
    assert without_gradient(recipe) == []
    budget = macs_of(config, len(PROBLEM.tasks), (SIZE, SIZE), None).client
    assert local_classifier(config, PROBLEM).cost((SIZE, SIZE))["client_macs"] <= budget


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder": {"start": "detector"}}, r"one trunk already: leave model\.encoder\.start out"),
        (
            {"wide_encoder": True, "single_task": True, "conditioning": {"kind": "none"}},
            r"leave out the baseline student_wide",
        ),
        ({"detector": {"blocks": 0}}, r"model\.detector\.blocks.* at least 1 block"),
    ],
)
def test_what_the_trunk_cannot_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ModelConfig.model_validate({"client": "lite0", **changes})


def test_weights_that_no_package_has_are_refused() -> None:
    with pytest.raises(ModelError, match=r"set model\.client=lite0, or stage1\.start=random"):
        stage1_recipe(PACKAGE, make_config(), make_teacher(PROBLEM), PROBLEM, seed=0)
    with pytest.raises(ModelError, match="has 11 blocks behind those of the stem"):
        LiteBlocks(12)
