"""Measures what a trained codec loses when its client is exported, in float32 and in int8.

    python -m benchmarks.exported MODEL --data DATA [--images 2500] [--levels 0,4,8,12]
        [--tasks T,T] [--calibration DATA] [--no-int8] [--jobs 1] [--rows CSV] [--json]

MODEL is the checkpoint folder of a codec. DATA is a folder that `mantis prepare` wrote for it, of
which the first validation images are measured, or labelled images as `mantis score` takes them.
Int8 is calibrated by images that were held out of training or, without any, trained on. For DATA
that is not prepared `--calibration` names them. An image that calibrates is not measured.

Each image is coded at each level by three clients: in torch, and exported in float32 and in int8. A
model that is asked is asked for each task that the image has, or for those of `--tasks`; another
one detects. The server in torch answers every stream. Means are over streams, intervals over
images. `right` is top-1 accuracy, and for a mask the share of its labelled pixels: there is no mean
IoU. The last line is one JSON object. Shapes: N images, F figures, C clients, L levels.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.client import SENT
from benchmarks.program import count, listed, one_message, say
from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.finding import source_for_path
from data_prep.manifest import MANIFEST_NAME, Task, TaskTable, read_manifest
from data_prep.prepare.shards import prepare
from data_prep.read.batches import local_batches
from data_prep.reading import ReadingConfig
from mantis_core.bitstream.container import BitstreamError
from mantis_core.bitstream.wire import CodedImage, read_stream, write_message, write_stream
from mantis_core.codec.answer import Answer
from mantis_core.codec.checkpoint import load_client, load_server, save_half
from mantis_core.codec.spec import ModelSpec
from mantis_core.device.client import DeviceClient
from mantis_core.device.requests import Way, asked_levels
from mantis_core.errors import ModelError
from mantis_core.folders import read_meta
from mantis_core.measure.bd_rate import Curve, CurveError, over_seeds
from mantis_core.tasks import IGNORE
from mantis_lite.client import open_export
from pipelines.chain.processes import pool_of
from pipelines.export.write import export_client
from pipelines.training.problem import tasks_of

CLIENTS = ("torch", "float32", "int8")
LEVELS = (0, 4, 8, 12)
CALIBRATING = 200  # images, as `mantis export` takes
FIGURES = ("wire_bytes", "session_bytes", "equal", "read", "symbols", "right")
"""Of a stream: whether it is torch's byte for byte, whether the server reads what was coded, how
many symbols are not torch's, how much of the answer is right (NaN without a label)."""
RIGHT = FIGURES.index("right")
CHUNK = 8  # images that are measured together
SAY_EVERY_S = 20

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


class Work(NamedTuple):
    """A model, the folders of its exports as in CLIENTS, and how it is asked; `tasks` None: all."""

    model: str
    exports: tuple[str, ...]
    levels: tuple[int, ...]
    tasks: tuple[str, ...] | None = None


class Asked(NamedTuple):
    """One image as it was asked for `task`, "" where tasks are detected: figures (F, C, L)."""

    image: int
    task: str
    figures: Floats


