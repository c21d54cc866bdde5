"""The commands on streams: encode, decode and info, on a tiny untrained codec."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.__main__ import app


def mantis(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def picture(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    """Writes an image file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path)
    return path


def test_an_image_is_encoded_described_and_decoded(codec: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "photo.png", (50, 40))
    stream = tmp_path / "out.mts"
    encoded = mantis("encode", codec, image, "-o", stream, "--json")
    assert encoded.exit_code == 0, encoded.output
    (entry,) = json.loads(encoded.stdout)["streams"]
    assert entry["wire_bytes"] == stream.stat().st_size
    described = json.loads(mantis("info", stream, "--json").stdout)
    assert (described["images"], described["input_shape"]) == (1, None)
    decoded = json.loads(mantis("decode", codec, stream, "--json").stdout)
    assert decoded["failures"] == []
    (of_stream,) = decoded["streams"]
    assert of_stream["file"] == str(stream)
    (answer,) = of_stream["images"]
    assert answer["wire_bytes"] == of_stream["wire_bytes"] == entry["wire_bytes"]
    assert answer["tasks"]
    assert f"{answer['tasks'][0]}: " in mantis("decode", codec, stream).stdout
    stream.write_bytes(stream.read_bytes()[:-1])
    refused = mantis("decode", codec, stream)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")


def test_several_images_go_to_a_folder_and_a_task_can_be_asked_for(
    codec: Path, tmp_path: Path
) -> None:
    images = [picture(tmp_path / f"{name}.png") for name in ("first", "second")]
    folder = tmp_path / "streams"
    done = mantis("encode", codec, *images, "-o", folder, "--task", "two")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == ["first.mts", "second.mts"]
    decoded = json.loads(mantis("decode", codec, folder / "first.mts", "--json").stdout)
    (of_stream,) = decoded["streams"]
    assert [answer["tasks"] for answer in of_stream["images"]] == [["two"]]
    unknown = mantis("encode", codec, *images, "-o", folder, "--task", "three")
    assert unknown.exit_code == 2
    assert "this model has one, two, areas" in unknown.stderr


def test_several_images_go_into_one_stream_that_a_server_alone_answers(
    codec: Path, tmp_path: Path
) -> None:
    from mantis_core.codec.checkpoint import save_half

    for half in ("client", "server"):
        save_half(tmp_path / half, codec, half)  # type: ignore[arg-type]
    images = [picture(tmp_path / f"{number}.png") for number in range(3)]
    stream = tmp_path / "all.mts"
    done = mantis("encode", tmp_path / "client", *images, "-o", stream)
    assert done.exit_code == 0, done.output
    assert "an image" in done.stdout
    described = mantis("info", stream).stdout
    assert f"images: {len(images)}\n" in described
    assert "flags: several, levels\n" in described
    decoded = json.loads(mantis("decode", tmp_path / "server", stream, "--json").stdout)
    (of_stream,) = decoded["streams"]
    assert len(of_stream["images"]) == len(images)
    total = sum(answer["wire_bytes"] for answer in of_stream["images"])
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
    assert done.stderr == f"error: {text} is no readable image: not an image\n"
    assert not (tmp_path / "x.mts").exists()


def test_an_image_over_the_limit_is_named_without_a_traceback(codec: Path, tmp_path: Path) -> None:
    for size, reason in (((14_000, 14_000), "pixels; shrink"), ((1, 3_000_000), "long and thin")):
        image = tmp_path / "big.png"
        Image.new("1", size).save(image)
        done = mantis("encode", codec, image, "-o", tmp_path / "x.mts")
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {image} is no readable image: ")
        assert reason in done.stderr


def test_score_refuses_a_codec_that_does_not_say_how_images_were_prepared(codec: Path) -> None:
    done = mantis("score", codec, "photos")
    assert done.exit_code == 2
    assert "is not the checkpoint of a stage 2" in done.stderr
