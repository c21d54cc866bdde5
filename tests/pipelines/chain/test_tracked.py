"""What MLflow shows of a finished stage, each thing once: data, checkpoint, arms, report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from data_prep.manifest import write_manifest
from pipelines.chain.plan import Plan, make_plan
from pipelines.chain.tracked import track_stage
from pipelines.settings.reading import load_settings
from pipelines.storage import Store
from pipelines.tracking import lookup
from pipelines.tracking.pages.datasets import inputs_of
from pipelines.tracking.registry import lineage
from pipelines.tracking.runs import Tracker, TrackingError
from tests.pipelines.fakes import same_code
from tests.pipelines.tracking.prepared import manifest

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 20, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train}
evaluate: {baselines: [none, oracle, teacher], codecs: {webp: [5]}}
tracking: {uri: "http://user:secret@nowhere:5000"}
"""
HOLDOUT = {"epoch": 3, "holdout/top1": 0.5, "holdout/loss": 1.25}


class Finished:
    """The stages of a small experiment as they lie when all are done, and their MLflow runs."""

    def __init__(self, root: Path, tracker: Tracker, plan: Plan) -> None:
        self.store, self.tracker, self.plan = Store(root), tracker, plan
        run_id = tracker.open_pipeline("tiny", {}, plan.key)
        assert run_id is not None
        self.run_id = run_id
        for spec in plan.specs:
            result: dict[str, Any] = {"metrics": {}}
            if spec.kind == "prepare":
                write_manifest(spec.folder, manifest())
            elif spec.stage.trains:
                result = {"metrics": HOLDOUT, "model_folder": "checkpoint"}
            elif spec.kind == "evaluate":
                arms = [self._arm(arm, number) for number, arm in enumerate(spec.arms)]
                self.store.write_json(f"{spec.folder}/evaluation.json", {"arms": arms})
                self.store.write_bytes(f"{spec.folder}/report/report.html", b"<p>report</p>")
            self.store.write_json(f"{spec.folder}/result.json", result)
            stage_id = tracker.open_stage(run_id, spec.name, spec.key, {}, folder=spec.folder)
            tracker.finish(stage_id, "FINISHED", metrics=result["metrics"])

    def _arm(self, arm: Any, number: int) -> dict[str, Any]:
        planned = self.plan.by_name
        return {
            "name": arm.name,
            "kind": arm.kind,
            "label": f"the label of {arm.name}",
            "rate_weight": arm.rate_weight,
            "quality": arm.quality,
            "seed": arm.seed,
            "stage_key": planned[arm.stage].key if arm.stage else "",
            "metrics": {"val/top1": 0.9 - number / 100},
        }

    def track(self) -> None:
        for spec in self.plan.specs:
            track_stage(
                spec,
                specs=self.plan.by_name,
                store=self.store,
                tracker=self.tracker,
                run_id=self.run_id,
            )

    def run(self, run_id: str | None = None) -> Run:
        return self.tracker.client.get_run(run_id or self.run_id)

    def stage_run(self, name: str) -> Run:
        run_id = lookup.stage_run_id(self.tracker, self.plan.by_name[name].key)
        assert run_id is not None
        return self.run(run_id)

    def arms(self) -> dict[str, Run]:
        runs = self.tracker.client.search_runs(
            [self.tracker.experiment_id], "tags.`mantis.arm` != ''"
        )
        return {run.data.tags["mantis.arm"]: run for run in runs}

    def models(self) -> dict[str, Any]:
        found = self.tracker.client.search_logged_models([self.tracker.experiment_id])
        return {model.name: model for model in found}


