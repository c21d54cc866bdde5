"""encode, predict and decode on folders and on files of which some are bad."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.coding import work
from tests.pipelines.commands.test_streams import mantis, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four images and two files that are none, one of them with an odd name."""
    folder = tmp_path / "photos"
    for name in ("cat/1.png", "cat/2.jpg", "dog/1.png", os.fsdecode(b"dog/caf\xe9.png")):
        picture(folder / name)
    (folder / "cat/3.jpg").write_bytes(b"no image")
    (folder / "dog/4.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_images_in_parquet_files_are_answered_and_encoded(codec: Path, tmp_path: Path) -> None:
    images = [picture(tmp_path / f"{n}.png").read_bytes() for n in range(3)]
    file = tmp_path / "of" / "val.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"image": [*images, b"no image"], "label": [0, 1, 0, 1]}), file)
    done = mantis("predict", codec, file, "-o", tmp_path / "answers.csv")
    assert done.exit_code == 3
    assert done.stderr.startswith(f"error: {file}#3 is no readable image")
    answered = rows(tmp_path / "answers.csv")
    assert [row["file"] for row in answered] == [f"{file}#{n}" for n in range(4)]
    assert [bool(row["wire_bytes"]) for row in answered] == [True, True, True, False]
    done = mantis("encode", codec, file.parent, "-o", tmp_path / "out")
    assert done.exit_code == 3
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.mts"))
    assert made == [f"val/00000{n}.mts" for n in range(3)]
    alone = mantis("encode", codec, tmp_path / "1.png", "-o", tmp_path / "alone.mts")
    assert alone.exit_code == 0
    assert (tmp_path / "alone.mts").read_bytes() == (tmp_path / "out/val/000001.mts").read_bytes()


def test_encode_mirrors_a_folder_names_what_is_bad_and_ends_with_3(
    codec: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "streams"
    done = mantis("encode", codec, photos, "-o", out)
    assert done.exit_code == 3
    made = sorted(os.fsencode(path.relative_to(out)) for path in out.rglob("*.mts"))
    assert made == [b"cat/1.mts", b"cat/2.mts", b"dog/1.mts", b"dog/caf\xe9.mts"]
    assert len(done.stdout.splitlines()) == 4
    assert done.stderr.splitlines() == [
        "left out: 1 of other kinds (.txt 1)",
        f"error: {photos}/cat/3.jpg is no readable image: not an image",
        f"error: {photos}/dog/4.png is no readable image: empty file",
        "error: 2 of 6 files failed",
    ]


def test_encode_with_json_lists_streams_and_failures_as_text(
    codec: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "streams"
    done = mantis("encode", codec, photos, tmp_path / "gone.png", "-o", out, "--json")
    assert done.exit_code == 3
    result = json.loads(done.stdout)
    assert [each["file"] for each in result["failures"]] == [
        str(tmp_path / "gone.png"),
        f"{photos}/cat/3.jpg",
        f"{photos}/dog/4.png",
    ]
    last = result["streams"][-1]
    assert last["file"] == f"{out}/dog/caf\\xe9.mts"
    assert last["images"] == [f"{photos}/dog/caf\\xe9.png"]
    json.dumps(result, ensure_ascii=False).encode()


def test_encode_skips_what_has_a_stream_of_this_model(
    codec: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "streams"
    mantis("encode", codec, photos, "-o", out)
    (out / "cat/1.mts").write_bytes(b"cut")
    again = mantis("encode", codec, photos, "-o", out, "--skip-existing", "--json")
    result = json.loads(again.stdout)
    assert result["skipped"] == 3
    assert [each["file"] for each in result["streams"]] == [f"{out}/cat/1.mts"]
    wrong = mantis("encode", codec, photos, "-o", tmp_path / "x.mts", "--skip-existing")
    assert wrong.exit_code == 2


def test_one_stream_leaves_out_what_is_bad(codec: Path, photos: Path, tmp_path: Path) -> None:
    done = mantis("encode", codec, photos, "-o", tmp_path / "all.mts", "--json")
    assert done.exit_code == 3
    (stream,) = json.loads(done.stdout)["streams"]
    assert len(stream["images"]) == 4
    decoded = json.loads(mantis("decode", codec, tmp_path / "all.mts", "--json").stdout)
    assert len(decoded["streams"][0]["images"]) == 4


def test_too_many_or_no_images_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    many = mantis("encode", "nomodel", *[image] * 257, "-o", tmp_path / "x.mts")
    assert (many.exit_code, many.stdout) == (2, "")
    assert "257 images are more than the 256" in many.stderr
    twice = mantis("encode", "nomodel", image, image, "-o", tmp_path / "out")
    assert "two files have one name" in twice.stderr
    (tmp_path / "empty").mkdir()
    none = mantis("encode", "nomodel", tmp_path / "empty", "-o", tmp_path / "out")
    assert none.exit_code == 2
    assert "there is no image in" in none.stderr
    assert not (tmp_path / "out").exists()


def test_predict_writes_a_row_for_each_image_and_masks(
    codec: Path, photos: Path, tmp_path: Path
) -> None:
    out, masks = tmp_path / "answers.csv", tmp_path / "masks"
    done = mantis("predict", codec, photos, "-o", out, "--masks", masks, "--task", "areas")
    assert done.exit_code == 3
    assert done.stdout.strip() == f"{out}  4 images, 2 failed"
    table = rows(out)
    assert list(table[0]) == [
        *("file", "class", "probability", "task/one", "task/one/probability", "task/two"),
        *("task/two/probability", "task/areas", "task/areas/probability", "wire_bytes", "error"),
    ]
    assert len(table) == 6
    assert [row["file"] for row in table if row["error"]] == [
        f"{photos}/cat/3.jpg",
        f"{photos}/dog/4.png",
    ]
    assert table[0]["task/areas/probability"] == "1.0000"
    assert table[0]["task/areas"].split()[0] in ("x", "y", "z")
    assert (table[0]["task/one"], table[0]["class"]) == ("", "")
    with Image.open(masks / "cat/1.areas.png") as mask:
        assert (mask.mode, mask.size) == ("P", (32, 32))
        assert int(np.array(mask).max()) < 3
    assert json.loads((masks / "labels.json").read_text()) == {"areas": ["x", "y", "z"]}
    assert not list(tmp_path.glob("*.partial"))


def test_predict_answers_as_encode_and_decode_do(codec: Path, photos: Path, tmp_path: Path) -> None:
    mantis("encode", codec, photos, "-o", tmp_path / "streams")
    decoded = json.loads(mantis("decode", codec, tmp_path / "streams", "--json").stdout)
    predicted = json.loads(mantis("predict", codec, photos, "--json").stdout)
    answers = [each["images"][0] for each in decoded["streams"]]
    own = [{name: each[name] for name in each if name != "file"} for each in predicted["images"]]
    assert own == answers
    lines = tmp_path / "answers.jsonl"
    mantis("predict", codec, photos, "-o", lines)
    listed = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [each for each in listed if "error" not in each] == predicted["images"]
    assert [each for each in listed if "error" in each] == predicted["failures"]


def test_predict_prints_csv_without_a_file(codec: Path, photos: Path) -> None:
    done = mantis("predict", codec, photos / "cat")
    found = list(csv.DictReader(done.stdout.splitlines()))
    assert [Path(row["file"]).name for row in found] == ["1.png", "2.jpg", "3.jpg"]
    assert "no readable image" in found[-1]["error"]


@pytest.mark.parametrize("name", ["answers.txt", "answers"])
def test_a_table_of_an_unknown_kind_is_refused(name: str, tmp_path: Path) -> None:
    done = mantis("predict", "nomodel", picture(tmp_path / "a.png"), "-o", tmp_path / name)
    assert done.exit_code == 2
    assert ".csv or .jsonl" in done.stderr


def test_an_interrupted_table_is_not_taken_for_a_whole_one(
    codec: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = work.decode_each

    def stopping(*arguments: object) -> object:
        yield next(whole(*arguments))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    mantis("encode", codec, photos, "-o", tmp_path / "streams")
    monkeypatch.setattr(work, "decode_each", stopping)
    done = mantis("decode", codec, tmp_path / "streams", "-o", tmp_path / "answers")
    assert done.exit_code == 130
    assert not (tmp_path / "answers/answers.csv").exists()
    assert len(rows(tmp_path / "answers/answers.csv.partial")) == 1


def test_decode_takes_folders_and_writes_a_table_with_the_number_of_each_image(
    codec: Path, photos: Path, tmp_path: Path
) -> None:
    streams = tmp_path / "streams"
    mantis("encode", codec, photos / "cat", "-o", streams / "cat.mts", "--task", "areas")
    (streams / "bad.mts").write_bytes(b"\xabMxx")
    out = tmp_path / "answers"
    done = mantis("decode", codec, streams, "-o", out)
    assert done.exit_code == 3
    assert f"error: {streams}/bad.mts cannot be decoded: " in done.stderr
    table = rows(out / "answers.csv")
    assert [(Path(row["file"]).name, row["image"]) for row in table] == [
        ("bad.mts", ""),
        ("cat.mts", "1"),
        ("cat.mts", "2"),
    ]
    assert (out / "cat.1.areas.png").is_file()
    assert (out / "cat.2.areas.png").is_file()
    text = mantis("decode", codec, streams).stdout
    assert f"{streams}/cat.mts, image 2 of 2" in text
