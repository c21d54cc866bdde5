"""Parquet files: labels, columns, and classes read from masks."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.errors import DataError
from data_prep.sources.base import notes_of
from data_prep.sources.parquet import ParquetFiles
from tests.data_prep.rows import listed, write_parquet


def test_parquet_labels_become_class_ids(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[{"bytes": b"x", "path": None}] * 2, label=[0, 151])
    source = ParquetFiles(train="a.parquet", class_column="label", class_ids="imagenet")
    assert [ids for _, ids in listed(source, tmp_path)] == [["n01440764"], ["n02085620"]]
    assert [row.image for row in source.read(str(tmp_path), source.listing(str(tmp_path), "train"))]
    source = ParquetFiles(train="a.parquet", class_column="label", class_ids={"0": "cat"})
    assert [ids for _, ids in listed(source, tmp_path)] == [["cat"], []]
    assert notes_of(source.listing(str(tmp_path), "train")) == [
        "1 label without a class id: 151 (1)"
    ]


def test_an_index_outside_imagenet_is_refused_and_a_missing_one_is_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"] * 2, label=[-1, 999])
    settings: dict[str, Any] = {"class_column": "label", "class_ids": "imagenet"}
    source = ParquetFiles(train="a.parquet", **settings)
    assert [ids for _, ids in listed(source, tmp_path)] == [[], ["n15075141"]]
    write_parquet(tmp_path / "b.parquet", image=[b"x"], label=[1000])
    with pytest.raises(DataError, match="label 1000 is no ImageNet-1k index"):
        ParquetFiles(train="b.parquet", **settings).listing(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("labels", "plain", "mapping"),
    [
        ([0, 1, None], [["0"], ["1"], []], {"0": "cat", "1": "dog"}),
        ([0.0, 1.0, math.nan], [["0"], ["1"], []], {"0": "cat", "1": "dog"}),
        ([False, True, None], [["false"], ["true"], []], {"false": "cat", "true": "dog"}),
        (["0", "1", None], [["0"], ["1"], []], {"0": "cat", "1": "dog"}),
        ([0.5, 1.5, None], [["0.5"], ["1.5"], []], {"0.5": "cat", "1.5": "dog"}),
        ([b"c\xc3\xa9", "e\u0301".encode(), None], [["c\u00e9"], ["\u00e9"], []], None),
    ],
)
def test_a_label_is_matched_by_what_it_says_not_by_its_type(
    tmp_path: Path, labels: list[Any], plain: list[list[str]], mapping: dict[str, str] | None
) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"] * 3, label=labels)
    settings: dict[str, Any] = {"train": "a.parquet", "class_column": "label"}
    assert [ids for _, ids in listed(ParquetFiles(**settings), tmp_path)] == plain
    if mapping:
        named = ParquetFiles(**settings, class_ids=mapping)
        assert [ids for _, ids in listed(named, tmp_path)] == [["cat"], ["dog"], []]


def hugging_face(feature: Any, labels: list[Any], path: Path) -> None:
    """A Parquet file as Hugging Face's datasets writes it."""
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    table = pa.table({"image": [{"bytes": b"x", "path": None}] * len(labels), "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)


NAMES = {"names": ["cat", "dog"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("feature", "labels", "expected"),
    [
        (NAMES, [0, 1, -1], [["cat"], ["dog"], []]),
        ({"feature": NAMES, "_type": "Sequence"}, [[0, 1], [], [1]], [["cat", "dog"], [], ["dog"]]),
        ([NAMES], [[0], [1], None], [["cat"], ["dog"], []]),
        ({"dtype": "int64", "_type": "Value"}, [0, 1, 2], [["0"], ["1"], ["2"]]),
        (NAMES, ["cat", "bird", None], [["cat"], ["bird"], []]),
    ],
)
def test_the_names_of_hugging_faces_class_label_are_class_ids(
    tmp_path: Path, feature: Any, labels: list[Any], expected: list[list[str]]
) -> None:
    hugging_face(feature, labels, tmp_path / "a.parquet")
    source = ParquetFiles(train="a.parquet", class_column="label")
    assert [ids for _, ids in listed(source, tmp_path)] == expected
    mapped = source.model_copy(update={"class_ids": {"0": "zero"}})
    assert ["cat"] not in [ids for _, ids in listed(mapped, tmp_path)]


def test_other_names_in_the_metadata_change_the_state(tmp_path: Path) -> None:
    source, states = ParquetFiles(train="a.parquet", class_column="label"), set()
    for names in (["cat", "dog"], ["dog", "cat"]):
        hugging_face({**NAMES, "names": names}, [0, 1], tmp_path / "a.parquet")
        states.add(tuple(source.state(str(tmp_path), "train")))
    assert len(states) == 2
    (tmp_path / "._a.parquet").write_bytes(b"of macOS")
    assert len(ParquetFiles(train="*.parquet").files(str(tmp_path), "train")) == 1


def test_a_parquet_row_may_carry_several_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"] * 3, wnid=[["a", "b"], [], None])
    source = ParquetFiles(train="a.parquet")
    assert [ids for _, ids in listed(source, tmp_path)] == [["a", "b"], [], []]


def test_a_missing_parquet_column_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"], label=[1])
    with pytest.raises(DataError, match="no column 'wnid'; it has image, label"):
        ParquetFiles(train="a.parquet").listing(str(tmp_path), "train")


def street_mask(walkers: int, *, palette: bool = False) -> bytes:
    """A mask of road (3) with so many pixels of a pedestrian (9), plain or with colours to see."""
    values = np.full((8, 8), 3, np.uint8)
    values.ravel()[:walkers] = 9
    mask = Image.fromarray(values)
    if palette:
        mask.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return stream.getvalue()


def test_what_a_mask_shows_is_a_class_of_its_image(tmp_path: Path) -> None:
    masks = [street_mask(n) for n in (0, 5, 30)] + [street_mask(30, palette=True), b"damaged"]
    write_parquet(tmp_path / "train.parquet", image=masks, mask=masks)
    settings: dict[str, Any] = {"train": "train.parquet", "class_column": None}
    source = ParquetFiles(
        **settings,
        mask_columns={"scene": "mask"},
        presence={
            "walker": {"mask": "scene", "value": 9, "min_pixels": 6},
            "road": {"mask": "scene", "value": 3},
        },
    )
    classes = [ids for _, ids in listed(source, tmp_path)]
    assert classes == [
        ["no walker", "road"],
        ["no walker", "road"],
        ["walker", "road"],
        ["walker", "road"],
        [],
    ]
    plain = ParquetFiles(**settings, mask_columns={"scene": "mask"})
    root = str(tmp_path)
    assert list(plain.state(root, "train")) != list(source.state(root, "train"))
    with pytest.raises(ValueError, match=r"presence\.walker\.mask: 'depth' is no key"):
        ParquetFiles(**settings, presence={"walker": {"mask": "depth", "value": 9}})


def test_a_file_that_is_no_parquet_or_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    source, root = ParquetFiles(train="*.parquet"), str(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet is no readable Parquet file"):
        source.listing(root, "train")
    write_parquet(tmp_path / "a.parquet", image=[b"x" * 500] * 9, wnid=["n1"] * 9)
    listing = source.listing(root, "train")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:200] = bytes(196)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet (is no readable|cannot be read)"):
        list(source.read(root, listing))


def test_a_stray_name_beside_the_files_does_no_harm(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"], wnid=["n1"])
    for name in (b"caf\xe9.txt", b"caf\xe9.parquet"):
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).touch()
    assert ParquetFiles(train="*.parquet").files(str(tmp_path), "train")[0][0] == "a.parquet"


def test_a_uri_of_an_unknown_kind_says_which_are_read(tmp_path: Path) -> None:
    source = ParquetFiles(path="az://container/x", train="*.parquet")
    with pytest.raises(DataError, match=r"az://container/x cannot be opened .* s3, gs, abfs"):
        source.listing(str(tmp_path), "train")
