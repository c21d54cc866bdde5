"""WebDataset tars: samples, labels, and images read by their place."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import DataError
from data_prep.sources.base import notes_of
from data_prep.sources.webdataset import WebDataset
from tests.data_prep.rows import listed


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("setting", "class_ids", "expected"),
    [
        ("cls", {"0": "cat", "1": "dog"}, [["cat"], ["dog"], []]),
        ("cls", None, [["0"], ["1"], ["7"]]),
        ("txt", None, [["a cat"], ["a dog"], []]),
        ("json.label", None, [["0"], ["cat", "pet"], []]),
        ("json.about.kind", None, [["tabby"], [], []]),
    ],
)
def test_a_label_is_a_member_or_a_field_of_its_json(
    tmp_path: Path, setting: str, class_ids: Any, expected: list[list[str]]
) -> None:
    first = json.dumps({"label": 0, "about": {"kind": "tabby"}}).encode()
    write_tar(
        tmp_path / "train-0.tar",
        {
            **{"a/1.jpg": b"one", "a/1.cls": b"0\n", "a/1.txt": b"a cat", "a/1.json": first},
            **{"2.cls": b"1", "2.png": b"other", "2.txt": b"a dog"},
            **{"2.json": b'{"label": ["cat", "pet"]}', "3.JPG": b"x", "3.cls": b"7"},
            **{"._3.jpg": b"of macOS", "4.cls": b"1"},
        },
    )
    source = WebDataset(train="train-*.tar", label=setting, class_ids=class_ids)
    rows = listed(source, tmp_path)
    assert [ids for _, ids in rows] == expected
    assert [name for name, _ in rows] == [f"train-0.tar:{key}" for key in ("a/1", "2", "3")]
    listing = source.listing(str(tmp_path), "train")
    assert [row.image for row in source.read(str(tmp_path), listing)] == [b"one", b"other", b"x"]
    assert "left out 1 sample without an image of a known suffix" in notes_of(listing)


def test_a_label_outside_class_ids_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": b"x", "1.cls": b"9", "2.jpg": b"y", "2.cls": b"0"})
    source = WebDataset(train="a.tar", class_ids={"0": "cat"})
    assert [ids for _, ids in listed(source, tmp_path)] == [[], ["cat"]]
    notes = notes_of(source.listing(str(tmp_path), "train"))
    assert notes == ["1 label without a class id: 9 (1)"]


def test_another_label_of_the_same_size_changes_the_state(tmp_path: Path) -> None:
    source, states = WebDataset(train="a.tar"), set()
    for label in (b"0", b"1"):
        write_tar(tmp_path / "a.tar", {"1.jpg": b"x", "1.cls": label})
        states.add(tuple(source.state(str(tmp_path), "train")))
    assert len(states) == 2


def test_a_uri_is_read_from_front_to_back(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", {f"{n}.{end}": b"%d" % n for n in range(9) for end in ("jpg", "cls")}
    )
    source = WebDataset(path=f"file://{tmp_path}", train="*.tar")
    listing = source.listing("unused", "train")
    assert listing["class_ids"].to_pylist() == [[str(n)] for n in range(9)]
    some = listing.take([7, 2])
    assert [row.image for row in source.read("unused", some)] == [b"7", b"2"]


def test_a_file_that_is_no_plain_tar_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": b"x"}, "w:gz")
    with pytest.raises(DataError, match=r"a\.tar is no readable tar file .* unpack"):
        WebDataset(train="a.tar").listing(str(tmp_path), "train")
    write_tar(tmp_path / "b.tar", {"1.jpg": b"x", "1.json": b"{"})
    with pytest.raises(DataError, match=r"b\.tar, 1\.json is no UTF-8 text or JSON"):
        WebDataset(train="b.tar", label="json.label").listing(str(tmp_path), "train")


def test_a_tar_that_is_gone_rejects_its_rows_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"1.jpg": name.encode(), "1.cls": b"0"})
    source = WebDataset(train="*.tar")
    listing = source.listing(str(tmp_path), "train")
    (tmp_path / "a.tar").unlink()
    rows = list(source.read(str(tmp_path), listing))
    assert [row.image for row in rows] == [b"", b"b"]
    assert "a.tar cannot be read" in rows[0].error
