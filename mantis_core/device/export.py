"""The folder of an exported client: what `mantis export` writes and `mantis_lite` opens.

    manifest.json   what the client is, and size and SHA-256 of the other files
    look.onnx       an image to detections and features
    code.onnx       features, request and rate level to a latent
    tables.npz      coding tables, integers
    golden.json     images made by a rule, and the streams that they give
    README.md       for whoever has the device

Nothing in it is pickled. Shapes: K tasks, C latent channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from zipfile import BadZipFile

import numpy as np

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.container import StreamSpec
from mantis_core.bitstream.packed_tables import pack_counts, unpack_counts
from mantis_core.device.facts import ClientFacts, facts_from
from mantis_core.errors import ModelError
from mantis_core.symbols import CONTEXTS, Prior, prior_rows

FORMAT = "mantis-export"
VERSION = 1
MAX_JSON = 1 << 20
MANIFEST, LOOK, CODE, TABLES, GOLDEN = (
    "manifest.json",
    "look.onnx",
    "code.onnx",
    "tables.npz",
    "golden.json",
)
README = "README.md"
CHECKED = (LOOK, CODE, TABLES, GOLDEN)
"""The files whose hashes the manifest holds."""

Precision: TypeAlias = Literal["float32", "int8"]


@dataclass(frozen=True)
class Manifest:
    """What an exported client is. `made_with` are versions of packages, for people."""

    facts: ClientFacts
    stream: StreamSpec
    prior: Prior
    contexts: int
    mask_threshold: float
    precision: Precision
    model_id: str
    made_with: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    """Size in bytes and SHA-256 of each of CHECKED."""

    def to_json(self) -> dict[str, Any]:
        """What `read_manifest` reads."""
        stream = asdict(self.stream) | {"model_id": self.stream.model_id.hex()}
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        files = {
            name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()
        }
        head = {"format": FORMAT, "version": VERSION}
        return head | own | {"facts": self.facts.to_json(), "stream": stream, "files": files}


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an exported client; ModelError where there is none of this version."""
    path = Path(folder) / MANIFEST
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it has over {MAX_JSON} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} holds no exported client: it has no {MANIFEST}. Give the folder that "
            "`mantis export` wrote."
        ) from None
    except (OSError, RecursionError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    found = (data.get("format"), data.get("version")) if isinstance(data, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ModelError(
            f"{path} has format {found[0]!r} version {found[1]!r}; this reads {FORMAT!r} version "
            f"{VERSION}: export the model with the same release"
        )
    try:
        stream = dict(data["stream"])
        stream["model_id"] = bytes.fromhex(stream["model_id"])
        stream["input_shape"] = tuple(stream["input_shape"])
        stream["labels"] = tuple(stream["labels"])
        stream["confidence"] = tuple(tuple(row) for row in stream["confidence"])
        files = {
            str(name): (int(own["bytes"]), str(own["sha256"]))
            for name, own in data["files"].items()
        }
        found_manifest = Manifest(
            facts_from(data["facts"]),
            StreamSpec(**stream),
            data["prior"],
            int(data["contexts"]),
            float(data["mask_threshold"]),
            data["precision"],
            str(data["model_id"]),
            dict(data["made_with"]),
            files,
        )
        _check(found_manifest)
        return found_manifest
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ModelError(f"{path} describes no client of this version: {error}") from None


def _check(manifest: Manifest) -> None:
    """ValueError for facts that do not fit each other."""
    facts, stream = manifest.facts, manifest.stream
    if manifest.precision not in get_args(Precision):
        raise ValueError(f"precision is {manifest.precision!r}, not {get_args(Precision)}")
    if not 0 <= manifest.mask_threshold <= 1 or manifest.contexts not in (1, CONTEXTS):
        raise ValueError(f"threshold {manifest.mask_threshold}, contexts {manifest.contexts}")
    if manifest.prior not in get_args(Prior):
        raise ValueError(f"prior is {manifest.prior!r}, not one of {get_args(Prior)}")
    ours = (len(facts.tasks), facts.image_size, facts.labels, facts.rate_levels)
    theirs = (stream.num_tasks, stream.input_shape, stream.labels, stream.rate_levels)
    if ours != theirs:
        raise ValueError(f"the facts are {ours}, and streams have {theirs}")


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes `manifest.json`; the last file of an export, so that an unfinished one has none."""
    text = json.dumps(manifest.to_json(), indent=1) + "\n"
    (Path(folder) / MANIFEST).write_text(text, encoding="utf-8")


def hashes(folder: str | Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each of CHECKED; ModelError for one that lacks."""
    found = {}
    for name in CHECKED:
        try:
            data = (Path(folder) / name).read_bytes()
        except OSError as error:
            raise ModelError(f"{folder}: {name} cannot be read: {error}; export again") from None
        found[name] = (len(data), hashlib.sha256(data).hexdigest())
    return found


def check_files(folder: str | Path, manifest: Manifest) -> None:
    """ModelError unless every file is the one that the manifest names."""
    for name, own in hashes(folder).items():
        if manifest.files.get(name) != own:
            raise ModelError(
                f"{folder}: {name} is not the file of this export ({own[0]} bytes, damaged or cut "
                "short): copy the folder again"
            )


def write_tables(folder: str | Path, tables: TableSet) -> None:
    """Writes `tables.npz`."""
    counts = pack_counts(tables.cdf, tables.lengths)
    with (Path(folder) / TABLES).open("wb") as file:
        np.savez(file, counts=counts, offsets=tables.offsets, lengths=tables.lengths)


def read_tables(folder: str | Path, manifest: Manifest) -> TableSet:
    """The tables of an export; ModelError where they are none, or not of this manifest."""
    facts, stream = manifest.facts, manifest.stream
    try:
        with np.load(Path(folder) / TABLES, allow_pickle=False) as found:
            counts, offsets, lengths = found["counts"], found["offsets"], found["lengths"]
        if len(lengths) != stream.latent_channels:
            raise ValueError(f"tables of {len(lengths)} channels, not {stream.latent_channels}")
        rows = prior_rows(manifest.prior, len(facts.tasks))
        cdf = unpack_counts(counts, lengths, rows * facts.rate_levels, manifest.contexts)
        return TableSet(manifest.prior, cdf, offsets, lengths, facts.rate_levels)
    except (BadZipFile, EOFError, KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(f"{folder} holds no coding tables: {error}") from None
