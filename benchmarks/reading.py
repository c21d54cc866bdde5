"""Times an epoch of training batches beside PyTorch's DataLoader over the same images and crops.

    python -m benchmarks.reading SHARDS [SHARDS ...] --pairs 5 --workers 2

SHARDS is a folder that `mantis prepare` wrote; its training rows are read. One pass is one epoch
from the call that makes the iterator to the last batch. `ray` is what trainings on Ray read,
`plain` what `mantis run --plain` reads with `--workers` threads. The DataLoader has `--workers`
processes, which stay from epoch to epoch, and holds the encoded images in memory. It makes the same
crops by the same code. Passes alternate; figures are medians of the pairs' ratios, DataLoader's
time over ours. `epoch_start_s` is the wait for an epoch's first batch in a sequence of epochs, each
begun ahead as a training does it. The last line is one JSON object, whose keys have the image's
side: `reading_64`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from benchmarks.program import count, one_message, say
from data_prep.manifest import Manifest, read_manifest
from data_prep.read.ahead import begun_ahead
from data_prep.read.batches import local_batches, train_batches
from data_prep.read.decoding import Batch, Decoder, concatenated
from data_prep.reading import ReadingConfig
from data_prep.storage import filesystem, join

SEED = 0
EPOCHS_AHEAD = 4


class Rows(Dataset[Batch]):
    """The training rows of a prepared folder in memory, decoded one at a time."""

    def __init__(self, folder: str, manifest: Manifest, reading: ReadingConfig) -> None:
        self._decoder = Decoder.of(manifest, reading, (SEED, 0))
        self._rows = pa.concat_tables(
            _shard(join(folder, shard.path), self._decoder.columns)
            for shard in manifest.split("train").shards
        ).combine_chunks()

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def __getitem__(self, index: int) -> Batch:
        return self._decoder.decode(self._rows.slice(index, 1))


def _shard(path: str, columns: list[str]) -> pa.Table:
    store, inner = filesystem(path)
    rows = pq.read_table(inner, filesystem=store, columns=columns)
    images = rows["image"].cast(pa.large_binary())
    return rows.set_column(rows.schema.get_field_index("image"), "image", images)


def collate(rows: list[Batch]) -> dict[str, torch.Tensor]:
    """Joins decoded rows to a batch of tensors."""
    return {name: torch.from_numpy(values) for name, values in concatenated(rows).items()}


def measure(folder: str, *, pairs: int, batch: int, workers: int) -> dict[str, float]:
    """Returns the ratios and the start of an epoch for one prepared folder. Needs a running Ray."""
    manifest, reading = read_manifest(folder), ReadingConfig(augmentation="random_resized_crop")
    rows = manifest.split("train").rows // batch * batch
    loader = DataLoader(
        Rows(folder, manifest, reading),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        drop_last=True,
        persistent_workers=True,
    )

    def ray_epoch(epoch: int) -> Iterator[Batch]:
        return train_batches(folder, manifest, reading, seed=SEED, epoch=epoch, global_batch=batch)

    def plain_epoch(epoch: int) -> Iterator[Batch]:
        return local_batches(
            folder,
            manifest,
            reading,
            seed=SEED,
            epoch=epoch,
            global_batch=batch,
            threads=workers,
        )

    sides: dict[str, Callable[[int], Iterable[Any]]] = {
        "ray": ray_epoch,
        "plain": plain_epoch,
        "loader": lambda epoch: loader,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for epoch in range(pairs):
        for name, side in sides.items():
            times[name].append(seconds_of(side, epoch, rows // batch))
        say(f"pair {epoch + 1} of {pairs}: " + describe(times, rows))
    return {
        **{
            name: statistics.median(
                theirs / ours for theirs, ours in zip(times["loader"], times[name], strict=True)
            )
            for name in ("ray", "plain")
        },
        "images_per_s": rows / statistics.median(times["ray"]),
        "epoch_start_s": statistics.median(epoch_starts(ray_epoch, rows // batch)),
    }


def seconds_of(side: Callable[[int], Iterable[Any]], epoch: int, steps: int) -> float:
    """Returns the seconds of an epoch. Raises AssertionError if it has not so many batches."""
    started = time.perf_counter()
    found = sum(1 for _ in side(epoch))
    spent = time.perf_counter() - started
    assert found == steps, f"{found} batches instead of {steps}"
    return spent


def epoch_starts(side: Callable[[int], Iterator[Batch]], steps: int) -> list[float]:
    """Returns the seconds until the first batch of each epoch but the first, begun ahead."""
    epochs, starts = begun_ahead(side, steps=steps, epochs=EPOCHS_AHEAD), []
    for epoch in range(EPOCHS_AHEAD):
        asked = time.perf_counter()
        for number, _ in enumerate(epochs(epoch)):
            if number == 0 and epoch > 0:
                starts.append(time.perf_counter() - asked)
    return starts


def describe(times: dict[str, list[float]], rows: int) -> str:
    """Returns the images a second of the newest pass of each side."""
    return ", ".join(f"{name} {rows / spent[-1]:,.0f} images/s" for name, spent in times.items())


@one_message
def main() -> None:
    """Measures each folder, then prints a table and one JSON object."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", help="folders that `mantis prepare` wrote")
    parser.add_argument("--pairs", type=count, default=5, help="alternating passes of each side")
    parser.add_argument("--batch", type=count, default=128, help="images of a batch")
    parser.add_argument("--workers", type=count, default=2, help="of the DataLoader")
    arguments = parser.parse_args()
    ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
    result: dict[str, float] = {}
    table = Table("images", "rows", "ray", "plain", "ray images/s", "epoch start, s")
    for folder in arguments.shards:
        manifest = read_manifest(folder)
        side, rows = manifest.image_size[0], manifest.split("train").rows
        say(f"{folder}: {rows:,} images, {side} px")
        found = measure(
            folder, pairs=arguments.pairs, batch=arguments.batch, workers=arguments.workers
        )
        table.add_row(str(side), f"{rows:,}", *(f"{value:.3g}" for value in found.values()))
        result |= {
            f"reading_{side}": round(found["ray"], 3),
            f"plain_{side}": round(found["plain"], 3),
            f"images_per_s_{side}": round(found["images_per_s"], 1),
            f"epoch_start_s_{side}": round(found["epoch_start_s"], 3),
        }
    Console(stderr=True).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
