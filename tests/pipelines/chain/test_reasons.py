"""What a plan says of a stage that is to run although the root holds something like it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.chain.plan import Plan, make_plan
from pipelines.chain.reasons import made_with, why_new
from pipelines.settings.reading import load_settings
from pipelines.stages.record import mark_done, mark_started
from pipelines.stages.spec import StageSpec
from pipelines.storage import Store
from tests.pipelines.experiment import paint, write_config


@pytest.fixture
def images(tmp_path: Path) -> Path:
    paint(tmp_path / "images", train=2)
    return tmp_path


def planned(folder: Path, *overrides: str) -> Plan:
    root = f"storage.root={folder / 'runs'}"
    return make_plan(load_settings(str(write_config(folder)), [root, *overrides]))


def leave(plan: Plan, name: str, made: dict[str, Any] | None = None, key: str = "f" * 64) -> None:
    """Leaves a finished stage of this recipe and config, made by other code."""
    spec = plan.by_name[name]
    other = replace(spec, key=key, folder=spec.folder.replace(spec.key[:12], key[:12]))
    store = Store(plan.settings.storage.root)
    mark_started(store, other, made_with(spec) if made is None else made)
    mark_done(store, other, {"metrics": {}}, None)


def why(plan: Plan, name: str) -> str:
    return why_new(Store(plan.settings.storage.root), plan.by_name[name])


def test_a_first_run_needs_no_reason(images: Path) -> None:
    assert why(planned(images), "stage2") == ""


def test_a_changed_module_is_named_with_the_way_to_keep_the_result(images: Path) -> None:
    plan = planned(images)
    made = made_with(plan.by_name["stage2"])
    assert len(made["modules"]) > 10
    leave(plan, "stage2", {**made, "modules": {**made["modules"], "mantis_core.symbols": "0"}})
    assert why(plan, "stage2") == (
        "mantis_core/symbols.py changed since ffffffffffff; --adopt would reuse that result"
    )


def test_another_version_of_a_package_is_named(images: Path) -> None:
    plan = planned(images)
    made = made_with(plan.by_name["stage1"])
    torch = made["versions"]["torch"]
    leave(plan, "stage1", {**made, "versions": {**made["versions"], "torch": "2.0.0"}})
    assert why(plan, "stage1").startswith(f"torch 2.0.0 -> {torch} since ffffffffffff; --adopt")


def test_a_result_of_the_same_code_waits_for_the_stages_before_it(images: Path) -> None:
    plan = planned(images)
    leave(plan, "stage2")
    assert why(plan, "stage2").startswith("a stage before it is to run since ffffffffffff")


def test_a_record_of_earlier_code_names_no_module(images: Path) -> None:
    plan = planned(images)
    leave(plan, "stage2", {})
    assert why(plan, "stage2").startswith("code or packages changed since ffffffffffff")


def test_changed_fields_are_named_with_both_values(images: Path) -> None:
    leave(planned(images), "stage2")
    plan = planned(images, "stage2.rate_weight=0.25", "seed=9")
    assert why(plan, "stage2") == (
        "seed 0 -> 9, stage2.rate_weight 0.001 -> 0.25 since ffffffffffff"
    )


def test_more_epochs_are_trained_from_scratch_and_say_so(images: Path) -> None:
    before = planned(images)
    epochs = before.settings.stage2.epochs
    leave(before, "stage2")
    plan = planned(images, f"stage2.epochs={epochs + 1}")
    assert why(plan, "stage2") == (
        f"stage2.epochs {epochs} -> {epochs + 1} since ffffffffffff; trained from scratch, because "
        "the learning rate falls over all epochs"
    )


def test_another_recipe_of_an_earlier_stage_is_said(images: Path) -> None:
    leave(planned(images), "stage2")
    plan = planned(images, "stage1.epochs=7")
    assert why(plan, "stage2") == "an earlier stage differs from that of ffffffffffff"


def test_the_closest_of_several_results_is_compared(images: Path) -> None:
    leave(planned(images, "stage2.rate_weight=0.5", "seed=4"), "stage2", key="a" * 64)
    near = planned(images, "stage2.rate_weight=0.5")
    leave(near, "stage2", key="b" * 64)
    folder = near.by_name["stage2"].folder[:-12]
    os.utime(f"{folder}{'b' * 12}/DONE", (1, 1))  # the older one is the closer one
    assert why(planned(images), "stage2").endswith("since bbbbbbbbbbbb")


def test_an_unfinished_stage_is_no_result(images: Path) -> None:
    plan = planned(images)
    leave(plan, "stage2")
    spec: StageSpec = plan.by_name["stage2"]
    Path(spec.folder.replace(spec.key[:12], "f" * 12), "DONE").unlink()
    assert why(plan, "stage2") == ""
