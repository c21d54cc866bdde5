"""Frozen streams: how one is written, once and for ever, and how it is read back.

A case is two files. NAME.mts is the stream. NAME.safetensors holds what made it: the model's
tables (prior, cdf, offsets, lengths), the images' maps, masks, primaries, levels and answers, and
in its metadata what client and server know beforehand. `python -m tests.golden.cases` writes
the cases that are missing; it never touches one that is there.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mantis_core.bitstream.coder import TOTAL, TableSet
from mantis_core.bitstream.container import StreamSpec
from mantis_core.bitstream.task_field import TaskField
from mantis_core.bitstream.wire import CodedImage, write_stream
from mantis_core.symbols import CONTEXTS, MAX_SYMBOL, Prior

FOLDER = Path(__file__).parent
PRIORS: tuple[Prior, ...] = get_args(Prior)


def write_case(
    name: str, images: list[CodedImage], shape: tuple[int, int], tables: TableSet, spec: StreamSpec
) -> None:
    """Writes both files of a case."""
    known = asdict(spec) | {"model_id": spec.model_id.hex(), "shape": shape}
    arrays = {
        "prior": np.array([PRIORS.index(tables.prior)], np.int32),
        "cdf": tables.cdf,
        "offsets": tables.offsets,
        "lengths": tables.lengths,
        "symbols": np.stack([image.map for image in images]),
        "masks": np.array([image.tasks.mask for image in images]),
        "primaries": np.array([image.tasks.primary for image in images], np.int32),
        # One row an image, -1 behind its own levels; no columns where none are sent.
        "levels": _padded([image.tasks.levels or () for image in images]),
        # -1 where the client has not answered itself.
        "answers": np.array([-1 if i.label is None else i.label for i in images], np.int32),
    }
    save_file(arrays, FOLDER / f"{name}.safetensors", metadata={"known": json.dumps(known)})
    (FOLDER / f"{name}.mts").write_bytes(write_stream(images, shape, tables, spec).data)


def read_case(name: str) -> tuple[bytes, list[CodedImage], tuple[int, int], TableSet, StreamSpec]:
    """Stream, the images it must decode to, their shape, tables and spec."""
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        known = json.loads(file.metadata()["known"])
    shape = tuple(known.pop("shape"))
    known["labels"] = tuple(known.get("labels", ()))
    known.pop("summary_channels", None)  # 0, where an earlier version wrote the case
    spec = StreamSpec(
        **known
        | {
            "model_id": bytes.fromhex(known["model_id"]),
            "input_shape": tuple(known["input_shape"]),
        }
    )
    images = []
    answers = arrays.get("answers", np.full(len(arrays["symbols"]), -1, np.int32))
    for symbols, mask, primary, levels, answer in zip(
        arrays["symbols"],
        arrays["masks"],
        arrays["primaries"],
        arrays["levels"],
        answers.tolist(),
        strict=True,
    ):
        own = tuple(int(level) for level in levels if level >= 0) if len(levels) else None
        field = TaskField(tuple(map(bool, mask)), int(primary), own)
        images.append(CodedImage(field, symbols, None if answer < 0 else answer))
    data = (FOLDER / f"{name}.mts").read_bytes()
    prior = PRIORS[int(arrays["prior"][0])]
    tables = TableSet(prior, arrays["cdf"], arrays["offsets"], arrays["lengths"])
    return data, images, shape, tables, spec


def names() -> list[str]:
    """Every case there is."""
    return sorted(path.stem for path in FOLDER.glob("*.mts"))


def random_tables(
    prior: Prior, rows: int, channels: int, seed: int, *, contexts: int = 1
) -> TableSet:
    """Tables of 3 to 20 entries a channel, `contexts` of them, made from integers alone."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 21, channels).astype(np.int32)
    cdf = np.full((rows, channels * contexts, lengths.max() + 1), TOTAL, np.int32)
    for row in range(rows):
        for index, length in enumerate(np.repeat(lengths, contexts)):
            cuts = rng.choice(np.arange(1, TOTAL), length - 1, replace=False)
            cdf[row, index, 0] = 0
            cdf[row, index, 1:length] = np.sort(cuts)
    return TableSet(prior, cdf, -(lengths // 2), lengths)


def random_image(
    tasks: int,
    shape: tuple[int, int, int],
    *,
    levels: bool,
    seed: int,
    reach: int = 6,
) -> CodedImage:
    """Up to four active tasks; symbols of +-`reach`, many of them outside their tables."""
    rng = np.random.default_rng(seed)
    active = sorted(rng.choice(tasks, rng.integers(1, min(tasks, 4) + 1), replace=False).tolist())
    primary = int(rng.choice(active))
    least = int(rng.integers(0, 8))
    own = tuple(least if k == primary else int(rng.integers(least, 16)) for k in active)
    field = TaskField(tuple(k in active for k in range(tasks)), primary, own if levels else None)
    return CodedImage(field, rng.integers(-reach, reach + 1, shape).astype(np.int32))


def _padded(rows: list[tuple[int, ...]]) -> "np.ndarray[tuple[int, int], np.dtype[np.int32]]":
    width = max(map(len, rows))
    return np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int32).reshape(
        len(rows), width
    )


def answered_image(
    tasks: int, shape: tuple[int, int, int], *, levels: bool, seed: int, labels: int
) -> CodedImage:
    """An image that the client has answered itself."""
    rng = np.random.default_rng(seed)
    task = int(rng.integers(tasks))
    own = (int(rng.integers(16)),) if levels else None
    field = TaskField(tuple(k == task for k in range(tasks)), task, own)
    return CodedImage(field, np.zeros(shape, np.int32), label=int(rng.integers(labels)))


def _spec(
    tasks: int, shape: tuple[int, int], image: CodedImage, labels: tuple[int, ...]
) -> StreamSpec:
    return StreamSpec(b"gold", tasks, shape, len(image.map), 8, labels)


def _write_missing() -> list[str]:
    extreme = random_image(1, (3, 2, 2), levels=True, seed=5)
    extreme.map[0] = [[MAX_SYMBOL, -MAX_SYMBOL], [2**16, -1]]
    many = [random_image(7, (6, 4, 4), levels=True, seed=seed) for seed in range(20, 25)]
    alone = random_image(1, (2, 4, 4), levels=True, seed=11)
    mixed = [answered_image(6, (3, 4, 4), levels=True, seed=s, labels=5) for s in (50, 51)]
    mixed[1:1] = [random_image(6, (3, 4, 4), levels=True, seed=52)]
    cases = {
        "primary": ([random_image(10, (16, 8, 8), levels=True, seed=1)], (64, 64), "primary", 10),
        "shared": ([random_image(10, (8, 4, 4), levels=False, seed=2)], (32, 32), "shared", 10),
        "per_task": ([random_image(12, (8, 4, 4), levels=True, seed=3)], (32, 32), "per_task", 12),
        "of_another_shape": (
            [random_image(3, (4, 5, 2), levels=True, seed=4)],
            (33, 16),
            "primary",
            3,
        ),
        "extreme_symbols": ([extreme], (16, 16), "shared", 1),
        "one_symbol": ([random_image(1, (1, 1, 1), levels=False, seed=6)], (8, 8), "shared", 1),
        "many_tasks": (
            [random_image(200, (4, 4, 4), levels=True, seed=7)],
            (32, 32),
            "primary",
            200,
        ),
        "several": (many, (32, 32), "primary", 7),
        "answered": (
            [answered_image(10, (8, 4, 4), levels=True, seed=10, labels=10)],
            (32, 32),
            "primary",
            10,
        ),
        "could_be_answered": ([alone], (32, 32), "shared", 1),
        "some_answered": (mixed, (32, 32), "primary", 6),
        "odd_sides_with_contexts": (
            [random_image(4, (5, 5, 7), levels=True, seed=9, reach=4)],
            (40, 56),
            "primary",
            4,
        ),
        "several_with_contexts": (
            [random_image(3, (4, 4, 4), levels=True, seed=seed) for seed in range(40, 43)],
            (32, 32),
            "per_task",
            3,
        ),
    }
    written = []
    for seed, (name, (images, shape, prior, tasks)) in enumerate(cases.items()):
        if name in names():
            continue
        channels = len(images[0].map)
        rows = 1 if prior == "shared" else tasks
        own = (32, 32) if name == "of_another_shape" else shape
        contexts = CONTEXTS if name.endswith("contexts") else 1
        tables = random_tables(prior, rows, channels, seed, contexts=contexts)
        labels = {"answered": 10, "could_be_answered": 7, "some_answered": 5}.get(name)
        answerable = () if labels is None else (labels,) * tasks
        write_case(name, images, shape, tables, _spec(tasks, own, images[0], answerable))
        written.append(name)
    return written


if __name__ == "__main__":
    print("written:", ", ".join(_write_missing()) or "none, all are there")
    sys.exit(0)
