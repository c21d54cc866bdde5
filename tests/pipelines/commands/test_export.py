"""`mantis export`: what it writes, says and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mantis_core.device import golden
from mantis_lite import open_export
from pipelines.__main__ import app
from pipelines.export import write
from tests.pipelines.export.codecs import copied_graphs

RUNNER = CliRunner()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        pixels = golden.procedural_image(number, (40, 48)).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"none")
    return folder


def test_a_client_is_exported_and_compared(
    codec: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "client"
    done = RUNNER.invoke(
        app, ["export", str(codec), "-o", str(out), "--images", str(photos), "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["compared"] == 3
    assert told["precision"] == "float32"
    assert told["bytes"] == sum(told["files"].values())
    assert len(told["failures"]) == 1
    assert "broken.png" in told["failures"][0]
    assert open_export(out).stream_spec.model_id.hex() == told["stream_id"]
    shutil.copytree(out, tmp_path / "earlier")
    monkeypatch.setattr(write, "write_graphs", copied_graphs(tmp_path / "earlier"))
    again = RUNNER.invoke(app, ["export", str(codec), "-o", str(out)])  # over an earlier one
    assert again.exit_code == 0
    assert "of 64 images give the stream that torch gives" in again.stdout


def test_the_server_is_one_graph(codec: Path, tmp_path: Path) -> None:
    out = tmp_path / "server"
    done = RUNNER.invoke(app, ["export", str(codec), "-o", str(out), "--half", "server"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"server.onnx", "server.json"}
    assert "server.onnx" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--int8"], "--int8 is calibrated by photographs"),
        (["--half", "server", "--int8"], "are for the client"),
        (["--images", "{folder}/none"], "no such file"),
    ],
)
def test_what_it_refuses(arguments: list[str], said: str, codec: Path, tmp_path: Path) -> None:
    given = [each.format(folder=tmp_path) for each in arguments]
    done = RUNNER.invoke(app, ["export", str(codec), "-o", str(tmp_path / "out"), *given])
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "out").exists()
