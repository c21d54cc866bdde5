"""Sessions of the two halves, each loaded from a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mantis_core.architecture import DetectorConfig, ModelConfig
from mantis_core.bitstream.container import BitstreamError, Reason
from mantis_core.codec.checkpoint import load_client, load_server, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.own_answer import confidence_counts
from mantis_core.device.sessions import ClientSession, ServerSession
from mantis_core.errors import ModelError
from mantis_core.tasks import Problem
from tests.mantis_core.conftest import make_codec, make_config, make_problem

DETECTOR = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)


def images(count: int = 4, height: int = 32, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, 32), generator=draw, dtype=torch.uint8)


@pytest.fixture(params=[False, True], ids=["silent", "sends its answer"])
def codec(
    request: pytest.FixtureRequest,
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
) -> Mantis:
    return codec_of(problem, small_config(detector=DETECTOR, send_answer=request.param))


def facts(answer: Any) -> dict[str, Any]:
    """All of an answer but its sizes."""
    sizes = ("wire_bytes", "payload_bytes")
    return {name: value for name, value in answer.to_dict().items() if name not in sizes}


def test_both_halves_hold_a_session_and_answer_as_files_do(codec: Mantis, tmp_path: Path) -> None:
    if codec.fusion is not None:
        codec.fusion.fitted_bonus.copy_(torch.linspace(-3, 4, 8))
        codec.fusion.fitted_log_scale.copy_(torch.linspace(-1, 1, 8))
        codec.fusion.accuracy.copy_(torch.linspace(0.1, 0.8, 8))
        task_level, level = np.arange(300) % 4, np.arange(300) % 7
        codec.answer_counts.copy_(confidence_counts(task_level, level))
        codec.load_state_dict(codec.state_dict())  # its id is made anew
    save_model(tmp_path / "whole", codec, {})
    for half in ("client", "server"):
        save_half(tmp_path / half, tmp_path / "whole", half)
    client, server = load_client(tmp_path / "client"), load_server(tmp_path / "server")
    sender = ClientSession(client)
    receiver = ServerSession(server, sender.hello)
    for seed in range(3):
        messages = sender.encode(images(seed=seed), exit_confidence=0.17 if seed else None)
        told = client.encode_in_detail(images(seed=seed), exit_confidence=0.17 if seed else None)
        assert [len(message) for message in messages] == [each.session_bytes for each in told]
        assert [len(each.data) - 9 for each in told] == [each.session_bytes for each in told]
        answers = receiver.decode(messages)
        files = server.decode([each.data for each in told])
        assert [facts(a) for a in answers] == [facts(f) for f in files]
        whole = codec.decode([each.data for each in told])
        assert [facts(f) for f in files] == [facts(w) for w in whole]
        assert [a.wire_bytes for a in answers] == [len(message) for message in messages]


def test_a_session_of_requests_answers_what_was_asked(codec: Mantis) -> None:
    sender = ClientSession(codec.client_codec(), requests=True)
    receiver = ServerSession(codec.server_codec(), sender.hello)
    batch = images()
    for tasks in ("tools", ["animals", "kitchen"], torch.eye(3, dtype=torch.bool)[[0, 1, 2, 0]]):
        messages = sender.encode(batch, tasks)
        told = codec.encode_in_detail(batch, tasks)
        assert [len(message) for message in messages] == [each.session_bytes for each in told]
        answers = receiver.decode(messages, tasks)
        files = codec.decode([each.data for each in told])
        assert [facts(a) for a in answers] == [facts(f) for f in files]
    refused = receiver, sender.encode(batch, "tools")
    with pytest.raises(BitstreamError, match="another request") as error:
        refused[0].decode(refused[1], "animals")
    assert error.value.reason is Reason.CORRUPT


def test_a_session_keeps_its_request_until_another_is_made(codec: Mantis) -> None:
    sender = codec.client_codec().open(request="tools")
    receiver = codec.server_codec().open(sender.hello, request="tools")
    batch, by_call = images(), ClientSession(codec.client_codec(), requests=True)
    assert sender.hello == by_call.hello
    assert sender.encode(batch) == by_call.encode(batch, "tools")
    assert {a.tasks for a in receiver.decode(sender.encode(batch))} == {("tools",)}
    once = sender.encode(batch, "animals")
    assert {a.tasks for a in receiver.decode(once, "animals")} == {("animals",)}
    sender.request = ["animals", "kitchen"]
    with pytest.raises(BitstreamError, match="another request"):
        receiver.decode(sender.encode(batch))
    receiver.request = sender.request
    assert {a.tasks for a in receiver.decode(sender.encode(batch))} == {("animals", "kitchen")}
    for end in (sender, receiver):
        with pytest.raises(ModelError, match=r"weather.*this model has animals"):
            end.request = "weather"
        assert end.request == ["animals", "kitchen"]


def test_a_model_that_always_detects_opens_no_session_of_requests() -> None:
    codec = make_codec(make_problem(), make_config(requests="detect"))
    for begin in (
        lambda: codec.client_codec().open(request="tools"),
        lambda: codec.server_codec().open(
            codec.client_codec().open(requests=True).hello, request="tools"
        ),
    ):
        with pytest.raises(ModelError, match="cannot be asked for some"):
            begin()


def test_a_session_that_detects_has_no_request(codec: Mantis) -> None:
    sender = codec.client_codec().open()
    assert sender.request is None
    assert len(codec.server_codec().open(sender.hello).decode(sender.encode(images()))) == 4
    for begin in (
        lambda: codec.server_codec().open(sender.hello, request="tools"),
        lambda: ClientSession(codec.client_codec(), requests=False, request="tools"),
    ):
        with pytest.raises(ModelError, match="in this session tasks are detected"):
            begin()


def test_images_of_another_shape_have_a_session_of_their_own(codec: Mantis) -> None:
    sender = ClientSession(codec.client_codec(), input_shape=(48, 32))
    receiver = ServerSession(codec.server_codec(), sender.hello)
    assert len(receiver.decode(sender.encode(images(2, 48)))) == 2
    with pytest.raises(ModelError, match=r"32x32 pixels; those of this session have 48x32"):
        sender.encode(images())


def test_a_shape_may_be_a_list_and_be_the_models_own(codec: Mantis) -> None:
    sender = ClientSession(codec.client_codec(), input_shape=[32, 32])  # type: ignore[arg-type]
    assert sender.hello == ClientSession(codec.client_codec()).hello
    receiver = ServerSession(codec.server_codec(), sender.hello)
    assert len(receiver.decode(sender.encode(images()))) == 4


def test_what_are_no_images_and_no_messages_is_said(codec: Mantis) -> None:
    sender = ClientSession(codec.client_codec())
    receiver = ServerSession(codec.server_codec(), sender.hello)
    with pytest.raises(ModelError, match="images are a list; allowed: a uint8 tensor"):
        sender.encode([1])  # type: ignore[arg-type]
    for wrong in ("hello", 7, [3, "a"]):
        with pytest.raises(ModelError, match=r"messages are .*; allowed: a list of bytes"):
            receiver.decode(wrong)  # type: ignore[arg-type]
    [message] = sender.encode(images(1))
    alone, listed = receiver.decode(message), receiver.decode([message])
    assert [facts(a) for a in alone] == [facts(a) for a in listed]


def test_many_messages_are_decoded_in_groups(
    codec: Mantis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many a call is given, no more than `max_total_pixels` are decoded at once."""
    sender, server = ClientSession(codec.client_codec()), codec.server_codec()
    server.stream_spec = replace(server.stream_spec, max_total_pixels=2 * 32 * 32)
    sizes: list[int] = []
    decode = server._decode_group

    def counted(group: Any, *more: Any) -> Any:
        sizes.append(len(group))
        return decode(group, *more)

    monkeypatch.setattr(server, "_decode_group", counted)
    receiver = ServerSession(server, sender.hello)
    answers = receiver.decode(sender.encode(images(5)))
    assert sizes == [2, 2, 1]
    assert [a.labels for a in answers] == [a.labels for a in codec.decode(codec.encode(images(5)))]


