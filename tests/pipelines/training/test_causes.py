"""Which errors end a training at once, and what stands behind those that Ray raises."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from data_prep.errors import DataError
from mantis_core.errors import ModelError
from mantis_core.training.loop import TrainingError
from pipelines.settings.errors import SettingsError
from pipelines.stages.spec import StageFailed
from pipelines.storage import StorageError
from pipelines.training.callback import StageCallback
from pipelines.training.causes import ADVICE, WorkersLost, ends_training, first_cause


class RayTaskError(RuntimeError):
    """As Ray's: the error of a task, with a page of traceback."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a page of traceback")
        self.cause = cause


class WorkerGroupError(RuntimeError):
    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("two pages of traceback")
        self.worker_failures = failures


LOST = RuntimeError("[gloo] Connection closed by peer")
NAN = TrainingError("the loss is nan at step 1")


@pytest.mark.parametrize(
    "error",
    [NAN, DataError("damaged"), ModelError("no split"), SettingsError("x"), KeyError("holdout")],
)
def test_errors_of_data_config_numbers_and_code_end_a_training(error: Exception) -> None:
    assert ends_training(error)


@pytest.mark.parametrize("error", [LOST, StorageError("full"), OSError("reset"), MemoryError()])
def test_lost_workers_and_storage_do_not(error: Exception) -> None:
    assert not ends_training(error)


def test_the_cause_is_the_error_of_a_task_without_rays_advice() -> None:
    told = DataError(f"shard a is damaged{ADVICE} 1/1 attempts.\nTo change retry attempts, ...")
    cause = first_cause(WorkerGroupError({0: RayTaskError(told)}))
    assert isinstance(cause, DataError)
    assert str(cause) == "shard a is damaged"


def test_the_cause_is_not_the_lost_connection_that_it_made() -> None:
    assert first_cause(WorkerGroupError({0: LOST, 1: NAN})) is NAN
    assert first_cause(WorkerGroupError({0: LOST})) is LOST


def test_what_ray_only_wraps_is_the_cause_and_what_we_wrap_is_not() -> None:
    class BlockError(RuntimeError):
        __module__ = "ray.exceptions"

    block, ours = BlockError("UDF failed to process a data block."), DataError("b.jpg is damaged")
    ours.__cause__ = OSError("EIO")
    block.__cause__ = ours
    assert first_cause(RayTaskError(block)) is ours


class Writer:
    uri, run_id, spool = "", None, ""


def reporting(max_failures: int) -> StageCallback:
    """Returns a callback that is told of epochs and needs no MLflow."""
    callback = StageCallback(Writer(), max_failures)  # type: ignore[arg-type]
    callback._writer = SimpleNamespace(write=lambda epoch: None)  # type: ignore[assignment]
    return callback


def test_the_controller_ends_a_training_at_the_first_such_error() -> None:
    callback = StageCallback(Writer(), 2)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="nan at step 1"):
        callback.after_exception(None, {0: LOST, 1: NAN})
    callback.after_exception(None, {0: LOST, 1: StorageError("full")})  # Ray restarts


def test_finished_epochs_give_a_training_new_restarts() -> None:
    callback = reporting(max_failures=1)
    for epoch in range(1, 6):
        callback.after_exception(None, {0: LOST})
        callback.after_report(None, [{"epoch": float(epoch)}], None)
    callback.after_exception(None, {0: LOST})
    with pytest.raises(WorkersLost, match=r"2 times without a finished epoch in between.*peer"):
        callback.after_exception(None, {0: LOST})


def test_an_epoch_that_was_finished_before_gives_no_new_restart() -> None:
    """Without a checkpoint of its own an epoch is trained again, and could be so for ever."""
    callback = reporting(max_failures=1)
    callback.after_report(None, [{"epoch": 1.0}], None)
    callback.after_exception(None, {0: LOST})
    callback.after_report(None, [{"epoch": 1.0}], None)
    with pytest.raises(WorkersLost, match="2 times"):
        callback.after_exception(None, {0: LOST})


def test_without_restarts_the_first_lost_worker_ends_a_training() -> None:
    with pytest.raises(WorkersLost, match=r"lost once, and cluster.max_failures"):
        reporting(max_failures=0).after_exception(None, {0: LOST})
    lost = pickle.loads(pickle.dumps(WorkersLost(3, LOST)))
    assert (lost.times, str(lost.last)) == (3, str(LOST))
    assert not ends_training(lost)
    assert first_cause(lost) is lost


def test_of_rays_message_on_a_lost_worker_two_lines_are_shown() -> None:
    page = (
        "A health check failed.\nWorker info: Worker(\n)\n\tpid: 7\nThe actor is dead because: OOM."
    )
    shown = str(WorkersLost(1, RuntimeError(page)))
    assert shown.endswith("RuntimeError: A health check failed. The actor is dead because: OOM.")
    assert str(WorkersLost(1, RuntimeError())).endswith("RuntimeError: ")


def test_a_failed_stage_passes_from_process_to_process() -> None:
    failed = pickle.loads(pickle.dumps(StageFailed("stage1", NAN)))
    assert str(failed) == "stage1 failed: TrainingError: the loss is nan at step 1"
    assert isinstance(failed.cause, TrainingError)
