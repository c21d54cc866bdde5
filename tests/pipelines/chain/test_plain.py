"""The stage chain without Ray and MLflow: the same stages, under the same keys."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.manifest import Manifest, SourceInfo, write_manifest
from pipelines.chain.plain import check_prepared, run_plain, train_plain
from pipelines.chain.plan import Plan, make_plan
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings
from pipelines.stages.record import mark_started, stage_state
from pipelines.stages.spec import with_upstream
from pipelines.stages.train import training_of
from pipelines.storage import Store
from tests.pipelines.experiment import CLASSES, VAL_ROWS, mantis, paint, write_config
from tests.root import ROOT

# As on a machine that has neither: an import of either fails.
RUN = """
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None
from pipelines.__main__ import main

if __name__ == "__main__":
    main()
"""
SAID = re.compile(r"(\S+) seed \d+: |(\S+:) \{")  # a stage is trained, an arm is measured


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_finishes_the_stages_that_the_chain_would(tmp_path):
    paint(tmp_path / "images", train=12)
    config = write_config(tmp_path)
    mantis("prepare", "--config", str(config), folder=tmp_path)
    prepared = next((tmp_path / "runs/stages").glob("prepare-*"))
    script = tmp_path / "plain.py"
    script.write_text(RUN)
    root = tmp_path / "plain"
    tuned = "codec_teacher={epochs: 1, batch_size: 16}"
    overrides = [f"storage.root={root}", "evaluate.codec_teachers=true", tuned]
    command = [sys.executable, str(script)]
    done = subprocess.run(
        [
            *command,
            "run",
            "--plain",
            str(prepared),
            "--config",
            str(config),
            "--jobs",
            "2",
            "--json",
            *overrides,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = filter(None, map(SAID.match, done.stderr.splitlines()))
    said = [line[1] or line[2] for line in lines]
    assert said.index("stage1") < said.index("stage2")
    assert said[-1] == "evaluate"
    trained = [name for name in said[:-1] if not name.endswith(":")]
    assert sorted(trained) == ["codec_teacher/webp", "stage1", "stage2"]
    measured = [name for name in said if name.endswith(":")]
    # MANTiS, told the tasks, the teacher; two qualities in front of it and of the tuned one.
    assert len(measured) == len(set(measured)) == 3 + 2 * 2
    assert said.index("stage2") < said.index("stage2:")
    assert "epoch 1 of 1" in done.stderr
    plan = make_plan(load_settings(str(config), overrides))
    specs = {spec.name: spec for spec in with_upstream(plan.specs, "evaluate")}
    states = {name: stage_state(Store(str(root)), spec, None) for name, spec in specs.items()}
    assert states.pop("prepare") == "new"
    assert states == dict.fromkeys(("stage1", "stage2", "codec_teacher/webp", "evaluate"), "done")
    written = Path(specs["evaluate"].folder, "evaluation.json")
    result = json.loads(done.stdout)
    assert set(result["stages"]) == {"stage1", "stage2", "codec_teacher/webp", "evaluate"}
    assert {stage["status"] for stage in result["stages"].values()} == {"ran"}
    assert (written.parent / "report/report.html").is_file()
    evaluation = json.loads(written.read_text())
    assert evaluation["rows"] == VAL_ROWS * len(CLASSES)
    trained_on = json.loads(Path(specs["stage2"].folder, "result.json").read_text())["computed_on"]
    assert [each["workers"] for each in trained_on] == [1]
    assert evaluation["computed_on"] == [{**trained_on[0], "precision": "float32", "tf32": False}]
    by_kind = {arm["kind"]: arm["metrics"] for arm in evaluation["arms"]}
    assert by_kind.keys() == {"mantis", "oracle", "teacher", "webp", "webp_tuned"}
    assert by_kind["mantis"]["val/wire_bytes"] > by_kind["mantis"]["val/payload_bytes"] > 0
    assert {kind for kind, own in by_kind.items() if "val/agreement" not in own} == {"teacher"}


def shapes_plan(root: Path, size: int = 32, seed: int = 0, **data: object) -> Plan:
    source = {"kind": "shapes", "train_rows": 20, "val_rows": 20, "size": 32}
    return make_plan(
        Settings.model_validate(
            {
                "seed": seed,
                "data": {"sources": [source], "image_size": size, **data},
                "tasks": [{"name": "outline", "classes_from": "shapes"}],
                "teacher": {"weights": "train"},
                "storage": {"root": str(root / "runs")},
            }
        )
    )


def prepared_for(plan: Plan) -> Manifest:
    """The manifest of a folder that was prepared for a plan, without its shards."""
    spec = plan.specs[0]
    return Manifest(
        image_size=spec.settings.data.size,
        tasks=plan.table.tasks,
        classes=plan.table.classes,
        class_names=plan.table.class_names,
        single_class=True,
        seed=spec.settings.seed,
        splits={},
        unassigned={},
        rejected=0,
        fingerprint="f",
        sources=(SourceInfo(name="shapes", kind="shapes", rows={}),),
    )


def test_a_training_looks_for_its_images_in_the_folder_that_was_given(tmp_path: Path) -> None:
    plan, shards = shapes_plan(tmp_path), str(tmp_path / "shards")
    write_manifest(shards, prepared_for(plan))
    store = Store(plan.settings.storage.root)
    training = training_of(plan.by_name["stage1"], plan.by_name, shards, plan.table, store)
    assert training.prepared == training.upstream["prepare"] == shards
    assert training.upstream["teacher"] == plan.by_name["teacher"].folder


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "seed is 1 there and 0 here"),
        ({"size": 48}, r"data.image_size is \(48, 48\) there and \(32, 32\) here"),
    ],
)
def test_a_folder_prepared_for_another_config_is_refused(
    tmp_path: Path, other: dict[str, int], words: str
) -> None:
    plan = shapes_plan(tmp_path)
    manifest = prepared_for(shapes_plan(tmp_path, **other))
    with pytest.raises(DataError, match=words):
        check_prepared(plan, manifest, str(tmp_path))
    check_prepared(plan, prepared_for(plan), str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ("a", "b")},
        {"tasks": ()},
        {"sources": (SourceInfo(name="mine", kind="parquet", rows={}),)},
    ],
)
def test_a_folder_of_other_classes_tasks_or_sources_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    plan = shapes_plan(tmp_path)
    manifest = prepared_for(plan).model_copy(update=change)
    (field,) = change
    with pytest.raises(DataError, match=rf"{field} differs"):
        check_prepared(plan, manifest, str(tmp_path))


def test_a_folder_that_records_its_config_must_have_all_that_decides_its_images(
    tmp_path: Path,
) -> None:
    plan, other = shapes_plan(tmp_path), shapes_plan(tmp_path, holdout_fraction=0.3)
    spec = other.specs[0]
    mark_started(Store(other.settings.storage.root), spec)
    with pytest.raises(DataError, match=r"data\.holdout_fraction differs"):
        check_prepared(plan, prepared_for(other), spec.folder)
    check_prepared(other, prepared_for(other), spec.folder)
    read_differently = shapes_plan(tmp_path, holdout_fraction=0.3, augmentation="padded_crop")
    check_prepared(read_differently, prepared_for(other), spec.folder)


def test_nothing_is_trained_or_measured_on_another_seeds_folder(tmp_path: Path) -> None:
    plan = shapes_plan(tmp_path, seed=1)
    write_manifest(str(tmp_path / "shards"), prepared_for(shapes_plan(tmp_path)))
    prepared = str(tmp_path / "shards")
    with pytest.raises(DataError, match="seed is 0 there and 1 here"):
        run_plain([plan], prepared=prepared, jobs=1, say=print)
    with pytest.raises(DataError, match="seed is 0 there and 1 here"):
        list(train_plain([plan], prepared=prepared, jobs=1, say=print))


def test_a_study_may_share_one_seeds_folder_and_nothing_else(tmp_path: Path) -> None:
    plan, first = shapes_plan(tmp_path, seed=1), shapes_plan(tmp_path)
    mark_started(Store(first.settings.storage.root), first.specs[0])
    check_prepared(plan, prepared_for(first), first.specs[0].folder, any_seed=True)
    larger = shapes_plan(tmp_path, size=48)
    with pytest.raises(DataError, match=r"config: data.image_size is \(48, 48\)"):
        check_prepared(plan, prepared_for(larger), str(tmp_path), any_seed=True)
