"""The registered client, server and codec: a bad row says why and leaves the others alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor

from mantis_core.bitstream.container import BitstreamError, Reason
from mantis_core.codec.answer import COLUMNS, Answer
from mantis_core.codec.checkpoint import save_model
from mantis_core.networks.preprocessing import prepare_image
from pipelines.tracking.client_model import MantisClient
from pipelines.tracking.package import PARTS, example_input
from pipelines.tracking.server_model import MantisServer
from pipelines.tracking.whole_model import MantisModel
from tests.mantis_core.conftest import make_codec, make_config, make_problem
from tests.mantis_core.picture_files import FILES

GOOD = FILES["L"]()[0]


class PreparingCodec:
    """Its stream of an image is the mean of its pixels, and its answer names the stream."""

    spec = make_codec(make_problem()).spec
    facts = spec.facts

    def prepare_image(self, data: bytes) -> Tensor:
        return prepare_image(data, (32, 32), 32)

    def encode(self, images: Tensor, tasks: None, *, level: None, max_bytes: None) -> list[bytes]:
        return [str(round(float(image.float().mean()))).encode() for image in images]

    def decode(self, streams: list[bytes]) -> list[Answer]:
        if not all(streams):
            raise BitstreamError(Reason.TRUNCATED, "the stream has 0 bytes")
        return [self.answer(part) for stream in streams for part in stream.split(b",")]

    def answer(self, name: bytes) -> Answer:
        return Answer((), {}, {}, {}, {}, 0, name.decode(), 0.5, {}, len(name), 0.0)


def loaded(kind: Any) -> Any:
    made = kind()
    made.codec = PreparingCodec()
    return made


def images(*files: object, index: str = "") -> pd.DataFrame:
    return pd.DataFrame({"image": list(files)}, index=list(index) or None)


def test_one_picture_has_one_stream_whatever_its_depth() -> None:
    names = ["L", "16-bit PNG", "12 bits in a 16-bit PNG", "float TIFF of 0..1"]
    rows = images(*(FILES[name]()[0] for name in names), index="abcd")
    assert loaded(MantisClient).predict(rows)["stream"].nunique() == 1
    answers = loaded(MantisModel).predict(rows)
    assert answers["class_name"].nunique() == 1
    assert list(answers.index) == list("abcd")


def test_a_client_names_the_bad_images_of_a_batch_in_their_rows() -> None:
    found = loaded(MantisClient).predict(images(GOOD, b"text", None, GOOD, index="abcd"))
    assert list(found.index) == list("abcd")
    assert list(found["error"].isna()) == [True, False, False, True]
    assert found["error"]["b"] == "not an image"
    assert "bytes of an image file" in found["error"]["c"]
    assert list(found["wire_bytes"])[1:3] == [0, 0]
    assert found["stream"]["a"] == found["stream"]["d"]
    assert found["stream"]["b"] == b""


def test_a_whole_codec_names_the_bad_images_of_a_batch_in_their_rows() -> None:
    found = loaded(MantisModel).predict(images(b"", GOOD))
    assert list(found["error"].isna()) == [False, True]
    assert found["error"][0] == "empty file"
    assert found["class_index"].tolist() == [-1, 0]
    assert found["answer"][0] == "{}"
    assert found["tasks"].tolist() == [[], []]


def test_a_server_names_the_bad_streams_of_a_batch_in_their_rows() -> None:
    rows = pd.DataFrame({"stream": [b"7", b"", b"7,8", None]})
    found = loaded(MantisServer).predict(rows)
    assert list(found["class_name"].isna()) == [False, True, True, True]
    assert pd.isna(found["error"][0])
    assert found["error"].tolist()[1:] == [
        "the stream has 0 bytes",
        "a stream of 2 images; give one image in each row",
        "the stream has 0 bytes",
    ]


def test_what_a_client_could_not_encode_is_an_error_of_the_server_too() -> None:
    streams = loaded(MantisClient).predict(images(GOOD, b"text"))
    answers = loaded(MantisServer).predict(streams[["stream"]])
    assert list(answers["error"].isna()) == [True, False]


@pytest.mark.parametrize(
    ("part", "kind", "column"),
    [
        ("client", MantisClient, "image"),
        ("server", MantisServer, "stream"),
        ("whole", MantisModel, "image"),
    ],
)
def test_the_columns_are_those_of_the_signature_also_without_rows(
    part: str, kind: Any, column: str
) -> None:
    found = loaded(kind).predict(pd.DataFrame({column: []}))
    assert len(found) == 0
    assert list(found.columns) == PARTS[part].signature.outputs.input_names()
    assert part == "client" or list(found.columns) == COLUMNS


def test_the_example_of_a_server_that_asks_holds_all_tasks(tmp_path: Path) -> None:
    codec = make_codec(make_problem(), make_config(requests="asked", prior="request"))
    save_model(tmp_path / "whole", codec, {})
    [answer] = codec.decode([example_input("server", tmp_path / "whole")])
    assert answer.tasks == codec.spec.task_names
    model = MantisModel()
    model.codec = codec
    picture = images(example_input("whole", tmp_path / "whole"))
    assert list(model.predict(picture)["tasks"]) == [list(codec.spec.task_names)]
    some = model.predict(picture, params={"tasks": "tools"})
    assert list(some["tasks"]) == [["tools"]]
