"""Runs all arms over the evaluation split in one pass, on Ray Data or in this process.

`ArmActor` runs in Ray Data actors and returns one row for each image and arm. This file collects
the rows, checks their number and computes figures. It writes no file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.manifest import Manifest
from data_prep.read.batches import eval_rows, local_batches
from data_prep.reading import ReadingConfig
from mantis_core.measure.metrics import (
    ImageRecords,
    chance,
    detection_curve,
    detector_confusion,
    figures,
)
from mantis_core.tasks import TaskSpec
from pipelines.cluster.machine import usable_cpus
from pipelines.evaluation.arms import SPLIT, ArmSource, Arrays
from pipelines.evaluation.rows import REQUESTED
from pipelines.training.files import COMPUTED_ON
from pipelines.training.problem import tasks_of

if TYPE_CHECKING:
    from pipelines.settings.sections import Settings


TEACHER = "teacher"
"""Name and kind of the arm that is the uncompressed teacher; an evaluation has one at most."""
ACTOR_BYTES = 2**30
"""Memory of an actor on a CPU: 0.5 to 0.75 GB for a process with torch, and the arms' weights."""


ACTOR_CPUS = 0.75
"""CPUs that an actor claims of Ray. It keeps one busy; the rest is for a task that reads rows."""
ACTORS_PER_GPU = 4
"""Actors that share a GPU: while one codes streams on its CPU, the others compute."""
MUCH = 2**60  # bytes, where Ray does not know the memory of a node


class EvaluationError(RuntimeError):
    """Raised if the evaluation lost or repeated rows. No figures are written."""