class Measurer:
    """The clients and the server of a model at work on images with labels."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self.levels, self.server = work.levels, load_server(work.model)
        own = load_client(work.model)
        self.clients: list[DeviceClient[Any]] = [own]
        self.clients += [open_export(folder) for folder in work.exports]
        every = own.facts.tasks if own.facts.requests == "asked" else (None,)
        self.sessions = {task: own.open(request=task) for task in work.tasks or every}

    def __call__(self, batch: Arrays) -> list[Asked]:
        """What the images of a batch of the reader give."""
        names, found = self.server.spec.task_names, []
        for index in range(len(batch["image"])):
            truth = {name: values[index] for name, values in batch.items()}
            for task in self.sessions:
                if task is None or truth["task_mask"][names.index(task)]:
                    own = self._figures(truth, task)
                    found.append(Asked(int(truth["row_id"]), task or "", own))
        return found

    def _figures(self, truth: Arrays, task: str | None) -> Floats:
        coded = [self._coded(client, truth["image"], task) for client in self.clients]
        streams = {data for own in coded for data, _, _ in own}
        answers = {data: self._answer(data) for data in streams}
        found = np.empty((len(FIGURES), len(self.clients), len(self.levels)))
        for c, place in np.ndindex(found.shape[1:]):
            (stream, session_bytes, image), (known, _, first) = coded[c][place], coded[0][place]
            read, answer = answers[stream]
            found[:, c, place] = (
                len(stream),
                session_bytes,
                stream == known,
                read is not None and same(read, image),
                (image.map != first.map).sum(),
                share_right(self.server.spec, answer, truth, task),
            )
        return found

    def _coded(
        self, client: DeviceClient[Any], image: NDArray[np.uint8], task: str | None
    ) -> list[tuple[bytes, int, CodedImage]]:
        """Stream, size in a session and symbols of an image (3, H, W) at each level."""
        given: Any = np.array(image[None])
        if client.array_type is torch.Tensor:
            given = torch.from_numpy(given)
        (seen,) = client.looker.look(given, [Way(task, level=level) for level in self.levels])
        own, end, found = (client.tables, client.stream_spec), self.sessions[task], []
        for each in seen:
            data = write_stream([each.image], each.input_shape, *own).data
            message = write_message(each.image, end.session, end.hello, *own).data
            found.append((data, len(message), each.image))
        return found

    def _answer(self, data: bytes) -> tuple[CodedImage | None, Answer | None]:
        """What the server reads in a stream, and its answer; None for one that it refuses."""
        try:
            read = read_stream(data, self.server.tables, self.server.stream_spec)
        except BitstreamError:
            return None, None
        (answer,) = self.server.answer([read])
        return read.images[0], answer


def same(read: CodedImage, coded: CodedImage) -> bool:
    """Whether a server has read what a client has coded."""
    fields = attrgetter("tasks", "label", "confidence", "has_latent", "rate_level")
    return fields(read) == fields(coded) and np.array_equal(read.map, coded.map)


def share_right(spec: ModelSpec, answer: Answer | None, truth: Arrays, task: str | None) -> float:
    """How much of the answer to a request is right; NaN if no label is known.

    Without a request: the class, where each image has one, else the labels of all tasks.
    """
    labels = dict(zip(spec.task_names, truth["labels"].tolist(), strict=True))
    said: Mapping[str, int] = {} if answer is None else answer.labels
    if task is None and spec.single_class:
        labels = {"": int(truth["class_label"])}
        said = {"": -1 if answer is None else answer.class_index}
    elif task is not None and f"segmentation/{task}" in truth:
        known = truth[f"segmentation/{task}"] != IGNORE
        mask = None if answer is None else answer.segmentation.get(task)
        right = known & (mask == truth[f"segmentation/{task}"])
        return float(right.sum() / known.sum()) if known.any() else np.nan
    elif task is not None:
        labels = {task: labels[task]}
    hits = [said.get(name) == label for name, label in labels.items() if label >= 0]
    return float(np.mean(hits)) if hits else np.nan


kept = lru_cache(maxsize=1)(Measurer)  # one in each process


def measured(batch: Arrays, work: Work) -> list[Asked]:
    """What a batch gives, in whichever process."""
    return kept(work)(batch)


def measure(work: Work, batches: Iterable[Arrays], images: int, *, jobs: int = 1) -> list[Asked]:
    """Measures all batches, of up to `images` together, in `jobs` processes."""
    found, said = list[Asked](), time.monotonic()
    with pool_of(jobs) as pool:
        run: Any = map if jobs == 1 else pool.map
        for part in run(partial(measured, work=work), batches):
            found += part
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                say(f"{len({asked.image for asked in found})} of {images} images")
    if not found:
        raise DataError("no image has a task that is measured: give other data or other --tasks")
    return found


def prepared(data: str, spec: ModelSpec, like: Mapping[str, Any], scratch: str) -> str:
    """`data` if it is prepared, else a folder in `scratch` with all of it, prepared as `like`."""
    folder = data
    if not Path(data, MANIFEST_NAME).is_file():
        say(f"preparing {data}")
        order = attrgetter("name", "kind", "labels", "classes", "num_classes", "parent")
        tasks = tuple(Task(*order(task)) for task in spec.tasks)
        masks, ignored = tuple(like["masks"]), tuple(map(tuple, like["ignored"]))
        source = source_for_path(data, DataConfig.model_validate(like["data"]))
        own = {**like["data"], "sources": [source.model_dump()], "val_rows": None}
        prepare(
            DataConfig.model_validate(own),
            TaskTable(tasks, spec.classes, spec.class_names, masks, ignored),
            seed=like["seed"],
            output=(folder := tempfile.mkdtemp(dir=scratch)),
            splits=("val",),
            run=lambda given, function, job: map(partial(function, job=job), given),
        )
    manifest = read_manifest(folder)
    if (tasks_of(manifest), manifest.image_size) != (spec.tasks, spec.image_size):
        raise DataError(f"{data} was prepared for other tasks or sizes than those of the model")
    return folder


def rows_of(folder: str, split: str, most: int, known: Collection[bytes] = ()) -> Iterator[Arrays]:
    """Up to `most` rows of a split, in its drawn order, but for images whose SHA-256 is known."""
    manifest, reading = read_manifest(folder), ReadingConfig()
    for batch in local_batches(folder, manifest, reading, split=split, global_batch=CHUNK):
        digests = [sha256(image.tobytes()).digest() for image in batch["image"][:most]]
        keep = [row for row, digest in enumerate(digests) if digest not in known]
        yield {name: values[keep] for name, values in batch.items()}
        most -= len(digests)
        if most <= 0:
            return


def calibrating(folder: str, splits: Sequence[str]) -> list[NDArray[Any]]:
    """Images (3, H, W) of the first of `splits` that has rows; DataError if none has."""
    has = read_manifest(folder).splits
    split = next((name for name in splits if name in has and has[name].rows), None)
    if split is None:
        raise DataError("no image is left to calibrate int8: give --calibration, or --no-int8")
    return [image for part in rows_of(folder, split, CALIBRATING) for image in part["image"]]


def figures(found: Sequence[Asked], levels: Sequence[int]) -> dict[str, Any]:
    """What all streams say of each client, together and by level, and what int8 costs."""
    values = np.stack([asked.figures for asked in found])  # (requests, F, C, L)
    names, known = np.array([asked.task for asked in found]), ~np.isnan(values[:, RIGHT, 0, 0])
    own_image = np.array([asked.image for asked in found])
    each = [values[known & (own_image == image)].mean(axis=0) for image in set(own_image[known])]
    images = np.array(each).reshape(-1, *values.shape[1:])  # (N, F, C, L)
    clients: dict[str, dict[str, Any]] = {}
    for c, client in enumerate(CLIENTS[: values.shape[2]]):
        rows: list[dict[str, Any]] = []
        for place, level in enumerate(levels):
            own = values[:, :, c, place]
            by_task = {task: means(own[names == task]) for task in dict.fromkeys(names.tolist())}
            rows.append({"level": level, **means(own), "by_task": by_task})
            if c and len(images) > 1:
                change = 100 * (images[:, RIGHT, c, place] - images[:, RIGHT, 0, place])
                half = 1.96 * float(change.std(ddof=1)) / len(change) ** 0.5
                rows[-1]["change"] = [round(float(change.mean()), 5), round(half, 5)]
        clients[client] = {**means(np.moveaxis(values[:, :, c], 2, 1)), "by_level": rows}
    result: dict[str, Any] = {"clients": clients}
    if len(clients) == len(CLIENTS):
        sizes = ("wire_bytes", "session_bytes")
        result["int8_against_float32"] = {size: compared(images[:, :, 1:], size) for size in sizes}
    return result


def means(values: Floats) -> dict[str, float | None]:
    """The means of figures (..., F) by name, None of what is not known."""
    flat = values.reshape(-1, len(FIGURES))
    known = [column[~np.isnan(column)] for column in flat.T]
    each = [round(float(column.mean()), 5) if len(column) else None for column in known]
    return dict(zip(FIGURES, each, strict=True))


def compared(images: Floats, size: str) -> dict[str, Any]:
    """BD-rate: bytes more of the second of two clients in per cent. `images` are (N, F, 2, L)."""
    if not len(images):
        return {"refused": "no image has a label"}
    sizes, right = images[:, FIGURES.index(size)], images[:, RIGHT]
    anchor, test = (Curve(sizes[:, c].T, right[:, c].T) for c in (0, 1))
    try:
        found = over_seeds([anchor], [test])
    except CurveError as error:
        return {"refused": f"{error}; give other --levels"}
    return {name: round(getattr(found, name), 2) for name in ("mean", "low", "high")}


def table(result: Mapping[str, Any]) -> Table:
    """The figures of each client, by level and together. Shares are in per cent."""
    title = "{images} images, {requests} requests, int8 calibrated by {calibrated_by}"
    shown = Table("level", "client", title=title.format(**result))
    for column in ("wire B", "session B", "right", "change", "as torch's", "read", "symbols", "kB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for place in (*range(len(result["levels"])), None):
        shown.add_section()
        for client, whole in result["clients"].items():
            own = whole if place is None else whole["by_level"][place]
            shown.add_row(
                "all" if place is None else str(own["level"]),
                client,
                *(f"{own[size]:.2f}" for size in ("wire_bytes", "session_bytes")),
                "" if own["right"] is None else f"{100 * own['right']:.2f}",
                "{:+.2f} ±{:.2f}".format(*own["change"]) if "change" in own else "",
                *(f"{100 * own[share]:.2f}" for share in ("equal", "read")),
                f"{own['symbols']:.3f}",
                f"{whole['bytes'] / 1000:.0f}" if place is None else "",
            )
    return shown


def write_rows(path: Path, found: Sequence[Asked], levels: Sequence[int]) -> None:
    """Writes a line for each stream."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "task", "level", "client", *FIGURES))
        for image, task, values in found:
            for c, place in np.ndindex(values.shape[1:]):
                own = (f"{value:g}" for value in values[:, c, place])
                writer.writerow((image, task, levels[place], CLIENTS[c], *own))


