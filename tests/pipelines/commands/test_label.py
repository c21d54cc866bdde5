"""`mantis label` names photographs by a network of ImageNet's classes, or says why not."""

import csv
import json
from pathlib import Path

import pytest
import torch

from data_prep.imagenet import imagenet_wnids
from mantis_core.networks.preprocessing import normalise, prepare_image
from tests.mantis_core.lite_package import install
from tests.pipelines.commands.test_streams import mantis, picture

LITE = ("--teacher", "efficientnet_lite0", "-o")


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """An installed package of Lite0, whose network is returned."""
    return install(tmp_path / "package", monkeypatch)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, one of them in a folder of its own."""
    for name in ("1.png", "2.png", "deep/er/1.png"):
        picture(tmp_path / "photos" / name, (300, 240))
    return tmp_path / "photos"


def test_each_image_gets_the_networks_most_likely_class(
    network: torch.nn.Module, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels.csv"
    done = mantis("label", photos, *LITE, output, "--batch-size", 2)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{output}  3 images, ")
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["1.png", "2.png", "deep/er/1.png"]
    for row in rows:
        image = prepare_image((photos / row["file"]).read_bytes(), (224, 224), 224)
        with torch.no_grad():
            sure, said = torch.softmax(network(normalise(image[None])), dim=1)[0].max(dim=0)
        assert row["class"] == imagenet_wnids()[int(said)]
        assert float(row["probability"]) == pytest.approx(float(sure), abs=2e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.csv", "package", "photos"]


@pytest.mark.usefixtures("network")
def test_what_cannot_be_read_is_named_left_out_and_ends_with_3(
    photos: Path, tmp_path: Path
) -> None:
    (photos / "3.jpg").write_bytes(b"no image")
    output = tmp_path / "labels.csv"
    done = mantis("label", photos, *LITE, output, "--json")
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert (told["labels"], told["images"]) == (str(output), 3)
    (failure,) = told["failures"]
    assert failure["file"] == f"{photos}/3.jpg"
    assert "3.jpg is no readable image: not an image" in done.stderr
    assert "want a line for each image" in done.stderr
    assert "3.jpg" not in output.read_text()


@pytest.mark.usefixtures("network")
def test_a_file_is_overwritten_only_by_force_and_never_by_nothing(
    photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels.csv"
    output.write_text("mine")
    refused = mantis("label", photos, *LITE, output)
    assert (refused.exit_code, output.read_text()) == (2, "mine")
    assert "labels.csv exists: give another file with -o, or --force" in refused.stderr
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1.png").write_bytes(b"no image")
    failed = mantis("label", tmp_path / "bad", *LITE, output, "--force")
    assert (failed.exit_code, output.read_text()) == (2, "mine")
    assert mantis("label", photos, *LITE, output, "--force").exit_code == 0
    assert output.read_text().startswith("file,class,probability\n")


def test_a_mistake_gets_one_message_before_the_network_is_built(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    image = picture(tmp_path / "photos/1.png")
    cases = {
        (tmp_path / "empty", "efficientnet_lite0", "l.csv"): "there is no image in",
        (tmp_path / "none", "efficientnet_lite0", "l.csv"): "none does not exist. Give a folder",
        (image, "efficientnet_lite0", "l.csv"): "1.png is no folder. Give a folder",
        (image.parent, "efficientnet_lite0", "l.txt"): "l.txt is no name of a label file",
        (image.parent, "efficientnet_lite1", "l.csv"): "pip install 'mantis-codec[pretrained]'",
        (image.parent, "efficientnet_lite9", "l.csv"): "did you mean efficientnet_lite",
    }
    for (folder, name, output), message in cases.items():
        done = mantis("label", folder, "--teacher", name, "-o", tmp_path / output)
        assert done.exit_code == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / output).exists()
