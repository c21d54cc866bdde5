"""The folder of an exported client: what `mantis export` writes and `mantis_lite` opens.

    manifest.json   what the client is, and size and SHA-256 of the other files
    look.onnx       an image to detections and features
    code.onnx       features, request and rate level to a latent
    tables.npz      coding tables, integers
    code-1.onnx     the same as code.onnx for the first extension, and so on
    tables-1.npz    its coding tables
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
"""The files whose hashes the manifest holds, beside those of extensions."""
MOST_EXTENSIONS = 64

Precision: TypeAlias = Literal["float32", "int8"]


def numbered(name: str, number: int) -> str:
    """The file of an extension, counted from 1, in place of the file `name`; 0 is that itself."""
    stem, _, suffix = name.partition(".")
    return f"{stem}-{number}.{suffix}" if number else name


def checked(extensions: int) -> tuple[str, ...]:
    """The files whose hashes the manifest of a client with so many extensions holds."""
    own = (numbered(name, n + 1) for n in range(extensions) for name in (CODE, TABLES))
    return (*CHECKED, *own)


@dataclass(frozen=True)
class Part:
    """What streams of one id are: those of a client's own tasks, or of an extension's."""

    facts: ClientFacts
    stream: StreamSpec
    prior: Prior
    contexts: int

    def to_json(self) -> dict[str, Any]:
        """What `read_manifest` reads."""
        own = {each.name: getattr(self, each.name) for each in fields(Part)}
        stream = asdict(self.stream) | {"model_id": self.stream.model_id.hex()}
        return own | {"facts": self.facts.to_json(), "stream": stream}


@dataclass(frozen=True)
class Manifest(Part):
    """What an exported client is. `made_with` are versions of packages, for people.

    `extensions` are its tasks with streams of their own.
    """

    mask_threshold: float
    precision: Precision
    model_id: str
    made_with: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    """Size in bytes and SHA-256 of each file that `checked` names."""
    extensions: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The client's own streams, and those of each extension."""
        return (self, *self.extensions)

    def to_json(self) -> dict[str, Any]:
        """What `read_manifest` reads. Without extensions it is as releases of before read it."""
        own = {each.name: getattr(self, each.name) for each in fields(self)} | super().to_json()
        files = {
            name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()
        }
        del own["extensions"]
        extended = [Part.to_json(each) for each in self.extensions]
        head = {"format": FORMAT, "version": VERSION}
        more = {"extensions": extended} if extended else {}
        return head | own | {"files": files} | more


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
        own_part = _part(data)
        files = {
            str(name): (int(own["bytes"]), str(own["sha256"]))
            for name, own in data["files"].items()
        }
        found_manifest = Manifest(
            own_part.facts,
            own_part.stream,
            own_part.prior,
            own_part.contexts,
            float(data["mask_threshold"]),
            data["precision"],
            str(data["model_id"]),
            dict(data["made_with"]),
            files,
            tuple(_part(each) for each in data.get("extensions", ())),
        )
        _check(found_manifest)
        return found_manifest
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ModelError(f"{path} describes no client of this version: {error}") from None


def _part(data: Mapping[str, Any]) -> Part:
    stream = dict(data["stream"])
    stream["model_id"] = bytes.fromhex(stream["model_id"])
    stream["input_shape"] = tuple(stream["input_shape"])
    stream["labels"] = tuple(stream["labels"])
    stream["confidence"] = tuple(tuple(row) for row in stream["confidence"])
    facts = facts_from(data["facts"])
    return Part(facts, StreamSpec(**stream), data["prior"], int(data["contexts"]))


def _check(manifest: Manifest) -> None:
    """ValueError for facts that do not fit each other."""
    if manifest.precision not in get_args(Precision):
        raise ValueError(f"precision is {manifest.precision!r}, not {get_args(Precision)}")
    if not 0 <= manifest.mask_threshold <= 1:
        raise ValueError(f"threshold {manifest.mask_threshold}")
    if len(manifest.extensions) > MOST_EXTENSIONS:
        raise ValueError(f"{len(manifest.extensions)} extensions, over {MOST_EXTENSIONS}")
    for part in manifest.parts:
        facts, stream = part.facts, part.stream
        if part.contexts not in (1, CONTEXTS):
            raise ValueError(f"contexts {part.contexts}")
        if part.prior not in get_args(Prior):
            raise ValueError(f"prior is {part.prior!r}, not one of {get_args(Prior)}")
        ours = (len(facts.tasks), facts.image_size, facts.labels, facts.rate_levels)
        theirs = (stream.num_tasks, stream.input_shape, stream.labels, stream.rate_levels)
        if ours != theirs:
            raise ValueError(f"the facts are {ours}, and streams have {theirs}")


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes `manifest.json`; the last file of an export, so that an unfinished one has none."""
    text = json.dumps(manifest.to_json(), indent=1) + "\n"
    (Path(folder) / MANIFEST).write_text(text, encoding="utf-8")


def hashes(folder: str | Path, extensions: int = 0) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file that `checked` names; ModelError for one that lacks."""
    found = {}
    for name in checked(extensions):
        try:
            data = (Path(folder) / name).read_bytes()
        except OSError as error:
            raise ModelError(f"{folder}: {name} cannot be read: {error}; export again") from None
        found[name] = (len(data), hashlib.sha256(data).hexdigest())
    return found


def check_files(folder: str | Path, manifest: Manifest) -> None:
    """ModelError unless every file is the one that the manifest names."""
    for name, own in hashes(folder, len(manifest.extensions)).items():
        if manifest.files.get(name) != own:
            raise ModelError(
                f"{folder}: {name} is not the file of this export ({own[0]} bytes, damaged or cut "
                "short): copy the folder again"
            )


def write_tables(folder: str | Path, tables: TableSet, number: int = 0) -> None:
    """Writes the tables of the client's own streams, or of those of extension `number`."""
    counts = pack_counts(tables.cdf, tables.lengths)
    with (Path(folder) / numbered(TABLES, number)).open("wb") as file:
        np.savez(file, counts=counts, offsets=tables.offsets, lengths=tables.lengths)


def read_tables(folder: str | Path, manifest: Manifest, number: int = 0) -> TableSet:
    """What `write_tables` wrote; ModelError where it is none, or not of this manifest."""
    part = manifest.parts[number]
    facts, stream = part.facts, part.stream
    try:
        with np.load(Path(folder) / numbered(TABLES, number), allow_pickle=False) as found:
            counts, offsets, lengths = found["counts"], found["offsets"], found["lengths"]
        if len(lengths) != stream.latent_channels:
            raise ValueError(f"tables of {len(lengths)} channels, not {stream.latent_channels}")
        rows = prior_rows(part.prior, len(facts.tasks))
        cdf = unpack_counts(counts, lengths, rows * facts.rate_levels, part.contexts)
        return TableSet(part.prior, cdf, offsets, lengths, facts.rate_levels)
    except (BadZipFile, EOFError, KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(f"{folder} holds no coding tables: {error}") from None
