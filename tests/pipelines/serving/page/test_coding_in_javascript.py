"""The page's coder writes the bytes that `write_stream` does."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from mantis_core.bitstream.coder import TOTAL, Ints, RangeWriter, TableSet, to_symbols
from mantis_core.bitstream.container import CONFIDENCE_LEVELS, CONFIDENCE_ROWS, StreamSpec
from mantis_core.bitstream.entropy import stream
from mantis_core.bitstream.task_field import TaskField, quantise_log2
from mantis_core.bitstream.wire import CodedImage, write_stream
from mantis_core.device.export import TABLES, write_tables
from mantis_core.symbols import CONTEXTS, Prior, prior_rows
from tests.pipelines.serving.page.node import run_node

Random = np.random.Generator
SCRIPT = "coding.mjs"
MODELS, IMAGES = 60, 5
REACHES = (1.0, 4.0, 300.0, 3e6)  # of latents: within the tables, beyond, beyond any symbol


def base64_of(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def random_counts(random: Random, tables: int, length: int, total: int = TOTAL) -> Ints:
    """Counts (tables, length) of at least 1 that sum to `total`, some of them very uneven."""
    spread = random.choice([0.05, 1.0, 20.0])
    shares = random.dirichlet(np.full(length, spread), tables)
    counts: Ints = 1 + np.floor(shares * (total - length)).astype(np.int32)
    counts[:, random.integers(length)] += total - counts.sum(axis=1, dtype=np.int32)
    return counts


def random_tables(random: Random, prior: Prior, tasks: int, levels: int, contexts: int) -> TableSet:
    channels = int(random.integers(1, 5))
    lengths = random.integers(2, 14, channels).astype(np.int32)
    rows = prior_rows(prior, tasks) * levels
    cdf = np.full((rows, channels, contexts, lengths.max() + 1), TOTAL, np.int32)
    cdf[..., 0] = 0
    for channel, length in enumerate(lengths):
        counts = random_counts(random, rows * contexts, int(length))
        ends = counts.cumsum(axis=1).reshape(rows, contexts, length)
        cdf[:, channel, :, 1 : length + 1] = ends
    offsets = random.integers(-9, 5, channels).astype(np.int32)
    return TableSet(prior, cdf.reshape(rows, -1, cdf.shape[-1]), offsets, lengths, levels)


def random_spec(random: Random, tasks: int, levels: int, channels: int) -> StreamSpec:
    version = 2 if levels > 1 else int(random.integers(1, 3))
    labels: tuple[int, ...] = ()
    confidence: tuple[tuple[int, ...], ...] = ()
    if random.random() < 0.7:
        labels = tuple(random.choice([0, 1, 2, 10, 1000], tasks).tolist())
        if version == 2 and random.random() < 0.7:
            counts = random_counts(random, CONFIDENCE_ROWS, CONFIDENCE_LEVELS)
            confidence = tuple(map(tuple, counts.tolist()))
    height, width = random.integers(1, 60, 2).tolist()
    return StreamSpec(
        model_id=random.bytes(4),
        num_tasks=tasks,
        input_shape=(height, width),
        latent_channels=channels,
        stride=int(random.choice([4, 8])),
        labels=labels,
        version=version,
        rate_levels=levels,
        confidence=confidence,
    )


def random_image(random: Random, spec: StreamSpec) -> tuple[CodedImage, NDArray[np.float32]]:
    """An image, and the latent that its symbols are rounded from."""
    mask = random.random(spec.num_tasks) < random.choice([0.1, 0.5, 1.0])
    primary = int(random.integers(spec.num_tasks))
    mask[primary] = True
    sent = None
    if random.random() < 0.5:
        first = int(random.choice([0, 3, 14, 15]))
        others = random.integers(first, 16, int(mask.sum()))
        others[mask[:primary].sum()] = first
        sent = tuple(others.tolist())
    label, confidence = None, None
    if spec.confidence and spec.labels[primary] and random.random() < 0.8:
        label = int(random.integers(spec.labels[primary]))
        confidence = int(random.integers(CONFIDENCE_LEVELS))
    reach = random.choice(REACHES, p=[0.4, 0.4, 0.1, 0.1])
    shape = spec.latent_shape(spec.input_shape)
    latent = np.float32(reach) * random.standard_normal(shape, np.float32)
    latent.reshape(-1)[::3] = np.rint(2 * latent.reshape(-1)[::3]) / 2  # halves among them
    return (
        CodedImage(
            TaskField(tuple(mask.tolist()), primary, sent),
            to_symbols(latent),
            label,
            confidence,
            rate_level=int(random.integers(spec.rate_levels)),
        ),
        latent,
    )


def for_javascript(image: CodedImage, latent: NDArray[np.float32]) -> dict[str, Any]:
    return {
        "mask": image.tasks.mask,
        "primary": image.tasks.primary,
        "levels": image.tasks.levels,
        "label": image.label,
        "confidence": image.confidence,
        "rateLevel": image.rate_level,
        "latent": base64_of(latent),
    }


def case_of(tables: TableSet, spec: StreamSpec, images: list[Any], npz: bytes) -> dict[str, Any]:
    about = {
        "prior": tables.prior,
        "contexts": tables.cdf.shape[1] // len(tables.lengths),
        "tasks": spec.num_tasks,
        "levels": spec.rate_levels,
        "channels": spec.latent_channels,
    }
    return {
        "kind": "stream",
        "npz": base64.b64encode(npz).decode(),
        "about": about,
        "spec": asdict(spec) | {"model_id": spec.model_id.hex()},
        "images": [for_javascript(*image) for image in images],
    }


class Model:
    """Random tables, and images to be coded by them."""

    def __init__(self, seed: int, folder: Path) -> None:
        random = np.random.default_rng(seed)
        prior = get_args(Prior)[seed % len(get_args(Prior))]
        tasks, levels = int(random.integers(1, 13)), int(random.choice([1, 2, 7]))
        contexts = CONTEXTS if random.random() < 0.5 else 1
        self.tables = random_tables(random, prior, tasks, levels, contexts)
        self.spec = random_spec(random, tasks, levels, len(self.tables.lengths))
        self.images = [random_image(random, self.spec) for _ in range(IMAGES)]
        write_tables(folder, self.tables)
        self.npz = (folder / TABLES).read_bytes()

    def case(self) -> dict[str, Any]:
        return case_of(self.tables, self.spec, self.images, self.npz)

    def streams(self) -> list[str]:
        shape = self.spec.input_shape
        return [
            write_stream([image], shape, self.tables, self.spec).data.hex()
            for image, _ in self.images
        ]


def test_streams_are_those_of_python(tmp_path: Path) -> None:
    models = [Model(seed, tmp_path) for seed in range(MODELS)]
    found = run_node(SCRIPT, [model.case() for model in models], tmp_path)
    for seed, (model, streams) in enumerate(zip(models, found, strict=True)):
        assert streams == model.streams(), f"model {seed}"


def test_the_cases_hold_what_they_are_to_test(tmp_path: Path) -> None:
    models = [Model(seed, tmp_path) for seed in range(MODELS)]
    images = [(model, image) for model in models for image, _ in model.images]
    assert {model.spec.num_tasks for model in models} == set(range(1, 13))
    assert {model.spec.version for model in models} == {1, 2}
    priors = {(model.tables.prior, model.case()["about"]["contexts"]) for model in models}
    assert priors == {(prior, contexts) for prior in get_args(Prior) for contexts in (1, CONTEXTS)}
    assert {image.tasks.levels is None for _, image in images} == {False, True}
    assert {image.confidence for _, image in images} == {None, *range(CONFIDENCE_LEVELS)}
    assert sum(model.spec.rate_levels > 1 for model in models) > 10
    assert sum(np.abs(image.map).max() > 1000 for _, image in images) > 10


def straddling(count: int, length: int) -> list[list[int]]:
    """Numbers of `count`, `length` of them, whose interval holds the middle of the whole one.

    The coder gives out words of ones meanwhile, and the next number may carry through them all.
    """
    each = (1 << 24) // count
    low, width, middle = 0, (1 << 64) - 1, 1 << 63
    values = []
    for _ in range(length):
        scale = width >> 24
        value = min(count - 1, (middle - low) // scale // each)
        low += scale * value * each
        width = scale * (each if value < count - 1 else (1 << 24) - value * each)
        if width < 1 << 32:
            low, width, middle = low << 32, width << 32, middle << 32
        values.append([value, count])
    return values


def test_carries_run_through_words_that_were_given_out(tmp_path: Path) -> None:
    rows = [
        [*straddling(count, length), [last, count]]
        for count in (3, 5, 7, 1000)
        for length in range(0, 90, 3)
        for last in (0, count - 1)
    ]
    found = run_node(SCRIPT, [{"kind": "numbers", "values": row} for row in rows], tmp_path)
    for row, coded in zip(rows, found, strict=True):
        writer = RangeWriter()
        for value, count in row:
            writer.put(value, stream.model.Uniform(count))
        assert coded == writer.close().hex()
    assert any(coded.startswith("8" + "0" * 31) for coded in found)


def test_levels_are_those_of_python_also_beside_their_bounds(tmp_path: Path) -> None:
    bounds = np.float32(2) ** np.arange(0.25, -8, -0.25, dtype=np.float32)
    near = np.concatenate([bounds, np.nextafter(bounds, 0), np.nextafter(bounds, 2), [0, 1e-30]])
    probabilities = near.astype(np.float32)
    case = {"kind": "levels", "probabilities": base64_of(probabilities)}
    (found,) = run_node(SCRIPT, [case], tmp_path)
    assert found == [quantise_log2(float(probability)) for probability in probabilities]


def test_latents_are_rounded_half_to_even_and_clamped(tmp_path: Path) -> None:
    latent = np.array([0.5, 1.5, -0.5, -1.5, 2.5, -2.5, 0.49999997, 1e9, -1e9, -0.0], np.float32)
    lost = np.array([1, np.nan], np.float32)
    cases = [{"kind": "symbols", "latent": base64_of(each)} for each in (latent, lost)]
    found, refused = run_node(SCRIPT, cases, tmp_path)
    assert found == to_symbols(latent).tolist()
    assert refused.startswith("Error: the latent holds NaN")


def test_the_checksum_is_that_of_zlib(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    texts = [random.bytes(length) for length in (0, 1, 9, 1000)]
    found = run_node(SCRIPT, [{"kind": "checksum", "bytes": t.hex()} for t in texts], tmp_path)
    assert found == [zlib.crc32(text) for text in texts]


def inactive(model: Model) -> int | None:
    """A task that the first image of a model has not."""
    mask = model.images[0][0].tasks.mask
    return None if all(mask) else mask.index(False)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is said of files and images that are none of a model's, by the name of a case."""
    folder = tmp_path_factory.mktemp("refusals")
    model = next(m for m in (Model(seed, folder) for seed in range(9)) if inactive(m) is not None)
    good, (image, latent) = model.case(), model.images[0]
    flipped = bytearray(model.npz)
    flipped[len(flipped) // 3] ^= 1
    np.savez_compressed(folder / "packed.npz", counts=np.zeros(9, np.uint8))
    np.savez(folder / "floats.npz", counts=np.zeros(9))
    np.savez(folder / "few.npz", counts=np.zeros(9, np.uint8))
    files = {name: (folder / f"{name}.npz").read_bytes() for name in ("packed", "floats", "few")}
    files |= {"flipped": bytes(flipped), "short": model.npz[:-9], "empty": b""}
    cases = {name: good | {"npz": base64.b64encode(data).decode()} for name, data in files.items()}
    about = {"channels": 99, "levels": model.spec.rate_levels + 1, "prior": "mine"}
    cases |= {name: good | {"about": good["about"] | {name: about[name]}} for name in about}
    other = for_javascript(image, latent) | {"primary": inactive(model)}
    cases["primary"] = good | {"images": [other]}
    cases["size"] = good | {"images": [for_javascript(image, latent[:, :1, :1])]}
    said = replace(image, label=0, confidence=99)
    cases["confidence"] = good | {"images": [for_javascript(said, latent)]}
    cases["long"] = good | {"spec": good["spec"] | {"max_stream_bytes": 12}}
    found = run_node(SCRIPT, list(cases.values()), folder)
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("packed", "counts.npy is packed"),
        ("floats", "counts.npy is no row of uint8 or int32"),
        ("few", "it has no counts, offsets and lengths"),
        ("flipped", "tables.npz holds no coding tables"),
        ("short", "it is no zip file"),
        ("empty", "it is no zip file"),
        ("channels", "of 99 channels"),
        ("levels", "the packed tables are not of this model"),
        ("prior", "prior is mine"),
        ("primary", "is not among the active tasks"),
        ("size", "symbols, must be"),
        ("confidence", "this model sends no such answer"),
        ("long", "bytes is over 12"),
    ],
)
def test_what_is_none_of_the_models_is_refused(
    case: str, said: str, refusals: dict[str, str]
) -> None:
    assert refusals[case].startswith("Error: "), json.dumps(refusals[case])
    assert said in refusals[case]
