"""Fingerprints of sources, and sources for bare paths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.finding import source_fingerprint, source_for_path, undivided_images
from data_prep.sources import folder
from data_prep.tasks import resolve_tasks
from tests.data_prep.rows import listed, write_parquet
from tests.data_prep.sources.test_webdataset import write_tar


def test_the_fingerprint_follows_content_not_place_or_date(
    image_folder: Path, folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    table = resolve_tasks(animals, folder_data)
    first = source_fingerprint(folder_data, table)
    shutil.copytree(image_folder, tmp_path / "moved")
    moved = folder_data.model_copy(update={"root": str(tmp_path / "moved")})
    assert source_fingerprint(moved, table) == first
    (tmp_path / "moved/val/n02085620/0.JPEG").write_bytes(b"other size")
    assert source_fingerprint(moved, table) != first


def test_an_image_of_the_same_size_changes_the_fingerprint_of_a_small_folder(
    image_folder: Path,
    folder_data: DataConfig,
    animals: tuple[TaskConfig, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, path = resolve_tasks(animals, folder_data), image_folder / "train/n02085620/0.JPEG"
    first, content = source_fingerprint(folder_data, table), path.read_bytes()
    path.write_bytes(bytes(len(content)))
    assert source_fingerprint(folder_data, table) != first
    path.write_bytes(content)
    assert source_fingerprint(folder_data, table) == first
    for limit, value in (("HASHED_FILES", 11), ("HASHED_BYTES", 1000)):  # val has 12 images
        with monkeypatch.context() as patch:
            patch.setattr(folder, limit, value)
            by_size = source_fingerprint(folder_data, table)
            path.write_bytes(bytes(len(content)))
            assert source_fingerprint(folder_data, table) == by_size
            path.write_bytes(content)


LABELS: dict[str, tuple[list[Any], list[Any]]] = {
    "numbers": ([3, 5, 5, 3], [5, 3, 3, 5]),
    "lists": ([["a"], ["b", "c"], [], None], [["b"], ["a", "c"], [], None]),
    "texts": (["ab", "c", "d", "e"], ["a", "bc", "d", "e"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_other_labels_in_a_file_of_the_same_size_change_the_fingerprint(
    tmp_path: Path, kind: str
) -> None:
    data = DataConfig(
        root=str(tmp_path),
        sources=({"kind": "parquet", "train": "train.parquet", "class_column": "label"},),
    )
    table = resolve_tasks((TaskConfig(name="pets", classes=("3", "5")),), data)
    found = set()
    for labels in LABELS[kind]:
        columns = pa.table({"image": [b"x"] * 4, "label": labels})
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(columns, tmp_path / "train.parquet", **plain)
        found.add((source_fingerprint(data, table), (tmp_path / "train.parquet").stat().st_size))
    assert len({fingerprint for fingerprint, _ in found}) == 2
    assert len({size for _, size in found}) == 1


def test_other_masks_of_the_same_size_change_the_fingerprint(tmp_path: Path) -> None:
    source = {"kind": "parquet", "train": "train.parquet", "class_column": None}
    data = DataConfig(root=str(tmp_path), sources=({**source, "mask_columns": {"road": "mask"}},))
    table = resolve_tasks(
        (TaskConfig(name="road", kind="segmentation", labels=("no", "yes")),), data
    )
    found = set()
    for masks in ([b"one", b"two", None], [b"two", b"one", None]):
        write_parquet(tmp_path / "train.parquet", image=[b"x"] * 3, mask=masks)
        found.add(source_fingerprint(data, table))
    assert len(found) == 2


def test_a_bare_path_is_scored_as_val(image_folder: Path, tmp_path: Path) -> None:
    like = DataConfig(sources=({"kind": "shapes"},))
    scored = source_for_path(str(image_folder), like)
    assert len(listed(scored, tmp_path, "val")) == 12
    assert len(listed(source_for_path(str(image_folder / "train"), like), tmp_path, "val")) == 36
    write_parquet(tmp_path / "p/x.parquet", picture=[b"x"], kind=["n1"], image=[b"y"], label=[3])
    plain = source_for_path(str(tmp_path / "p/x.parquet"), like)
    assert listed(plain, tmp_path, "val") == [("x.parquet:0", ["3"])]
    like = DataConfig(sources=({"kind": "parquet", "image": "picture", "class_column": "kind"},))
    named = source_for_path(str(tmp_path / "p"), like)
    assert listed(named, tmp_path, "val") == [("x.parquet:0", ["n1"])]
    assert next(named.read(str(tmp_path), named.listing(str(tmp_path), "val"))).image == b"x"
    with pytest.raises(DataError, match="nothing to score"):
        source_for_path(str(tmp_path / "absent"), like)


def test_a_flat_folder_is_scored_with_a_label_file(image_folder: Path, tmp_path: Path) -> None:
    like, flat = DataConfig(sources=({"kind": "shapes"},)), image_folder / "val/n02085620"
    with pytest.raises(DataError, match=r"n02085620 has images and no class folders: .*--labels"):
        source_for_path(str(flat), like)
    (tmp_path / "labels.csv").write_text("".join(f"{n}.JPEG,dog\n" for n in range(4)))
    scored = source_for_path(str(flat), like, labels=str(tmp_path / "labels.csv"))
    assert listed(scored, tmp_path, "val") == [(f"{n}.JPEG", ["dog"]) for n in range(4)]
    write_parquet(tmp_path / "a.parquet", image=[b"x"], label=[3])
    with pytest.raises(DataError, match="is no folder: a label file names the images of a folder"):
        source_for_path(str(tmp_path / "a.parquet"), like, labels="labels.csv")


def test_a_tar_is_scored_with_the_labels_of_the_training_data(tmp_path: Path) -> None:
    write_tar(tmp_path / "t/x.tar", {"1.jpg": b"x", "1.txt": b"0"})
    trained = {"kind": "webdataset", "train": "a.tar", "label": "txt", "class_ids": {"0": "cat"}}
    like = DataConfig(sources=(trained,))
    for path in ("t", "t/x.tar", "t/*.tar"):
        scored = source_for_path(str(tmp_path / path), like)
        assert listed(scored, tmp_path, "val") == [("x.tar:1", ["cat"])]


def test_images_that_no_class_folders_divide_are_found(image_folder: Path, tmp_path: Path) -> None:
    flat = image_folder / "val/n02085620"
    assert undivided_images(str(flat)) == str(flat)
    shutil.copytree(flat, tmp_path / "own/val")
    assert undivided_images(str(tmp_path / "own")) == str(tmp_path / "own/val")
    write_parquet(tmp_path / "p/x.parquet", image=[b"x"], label=[3])
    for other in (image_folder, image_folder / "train", tmp_path / "p", tmp_path / "none"):
        assert undivided_images(str(other)) is None
