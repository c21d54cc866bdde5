"""A camera: what the service asks changes what it sends."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mantis_core.codec.checkpoint import load_client
from mantis_core.device import golden
from pipelines.__main__ import app
from pipelines.serving.app import Desk, Limits
from pipelines.serving.camera import Frame, Link, ServiceError, Wanted, shots
from tests.pipelines.serving.conftest import served


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        pixels = golden.procedural_image(number, (40, 40)).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_what_the_service_asks_is_sent_from_the_next_image_on(
    models: list[Path], photos: Path
) -> None:
    desks: list[Desk] = []
    frames = [Frame(path.name, path.read_bytes) for path in sorted(photos.iterdir())]
    with served(models[:1], desks=desks) as url, Link(url) as link:
        taken = shots(load_client(models[0]), link, frames, Wanted(("animals",)))
        first = next(taken)
        desks[0].request = ("tools", "kitchen", "unknown")
        second, third = next(taken), next(taken)
        desks[0].request = None
        fourth = next(taken)
    assert [shot.tasks for shot in (first, second, third, fourth)] == [
        ("animals",),
        ("animals",),  # the service tells with its reply to this one
        ("tools", "kitchen"),
        ("tools", "kitchen"),
    ]
    assert [answer["tasks"] for answer in third.answers] == [["tools", "kitchen"]]
    assert not any(shot.error for shot in (first, second, third, fourth))
    assert first.wire_bytes > 2


def test_the_command_shows_bytes_and_answers(models: list[Path], photos: Path) -> None:
    runner = CliRunner()
    (photos / "broken.png").write_bytes(b"none")
    with served(models[:1], Limits(token="secret")) as url:
        given = ["camera", str(models[0]), url, str(photos)]
        done = runner.invoke(app, [*given, "--json"], env={"MANTIS_SERVE_TOKEN": "secret"})
        assert done.exit_code == 3, done.output
        found = json.loads(done.stdout)["shots"]
        assert [bool(shot["error"]) for shot in found] == [False] * 4 + [True]
        assert all(shot["answers"] for shot in found[:4])
        done = runner.invoke(app, given, env={"MANTIS_SERVE_TOKEN": "secret"})
        assert "4 images," in done.output
        assert "bytes for detected" in done.output
        done = runner.invoke(app, given, env={"MANTIS_SERVE_TOKEN": "wrong"})
        assert done.exit_code == 1
        assert "the token is missing or wrong" in done.output
    (photos / "broken.png").unlink()


def test_a_service_that_has_gone_is_named(models: list[Path], photos: Path) -> None:
    frames = [Frame(path.name, path.read_bytes) for path in sorted(photos.iterdir())]
    with pytest.raises(ServiceError, match="does not answer"):
        next(shots(load_client(models[0]), Link("http://127.0.0.1:9"), frames, Wanted()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "{model}", "--host", "0.0.0.0"], "can be reached from other machines"),
        (["serve", "{model}", "--token-file", "{model}/none"], "cannot read"),
        (["serve", "{model}/none"], "none"),
        (["serve", "{model}", "{model}/../retrained"], "name one of them"),
        (["serve", "{model}", "--port", "{taken}"], "Give another --port"),
        (["camera", "{model}", "http://127.0.0.1:99999", "{photos}"], "no address of a service"),
        (["camera", "{model}", "127.0.0.1:8000", "{model}"], "there is no image"),
    ],
)
def test_a_mistake_gets_one_message(
    arguments: list[str], said: str, models: list[Path], photos: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = [each.format(model=models[0], photos=photos, taken=port) for each in arguments]
        done = CliRunner().invoke(app, given)
    assert done.exit_code == (1 if "99999" in " ".join(given) else 2)
    assert said in done.output
    assert done.output.count("error:") == 1
