"""What a network costs a device in multiply-adds, and networks that are made to cost as much.

Counted on the meta device by torch's counter: convolutions and matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mantis_core.architecture import ModelConfig
from mantis_core.errors import ModelError
from mantis_core.networks.blocks import pool
from mantis_core.networks.client import Client

STEP = 4
"""Widths are multiples of it, which the groups of a norm divide."""
WIDEST = 4096


def multiply_adds(call: Callable[[], object]) -> int:
    """Returns the multiply-adds of what `call` computes, without gradients."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call()
    return counter.get_total_flops() // 2


class Macs(NamedTuple):
    """Multiply-adds for one image: of the whole client, and of what only detection needs of it."""

    client: int
    detector: int


def macs_of(
    config: ModelConfig,
    num_tasks: int,
    image_size: tuple[int, int],
    members: Tensor | None,
    labels: Sequence[int] = (),
) -> Macs:
    """Returns what a client costs for an image of (H, W) pixels.

    `members` (K, classes) and `labels` (K,) as Client takes them.
    """
    with torch.device("meta"):
        client = Client(config, num_tasks, members, labels=labels).eval()
        client = client.to("meta")  # `members` are on the CPU
        image = torch.empty(1, 3, *image_size)
        stem = client.stem(image)
        view = client.detector(stem)
    detector = multiply_adds(lambda: client.detector(stem))
    others = multiply_adds(lambda: (client.stem(image), client.encode(view, view.logits)))
    alone = detector
    if client.behind_detector:
        pooled = pool(view.detected)
        alone = multiply_adds(lambda: client.for_detection_alone()(pooled))
    return Macs(others + detector, alone)


def widest(cost: Callable[[int], int], budget: int) -> int:
    """Returns the largest width, a multiple of STEP, whose cost is at most `budget`.

    `cost` rises with the width. Raises ModelError where none is cheap enough.
    """
    widths = range(STEP, WIDEST + STEP, STEP)
    low, high = 0, len(widths)  # all below `low` fit, none from `high` on
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cost(widths[middle]) <= budget else (low, middle)
    if not low:
        raise ModelError(
            f"no network of {STEP} channels or more has at most {budget:,} multiply-adds"
        )
    return widths[low - 1]


def with_wide_encoder(
    config: ModelConfig, num_tasks: int, image_size: tuple[int, int], members: Tensor | None
) -> ModelConfig:
    """Returns a config whose encoder has also the multiply-adds of the detector, which is gone.

    `config` has `wide_encoder` set; its other sections describe the client that costs as much.
    """
    both = config.model_copy(update={"wide_encoder": False})
    budget = macs_of(both, num_tasks, image_size, members).client
    detector = config.detector.model_copy(update={"classes": False})

    def of(width: int) -> ModelConfig:
        encoder = config.encoder.model_copy(update={"channels": width})
        return config.model_copy(update={"encoder": encoder, "detector": detector})

    def cost(width: int) -> int:
        return macs_of(of(width), num_tasks, image_size, None).client

    return of(widest(cost, budget))
