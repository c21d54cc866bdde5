"""Sources in an object store: few calls a file, many at once, and the same rows as from a disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.bucket import Bucket, as_bucket
from data_prep import storage
from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.manifest import Manifest
from data_prep.prepare.shards import prepare
from data_prep.sources.folder import ImageFolder
from data_prep.sources.parquet import ParquetFiles
from data_prep.sources.remembering import one_look
from data_prep.sources.webdataset import WebDataset
from data_prep.tasks import resolve_tasks
from tests.data_prep.rows import write_parquet
from tests.data_prep.sources.test_webdataset import write_tar
from tests.s3 import s3_environment, s3_server

FILES = 40
LATENCY_S = 0.02
PARQUET = ParquetFiles(train="*.parquet", class_column="label")


def write_files(folder: Path) -> None:
    """Parquet files of seven rows in row groups of three."""
    for number in range(FILES):
        images = [b"%d %d" % (number, row) for row in range(7)]
        labels = [f"class {row % (1 + number)}" for row in range(7)]
        write_parquet(folder / f"{number:02d}.parquet", image=images, label=labels)


def test_footers_and_labels_are_read_at_once_in_three_calls_a_file(tmp_path: Path) -> None:
    for number in range(FILES):
        image, label = [b"%d" % number], [f"class {number % 3}"]
        write_parquet(tmp_path / f"{number:02d}.parquet", image=image, label=label)
    bucket = Bucket(str(tmp_path), latency_s=LATENCY_S)
    with as_bucket(bucket) as root, one_look():
        assert PARQUET.listing(root, "train").equals(PARQUET.listing(str(tmp_path), "train"))
    assert bucket.calls == {"list": 1, "open": FILES, "read": 2 * FILES}
    assert 1 < bucket.most_in_flight <= storage.THREADS


def test_the_row_groups_of_a_file_are_read_with_its_footer_read_once(tmp_path: Path) -> None:
    write_files(tmp_path)
    listing = PARQUET.listing(str(tmp_path), "train")
    bucket = Bucket(str(tmp_path))
    with as_bucket(bucket) as root:
        rows = list(PARQUET.read(root, listing))
    assert rows == list(PARQUET.read(str(tmp_path), listing))
    assert bucket.calls == {"open": FILES, "read": (1 + 3) * FILES}


@pytest.mark.parametrize("threads", [1, storage.THREADS])
def test_the_first_bad_file_is_named_whatever_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    write_files(tmp_path)
    for number in (31, 13, 30):
        (tmp_path / f"{number}.parquet").write_bytes(b"PAR1 nothing PAR1")
    monkeypatch.setattr(storage, "THREADS", threads)
    with (
        as_bucket(Bucket(str(tmp_path), latency_s=LATENCY_S)) as root,
        pytest.raises(DataError, match=r"^s3://made-up/13\.parquet is no readable Parquet file"),
    ):
        PARQUET.listing(root, "train")


def test_images_are_read_at_once_in_two_calls_however_large(tmp_path: Path) -> None:
    folder = tmp_path / "train/a"
    folder.mkdir(parents=True)
    for number in range(FILES):
        (folder / f"{number:02d}.png").write_bytes(bytes([number]) * 600_000)
    source = ImageFolder()
    listing = source.listing(str(tmp_path), "train")
    bucket = Bucket(str(tmp_path), latency_s=LATENCY_S)
    with as_bucket(bucket) as root:
        assert list(source.read(root, listing)) == list(source.read(str(tmp_path), listing))
    assert bucket.calls == {"open": FILES, "read": FILES}
    assert 1 < bucket.most_in_flight <= storage.THREADS


def test_tar_files_are_listed_at_once(tmp_path: Path) -> None:
    for number in range(FILES):
        write_tar(tmp_path / f"{number:02d}.tar", {"0.png": b"image", "0.cls": b"a"})
    source = WebDataset(train="*.tar")
    bucket = Bucket(str(tmp_path), latency_s=LATENCY_S)
    with as_bucket(bucket) as root:
        assert source.listing(root, "train").equals(source.listing(str(tmp_path), "train"))
    assert bucket.calls["open"] == FILES
    assert bucket.most_in_flight > 1


def prepared(data: DataConfig, tasks: tuple[TaskConfig, ...], output: str) -> Manifest:
    return prepare(
        data,
        resolve_tasks(tasks, data),
        seed=0,
        output=output,
        run=lambda tables, do, job: (do(table, job=job) for table in tables),
    )


def test_shards_from_a_bucket_into_a_bucket_are_those_of_a_disk(
    image_folder: Path, folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    expected = prepared(folder_data, animals, str(tmp_path / "out"))
    bucket = Bucket(str(tmp_path), latency_s=LATENCY_S)
    with as_bucket(bucket) as root:
        data = folder_data.model_copy(update={"root": f"{root}/{image_folder.name}"})
        assert prepared(data, animals, f"{root}/remote") == expected
    assert bucket.most_in_flight > 1
    for split in expected.splits.values():
        for shard in split.shards:
            local, remote = tmp_path / "out" / shard.path, tmp_path / "remote" / shard.path
            assert local.read_bytes() == remote.read_bytes()
            assert pq.read_table(remote).num_rows == shard.rows


def test_a_process_opens_one_client_whatever_the_threads(tmp_path: Path) -> None:
    names = [f"{number}.parquet" for number in range(6)]
    for name in names:
        write_parquet(tmp_path / name, image=[b"image"], label=["a"])
    with s3_server() as server, s3_environment(server):
        for name in names:
            storage.write_bytes(f"s3://bucket/{name}", (tmp_path / name).read_bytes())
        storage._client.cache_clear()
        server.requests.clear()
        table = PARQUET.listing("s3://bucket", "train")
        assert storage._client.cache_info().misses == 1
        # Of each file the size, the footer and the labels; beside them the listings.
        assert len([path for _, path in server.requests if ".parquet" in path]) <= 3 * len(names)
    assert table.equals(PARQUET.listing(str(tmp_path), "train"))
