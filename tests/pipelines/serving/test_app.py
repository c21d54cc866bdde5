"""The service over HTTP: what it answers, and what it refuses before a model sees it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mantis_core.codec.checkpoint import load_client, load_server
from pipelines.serving.app import HELLO, Desk, Limits, Refused
from pipelines.serving.camera import Link, ServiceError
from pipelines.serving.catalog import Catalog, entry_of, from_config
from tests.pipelines.serving.conftest import served


@pytest.fixture(scope="module")
def running(models: list[Path]) -> Iterator[tuple[Link, list[Path], Desk]]:
    desks: list[Desk] = []
    with served(models[:2], desks=desks) as url, Link(url) as link:
        yield link, models, desks[0]


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def test_a_stream_gets_the_answers_of_its_own_model(
    running: tuple[Link, list[Path], Desk],
) -> None:
    link, models, _ = running
    for folder in models[:2]:
        stream = load_client(folder).encode(images(1))[0]
        status, content = link.ask("POST", "/v1/answers", stream)
        assert status == 200
        (known,) = load_server(folder).decode([stream])
        assert content["answers"] == [json.loads(json.dumps(known.to_dict()))]
        assert content["wire_bytes"] == len(stream)
        assert content["request"] is None


def test_a_message_is_answered_for_what_was_asked(running: tuple[Link, list[Path], Desk]) -> None:
    link, models, _ = running
    session = load_client(models[0]).open(requests=True)
    (message,) = session.encode(images(1), ["tools", "kitchen"])
    hello = {HELLO: base64.b64encode(session.hello).decode()}
    status, content = link.ask("POST", "/v1/messages?task=tools&task=kitchen", message, hello)
    assert status == 200
    assert content["answers"][0]["tasks"] == ["tools", "kitchen"]
    status, content = link.ask("POST", "/v1/messages?task=tools", message, hello)
    assert (status, content["reason"]) == (400, "corrupt")
    status, content = link.ask("POST", "/v1/messages?task=cars", message, hello)
    assert (status, content["reason"]) == (400, "request")
    assert "this model has animals, tools, kitchen" in content["error"]
    status, content = link.ask("POST", "/v1/messages", message, hello)
    assert (status, content["reason"]) == (400, "request")
    for wrong in ("?", "AAAA", "A" * 65):
        status, content = link.ask("POST", "/v1/messages?task=tools", message, {HELLO: wrong})
        assert (status, content["reason"]) == (400, "not_a_stream")


def test_what_is_no_stream_of_a_model_here_never_reaches_one(
    running: tuple[Link, list[Path], Desk], tmp_path: Path
) -> None:
    from tests.pipelines.serving.conftest import saved

    link, models, desk = running
    stream = load_client(models[0]).encode(images(1))[0]
    foreign = load_client(saved(tmp_path / "foreign", 7)).encode(images(1))[0]
    before = desk.answer.asked  # type: ignore[attr-defined]
    bodies = {
        b"": (400, "truncated"),
        b"GIF89a": (400, "not_a_stream"),
        stream[:-1]: (400, "corrupt"),
        stream[:9] + bytes([stream[9] ^ 1]) + stream[10:]: (400, "corrupt"),
        foreign: (404, "another_model"),
        bytes((1 << 20) + 1): (413, "too_large"),
    }
    for body, expected in bodies.items():
        status, content = link.ask("POST", "/v1/answers", body)
        assert (status, content["reason"]) == expected
        assert content["error"]
    assert desk.answer.asked == before  # type: ignore[attr-defined]
    assert desk.registry.get_sample_value("mantis_refused_total", {"reason": "corrupt"}) >= 2
    assert desk.registry.get_sample_value("mantis_replies_total", {"status": "404"}) >= 1


def test_models_and_the_request_are_told(running: tuple[Link, list[Path], Desk]) -> None:
    link, models, desk = running
    status, content = link.ask("GET", "/v1/models")
    assert status == 200
    assert [each["source"] for each in content["models"]] == ["first", "second"]
    assert all("folder" not in each for each in content["models"])
    status, content = link.ask("PUT", "/v1/request", b'{"tasks": ["tools"]}')
    assert (status, content) == (200, {"request": ["tools"]})
    stream = load_client(models[0]).encode(images(1))[0]
    assert link.ask("POST", "/v1/answers", stream)[1]["request"] == ["tools"]
    for body, said in ((b'{"tasks": ["cars"]}', "no model here has cars"), (b"[]", "the body is")):
        status, content = link.ask("PUT", "/v1/request", body)
        assert status == 422
        assert said in content["error"]
    assert desk.request == ("tools",)
    link.ask("PUT", "/v1/request", b'{"tasks": []}')
    assert desk.request is None
    assert link.ask("GET", "/healthz")[1] == {"status": "ok", "models": 2}
    assert {"/v1/answers", "/v1/messages"} <= set(link.ask("GET", "/openapi.json")[1]["paths"])


def test_a_token_is_asked_for_everywhere_but_health(models: list[Path]) -> None:
    with served(models[:1], Limits(token="secret")) as url:
        calls = [
            ("POST", "/v1/answers"),
            ("POST", "/v1/messages"),
            ("GET", "/v1/models"),
            ("PUT", "/v1/request"),
            ("GET", "/metrics"),
        ]
        for token in ("", "other"):
            with Link(url, token) as link:
                for method, path in calls:
                    status, content = link.ask(method, path, b"", {HELLO: "AAAA"})
                    assert (status, content["reason"]) == (401, "token")
                assert link.ask("GET", "/healthz")[0] == 200
        with Link(url, "secret") as link:
            assert link.ask("GET", "/v1/models")[0] == 200


def test_a_body_over_the_limit_is_not_read_on(models: list[Path]) -> None:
    with served(models[:1], Limits(max_body=100)) as url, Link(url) as link:
        status, content = link.ask("POST", "/v1/answers", bytes(101))
        assert (status, content["reason"]) == (413, "too_large")
        status, content = link.ask("PUT", "/v1/request", bytes(101))
        assert (status, content["reason"]) == (413, "too_large")
        assert link.ask("POST", "/v1/answers", bytes(100))[0] == 400


def test_a_model_that_does_not_answer_is_said_so(models: list[Path]) -> None:
    desks: list[Desk] = []
    stream = load_client(models[0]).encode(images(1))[0]

    async def broken(*given: Any) -> Any:
        raise RuntimeError("replica died")

    with served(models[:1], desks=desks) as url, Link(url) as link:
        desks[0].answer = broken
        status, content = link.ask("POST", "/v1/answers", stream)
        assert (status, content["reason"]) == (503, "unavailable")
        assert "replica died" not in content["error"]
        assert link.ask("POST", "/v1/messages", b"")[1]["reason"] == "truncated"


def test_a_caller_may_ask_so_many_times_a_second() -> None:
    async def nobody(*given: Any) -> Any:
        raise AssertionError

    desk = Desk(Catalog(), Limits(rate=2.0), nobody, nobody)
    for caller in ("a", "b"):
        desk.let_in(caller, "", 10.0)
        desk.let_in(caller, "", 10.0)
        with pytest.raises(Refused, match="more than 2 requests a second") as refused:
            desk.let_in(caller, "", 10.0)
        assert refused.value.reply.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
    desk.let_in("a", "", 10.5)  # half a second is worth one request
    with pytest.raises(Refused):
        desk.let_in("a", "", 10.5)
    desk.let_in("a", "", 100.0)
    desk.let_in("a", "", 100.0)
    with pytest.raises(Refused):
        desk.let_in("a", "", 100.0)
    slow = Desk(Catalog(), Limits(rate=0.1), nobody, nobody)
    slow.let_in("a", "", 0.0)
    with pytest.raises(Refused) as refused:
        slow.let_in("a", "", 1.0)
    assert refused.value.headers["Retry-After"] == "9"


def test_of_models_with_one_stream_id_the_newest_answers(models: list[Path]) -> None:
    first, second, retrained = (entry_of(folder, folder.name) for folder in models)
    assert first.stream_id == retrained.stream_id != second.stream_id
    catalog = Catalog().with_newer([first]).with_newer([second])
    assert catalog.find(first.stream_id) == first
    newer = catalog.with_newer([retrained])
    assert newer.find(first.stream_id) == retrained
    assert newer.find(second.stream_id) == second
    assert newer.find("00000000") is None
    assert from_config(json.loads(json.dumps(newer.to_config()))) == newer


def test_a_service_that_is_none_is_named() -> None:
    for url in ("ftp://a", "127.0.0.1:1", ""):
        with pytest.raises(ServiceError, match="is no address of a service"):
            Link(url)
    with pytest.raises(ServiceError, match="does not answer"):
        Link("http://127.0.0.1:9").ask("GET", "/v1/models")
