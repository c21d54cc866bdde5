"""The registered client and codec on image files, with a codec that only prepares."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from torch import Tensor

from mantis_core.networks.preprocessing import prepare_images
from mantis_core.pixels import ImageError
from pipelines.tracking.client_model import MantisClient
from pipelines.tracking.whole_model import MantisModel
from tests.mantis_core.picture_files import FILES


class PreparingCodec:
    """Its stream of an image is the mean of its pixels."""

    def prepare_images(self, files: list[bytes]) -> Tensor:
        return prepare_images(files, (32, 32), 32)

    def encode(self, images: Tensor) -> list[bytes]:
        return [str(round(float(image.float().mean()))).encode() for image in images]

    def decode(self, streams: list[bytes]) -> list[Any]:
        return [Row(stream) for stream in streams]


class Row:
    def __init__(self, stream: bytes) -> None:
        self.stream = stream

    def to_row(self) -> dict[str, bytes]:
        return {"stream": self.stream}


@pytest.fixture(params=[MantisClient, MantisModel])
def model(request: pytest.FixtureRequest) -> Any:
    made = request.param()
    made.codec = PreparingCodec()
    return made


def test_one_picture_has_one_stream_whatever_its_depth(model: Any) -> None:
    names = ["L", "16-bit PNG", "12 bits in a 16-bit PNG", "float TIFF of 0..1"]
    rows = pd.DataFrame({"image": [FILES[name]()[0] for name in names]}, index=list("abcd"))
    answers = model.predict(rows)
    assert answers["stream"].nunique() == 1
    assert list(answers.index) == list("abcd")


def test_bad_rows_are_all_named_with_the_projects_error(model: Any) -> None:
    rows = pd.DataFrame({"image": [FILES["L"]()[0], b"text", None]})
    with pytest.raises(ImageError, match=r"2 of 3 images cannot be read.*image 2: not an image"):
        model.predict(rows)


def test_no_rows_give_no_rows(model: Any) -> None:
    assert len(model.predict(pd.DataFrame({"image": []}))) == 0
