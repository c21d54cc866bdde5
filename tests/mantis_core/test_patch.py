"""The patch of a client: it makes the client of the child codec, and of no other one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mantis_core.codec.adding import with_tasks, without_task
from mantis_core.codec.checkpoint import load_client, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import AddedTask
from mantis_core.errors import ModelError
from mantis_core.folders import read_meta
from mantis_core.patch import MANIFEST, WEIGHTS, apply_patch, read_patch, write_patch
from pipelines.__main__ import app
from tests.mantis_core.codec.test_adding import GRASS, PLACES, images, ways
from tests.mantis_core.codec.test_extensions import CARS, extended
from tests.pipelines.export.codecs import codec_of


def save(folder: Path, codec: Mantis) -> Path:
    """A codec, its client half, and the patch of its last extension, below `folder`."""
    save_model(folder / "whole", codec, {"step": 1})
    save_half(folder / "client", folder / "whole", "client")
    if codec.spec.extensions:
        write_patch(folder / "whole" / "patch", codec)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A codec, that with a row, and that with adapters beside it."""
    top = tmp_path_factory.mktemp("patches")
    base = codec_of("asked")
    row = extended(base, PLACES.task, GRASS.task)
    made = {"base": base, "row": row, "adapter": extended(row, CARS, rank=1)}
    return {name: save(top / name, codec) for name, codec in made.items()}


@pytest.mark.parametrize("half", ["client", "whole"])
def test_a_patched_client_is_that_of_the_child(
    folders: dict[str, Path], tmp_path: Path, half: str
) -> None:
    apply_patch(folders["base"] / half, folders["row"] / "whole" / "patch", tmp_path / "one")
    apply_patch(tmp_path / "one", folders["adapter"] / "whole", tmp_path / "two")
    for made, child in (("one", "row"), ("two", "adapter")):
        patched, known = load_client(tmp_path / made), load_client(folders[child] / "client")
        assert [own.ids for own in patched.extensions] == [own.ids for own in known.extensions]
        assert patched.ids == known.ids
        same = ("weights.safetensors", "config.yaml")
        for name in same:
            one, other = tmp_path / made / name, folders[child] / "client" / name
            assert one.read_bytes() == other.read_bytes()
        assert read_meta(tmp_path / made)["client"] == patched.describe()
        pictures = images(known, 2)  # type: ignore[arg-type]
        for tasks in known.families:
            assert patched.encode(pictures, tasks) == known.encode(pictures, tasks)


def test_patches_do_not_need_each_other(folders: dict[str, Path], tmp_path: Path) -> None:
    apply_patch(folders["base"] / "client", folders["adapter"] / "whole", tmp_path / "cars")
    made, known = load_client(tmp_path / "cars"), load_client(folders["adapter"] / "client")
    pictures = images(known, 1)  # type: ignore[arg-type]
    assert made.families == (known.facts.tasks, ("cars",))
    assert made.encode(pictures, "cars") == known.encode(pictures, "cars")


@pytest.mark.parametrize("kind", ["attentive", "lite"])
def test_other_kinds_of_clients_are_patched_too(kind: str, tmp_path: Path) -> None:
    base = codec_of(kind)
    child = extended(with_tasks(base, [AddedTask(task=GRASS.task)]), PLACES.task, rank=1)
    before, after = save(tmp_path / "base", base), save(tmp_path / "child", child)
    apply_patch(before / "client", after / "whole", tmp_path / "new")
    made, pictures = load_client(tmp_path / "new"), images(base, 2)
    assert made.encode(pictures, "places") == child.encode(pictures, "places")
    for way in ways(base):
        assert made.encode(pictures, **way) == base.encode(pictures, **way)


def test_a_patch_of_another_client_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = codec_of("asked")
    with torch.no_grad():
        other.client.encoder.to_latent.weight.mul_(1.5)
    other.train().finish()
    foreign = save(tmp_path / "other", other)
    with pytest.raises(ModelError, match=r"is for the client of streams \w+, and .* makes streams"):
        apply_patch(foreign / "client", folders["row"] / "whole", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_no_whole_patch_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    client = folders["base"] / "client"
    apply_patch(client, folders["row"] / "whole", tmp_path / "new")
    with pytest.raises(ModelError, match="has this patch already, for places, grass"):
        apply_patch(tmp_path / "new", folders["row"] / "whole", tmp_path / "again")
    with pytest.raises(ModelError, match="is there already: name a new folder"):
        apply_patch(client, folders["row"] / "whole", tmp_path / "new")
    with pytest.raises(ModelError, match="is no patch: it lacks"):
        apply_patch(client, client, tmp_path / "x")
    with pytest.raises(ModelError, match="this codec has 0 extensions"):
        write_patch(tmp_path / "none", codec_of("asked"))

    known = folders["row"] / "whole" / "patch"
    told = json.loads((known / MANIFEST).read_text())
    data = (known / WEIGHTS).read_bytes()
    broken = {
        "copy it again": (told, data[:-1] + bytes([data[-1] ^ 1])),
        "patch of format 9": ({**told, "format_version": 9}, data),
        "holds a damaged patch": ({**told, "parent_id": None}, data),
        r"makes streams \w+, and \w+ are promised": ({**told, "child_sha256": "00" * 32}, data),
    }
    for number, (said, (manifest, weights)) in enumerate(broken.items()):
        folder = tmp_path / f"broken-{number}"
        folder.mkdir()
        (folder / MANIFEST).write_text(json.dumps(manifest))
        (folder / WEIGHTS).write_bytes(weights)
        with pytest.raises(ModelError, match=said):
            apply_patch(client, folder, tmp_path / f"new-{number}")
        assert not (tmp_path / f"new-{number}").exists()


def test_a_patch_holds_the_clients_own_tensors_and_no_more(folders: dict[str, Path]) -> None:
    _, tensors = read_patch(folders["row"] / "whole")
    assert set(tensors) == {
        "client.float16",
        "bottleneck.table_counts",
        "bottleneck.table_lengths",
        "bottleneck.table_offsets",
    }


def test_a_task_that_was_removed_has_a_new_patch(folders: dict[str, Path], tmp_path: Path) -> None:
    left = without_task(extended(codec_of("asked"), PLACES.task, GRASS.task), "grass")
    write_patch(tmp_path / "patch", left)
    apply_patch(folders["base"] / "client", tmp_path / "patch", tmp_path / "new")
    made, pictures = load_client(tmp_path / "new"), images(left, 1)
    assert made.encode(pictures, "places") == left.encode(pictures, "places")


def test_the_command_patches_and_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    words = [str(folders["base"] / "client"), str(folders["row"] / "whole")]
    done = CliRunner().invoke(app, ["patch", *words, "-o", str(tmp_path / "new"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    known = load_client(folders["row"] / "client").extensions[0]
    assert (told["tasks"], told["stream_id"]) == (["places", "grass"], known.ids.stream.hex())
    done = CliRunner().invoke(app, ["patch", *words, "-o", str(tmp_path / "new")])
    assert done.exit_code == 2
    assert "is there already: name a new folder" in " ".join(done.output.split())
