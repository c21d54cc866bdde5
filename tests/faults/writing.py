"""A process that does nothing but write what a chain leaves behind, and a look at it after a kill.

No Ray is started: checkpoints go through Ray Train's own storage and checkpoint manager, all else
through the functions the stages use. test_kills_while_writing.py kills it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ray.train import Checkpoint, CheckpointConfig

from data_prep.manifest import Manifest, ShardInfo, SplitInfo, read_manifest, write_manifest
from data_prep.storage import delete_file, write_bytes
from mantis_core.folders import load_folder, save_folder, save_training_state
from pipelines.search.journal import Journal, TrialRecord
from pipelines.settings.sections import Settings
from pipelines.stages.order import STAGES
from pipelines.stages.record import mark_done, mark_started, stage_state
from pipelines.stages.spec import StageSpec
from pipelines.storage import Store
from pipelines.tracking.metric_writer import MetricWriter
from pipelines.training.checkpoints import drop_notes, newest_intact
from tests.ray_private import CheckpointManager, StorageContext, _TrainingReport

KEY = "0" * 64
PIXELS = 300_000  # of a tensor or shard: a write takes long enough to be hit


def write_for_ever(root: str, done: Any) -> None:
    """Goes on with what is there. `done` (a shared integer) is the last step that was reported."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    tempfile.tempdir = f"{root}/temporary"  # what a kill leaves there goes with the test's folder
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    asyncio.run(_write(root, done))


def findings(root: Path, done: int) -> list[str]:
    """What a command started after the kill could not use, or would take for finished; and whether
    more was lost than the checkpoint that was being written."""
    store, found = Store(root), []
    training = Store(root / "training" / KEY)
    drop_notes(training)
    manager(root)  # raises where Ray Train could not start
    newest = newest_intact(training, note=lambda text: None)
    step = newest.record["step"] if newest else 0
    if step < done:
        found.append(f"step {done} was reported, the newest intact checkpoint is of step {step}")
    for number in (1, 2):
        spec = stage(root, number)
        if stage_state(store, spec, None) == "done":
            tensors, _, meta = load_folder(f"{spec.folder}/checkpoint")
            history = store.read_json(f"{spec.folder}/history.json")
            if {float(t.max()) for t in tensors.values()} != {meta["round"]} or not history:
                found.append(f"{spec.name} is done and not of one piece")
    if (root / "prepared/manifest.json").exists():
        for shard in read_manifest(f"{root}/prepared").split("train").shards:
            file = root / "prepared" / shard.path
            if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != shard.sha256:
                found.append(f"the manifest is there, and {shard.path} is damaged")
    epochs = [len(trial.epochs) for trial in Journal(store, "searches/s").trials.values()]
    if epochs and min(epochs[:-1], default=2) < 2:
        found.append(f"the journal has lost an epoch: {epochs}")
    spool = root / "spool/key.jsonl"
    lines = spool.read_text().splitlines() if spool.exists() else []
    steps = [json.loads(line)["step"] for line in lines]
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"the spool has steps {steps}")
    return found


def stage(root: Path | str, number: int) -> StageSpec:
    """A finished training of the chain, as far as its record is concerned."""
    folder = f"{root}/stages/stage{number}-000000000000"
    kind: Any = f"stage{number}"
    known = (STAGES[kind], kind, "", {}, (), KEY, KEY, folder)
    return StageSpec(*known, settings=Settings.model_construct())


def manager(root: Path | str) -> CheckpointManager:
    """Ray Train's record of its checkpoints, read from storage if it is there."""
    context = StorageContext(f"{root}/training", KEY)
    return CheckpointManager(CheckpointConfig(num_to_keep=2), context)


async def _write(root: str, done: Any) -> None:
    training = Store(f"{root}/training/{KEY}")
    drop_notes(training)
    checkpoints = manager(root)
    newest = newest_intact(training, note=lambda text: None)
    journal = Journal(Store(root), "searches/s")
    spool = MetricWriter("sqlite://", None, Path(root) / "spool/key.jsonl")
    step = newest.record["step"] if newest else 0
    parts = [
        lambda: _stages(Store(root), root, step),
        lambda: _prepared(f"{root}/prepared", step),
        lambda: _trial(journal),
        lambda: spool.write({"epoch": _lines(spool.spool) + 1, "train/loss": 0.5}),
    ]
    random.shuffle(parts)  # so that a kill soon after a checkpoint may hit any of them
    while True:
        step += 1
        _checkpoint(checkpoints, step)
        done.value = step
        for part in parts:
            part()
        await asyncio.sleep(0)


def _checkpoint(checkpoints: CheckpointManager, step: int) -> None:
    """As `report_checkpoint` and Ray Train do it between them."""
    folder = tempfile.mkdtemp(prefix="mantis-epoch-")
    try:
        state = {f"student/{n}": torch.full((PIXELS,), float(step)) for n in range(3)}
        save_training_state(folder, state, {"step": step, "history": [{"epoch": step}]})
        context = checkpoints._storage_context
        name = context.make_default_checkpoint_dir_name()
        stored = context.persist_current_checkpoint(Checkpoint.from_directory(folder), name)
    finally:
        shutil.rmtree(folder)
    report = _TrainingReport(checkpoint=stored, metrics={"epoch": step}, validation=False)
    checkpoints.register_checkpoint(report)


def _stages(store: Store, root: str, round_number: int) -> None:
    for number in (1, 2):
        spec = stage(root, number)
        mark_started(store, spec)
        tensors = {f"w{n}": torch.full((PIXELS,), float(round_number)) for n in range(2)}
        with tempfile.TemporaryDirectory() as folder:
            save_folder(folder, tensors, {}, {"round": float(round_number)})
            store.upload_folder(folder, f"{spec.folder}/checkpoint")
        store.write_json(f"{spec.folder}/history.json", [{"epoch": 1.0}])
        mark_done(store, spec, {"metrics": {}}, None)


def _prepared(folder: str, round_number: int) -> None:
    """As data_prep.prepare.shards.prepare ends: no manifest while shards are written."""
    delete_file(f"{folder}/manifest.json")
    shards = tuple(_shards(folder, round_number))
    split = SplitInfo(rows=4, bytes=sum(shard.bytes for shard in shards), shards=shards)
    manifest = Manifest(
        image_size=(8, 8),
        tasks=(),
        classes=(),
        class_names=(),
        single_class=True,
        seed=0,
        splits={"train": split},
        unassigned={},
        rejected=0,
        fingerprint="",
        sources=(),
    )
    write_manifest(folder, manifest)


def _shards(folder: str, round_number: int) -> Iterator[ShardInfo]:
    for number in range(2):
        content = bytes([round_number % 256]) * PIXELS
        path, digest = f"shards/train-{number:05d}.parquet", hashlib.sha256(content).hexdigest()
        write_bytes(f"{folder}/{path}", content)
        yield ShardInfo(path=path, rows=2, bytes=len(content), sha256=digest, row_group_rows=(2,))


def _trial(journal: Journal) -> None:
    """A trial of two epochs; one that a kill left open is ended first."""
    open_trials = [record for record in journal.trials.values() if record.state == "running"]
    if not open_trials:
        open_trials = [TrialRecord(len(journal.trials), {}, 0.5)]
        journal.asked(open_trials[0])
    for epoch in (1.0, 2.0):
        journal.epoch(open_trials[0].number, {"epoch": epoch})
    journal.ended(open_trials[0].number, "finished")


def _lines(path: Path | None) -> int:
    assert path is not None
    return len(path.read_text().splitlines()) if path.exists() else 0
