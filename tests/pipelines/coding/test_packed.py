"""Images inside Parquet files and tars: found, named and read, or said why not."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mantis_core.device.files import IMAGE_SUFFIXES, FilesError, Found, find
from pipelines.coding.packed import PACKED_SUFFIXES, expand, image_columns, read_image

PICTURES = [f"picture {number}".encode() for number in range(7)]


def found_in(*paths: Path) -> Found:
    return expand(find(paths, IMAGE_SUFFIXES | PACKED_SUFFIXES), paths)


def parquet(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **how)
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("as_struct", [False, True])
def test_rows_of_parquet_files_are_images_whatever_their_row_groups(
    tmp_path: Path, as_struct: bool
) -> None:
    cells = [{"bytes": data, "path": "x.jpg"} for data in PICTURES] if as_struct else PICTURES
    columns = {"image": cells, "label": list(range(7))}
    file = parquet(tmp_path / "of/val.parquet", columns, row_group_size=3)
    found = found_in(tmp_path)
    assert found.failures == []
    assert [read_image(source) for source in found.sources] == PICTURES
    assert [read_image(source) for source in reversed(found.sources)] == PICTURES[::-1]
    assert str(found.sources[4].path) == f"{file}#4"
    assert found.sources[4].place == "of/val/000004"


def test_image_files_of_a_tar_are_images(tmp_path: Path) -> None:
    file = tar(
        tmp_path / "a.tar",
        {"../b/1.JPG": b"one", "1.cls": b"0", "c/.hidden.png": b"no", "/2.png": b"two"},
    )
    sources = found_in(file).sources
    assert [(source.path.name, read_image(source)) for source in sources] == [
        ("1.JPG", b"one"),
        ("2.png", b"two"),
    ]
    assert [source.place for source in sources] == ["a/000000", "a/000001"]  # never outside


def test_several_files_are_read_in_turn(tmp_path: Path) -> None:
    first = parquet(tmp_path / "1.parquet", {"image": PICTURES[:2]})
    second = parquet(tmp_path / "2.parquet", {"image": PICTURES[2:]})
    (tmp_path / "3.jpg").write_bytes(b"a file")
    sources = found_in(first, second, tmp_path / "3.jpg").sources
    assert [read_image(source) for source in sources] == [*PICTURES, b"a file"]
    assert [read_image(sources[n]) for n in (6, 0, 7)] == [PICTURES[6], PICTURES[0], b"a file"]


def test_a_row_without_an_image_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    empty = parquet(tmp_path / "1.parquet", {"image": [b"one", None, b""]})
    sources = found_in(empty).sources
    assert read_image(sources[0]) == b"one"
    for row in (1, 2):
        with pytest.raises(FilesError, match=rf"1\.parquet#{row} holds no image"):
            read_image(sources[row])
    for name, kind in (("2.parquet", "Parquet file"), ("2.tar", "tar")):
        (tmp_path / name).write_bytes(b"neither" * 300)
        (failure,) = found_in(tmp_path / name).failures
        assert f"{name} is no readable {kind}" in failure.reason


def test_a_file_without_images_fails_where_it_was_given_and_is_of_another_kind_in_a_folder(
    tmp_path: Path,
) -> None:
    labels = parquet(tmp_path / "labels.parquet", {"label": [1, 2]})
    text = tar(tmp_path / "text.tar", {"a.txt": b"a"})
    reasons = [failure.reason for failure in found_in(labels, text).failures]
    assert "labels.parquet has no column of encoded images" in reasons[0]
    assert "text.tar holds no image files" in reasons[1]
    found = found_in(tmp_path)
    assert found.failures == []
    assert found.left_out() == "left out: 2 of other kinds (.parquet 1, .tar 1)"
    both = parquet(tmp_path / "both.parquet", {"one": [b"1"], "two": [b"2"]})
    (failure,) = found_in(both).failures
    assert "several columns of bytes, one, two: call that of images image" in failure.reason


def test_the_column_of_images_is_told_by_its_type_or_its_name() -> None:
    def of(**columns: pa.DataType) -> list[str]:
        return image_columns(pa.schema(list(columns.items())))

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert of(whatever=pa.binary(), label=pa.int64()) == ["whatever"]
    assert of(mask=pa.binary(), image=struct) == ["image"]
    assert of(one=pa.binary(), two=pa.large_binary()) == ["one", "two"]
    assert of(label=pa.string()) == []


def test_without_pyarrow_a_parquet_file_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet(tmp_path / "1.parquet", {"image": PICTURES})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (failure,) = found_in(file).failures
    assert "Parquet files need pyarrow" in failure.reason
