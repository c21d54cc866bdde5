"""The patch of a client: what an extension adds to it, for clients at work that have not got it.

A patch is a folder of weights.safetensors, the client's own tensors and coding tables of the
extension, and patch.json, which says whose it is and what comes of it. Nothing in it is pickled. It
is applied offline, to a client's folder alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mantis_core.codec.adding import spec_with
from mantis_core.codec.checkpoint import (
    config_of,
    dense_client,
    half_of,
    load_client,
    packed_half,
    read_spec,
)
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import ExtensionSpec, extension_prefix
from mantis_core.errors import ModelError
from mantis_core.folders import save_folder, sha256_file

FOLDER = "patch"
"""Where the patch of a model's last extension lies in the model's folder."""
MANIFEST, WEIGHTS = "patch.json", "weights.safetensors"
FORMAT_VERSION = 1
_MOST_BYTES = 2**28


class Manifest(BaseModel):
    """patch.json: the client a patch is for, and the client and streams that come of it.

    `parent_sha256` is over all that the parent's own streams depend on, `child_sha256` over what
    those of the extension do; `parent_id` and `child_id` are the first 4 bytes, which streams
    carry. `model_id` names the model that the patch comes with, `weights_sha256` its file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    parent_id: str
    parent_sha256: str
    child_id: str
    child_sha256: str
    model_id: str
    extension: ExtensionSpec
    weights_sha256: str


def write_patch(folder: str | Path, codec: Mantis, number: int = -1) -> Path:
    """Writes the patch of an extension of a finished codec, by default the last one.

    Returns the folder. Raises ModelError for a codec without it.
    """
    spec, folder = codec.spec, Path(folder)
    if not -len(spec.extensions) <= number < len(spec.extensions):
        raise ModelError(
            f"this codec has {len(spec.extensions)} extensions, of the grades row and adapter: a "
            "patch is of one of them"
        )
    number %= len(spec.extensions)
    state, before = codec.state_dict(), extension_prefix(number)
    own = {
        name.removeprefix(before): tensor
        for name, tensor in packed_half(state, "client").items()
        if name.startswith(before)
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.contiguous() for name, tensor in own.items()})
    (folder / WEIGHTS).write_bytes(data)
    parent, child = spec.stream_digest(state), spec.extension_digest(state, number)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        parent_id=parent[:4].hex(),
        parent_sha256=parent.hex(),
        child_id=child[:4].hex(),
        child_sha256=child.hex(),
        model_id=codec.ids().model.hex(),
        extension=spec.extensions[number],
        weights_sha256=sha256_file(folder / WEIGHTS),
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return folder


def apply_patch(client: str | Path, patch: str | Path, target: str | Path) -> Manifest:
    """Writes the client in folder `client`, alone or in a whole codec, with a patch as `target`.

    `patch` is a patch's folder, or that of a model that has one. Raises ModelError for a patch that
    is damaged or of another client, for one that the client has already, and for a `target` that is
    there.
    """
    target = Path(target)
    if target.exists():
        raise ModelError(f"{target} is there already: name a new folder for the patched client")
    manifest, own = read_patch(patch)
    tensors, config, meta = half_of(client, "client")
    spec = read_spec(config)
    state = dense_client(client, tensors, spec)
    found = spec.stream_digest(state)
    if found.hex() != manifest.parent_sha256:
        raise ModelError(
            f"the patch {patch} is for the client of streams {manifest.parent_id}, and {client} "
            f"makes streams {found[:4].hex()}: patch that one, or make a patch for this one with "
            "mantis add-task"
        )
    number = len(spec.extensions)
    if any(spec.extension_digest(state, n).hex() == manifest.child_sha256 for n in range(number)):
        raise ModelError(f"{client} has this patch already, for {_tasks(manifest)}: nothing to do")
    patched = spec_with(spec, extensions=(*spec.extensions, manifest.extension))
    before = extension_prefix(number)
    tensors |= {before + name: tensor for name, tensor in own.items()}
    made = patched.extension_digest(dense_client(patch, tensors, patched), number)
    if made.hex() != manifest.child_sha256:
        raise ModelError(
            f"the patch {patch} is damaged: with it the client makes streams {made[:4].hex()}, and "
            f"{manifest.child_id} are promised; copy it again"
        )
    ids = [*meta.get("extension_ids", []), manifest.child_id]
    meta = {**meta, "model_id": manifest.model_id, "extension_ids": ids}
    save_folder(target, tensors, config_of(patched), meta)
    cost = load_client(target).describe()
    save_folder(target, tensors, config_of(patched), {**meta, "client": cost})
    return manifest


def read_patch(folder: str | Path) -> tuple[Manifest, dict[str, Tensor]]:
    """What a patch says and its tensors, by their names in the extension.

    Raises ModelError for a folder that is or has no patch, and for a damaged one.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() and (folder / FOLDER / MANIFEST).is_file():
        folder /= FOLDER
    path = folder / WEIGHTS
    if not (folder / MANIFEST).is_file() or not path.is_file():
        raise ModelError(
            f"{folder} is no patch: it lacks {MANIFEST} or {WEIGHTS}. Models that mantis add-task "
            f"made with --grade row or adapter hold one in {FOLDER}/"
        )
    if path.stat().st_size > _MOST_BYTES:
        raise ModelError(f"{path} has over {_MOST_BYTES:,} bytes: no patch is that large")
    damaged = f"{folder} holds a damaged patch, copy it again"
    try:
        told: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{damaged}: {error}") from None
    if isinstance(told, dict) and told.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{folder} is a patch of format {told.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}: use the version of MANTiS that wrote it, or a later one"
        )
    try:
        manifest = Manifest.model_validate(told)
        if sha256_file(path) != manifest.weights_sha256:
            raise ValueError(f"{path.name} is not the file that was written (sha256)")
        return manifest, load(path.read_bytes())
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{damaged}: {error}") from None


def _tasks(manifest: Manifest) -> str:
    return ", ".join(task.name for task in manifest.extension.tasks)
