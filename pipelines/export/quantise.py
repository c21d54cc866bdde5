"""An ONNX graph in int8: weights by channel, activations by what images make of them.

Post-training. What rounding shifts on the mean is taken back in the biases, layer after layer:
"bias correction" of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (ICCV 2019), section 4.2, with the means of images.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from mantis_lite.client import IMAGE

CALIBRATED = ("Conv", "Gemm", "MatMul", "Add", "Clip", "Relu")
"""Kinds of nodes that are quantised; norms over groups have no integer form and stay float32."""

FLOAT = 3
"""The first convolutions stay float32, and what is before them: they cost little, and what they
lose, all others lose."""
CORRECTED_BY = 64  # images
_MOST = 2**31 - 1  # of an int32
_WHOLE_BYTES = {
    "quant_type": quantization.QuantType.QInt8,
    "axis": 0,
    "symmetric": True,
    "reduce_range": False,
}

Pictures = Sequence[NDArray[np.uint8]]


class _Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pictures: Pictures) -> None:
        self.left: Iterator[NDArray[np.uint8]] = iter(pictures)

    def get_next(self) -> dict[str, Any] | None:
        """One more image, None after the last."""
        picture = next(self.left, None)
        return None if picture is None else {IMAGE: picture[None]}


def quantise(path: Path, pictures: Pictures) -> None:
    """Replaces a float32 graph of images by one in int8, calibrated by `pictures` (3, H, W).

    Per channel, activations uint8 between the extremes that were seen. Weights take 8 bits in
    depthwise convolutions and 7 elsewhere: on processors without dot products of bytes the sum of
    two products of 8 bits saturates, and those alone are summed so.
    """
    before = logging.getLogger().level
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            logging.getLogger().setLevel(logging.ERROR)  # it advises what was done
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
            exact = _with_biases(onnx.load(str(ready)))
            onnx.save(exact, str(ready))
            depthwise = [node for node in _convolutions(exact.graph) if _groups(node) > 1]
            quantization.quantize_static(
                str(ready),
                str(path),
                _Images(pictures),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                op_types_to_quantize=list(CALIBRATED),
                nodes_to_exclude=_first(exact.graph),
                extra_options={
                    "TensorQuantOverrides": {node.input[1]: [_WHOLE_BYTES] for node in depthwise}
                },
            )
            _correct(path, exact, pictures[:CORRECTED_BY])
    finally:
        logging.getLogger().setLevel(before)


def _convolutions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "Conv"]


def _with_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, in which every convolution has a bias that can be moved."""
    sizes = {own.name: own.dims[0] for own in model.graph.initializer if own.dims}
    for node in _convolutions(model.graph):
        if len(node.input) == 2:
            name = f"{node.name}_bias"
            zeros = np.zeros(sizes[node.input[1]], np.float32)
            model.graph.initializer.append(numpy_helper.from_array(zeros, name))
            node.input.append(name)
    return model


def _first(graph: onnx.GraphProto) -> list[str]:
    """The names of all nodes up to the last convolution that stays float32."""
    last = _convolutions(graph)[:FLOAT][-1].name
    names = [node.name for node in graph.node]
    return names[: names.index(last) + 1]


def _groups(node: onnx.NodeProto) -> int:
    return next((own.i for own in node.attribute if own.name == "group"), 1)


class _Bias(NamedTuple):
    """The int32 bias of a quantised convolution: its node, its initializer and its scales."""

    node: onnx.NodeProto
    values: onnx.TensorProto
    scales: NDArray[np.float32]


def _correct(path: Path, exact: onnx.ModelProto, pictures: Pictures) -> None:
    """Moves the biases of a quantised graph until each layer's means are those of the exact one.

    In the order of the layers, so that each also takes back what those before it have left.
    """
    model = onnx.load(str(path))
    biases = _biases(model.graph)
    # Not by the output's name: behind a clip that rounding does by the way it is the clip's.
    outputs = {node.name: node.output[0] for node in exact.graph.node}
    wanted = _means(exact, [outputs[own.node.name] for own in biases], pictures)
    for own, mean in zip(biases, wanted, strict=True):
        (found,) = _means(model, [own.node.output[0]], pictures)
        moved = numpy_helper.to_array(own.values) + np.rint((mean - found) / own.scales)
        values = np.clip(moved, -_MOST, _MOST).astype(np.int32)
        own.values.CopyFrom(numpy_helper.from_array(values, own.values.name))
    onnx.save(model, str(path))


def _biases(graph: onnx.GraphProto) -> list[_Bias]:
    """Those of all convolutions in integers, in the order in which they run."""
    made_by = {output: node for node in graph.node for output in node.output}
    kept = {own.name: own for own in graph.initializer}
    found = []
    for node in graph.node:
        source = made_by.get(node.input[2]) if node.op_type == "Conv" else None
        if source is not None and source.op_type == "DequantizeLinear":
            scales = numpy_helper.to_array(kept[source.input[1]])
            found.append(_Bias(node, kept[source.input[0]], scales))
    return found


def _means(
    model: onnx.ModelProto, outputs: Sequence[str], pictures: Pictures
) -> list[NDArray[np.float64]]:
    """The means over images and places of tensors (1, C, h, w) of a graph: (C,) each."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    for name in outputs:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        shown.graph.output.append(value)
    session = onnxruntime.InferenceSession(
        shown.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    sums = [np.zeros(1)] * len(outputs)
    for picture in pictures:
        seen = session.run(list(outputs), {IMAGE: picture[None]})
        sums = [
            own + one.mean(axis=(0, 2, 3), dtype=float) for own, one in zip(sums, seen, strict=True)
        ]
    return [own / len(pictures) for own in sums]
