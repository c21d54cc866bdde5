"""Compares ways to store the images that prepare has resized: bytes, time, and change of pixels.

    python -m benchmarks.stored_images DATA.parquet [--short-side 256] [--images 24]

DATA is a Parquet file with encoded images in its first binary column. Times are CPU time of one
core. `difference` is the mean difference to the pixels that a client sees, of 255.
"""

import argparse
import io
import json
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.determinism import image_bytes
from mantis_core.pixels import read_image

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG 90, 4:2:0": ("JPEG", {"quality": 90, "subsampling": "4:2:0"}),
    "JPEG 95, 4:4:4": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    "JPEG 98, 4:4:4": ("JPEG", {"quality": 98, "subsampling": "4:4:4"}),
    "PNG": ("PNG", {}),
    "WebP lossless, method 0": ("WEBP", {"lossless": True, "method": 0, "quality": 0}),
    "WebP lossless, method 4": ("WEBP", {"lossless": True, "method": 4}),
}


def stored(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    """Returns the file of an image."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def measure(images: list[Image.Image], kind: str, options: dict[str, Any]) -> dict[str, float]:
    """Returns means over the images."""
    start = time.process_time()
    files = [stored(image, kind, options) for image in images]
    middle = time.process_time()
    decoded = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    end = time.process_time()
    difference = [
        np.abs(np.asarray(image, int) - pixels).mean()
        for image, pixels in zip(images, decoded, strict=True)
    ]
    return {
        "bytes": round(np.mean([len(file) for file in files])),
        "encode_ms": round((middle - start) / len(images) * 1e3, 2),
        "decode_ms": round((end - middle) / len(images) * 1e3, 2),
        "difference": round(float(np.mean(difference)), 2),
    }


def main() -> None:
    """Prints one JSON object for each format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="Parquet file with encoded images")
    parser.add_argument("--short-side", type=int, default=256, metavar="PX")
    parser.add_argument("--images", type=int, default=24, metavar="N", help="only the first N")
    arguments = parser.parse_args()
    files = list(image_bytes([arguments.data]))[: arguments.images]
    images = [read_image(data, short_side=arguments.short_side).image for data in files]
    for name, (kind, options) in FORMATS.items():
        measure(images[:2], kind, options)  # the first call loads the codec
        print(json.dumps({"format": name, **measure(images, kind, options)}), flush=True)


if __name__ == "__main__":
    main()
