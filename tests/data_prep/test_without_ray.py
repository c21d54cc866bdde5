"""Preparing and reading in a plain process, where Ray cannot be imported."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep.read.batches import local_batches

MODULES = (
    "data_prep.config",
    "data_prep.finding",
    "data_prep.prepare.shards",
    "data_prep.read.batches",
    "data_prep.tasks",
)
SCRIPT = """
import sys
sys.modules["ray"] = None  # importing it raises

import hashlib
import json
from data_prep.config import DataConfig, TaskConfig
from data_prep.prepare.shards import prepare
from data_prep.read.batches import local_batches
from data_prep.tasks import resolve_tasks

folder, data, tasks = sys.argv[1], *map(json.loads, sys.argv[2:])
data = DataConfig.model_validate(data)
manifest = prepare(
    data,
    resolve_tasks([TaskConfig.model_validate(task) for task in tasks], data),
    seed=3,
    output=folder,
    run=lambda tables, function, job: (function(table, job=job) for table in tables),
)
images = hashlib.sha256()
for batch in local_batches(folder, manifest, data.reading, epoch=0, global_batch=16, threads=2):
    images.update(batch["image"].tobytes())
print(json.dumps([manifest.fingerprint, images.hexdigest()]))
"""


def python(script: str, *arguments: str) -> str:
    """Runs a script in a new interpreter; returns what it printed."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_plain_process_prepares_and_reads_the_same_bytes(
    shapes: Any, shape_tasks: Any, tmp_path: Path
) -> None:
    tasks = json.dumps([task.model_dump() for task in shape_tasks])
    told = python(SCRIPT, str(tmp_path), shapes.data.model_dump_json(), tasks)
    images = hashlib.sha256()
    for batch in local_batches(
        shapes.folder, shapes.manifest, shapes.data.reading, epoch=0, global_batch=16
    ):
        images.update(batch["image"].tobytes())
    assert json.loads(told) == [shapes.manifest.fingerprint, images.hexdigest()]
    for split in shapes.manifest.splits.values():
        for shard in split.shards:
            plain = (tmp_path / shard.path).read_bytes()
            assert hashlib.sha256(plain).hexdigest() == shard.sha256


def test_imports_do_not_load_ray() -> None:
    assert python(f"import sys, {', '.join(MODULES)}; print('ray' in sys.modules)") == "False\n"
