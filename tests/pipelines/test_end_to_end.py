"""The main job as a user runs it: real Ray Data, Ray Train with two workers, MLflow, bitstreams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.pipelines.experiment import (
    CLASSES,
    SIZE,
    VAL_ROWS,
    last_json,
    mantis,
    mantis_here,
    paint,
    planned_hashes,
    write_config,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the whole chain has run once, with one broken image among the good."""
    folder = tmp_path_factory.mktemp("chain")
    paint(folder / "images")
    (folder / "images/train/n02085620/broken.JPEG").write_text("no image")
    config = write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USER", "nobody-elses-name")
        patch.setenv("LOGNAME", "nobody-elses-name")
        result = last_json(mantis("run", "--config", str(config), "--json", folder=folder))
    return folder, config, result


@pytest.mark.timeout(900)
def test_the_chain_runs_every_stage_and_measures_real_streams(finished):
    folder, _, result = finished
    assert {name: stage["status"] for name, stage in result["stages"].items()} == {
        name: "ran" for name in ("prepare", "stage1", "stage2", "evaluate", "register")
    }
    metrics = result["metrics"]
    assert metrics["val/wire_bytes"] > metrics["val/payload_bytes"] > 0
    assert metrics["val/bpp"] == pytest.approx(metrics["val/wire_bytes"] * 8 / SIZE**2)
    gap = abs(metrics["val/estimated_bytes"] - metrics["val/payload_bytes"])
    assert gap <= 0.01 * metrics["val/payload_bytes"] + 8
    assert 0 <= metrics["val/top1"] <= 1
    prepared = next((folder / "runs/stages").glob("prepare-*"))
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["rejected"] == 1
    assert manifest["splits"]["val"]["rows"] == VAL_ROWS * len(CLASSES)


@pytest.mark.timeout(900)
def test_every_training_row_is_consumed_as_planned_or_counted_as_left_out(finished):
    folder, config, result = finished
    train = result["stages"]["prepare"]["rows"]["train"]
    for name in ("stage1", "stage2"):
        rows = result["stages"][name]["rows"]
        assert rows["per_epoch"] == train // 16 * 16
        assert rows["left_out"] == train % 16 > 0
        assert rows["sha256"] == planned_hashes(config, name)
    planned = last_json(
        mantis_here("run", "--config", str(config), "--dry-run", "--json", folder=folder)
    )
    training = {each["stage"]: each["training"] for each in planned["stages"]}["stage2"]
    assert (training["rows"], training["rows_left_out"]) == (train, train % 16)


@pytest.mark.timeout(900)
def test_mlflow_has_one_run_a_stage_and_no_step_twice(finished):
    folder, _, result = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs/mlflow.db'}")
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    runs = client.search_runs([parent.info.experiment_id])
    arms = {run.data.tags["mantis.arm"] for run in runs if "mantis.arm" in run.data.tags}
    assert arms == {"stage2", "oracle", "teacher", "webp/quality-5", "webp/quality-75"}
    runs = [run for run in runs if "mantis.arm" not in run.data.tags]
    names = sorted(run.data.tags.get("mantis.stage", "") for run in runs)
    assert names == ["", "evaluate", "prepare", "register", "stage1", "stage2"]
    for run in runs:
        if run.data.tags.get("mantis.stage") in ("stage1", "stage2"):
            steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
            assert steps == [1]
            hashes = result["stages"][run.data.tags["mantis.stage"]]["rows"]["sha256"]
            assert [run.data.tags["mantis.train/rows_sha256.1"]] == hashes


@pytest.mark.timeout(900)
def test_a_second_run_skips_everything(finished):
    folder, config, result = finished
    again = last_json(mantis_here("run", "--config", str(config), "--json", folder=folder))
    assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
    assert again["metrics"] == result["metrics"]
    assert again["run_id"] == result["run_id"]


@pytest.mark.timeout(900)
def test_no_file_of_a_run_names_a_folder_or_the_user_of_this_machine(finished):
    """MLflow's database and the log say where files are, and Ray Train's folder is for resuming."""
    folder, _, _ = finished
    files = [f for part in ("stages", "mlartifacts") for f in (folder / "runs" / part).rglob("*")]
    contents = {file: file.read_bytes() for file in files if file.is_file()}
    assert len(contents) > 20
    private = [str(folder).encode(), str(Path.home()).encode() + b"/", b"nobody-elses-name"]
    assert [file for file, data in contents.items() if any(word in data for word in private)] == []


@pytest.mark.timeout(900)
def test_image_codecs_stand_beside_the_codec_with_their_whole_files(finished):
    folder, _, _ = finished
    (report,) = folder.glob("runs/stages/evaluate-*/evaluation.json")
    arms = {arm["name"]: arm for arm in json.loads(report.read_text())["arms"]}
    small, large = (arms[f"webp/quality-{quality}"]["metrics"] for quality in (5, 75))
    assert 0 < small["val/payload_bytes"] < small["val/wire_bytes"] < large["val/wire_bytes"]
    assert 0 <= small["val/top1"] <= 1
    assert 0 <= small["val/agreement"] <= 1
    assert "val/agreement" not in arms["teacher"]["metrics"]
    assert "val/wire_bytes" not in arms["teacher"]["metrics"]


@pytest.mark.timeout(900)
def test_scoring_the_registered_model_gives_the_chains_own_figures(finished):
    folder, _, result = finished
    data = str(folder / "images")
    done = mantis("score", "models:/mantis@candidate", data, "--json", folder=folder)
    scored = last_json(done)["metrics"]
    for name in ("val/top1", "val/wire_bytes", "val/payload_bytes"):
        assert scored[name] == result["metrics"][name]


@pytest.mark.timeout(900)
def test_the_registered_model_codes_an_image_file(finished):
    folder, _, _ = finished
    image = next((folder / "images/val/n02123045").iterdir())
    client, server = (f"models:/mantis-{half}@candidate" for half in ("client", "server"))
    mantis("encode", client, str(image), "-o", "one.mts", folder=folder)
    decoded = last_json(mantis_here("decode", server, "one.mts", "--json", folder=folder))
    (stream,) = decoded["streams"]
    assert stream["wire_bytes"] == (folder / "one.mts").stat().st_size
    (answer,) = stream["images"]
    assert 0 <= answer["class_index"] < len(CLASSES)
    whole = "models:/mantis@candidate"
    assert last_json(mantis_here("decode", whole, "one.mts", "--json", folder=folder)) == decoded
    damaged = bytearray((folder / "one.mts").read_bytes())
    damaged[-6] ^= 1
    (folder / "damaged.mts").write_bytes(damaged)
    refused = mantis("decode", server, "damaged.mts", folder=folder, code=2)
    assert len(refused.stderr.strip().splitlines()) == 1
