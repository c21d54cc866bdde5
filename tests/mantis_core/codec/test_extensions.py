"""Extensions of a codec: streams of their own, and a codec that stays as it was, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mantis_core.bitstream.container import BitstreamError, Reason, peek
from mantis_core.codec.adding import (
    check_same_codec,
    check_unchanged,
    with_extension,
    with_renamed,
    with_tasks,
    without_task,
)
from mantis_core.codec.checkpoint import load_client, load_model, load_server, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import AddedTask
from mantis_core.device.requests import Way
from mantis_core.errors import ModelError
from mantis_core.networks.conditioning import CONDITIONING, READ_BY_TASK, Layers
from mantis_core.tasks import TaskSpec
from tests.mantis_core.codec.test_adding import GRASS, PLACES, images, ways
from tests.mantis_core.narrow_resnet import NAME
from tests.pipelines.export.codecs import codec_of

CARS = TaskSpec("cars", "classification", 2, labels=("no", "yes"))


def extended(base: Mantis, *tasks: TaskSpec, rank: int = 0) -> Mantis:
    """A codec with a finished extension whose weights have moved away from the codec's own."""
    torch.manual_seed(7)
    made = with_extension(base, tasks, rank=rank)
    number = len(made.spec.extensions) - 1
    with torch.no_grad():
        for parameter in made.extension(number).client.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    made.finish_extension(number)
    return made


@pytest.fixture(scope="module")
def base() -> Mantis:
    return codec_of("asked", NAME)


@pytest.fixture(scope="module")
def row(base: Mantis) -> Mantis:
    return extended(base, PLACES.task, GRASS.task)


@pytest.mark.parametrize("kind", CONDITIONING)
def test_the_rows_of_a_kind_are_what_grows_with_its_tasks(kind: str) -> None:
    layers = Layers((8, 4), (1, 1), 8)
    two, three = (
        dict(CONDITIONING[kind](count, layers, hidden=5).named_parameters()) for count in (2, 3)
    )
    grown = {
        (name, axis)
        for name, one in two.items()
        for axis, size in enumerate(one.shape)
        if three[name].shape[axis] != size
    }
    assert grown == set(READ_BY_TASK[kind])


@pytest.mark.parametrize("kind", ["asked", "attentive", "lite"])
@pytest.mark.parametrize("rank", [0, 1])
def test_streams_and_answers_of_before_stay_to_the_bit(kind: str, rank: int) -> None:
    before = codec_of(kind, NAME)
    after = extended(before, PLACES.task, rank=rank)
    for way in ways(before):
        check_unchanged(before, after, images(before, 2), **way)
    assert after.ids().stream == before.ids().stream
    assert after.ids().model != before.ids().model
    kept = after.state_dict()
    assert all(torch.equal(kept[name], t) for name, t in before.state_dict().items())
    streams = after.encode(images(before, 2), "places")
    assert {peek(stream)["stream_id"] for stream in streams} == {after.stream_ids()[1].hex()}
    answers = after.decode(streams)
    assert [answer.tasks for answer in answers] == [("places",)] * 2
    assert {answer.model_id for answer in answers} == {after.ids().model.hex()}


def test_an_untrained_extension_codes_what_the_codec_does_for_all_tasks(base: Mantis) -> None:
    made = with_extension(base, [PLACES.task], rank=1)
    made.finish_extension(0)
    picture = images(base, 1)
    mine, theirs = (
        next(iter(codec.look(picture, names))).latent
        for codec, names in (
            (made.client_codec().for_tasks("places"), "places"),
            (base.client_codec(), list(base.spec.task_names)),
        )
    )
    assert mine is not None
    assert theirs is not None
    assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=2e-2)


@pytest.mark.parametrize("part", ["client", "server"])
def test_a_child_whose_extension_of_before_is_another_is_refused(row: Mantis, part: str) -> None:
    child = extended(row, CARS)
    check_same_codec(row, child, 2)
    with torch.no_grad():
        for parameter in getattr(child.extension(0), part).parameters():
            parameter.mul_(1.5)
    said = {"client": "streams of the client have changed", "server": "answers to tasks of before"}
    with pytest.raises(ModelError, match=said[part]):
        check_same_codec(row, child, 2)


def test_streams_of_all_ids_are_decoded_in_one_list(base: Mantis, row: Mantis) -> None:
    picture, name = images(base, 1), base.spec.task_names[0]
    streams = [row.encode(picture, each)[0] for each in ("places", name, ["places", "grass"])]
    found = row.decode(streams)
    assert [answer.tasks for answer in found] == [("places",), (name,), ("places", "grass")]
    assert found[2].segmentation["grass"].shape == base.spec.image_size
    (alone,) = base.decode(streams[1:2])
    assert alone.labels == found[1].labels


def test_every_rate_level_and_bound_of_bytes_holds_for_an_extension(row: Mantis) -> None:
    picture = images(row, 1)
    sizes = [
        len(row.encode(picture, "places", level=level)[0]) for level in range(row.spec.rate_levels)
    ]
    (fitted,) = row.encode(picture, "places", max_bytes=sizes[2])
    assert len(fitted) <= sizes[2]
    encoded = row.encode_each_way(picture, [Way("places"), Way(row.spec.task_names[0])])
    assert len(encoded[0][0].data) == sizes[0]
    assert encoded[0][0].estimated_bits > 0


