"""A pass over the evaluation split, its models left out: every row once, whatever dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest
from data_prep.prepare.shards import prepare
from data_prep.tasks import resolve_tasks
from mantis_core.config import TeacherConfig
from mantis_core.networks.inference import computes_in_tf32
from mantis_core.tasks import Problem
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.teacher import new_teacher
from pipelines.evaluation import split_pass
from pipelines.evaluation.arms import SPLIT, ArmSource, Arrays
from pipelines.evaluation.split_pass import (
    EvaluationError,
    actors_on_nodes,
    collected,
    evaluate_locally,
    evaluate_split,
    hardware_of,
)
from pipelines.settings.sections import Settings

SOURCES = [ArmSource("one", "teacher", None), ArmSource("two", "teacher", None)]


class Dying:
    """An actor that answers nothing but who it was asked; the first to have a batch dies of it."""

    def __init__(self, *, settings: dict[str, Any], **_: Any) -> None:
        self.flag = Path(settings["storage"]["root"], "died")

    def __call__(self, batch: Arrays) -> Arrays:
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rows = len(batch["row_id"])
        return {
            "row_id": np.tile(batch["row_id"], 2),
            "arm": np.repeat([0, 1], rows),
            "process": np.full(2 * rows, os.getpid()),
        }


def prepared(root: Path, **how: Any) -> tuple[Settings, Manifest]:
    source = {"kind": "shapes", "train_rows": 20, "val_rows": 200, "size": 32}
    settings = Settings.model_validate(
        {
            "data": {"sources": [source], "image_size": 32, "row_group_rows": 4},
            "tasks": [{"name": "outline", "classes_from": "shapes"}],
            "evaluate": {"batch_size": 7},
            "cluster": {"evaluation_actors": 2},  # as many as CPUs: one is left to the reader
            "storage": {"root": str(root)},
        }
    )
    table = resolve_tasks(settings.tasks, settings.data)
    return settings, prepare(settings.data, table, seed=0, output=str(root / "shards"), **how)


@pytest.mark.faults
@pytest.mark.usefixtures("ray_session")
def test_a_dead_actor_loses_and_doubles_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest = prepared(tmp_path)
    monkeypatch.setattr(split_pass, "ArmActor", Dying)
    shards = str(tmp_path / "shards")
    done = evaluate_split(shards, manifest, settings.data.reading, SOURCES, settings=settings)
    assert (tmp_path / "died").exists()
    for source in SOURCES:
        ids = done.answers[source.name]["row_id"]
        assert len(ids) == len(np.unique(ids)) == manifest.split(SPLIT).rows > 2 * 7
    assert (np.diff(done.answers["one"]["row_id"]) > 0).all()


@pytest.mark.usefixtures("ray_session")
def test_a_row_that_is_lost_or_doubled_is_no_evaluation(tmp_path: Path) -> None:
    _, manifest = prepared(tmp_path)
    rows = manifest.split(SPLIT).rows
    arm, ids = np.repeat([0, 1], rows), np.tile(np.arange(rows), 2)
    collected([{"arm": arm, "row_id": ids}], SOURCES, manifest, single_class=True)
    with pytest.raises(EvaluationError, match=f"two: {rows - 1} answers"):
        collected([{"arm": arm[:-1], "row_id": ids[:-1]}], SOURCES, manifest, single_class=True)
    doubled = np.where(np.arange(2 * rows) == 5, 4, ids)
    with pytest.raises(
        EvaluationError, match=rf"one: {rows} answers \({rows - 1} different rows\)"
    ):
        collected([{"arm": arm, "row_id": doubled}], SOURCES, manifest, single_class=True)


class Reader:
    """Stands for Ray's dataset: builds the actor where it is and answers every row with nothing."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.evaluator: Any = None
        self.asked: dict[str, Any] = {}

    def map_batches(
        self, actor: Any, *, fn_constructor_kwargs: dict[str, Any], **asked: Any
    ) -> Any:
        self.evaluator = actor(**fn_constructor_kwargs).evaluator
        self.asked = asked
        return self

    def iter_batches(self, **_: Any) -> list[Arrays]:
        return [{"arm": np.zeros(self.rows, int), "row_id": np.arange(self.rows)}]


def prepared_here(root: Path) -> tuple[Settings, Manifest]:
    """As `prepared`, without Ray."""
    return prepared(root, run=lambda tables, function, job: [function(t, job=job) for t in tables])


