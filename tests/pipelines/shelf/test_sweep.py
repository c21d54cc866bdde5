"""What lies below a fabricated root, who needs it, and what `waste` names and `remove` removes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.search.journal import Journal, TrialRecord
from pipelines.shelf.contents import ShelfError, Shelved, shelved
from pipelines.shelf.sessions import ended_sessions, remove_session
from pipelines.shelf.sweep import Waste, remove, waste
from pipelines.stages.record import STAGES_OF_PLAN
from pipelines.storage import Store

DAY = 86_400.0
NOW = time.time()
OLD = NOW - 100 * DAY


def key(name: str) -> str:
    """A key of 64 hex digits."""
    return hashlib.sha256(name.encode()).hexdigest()


class Root:
    """A storage root made up file by file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder)

    def stage(self, kind: str, name: str, *, done: bool = True, age: float = OLD) -> str:
        """Makes a stage folder and returns its path. `name` makes its key."""
        path = f"stages/{kind}-{key(name)[:12]}"
        self.store.write_json(f"{path}/STARTED", {"key": key(name)})
        self.store.write_bytes(f"{path}/weights", b"x" * 100)
        if done:
            self.store.write_json(f"{path}/DONE", {"key": key(name)})
        self.date(path, age)
        return path

    def plan(self, name: str, config: str, *stages: str, used: float = OLD) -> None:
        note = {"plan_key": key(name), "config": config, "stages": stages, "used": used}
        self.store.write_json(f"plans/{key(name)[:12]}{STAGES_OF_PLAN}", note)

    def training(self, name: str) -> str:
        path = f"training/{key(name)}"
        self.store.write_bytes(f"{path}/checkpoint_1/weights", b"y" * 1000)
        self.date(path, OLD)
        return path

    def date(self, path: str, when: float) -> None:
        for each in [self.folder / path, *(self.folder / path).rglob("*")]:
            os.utime(each, (when, when))

    def stages(self, registered: set[str] | None = None, days: float = 30) -> dict[str, Shelved]:
        found = shelved(self.store, registered or set(), since=NOW - days * DAY)
        return {stage.path: stage for stage in found}

    def waste(self, registered: set[str] | None = None, days: float = 30) -> dict[str, Waste]:
        stages = list(self.stages(registered, days).values())
        found = waste(self.store, stages, now=NOW, older_than_s=days * DAY)
        return {item.path: item for item in found}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "runs")


def test_the_newest_plan_of_each_config_and_what_was_run_lately_stays(root: Root) -> None:
    shared = root.stage("prepare", "shared")
    first, second = root.stage("stage2", "first"), root.stage("stage2", "second")
    other = root.stage("stage2/none", "other")
    root.plan("p1", "cats", shared, first, used=OLD)
    root.plan("p2", "cats", shared, second, used=OLD + 1)
    root.plan("p3", "dogs", other, used=OLD)
    assert set(root.waste()) == {first}
    assert root.waste()[first].why == "done, only of an earlier plan of cats"
    root.plan("p1", "cats", shared, first, used=NOW - DAY)
    assert set(root.waste()) == {second}
    root.plan("p2", "cats", shared, second, used=NOW - 2 * DAY)
    assert root.waste() == {}
    assert set(root.waste(days=0)) == {second}


def test_what_a_registered_model_needs_stays(root: Root) -> None:
    names = ("prepare", "stage2", "stage2/none", "evaluate", "register")
    old = {name: root.stage(name, f"old {name}") for name in names}
    root.plan("p1", "cats", *old.values(), used=OLD)
    root.plan("p2", "cats", root.stage("prepare", "new"), used=NOW)
    assert set(root.waste()) == {old["prepare"], old["stage2/none"]}
    root.store.delete(f"{old['register']}/DONE")
    root.date(old["register"], OLD)
    assert set(root.waste()) == set(old.values())
    by_name = root.waste({key("old stage2"), key("old evaluate")})
    assert set(by_name) == {old["prepare"], old["stage2/none"], old["register"]}


def test_without_a_record_of_a_plans_stages_all_that_is_done_stays(root: Root) -> None:
    done = root.stage("stage2", "done")
    begun = root.stage("stage1", "begun", done=False)
    root.store.write_json(f"plans/{key('p')[:12]}.json", {"plan_key": key("p"), "run_id": None})
    assert set(root.waste()) == {begun}
    root.plan("p", "cats", used=NOW)
    assert set(root.waste()) == {begun, done}


def test_what_changed_lately_stays(root: Root) -> None:
    path = root.stage("stage1", "young", age=NOW - DAY)
    assert root.waste() == {}
    assert set(root.waste(days=0.5)) == {path}


def test_stopped_trials_go_and_the_others_stay(root: Root) -> None:
    journal = Journal(root.store, "searches/rate-0123456789ab")
    shared = root.stage("stage1", "shared")
    kept, stopped = root.stage("stage2", "kept"), root.stage("stage2", "stopped", done=False)
    for number, (name, state) in enumerate({"kept": "finished", "stopped": "stopped"}.items()):
        keys = {"stage1": key("shared"), "stage2": key(name)}
        journal.asked(TrialRecord(number, {}, 0.5, keys=keys))
        journal.ended(number, state)  # type: ignore[arg-type]
    checkpoints = root.training("stopped")
    found = root.waste()
    assert set(found) == {stopped, checkpoints}
    assert "trial 1" in found[stopped].why
    assert root.stages()[shared].used_by == (
        "rate-0123456789ab, trial 0",
        "rate-0123456789ab, trial 1",
    )
    assert root.stages()[kept].needed_by


