"""Model folders and resumable training state on disk: safetensors and text, nothing pickled.

A model folder holds weights.safetensors, config.yaml and meta.json (with the weights' sha256,
written last). Training state is training_state.safetensors and training_state.json. Knows no codec:
what the tensors and the config mean is for the caller to say.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mantis_core.errors import ModelError

FORMAT_VERSION = 1
MAX_CHECKPOINT_BYTES = 8 * 2**30
"""A folder that claims more is refused before anything is allocated."""


def save_folder(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    """Writes weights, config and, last, meta.json with the weights' sha256."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    _save_tensors(weights, tensors)
    _write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    record = {"format_version": FORMAT_VERSION, **meta, "weights_sha256": sha256_file(weights)}
    _write_text(folder / "meta.json", json.dumps(record, indent=1, allow_nan=False))


def load_folder(
    folder: str | Path, *, wanted: tuple[str, ...] = ("",)
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config and meta of a model folder; only tensors whose names start with `wanted`.

    Raises ModelError if it is no model folder, if it is incomplete, or if its weights are not those
    it was saved with.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    weights = folder / "weights.safetensors"
    if not weights.is_file() or not (folder / "config.yaml").is_file():
        raise ModelError(f"{folder} lacks weights.safetensors or config.yaml: it is incomplete")
    if weights.stat().st_size > MAX_CHECKPOINT_BYTES:
        raise ModelError(f"{weights} is larger than {MAX_CHECKPOINT_BYTES} bytes: refused")
    if sha256_file(weights) != meta.get("weights_sha256"):
        raise ModelError(f"{weights} is not the file that was saved (sha256): damaged or exchanged")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        with safe_open(weights, "pt") as file:
            names = [name for name in file.keys() if name.startswith(wanted)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None
    return tensors, config, meta


def read_meta(folder: str | Path) -> dict[str, Any]:
    """meta.json of a model folder; ModelError if there is none of this format."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ModelError(f"{folder} is no model folder: it has no meta.json")
    return _read_record(path)


def save_training_state(
    folder: str | Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Writes the state of a session into `folder`, which may hold other files; the json last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training_state.safetensors"
    _save_tensors(path, tensors)
    full = {"format_version": FORMAT_VERSION, **record, "state_sha256": sha256_file(path)}
    _write_text(folder / "training_state.json", json.dumps(full))


def load_training_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_training_state` wrote. Raises ModelError if it is incomplete or damaged."""
    folder = Path(folder)
    path, text = folder / "training_state.safetensors", folder / "training_state.json"
    if not path.is_file() or not text.is_file():
        raise ModelError(f"{folder} holds no complete training state")
    record = _read_record(text)
    if record.get("state_sha256") != sha256_file(path):
        raise ModelError(f"{path} is not the file that was saved (sha256)")
    return load_file(path), record


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise ModelError(f"{path} is not of format {FORMAT_VERSION}, which this version reads")
    return record


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    temporary = path.with_name(path.name + ".part")
    save_file(plain, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
