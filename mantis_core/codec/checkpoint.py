"""A codec in its model folder: the whole of it, or one half alone. Knows no training.

The folder of a half holds the tensors of that half under the names they have in the whole, and
meta.json says which half it is. Coding tables are packed, and so are weights in the folder of a
client that float16 holds exactly; folders of earlier versions hold them as they are in memory, and
are read too. `folders.py` writes and reads the files.

A loader imports what it loads: a client needs no torchvision, neither half needs compressai.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.packed_tables import pack_counts, unpack_counts
from mantis_core.codec.packed_weights import pack_weights, unpack_weights
from mantis_core.codec.spec import Ids, ModelSpec
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder, save_folder
from mantis_core.symbols import CONTEXTS, prior_rows

if TYPE_CHECKING:
    from mantis_core.codec.client_codec import ClientCodec
    from mantis_core.codec.mantis import Mantis
    from mantis_core.codec.server_codec import ServerCodec


Half: TypeAlias = Literal["client", "server"]

# Fields of the config that earlier versions saved, with the value at which they had no effect;
# None: never alone. All of them shaped the summary of the whole image, which saved no bits at equal
# accuracy and is gone.
RETIRED = {
    ("encoder", "summary_channels"): 0,
    ("encoder", "summary_hidden"): None,
    ("decoder", "summary_hidden"): None,
}

_CLIENT = "client."
_TABLES = "bottleneck.table_"
_CDF, _PACKED = _TABLES + "cdf", _TABLES + "counts"
_THRESHOLD = "mask_threshold"
_COUNTS, _FUSION = "answer_counts", "fusion."
_OF_HALF: dict[Half, tuple[str, ...]] = {
    "client": (_CLIENT, _TABLES, _THRESHOLD, _COUNTS),
    "server": ("server.", _TABLES, _FUSION, _COUNTS),
}


def save_model(folder: str | Path, model: Mantis, meta: Mapping[str, Any]) -> None:
    """Writes a finished codec as a model folder; RuntimeError if it has no tables yet.

    meta.json also holds the ids of model and streams, and what the client costs
    (ClientCodec.describe).
    """
    client = model.client_codec()
    ids = {"model_id": client.ids.model.hex(), "stream_id": client.ids.stream.hex()}
    record = {**meta, **ids, "client": client.describe()}
    save_folder(folder, _packed(model.state_dict()), model.spec.model_dump(mode="json"), record)


def save_half(folder: str | Path, whole: str | Path, half: Half) -> None:
    """Writes one half of the codec in the model folder `whole` as a folder of its own."""
    tensors, config, meta = load_folder(whole, wanted=_OF_HALF[half])
    _require_half(whole, meta, half)
    weights = pack_weights(_part(tensors, _CLIENT))
    others = {name: t for name, t in tensors.items() if not name.startswith(_CLIENT)}
    tensors = {**others, **{_CLIENT + name: weight for name, weight in weights.items()}}
    save_folder(folder, _packed(tensors), config, {**meta, "half": half})


def load_model(folder: str | Path) -> Mantis:
    """The codec in a model folder, in eval mode on CPU. Raises ModelError if it is none."""
    from mantis_core.codec.mantis import Mantis

    tensors, config, meta = load_folder(folder)
    if "half" in meta:
        raise ModelError(f"{folder} holds the {meta['half']} alone, this needs the whole codec")
    spec = _spec(folder, config)
    model = Mantis(spec)
    try:
        model.load_state_dict(_unpacked(tensors, spec))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: weights and config do not fit: {error}") from None
    model.eval()
    saved = meta.get("stream_id", meta.get("model_id")), meta.get("model_id")
    if tuple(id.hex() for id in model.ids()) != saved:
        raise ModelError(f"{folder} holds another model than the one it was saved as")
    return model


def read_spec(config: Any) -> ModelSpec:
    """The spec in a folder's config, of this version or of an earlier one without its summary.

    Raises ValueError for a config of something else, ModelError for a model that sends a summary.
    """
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        return ModelSpec.model_validate(config)
    model = dict(model)
    for (section, field), off in RETIRED.items():
        own = model.get(section)
        if not isinstance(own, dict) or field not in own:
            continue
        if off is not None and own[field] != off:
            raise ModelError(
                "this model sends a summary, which this version no longer decodes; train it again "
                f"without model.{section}.{field}, or use the version that trained it"
            )
        model[section] = {name: value for name, value in own.items() if name != field}
    return ModelSpec.model_validate({**config, "model": model})


def load_client(folder: str | Path) -> ClientCodec:
    """The client half in the folder of a codec or of its client, reading no weight of the server.

    On CPU, in eval mode. Raises ModelError if there is none.
    """
    from mantis_core.codec.client_codec import ClientCodec
    from mantis_core.networks.client import Client

    tensors, spec, ids = _load_half(folder, "client")
    members = spec.class_members()
    client = Client(
        spec.model,
        len(spec.tasks),
        members,
        num_rates=spec.num_rates,
        labels=spec.exit_labels(),
    )
    _load_part(folder, client, _part(tensors, _CLIENT))
    return ClientCodec(
        spec,
        client.eval(),
        _tables(folder, spec, tensors),
        tensors[_THRESHOLD],
        ids,
        answer_counts=_answer_counts(folder, spec, tensors),
    )


def load_server(folder: str | Path) -> ServerCodec:
    """The server half in the folder of a codec or of its server, reading no weight of the client.

    On CPU, in eval mode. Raises ModelError if there is none.
    """
    from mantis_core.codec.own_answer import Fusion
    from mantis_core.codec.server_codec import ServerCodec, new_joint, new_server

    tensors, spec, ids = _load_half(folder, "server")
    server = new_server(spec)
    _load_part(folder, server, _part(tensors, "server."))
    tables = _tables(folder, spec, tensors)
    fusion = None
    if spec.sends_answer:
        fusion = Fusion(spec.num_rates).eval()
        _load_part(folder, fusion, _part(tensors, _FUSION))
    return ServerCodec(
        spec,
        server.eval(),
        new_joint(spec),
        tables,
        ids,
        fusion=fusion,
        answer_counts=_answer_counts(folder, spec, tensors),
    )


def _load_half(folder: str | Path, half: Half) -> tuple[dict[str, Tensor], ModelSpec, Ids]:
    tensors, config, meta = load_folder(folder, wanted=_OF_HALF[half])
    _require_half(folder, meta, half)
    spec = _spec(folder, config)
    missing = [name for name in (_THRESHOLD,) if half == "client" and name not in tensors]
    names = ("stream_id" if spec.stream_version > 1 else "model_id", "model_id")
    found = []
    for name in names:
        try:
            found.append(bytes.fromhex(str(meta[name])))
        except (KeyError, ValueError):
            missing.append(name)
    if missing:
        raise ModelError(f"{folder} is no codec: it lacks {' and '.join(dict.fromkeys(missing))}")
    return tensors, spec, Ids(*found)


def _answer_counts(
    folder: str | Path, spec: ModelSpec, tensors: Mapping[str, Tensor]
) -> Tensor | None:
    if not spec.sends_answer:
        return None
    if _COUNTS not in tensors:
        raise ModelError(f"{folder} is no codec that sends answers: it lacks {_COUNTS}")
    try:
        spec.stream_spec(bytes(4), tensors[_COUNTS])
    except ValueError as error:
        raise ModelError(f"{folder} holds no counts of confidence: {error}") from None
    return tensors[_COUNTS]


def _require_half(folder: str | Path, meta: Mapping[str, Any], half: Half) -> None:
    if meta.get("half", half) != half:
        raise ModelError(
            f"{folder} holds the {meta['half']} of a codec, this needs its {half}: "
            "a client encodes, a server decodes"
        )


def _spec(folder: str | Path, config: Any) -> ModelSpec:
    try:
        return read_spec(config)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        where = ".".join(str(step) for step in first["loc"]) or "the whole file"
        more = f", and {len(others)} more" if others else ""
        raise ModelError(
            f"{folder}/config.yaml describes no codec of this version ({where}: "
            f"{first['msg']}{more}); give the checkpoint folder of a stage 2"
        ) from None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _load_part(folder: str | Path, module: nn.Module, part: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(unpack_weights(part, module.state_dict()))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: weights and config do not fit: {error}") from None


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with packed tables, whichever form they have."""
    packed = dict(tensors)
    cdf = packed.pop(_CDF, None)
    if cdf is not None:
        lengths = packed[_TABLES + "lengths"].cpu().numpy()
        packed[_PACKED] = torch.from_numpy(pack_counts(cdf.cpu().numpy(), lengths))
    return packed


def _unpacked(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors with tables as the bottleneck holds them, whichever form they have.

    Raises ValueError for packed tables that are not of this model, KeyError where some lack.
    """
    unpacked = dict(tensors)
    packed = unpacked.pop(_PACKED, None)
    if packed is not None:
        lengths = unpacked[_TABLES + "lengths"].cpu().numpy()
        rows = prior_rows(spec.model.prior, len(spec.tasks))
        contexts = CONTEXTS if spec.model.neighbour_contexts else 1
        rows *= spec.rate_levels
        cdf = unpack_counts(packed.cpu().numpy(), lengths, rows, contexts)
        unpacked[_CDF] = torch.from_numpy(cdf)
    return unpacked


def _tables(folder: str | Path, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> TableSet:
    try:
        whole = _unpacked(tensors, spec)
        names = ("cdf", "offsets", "lengths")
        cdf, offsets, lengths = (whole[_TABLES + name].numpy() for name in names)
        return TableSet(spec.model.prior, cdf, offsets, lengths, spec.rate_levels)
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder} holds no coding tables: {error}") from None