def test_checkpoints_stay_only_for_a_training_that_may_resume(root: Root) -> None:
    root.plan("p", "cats", root.stage("stage1", "begun", done=False), root.stage("stage2", "done"))
    begun, done, gone = (root.training(name) for name in ("begun", "done", "gone"))
    assert (root.folder / begun).is_dir()
    assert set(root.waste()) == {done, gone}


@pytest.fixture
def busy(root: Root) -> Iterator[str]:
    """A stage that another process works on."""
    path = root.stage("stage1", "busy", done=False)
    with (root.folder / path / "LOCK").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root.date(path, OLD)
        yield path


def test_a_busy_stage_and_its_checkpoints_stay(root: Root, busy: str) -> None:
    root.training("busy")
    assert root.stages()[busy].state == "busy"
    assert root.waste() == {}
    begun = Waste(busy, "", 0, lock=busy)
    assert "another process works on" in remove(root.store, begun)
    assert (root.folder / busy / "STARTED").is_file()


def test_looking_changes_no_date(root: Root) -> None:
    path = root.stage("stage1", "a")
    (root.folder / path / "LOCK").touch()
    root.date(path, OLD)
    assert root.stages()[path].changed == root.stages()[path].changed == pytest.approx(OLD)


def test_an_adopted_result_stays_with_the_stage_that_adopted_it(root: Root) -> None:
    result, own = root.stage("stage1", "earlier"), f"stages/stage1-{key('own')[:12]}"
    note = {"key": key("earlier"), "folder": f"/moved/from/here/{result}"}
    root.store.write_json(f"{own}/ADOPTED", note)
    root.plan("p", "cats", own)
    assert root.stages()[own].state == "adopted"
    assert root.waste() == {}


def test_partial_files_of_dead_processes_go(root: Root) -> None:
    stage = root.stage("stage1", "a")
    root.plan("p", "cats", stage)
    for name in (".DONE.123.partial", ".result.json.ab_d3fgh", "weights.safetensors.part"):
        root.store.write_bytes(f"{stage}/{name}", b"z")
    root.store.write_bytes(f"{stage}/.hidden", b"z")
    root.date(stage, OLD)
    root.store.write_bytes(f"{stage}/.now.123.partial", b"z")
    assert {Path(path).name for path in root.waste()} == {
        *(".DONE.123.partial", ".result.json.ab_d3fgh", "weights.safetensors.part")
    }


def test_removing_takes_what_was_named_and_nothing_else(root: Root) -> None:
    kept, old = root.stage("stage2", "kept"), root.stage("stage2", "old")
    root.plan("p", "cats", kept)
    checkpoints = root.training("old")
    found = root.waste()
    assert [remove(root.store, item) for item in found.values()] == ["", ""]
    assert not (root.folder / old).exists()
    assert not (root.folder / checkpoints).exists()
    assert sorted(root.store.list(kept)) == ["DONE", "STARTED", "weights"]
    assert root.waste() == {}


def test_a_record_that_cannot_be_read_stops_it(root: Root) -> None:
    root.stage("stage2", "a")
    root.store.write_bytes(f"plans/x{STAGES_OF_PLAN}", b"{")
    with pytest.raises(ShelfError, match="cannot be read"):
        root.stages()


def test_ended_sessions_of_ray_are_found_by_their_age_and_processes(tmp_path: Path) -> None:
    names = ("session_a", "session_b", "session_new")
    for name in names:
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "logs/x").write_bytes(b"12345")
    for name in names[:2]:
        for each in (tmp_path / name / "logs/x", tmp_path / name):
            os.utime(each, (OLD, OLD))
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_b")
    running = f"raylet --session-dir={tmp_path}/session_a"
    folders = [tmp_path, tmp_path / "nowhere"]
    (session,) = ended_sessions(folders, running, before=NOW - DAY)
    assert (session.path.name, session.size) == ("session_b", 5)
    assert remove_session(session) == ""
    assert not session.path.exists()


def test_kept_answers_and_folders_of_dead_processes_go_when_they_are_old(root: Root) -> None:
    for path in (
        "measured/a.parquet",
        "measured/b.parquet",
        "scratch/epoch-1/weights",
        "scratch/x",
    ):
        root.store.write_bytes(path, b"z" * 10)
    for path in ("measured/a.parquet", "scratch/epoch-1"):
        root.date(path, OLD)
    found = root.waste()
    assert {path: item.size for path, item in found.items()} == {
        "measured/a.parquet": 10,
        "scratch/epoch-1": 10,
    }
    assert "measured again" in found["measured/a.parquet"].why
    for item in found.values():
        assert remove(root.store, item) == ""
    assert root.store.list("scratch") == ["x"]
    for path in ("measured/b.parquet", "scratch/x"):
        root.date(path, NOW - DAY / 2)
    assert root.waste(days=0.1).keys() == {"measured/b.parquet"}  # the other may be in use
