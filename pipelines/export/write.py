"""Writes the folder of an exported client, and proves it: golden cases, equal streams."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mantis_core.codec.client_codec import ClientCodec
from mantis_core.device import export, golden
from mantis_core.errors import ModelError
from mantis_lite.client import LiteClient
from pipelines.export.folders import whole
from pipelines.export.graphs import write_code, write_graphs
from pipelines.export.quantise import quantise

PACKAGES = ("mantis-codec", "torch", "onnx", "onnxruntime")
FILES = (*export.checked(export.MOST_EXTENSIONS), export.MANIFEST, export.README)
_OF_EXTENSION = 64  # images that are compared for it
README = """# A MANTiS client

Made by `mantis export`. It needs Python, numpy, onnxruntime and Pillow:

    pip install mantis_lite-*.whl    # built with `pip wheel --no-deps ./mantis_lite`
    mantis-lite check THIS_FOLDER
    mantis-lite encode THIS_FOLDER photographs/ -o streams/

Tasks: {tasks}. Images: {height} x {width} pixels. Rate levels: {levels}. Precision: {precision}.
Streams carry the id {stream_id}. A server decodes them with the whole model or its server half:
`mantis decode MODEL streams/`. What the files are stands in mantis_core/device/export.py.
"""


@dataclass(frozen=True)
class Exported:
    """What was written. `equal` of `compared` images have the stream that torch gives."""

    folder: Path
    files: dict[str, int]
    golden: int
    compared: int
    equal: int


def export_client(
    codec: ClientCodec,
    folder: Path,
    *,
    images: Iterable[NDArray[np.uint8]] | None = None,
    int8: bool = False,
    calibrating: int = 200,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Writes a client to `folder`, which is new or an earlier export.

    `images` (3, H, W) are coded both ways to compare the streams, and up to `calibrating` of them
    calibrate int8; None takes procedural ones. The folder appears whole or not at all. ModelError
    where it holds something else, for more extensions than an export may have, and where a float32
    client sends other streams than torch.
    """
    if len(codec.extensions) > export.MOST_EXTENSIONS:
        raise ModelError(
            f"this client has {len(codec.extensions)} extensions, and an export at most "
            f"{export.MOST_EXTENSIONS}: remove some with mantis_core.codec.adding.without_task"
        )
    size = codec.spec.image_size
    pictures = list(images) if images is not None else []
    if not pictures:
        pictures = [golden.procedural_image(1000 + number, size) for number in range(64)]
    with whole(folder, FILES) as partial:
        say("graphs: two ONNX files from torch")
        write_graphs(codec, partial / export.LOOK, partial / export.CODE)
        if int8:
            some = evenly(pictures, calibrating)
            say(f"int8: {export.LOOK} by {len(some)} images")
            quantise(partial / export.LOOK, some)
        export.write_tables(partial, codec.tables)
        for number, own in enumerate(codec.extensions, start=1):
            say(f"graphs: {export.numbered(export.CODE, number)} of {', '.join(own.facts.tasks)}")
            write_code(own, partial / export.numbered(export.CODE, number))
            export.write_tables(partial, own.tables, number)
        client = LiteClient(partial, _manifest(codec, int8=int8, files={}))
        cases = golden.make(client)
        say(f"golden: {len(cases)} cases")
        golden.write_cases(partial, cases)
        manifest = _manifest(codec, int8=int8, files=export.hashes(partial, len(codec.extensions)))
        (partial / export.README).write_text(_readme(manifest), encoding="utf-8")
        say(f"streams: {len(pictures)} images by torch and by onnxruntime")
        equal, compared = _equal(codec, client, pictures)
        if not int8 and equal < golden.LEAST_SAME * compared:
            raise ModelError(
                f"{equal} of {compared} images have the stream that torch gives: the graphs "
                "compute otherwise with these versions of torch and onnxruntime; export with others"
            )
        export.write_manifest(partial, manifest)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(folder, files, len(cases), compared, equal)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Up to `most` of `items`, at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most)]


def _manifest(
    codec: ClientCodec, *, int8: bool, files: dict[str, tuple[int, str]]
) -> export.Manifest:
    own, *extended = (
        export.Part(
            each.facts,
            each.stream_spec,
            each.tables.prior,
            each.tables.cdf.shape[1] // len(each.tables.lengths),
        )
        for each in (codec, *codec.extensions)
    )
    return export.Manifest(
        facts=own.facts,
        stream=own.stream,
        prior=own.prior,
        contexts=own.contexts,
        mask_threshold=codec.looker.mask_threshold,
        precision="int8" if int8 else "float32",
        model_id=codec.ids.model.hex(),
        made_with={name: _version(name) for name in PACKAGES},
        files=files,
        extensions=tuple(extended),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _readme(manifest: export.Manifest) -> str:
    facts = manifest.facts
    height, width = facts.image_size
    return README.format(
        tasks=", ".join(name for part in manifest.parts for name in part.facts.tasks),
        height=height,
        width=width,
        levels=facts.rate_levels,
        precision=manifest.precision,
        stream_id=" or ".join(part.stream.model_id.hex() for part in manifest.parts),
    )


def _equal(
    codec: ClientCodec, client: LiteClient, pictures: Sequence[NDArray[np.uint8]]
) -> tuple[int, int]:
    """How many images have one stream in torch and in onnxruntime, and of how many.

    Each is coded another way; for each extension some of them once more.
    """
    equal = compared = 0
    for number, own in enumerate((codec, *codec.extensions)):
        some = evenly(pictures, _OF_EXTENSION) if number else pictures
        compared += len(some)
        for picture, (request, level) in zip(some, golden.ways(own.facts, len(some)), strict=True):
            ours = codec.encode(torch.from_numpy(picture.copy())[None], request, level=level)
            equal += ours == client.encode(picture[None], request, level=level)
    return equal, compared
