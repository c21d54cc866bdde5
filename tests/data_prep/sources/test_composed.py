"""Mosaics and attributes: what they say of an image is what its pixels show."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.sources.base import RawRow
from data_prep.sources.composed import BARS, SEGMENTS, TINTS, Attributes, Mosaic
from data_prep.tasks import resolve_tasks
from tests.data_prep.rows import listed, write_parquet

LEVELS = {f"c{number}": 40 * number + 20 for number in range(5)}  # grey level by class
GROUPS = {f"g{number}": (f"c{number}",) for number in range(5)}


@pytest.fixture
def photographs(tmp_path: Path, to_bytes: Callable[..., bytes]) -> Path:
    """Parquet files of 16-pixel images, each of the grey level of its class; one is damaged."""
    for split, count in (("train", 20), ("val", 10)):
        ids = [f"c{number % 5}" for number in range(count)]
        images = [to_bytes(Image.new("RGB", (16, 16), (LEVELS[c],) * 3), "PNG") for c in ids]
        if split == "val":
            images[3] = b"no image"
        write_parquet(tmp_path / f"{split}.parquet", image=images, wnid=ids)
    return tmp_path


def source_of(kind: type[Any], **settings: Any) -> Any:
    of = {"kind": "parquet", "train": "train.parquet", "val": "val.parquet"}
    return kind(of=of, size=16, **settings)


def pixels_of(row: RawRow) -> np.ndarray[Any, Any]:
    assert not row.error
    return np.asarray(Image.open(io.BytesIO(row.image)))


def test_a_mosaic_shows_a_photograph_of_each_class_it_names(photographs: Path) -> None:
    source = source_of(Mosaic, groups=GROUPS, train_rows=60, val_rows=7)
    rows = listed(source, photographs)
    table = source.listing(str(photographs), "train")
    places, shown = set(), set()
    for (_, ids), row in zip(rows, source.read(str(photographs), table), strict=True):
        pixels = pixels_of(row)
        assert pixels.shape == (16, 16, 3)
        tiles = [pixels[y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
        assert [tile.min() for tile in tiles] == [tile.max() for tile in tiles]
        assert [tile[0, 0, 0] for tile in tiles] == [LEVELS[class_id] for class_id in ids]
        assert len(set(ids)) == 4
        places.add(ids.index("c0") if "c0" in ids else None)
        shown.add(tuple(sorted(ids)))
    assert places == {None, 0, 1, 2, 3}
    assert len(shown) == 5  # each choice of four of the five groups
    assert source.declared_classes("g2") == ("c2",)
    assert rows == listed(source, photographs)
    assert rows != listed(source.model_copy(update={"seed": 1}), photographs)
    assert len(listed(source, photographs, "val")) == 7


def test_a_mosaic_with_a_damaged_photograph_is_rejected_and_the_others_are_made(
    photographs: Path,
) -> None:
    source = source_of(Mosaic, groups=GROUPS, val_rows=40)
    table = source.listing(str(photographs), "val")
    found = list(source.read(str(photographs), table))
    with_it = ['["val.parquet", 1, 0]' in path for path in table["path"].to_pylist()]
    assert [bool(row.error) for row in found] == with_it
    assert 0 < sum(with_it) < 40


def test_a_mosaic_of_fewer_groups_of_shared_classes_or_without_images_is_refused(
    photographs: Path,
) -> None:
    with pytest.raises(ValidationError, match="3 groups; a mosaic shows 4 different ones"):
        source_of(Mosaic, groups={name: GROUPS[name] for name in ("g0", "g1", "g2")})
    with pytest.raises(ValidationError, match="c0 is in the groups 'g0' and 'more'"):
        source_of(Mosaic, groups={**GROUPS, "more": ("c0",)})
    with pytest.raises(ValidationError, match="the group 'more' has no class"):
        source_of(Mosaic, groups={**GROUPS, "more": ()})
    lacking = source_of(Mosaic, groups={**GROUPS, "more": ("c9",)})
    with pytest.raises(DataError, match="no image of the group 'more' in the train split"):
        lacking.listing(str(photographs), "train")
    nothing = Mosaic(of={"kind": "parquet", "train": "train.parquet"}, groups=GROUPS)
    assert nothing.listing(str(photographs), "val").num_rows == 0


def test_attributes_are_those_that_the_pixels_show(tmp_path: Path) -> None:
    corner = np.zeros((64, 64, 3), np.uint8)
    corner[:32, :32] = 255  # the bright quarter tells how far an image is turned
    stream = io.BytesIO()
    Image.fromarray(corner).save(stream, "PNG")
    write_parquet(tmp_path / "train.parquet", image=[stream.getvalue()] * 60, wnid=["c1"] * 60)
    source = source_of(Attributes, groups={"odd": ("c1", "c3")}).model_copy(update={"size": 64})
    table = source.listing(str(tmp_path), "train")
    quarters = {0: (0, 0), 90: (1, 0), 180: (1, 1), 270: (0, 1)}
    seen: dict[str, set[str]] = {}
    for ids, row in zip(
        table["class_ids"].to_pylist(), source.read(str(tmp_path), table), strict=True
    ):
        pixels = pixels_of(row)
        said = dict(class_id.split("/") for class_id in ids[1:])
        assert ids[0] == "c1"
        assert said["group"] == "odd"
        for name, value in said.items():
            seen.setdefault(name, set()).add(value)
        tinted = np.rint(0.7 * 255 + 0.3 * np.array(TINTS[said["tint"]]))
        bright = (pixels == tinted).all(axis=2)
        y, x = quarters[int(said["rotation"])]
        inside = bright[32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
        assert inside.sum() >= 32 * 32 - 22 * 14
        assert bright.sum() == inside.sum()
        assert _digits(pixels) == [int(said["glyph"])]
    assert seen["rotation"] == {"0", "90", "180", "270"}
    assert len(seen["glyph"]) == 10
    assert seen["tint"] == set(TINTS)


def _digits(pixels: np.ndarray[Any, Any]) -> list[int]:
    """Returns the digits whose drawing, white on black, stands somewhere in the pixels."""
    found = []
    for digit, bars in enumerate(SEGMENTS):
        drawn = np.zeros((22, 14), np.uint8)
        for bar in bars:
            left, top, right, bottom = (2 * (edge + 1) for edge in BARS[bar])
            drawn[top:bottom, left:right] = 255
        windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], drawn.shape)
        if (windows == drawn).all(axis=(2, 3)).any():
            found.append(digit)
    return found


def test_attributes_that_are_not_applied_leave_pixels_and_labels(photographs: Path) -> None:
    source = source_of(Attributes, apply=())
    table = source.listing(str(photographs), "train")
    assert [ids for _, ids in listed(source, photographs)] == [[f"c{n % 5}"] for n in range(20)]
    for ids, row in zip(
        table["class_ids"].to_pylist(), source.read(str(photographs), table), strict=True
    ):
        assert (pixels_of(row) == LEVELS[ids[0]]).all()
    assert source.declared_classes("rotation") == source.declared_classes("group") == ()
    assert source_of(Attributes).declared_classes("rotation")[1] == "rotation/90"


def test_a_change_of_the_photographs_is_a_change_of_what_is_made_of_them(
    photographs: Path,
) -> None:
    for kind, settings in ((Mosaic, {"groups": GROUPS}), (Attributes, {})):
        source = source_of(kind, **settings)
        before = list(source.state(str(photographs), "train"))
        other = source.model_copy(update={"seed": 5})
        assert list(other.state(str(photographs), "train")) != before
        assert before == list(source.state(str(photographs), "train"))
    (photographs / "train.parquet").write_bytes((photographs / "val.parquet").read_bytes())
    assert list(source.state(str(photographs), "train")) != before


def test_mirroring_is_refused_where_it_changes_labels(photographs: Path) -> None:
    of = {"kind": "parquet", "train": "train.parquet", "val": "val.parquet"}
    turned: dict[str, Any] = {"kind": "attributes", "of": of}
    with pytest.raises(ValidationError, match=r"set data\.flip to false"):
        DataConfig(sources=(turned,))
    data = DataConfig(root=str(photographs), sources=(turned,), flip=False, image_size=16)
    tasks = [TaskConfig(name=name, classes_from="attributes") for name in ("rotation", "tint")]
    table = resolve_tasks(tasks, data)
    assert [len(task.labels) for task in table.tasks] == [4, 6]
    assert DataConfig(sources=({**turned, "apply": ("tint",)},)).flip
