"""The page of a service and what it fetches; photographs that the service encodes itself."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mantis_core.codec.adding import with_tasks
from mantis_core.codec.checkpoint import (
    load_client,
    load_model,
    load_server,
    save_half,
    save_model,
)
from mantis_core.codec.spec import AddedTask
from mantis_core.errors import ModelError
from mantis_core.tasks import TaskSpec
from pipelines.export.write import export_client
from pipelines.serving.app import Limits
from pipelines.serving.camera import Link
from pipelines.serving.catalog import entry_of, exports_by_stream
from pipelines.serving.pages import CLIENT_FILES, FILES, RUNTIME_FILES, Page, lacking
from tests.mantis_core.picture_files import FILES as PICTURES
from tests.pipelines.serving.conftest import served

PHOTOGRAPH = PICTURES["L"]()[0]


@pytest.fixture(scope="module")
def exported(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "client"
    export_client(load_client(models[0]), folder)
    return folder


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    for name in RUNTIME_FILES:
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture(scope="module")
def url(models: list[Path], exported: Path, runtime: Path) -> Iterator[str]:
    with served(models[:2], page=Page(str(runtime), (str(exported),))) as address:
        yield address


def fetch(url: str, path: str, body: bytes | None = None) -> tuple[int, bytes, str]:
    """Status, body and type of a reply."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    connection.request("GET" if body is None else "POST", path, body)
    reply = connection.getresponse()
    found = reply.status, reply.read(), reply.headers.get_content_type()
    connection.close()
    return found


def test_the_page_names_only_files_that_the_service_has(url: str) -> None:
    status, page, kind = fetch(url, "/")
    assert (status, kind) == (200, "text/html")
    wanted = set(re.findall(r'(?:src|href)="(/[^"]+)"', page.decode()))
    assert wanted == {"/page/page.css", "/page/page.js"}
    for script in FILES.glob("*.js"):
        wanted |= {f"/page/{name}" for name in re.findall(r'from "\./(.+?)"', script.read_text())}
        wanted |= set(re.findall(r'import\("(/.+?)"\)', script.read_text()))
    assert "/runtime/ort.wasm.min.mjs" in wanted
    for path in sorted(wanted):
        status, _, kind = fetch(url, path)
        assert status == 200, path
        assert kind == ("text/css" if path.endswith("css") else "text/javascript"), path
    assert fetch(url, f"/runtime/{RUNTIME_FILES[-1]}")[2] == "application/wasm"


def test_nothing_of_the_page_comes_from_elsewhere() -> None:
    for file in FILES.glob("*.*"):
        found = re.findall(r"https?://[^\s\"'`)]+", file.read_text(encoding="utf-8"))
        assert [own for own in found if own != "http://www.w3.org/2000/svg"] == []


def test_a_service_gives_the_exported_client_of_its_model(
    url: str, exported: Path, models: list[Path]
) -> None:
    first, second = (entry_of(folder, "").stream_id for folder in models[:2])
    for name in CLIENT_FILES:
        status, data, _ = fetch(url, f"/v1/clients/{first}/{name}")
        assert (status, data) == (200, (exported / name).read_bytes())
    assert fetch(url, f"/v1/clients/{second}/manifest.json")[0] == 404
    assert fetch(url, f"/v1/clients/{first}/golden.json")[0] == 404
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", f"/v1/clients/{first}/..%2fmeta.json"):
        assert fetch(url, path)[0] == 404
    with Link(url) as link:
        told = {each["stream_id"]: each for each in link.ask("GET", "/v1/models")[1]["models"]}
    assert (told[first]["exported"], told[second]["exported"]) == (True, False)
    assert "folder" not in told[first]


