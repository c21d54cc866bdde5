"""Runs are found again, metrics arrive once and in order, and an absent MLflow stops nothing."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from pipelines.tracking import lookup, metric_writer
from pipelines.tracking.metric_writer import MetricWriter
from pipelines.tracking.runs import Tracker, TrackingError, flatten, locate_tracking
from pipelines.versions import source_sha256

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture
def no_retries(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def history(tracker: Tracker, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, name)]


def open_stage(tracker: Tracker, key: str = "abc", name: str = "stage2", **kwargs) -> str:
    run_id = tracker.open_stage(None, name, key, {"epochs": 2}, folder=f"/runs/{key}", **kwargs)
    assert run_id is not None
    return run_id


def test_the_default_store_is_sqlite_under_the_root(tmp_path):
    location = locate_tracking(None, str(tmp_path))
    assert location.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert location.artifact_root == f"{tmp_path}/mlartifacts"
    assert location.spool_folder == tmp_path / "spool"


def test_an_http_server_decides_where_artifacts_go(tmp_path):
    assert locate_tracking("http://tracking:5000", str(tmp_path)).artifact_root is None


def test_a_remote_root_without_a_tracking_uri_is_refused_with_the_remedy():
    with pytest.raises(TrackingError, match=r"tracking\.uri"):
        locate_tracking(None, "s3://bucket/runs")


def test_a_pipeline_run_is_reopened_by_its_key(tracker):
    settings = {"seed": 0, "stage2": {"epochs": 3}, "tracking": {"uri": "http://me:secret@host"}}
    first = tracker.open_pipeline("quickstart", settings, "key-1")
    tracker.finish(first, "FAILED")
    again = Tracker(tracker.location, "mantis").open_pipeline("quickstart", settings, "key-1")
    other = tracker.open_pipeline("quickstart", settings, "key-2")

    assert again == first
    assert other != first
    run = tracker.client.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "quickstart"
    assert run.data.params == {"seed": "0", "stage2.epochs": "3"}


def test_a_stage_has_one_run_for_ever_nested_under_its_first_pipeline(tracker):
    parent = tracker.open_pipeline("quickstart", {}, "plan-1")
    stage1 = tracker.open_stage(parent, "stage1", "k1", {"epochs": 2}, folder="/runs/stage1-k1")
    stage2 = tracker.open_stage(
        parent, "stage2/none", "k2", {"epochs": 4}, folder="/runs/k2", upstream_keys=["k1"]
    )
    tracker.finish(stage1, "FINISHED", tags={"mantis.checkpoint": "/runs/stage1-k1/model"})
    second_parent = tracker.open_pipeline("other", {}, "plan-2")
    shared = tracker.open_stage(
        second_parent, "stage1", "k1", {"epochs": 2}, folder="/runs/stage1-k1", finished=True
    )

    assert shared == stage1
    run = tracker.client.get_run(stage1)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["mantis.checkpoint"] == "/runs/stage1-k1/model"
    assert json.loads(run.data.tags["mantis.versions"])["torch"]
    assert run.data.tags["mantis.source_sha256"] == source_sha256()
    stages = lookup.stages(tracker, lookup.find_pipeline(tracker, parent))
    assert list(stages) == ["stage1", "stage2/none"]
    assert stages["stage2/none"].run_id == stage2
    assert stages["stage2/none"].upstream_keys == ("k1",)
    assert (
        lookup.stages(tracker, lookup.find_pipeline(tracker, second_parent))["stage1"].run_id
        == stage1
    )


def test_reopening_with_changed_parameters_keeps_the_first_ones(tracker):
    run_id = tracker.open_pipeline("quickstart", {"cluster": {"workers": 1}}, "plan")
    tracker.open_pipeline("quickstart", {"cluster": {"workers": 2}}, "plan")
    assert tracker.client.get_run(run_id).data.params == {"cluster.workers": "1"}


def test_settings_become_flat_parameters():
    flat = flatten({"tasks": [{"name": "pets & co"}], "rates": [0.1, 0.2], "model": {"a+b": None}})
    assert flat == {"tasks.0.name": "pets & co", "rates": "[0.1, 0.2]", "model.a_b": "null"}


def test_latest_is_the_newest_pipeline_run_and_not_a_stage(tracker):
    parent = tracker.open_pipeline("quickstart", {}, "plan")
    stage = tracker.open_stage(parent, "stage1", "k1", {}, folder="/runs/k1")
    assert lookup.find_pipeline(tracker, "latest").info.run_id == parent
    with pytest.raises(TrackingError, match=parent):
        lookup.find_pipeline(tracker, stage)


@pytest.mark.parametrize("run", ["latest", "0" * 32])
def test_an_unknown_run_is_one_clear_message(tracker, run):
    with pytest.raises(TrackingError, match="--root"):
        lookup.find_pipeline(tracker, run)


def test_close_ends_only_runs_left_open(tracker):
    done, left = open_stage(tracker, "done"), open_stage(tracker, "left")
    tracker.finish(done, "FINISHED")
    tracker.close("KILLED")
    assert tracker.client.get_run(done).info.status == "FINISHED"
    assert tracker.client.get_run(left).info.status == "KILLED"


def test_results_are_logged_once_however_often_the_stage_is_finished(tracker):
    run_id = open_stage(tracker)
    for _ in range(2):
        tracker.finish(run_id, "FINISHED", metrics={"val/top1": 0.5, "val/bpp": math.inf})
    assert history(tracker, run_id, "val/top1") == [(0, 0.5)]
    assert "val/bpp" not in tracker.client.get_run(run_id).data.metrics


def test_metrics_are_logged_at_their_epoch_without_what_is_no_finite_number(tracker):
    run_id = open_stage(tracker)
    writer = tracker.metric_writer(run_id, "abc")
    writer.write(
        {
            "epoch": 3,
            "train/loss": np.float32(0.5),
            "val/psnr": math.inf,
            "val/bpp": math.nan,
            "note": "text",
            "done": True,
            "val/task/cats & dogs/top1": 0.25,
        }
    )
    metrics = tracker.client.get_run(run_id).data.metrics
    assert metrics == {"train/loss": 0.5, "val/task/cats _ dogs/top1": 0.25}
    assert history(tracker, run_id, "train/loss") == [(3, 0.5)]
    assert not writer.spool.exists()


def test_a_resumed_stage_does_not_log_an_epoch_twice(tracker):
    run_id = open_stage(tracker)
    for epoch in range(3):
        tracker.metric_writer(run_id, "abc").write({"epoch": epoch, "train/loss": 1.0})
    resumed = tracker.metric_writer(run_id, "abc")
    for epoch in range(1, 5):
        resumed.write({"epoch": epoch, "train/loss": 2.0})
    expected = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert history(tracker, run_id, "train/loss") == expected


def test_more_metrics_than_one_call_takes_all_arrive(tracker):
    run_id = open_stage(tracker)
    metrics = {f"val/task/t{index}/top1": float(index) for index in range(250)}
    tracker.metric_writer(run_id, "abc").write({"epoch": 0, **metrics})
    run = tracker.client.get_run(run_id)
    assert run.data.metrics == metrics
    assert run.data.tags["mantis.last_step"] == "0"


def test_metrics_are_spooled_while_the_server_is_away_and_replayed_once(tracker, no_retries):
    run_id = open_stage(tracker)
    writer = tracker.metric_writer(run_id, "abc")
    writer.retry_after_s = 0.0
    writer.write({"epoch": 0, "train/loss": 3.0})
    writer.uri = NOWHERE
    writer.write({"epoch": 1, "train/loss": 2.0})
    writer.write({"epoch": 2, "train/loss": 1.0})
    assert len(writer.spool.read_text().splitlines()) == 2
    spooled = writer.spool.read_text()

    writer.uri = tracker.location.uri
    writer.write({"epoch": 3, "train/loss": 0.5})
    expected = [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]
    assert history(tracker, run_id, "train/loss") == expected
    assert not writer.spool.exists()

    writer.spool.write_text(spooled)
    tracker.metric_writer(run_id, "abc").replay()
    assert history(tracker, run_id, "train/loss") == expected


def test_a_failing_server_is_left_alone_for_a_while(tmp_path, monkeypatch):
    calls = []

    def refuse(uri):
        calls.append(uri)
        raise MlflowException("down")

    monkeypatch.setattr(metric_writer, "bounded_client", refuse)
    writer = MetricWriter(NOWHERE, "run", tmp_path / "spool.jsonl", retry_after_s=3600.0)
    for epoch in range(5):
        writer.write({"epoch": epoch, "train/loss": 1.0})
    assert len(calls) == 1
    assert len(writer.spool.read_text().splitlines()) == 5


def test_a_lost_answer_does_not_log_a_value_twice(tracker, monkeypatch):
    run_id = open_stage(tracker)
    writer = tracker.metric_writer(run_id, "abc")
    writer.retry_after_s = 0.0
    send = metric_writer.log_record

    def send_then_lose_the_answer(*args, **kwargs):
        send(*args, **kwargs)
        monkeypatch.setattr(metric_writer, "log_record", send)
        raise MlflowException("connection reset")

    monkeypatch.setattr(metric_writer, "log_record", send_then_lose_the_answer)
    writer.write({"epoch": 0, "train/loss": 1.0})
    writer.write({"epoch": 1, "train/loss": 0.5})
    assert history(tracker, run_id, "train/loss") == [(0, 1.0), (1, 0.5)]


def test_text_of_an_epoch_becomes_a_tag_that_waits_like_a_metric(location, tracker, tmp_path):
    run_id = open_stage(tracker)
    spool = tmp_path / "spool.jsonl"
    MetricWriter(NOWHERE, None, spool).write({"epoch": 1, "train/rows_sha256": "ab", "x": 1.0})
    writer = MetricWriter(location.uri, run_id, spool)
    writer.write({"epoch": 2, "train/rows_sha256": "cd"})
    tags = tracker.client.get_run(run_id).data.tags
    assert tags["mantis.train/rows_sha256.1"] == "ab"
    assert tags["mantis.train/rows_sha256.2"] == "cd"


def test_the_writer_never_raises(tmp_path, caplog):
    unwritable = tmp_path / "file"
    unwritable.write_text("not a folder")
    writer = MetricWriter(NOWHERE, None, unwritable / "spool.jsonl")
    with caplog.at_level(logging.ERROR):
        writer.write({"epoch": 0, "train/loss": 1.0})
        writer.write({"no": "epoch"})
    assert len(caplog.records) == 2


def test_figures_are_sent_though_they_cannot_be_kept(tracker, tmp_path, caplog):
    unwritable = tmp_path / "file"
    unwritable.write_text("not a folder")
    run_id = open_stage(tracker)
    writer = MetricWriter(tracker.location.uri, run_id, unwritable / "spool.jsonl")
    with caplog.at_level(logging.ERROR):
        writer.write({"epoch": 1, "train/loss": 0.5})
    assert history(tracker, run_id, "train/loss") == [(1, 0.5)]
    assert "cannot be kept" in caplog.text


def test_a_private_spool_is_no_one_elses(tmp_path):
    spool = tmp_path / "spool/key.jsonl"
    MetricWriter(NOWHERE, None, spool, private=True).write({"epoch": 1, "train/loss": 0.5})
    assert spool.is_file()
    assert spool.parent.stat().st_mode & 0o777 == 0o700


def test_work_goes_on_without_mlflow_and_the_next_run_sends_what_was_kept(
    location, tmp_path, no_retries
):
    notes: list[str] = []
    away = dataclasses.replace(location, uri="http://me:secret@127.0.0.1:9")
    tracker = Tracker(away, "mantis", note=notes.append)
    assert tracker.open_pipeline("quickstart", {}, "plan") is None
    assert tracker.open_stage(None, "stage1", "k1", {}, folder="/runs/k1") is None
    tracker.metric_writer(None, "k1").write({"epoch": 0, "train/loss": 1.0})
    tracker.finish(None, "FINISHED")
    assert len(notes) == 1
    assert "secret" not in notes[0]
    assert "Work continues" in notes[0]

    back = Tracker(location, "mantis")
    run_id = back.open_stage(None, "stage1", "k1", {}, folder="/runs/k1", finished=True)
    assert run_id is not None
    assert history(back, run_id, "train/loss") == [(0, 1.0)]
    assert back.client.get_run(run_id).info.status == "FINISHED"


def test_disabled_tracking_touches_nothing(tmp_path):
    tracker = Tracker(locate_tracking(None, str(tmp_path)), "mantis", enabled=False)
    assert tracker.open_pipeline("quickstart", {}, "plan") is None
    tracker.metric_writer(None, "abc").write({"epoch": 0, "train/loss": 1.0})
    tracker.finish(None, "FINISHED")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_a_real_ray_train_run_logs_every_epoch_once_across_a_resume(tracker, tmp_path):
    import ray
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.training.callback import StageCallback

    def train(config):
        import tempfile

        import ray.train

        checkpoint = ray.train.get_checkpoint()
        first = 0
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                first = int((Path(folder) / "epoch").read_text()) + 1
        for epoch in range(first, config["epochs"]):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "epoch").write_text(str(epoch))
                ray.train.report(
                    {"epoch": epoch, "train/loss": 1.0 / (epoch + 1), "val/psnr": math.inf},
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                )

    run_id = open_stage(tracker)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
    )
    try:
        for epochs in (2, 4):
            TorchTrainer(
                train,
                train_loop_config={"epochs": epochs},
                scaling_config=ScalingConfig(num_workers=1),
                run_config=RunConfig(
                    name="abc",
                    storage_path=str(tmp_path / "train"),
                    checkpoint_config=CheckpointConfig(num_to_keep=1),
                    callbacks=[StageCallback(tracker.metric_writer(run_id, "abc"), 0)],
                ),
            ).fit()
    finally:
        ray.shutdown()
    expected = [(epoch, 1.0 / (epoch + 1)) for epoch in range(4)]
    assert history(tracker, run_id, "train/loss") == expected


def test_an_epoch_whose_report_was_lost_is_logged_with_the_next(tracker: Tracker) -> None:
    from pipelines.training.callback import StageCallback

    run_id = tracker.open_stage(None, "stage1", "lost", {}, folder="stages/stage1")
    callback = StageCallback(tracker.metric_writer(run_id, "lost"), 0)
    epochs = [{"epoch": float(n), "train/loss": 1.0 / n} for n in (1, 2, 3)]
    for done in (2, 3):  # the report of epoch 1 never came
        report = {**epochs[done - 1], "history": json.dumps(epochs[:done])}
        callback.after_report(None, [report], None)
    assert run_id is not None
    history = tracker.client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]