def run(arguments: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Exports the model to `scratch`, measures it and returns all figures."""
    codec, like = load_client(arguments.model), read_meta(arguments.model).get("preparation")
    if like is None:
        raise ModelError(f"{arguments.model} does not say how its images were prepared")
    levels = arguments.levels or tuple(n for n in LEVELS if n < codec.facts.rate_levels)
    for level in levels:
        asked_levels(codec.facts, level, None)
    for task in arguments.tasks or ():
        codec.open(request=task)
    folder = prepared(arguments.data, codec.spec, like, scratch)
    images: list[NDArray[Any]] = []
    if not arguments.no_int8:
        other = prepared(arguments.calibration or folder, codec.spec, like, scratch)
        images = calibrating(other, ("holdout", "train", *["val"] * bool(arguments.calibration)))
    folders = [Path(scratch, name) for name in CLIENTS[: 2 if arguments.no_int8 else 3]]
    save_half(folders[0], arguments.model, "client")
    for own in folders[1:]:
        int8 = own.name == "int8"
        export_client(codec, own, images=images if int8 else None, int8=int8, say=say)
    work = Work(arguments.model, tuple(map(str, folders[1:])), levels, arguments.tasks)
    known = {sha256(image.tobytes()).digest() for image in images}
    rows = rows_of(folder, "val", arguments.images, known)
    found = measure(work, rows, arguments.images, jobs=arguments.jobs)
    if arguments.rows:
        write_rows(arguments.rows, found, levels)
    result = figures(found, levels)
    for own in folders:
        files = [path for path in own.iterdir() if own is folders[0] or path.name in SENT]
        result["clients"][own.name]["bytes"] = sum(path.stat().st_size for path in files)
    result |= {"model_id": codec.ids.model.hex(), "stream_id": codec.ids.stream.hex()}
    result |= {"images": len({asked.image for asked in found}), "requests": len(found)}
    return {**result, "calibrated_by": len(images), "levels": levels}


@one_message
def main() -> int:
    """Exports and measures a codec, then prints a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder of a codec")
    parser.add_argument("--data", required=True, help="labelled images, prepared or not")
    parser.add_argument("--images", type=count, default=2500, metavar="N", help="the first N")
    parser.add_argument("--levels", type=listed(int), metavar="L,L", help="0,4,8,12 if it has them")
    parser.add_argument("--tasks", type=listed(str), metavar="T,T", help="ask for these alone")
    parser.add_argument("--calibration", metavar="DATA", help="images that int8 is calibrated by")
    parser.add_argument("--no-int8", action="store_true", help="measure float32 alone")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="N processes at once")
    parser.add_argument("--rows", type=Path, metavar="CSV", help="file for a line for each stream")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(arguments, scratch)
    if not arguments.json:
        console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
        console.print(table(result))
        for size, own in result.get("int8_against_float32", {}).items():
            figure = own.get("refused") or "{mean:+.2f} % ({low:+.2f} to {high:+.2f})".format(**own)
            console.print(f"BD-rate of int8 against float32, {size}: {figure}")
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
