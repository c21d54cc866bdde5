"""A codec in its model folder: the whole of it, or one half alone. Knows no training.

The folder of a half holds the tensors of that half under the names they have in the whole, and
meta.json says which half it is. Coding tables are packed, and so are weights in the folder of a
client that float16 holds exactly; folders of earlier versions hold them as they are in memory, and
are read too. `folders.py` writes and reads the files.

A loader imports what it loads: a client needs no torchvision, neither half needs compressai.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.packed_tables import pack_counts, unpack_counts
from mantis_core.codec.halves import (
    new_answers,
    new_client,
    new_client_extension,
    new_joint,
    new_server,
)
from mantis_core.codec.packed_weights import pack_weights, unpack_weights
from mantis_core.codec.spec import Ids, ModelSpec, extension_prefix
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
_EXTENSIONS = "extensions."
_OF_HALF: dict[Half, tuple[str, ...]] = {
    "client": (_CLIENT, _TABLES, _THRESHOLD, _COUNTS, _EXTENSIONS),
    "server": ("server.", _TABLES, _FUSION, _COUNTS, _EXTENSIONS),
}


def save_model(folder: str | Path, model: Mantis, meta: Mapping[str, Any]) -> None:
    """Writes a finished codec as a model folder; RuntimeError if it has no tables yet.

    meta.json also holds the ids of model and streams, and what the client costs
    (ClientCodec.describe).
    """
    client = model.client_codec()
    ids = {"model_id": client.ids.model.hex(), "stream_id": client.ids.stream.hex()}
    record = {**meta, **ids, "client": client.describe()}
    if extended := [own.ids.stream.hex() for own in client.extensions]:
        record["extension_ids"] = extended
    save_folder(folder, _packed(model.state_dict()), config_of(model.spec), record)


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """A spec as a model folder's config. Versions without extensions read it where it has none."""
    config = spec.model_dump(mode="json")
    if not spec.extensions:
        del config["extensions"]
    return config


def save_half(folder: str | Path, whole: str | Path, half: Half) -> None:
    """Writes one half of the codec in the model folder `whole` as a folder of its own."""
    tensors, config, meta = half_of(whole, half)
    save_folder(folder, tensors, config, meta)


