"""benchmarks/plain_chain.py: finished trainings of the same recipe, made by other code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks.plain_chain import adopt, train_plain
from pipelines.run_record import mark_done, mark_started
from pipelines.settings import load_settings
from pipelines.stages import Plan, make_plan
from pipelines.storage import Store
from tests.pipelines.chain import paint, write_config


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    paint(tmp_path / "images", train=2)
    root = f"storage.root={tmp_path / 'runs'}"
    return make_plan(load_settings(str(write_config(tmp_path)), [root]))


def leave(plan: Plan, name: str, *, recipe: str | None = None, done: bool = True) -> str:
    """What other code leaves of a stage: its folder, under another key."""
    spec = next(spec for spec in plan.specs if spec.name == name)
    key = "f" * 64
    other = replace(
        spec,
        key=key,
        recipe=recipe or spec.recipe,
        folder=spec.folder.replace(spec.key[:12], key[:12]),
    )
    store = Store(plan.settings.storage.root)
    mark_started(store, other)
    if done:
        mark_done(store, other, {"metrics": {}}, plan.settings.tracking.uri)
    return other.folder


def folder_of(plan: Plan, name: str) -> str:
    return next(spec.folder for spec in plan.specs if spec.name == name)


def test_a_finished_training_of_the_same_recipe_is_taken(plan: Plan) -> None:
    left = leave(plan, "stage2")
    taken = adopt(plan)
    assert folder_of(taken, "stage2") == left != folder_of(plan, "stage2")
    assert folder_of(taken, "stage1") == folder_of(plan, "stage1")


@pytest.mark.parametrize(("recipe", "done"), [("another", True), (None, False)])
def test_another_recipe_and_an_unfinished_training_are_not(
    plan: Plan, recipe: str | None, done: bool
) -> None:
    leave(plan, "stage2", recipe=recipe, done=done)
    assert adopt(plan) == plan


def test_histories_of_finished_trainings_are_given_without_training(plan: Plan) -> None:
    for name in ("stage1", "stage2"):
        spec = next(spec for spec in plan.specs if spec.name == name)
        store = Store(plan.settings.storage.root)
        mark_started(store, spec)
        store.write_json(f"{spec.folder}/history.json", [{"epoch": 1.0, "train/loss": 2.0}])
        mark_done(store, spec, {"metrics": {}}, plan.settings.tracking.uri)
    found = list(train_plain([plan], prepared="nowhere", jobs=1, say=print))
    assert found == [(0, [{"epoch": 1.0, "train/loss": 2.0}])]


BUSY = """
import os, time
from benchmarks.plain_chain import _pool
from benchmarks.program import one_message

@one_message
def main():
    with _pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()

if __name__ == "__main__":
    main()
"""


def test_trainings_end_with_the_study_that_is_killed() -> None:
    study = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert study.stdout is not None
        with study.stdout:
            training = psutil.Process(int(study.stdout.readline()))
        assert training.is_running()
    finally:
        study.kill()
        study.wait()
    _, left = psutil.wait_procs([training], timeout=60)
    assert not left


def test_ctrl_c_ends_a_study_and_its_trainings_with_one_line() -> None:
    study = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", BUSY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert study.stdout is not None
    training = psutil.Process(int(study.stdout.readline()))
    os.killpg(study.pid, signal.SIGINT)
    _, told = study.communicate(timeout=60)
    assert study.returncode == 130
    assert [line for line in told.splitlines() if "Warning" not in line and "warn" not in line] == [
        "interrupted: the same command again takes what is finished as it is"
    ]
    _, left = psutil.wait_procs([training], timeout=60)
    assert not left
