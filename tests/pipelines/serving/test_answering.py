"""Questions of several callers at once: a bad one costs the others nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mantis_core.codec.checkpoint import load_client, load_server
from pipelines.serving.answering import Question, replies


def test_each_question_gets_its_own_reply(models: list[Path]) -> None:
    client, server = load_client(models[0]), load_server(models[0])
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    looked = list(client.look(images))
    together = client.write_together(looked)
    session = client.open(requests=True)
    (message,) = session.encode(images[:1], "kitchen")
    asked = [
        Question(client.encode(images)[0]),
        Question(b"damaged"),
        Question(together),
        Question(message, session.hello, ("kitchen",)),
        Question(message, session.hello, ("tools",)),
        Question(message, b"no hello", ("tools",)),
        Question(load_client(models[1]).encode(images[:1])[0]),
    ]
    found = replies(server, asked)
    assert [reply.status for reply in found] == [200, 400, 200, 200, 400, 400, 404]
    assert [len(found[row].content["answers"]) for row in (0, 2, 3)] == [1, 3, 1]
    alone = [replies(server, [question])[0] for question in asked]
    assert [reply.status for reply in alone] == [reply.status for reply in found]
    for mine, other in zip(found, alone, strict=True):  # kernels round otherwise for other batches
        for answer, same in zip(
            mine.content.get("answers", ()), other.content.get("answers", ()), strict=True
        ):
            assert (answer["tasks"], answer["wire_bytes"]) == (same["tasks"], same["wire_bytes"])
    assert found[3].content["answers"][0]["tasks"] == ["kitchen"]
    assert found[2].content["wire_bytes"] == len(together)


def test_a_fault_in_one_question_costs_the_others_nothing(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = load_client(models[0]), load_server(models[0])
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    streams = client.encode(images)
    answer = server.answer

    def failing(unpacked: Any) -> Any:
        listed = list(unpacked)
        if len(listed) > 1:
            raise RuntimeError("no memory")
        return answer(listed)

    monkeypatch.setattr(server, "answer", failing)
    found = replies(server, [Question(stream) for stream in streams])
    assert [reply.status for reply in found] == [200, 200, 200]
    monkeypatch.setattr(server, "answer", lambda unpacked: 1 / 0)
    found = replies(server, [Question(stream) for stream in streams[:2]])
    assert [(reply.status, reply.content["reason"]) for reply in found] == [(500, "internal")] * 2