def half_of(
    whole: str | Path, half: Half
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config and meta of a half's folder, of that of the codec or of the half itself."""
    tensors, config, meta = load_folder(whole, wanted=_OF_HALF[half])
    _require_half(whole, meta, half)
    return packed_half(tensors, half), config, {**meta, "half": half}


def packed_half(tensors: Mapping[str, Tensor], half: Half) -> dict[str, Tensor]:
    """The tensors of a half among those of a codec or of that half, as its folder holds them."""
    wanted = _OF_HALF[half]
    kept = {n: t for n, t in tensors.items() if n.startswith(wanted) and _is_of_half(n, half)}
    for prefix in dict.fromkeys(map(_client_prefix, kept)):
        if prefix:
            weights = pack_weights(_part(kept, prefix))
            kept = {name: t for name, t in kept.items() if not name.startswith(prefix)}
            kept |= {prefix + name: weight for name, weight in weights.items()}
    return _packed(kept)


def dense_client(
    folder: str | Path, tensors: Mapping[str, Tensor], spec: ModelSpec
) -> dict[str, Tensor]:
    """A client's tensors as the codec holds them in memory, from the form that its folder has.

    Raises ModelError, which names the folder, for tensors that are not those of such a client.
    """
    client = new_client(spec)
    likes: dict[str, nn.Module] = {_CLIENT: client}
    for number in range(len(spec.extensions)):
        own = new_client_extension(spec, number, client)
        likes[extension_prefix(number) + _CLIENT] = own
    try:
        dense = _unpacked(tensors, spec)
        for prefix, module in likes.items():
            weights = unpack_weights(_part(dense, prefix), module.state_dict())
            dense = {name: t for name, t in dense.items() if not name.startswith(prefix)}
            dense |= {prefix + name: weight for name, weight in weights.items()}
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: weights and config do not fit: {error}") from None
    return dense


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
    extended = [id.hex() for id in model.stream_ids()[1:]]
    if tuple(id.hex() for id in model.ids()) != saved or meta.get("extension_ids", []) != extended:
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
    from mantis_core.codec.client_codec import ClientCodec, extension_client

    tensors, spec, ids = _load_half(folder, "client")
    client = new_client(spec)
    _load_part(folder, client, _part(tensors, _CLIENT))
    codec = ClientCodec(
        spec,
        client.eval(),
        _tables(folder, spec, tensors),
        tensors[_THRESHOLD],
        ids[0],
        answer_counts=_answer_counts(folder, spec, tensors),
    )
    extended = []
    for number, own_ids in enumerate(ids[1:]):
        part = _part(tensors, extension_prefix(number))
        own = new_client_extension(spec, number, client)
        _load_part(folder, own, _part(part, _CLIENT))
        tables = _tables(folder, spec.extended(number), part)
        extended.append(extension_client(spec, number, client, own.eval(), tables, own_ids))
    codec.extend(extended)
    return codec


def load_server(folder: str | Path) -> ServerCodec:
    """The server half in the folder of a codec or of its server, reading no weight of the client.

    On CPU, in eval mode. Raises ModelError if there is none.
    """
    from mantis_core.codec.own_answer import Fusion
    from mantis_core.codec.server_codec import ServerCodec, extension_server

    tensors, spec, ids = _load_half(folder, "server")
    server = new_server(spec)
    _load_part(folder, server, _part(tensors, "server."))
    tables = _tables(folder, spec, tensors)
    fusion = None
    if spec.sends_answer:
        fusion = Fusion(spec.num_rates).eval()
        _load_part(folder, fusion, _part(tensors, _FUSION))
    extended = []
    for number, own_ids in enumerate(ids[1:]):
        part = _part(tensors, extension_prefix(number))
        own = new_answers(spec.extended(number))
        _load_part(folder, own, _part(part, "server."))
        own_tables = _tables(folder, spec.extended(number), part)
        extended.append(extension_server(spec, number, server, own.eval(), own_tables, own_ids))
    return ServerCodec(
        spec,
        server.eval(),
        new_joint(spec),
        tables,
        ids[0],
        fusion=fusion,
        answer_counts=_answer_counts(folder, spec, tensors),
        extensions=extended,
    )


def _load_half(
    folder: str | Path, half: Half
) -> tuple[dict[str, Tensor], ModelSpec, tuple[Ids, ...]]:
    """Tensors and spec of a half, and the ids of its own streams and of each extension's."""
    tensors, config, meta = load_folder(folder, wanted=_OF_HALF[half])
    _require_half(folder, meta, half)
    spec = _spec(folder, config)
    missing = [name for name in (_THRESHOLD,) if half == "client" and name not in tensors]
    of_streams = "stream_id" if spec.stream_version > 1 else "model_id"
    extended = meta.get("extension_ids", [])
    found = []
    try:
        found = [bytes.fromhex(str(id)) for id in (meta[of_streams], meta["model_id"], *extended)]
    except (KeyError, TypeError, ValueError):
        missing += [name for name in (of_streams, "model_id") if name not in meta]
    if len(found) != 2 + len(spec.extensions):
        missing += [] if missing else ["the ids of its streams"]
    if missing:
        raise ModelError(f"{folder} is no codec: it lacks {' and '.join(dict.fromkeys(missing))}")
    stream_id, model_id, *others = found
    return tensors, spec, tuple(Ids(each, model_id) for each in (stream_id, *others))


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


def _client_prefix(name: str) -> str:
    """What stands before the name of a client's weight, an extension's too; "" for others."""
    found = re.match(r"(extensions\.\d+\.)?client\.", name)
    return found[0] if found else ""


def _is_of_half(name: str, half: Half) -> bool:
    """Whether a tensor of a whole belongs to a half; of extensions, tables do and no density."""
    if not name.startswith(_EXTENSIONS):
        return True
    return name.split(".", 2)[2].startswith((_TABLES, f"{half}."))


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
    for name, cdf in tensors.items():
        if name.endswith(_CDF):
            before = name.removesuffix(_CDF)
            lengths = tensors[before + _TABLES + "lengths"].cpu().numpy()
            packed[before + _PACKED] = torch.from_numpy(pack_counts(cdf.cpu().numpy(), lengths))
            del packed[name]
    return packed


def _unpacked(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors with tables as the bottleneck holds them, whichever form they have.

    Raises ValueError for packed tables that are not of this model, KeyError where some lack.
    """
    unpacked = dict(tensors)
    whole = [(extension_prefix(n), spec.extended(n)) for n in range(len(spec.extensions))]
    for before, own in (("", spec), *whole):
        packed = unpacked.pop(before + _PACKED, None)
        if packed is not None:
            lengths = unpacked[before + _TABLES + "lengths"].cpu().numpy()
            rows = prior_rows(own.model.prior, len(own.tasks)) * own.rate_levels
            contexts = CONTEXTS if own.model.neighbour_contexts else 1
            cdf = unpack_counts(packed.cpu().numpy(), lengths, rows, contexts)
            unpacked[before + _CDF] = torch.from_numpy(cdf)
    return unpacked


def _tables(folder: str | Path, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> TableSet:
    try:
        whole = _unpacked(tensors, spec)
        names = ("cdf", "offsets", "lengths")
        cdf, offsets, lengths = (whole[_TABLES + name].numpy() for name in names)
        return TableSet(spec.model.prior, cdf, offsets, lengths, spec.rate_levels)
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder} holds no coding tables: {error}") from None
