"""What the sources hold for the tasks: nothing is read."""

from __future__ import annotations

import pyarrow.compute as pc
import pytest

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.prepare.listing import list_sources
from data_prep.prepare.staging import Job
from data_prep.tasks import resolve_tasks

SPLITS = ("train", "val")


def job(data: DataConfig, *tasks: TaskConfig) -> Job:
    return Job(data, resolve_tasks(tasks, data), 0, data.root, "unused")


def test_a_task_without_training_images_is_refused(folder_data: DataConfig) -> None:
    with pytest.raises(DataError, match="task 'birds' has no training image"):
        list_sources(job(folder_data, TaskConfig(name="birds", group="birds")), SPLITS)


def test_a_cap_takes_that_many_rows(
    folder_data: DataConfig, animals: tuple[TaskConfig, ...]
) -> None:
    data = folder_data.model_copy(update={"train_rows": 10, "val_rows": 5})
    listing = list_sources(job(data, *animals), SPLITS)
    assert pc.sum(pc.equal(listing.references["split"], "train")).as_py() == 10
    assert pc.sum(pc.equal(listing.references["split"], "val")).as_py() == 5
    assert [source.rows for source in listing.sources] == [{"train": 36, "val": 12}]