class ArmActor:
    """The Ray Data actor around an `ArmEvaluator`. Only the actor imports its libraries."""

    def __init__(self, *, actors: Mapping[str, int] | None = None, **arguments: Any) -> None:
        """`actors` is the number of actors on each node, which share the CPUs of theirs."""
        from pipelines.evaluation.answers import ArmEvaluator

        if actors is not None:
            import ray

            here = actors.get(ray.get_runtime_context().get_node_id(), 1)
            arguments["threads"] = max(1, usable_cpus() // here)
        self.evaluator = ArmEvaluator(**arguments)

    def __call__(self, batch: Arrays) -> Arrays:
        return self.evaluator(batch)


@dataclass(frozen=True)
class Evaluated:
    """The result of one pass over a split: the columns of each arm's answers, in row order.

    `computed_on` is the hardware of the evaluators, one entry for all that were alike.
    """

    answers: dict[str, Arrays]
    tasks: tuple[TaskSpec, ...]
    single_class: bool
    image_size: tuple[int, int]
    computed_on: tuple[dict[str, Any], ...] = ()


def evaluate_split(
    folder: str,
    manifest: Manifest,
    reading: ReadingConfig,
    sources: Sequence[ArmSource],
    *,
    settings: Settings,
    on_rows: Any = None,
) -> Evaluated:
    """Runs all arms over the split with Ray Data, on GPUs only if training workers have them too.

    Ray lets a process that asks for no GPU see all of them, so what it sees decides nothing.
    `on_rows` receives the rows done so far and the rows in all. Raises EvaluationError if a row is
    missing or repeated.
    """
    import ray

    rows, batch_size = manifest.split(SPLIT).rows, settings.evaluate.batch_size
    gpus = gpus_of_actor(settings.cluster.gpus_per_worker)
    room = room_for_actors(ray.nodes(), gpus)
    wanted = settings.cluster.evaluation_actors or room
    actors = max(1, min(wanted, room, -(-rows // batch_size)))
    dataset = eval_rows(folder, manifest, reading, SPLIT).map_batches(
        ArmActor,
        fn_constructor_kwargs={
            **_actor_arguments(manifest, sources, settings),
            "actors": actors_on_nodes(ray.nodes(), "GPU" if gpus else "CPU", actors),
            "device": "cuda" if gpus else "cpu",
            "workers": actors,
        },
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=ACTOR_CPUS,
        num_gpus=gpus or None,
    )
    parts: list[Arrays] = []
    seen = 0
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        parts.append(batch)
        seen += len(batch["arm"])
        if on_rows is not None:
            on_rows(seen // max(1, len(sources)), rows)
    return collected(parts, sources, manifest, single_class=decides_a_class(manifest, settings))


def decides_a_class(manifest: Manifest, settings: Settings) -> bool:
    """Returns whether an arm is judged by the class of an image: a server that asks wants none."""
    return manifest.single_class and settings.model.requests != "asked"


def gpus_of_actor(gpus_per_worker: float) -> float:
    """Returns the GPUs that an actor claims: a part of one where a training worker has a whole."""
    return 1 / ACTORS_PER_GPU if gpus_per_worker >= 1 else gpus_per_worker


def room_for_actors(nodes: Iterable[Mapping[str, Any]], gpus: float) -> int:
    """Returns how many actors the nodes have room for, at least 1. `nodes` is as `ray.nodes()`.

    Each keeps a CPU of its own busy, and claims `gpus` where that is not 0. Each is a process with
    torch and all arms, so a machine of many CPUs and little memory holds fewer.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return max(1, sum(_room(has, gpus) for has in alive))


def _room(has: Mapping[str, float], gpus: float) -> int:
    """Returns the number of actors of a node with these resources."""
    by_gpu = has.get("GPU", 0.0) / gpus if gpus else MUCH
    by_memory = max(1, has.get("memory", MUCH) // ACTOR_BYTES)
    return int(min(has.get("CPU", 0.0), by_gpu, by_memory))


def actors_on_nodes(nodes: Iterable[Mapping[str, Any]], kind: str, actors: int) -> dict[str, int]:
    """Returns how many of `actors` each node is expected to hold, by the node's id.

    Ray spreads actors by what nodes have of `kind`, "CPU" or "GPU". `nodes` is as `ray.nodes()`.
    """
    own = {n["NodeID"]: n["Resources"].get(kind, 0.0) for n in nodes if n["Alive"]}
    total = sum(own.values()) or 1.0
    return {node: math.ceil(actors * amount / total) for node, amount in own.items() if amount}


def evaluate_locally(
    folder: str,
    manifest: Manifest,
    reading: ReadingConfig,
    sources: Sequence[ArmSource],
    *,
    settings: Settings,
    threads: int,
) -> Evaluated:
    """Does the same in this process, without Ray, on a GPU if there is one.

    `threads` are those of torch.
    """
    from torch.cuda import is_available

    from pipelines.evaluation.answers import ArmEvaluator

    evaluator = ArmEvaluator(
        **_actor_arguments(manifest, sources, settings),
        threads=threads,
        device="cuda" if is_available() else "cpu",
        workers=1,
    )
    size = settings.evaluate.batch_size
    batches = local_batches(folder, manifest, reading, split=SPLIT, global_batch=size)
    parts = [evaluator(batch) for batch in batches]
    return collected(parts, sources, manifest, single_class=decides_a_class(manifest, settings))


def _actor_arguments(
    manifest: Manifest, sources: Sequence[ArmSource], settings: Settings
) -> dict[str, Any]:
    """Returns what each ArmActor is to measure, as plain picklable values."""
    return {
        "sources": [asdict(source) for source in sources],
        "settings": settings.model_dump(mode="json"),
        "manifest": manifest.model_dump(mode="json"),
        "batch_size": settings.evaluate.batch_size,
    }


def collected(
    parts: Sequence[Arrays],
    sources: Sequence[ArmSource],
    manifest: Manifest,
    *,
    single_class: bool,
) -> Evaluated:
    """Returns the answers of all batches by arm.

    Raises EvaluationError if a row is missing or repeated.
    """
    rows = manifest.split(SPLIT).rows
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    stated = found.pop(COMPUTED_ON, np.array([], dtype=object)).tolist()
    hardware = tuple(json.loads(each) for each in sorted(set(stated) - {""}))
    answers = {}
    for number, source in enumerate(sources):
        own = np.flatnonzero(found["arm"] == number)
        own = own[np.argsort(found["row_id"][own], kind="stable")]
        ids = found["row_id"][own]
        if len(ids) != rows or len(np.unique(ids)) != rows:
            raise EvaluationError(
                f"{source.name}: {len(ids)} answers ({len(np.unique(ids))} different rows) for the "
                f"{rows} rows of {SPLIT}; run the evaluation again"
            )
        answers[source.name] = {name: values[own] for name, values in found.items()}
    tasks, size = tasks_of(manifest), manifest.image_size
    return Evaluated(answers, tasks, single_class, size, hardware)


def hardware_of(parts: Iterable[Evaluated]) -> tuple[dict[str, Any], ...]:
    """Returns the hardware of several passes, without repetition."""
    found: list[dict[str, Any]] = []
    for part in parts:
        found += [each for each in part.computed_on if each not in found]
    return tuple(found)


def arm_figures(done: Evaluated, name: str) -> dict[str, Any]:
    """Returns an arm's `metrics`, `detector_confusion` and `detection_curve`.

    The confusion is None for an arm without detector. The curve is None for an arm that does not
    rank tasks; a teacher with flat classes does. Beside the uncompressed teacher, every other arm
    that classifies has figures of its agreement with it.
    """
    own = done.answers[name]
    teacher = None if name == TEACHER else done.answers.get(TEACHER)
    records = to_records(own, done.tasks, teacher)
    height, width = done.image_size
    metrics = figures(records, done.tasks, single_class=done.single_class, pixels=height * width)
    confusion = None
    if records.probabilities is not None:
        confusion = detector_confusion(records.probabilities, records.task_mask)
    ranks = own["probabilities"][0, 0] >= 0 and records.task_mask.any()
    curve = detection_curve(own["probabilities"], records.task_mask) if ranks else None
    return {"metrics": metrics, "detector_confusion": confusion, "detection_curve": curve}


def chance_of(done: Evaluated) -> float | None:
    """Returns the top1 of always giving the most frequent answer. None without classification."""
    own = next(iter(done.answers.values()))
    return chance(to_records(own, done.tasks), done.tasks, single_class=done.single_class)


def _told(own: Arrays, name: str) -> int | None:
    """Returns the value that a column has in all rows, None for -1 and for no such column."""
    value = int(own[name][0]) if name in own else -1
    return value if value >= 0 else None


def _answers(teacher: Arrays | None, name: str) -> np.ndarray[Any, Any] | None:
    """Returns a column of the teacher, None for -1 in all rows and for no teacher."""
    return teacher[name] if teacher is not None and (teacher[name] >= 0).any() else None


def to_records(
    own: Arrays, tasks: Sequence[TaskSpec], teacher: Arrays | None = None
) -> ImageRecords:
    """Returns an arm's columns as records, beside those of the uncompressed `teacher`.

    Columns of -1 become None. Both have the same images in the same order.
    """
    sends = own["wire_bytes"][0] >= 0
    detects = sends and own["probabilities"][0, 0] >= 0
    confusion = {}
    for task in tasks:
        if not task.is_classification:
            counted = [
                np.frombuffer(sums, np.int64) for sums in own[f"confusion/{task.name}"] if sums
            ]
            shape = (task.num_classes, task.num_classes + 1)
            confusion[task.name] = np.sum(counted, axis=0).reshape(shape)
    return ImageRecords(
        class_label=own["class_label"],
        labels=own["labels"],
        task_mask=own["task_mask"].astype(bool),
        class_index=own["class_index"],
        predicted=own["predicted"],
        decoded=own["decoded"].astype(bool),
        sent=own["sent"].astype(bool) if "sent" in own and detects else None,
        probabilities=own["probabilities"] if detects else None,
        wire_bytes=own["wire_bytes"] if sends else None,
        payload_bytes=own["payload_bytes"] if sends else None,
        session_bytes=own["session_bytes"] if (own["session_bytes"] >= 0).all() else None,
        estimated_bits=own["estimated_bits"] if (own["estimated_bits"] >= 0).all() else None,
        answered=own["answered"] if sends else None,
        client_class=own["client_class"] if (own["client_class"] >= 0).any() else None,
        **{name: own[name] for name in REQUESTED if name in own and (own[name] >= 0).any()},
        client_macs=_told(own, "client_macs"),
        client_bytes=_told(own, "client_bytes"),
        teacher_class=_answers(teacher, "class_index"),
        teacher_predicted=_answers(teacher, "predicted"),
        confusion=confusion,
    )
