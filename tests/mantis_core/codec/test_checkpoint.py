"""Model folders: what is saved is what is loaded, and nothing else is."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mantis_core.architecture import ConditioningConfig, DetectorConfig, ModelConfig
from mantis_core.codec.checkpoint import (
    Half,
    load_client,
    load_model,
    load_server,
    save_half,
    save_model,
)
from mantis_core.codec.mantis import Mantis
from mantis_core.errors import ModelError
from mantis_core.folders import (
    load_folder,
    read_meta,
    save_folder,
    sha256_file,
)
from mantis_core.tasks import Batch, Problem
from tests.mantis_core.conftest import make_codec, make_problem
from tests.mantis_core.narrow_resnet import NAME


@pytest.fixture
def saved(codec: Mantis, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", codec, {"step": 12, "parents": ["abc"]})
    return tmp_path / "model"


def reseal(folder: Path) -> None:
    """Makes meta.json agree with the weights that are there now."""
    meta = read_meta(folder)
    meta["weights_sha256"] = sha256_file(folder / "weights.safetensors")
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_loaded_model_codes_and_decodes_what_the_saved_one_did(
    codec: Mantis, saved: Path, batch: Batch
) -> None:
    loaded = load_model(saved)
    assert loaded.model_id() == codec.model_id()
    assert not loaded.training
    streams = codec.encode(batch.image)
    assert loaded.encode(batch.image) == streams
    assert [a.to_dict() for a in loaded.decode(streams)] == [
        a.to_dict() for a in codec.decode(streams)
    ]


def test_a_folder_holds_three_plain_files_and_no_pickle(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.yaml",
        "meta.json",
        "weights.safetensors",
    ]
    meta = read_meta(saved)
    assert (meta["step"], meta["parents"], meta["format_version"]) == (12, ["abc"], 1)
    assert meta["weights_sha256"] == sha256_file(saved / "weights.safetensors")
    assert yaml.safe_load((saved / "config.yaml").read_text())["teacher"] == NAME


@pytest.mark.parametrize("missing", ["weights.safetensors", "config.yaml", "meta.json"])
def test_an_incomplete_folder_is_refused(missing: str, saved: Path) -> None:
    (saved / missing).unlink()
    with pytest.raises(ModelError, match=missing.replace(".", r"\.")):
        load_model(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    data = bytearray((saved / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "weights.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="damaged or exchanged"):
        load_model(saved)
    (saved / "weights.safetensors").write_bytes(b"short")
    reseal(saved)
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(saved)


def test_exchanged_weights_and_config_are_refused_even_with_a_fitting_hash(
    codec: Mantis, saved: Path
) -> None:
    weights = load_file(saved / "weights.safetensors")
    weights["server.decoder.last.bias"] += 1
    save_file(weights, saved / "weights.safetensors")
    reseal(saved)
    with pytest.raises(ModelError, match="another model than the one it was saved as"):
        load_model(saved)
    save_model(saved, codec, {})
    config = yaml.safe_load((saved / "config.yaml").read_text())
    (saved / "config.yaml").write_text(yaml.safe_dump({**config, "short_side": 99}))
    with pytest.raises(ModelError, match="another model than the one it was saved as"):
        load_model(saved)


def test_weights_that_do_not_fit_the_config_are_refused(saved: Path) -> None:
    weights = load_file(saved / "weights.safetensors")
    del weights["server.decoder.last.bias"]
    save_file(weights, saved / "weights.safetensors")
    reseal(saved)
    with pytest.raises(ModelError, match="weights and config do not fit"):
        load_model(saved)


@pytest.mark.parametrize("text", ["[1, 2]", "teacher: resnet18", "a: [", "model: {stem: 3}"])
def test_a_config_of_something_else_is_refused(text: str, saved: Path) -> None:
    (saved / "config.yaml").write_text(text)
    with pytest.raises(ModelError):
        load_model(saved)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"format_version": 9}'])
def test_a_damaged_or_foreign_meta_is_refused(content: bytes, saved: Path) -> None:
    (saved / "meta.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"meta\.json is (damaged|not of format 1)"):
        load_folder(saved)


def test_a_model_without_tables_is_not_saved(
    problem: Problem, stage2_of: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="update_tables"):
        save_model(tmp_path / "model", stage2_of(problem).student, {})
    assert not (tmp_path / "model").exists()


def test_models_that_differ_in_server_weights_only_refuse_each_others_folders(
    codec: Mantis, saved: Path
) -> None:
    other = copy.deepcopy(codec)
    with torch.no_grad():
        other.server.decoder.last.bias.add_(1)
    other.finish()
    save_folder(saved, other.state_dict(), other.spec.model_dump(mode="json"), read_meta(saved))
    with pytest.raises(ModelError, match="another model"):
        load_model(saved)


@pytest.fixture
def halves(saved: Path) -> dict[Half, Path]:
    folders: dict[Half, Path] = {}
    for half in get_args(Half):
        folders[half] = saved.with_name(half)
        save_half(folders[half], saved, half)
    return folders


def test_two_halves_do_what_the_whole_does(
    codec: Mantis, saved: Path, halves: dict[Half, Path], batch: Batch
) -> None:
    streams = codec.encode(batch.image)
    answers = [answer.to_dict() for answer in codec.decode(streams)]
    for client in (load_client(halves["client"]), load_client(saved)):
        assert client.encode(batch.image) == streams
        assert client.describe() == codec.client_codec().describe()
    for server in (load_server(halves["server"]), load_server(saved)):
        assert [answer.to_dict() for answer in server.decode(streams)] == answers


def test_a_client_that_names_classes_is_built_again_from_its_spec(
    problem: Problem,
    batch: Batch,
    tmp_path: Path,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
) -> None:
    codec = codec_of(
        problem,
        small_config(
            detector=DetectorConfig(channels=8, blocks=0, hidden=8, classes=True),
            conditioning=ConditioningConfig(kind="attention", hidden=8),
        ),
    )
    save_model(tmp_path / "model", codec, {})
    save_half(tmp_path / "client", tmp_path / "model", "client")
    streams = codec.encode(batch.image)
    assert load_client(tmp_path / "client").encode(batch.image) == streams
    answers = load_model(tmp_path / "model").decode(streams)
    assert [a.to_dict() for a in answers] == [a.to_dict() for a in codec.decode(streams)]


def test_a_half_holds_no_weight_of_the_other(halves: dict[Half, Path]) -> None:
    for half, folder in halves.items():
        names = set(load_folder(folder)[0])
        first = {name.split(".")[0] for name in names}
        expected = {"client": {"client", "bottleneck", "mask_threshold"}}
        assert first == expected.get(half, {"server", "bottleneck"})
        assert {n for n in names if n.startswith("bottleneck.")} == {
            f"bottleneck.table_{name}" for name in ("counts", "offsets", "lengths")
        }
        assert read_meta(folder)["half"] == half


def test_the_wrong_half_is_refused_with_what_it_is_for(halves: dict[Half, Path]) -> None:
    with pytest.raises(ModelError, match="holds the server of a codec, this needs its client"):
        load_client(halves["server"])
    with pytest.raises(ModelError, match="holds the client of a codec, this needs its server"):
        load_server(halves["client"])
    with pytest.raises(ModelError, match="holds the client alone"):
        load_model(halves["client"])
    with pytest.raises(ModelError, match="this needs its server"):
        save_half(halves["client"].with_name("again"), halves["client"], "server")


@pytest.mark.parametrize(
    ("half", "names"), [("client", ("torchvision", "compressai")), ("server", ("compressai",))]
)
def test_a_half_needs_none_of_the_others_packages(
    half: Half, names: tuple[str, ...], tmp_path: Path
) -> None:
    save_model(tmp_path / "whole", make_codec(make_problem(), network="resnet18"), {})
    save_half(tmp_path / "half", tmp_path / "whole", half)
    code = (
        f"import sys; from mantis_core.codec.checkpoint import load_{half}\n"
        f"load_{half}({str(tmp_path / 'half')!r})\n"
        f"print([name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_half_without_its_tables_or_threshold_is_refused(halves: dict[Half, Path]) -> None:
    tensors, config, meta = load_folder(halves["client"])
    for name, message in [("mask_threshold", "lacks mask_threshold"), (None, "no coding tables")]:
        left = {
            key: value
            for key, value in tensors.items()
            if key != name and (name is not None or "table_counts" not in key)
        }
        save_folder(halves["client"], left, config, meta)
        with pytest.raises(ModelError, match=message):
            load_client(halves["client"])


def test_a_folder_with_another_stream_id_or_without_one_is_refused(
    codec: Mantis, saved: Path, halves: dict[Half, Path], batch: Batch
) -> None:
    meta = read_meta(saved)
    (saved / "meta.json").write_text(json.dumps({**meta, "stream_id": "00000000"}))
    with pytest.raises(ModelError, match="another model than the one it was saved as"):
        load_model(saved)
    for half, load in (("client", load_client), ("server", load_server)):
        meta = {k: v for k, v in read_meta(halves[half]).items() if k != "stream_id"}
        (halves[half] / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ModelError, match="it lacks stream_id"):
            load(halves[half])


def test_a_folder_of_a_later_format_of_streams_is_refused(
    saved: Path, halves: dict[Half, Path]
) -> None:
    for folder, load in (
        (saved, load_model),
        (halves["client"], load_client),
        (halves["server"], load_server),
    ):
        tensors, config, meta = load_folder(folder)
        save_folder(folder, tensors, {**config, "stream_version": 3}, meta)
        with pytest.raises(ModelError, match=r"stream_version.*version 3 are unknown"):
            load(folder)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_packed_tables_that_are_damaged_or_of_another_model_are_refused(
    damage: str, saved: Path, halves: dict[Half, Path]
) -> None:
    for folder, load in ((saved, load_model), (halves["client"], load_client)):
        tensors, config, meta = load_folder(folder)
        counts, lengths = (tensors[f"bottleneck.table_{n}"] for n in ("counts", "lengths"))
        if damage == "cut":
            tensors["bottleneck.table_counts"] = counts[:-1].clone()
        else:
            lengths[0] += 1
        save_folder(folder, tensors, config, meta)
        with pytest.raises(ModelError, match="packed tables are not of this model"):
            load(folder)


def test_folders_of_a_version_that_did_not_pack_tables_are_read(
    codec: Mantis, saved: Path, halves: dict[Half, Path], batch: Batch
) -> None:
    """Whole, halved by the earlier version, and halved by this one."""
    state, streams = codec.state_dict(), codec.encode(batch.image)
    answers = [answer.to_dict() for answer in codec.decode(streams)]
    for folder in (saved, *halves.values()):
        tensors, config, meta = load_folder(folder)
        tensors["bottleneck.table_cdf"] = state["bottleneck.table_cdf"]
        del tensors["bottleneck.table_counts"]
        save_folder(folder, tensors, config, meta)
    again = saved.with_name("again")
    save_half(again, saved, "client")
    assert "bottleneck.table_counts" in load_folder(again)[0]
    assert load_model(saved).model_id() == codec.model_id()
    for client in (load_model(saved), load_client(halves["client"]), load_client(again)):
        assert client.encode(batch.image) == streams
    for server in (load_model(saved), load_server(halves["server"])):
        assert [answer.to_dict() for answer in server.decode(streams)] == answers


def test_a_client_is_saved_as_float16_and_loaded_bit_for_bit(
    codec: Mantis, halves: dict[Half, Path]
) -> None:
    names = {name for name in load_folder(halves["client"])[0] if name.startswith("client.")}
    assert names == {"client.float16"}
    loaded = load_client(halves["client"])
    for name, weight in codec.client.state_dict().items():
        assert torch.equal(loaded.client.state_dict()[name], weight), name
    assert loaded.describe()["client_bytes"] < 3 * loaded.describe()["client_parameters"]


def test_a_client_that_was_never_rounded_is_saved_and_loaded_bit_for_bit(
    codec: Mantis, batch: Batch, tmp_path: Path
) -> None:
    """As earlier versions finished it. Their folders of a client held each weight in float32."""
    with torch.no_grad():
        for weight in codec.client.parameters():
            weight.mul_(1 + 1e-3 * torch.rand_like(weight))
    codec.load_state_dict(codec.state_dict())  # the id is that of these weights
    whole, client, old, again = (tmp_path / name for name in ("whole", "client", "old", "again"))
    save_model(whole, codec, {})
    save_half(client, whole, "client")
    wanted = ("client.", "bottleneck.table_", "mask_threshold")
    tensors, config, meta = load_folder(whole, wanted=wanted)
    save_folder(old, tensors, config, {**meta, "half": "client"})
    save_half(again, old, "client")
    assert "client.stem.0.weight" in load_folder(client)[0]
    streams = codec.encode(batch.image)
    for folder in (whole, client, old, again):
        loaded = load_client(folder)
        assert loaded.encode(batch.image) == streams
        for name, weight in codec.client.state_dict().items():
            assert torch.equal(loaded.client.state_dict()[name], weight), name


@pytest.mark.parametrize("damage", ["cut", "lacking"])
def test_packed_weights_that_are_damaged_or_of_another_model_are_refused(
    damage: str, halves: dict[Half, Path]
) -> None:
    tensors, config, meta = load_folder(halves["client"])
    if damage == "cut":
        tensors["client.float16"] = tensors["client.float16"][:-1].clone()
    else:
        del tensors["client.float16"]
    save_folder(halves["client"], tensors, config, meta)
    with pytest.raises(ModelError, match="client: weights and config do not fit: "):
        load_client(halves["client"])


def with_summary(folder: Path, channels: int) -> None:
    """Gives config.yaml the fields of a version that could send a summary of the whole image."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["encoder"] |= {"summary_channels": channels, "summary_hidden": 256}
    config["model"]["decoder"] |= {"summary_hidden": 256}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_model_of_a_version_with_summaries_is_loaded_if_it_has_none(
    codec: Mantis, saved: Path, halves: dict[Half, Path], batch: Batch
) -> None:
    for folder in (saved, *halves.values()):
        with_summary(folder, 0)
    streams = codec.encode(batch.image)
    assert load_model(saved).encode(batch.image) == streams
    assert load_client(halves["client"]).encode(batch.image) == streams
    assert len(load_server(halves["server"]).decode(streams)) == len(streams)


def test_a_model_that_sends_a_summary_is_refused(saved: Path) -> None:
    with_summary(saved, 8)
    for load in (load_model, load_client, load_server):
        with pytest.raises(ModelError, match="sends a summary, which this version no longer dec"):
            load(saved)


def test_other_unknown_fields_are_still_refused(saved: Path) -> None:
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["model"]["encoder"]["sumary_channels"] = 0
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    named = r"describes no codec of this version \(model\.encoder\.sumary_channels: "
    with pytest.raises(ModelError, match=named) as caught:
        load_model(saved)
    assert "pydantic" not in str(caught.value)
