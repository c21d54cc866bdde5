"""The commands on streams: encode, decode and info, on a tiny untrained codec."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.commands.streams import BATCH


def mantis(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """A tiny untrained codec, saved as a model folder."""
    torch = pytest.importorskip("torch")
    from mantis_core.codec.checkpoint import save_model
    from mantis_core.codec.mantis import Mantis
    from mantis_core.codec.spec import model_spec
    from mantis_core.config import ModelConfig, TeacherConfig
    from mantis_core.tasks import Problem, TaskSpec
    from mantis_core.training.teacher import new_teacher

    torch.manual_seed(0)
    labels = ("a", "b")
    tasks = (
        TaskSpec("one", "classification", 2, (0, 1), labels),
        TaskSpec("two", "classification", 2, (2, 3), labels),
    )
    names = ("a", "b", "c", "d")
    problem = Problem(tasks, names, names, True, (32, 32), 32)
    teacher = new_teacher(TeacherConfig(name="resnet18", weights="train"), problem)
    small = ModelConfig.model_validate(
        {
            "stem": {"channels": [8, 8]},
            "detector": {"channels": 8, "hidden": 8},
            "encoder": {"channels": 8, "latent_channels": 4},
            "decoder": {"channels": 8, "task_channels": 8},
        }
    )
    model = Mantis(model_spec(small, teacher, problem))
    model.finish()
    save_model(tmp_path / "model", model, {"stage": "stage2"})
    return tmp_path / "model"


def test_an_image_is_encoded_described_and_decoded(codec: Path, tmp_path: Path) -> None:
    image = tmp_path / "photo.png"
    Image.effect_noise((50, 40), 60).convert("RGB").save(image)
    stream = tmp_path / "out.mts"
    encoded = mantis("encode", codec, image, "-o", stream, "--json")
    assert encoded.exit_code == 0, encoded.output
    (entry,) = json.loads(encoded.stdout)["streams"]
    assert entry["wire_bytes"] == stream.stat().st_size
    described = json.loads(mantis("info", stream, "--json").stdout)
    assert (described["images"], described["input_shape"]) == (1, None)
    decoded = json.loads(mantis("decode", codec, stream, "--json").stdout)
    (answer,) = decoded["images"]
    assert answer["wire_bytes"] == decoded["wire_bytes"] == entry["wire_bytes"]
    assert answer["class_name"] in ("a", "b", "c", "d")
    assert f"class: {answer['class_name']}" in mantis("decode", codec, stream).stdout
    stream.write_bytes(stream.read_bytes()[:-1])
    refused = mantis("decode", codec, stream)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")


def test_several_images_go_to_a_folder_and_a_task_can_be_asked_for(
    codec: Path, tmp_path: Path
) -> None:
    images = []
    for name in ("first", "second"):
        images.append(tmp_path / f"{name}.png")
        Image.effect_noise((32, 32), 60).convert("RGB").save(images[-1])
    folder = tmp_path / "streams"
    done = mantis("encode", codec, *images, "-o", folder, "--task", "two")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == ["first.mts", "second.mts"]
    decoded = json.loads(mantis("decode", codec, folder / "first.mts", "--json").stdout)
    assert [answer["tasks"] for answer in decoded["images"]] == [["two"]]
    unknown = mantis("encode", codec, *images, "-o", folder, "--task", "three")
    assert unknown.exit_code == 2
    assert "this model has one, two" in unknown.stderr


def test_several_images_go_into_one_stream_that_a_server_alone_answers(
    codec: Path, tmp_path: Path
) -> None:
    from mantis_core.codec.checkpoint import save_half

    for half in ("client", "server"):
        save_half(tmp_path / half, codec, half)  # type: ignore[arg-type]
    images = []
    for number in range(BATCH + 1):
        images.append(tmp_path / f"{number}.png")
        Image.effect_noise((32, 32), 60).convert("RGB").save(images[-1])
    stream = tmp_path / "all.mts"
    done = mantis("encode", tmp_path / "client", *images, "-o", stream)
    assert done.exit_code == 0, done.output
    assert "an image" in done.stdout
    assert f"images: {len(images)}" in mantis("info", stream).stdout
    decoded = json.loads(mantis("decode", tmp_path / "server", stream, "--json").stdout)
    assert len(decoded["images"]) == len(images)
    total = sum(answer["wire_bytes"] for answer in decoded["images"])
    assert total == pytest.approx(stream.stat().st_size)
    assert f"image 2 of {len(images)}" in mantis("decode", codec, stream).stdout
    wrong = mantis("decode", tmp_path / "client", stream)
    assert wrong.exit_code == 2
    assert "a server decodes" in wrong.stderr


def test_what_is_no_image_is_named(codec: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    done = mantis("encode", codec, text, "-o", tmp_path / "x.mts")
    assert done.exit_code == 2
    assert f"{text} is no readable image" in done.stderr


def test_an_image_over_the_limit_is_named_without_a_traceback(codec: Path, tmp_path: Path) -> None:
    for size, reason in (((14_000, 14_000), "pixels; shrink"), ((1, 3_000_000), "long and thin")):
        image = tmp_path / "big.png"
        Image.new("1", size).save(image)
        done = mantis("encode", codec, image, "-o", tmp_path / "x.mts")
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {image} is no readable image: ")
        assert reason in done.stderr
