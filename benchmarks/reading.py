"""Times an epoch of training batches beside PyTorch's DataLoader over the same images and crops.

    python -m benchmarks.reading SHARDS [SHARDS ...] --pairs 5 --workers 2

SHARDS is a folder that `mantis prepare` wrote; its training rows are read. One pass is one epoch
from the call that makes the iterator to the last batch. `ray` is what trainings on Ray read,
`plain` what `mantis run --plain` reads with `--workers` threads, `cached` the same with
`data.cache: decoded`, whose first epoch is not timed. The DataLoader has `--workers` processes,
which stay from epoch to epoch, and holds the encoded images in memory. It makes the same crops by
the same code, image by image, and stacks them. `torchvision` is a DataLoader as torchvision's
ImageNet example has it: Pillow, RandomResizedCrop, RandomHorizontalFlip. Passes alternate; figures
are medians of the pairs' ratios, the first DataLoader's time over another's. `epoch_start_s` is the
wait for an epoch's first batch in a sequence of epochs, each begun ahead as a training does it. The
last line is one JSON object, whose keys have the image's side: `reading_64`.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.program import count, one_message, say
from data_prep.manifest import Manifest, read_manifest
from data_prep.read.ahead import begun_ahead
from data_prep.read.batches import local_batches, train_batches
from data_prep.read.decoding import Batch, Decoder, labels_of
from data_prep.reading import ReadingConfig
from data_prep.storage import filesystem, join

SEED = 0
EPOCHS_AHEAD = 4


class Rows(Dataset[dict[str, torch.Tensor]]):
    """The training rows of a prepared folder in memory, decoded one at a time."""

    def __init__(self, folder: str, manifest: Manifest, reading: ReadingConfig) -> None:
        self._decoder = Decoder.of(manifest, reading, (SEED, 0))
        rows = pa.concat_tables(
            _shard(join(folder, shard.path), self._decoder.columns)
            for shard in manifest.split("train").shards
        ).combine_chunks()
        self._files = rows["image"].chunk(0)
        labels = labels_of(rows, len(manifest.tasks))
        self._labels = {name: torch.from_numpy(values) for name, values in labels.items()}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = {name: values[index] for name, values in self._labels.items()}
        pixels, _ = self._decoder.opened(self._files[index].as_py(), {})
        image = np.empty((3, *self._decoder.size), np.uint8)
        self._decoder.view(pixels, {}, int(labels["row_id"]), image)
        return {**labels, "image": torch.from_numpy(image)}


class TorchvisionRows(Rows):
    """The same rows by the transforms of torchvision's ImageNet example."""

    def __init__(self, folder: str, manifest: Manifest, reading: ReadingConfig) -> None:
        super().__init__(folder, manifest, reading)
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    manifest.image_size,
                    scale=(reading.min_crop_area, 1.0),
                    interpolation=transforms.InterpolationMode.BICUBIC,
                ),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = {name: values[index] for name, values in self._labels.items()}
        image = Image.open(io.BytesIO(self._files[index].as_py())).convert("RGB")
        return {**labels, "image": self._transform(image)}


def _shard(path: str, columns: list[str]) -> pa.Table:
    store, inner = filesystem(path)
    rows = pq.read_table(inner, filesystem=store, columns=columns)
    images = rows["image"].cast(pa.large_binary())
    return rows.set_column(rows.schema.get_field_index("image"), "image", images)


def measure(folder: str, *, pairs: int, batch: int, workers: int, cache: Path) -> dict[str, float]:
    """Returns the ratios and the start of an epoch for one prepared folder. Needs a running Ray.

    Decoded images are kept in `cache`.
    """
    manifest, reading = read_manifest(folder), ReadingConfig(augmentation="random_resized_crop")
    rows = manifest.split("train").rows // batch * batch

    def loader(kind: type[Rows]) -> DataLoader[dict[str, torch.Tensor]]:
        return DataLoader(
            kind(folder, manifest, reading),
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            persistent_workers=True,
        )

    own_code, torchvision = loader(Rows), loader(TorchvisionRows)

    def ray_epoch(epoch: int) -> Iterator[Batch]:
        return train_batches(folder, manifest, reading, seed=SEED, epoch=epoch, global_batch=batch)

    def plain_epoch(epoch: int, cache: Path | None = None) -> Iterator[Batch]:
        return local_batches(
            folder,
            manifest,
            reading,
            seed=SEED,
            epoch=epoch,
            global_batch=batch,
            threads=workers,
            cache=cache,
        )

    sides: dict[str, Callable[[int], Iterable[Any]]] = {
        "ray": ray_epoch,
        "plain": plain_epoch,
        "cached": lambda epoch: plain_epoch(epoch, cache),
        "torchvision": lambda epoch: torchvision,
        "loader": lambda epoch: own_code,
    }
    next(iter(sides["cached"](0)))
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
            for name in ("ray", "plain", "cached", "torchvision")
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
    sides = ("ray", "plain", "cached", "torchvision")
    table = Table("images", "rows", *sides, "ray images/s", "epoch start, s")
    for folder in arguments.shards:
        manifest = read_manifest(folder)
        side, rows = manifest.image_size[0], manifest.split("train").rows
        say(f"{folder}: {rows:,} images, {side} px")
        how = {"pairs": arguments.pairs, "batch": arguments.batch, "workers": arguments.workers}
        with TemporaryDirectory() as cache:
            found = measure(folder, **how, cache=Path(cache))
        table.add_row(str(side), f"{rows:,}", *(f"{value:.3g}" for value in found.values()))
        result |= {
            f"reading_{side}": round(found["ray"], 3),
            f"plain_{side}": round(found["plain"], 3),
            f"cached_{side}": round(found["cached"], 3),
            f"torchvision_{side}": round(found["torchvision"], 3),
            f"images_per_s_{side}": round(found["images_per_s"], 1),
            f"epoch_start_s_{side}": round(found["epoch_start_s"], 3),
        }
    Console(stderr=True).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