def test_tasks_are_named_in_sessions_of_requests_alone(codec: Mantis) -> None:
    detected = ClientSession(codec.client_codec())
    asked = ClientSession(codec.client_codec(), requests=True)
    with pytest.raises(ModelError, match="requests=True"):
        detected.encode(images(), "tools")
    with pytest.raises(ModelError, match="name the tasks"):
        asked.encode(images())
    with pytest.raises(ModelError, match="name the tasks"):
        ServerSession(codec.server_codec(), asked.hello).decode([b""])
    with pytest.raises(ModelError, match="asked for"):
        asked.encode(images(), "weather")


def test_a_server_trained_anew_reads_the_streams_of_old_clients(codec: Mantis) -> None:
    sender = ClientSession(codec.client_codec())
    sent, messages = codec.encode(images()), sender.encode(images())
    before = codec.ids()
    with torch.no_grad():
        next(codec.server.task_decoders.parameters()).add_(1)
    codec.load_state_dict(codec.state_dict())  # ids are made anew
    after = codec.ids()
    assert before.stream == after.stream
    assert before.model != after.model
    assert {a.model_id for a in codec.decode(sent)} == {after.model.hex()}
    receiver = ServerSession(codec.server_codec(), sender.hello)
    assert [facts(a) for a in receiver.decode(messages)] == [facts(a) for a in codec.decode(sent)]


def test_another_client_has_another_stream_id(codec: Mantis) -> None:
    before, sent = codec.ids(), codec.encode(images())
    with torch.no_grad():
        codec.client.encoder.to_latent.weight.mul_(1.5)
    codec.load_state_dict(codec.state_dict())
    assert codec.ids().stream != before.stream
    with pytest.raises(BitstreamError) as refused:
        codec.decode(sent)
    assert refused.value.reason is Reason.ANOTHER_MODEL


def test_a_model_of_version_1_keeps_its_streams_and_has_no_sessions(
    problem: Problem, codec_of: Callable[..., Mantis], tmp_path: Path
) -> None:
    made = codec_of(problem)
    old = Mantis(made.spec.model_copy(update={"stream_version": 1}))
    old.load_state_dict(made.state_dict())
    old.eval()
    save_model(tmp_path / "old", old, {})
    client, server = load_client(tmp_path / "old"), load_server(tmp_path / "old")
    assert client.ids.stream == client.ids.model == old.model_id()
    streams = client.encode(images())
    assert all(data[2] >> 4 == 1 for data in streams)
    assert len(server.decode(streams)) == 4
    with pytest.raises(BitstreamError, match="version 1"):
        ClientSession(client)
    with pytest.raises(BitstreamError, match="version 2, this model has version 1"):
        server.decode(made.encode(images()))
    np.testing.assert_array_equal(
        [a.class_index for a in server.decode(streams)],
        [a.class_index for a in made.decode(made.encode(images()))],
    )
