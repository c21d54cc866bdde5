"""Model folders and resumable training state on disk: safetensors and text, nothing pickled.

A folder holds weights.safetensors, config.yaml and meta.json (with the weights' sha256, written
last); a resumable one adds training_state.safetensors and training_state.json. The folder of one
half of a codec holds that half's tensors under the names they have in the whole, and says so in
meta.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mantis_core.coder import TableSet
from mantis_core.errors import ModelError
from mantis_core.spec import ModelSpec

# A loader imports what it loads: a client needs no torchvision, neither half needs compressai.
if TYPE_CHECKING:
    from mantis_core.client_codec import ClientCodec
    from mantis_core.model import Mantis
    from mantis_core.server_codec import ServerCodec

Half: TypeAlias = Literal["client", "server"]

FORMAT_VERSION = 1
MAX_CHECKPOINT_BYTES = 8 * 2**30
"""A folder that claims more is refused before anything is allocated."""

_TABLES = "bottleneck.table_"
_THRESHOLD = "mask_threshold"
_OF_HALF: dict[Half, tuple[str, ...]] = {
    "client": ("client.", _TABLES, _THRESHOLD),
    "server": ("server.", _TABLES),
}


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
    _write_text(folder / "meta.json", json.dumps(record, indent=1))


def load_folder(
    folder: str | Path, *, wanted: tuple[str, ...] = ("",)
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config and meta of a model folder; of the tensors those that start with `wanted`.

    Raises ModelError if it is not one, is incomplete, or its weights are not those it was saved
    with.
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


def save_model(folder: str | Path, model: Mantis, meta: Mapping[str, Any]) -> None:
    """A finished codec as a model folder; RuntimeError if it has no tables yet.

    meta.json also tells the model id and what the client costs (ClientCodec.describe).
    """
    client = model.client_codec()
    record = {**meta, "model_id": client.model_id.hex(), "client": client.describe()}
    save_folder(folder, model.state_dict(), model.spec.model_dump(mode="json"), record)


def save_half(folder: str | Path, whole: str | Path, half: Half) -> None:
    """One half of the codec in the model folder `whole` as a folder of its own."""
    tensors, config, meta = load_folder(whole, wanted=_OF_HALF[half])
    _require_half(whole, meta, half)
    save_folder(folder, tensors, config, {**meta, "half": half})


def load_model(folder: str | Path) -> Mantis:
    """The codec in a model folder, in eval mode on CPU. Raises ModelError if it is none."""
    from mantis_core.model import Mantis

    tensors, config, meta = load_folder(folder)
    if "half" in meta:
        raise ModelError(f"{folder} holds the {meta['half']} alone, this needs the whole codec")
    spec = _spec(folder, config)
    model = Mantis(spec)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"{folder}: weights and config do not fit: {error}") from None
    model.eval()
    if model.model_id().hex() != meta.get("model_id"):
        raise ModelError(f"{folder} holds another model than the one it was saved as")
    return model


def load_client(folder: str | Path) -> ClientCodec:
    """The client half in the folder of a codec or of its client, reading no weight of the server.

    On CPU, in eval mode. Raises ModelError if there is none.
    """
    from mantis_core.client import Client
    from mantis_core.client_codec import ClientCodec

    tensors, spec, model_id = _load_half(folder, "client")
    client = Client(spec.model, len(spec.tasks), spec.class_members())
    _load_part(folder, client, tensors, "client.")
    return ClientCodec(
        spec, client.eval(), _tables(folder, spec, tensors), tensors[_THRESHOLD], model_id
    )


def load_server(folder: str | Path) -> ServerCodec:
    """The server half in the folder of a codec or of its server, reading no weight of the client.

    On CPU, in eval mode. Raises ModelError if there is none.
    """
    from mantis_core.server_codec import ServerCodec, new_joint, new_server

    tensors, spec, model_id = _load_half(folder, "server")
    server = new_server(spec)
    _load_part(folder, server, tensors, "server.")
    tables = _tables(folder, spec, tensors)
    return ServerCodec(spec, server.eval(), new_joint(spec), tables, model_id)


def save_training_state(
    folder: str | Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """A session's state beside whatever else is in the folder; the json is written last."""
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


def _load_half(folder: str | Path, half: Half) -> tuple[dict[str, Tensor], ModelSpec, bytes]:
    tensors, config, meta = load_folder(folder, wanted=_OF_HALF[half])
    _require_half(folder, meta, half)
    missing = [name for name in (_THRESHOLD,) if half == "client" and name not in tensors]
    try:
        model_id = bytes.fromhex(str(meta["model_id"]))
    except (KeyError, ValueError):
        missing.append("model_id")
    if missing:
        raise ModelError(f"{folder} is no codec: it lacks {' and '.join(missing)}")
    return tensors, _spec(folder, config), model_id


def _require_half(folder: str | Path, meta: Mapping[str, Any], half: Half) -> None:
    if meta.get("half", half) != half:
        raise ModelError(
            f"{folder} holds the {meta['half']} of a codec, this needs its {half}: "
            "a client encodes, a server decodes"
        )


def _spec(folder: str | Path, config: Any) -> ModelSpec:
    try:
        return ModelSpec.model_validate(config)
    except ValueError as error:
        raise ModelError(f"{folder}/config.yaml describes no codec: {error}") from None


def _load_part(
    folder: str | Path, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(part)
    except RuntimeError as error:
        raise ModelError(f"{folder}: weights and config do not fit: {error}") from None


def _tables(folder: str | Path, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> TableSet:
    try:
        cdf, offsets, lengths = (
            tensors[_TABLES + name].numpy() for name in ("cdf", "offsets", "lengths")
        )
        return TableSet(spec.model.prior, cdf, offsets, lengths)
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder} holds no coding tables: {error}") from None


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