@pytest.fixture
def finished(tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Finished:
    same_code(monkeypatch)
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    root = tmp_path / "runs"
    return Finished(root, tracker, make_plan(load_settings(config, [f"storage.root={root}"])))


def uses(run: Run) -> Mapping[str, str]:
    return {data["name"]: data["context"] for data in inputs_of(run)}


def test_each_run_names_the_data_it_has_seen(finished: Finished) -> None:
    finished.track()
    training = {"photos-train": "training", "photos-holdout": "validation"}
    assert uses(finished.run()) == {**training, "photos-val": "evaluation"}
    assert uses(finished.stage_run("stage1")) == uses(finished.stage_run("stage2/none")) == training
    assert uses(finished.stage_run("evaluate")) == {"photos-val": "evaluation"}


def test_the_pipelines_run_carries_config_report_and_main_figures(
    finished: Finished, tmp_path: Path
) -> None:
    finished.track()
    client, target = finished.tracker.client, tmp_path / "downloaded"
    target.mkdir()
    for name in ("config.yaml", "evaluation.json", "report"):
        client.download_artifacts(finished.run_id, name, str(target))
    assert (target / "report/report.html").read_bytes() == b"<p>report</p>"
    assert len(json.loads((target / "evaluation.json").read_text())["arms"]) == 5
    text = (target / "config.yaml").read_text()
    assert yaml.safe_load(text)["data"]["sources"][0]["kind"] == "shapes"
    assert "secret" not in text
    again = load_settings(target / "config.yaml")
    assert again.stage2 == finished.plan.settings.stage2
    assert finished.run().data.metrics == {"val/top1": 0.9}
    note = finished.run().data.tags["mlflow.note.content"]
    assert "| **the label of stage2, rate weight 0.001** | 90.0 % |" in note


def test_every_arm_is_a_run_with_its_figures(finished: Finished) -> None:
    finished.track()
    arms = finished.arms()
    assert list(arms) == ["teacher", "webp/quality-5", "oracle", "stage2/none", "stage2"]
    evaluate = finished.stage_run("evaluate").info.run_id
    for run in arms.values():
        assert run.data.tags["mlflow.parentRunId"] == evaluate
        assert run.info.status == "FINISHED"
        assert uses(run) == {"photos-val": "evaluation"}
    assert arms["stage2"].data.metrics == {"val/top1": 0.9}
    assert arms["webp/quality-5"].data.params["quality"] == "5"
    assert "rate_weight" not in arms["webp/quality-5"].data.params
    assert arms["oracle"].data.params["label"] == "the label of oracle"


def test_every_checkpoint_is_a_logged_model_with_figures_of_named_data(finished: Finished) -> None:
    finished.track()
    models = finished.models()
    assert set(models) == {"teacher", "stage1", "stage2", "stage2-none"}
    assert models["stage1"].model_type == "stage1"
    main = models["stage2"]
    assert (main.status, main.model_type) == ("READY", "codec")
    assert main.params["tasks"] == "outline"
    assert main.params["rate_weight"] == "0.001"
    assert models["stage2-none"].params["conditioning"] == "none"
    place = Store(finished.store.root).join(main.tags["mantis.checkpoint"])
    assert place == f"{finished.plan.by_name['stage2'].folder}/checkpoint"
    figures = {(m.key, m.value, m.dataset_name) for m in main.metrics}
    assert figures == {
        ("holdout/top1", 0.5, "photos-holdout"),
        ("holdout/loss", 1.25, "photos-holdout"),
        ("val/top1", 0.9, "photos-val"),
    }
    assert ("val/top1", 0.86) in {(m.key, m.value) for m in models["teacher"].metrics}


def test_the_curve_of_a_training_gains_no_point(finished: Finished) -> None:
    finished.track()
    run_id = finished.stage_run("stage2").info.run_id
    assert len(finished.tracker.client.get_metric_history(run_id, "holdout/loss")) == 1


def test_a_description_that_somebody_edited_stays(finished: Finished) -> None:
    finished.track()
    finished.tracker.client.set_tag(finished.run_id, "mlflow.note.content", "ours")
    finished.track()
    assert finished.run().data.tags["mlflow.note.content"] == "ours"


def test_a_second_time_changes_nothing(finished: Finished) -> None:
    finished.track()
    arms = {name: run.to_dictionary() for name, run in finished.arms().items()}
    models = {name: len(model.metrics) for name, model in finished.models().items()}
    finished.track()
    assert {name: run.to_dictionary() for name, run in finished.arms().items()} == arms
    assert {name: len(model.metrics) for name, model in finished.models().items()} == models
    assert len(finished.run().inputs.dataset_inputs) == 3


def test_an_interruption_is_made_up_for(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise MlflowException("away")

    notes: list[str] = []
    finished.tracker.note = notes.append
    with monkeypatch.context() as broken:
        broken.setattr("pipelines.tracking.pages.arms.tie_figures", away)
        finished.track()
    assert finished.tracker.was_away
    assert len(notes) == 1
    assert "away" in notes[0]
    finished.track()
    assert finished.arms().keys() == {"stage2"}  # nothing is tried before MLflow answers
    finished.tracker.ask_again()
    finished.tracker.open_pipeline("tiny", {}, finished.plan.key)
    finished.track()
    assert len(finished.arms()) == 5
    assert "val/top1" in {metric.key for metric in finished.models()["stage2"].metrics}


def test_a_stage_whose_files_are_gone_still_counts(
    finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    notes: list[str] = []
    finished.tracker.note = notes.append
    finished.store.delete(f"{finished.plan.by_name['prepare'].folder}/manifest.json")
    finished.track()
    assert any(note.startswith("MLflow does not show all of evaluate (") for note in notes)
    assert "what MLflow shows of evaluate was not logged" in caplog.text
    assert not finished.tracker.was_away


def test_without_mlflow_nothing_is_asked(finished: Finished) -> None:
    finished.tracker.enabled = False
    finished.track()
    finished.tracker.enabled = True
    assert finished.arms() == {}
    assert uses(finished.run()) == {}


def test_lineage_lists_data_files_checkpoints_and_arms(finished: Finished) -> None:
    finished.track()
    found = lineage(finished.tracker, "latest")
    assert sorted(data["name"] for data in found["data"]) == [
        "photos-holdout",
        "photos-train",
        "photos-val",
    ]
    assert found["artifacts"] == ["config.yaml", "evaluation.json", "report"]
    stage2 = next(stage for stage in found["stages"] if stage["name"] == "stage2")
    assert stage2["checkpoint"] == f"models:/{finished.models()['stage2'].model_id}"
    assert found["arms"][0]["name"] == "stage2"
    assert found["arms"][0]["figures"] == {"val/top1": 0.9}
    json.dumps(found)


def test_mlflows_pages_take_the_experiment_for_one_of_trainings(finished: Finished) -> None:
    experiment = finished.tracker.client.get_experiment(finished.tracker.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_arm_is_not_taken_for_a_pipeline(finished: Finished) -> None:
    finished.track()
    arm = finished.arms()["oracle"].info.run_id
    with pytest.raises(TrackingError, match=f"Give its pipeline run: {finished.run_id}"):
        lookup.find_pipeline(finished.tracker, arm)
