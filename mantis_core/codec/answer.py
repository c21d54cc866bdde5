"""Records of one image: its stream, as the client made it, and the server's answer.

Shapes: K tasks, H W input pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Encoded:
    """The stream of one image, and what the client saw. probabilities and mask are (K,).

    `payload_bytes` is the share of the coded latent in the stream, and of the client's answer that
    goes with it; the task field costs fractions of bytes. `estimated_bits` is NaN for a client
    without the density. `answered` says whether the client has sent its own answer and no latent.
    `client_class` is the class that its detector gives, sent or not; -1 where that names tasks
    alone. `session_bytes` is what the image takes as a message of a session, whose hello is sent
    once; -1 for a model that has no sessions. `rate_level` is the level that the latent was coded
    at, 0 without one.
    """

    data: bytes
    payload_bytes: float
    estimated_bits: float
    probabilities: NDArray[np.float32]
    mask: NDArray[np.bool_]
    answered: bool = False
    client_class: int = -1
    session_bytes: int = -1
    rate_level: int = 0


@dataclass(frozen=True)
class Answer:
    """What the server answers to one image of a stream.

    `labels`, `label_names` and `segmentation` hold the decoded tasks by name; a mask is uint8
    (H, W). The probability of a label is multiplied by that of its task's parent, if that is
    decoded. `class_index` is the joint decision over all decoded tasks. It is -1, its name None and
    its probability 0, where images have no single class and where no decoded task has classes. The
    bytes are those of the image's own stream, or its share of a stream of several images. If the
    client has `answered`, label and class are its own, with one probability; its answer to a
    request comes without one. `model_id` names the server that answers, in hexadecimal digits.
    """

    tasks: tuple[str, ...]
    task_probability: dict[str, float]
    labels: dict[str, int]
    label_names: dict[str, str]
    label_probability: dict[str, float]
    class_index: int
    class_name: str | None
    class_probability: float
    segmentation: dict[str, NDArray[np.uint8]] = field(repr=False)
    wire_bytes: float
    payload_bytes: float
    answered: bool = False
    model_id: str = ""

    def to_row(self) -> dict[str, Any]:
        """A row of a registered model's output; its column `answer` holds all of it as JSON."""
        return {
            "wire_bytes": self.wire_bytes,
            "tasks": list(self.tasks),
            "class_name": self.class_name,
            "class_index": self.class_index,
            "answer": json.dumps(self.to_dict(), allow_nan=False),
            "error": None,
        }

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON values; of a segmentation, the share of pixels of each label value."""
        out = {key: value for key, value in self.__dict__.items() if key != "segmentation"}
        out["tasks"] = list(self.tasks)
        out["payload_bytes"] = round(self.payload_bytes, 2)
        out["segmentation"] = {
            name: {str(value): round(float((mask == value).mean()), 4) for value in np.unique(mask)}
            for name, mask in self.segmentation.items()
        }
        return out


COLUMNS = ["wire_bytes", "tasks", "class_name", "class_index", "answer", "error"]
"""Columns of a registered model's output."""


def failed_row(reason: str) -> dict[str, Any]:
    """A row of a registered model's output for an input without an answer."""
    return {
        "wire_bytes": 0,
        "tasks": [],
        "class_name": None,
        "class_index": -1,
        "answer": "{}",
        "error": reason,
    }
