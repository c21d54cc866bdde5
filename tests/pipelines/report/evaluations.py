"""Evaluations as a run writes them, and the text of a page that is made of one."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

TASKS = [
    {"name": "animals", "kind": "classification", "labels": ["cat", "dog"]},
    {"name": "road", "kind": "segmentation", "labels": ["road", "other"]},
]


def arm(kind, *, name="", rate=None, quality=None, seed=0, top1=0.5, size=None, **metrics):
    measured = {"val/top1": top1, "val/task/animals/top1": top1, "val/task/road/miou": 0.4}
    if size is not None:
        measured |= {"val/wire_bytes": size, "val/payload_bytes": size - 10}
        measured |= {"val/estimated_bytes": size - 11, "val/bpp": size * 8 / 1024}
    return {
        "name": name or kind,
        "label": name or kind,
        "kind": kind,
        "rate_weight": rate,
        "quality": quality,
        "seed": seed,
        "stage_key": "abc",
        "metrics": {**measured, **metrics},
        "detector_confusion": [[8, 2], [0, 0]] if kind == "mantis" else None,
        "detection_curve": [(1.0, 0.6), (2.5, 0.9)] if kind in ("mantis", "teacher") else None,
    }


def jpeg() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def evaluation(*arms, **fields):
    example = {
        "arm": "stage2",
        "jpeg_base64": jpeg(),
        "wire_bytes": 77,
        "true": {"animals": "cat", "road": "road"},
        "answer": {"animals": "dog"},
        "class": None,
    }
    return {
        "split": "val",
        "rows": 400,
        "image_size": [32, 32],
        "tasks": TASKS,
        "single_class": True,
        "arms": list(arms) or [arm("mantis", rate=0.01, size=64.0)],
        "examples": [example],
        **fields,
    }


def text_of(path) -> str:
    """What a reader sees: the text without tags and style."""
    parts: list[str] = []

    class Reader(HTMLParser):
        skipping = False

        def handle_starttag(self, tag, attributes):
            self.skipping = tag == "style"

        def handle_data(self, data):
            if not self.skipping:
                parts.append(data)

    Reader().feed(path.read_text())
    return " ".join(" ".join(parts).split())
