"""Answers that are kept: what they hold, what decides which file they are, who measures anew."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.chain.plan import Plan, make_plan
from pipelines.evaluation.arms import ArmSource
from pipelines.evaluation.split_pass import Evaluated
from pipelines.settings.reading import load_settings
from pipelines.stages import evaluate
from pipelines.stages.measured import keep_measured, measured_file, read_measured
from pipelines.storage import Store
from pipelines.terminal.console import Console
from tests.pipelines.experiment import paint, write_config


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    paint(tmp_path / "images", train=2)
    return planned(tmp_path)


def planned(folder: Path, *overrides: str) -> Plan:
    root = f"storage.root={folder / 'runs'}"
    return make_plan(load_settings(str(write_config(folder)), [root, *overrides]))


def answers(names: Sequence[str]) -> Evaluated:
    """Answers with a column of each form that arms give."""
    own = {
        "arm": np.zeros(3, int),
        "row_id": np.arange(3),
        "wire_bytes": np.array([4, 5, 6]),
        "estimated_bits": np.array([1.5, 2.5, np.inf]),
        "decoded": np.array([[True, False], [False, True], [True, True]]),
        "answered": np.array([True, False, True]),
        "probabilities": np.arange(6, dtype=np.float32).reshape(3, 2) / 7,
        "answer": np.array(["{}", "", '{"class": "müll"}'], dtype=object),
        "confusion/areas": np.array([b"\0\1", b"", b"\2"], dtype=object),
    }
    hardware = ({"device": "cpu", "workers": 2},)
    return Evaluated({name: own for name in names}, (), True, (8, 8), hardware)


def test_kept_answers_are_read_as_they_were(tmp_path: Path) -> None:
    store, done = Store(str(tmp_path)), answers(["stage2"])
    keep_measured(store, "measured/a.parquet", done, "stage2")
    around = Evaluated({}, (), True, (8, 8))
    found = read_measured(store, "measured/a.parquet", "again", around)
    assert found is not None
    assert found.computed_on == done.computed_on
    assert found.image_size == (8, 8)
    (own,) = found.answers.values()
    assert list(found.answers) == ["again"]
    assert own.keys() == done.answers["stage2"].keys() - {"arm"}
    for name, values in own.items():
        expected = done.answers["stage2"][name]
        assert values.dtype == expected.dtype, name
        assert values.shape == expected.shape, name
        assert values.tolist() == expected.tolist(), name


def test_nothing_kept_is_none(tmp_path: Path) -> None:
    around = Evaluated({}, (), True, (8, 8))
    assert read_measured(Store(str(tmp_path)), "measured/a.parquet", "x", around) is None


def test_a_file_depends_on_what_decides_its_answers_and_on_nothing_else(
    plan: Plan, tmp_path: Path
) -> None:
    spec, arm = plan.by_name["evaluate"], plan.arms[0]
    own = measured_file(spec, arm, plan.by_name)
    assert measured_file(spec, replace(arm, name="other", seed=8), plan.by_name) == own
    others = [
        measured_file(spec, replace(arm, kind="oracle"), plan.by_name),
        measured_file(spec, replace(arm, quality=3), plan.by_name),
        measured_file(spec, replace(arm, exit_confidence=0.9), plan.by_name),
        measured_file(spec, replace(arm, stage="stage1"), plan.by_name),
        measured_file(replace(spec, code_key="changed"), arm, plan.by_name),
        measured_file(replace(spec, config={**spec.config, "x": 1}), arm, plan.by_name),
    ]
    assert len({own, *others}) == 7
    wider = planned(tmp_path, "evaluate.codecs={webp: [20]}")
    again = measured_file(wider.by_name["evaluate"], wider.arms[0], wider.by_name)
    assert again == own
    assert wider.by_name["evaluate"].key != spec.key


def test_an_evaluation_measures_the_arms_that_are_not_kept_alone(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, store = plan.by_name["evaluate"], Store(plan.settings.storage.root)
    assert len(plan.arms) > 1
    passes: list[list[str]] = []

    def measure(
        folder: str, manifest: Any, reading: Any, sources: list[ArmSource], **_: Any
    ) -> Any:
        passes.append([source.name for source in sources])
        return answers(passes[-1])

    written: list[Evaluated] = []

    def write(spec: Any, specs: Any, store: Any, folder: str, done: Evaluated) -> dict[str, Any]:
        written.append(done)
        return {}

    manifest = SimpleNamespace(single_class=True, image_size=(8, 8), tasks=(), classes=())
    monkeypatch.setattr("data_prep.manifest.read_manifest", lambda folder: manifest)
    monkeypatch.setattr("pipelines.training.problem.tasks_of", lambda manifest: ())
    monkeypatch.setattr("pipelines.evaluation.split_pass.evaluate_split", measure)
    monkeypatch.setattr(evaluate, "write_evaluation", write)
    stream = io.StringIO()
    context: Any = SimpleNamespace(
        manifest_folder="m", store=store, specs=plan.by_name, console=Console(stream, live=False)
    )
    names = [arm.name for arm in plan.arms]
    for _ in range(2):
        evaluate.run(spec, context)
    assert passes == [names]
    assert f"{len(names)} of {len(names)} arms are known" in stream.getvalue()
    (store.local_path(measured_file(spec, plan.arms[1], plan.by_name)) or Path()).unlink()
    evaluate.run(spec, context)
    assert passes == [names, [names[1]]]
    assert [list(done.answers) for done in written] == [names] * 3
