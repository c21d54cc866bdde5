"""Prepared data becomes MLflow datasets that name their content and hold no secret and no image."""

import json
from pathlib import Path

import mlflow.data
import pytest

from pipelines.tracking.pages.datasets import datasets, inputs_of, log_inputs, without_secrets
from pipelines.tracking.runs import Tracker
from tests.pipelines.tracking.prepared import manifest


def test_a_split_is_named_by_its_content() -> None:
    found = datasets(manifest(), "/runs/stages/prepare-a")
    assert {split: data.name for split, data in found.items()} == {
        "train": "photos-train",
        "holdout": "photos-holdout",
        "val": "photos-val",
    }
    assert len({data.digest for data in found.values()}) == 3
    more = datasets(manifest(train=25), "/elsewhere")
    assert more["train"].digest != found["train"].digest
    assert more["val"].digest == found["val"].digest  # figures on it may be compared


def test_schema_and_profile_tell_what_a_row_holds() -> None:
    data = datasets(manifest(), "/runs/stages/prepare-a")["val"]
    columns = {column["name"] for column in json.loads(data.schema)["mlflow_colspec"]}
    assert columns >= {"image", "class_label", "labels", "task_mask", "mask_road"}
    assert "mask_pets" not in columns
    profile = json.loads(data.profile)
    assert (profile["rows"], profile["classes"], profile["image_size"]) == (9, 2, "32 x 48")
    assert profile["tasks"] == "pets (2 classes), road (3 classes, masks)"
    assert profile["sources"] == "photos (folder)"
    assert profile["rows_of_other_splits"] == "24 train, 6 holdout"
    assert profile["images_of_no_task"] == 2


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("/runs/a b", "/runs/a b"),
        ("s3://key:secret@bucket/runs?endpoint_override=x&secret_key=y", "s3://bucket/runs"),
        ("https://user@host:90/a", "https://host:90/a"),
    ],
)
def test_an_address_loses_its_secrets(address: str, shown: str) -> None:
    assert without_secrets(address) == shown


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/runs/p", "local"), ("file:///runs/p", "local"), ("s3://k:secret@b/p", "s3")],
)
def test_the_source_is_where_the_prepared_data_lies(folder: str, kind: str) -> None:
    data = datasets(manifest(), folder)["train"]
    assert data.source_type == kind
    assert json.loads(data.source) == {"uri": without_secrets(folder)}


def test_inputs_are_logged_once_with_their_use(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.open_stage(None, "stage1", "key", {}, folder="stages/stage1")
    assert run_id is not None
    known = datasets(manifest(), str(tmp_path))
    for _ in range(2):
        log_inputs(tracker, run_id, known, ("train", "holdout", "absent"))
    found = sorted(inputs_of(tracker.client.get_run(run_id)), key=lambda data: data["name"])
    assert [(data["name"], data["context"], data["rows"]) for data in found] == [
        ("photos-holdout", "validation", 6),
        ("photos-train", "training", 24),
    ]
    given = tracker.client.get_run(run_id).inputs.dataset_inputs[0].dataset
    assert mlflow.data.get_source(given).load() == str(tmp_path)
