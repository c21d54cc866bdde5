"""Stages that only note that they ran, for tests of what runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from pipelines.stages.order import STAGES
from pipelines.stages.spec import StageContext, StageSpec

Runner = Callable[[StageSpec, StageContext], dict[str, Any]]


def fake_stages(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
    """Lets every stage run `runner`, without Ray, under keys that count no code.

    No preflight is made: the runner may prepare nothing. MLflow gets figures alone, and no thread
    watches the machine.
    """

    @contextlib.contextmanager
    def session(*_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr("pipelines.chain.run.ray_session", session)
    monkeypatch.setattr("pipelines.chain.run.watched_machine", session)
    monkeypatch.setattr("pipelines.chain.run.track_stage", lambda *_, **__: None)
    monkeypatch.setattr("pipelines.chain.preflight.Preflight.check", lambda *_, **__: [])
    same_code(monkeypatch)
    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, replace(stage, run=runner))


def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that do not change with the code: no file is read for them."""
    monkeypatch.setattr("pipelines.chain.plan.source_hash", lambda *entries: "code")


def in_a_lock() -> RuntimeError:
    """What a second Ctrl-C comes out as that meets a library waiting for a lock."""
    error = RuntimeError("release unlocked lock")
    error.__context__ = KeyboardInterrupt()
    return error
