"""Tasks added to a trained codec: what is answered, what stays as it was, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mantis_core.codec.adding import check_unchanged, with_renamed, with_tasks, without_task
from mantis_core.codec.checkpoint import load_client, load_model, load_server, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import AddedTask
from mantis_core.errors import ModelError
from mantis_core.tasks import TaskSpec
from tests.mantis_core.narrow_resnet import NAME
from tests.pipelines.export.codecs import KINDS, codec_of

PLACES = AddedTask(task=TaskSpec("places", "classification", 3, labels=("sea", "town", "wood")))
GRASS = AddedTask(task=TaskSpec("grass", "segmentation", 2, labels=("none", "grass")))


def images(codec: Mantis, count: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    size = (count, 3, *codec.spec.image_size)
    return torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)


def ways(codec: Mantis) -> list[dict[str, Any]]:
    names = list(codec.spec.task_names)
    if codec.spec.model.requests == "asked":
        return [{"tasks": names}, {"tasks": names[:1]}]
    return [{}, {"tasks": names[:2]}] if codec.spec.model.requests == "both" else [{}]


@pytest.fixture(scope="module", params=sorted(KINDS))
def base(request: pytest.FixtureRequest) -> Mantis:
    return codec_of(request.param, NAME)


@pytest.fixture(scope="module")
def extended(base: Mantis) -> Mantis:
    torch.manual_seed(5)
    return with_tasks(base, [PLACES, GRASS])


def test_streams_and_answers_of_before_stay_to_the_bit(base: Mantis, extended: Mantis) -> None:
    for way in ways(base):
        check_unchanged(base, extended, images(base), **way)
    assert extended.ids().stream == base.ids().stream
    assert extended.ids().model != base.ids().model


def test_both_servers_read_the_streams_of_both_clients(base: Mantis, extended: Mantis) -> None:
    way = ways(base)[0]
    (stream,) = extended.encode(images(base, 1), **way)
    (known,) = base.decode([stream])
    (found,) = extended.decode([stream])
    assert found.tasks == (*known.tasks, "places", "grass")
    assert set(found.labels) - set(known.labels) == {"places"}
    assert found.label_names["places"] == PLACES.task.labels[found.labels["places"]]
    assert 0 < found.label_probability["places"] <= 1
    assert 0 < found.task_probability["places"] < 1
    assert found.segmentation["grass"].shape == base.spec.image_size
    assert (found.class_index, found.class_probability) == (
        known.class_index,
        known.class_probability,
    )


def test_only_the_tasks_that_are_wanted_are_answered(base: Mantis, extended: Mantis) -> None:
    streams = base.encode(images(base, 1), **ways(base)[0])
    server = extended.server_codec()
    (none,), (one,) = server.decode(streams, added=[]), server.decode(streams, added=["grass"])
    (known,) = base.decode(streams)
    assert none.tasks == known.tasks
    assert one.tasks == (*known.tasks, "grass")
    with pytest.raises(ModelError, match=r"\['animals'\] were not added.*places, grass"):
        server.decode(streams, added=["animals"])


def test_a_task_is_answered_from_streams_that_carry_what_it_needs() -> None:
    base = codec_of("asked", NAME)
    names = base.spec.task_names
    through = AddedTask(task=PLACES.task, through=names[:2])
    codec = with_tasks(base, [through])
    answered = {
        asked: "places" in codec.decode(codec.encode(images(base, 1), list(asked)))[0].tasks
        for asked in (names[:1], names[:2], names)
    }
    assert answered == {names[:1]: False, names[:2]: True, names: True}
    server = codec.server_codec()
    assert server.request_for("places") == list(names[:2])
    assert server.request_for(["places", names[2]]) == list(names[:3])
    assert server.request_for(names[0]) == [names[0]]
    with pytest.raises(ModelError, match=r"\['cars'\] asked for; this server answers animals"):
        server.request_for("cars")
    with pytest.raises(ModelError, match="this model has animals, tools, kitchen"):
        codec.encode(images(base, 1), "places")  # the client was not told


def test_a_child_is_answered_where_its_parent_admits_it() -> None:
    base = codec_of("detecting", NAME)
    breed = AddedTask(task=TaskSpec("sea", "classification", 2, parent="places"))
    codec = with_tasks(base, [PLACES, breed])
    tail: Any = codec.server.added.tails["places"]
    streams = base.encode(images(base, 2))
    for label, admitted in ((0, True), (1, False)):
        with torch.no_grad():
            tail.linear.bias.copy_(torch.tensor([9.0 * (label == 0), 9.0 * (label == 1), 0, 0]))
        for answer in codec.decode(streams):
            assert answer.labels["places"] == label
            assert ("sea" in answer.tasks) is admitted
            if admitted:
                assert answer.label_probability["sea"] < answer.label_probability["places"]


def test_halves_and_folders_keep_what_was_added(extended: Mantis, tmp_path: Path) -> None:
    save_model(tmp_path / "whole", extended, {"step": 1})
    for half in ("client", "server"):
        save_half(tmp_path / half, tmp_path / "whole", half)
    way = ways(extended)[0]
    streams = load_client(tmp_path / "client").encode(images(extended), **way)
    again = load_model(tmp_path / "whole")
    assert again.ids() == extended.ids()
    for codec in (load_server(tmp_path / "server"), again.server_codec()):
        found = [answer.to_dict() for answer in codec.decode(streams)]
        assert found == [answer.to_dict() for answer in extended.decode(streams)]
    tensors = load_client(tmp_path / "client").client.state_dict()
    assert not any("added" in name for name in tensors)


def test_a_task_is_renamed_and_removed_without_a_trace(base: Mantis, extended: Mantis) -> None:
    streams = base.encode(images(base), **ways(base)[0])
    renamed = with_renamed(extended, "places", "scenery")
    for one, other in zip(extended.decode(streams), renamed.decode(streams), strict=True):
        assert one.labels["places"] == other.labels["scenery"]
    assert [own.task.name for own in renamed.spec.added] == ["scenery", "grass"]
    rest = without_task(without_task(renamed, "scenery"), "grass")
    assert rest.ids() == base.ids()
    assert rest.state_dict().keys() == base.state_dict().keys()


def test_a_parent_stays_as_long_as_its_child() -> None:
    child = AddedTask(task=TaskSpec("sea", "classification", 2, parent="places"))
    codec = with_tasks(codec_of("mapped", NAME), [PLACES, child])
    with pytest.raises(ModelError, match="'places' is the parent of sea"):
        without_task(codec, "places")
    assert with_renamed(codec, "places", "land").spec.added[1].task.parent == "land"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (AddedTask(task=replace(PLACES.task, name="animals")), "two tasks are called 'animals'"),
        (AddedTask(task=PLACES.task, through=("cars",)), "through cars, and the client has"),
        (AddedTask(task=replace(PLACES.task, parent="cars")), "has no parent 'cars'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(added: AddedTask, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        with_tasks(codec_of("mapped", NAME), [added])


def test_tasks_of_the_client_are_neither_removed_nor_renamed(extended: Mantis) -> None:
    with pytest.raises(ModelError, match="one of the client's own"):
        without_task(extended, "tools")
    with pytest.raises(ModelError, match="one of the client's own"):
        with_renamed(extended, "tools", "toys")
    with pytest.raises(ModelError, match=r"no task 'cars' was added; added are places, grass"):
        without_task(extended, "cars")
    with pytest.raises(ModelError, match="two tasks are called 'tools'"):
        with_renamed(extended, "places", "tools")


def test_a_change_of_an_old_answer_is_found() -> None:
    base = codec_of("mapped", NAME)
    changed = with_tasks(base, [PLACES])
    with torch.no_grad():
        for weight in changed.server.tails.parameters():
            weight.add_(0.1)
    with pytest.raises(ModelError, match="answers to tasks of before have changed"):
        check_unchanged(base, changed, images(base))
    moved = with_tasks(base, [PLACES])
    with torch.no_grad():
        moved.client.encoder.to_latent.weight.add_(0.1)
    moved.train().eval()
    with pytest.raises(ModelError, match="streams of the client have changed"):
        check_unchanged(base, moved, images(base))
