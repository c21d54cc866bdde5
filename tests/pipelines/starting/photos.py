"""Small folders of images for the tests of `mantis init`. Holds no test."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def jpeg(number: int = 0, size: tuple[int, int] = (80, 60)) -> bytes:
    stream = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", size, colour).save(stream, "JPEG")
    return stream.getvalue()


def photos(folder: Path, counts: Mapping[str, int], size: tuple[int, int] = (80, 60)) -> Path:
    """Writes images below `folder`; `counts` has their number by relative folder."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (folder / name / f"{index}.jpg").write_bytes(jpeg(number, size))
            number += 1
    return folder


def parquet(
    path: Path, columns: Mapping[str, Sequence[Any]], *, features: Mapping[str, Any] | None = None
) -> Path:
    """Writes a Parquet file of images with these columns; `features` are Hugging Face's."""
    count = len(next(iter(columns.values())))
    images: list[Any] = [jpeg(number) for number in range(count)]
    if features is not None:
        images = [{"bytes": image, "path": None} for image in images]
    table = pa.table({"image": images, **columns})
    if features is not None:
        info = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path