def test_tasks_of_two_streams_are_refused_together(row: Mantis) -> None:
    picture, name = images(row, 1), row.spec.task_names[0]
    for refused in (
        lambda: row.encode(picture, [name, "places"]),
        lambda: row.server_codec().request_for(["places", name]),
        lambda: row.client_codec().open(request=["grass", name]),
    ):
        with pytest.raises(
            ModelError, match=rf"sent in separate streams.*: {name}; (places|grass)"
        ):
            refused()
    with pytest.raises(ModelError, match=r"`mantis patch` gives the client what it lacks"):
        codec_of("asked", NAME).encode(picture, "places")
    assert row.server_codec().request_for(["places"]) == ["places"]


def test_a_session_carries_streams_of_one_id(row: Mantis) -> None:
    client, server = row.client_codec(), row.server_codec()
    picture, name = images(row, 1), row.spec.task_names[0]
    mine = client.open(request="places")
    theirs = server.open(mine.hello, request="places")
    (answer,) = theirs.decode(mine.encode(picture))
    assert answer.tasks == ("places",)
    mine.request = theirs.request = "grass"
    (answer,) = theirs.decode(mine.encode(picture))
    assert answer.tasks == ("grass",)
    for end in (mine, theirs):
        with pytest.raises(ModelError, match=f"tasks {name} are sent in streams of another id"):
            end.request = name
    other = client.open(request=name)
    with pytest.raises(ModelError, match="tasks places are sent in streams of another id"):
        other.encode(picture, "places")


def test_a_server_of_before_refuses_the_new_streams_by_their_id(base: Mantis, row: Mantis) -> None:
    (stream,) = row.encode(images(base, 1), "places")
    with pytest.raises(BitstreamError, match="decode it with the version of the model") as caught:
        base.decode([stream])
    assert caught.value.reason is Reason.ANOTHER_MODEL
    assert row.stream_ids()[1].hex() in str(caught.value)


def test_halves_and_folders_keep_extensions(row: Mantis, tmp_path: Path) -> None:
    save_model(tmp_path / "whole", row, {"step": 1})
    for half in ("client", "server"):
        save_half(tmp_path / half, tmp_path / "whole", half)
    again = load_model(tmp_path / "whole")
    assert again.stream_ids() == row.stream_ids()
    picture = images(row, 2)
    streams = row.encode(picture, ["places", "grass"])
    for client in (load_client(tmp_path / "client"), load_client(tmp_path / "whole")):
        assert client.encode(picture, ["places", "grass"]) == streams
        assert client.extensions[0].ids.stream == row.stream_ids()[1]
    known = [answer.to_dict() for answer in row.decode(streams)]
    for server in (load_server(tmp_path / "server"), load_server(tmp_path / "whole")):
        assert [answer.to_dict() for answer in server.decode(streams)] == known


def test_extensions_stand_beside_each_other_and_beside_tasks_of_the_server(base: Mantis) -> None:
    one = extended(with_tasks(base, [AddedTask(task=GRASS.task)]), PLACES.task)
    two = extended(one, CARS, rank=1)
    picture = images(base, 1)
    assert two.stream_ids()[:2] == one.stream_ids()
    assert len(set(two.stream_ids())) == 3
    assert two.encode(picture, "places") == one.encode(picture, "places")
    with pytest.raises(ModelError, match=r"sent in separate streams.*: places; cars"):
        two.encode(picture, ["cars", "places"])
    assert two.server_codec().request_for("grass") == list(base.spec.task_names)
    without = without_task(two, "places")
    assert without.stream_ids() == (two.stream_ids()[0], two.stream_ids()[2])
    assert without.encode(picture, "cars") == two.encode(picture, "cars")
    assert without_task(without_task(without, "cars"), "grass").ids() == base.ids()


def test_a_task_of_an_extension_is_renamed_and_removed(row: Mantis) -> None:
    picture = images(row, 1)
    (known,) = row.decode(row.encode(picture, "places"))
    renamed = with_renamed(row, "places", "scenery")
    (found,) = renamed.decode(renamed.encode(picture, "scenery"))
    assert found.labels["scenery"] == known.labels["places"]
    assert renamed.stream_ids()[0] == row.stream_ids()[0]
    assert renamed.stream_ids()[1] != row.stream_ids()[1]
    left = without_task(renamed, "grass")
    assert left.spec.families[1:] == (("scenery",),)
    (found,) = left.decode(left.encode(picture, "scenery"))
    assert found.labels["scenery"] == known.labels["places"]


@pytest.mark.parametrize(
    ("kind", "tasks", "more", "said"),
    [
        (
            "asked",
            [TaskSpec("animals", "classification", 2)],
            {},
            r"two tasks are called 'animals'",
        ),
        ("asked", [CARS, CARS], {}, "two tasks are called 'cars'"),
        ("asked", [CARS], {"through": ["sea"]}, "extend.through names sea, and the client has"),
        ("mapped", [CARS], {}, "conditioning.kind is features.*use the grade adapter or server"),
        (
            "asked",
            [TaskSpec("sea", "classification", 2, parent="animals")],
            {},
            "'sea' has its parent 'animals' in another stream",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, tasks: list[TaskSpec], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        with_extension(codec_of(kind, NAME), tasks, **more)


def test_a_codec_without_extensions_is_saved_as_before(base: Mantis, tmp_path: Path) -> None:
    save_model(tmp_path, base, {})
    assert "extension" not in (tmp_path / "config.yaml").read_text()
    assert "extension" not in (tmp_path / "meta.json").read_text()
