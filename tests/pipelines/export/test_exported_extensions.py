"""Exported clients with extensions: graphs and tables of their own, and one look at an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mantis_core.codec.checkpoint import load_client, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.device import export, golden
from mantis_core.errors import ModelError
from mantis_core.patch import apply_patch, write_patch
from mantis_lite import LiteClient, open_export
from mantis_lite.__main__ import main
from pipelines.export.write import export_client
from tests.mantis_core.codec.test_adding import GRASS, PLACES
from tests.mantis_core.codec.test_extensions import CARS, extended
from tests.pipelines.export.codecs import codec_of


@pytest.fixture(scope="module", params=["asked", "attentive"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Mantis, Path, LiteClient]:
    """A codec with two extensions, the folder of its exported client, and that client."""
    codec = extended(extended(codec_of(request.param), PLACES.task, GRASS.task), CARS, rank=1)
    folder = tmp_path_factory.mktemp("export") / "client"
    report = export_client(codec.client_codec(), folder)
    assert report.compared == 3 * 64
    assert report.equal >= golden.LEAST_SAME * report.compared
    return codec, folder, open_export(folder)


def test_each_extension_sends_what_it_sends_in_torch(
    made: tuple[Mantis, Path, LiteClient],
) -> None:
    codec, _, lite = made
    assert lite.families == codec.spec.families
    size = codec.spec.image_size
    pictures = np.stack([golden.procedural_image(700 + n, size) for n in range(8)])
    for tasks in ("places", ["places", "grass"], "cars"):
        mine = lite.encode(pictures, tasks, level=0)
        theirs = codec.encode(torch.from_numpy(pictures.copy()), tasks, level=0)
        assert sum(one == other for one, other in zip(mine, theirs, strict=True)) >= 7
        wanted = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        assert {answer.tasks for answer in codec.decode(mine)} == {wanted}
        (held,) = lite.read(mine[0]).images
        assert len(held.tasks.mask) == len(lite.for_tasks(tasks).facts.tasks)
    session = lite.open(request="cars")
    server = codec.server_codec().open(session.hello, request="cars")
    assert [answer.tasks for answer in server.decode(session.encode(pictures))] == [("cars",)] * 8
    with pytest.raises(ModelError, match="sent in separate streams"):
        lite.encode(pictures, ["cars", "places"])


def test_its_files_and_golden_cases_cover_extensions(
    made: tuple[Mantis, Path, LiteClient], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, lite = made
    cases = golden.read_cases(folder)
    assert len(cases) == golden.COUNT + 2 * golden.OF_EXTENSION
    found = golden.check(lite, cases)
    assert found.same >= golden.LEAST_SAME * found.cases
    assert set(export.read_manifest(folder).files) == {
        *export.CHECKED,
        *("code-1.onnx", "tables-1.npz", "code-2.onnx", "tables-2.npz"),
    }
    assert "cars" in (folder / "README.md").read_text()
    assert main(["check", str(folder)]) == 0
    assert f"{len(cases)} golden cases" in capsys.readouterr().out


def test_a_damaged_file_of_an_extension_is_found(
    made: tuple[Mantis, Path, LiteClient], tmp_path: Path
) -> None:
    _, folder, _ = made
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (folder / "tables-2.npz").read_bytes()
    (tmp_path / "tables-2.npz").write_bytes(data[:-1] + b"x")
    with pytest.raises(ModelError, match=r"tables-2.npz is not the file of this export"):
        open_export(tmp_path)


def test_streams_of_an_extension_are_told_from_others(
    made: tuple[Mantis, Path, LiteClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec, folder, lite = made
    picture = golden.procedural_image(1, codec.spec.image_size)[None]
    (tmp_path / "x.mts").write_bytes(lite.encode(picture, "grass")[0])
    assert main(["info", str(folder), str(tmp_path / "x.mts"), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["images"]
    assert told["tasks"] == ["grass"]


def test_a_patched_client_is_exported_as_that_of_the_child(tmp_path: Path) -> None:
    base = codec_of("lite")
    child = extended(base, PLACES.task, rank=1)
    save_model(tmp_path / "base", base, {})
    save_half(tmp_path / "client", tmp_path / "base", "client")
    write_patch(tmp_path / "patch", child)
    apply_patch(tmp_path / "client", tmp_path / "patch", tmp_path / "patched")
    export_client(load_client(tmp_path / "patched"), tmp_path / "exported")
    lite = open_export(tmp_path / "exported")
    picture = golden.procedural_image(1, base.spec.image_size)[None]
    (answer,) = child.decode(lite.encode(picture, "places"))
    assert answer.tasks == ("places",)
