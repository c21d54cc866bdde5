"""benchmarks/serving: hostile bodies crash nothing, figures are right, a load loses nothing."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.serving import figures
from benchmarks.serving.__main__ import arguments_of
from benchmarks.serving.bodies import (
    KINDS,
    Asked,
    Material,
    asked_from,
    hostile,
    material_from,
    which_right,
)
from benchmarks.serving.load import Loaded, Sent
from benchmarks.serving.material import (
    another_server,
    images_of,
    jpegs_of,
    material_of,
    right_answers,
    streams_of,
)
from benchmarks.serving.plain import jpeg
from benchmarks.serving.services import part_of, served
from mantis_core.bitstream.container import BitstreamError, Reason, peek
from mantis_core.codec.checkpoint import load_client, load_server
from pipelines.serving.answering import Question, replies
from tests.pipelines.serving.conftest import saved

HOSTILE = 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return saved(tmp_path_factory.mktemp("serving") / "codec", 0)


@pytest.fixture(scope="module")
def material(folder: Path) -> Material:
    client = load_client(folder)
    images = images_of(client, [])[:2]
    return material_of(client, images, streams_of(client, images))


def test_hostile_bodies_are_refused_or_answered_and_crash_nothing(
    folder: Path, material: Material
) -> None:
    codec = load_server(folder)
    kinds: Counter[str] = Counter()
    for number in range(HOSTILE):
        kind, asked = hostile(number, material)
        kinds[kind] += 1
        if asked.path == "/v1/answers":
            (reply,) = replies(codec, [Question(asked.body)])
            assert reply.status in (200, 400, 404, 413), (number, kind, reply)
            if kind not in ("forged", "claims"):
                assert reply.status != 200, (number, kind)
    assert kinds.keys() == KINDS.keys()


def test_a_hostile_body_depends_on_its_number_alone(material: Material) -> None:
    through_json = material_from(json.loads(json.dumps(material.to_json())))
    assert through_json == material
    assert [hostile(n, material) for n in range(20)] == [hostile(n, material) for n in range(20)]


def test_forged_streams_pass_the_checksum_and_damaged_ones_do_not(material: Material) -> None:
    found: dict[str, set[Reason | None]] = {}
    for number in range(HOSTILE):
        kind, asked = hostile(number, material)
        reason = None
        try:
            peek(asked.body)
        except BitstreamError as error:
            reason = error.reason
        found.setdefault(kind, set()).add(reason)
    assert found["forged"] == found["another_id"] == {None}
    assert None in found["claims"]
    assert None not in found["flipped"] | found["truncated"] | found["noise"] | found["hello"]


def test_the_answer_of_each_model_is_right_and_no_other(folder: Path, material: Material) -> None:
    another_server(folder.parent / "another", folder, 1)
    servers = [load_server(each) for each in (folder, folder.parent / "another")]
    (asked, _) = right_answers(material.streams, servers)
    assert asked_from(json.loads(json.dumps(asked.to_json()))) == asked
    for place, server in enumerate(servers):
        (reply,) = replies(server, [Question(asked.body)])
        content = json.dumps(reply.content).encode()
        assert which_right(asked, content) == place
        wrong = content.replace(b'"class_index": ', b'"class_index": 1')
        assert which_right(asked, wrong) == -1
    for content in (b"", b"[]", b"null", b'{"answers": []}', b'{"answers": [3]}', b'{"error": ""}'):
        assert which_right(asked, content) == -1


def test_a_jpeg_is_answered_by_a_teacher(folder: Path) -> None:
    client = load_client(folder)
    reply = jpeg(client.spec)
    (asked,) = jpegs_of(images_of(client, [])[:1], 75, reply)
    assert asked.body.startswith(b"\xff\xd8")
    content = reply(asked.body)
    assert which_right(asked, json.dumps(content).encode()) == 0
    assert 0 <= content["answers"][0]["class_index"] < len(client.spec.classes)


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert figures.percentile(values[::-1], 0.5) == 50
    assert figures.percentile(values, 0.99) == 99
    assert figures.percentile([7.0], 0.99) == 7
    assert math.isnan(figures.percentile([], 0.5))


def loaded() -> Loaded:
    sent = (Sent(0.0, 0.01, 200, 0), Sent(0.0, 0.03, 200, -1), Sent(0.02, 0.04, 200, 1))
    return Loaded(2.0, 0.5, (*sent, Sent(0.05, 0.06, 503, -1), Sent(0.07, 0.09, 0, -1)))


def test_a_request_is_lost_without_a_right_answer() -> None:
    found = figures.of_load(loaded())
    assert (found["requests"], found["lost"]) == (5, 3)
    assert found["lost_statuses"] == {"0": 1, "200": 1, "503": 1}
    assert (found["per_second"], found["p50_ms"], found["load_cpu"]) == (1.0, 20.0, 0.25)
    assert figures.of_load(Loaded(1.0, 0.0))["p99_ms"] is None


def test_moments_of_a_load_are_found() -> None:
    sent = loaded().sent
    assert [figures.in_flight(sent, at) for at in (0.005, 0.025, 0.045)] == [2, 2, 0]
    assert figures.first_answer_of(sent, 1, 0.01) == pytest.approx(0.03)
    assert figures.first_answer_of(sent, 2, 0.01) is None


def test_cpu_is_shared_among_the_requests() -> None:
    found = figures.cpu_per_request({"front": 1.0}, {"front": 1.5, "replica": 0.25}, 100)
    assert found == {"front": 5.0, "replica": 2.5, "all": 7.5}


def test_losses_of_all_parts_and_errors_on_hostile_bodies_count() -> None:
    load = figures.of_load(loaded())
    assert figures.lost_anywhere({"cpus": 2, "kill": load, "hostile": {"with": load}}) == 6
    assert figures.lost_anywhere({"hostile": {"with": {"lost": 0}, "server_errors": 2}}) == 2


def test_every_part_has_its_table() -> None:
    load = figures.of_load(loaded())
    back = {"connected_s": 12.5, "both_again_s": None, "waited_s": 60.0}
    row = {**load, "cpu_ms": {"all": 7.5}, "idle_cpu": 0.1, "bytes": 53.6}
    result = {
        "throughput": {
            "mantis_serve": row,
            "fastapi": row,
            "jpeg": {**row, "random_weights": True},
        },
        "hostile": {
            "without": load,
            "with": load,
            "sent": 3,
            "seconds": 1.5,
            "kinds": {"forged": {"200": 2}, "noise": {"400": 1}},
            "memory_before": {"front": 100.5},
            "memory_after": {"front": 101.5},
        },
        "kill": {**load, "in_flight": 4, "asked_again": 2, **back},
        "promotion": {**load, "answers_after_s": [1.25, None]},
    }
    written = io.StringIO()
    console = Console(file=written, width=160)
    for table in figures.tables(result):
        console.print(table)
    text = " ".join(written.getvalue().split())
    for words in (
        "teacher, random weights",
        "53.6",
        "3 hostile requests in 1.5 s",
        "101.5",
        "1.25",
        "over 60",
    ):
        assert words in text


def test_processes_are_told_apart_by_their_titles() -> None:
    assert part_of("ray::ServeReplica:mantis:Answering") == "replica"
    assert part_of("ray::ServeReplica:mantis:Front.handle") == "front"
    assert part_of("python -m pipelines serve ray::ProxyActor") == "rest"


def test_the_service_is_the_command_that_users_run() -> None:
    words = served("models:/mantis@champion", 2, root=Path("runs"), every=0.5)
    assert words[:3] == ["pipelines", "serve", "models:/mantis@champion"]
    assert words[words.index("--replicas") + 1] == "2"
    assert words[-2:] == ["--root", "runs"]


@pytest.mark.parametrize(
    ("given", "told_words"),
    [
        (["--seconds", "61"], "--seconds is 61: give 60 or less"),
        (["--seconds", "0"], "0 is not a count"),
        (["--connections", "65"], "give 64 or less"),
        (["--hostile", "100001"], "give 100000 or less"),
        (["--quality", "96"], "give 95 or less"),
        (["--only", "speed"], "the parts are throughput, hostile, kill, promotion"),
    ],
)
def test_more_than_a_load_may_take_is_refused(
    given: list[str], told_words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments_of(["model", *given])
    assert ended.value.code == 2
    assert told_words in capsys.readouterr().err


def test_images_may_stand_behind_options() -> None:
    found = arguments_of(["model", "--seconds", "5", "a.jpg", "b.png", "--only", "kill,hostile"])
    assert found.images == [Path("a.jpg"), Path("b.png")]
    assert (found.seconds, found.connections, found.hostile) == (5, 8, 10_000)
    assert found.only == ["kill", "hostile"]


def test_a_request_goes_through_json_with_its_headers() -> None:
    asked = Asked(b"\x00\xff", "/v1/messages", {"Mantis-Hello": "q1M="}, ("a",))
    assert asked_from(json.loads(json.dumps(asked.to_json()))) == asked
