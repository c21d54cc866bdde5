"""Leases of a remote root: one process at a time, whatever the others and its network do."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from pipelines import lease
from pipelines.lease import LeaseTaken, is_leased, leased
from pipelines.stages.record import StageBusy, is_locked, locked
from pipelines.storage import StorageError, Store

FOLDER = "stages/stage1-0"
FILE = f"{FOLDER}/LEASE"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A root without locks, and leases that are renewed and stale within moments."""
    for name, seconds in {"RENEW_S": 0.2, "STALE_S": 2.0, "SETTLE_S": 0.1, "POLL_S": 0.05}.items():
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(Store, "local_path", lambda self, *parts: None)
    return Store(f"file://{tmp_path}")


def foreign(store: Store, *, age_s: float = 0.0) -> None:
    """Writes the lease of another process."""
    store.write_json(FILE, {"owner": "far, process 7", "token": "t", "written": str(time.time())})
    path = Path(store.root.removeprefix("file://")) / FILE
    os.utime(path, (time.time() - age_s,) * 2)


def test_a_lease_lasts_as_long_as_its_block_and_leaves_nothing(store: Store) -> None:
    with leased(store, FOLDER):
        assert is_leased(store, FOLDER)
        first = store.read_json(FILE)
        time.sleep(0.5)
        again = store.read_json(FILE)
        assert again["token"] == first["token"]
        assert again["written"] != first["written"]
        assert is_locked(store, FOLDER)
    assert not is_leased(store, FOLDER)
    assert store.files(FOLDER) == []


def test_a_second_process_is_refused_while_the_first_renews(store: Store) -> None:
    busy = r"works on stage1 in file://.*process \d+\): wait"
    with leased(store, FOLDER):
        with pytest.raises(StageBusy, match=busy), locked(store, FOLDER, "stage1"):
            pytest.fail("two processes at a time")
        assert is_leased(store, FOLDER)  # the refused one took nothing away
    assert store.files(FOLDER) == []


def test_the_lease_of_a_process_that_died_is_taken_over(store: Store) -> None:
    foreign(store, age_s=60)
    began = time.monotonic()
    with leased(store, FOLDER):
        assert time.monotonic() - began < 1.5  # it was stale before
    foreign(store)
    began = time.monotonic()
    with leased(store, FOLDER):
        assert time.monotonic() - began > 1.5  # it might have been renewed
    assert store.files(FOLDER) == []


def test_of_two_that_ask_at_once_one_gets_it(store: Store) -> None:
    held, refused = [], []
    start = threading.Barrier(4)

    def ask(number: int) -> None:
        start.wait()
        try:
            with leased(store, FOLDER):
                held.append(number)
                time.sleep(1.0)
        except LeaseTaken:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)


@pytest.mark.parametrize("how", ["waits", "ends by Ray Train"])
def test_a_process_that_lost_its_lease_gives_way(store: Store, how: str) -> None:
    def work() -> None:
        with locked(store, FOLDER, "stage1"):
            foreign(store)
            try:
                time.sleep(20)
            except KeyboardInterrupt:
                if how == "waits":
                    raise
                raise SystemExit(0) from None

    with pytest.raises(StageBusy, match="far, process 7"):
        work()
    assert json.loads(store.read_bytes(FILE))["owner"] == "far, process 7"


def test_an_interrupt_of_the_user_stays_one(store: Store) -> None:
    def work() -> None:
        with leased(store, FOLDER):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert store.files(FOLDER) == []


def test_a_store_that_is_away_for_a_moment_ends_no_work(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str, value: object) -> None:
        raise StorageError("the bucket does not answer")

    with leased(store, FOLDER):
        with monkeypatch.context() as away:
            away.setattr(store, "write_json", refuse)
            time.sleep(0.5)
        time.sleep(0.4)
        assert is_leased(store, FOLDER)
    assert "cannot be renewed: the bucket does not answer" in caplog.text


def test_a_lease_cut_short_is_one_until_it_is_stale(store: Store) -> None:
    store.write_bytes(FILE, b'{"owner": "f')
    with leased(store, FOLDER):
        assert store.read_json(FILE)["owner"] != "unknown"
