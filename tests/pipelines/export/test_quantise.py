"""Graphs in int8: which weights take how many bits, and what rounding leaves of each layer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from mantis_core.device.golden import procedural_image
from mantis_lite.client import IMAGE
from pipelines.export import quantise as module
from pipelines.export.graphs import write_graphs
from pipelines.export.quantise import FLOAT, quantise
from tests.pipelines.export.codecs import codec_of

Pictures = list[NDArray[np.uint8]]


class Look:
    """The graph of a client that looks at images: exact, in integers, and without correction."""

    def __init__(self, kind: str, folder: Path) -> None:
        client = codec_of(kind).client_codec()
        self.exact, self.moved, self.left = (
            folder / f"{name}.onnx" for name in ("exact", "moved", "left")
        )
        write_graphs(client, self.exact, folder / "code.onnx")
        size = client.spec.image_size
        self.pictures: Pictures = [procedural_image(number, size) for number in range(6)]
        for path in (self.moved, self.left):
            shutil.copy(self.exact, path)
        quantise(self.moved, self.pictures)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_correct", lambda *given: None)
            quantise(self.left, self.pictures)


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Look:
    """One with depthwise convolutions, and biases."""
    return Look("lite", tmp_path_factory.mktemp("lite"))


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Look:
    """One with norms over groups, whose convolutions have no bias."""
    return Look("asked", tmp_path_factory.mktemp("normed"))


def features(path: Path, pictures: Pictures) -> NDArray[Any]:
    """What a graph makes of images (N, 3, H, W): the first output, (N, C, h, w)."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {IMAGE: picture[None]})[0] for picture in pictures])


@pytest.mark.parametrize("kind", ["lite", "normed"])
def test_what_rounding_shifts_on_the_mean_is_taken_back(
    kind: str, request: pytest.FixtureRequest
) -> None:
    look: Look = request.getfixturevalue(kind)
    exact, moved, left = (
        features(path, look.pictures) for path in (look.exact, look.moved, look.left)
    )
    shifts = [np.abs((own - exact).mean(axis=(0, 2, 3))).mean() for own in (moved, left)]
    assert 0 < shifts[0] < 0.5 * shifts[1]


def test_depthwise_weights_take_eight_bits_and_others_seven(lite: Look) -> None:
    graph = onnx.load(str(lite.moved)).graph
    kept = {own.name: numpy_helper.to_array(own) for own in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    largest: dict[bool, set[int]] = {True: set(), False: set()}
    floats = 0
    for node in graph.node:
        if node.op_type == "Conv":
            source = made_by.get(node.input[1])
            if source is None:
                floats += 1
                continue
            weights = kept[source.input[0]]
            assert weights.dtype == np.int8
            groups = next(own.i for own in node.attribute if own.name == "group")
            largest[groups > 1].add(int(np.abs(weights.astype(int)).max()))
    assert floats == FLOAT
    assert largest[True] == {127}
    assert largest[False] <= {63, 64}
    # Nothing before the float convolutions is rounded: it would be lost for all of them.
    before = [node.op_type for node in graph.node if node.op_type != "DequantizeLinear"]
    assert "QuantizeLinear" not in before[: before.index("Conv")]


def test_a_bias_that_would_overflow_is_held_at_the_largest(
    lite: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "int8.onnx"
    shutil.copy(lite.left, path)

    def means(model: onnx.ModelProto, outputs: list[str], pictures: Pictures) -> Any:
        return [np.array(1e12 if len(outputs) > 1 else 0.0)] * len(outputs)

    monkeypatch.setattr(module, "_means", means)
    module._correct(path, onnx.load(str(lite.exact)), lite.pictures)
    graph = onnx.load(str(path)).graph
    biases = [
        numpy_helper.to_array(own)
        for own in graph.initializer
        if own.name.endswith("bias_quantized")
    ]
    assert biases
    assert all((own == 2**31 - 1).all() for own in biases)
