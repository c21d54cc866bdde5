"""Frozen streams: how one is written, once and for ever, and how it is read back.

A case is two files. NAME.mts is the stream. NAME.safetensors holds what made it: the model's
tables (prior, cdf, offsets, lengths), the images' maps, masks, primaries, levels and answers, and
in its metadata what client and server know beforehand. `python -m tests.golden.cases` writes
the cases that are missing; it never touches one that is there.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mantis_core.bitstream.coder import TOTAL, TableSet
from mantis_core.bitstream.container import CONFIDENCE_LEVELS, CONFIDENCE_ROWS, StreamSpec
from mantis_core.bitstream.session import Session, write_hello
from mantis_core.bitstream.task_field import TaskField
from mantis_core.bitstream.wire import CodedImage, write_message, write_stream
from mantis_core.symbols import CONTEXTS, MAX_SYMBOL, Prior

FOLDER = Path(__file__).parent
SESSIONS = FOLDER / "sessions.json"
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
        # The client's label, -1 where it sends none.
        "answers": np.array([-1 if i.label is None else i.label for i in images], np.int32),
    }
    if spec.version > 1:
        # A row an image: confidence, or -1; whether there is a latent; the rate level.
        arrays["sent"] = np.array(
            [
                (-1 if i.confidence is None else i.confidence, i.has_latent, i.rate_level)
                for i in images
            ],
            np.int32,
        )
    save_file(arrays, FOLDER / f"{name}.safetensors", metadata={"known": json.dumps(known)})
    (FOLDER / f"{name}.mts").write_bytes(write_stream(images, shape, tables, spec).data)


def read_case(name: str) -> tuple[bytes, list[CodedImage], tuple[int, int], TableSet, StreamSpec]:
    """Stream, the images it must decode to, their shape, tables and spec."""
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        known = json.loads(file.metadata()["known"])
    shape = tuple(known.pop("shape"))
    known["labels"] = tuple(known.get("labels", ()))
    known["confidence"] = tuple(tuple(row) for row in known.get("confidence", ()))
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
    sent = [(-1, answer < 0, 0) for answer in answers.tolist()]
    sent = arrays["sent"].tolist() if "sent" in arrays else sent
    for symbols, mask, primary, levels, answer, (sure, latent, rate) in zip(
        arrays["symbols"],
        arrays["masks"],
        arrays["primaries"],
        arrays["levels"],
        answers.tolist(),
        sent,
        strict=True,
    ):
        own = tuple(int(level) for level in levels if level >= 0) if len(levels) else None
        field = TaskField(tuple(map(bool, mask)), int(primary), own)
        label = None if answer < 0 else answer
        sure = None if sure < 0 else sure
        images.append(CodedImage(field, symbols, label, sure, bool(latent), rate))
    data = (FOLDER / f"{name}.mts").read_bytes()
    prior = PRIORS[int(arrays["prior"][0])]
    arrays_of_tables = (arrays["cdf"], arrays["offsets"], arrays["lengths"])
    tables = TableSet(prior, *arrays_of_tables, levels=spec.rate_levels)
    return data, images, shape, tables, spec


def names() -> list[str]:
    """Every case there is."""
    return sorted(path.stem for path in FOLDER.glob("*.mts"))


def random_tables(
    prior: Prior, rows: int, channels: int, seed: int, *, contexts: int = 1, levels: int = 1
) -> TableSet:
    """Tables of 3 to 20 entries a channel, `contexts` of them, made from integers alone."""
    rows *= levels
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 21, channels).astype(np.int32)
    cdf = np.full((rows, channels * contexts, lengths.max() + 1), TOTAL, np.int32)
    for row in range(rows):
        for index, length in enumerate(np.repeat(lengths, contexts)):
            cuts = rng.choice(np.arange(1, TOTAL), length - 1, replace=False)
            cdf[row, index, 0] = 0
            cdf[row, index, 1:length] = np.sort(cuts)
    return TableSet(prior, cdf, -(lengths // 2), lengths, levels)


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
    return CodedImage(field, np.zeros(shape, np.int32), int(rng.integers(labels)), has_latent=False)


def named_image(
    spec: StreamSpec, shape: tuple[int, int, int], *, levels: bool, seed: int, answered: bool
) -> CodedImage:
    """An image with the client's answer, alone or beside the latent, at some rate of the model.

    Its primary task has labels; one that is `answered` has no other.
    """
    rng = np.random.default_rng(seed)
    first = int(rng.choice(np.flatnonzero(spec.labels)))
    image = random_image(spec.num_tasks, shape, levels=levels, seed=seed, reach=3)
    mask = tuple(
        k == first or (image.tasks.mask[k] and not answered) for k in range(spec.num_tasks)
    )
    least = int(rng.integers(0, 8))
    own = tuple(
        least if k == first else int(rng.integers(least, 16)) for k, on in enumerate(mask) if on
    )
    return CodedImage(
        TaskField(mask, first, own if levels else None),
        np.zeros(shape, np.int32) if answered else image.map,
        int(rng.integers(spec.labels[first])),
        int(rng.integers(CONFIDENCE_LEVELS)),
        has_latent=not answered,
        rate_level=0 if answered else int(rng.integers(spec.rate_levels)),
    )


def sure_counts(seed: int) -> tuple[tuple[int, ...], ...]:
    """Counts of confidence, made from integers alone."""
    rng = np.random.default_rng(seed)
    cuts = [
        np.sort(rng.choice(np.arange(1, TOTAL), CONFIDENCE_LEVELS - 1, replace=False))
        for _ in range(CONFIDENCE_ROWS)
    ]
    return tuple(tuple(np.diff([0, *row, TOTAL]).tolist()) for row in cuts)


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
    written = _write_missing_of_version_2()
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


def _write_missing_of_version_2() -> list[str]:
    """Files with and without the client's answer, and a session's hellos and messages."""
    latent = (4, 4, 5)
    spec = StreamSpec(b"gold", 6, (32, 40), 4, 8, (5, 0, 1, 5, 9, 5), version=2)
    named = replace(spec, rate_levels=5, confidence=sure_counts(60))
    tables = random_tables("primary", 6, 4, 60, contexts=CONTEXTS)
    of_rates = random_tables("primary", 6, 4, 61, contexts=CONTEXTS, levels=5)
    written = []
    for name, own, images in [
        ("version_2", spec, [random_image(6, latent, levels=True, seed=61)]),
        (
            "version_2_with_answers",
            named,
            [
                named_image(named, latent, levels=True, seed=seed, answered=seed % 2 == 1)
                for seed in range(62, 66)
            ],
        ),
    ]:
        if name not in names():
            write_case(name, images, (32, 40), tables if own is spec else of_rates, own)
            written.append(name)
    if not SESSIONS.exists():
        SESSIONS.write_text(json.dumps(_sessions(), indent=1) + "\n")
        written.append(SESSIONS.name)
    return written


def sessions() -> list[tuple[Session, list[CodedImage], TableSet, StreamSpec]]:
    """The sessions that are frozen, with what is sent in them."""
    _, named, _, of_rates, spec = read_case("version_2_with_answers")
    _, plain, _, tables, without = read_case("version_2")
    asked = [replace(image, tasks=replace(image.tasks, levels=None)) for image in plain]
    return [
        (Session((32, 40), with_levels=True, with_answers=True), named, of_rates, spec),
        (Session((32, 40), with_levels=True), plain, tables, without),
        (Session((32, 40), requests=True), asked, tables, without),
        (Session((32, 40), requests=True), _about_one_task(without, levels=False), tables, without),
        (
            Session((32, 40), with_answers=True, requests=True),
            [replace(i, tasks=replace(i.tasks, levels=None)) for i in named],
            of_rates,
            spec,
        ),
        (Session((24, 33), with_levels=True), _of_another_shape(without), tables, without),
        (
            Session((32, 40), with_levels=True, with_answers=True),
            [_without_labels(spec)],
            of_rates,
            spec,
        ),
    ]


def _about_one_task(spec: StreamSpec, *, levels: bool) -> list[CodedImage]:
    """A latent about one task with labels, one without labels, and an answer by the client."""
    shape = (4, 4, 5)
    found = []
    for seed, task in ((70, 3), (71, 1)):
        image = random_image(spec.num_tasks, shape, levels=levels, seed=seed)
        mask = tuple(k == task for k in range(spec.num_tasks))
        found.append(replace(image, tasks=TaskField(mask, task, (2,) if levels else None)))
    nothing = np.zeros(shape, np.int32)
    answered = CodedImage(found[0].tasks, nothing, label=4, has_latent=False)
    return [*found, answered]


def _of_another_shape(spec: StreamSpec) -> list[CodedImage]:
    return [
        random_image(spec.num_tasks, (4, 3, 5), levels=True, seed=72),
        replace(_about_one_task(spec, levels=True)[2], map=np.zeros((4, 3, 5), np.int32)),
    ]


def _without_labels(spec: StreamSpec) -> CodedImage:
    """An image whose primary task has no labels, so that it carries no answer."""
    return replace(_about_one_task(spec, levels=True)[1], rate_level=2)


def _sessions() -> list[dict[str, object]]:
    found = []
    for session, images, tables, spec in sessions():
        hello = write_hello(session, spec)
        messages = [write_message(i, session, hello, tables, spec).data.hex() for i in images]
        found.append({"hello": hello.hex(), "messages": messages})
    return found


if __name__ == "__main__":
    print("written:", ", ".join(_write_missing()) or "none, all are there")
    sys.exit(0)
