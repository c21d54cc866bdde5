"""Adopting finished stages of the same recipe, made by other code; processes of the plain chain."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipelines.chain.earlier import recipes_before
from pipelines.chain.plain import train_plain
from pipelines.chain.plan import Plan, make_plan, with_adopted
from pipelines.chain.processes import pool_of
from pipelines.chain.result import note_adopted
from pipelines.settings.reading import load_settings
from pipelines.stages.record import mark_done, mark_started
from pipelines.storage import Store
from pipelines.terminal.console import Console
from tests.pipelines.experiment import paint, write_config


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


def adopt(plan: Plan) -> Plan:
    return replace(plan, specs=with_adopted(plan.specs, plan.settings, search=True))


def folder_of(plan: Plan, name: str) -> str:
    return next(spec.folder for spec in plan.specs if spec.name == name)


def test_a_finished_training_of_the_same_recipe_is_taken(plan: Plan) -> None:
    left = leave(plan, "stage2")
    taken = adopt(plan)
    assert folder_of(taken, "stage2") == left != folder_of(plan, "stage2")
    assert folder_of(taken, "stage1") == folder_of(plan, "stage1")


def test_a_training_of_earlier_code_is_found_by_its_recipe_of_then(plan: Plan) -> None:
    left = leave(plan, "stage2", recipe=recipes_before(plan.specs)["stage2"])
    assert folder_of(adopt(plan), "stage2") == left


def test_an_adopted_stage_stays_adopted_and_says_so(
    plan: Plan,
) -> None:
    left = leave(plan, "stage2")
    taken, stream = adopt(plan), io.StringIO()
    store = Store(plan.settings.storage.root)
    note_adopted(taken.specs, store, Console(stream, live=False))
    shown = " ".join(stream.getvalue().split())
    assert f"stage2: adopted from {left}" in shown
    assert "made with the same recipe by other code or packages" in shown
    again = replace(plan, specs=with_adopted(plan.specs, plan.settings, search=False))
    assert again == taken
    assert again.by_name["stage2"].key == "f" * 64
    assert again.by_name["evaluate"].key == plan.by_name["evaluate"].key


@pytest.mark.parametrize("written", ["/gone/runs/stages/{}", "{}"])
def test_an_adopted_stage_is_found_where_its_root_was_moved_to(plan: Plan, written: str) -> None:
    left = leave(plan, "stage2")
    own, name = folder_of(plan, "stage2"), left.rpartition("/")[2]
    record = {"key": "f" * 64, "folder": written.format(name)}
    Store(plan.settings.storage.root).write_json(f"{own}/ADOPTED", record)
    found = replace(plan, specs=with_adopted(plan.specs, plan.settings, search=False))
    assert folder_of(found, "stage2") == left


def test_a_registration_is_never_adopted(plan: Plan) -> None:
    leave(plan, "register")
    assert adopt(plan) == plan


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
import os, signal, time
from pipelines.chain.processes import pool_of
from benchmarks.program import one_message

@one_message
def main():
    with pool_of(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
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
        "interrupted. The same command keeps what is finished and does the rest."
    ]
    _, left = psutil.wait_procs([training], timeout=60)
    assert not left


def test_an_interrupted_study_does_not_wait_for_its_trainings() -> None:
    running = []

    def study() -> None:
        with pool_of(1) as pool:
            running.append(pool.submit(time.sleep, 200))
            raise KeyboardInterrupt  # SIGTERM reaches this process alone

    with pytest.raises(KeyboardInterrupt):
        study()
    assert isinstance(running[0].exception(), BrokenProcessPool)
