"""What a network costs a device in multiply-adds, and networks that are made to cost as much.

Counted on the meta device with torch's formulas: convolutions and matrix products alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mantis_core.architecture import ModelConfig
from mantis_core.errors import ModelError
from mantis_core.networks.blocks import pool
from mantis_core.networks.client import Client

STEP = 4
"""Widths are multiples of it, which the groups of a norm divide."""
WIDEST = 4096


def multiply_adds(call: Callable[[], object]) -> int:
    """Returns the multiply-adds of what `call` computes, without gradients."""
    counter = _Counter()
    with torch.no_grad(), counter:
        call()
    return counter.macs


class StepCost(NamedTuple):
    """What a training step takes: `macs` are its multiply-adds, forward and backward.

    `saved_bytes` is the memory of the tensors that its forward pass keeps for the backward pass,
    weights apart.
    """

    macs: int
    saved_bytes: int


def step_cost(network: nn.Module, forward: Callable[[], Tensor]) -> StepCost:
    """Counts a step of `network` whose loss () `forward` computes, and its gradients.

    A tensor that several operations keep counts once. Adds gradients to the network's parameters.
    On the meta device it computes nothing.
    """
    weights = {_memory(each) for each in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := _memory(tensor)) not in weights:
            saved[place] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the memory stays taken, so no other tensor gets its place

    counter = _Counter()
    with counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward()
        loss.backward()  # type: ignore[no-untyped-call]
    return StepCost(counter.macs, sum(saved.values()))


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


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiply-adds while it is entered.

    Not torch's FlopCounterMode: that takes seconds for a training step, and counts the gradient of
    a depthwise convolution's weight as often as the convolution has channels.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            self.macs += _of_gradients(*args)
        elif formula := flop_registry.get(func.overloadpacket):
            self.macs += formula(*args, **(kwargs or {}), out_val=out) // 2
        return out


def _of_gradients(above: Tensor, x: Tensor, weight: Tensor, *others: Any) -> int:
    """Multiply-adds of a convolution's backward pass: those of its forward pass for each gradient.

    `above` is the gradient of its output; `others` are those of aten::convolution_backward.
    """
    transposed, wanted = others[4], others[7]
    outer = x if transposed else above
    forward = outer.numel() * math.prod(weight.shape[1:])
    return forward * sum(map(bool, wanted[:2]))


def _memory(tensor: Tensor) -> int:
    """What tells the memory of one tensor from that of another, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)