def test_arms_stay_on_the_cpu_unless_training_workers_have_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest = prepared_here(tmp_path)
    reader = Reader(manifest.split(SPLIT).rows)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 3.0, "GPU": 2.0}}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    monkeypatch.setattr(split_pass, "eval_rows", lambda *_: reader)
    monkeypatch.setattr("pipelines.evaluation.answers._load", lambda *_: torch.nn.Identity())
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    own = (str(tmp_path / "shards"), manifest, settings.data.reading, SOURCES[:1])
    evaluate_split(*own, settings=settings)
    assert reader.evaluator.device.type == "cpu"
    assert reader.asked["num_gpus"] is None
    assert reader.evaluator.computed_on["workers"] == 2
    cluster = settings.cluster.model_copy(update={"gpus_per_worker": 1.0})
    evaluate_split(*own, settings=settings.model_copy(update={"cluster": cluster}))
    assert reader.evaluator.device.type == "cuda"
    assert reader.asked["num_gpus"] == 1 / split_pass.ACTORS_PER_GPU


def test_a_pass_says_what_it_was_computed_on_and_computes_without_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest = prepared_here(tmp_path)
    tf32: list[bool] = []

    def teacher(settings: Settings, problem: Problem, folder: None) -> Teacher:
        config = TeacherConfig(name="shufflenet_v2_x0_5", split="stage2")
        made = new_teacher(config, problem)
        made.register_forward_hook(lambda *_: tf32.append(computes_in_tf32()))
        return made

    monkeypatch.setattr("pipelines.evaluation.answers.load_teacher", teacher)
    folder = str(tmp_path / "shards")
    done = evaluate_locally(
        folder, manifest, settings.data.reading, SOURCES, settings=settings, threads=1
    )
    (hardware,) = done.computed_on
    assert (hardware["device"], hardware["precision"]) == ("cpu", "float32")
    assert (hardware["tf32"], hardware["workers"]) == (False, 1)
    assert "computed_on" not in done.answers["one"]
    assert set(tf32) == {False}
    assert hardware_of([done, done]) == done.computed_on


@pytest.mark.parametrize(
    ("resources", "gpus", "expected"),
    [
        ([{"CPU": 16, "memory": 8e9}], 0, 7),
        ([{"CPU": 16, "memory": 64e9}], 0, 16),
        ([{"CPU": 2}], 0, 2),
        ([{"CPU": 1, "memory": 1e8}], 0, 1),
        ([{"CPU": 4, "memory": 1e8}, {"CPU": 8, "memory": 6e9}, {"memory": 9e9}], 0, 6),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 16, "GPU": 1}, {"CPU": 8}], 0.25, 12),
        ([{"CPU": 3, "GPU": 2}], 0.25, 3),
        ([{"CPU": 16, "GPU": 1, "memory": 2.5e9}], 0.25, 2),
    ],
)
def test_there_are_as_many_actors_as_gpus_cpus_and_memory_hold(
    resources: list[dict[str, float]], gpus: float, expected: int
) -> None:
    nodes = [{"Alive": True, "Resources": has} for has in resources]
    dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
    assert split_pass.room_for_actors([*nodes, dead], gpus) == expected


@pytest.mark.parametrize(
    ("of_worker", "of_actor"), [(0, 0), (0.125, 0.125), (0.5, 0.5), (1, 0.25), (8, 0.25)]
)
def test_several_actors_share_a_gpu(of_worker: float, of_actor: float) -> None:
    assert split_pass.gpus_of_actor(of_worker) == of_actor


def test_actors_share_the_cpus_of_their_own_node() -> None:
    def node(name: str, cpus: float, gpus: float = 0.0, *, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}

    assert actors_on_nodes([node("one", 4)], "CPU", 3) == {"one": 3}
    small_head = [
        node("head", 4),
        node("a", 16, 1),
        node("b", 16, 1),
        node("lost", 16, alive=False),
    ]
    assert actors_on_nodes(small_head, "GPU", 2) == {"a": 1, "b": 1}
    assert actors_on_nodes(small_head, "CPU", 9) == {"head": 1, "a": 4, "b": 4}


def test_an_actor_takes_its_threads_from_the_node_it_is_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    from pipelines.evaluation import answers

    class Here:
        def get_node_id(self) -> str:
            return "b"

    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "get_runtime_context", Here)
    monkeypatch.setattr(split_pass, "usable_cpus", lambda: 16)
    monkeypatch.setattr(answers, "ArmEvaluator", lambda **arguments: given.update(arguments))
    split_pass.ArmActor(actors={"a": 8, "b": 3}, device="cpu")
    assert given == {"threads": 5, "device": "cpu"}
    split_pass.ArmActor(actors={"a": 8, "b": 99})
    assert given["threads"] == 1
    split_pass.ArmActor(threads=7)
    assert given["threads"] == 7
