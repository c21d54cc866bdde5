"""An ONNX graph in int8: weights by channel, activations by what images make of them."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from mantis_lite.client import IMAGE

CALIBRATED = ("Conv", "Gemm", "MatMul", "Add", "Clip", "Relu")
"""Kinds of nodes that are quantised; norms over groups have no integer form and stay float32."""


FLOAT = 3
"""The first convolutions stay float32: they cost little, and what they lose, all others lose."""


class _Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pictures: Sequence[NDArray[np.uint8]]) -> None:
        self.left: Iterator[NDArray[np.uint8]] = iter(pictures)

    def get_next(self) -> dict[str, Any] | None:
        """One more image, None after the last."""
        picture = next(self.left, None)
        return None if picture is None else {IMAGE: picture[None]}


def _convolutions(path: Path) -> list[str]:
    return [node.name for node in onnx.load(str(path)).graph.node if node.op_type == "Conv"]


def quantise(path: Path, pictures: Sequence[NDArray[np.uint8]]) -> None:
    """Replaces a float32 graph of images by one in int8, calibrated by `pictures` (3, H, W).

    Post-training, per channel, activations uint8 between the extremes that were seen. Weights take
    7 bits: on processors without dot products of bytes the sum of two products of 8 bits saturates.
    """
    before = logging.getLogger().level
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            logging.getLogger().setLevel(logging.ERROR)  # it advises what was done
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
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
                nodes_to_exclude=_convolutions(ready)[:FLOAT],
            )
    finally:
        logging.getLogger().setLevel(before)
