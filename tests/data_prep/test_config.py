"""The sections `tasks` and `data` of a config file."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from data_prep.config import DataConfig, TaskConfig
from data_prep.reading import ReadingConfig
from data_prep.sources.kinds import SOURCES
from data_prep.sources.parquet import Presence


def test_a_classification_needs_exactly_one_way_to_name_its_classes() -> None:
    with pytest.raises(ValidationError, match="exactly one of group, classes"):
        TaskConfig(name="dogs", group="dogs", indices="151-268")
    with pytest.raises(ValidationError, match="got none"):
        TaskConfig(name="dogs")


@pytest.mark.parametrize("name", ["Dogs", "1", "my dogs", "dogs.", "_dogs", "", 101 * "a"])
def test_a_name_that_metrics_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        TaskConfig(name=name, group="dogs")
    assert TaskConfig(name=100 * "a", group="dogs").name


def test_a_segmentation_refuses_classes() -> None:
    with pytest.raises(ValidationError, match="takes `labels` only"):
        TaskConfig(name="road", kind="segmentation", classes=("a", "b"))


def test_a_short_side_below_the_image_size_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"data\.short_side is 32"):
        DataConfig(sources=({"kind": "shapes"},), image_size=64, short_side=32)


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="give each a `name`"):
        DataConfig(sources=({"kind": "shapes"}, {"kind": "shapes"}))


def test_an_unknown_source_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="colour"):
        DataConfig(sources=({"kind": "shapes", "colour": 1},))


def test_the_fields_that_shape_batches_are_those_of_reading() -> None:
    data = DataConfig(sources=({"kind": "shapes"},))
    assert data.reading == ReadingConfig()
    values = {
        "augmentation": "random_resized_crop",
        "crop_padding": 1,
        "min_crop_area": 0.5,
        "flip": False,
        "cache": "decoded",
        "cache_gib": 1.5,
        "shuffle_window_rows": 7,
    }
    data = DataConfig(sources=({"kind": "shapes"},), **values)
    assert data.reading.model_dump() == values
    assert {name: getattr(data, name) for name in values} == values
    for name, field in ReadingConfig.model_fields.items():
        assert DataConfig.model_fields[name].description == field.description
    with pytest.raises(ValidationError, match="min_crop_area"):
        DataConfig(sources=({"kind": "shapes"},), min_crop_area=1.5)


@pytest.mark.parametrize(
    "model", [TaskConfig, DataConfig, ReadingConfig, Presence, *SOURCES.values()]
)
def test_every_field_is_described_in_whole_sentences(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        description = field.description or ""
        assert description.endswith("."), name
        assert description[0].isupper() or description[0] == "`", name
