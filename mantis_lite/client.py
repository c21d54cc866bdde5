"""An exported client at work, its networks in onnxruntime.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mantis_core.bitstream.container import ID_PLACE
from mantis_core.bitstream.wire import Unpacked, read_stream
from mantis_core.device.client import DeviceClient
from mantis_core.device.export import (
    CODE,
    LOOK,
    Manifest,
    check_files,
    numbered,
    read_manifest,
    read_tables,
)
from mantis_core.device.facts import ClientFacts
from mantis_core.device.look import Floats, Glimpse, Latents
from mantis_core.errors import ModelError
from mantis_core.pixels import MAX_PIXELS, read_pixels

PROBABILITIES, CLASSES = "probabilities", "class_probabilities"
LATENT, ANSWERS = "latent", "answers"
CONDITION, LEVEL, IMAGE = "condition", "level", "image"
EVEN = 0.5  # of each task, for a client that detects nothing


class OnnxNetwork:
    """A client's two graphs, the first of which its extensions share. Images pass one by one."""

    alone = True

    def __init__(
        self,
        folder: str | Path,
        facts: ClientFacts,
        *,
        threads: int = 1,
        number: int = 0,
        look: Any = None,
    ) -> None:
        """`threads` each graph may use; with more than one, kernels may round otherwise.

        `number` is that of an extension, from 1, which has the session `look` of its client.
        """
        self.facts, self.detects = facts, not number
        self.look = onnx_session(Path(folder) / LOOK, threads) if look is None else look
        self._code = onnx_session(Path(folder) / numbered(CODE, number), threads)
        self._seen = [output.name for output in self.look.get_outputs()]
        self._coded = [output.name for output in self._code.get_outputs()]
        self._wanted = {given.name for given in self._code.get_inputs()}

    def see(self, images: NDArray[np.uint8]) -> Glimpse:
        """A uint8 image (1, 3, H, W), see `Network`."""
        shape = tuple(images.shape[2:])
        if shape != self.facts.image_size:
            height, width = self.facts.image_size
            raise ModelError(
                f"images have {shape[0]}x{shape[1]} pixels; this export is of {height}x{width}: "
                "use prepare_image"
            )
        found = dict(zip(self._seen, _run(self.look, {IMAGE: images}), strict=True))
        even = np.full((len(images), len(self.facts.tasks)), EVEN, np.float32)
        probabilities, classes = found.pop(PROBABILITIES, even), found.pop(CLASSES, None)
        if not self.detects:
            return Glimpse(even, None, found)
        return Glimpse(probabilities, classes, found)

    def code(
        self, features: dict[str, Any], rows: Sequence[int], condition: Floats, level: int
    ) -> Latents:
        """The image of a glimpse, see `Network`."""
        given = dict(features, **{CONDITION: condition, LEVEL: np.array([level], np.int64)})
        given = {name: value for name, value in given.items() if name in self._wanted}
        found = dict(zip(self._coded, _run(self._code, given), strict=True))
        if not np.isfinite(found[LATENT]).all():
            raise ModelError("the latent is not finite: the export or this machine's onnxruntime")
        return Latents(found[LATENT], found.get(ANSWERS))


class LiteClient(DeviceClient[NDArray[np.uint8]]):
    """A client in onnxruntime. What it does is told in `DeviceClient`; images are uint8 arrays
    (B, 3, H, W) of the model's own size."""

    array_type, array_name = np.ndarray, "array"

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        threads: int = 1,
        number: int = 0,
        look: Any = None,
    ) -> None:
        """`number` and `look` are as those of `OnnxNetwork`."""
        part = manifest.parts[number]
        network = OnnxNetwork(folder, part.facts, threads=threads, number=number, look=look)
        super().__init__(
            part.facts,
            network,
            read_tables(folder, manifest, number),
            part.stream,
            manifest.mask_threshold,
        )
        self.manifest = manifest
        if not number:
            others = range(1, len(manifest.parts))
            self.extend(
                [
                    LiteClient(folder, manifest, threads=threads, number=n, look=network.look)
                    for n in others
                ]
            )

    def of_stream(self, stream: bytes) -> LiteClient:
        """The part of this client that makes streams of the id in `stream`; itself for others."""
        known = {own.stream_spec.model_id: own for own in self.extensions}
        return known.get(stream[ID_PLACE], self)

    def prepare_image(self, data: bytes, *, max_pixels: float = MAX_PIXELS) -> NDArray[np.uint8]:
        """An image file's bytes to uint8 (3, H, W) as in evaluation: short side, centre crop.

        Raises ImageError for a file that does not decode or is of more than `max_pixels`.
        """
        size, short_side = self.facts.image_size, self.facts.short_side
        pixels = read_pixels(data, size, short_side, max_pixels=max_pixels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def read(self, stream: bytes) -> Unpacked:
        """Task fields and symbols of a stream; BitstreamError if it is none of this model's."""
        own = self.of_stream(stream)
        return read_stream(stream, own.tables, own.stream_spec)


def open_export(folder: str | Path, *, threads: int = 1) -> LiteClient:
    """The client in a folder that `mantis export` wrote.

    Raises ModelError where there is none, where a file is not the one that was exported, and where
    onnxruntime cannot load it.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return LiteClient(folder, manifest, threads=threads)


def _run(session: Any, given: dict[str, Any]) -> list[Any]:
    try:
        found: list[Any] = session.run(None, given)
    except Exception as error:  # onnxruntime has a class for each of its own causes
        raise ModelError(f"onnxruntime cannot run the export: {error}") from error
    return found


def onnx_session(path: Path, threads: int) -> Any:
    """An onnxruntime session on the CPU; ModelError for a file that it cannot load."""
    import onnxruntime

    if threads < 1:
        raise ModelError(f"threads is {threads}: give a number from 1")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each of its own causes
        raise ModelError(
            f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}: {error}"
        ) from error