def test_a_task_of_the_server_alone_is_asked_for_by_what_it_is_answered_through(
    models: list[Path], tmp_path: Path
) -> None:
    places = TaskSpec("places", "classification", 2, labels=("sea", "land"))
    through = AddedTask(task=places, through=("tools", "kitchen"))
    save_model(tmp_path / "more", with_tasks(load_model(models[0]), [through]), {"step": 1})
    with served([tmp_path / "more"]) as address, Link(address) as link:
        (told,) = link.ask("GET", "/v1/models")[1]["models"]
        assert told["added"] == {"places": ["tools", "kitchen"]}
        status, content = link.ask("PUT", "/v1/request", b'{"tasks": ["places", "animals"]}')
        assert (status, content["request"]) == (200, ["tools", "kitchen", "animals"])
        client = load_client(models[0])  # of before
        image = client.prepare_image(PHOTOGRAPH)[None]
        (stream,) = client.encode(image, ["tools", "kitchen"])
        content = link.ask("POST", "/v1/answers", stream)[1]
        assert content["answers"][0]["tasks"] == ["tools", "kitchen", "places"]
        assert link.ask("PUT", "/v1/request", b'{"tasks": ["cars"]}')[0] == 422


def test_a_photograph_gets_the_stream_of_the_models_client(url: str, models: list[Path]) -> None:
    client = load_client(models[1])
    image = client.prepare_image(PHOTOGRAPH)[None]
    path = f"/v1/streams?model={entry_of(models[1], '').stream_id}"
    status, stream, kind = fetch(url, path, PHOTOGRAPH)
    assert (status, kind) == (200, "application/octet-stream")
    assert [stream] == client.encode(image)
    asked = fetch(url, f"{path}&task=tools&task=kitchen&level=0", PHOTOGRAPH)[1]
    assert [asked] == client.encode(image, ["tools", "kitchen"], level=0)
    (answer,) = load_server(models[1]).decode([asked])
    assert answer.tasks == ("tools", "kitchen")


def test_what_cannot_be_encoded_says_why(url: str, models: list[Path], tmp_path: Path) -> None:
    path = f"/v1/streams?model={entry_of(models[0], '').stream_id}"
    with Link(url) as link:
        for query, body, status, reason, words in (
            ("", b"text", 422, "image", "not an image"),
            ("&task=cars", PHOTOGRAPH, 400, "request", "animals, tools, kitchen"),
            ("&level=9", PHOTOGRAPH, 400, "request", "level is 9"),
            ("&level=high", PHOTOGRAPH, 422, "request", "query.level"),
            ("&max_bytes=2", PHOTOGRAPH, 422, "budget", "allow more"),
        ):
            found, content = link.ask("POST", path + query, body)
            assert (found, content["reason"]) == (status, reason)
            assert words in content["error"]
        assert link.ask("POST", "/v1/streams", PHOTOGRAPH)[1]["error"].startswith("query.model")
        found, content = link.ask("GET", "/nowhere")
        assert (found, content["reason"]) == (404, "call")
    save_half(tmp_path / "server", models[0], "server")
    with served([tmp_path / "server"]) as address, Link(address) as link:
        found, content = link.ask("POST", path, PHOTOGRAPH)
        assert (found, content["reason"]) == (404, "no_client")


def test_the_page_is_open_and_the_client_needs_the_token(
    models: list[Path], exported: Path
) -> None:
    page = Page(exports=(str(exported),))
    with served(models[:1], Limits("secret"), page=page) as address:
        assert fetch(address, "/")[0] == 200
        assert fetch(address, "/page/page.js")[0] == 200
        path = f"/v1/clients/{entry_of(models[0], '').stream_id}/manifest.json"
        assert fetch(address, path)[0] == 401
        assert fetch(address, path.replace("clients", "streams"), b"x")[0] in (401, 404)
        assert fetch(address, "/v1/streams?model=00000000", PHOTOGRAPH)[0] == 401
        assert fetch(address, "/runtime/ort.wasm.min.mjs")[0] == 404


def test_a_damaged_export_and_another_folder_are_named(exported: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in exported.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "look.onnx").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"look\.onnx is not the file"):
        exports_by_stream([damaged])
    with pytest.raises(ModelError, match="holds no exported client"):
        exports_by_stream([tmp_path])


def test_a_folder_without_the_runtime_is_told_apart(runtime: Path, tmp_path: Path) -> None:
    assert lacking(runtime) == []
    assert lacking(tmp_path) == list(RUNTIME_FILES)
