"""Contexts that run a module as it is shipped: in eval mode, in float32, on one thread."""

from __future__ import annotations

from contextlib import ExitStack
from threading import Lock
from typing import Any

import torch
from torch import nn


class still:
    """Context in which a module is in eval mode and computes in float32, see `full_float32`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.was_training = module.training
        self.device = next(module.parameters()).device.type
        self.contexts = ExitStack()

    def __enter__(self) -> None:
        if self.was_training:
            self.module.eval()
        self.contexts.enter_context(full_float32(self.device))

    def __exit__(self, *error: Any) -> None:
        self.contexts.close()
        if self.was_training:
            self.module.train()


class full_float32:
    """Context without autocast and TF32: float32 is as exact on CUDA as on a CPU.

    By default cuDNN's convolutions have TF32's 10 bits of mantissa. torch's switches hold for the
    whole process: the first of several threads to enter turns TF32 off, the last to leave restores
    what was set before.
    """

    _lock, _inside = Lock(), 0
    _before: tuple[str, ...] = ()

    def __init__(self, device_type: str) -> None:
        self.autocast = torch.autocast(device_type, enabled=False)

    def __enter__(self) -> None:
        self.autocast.__enter__()  # type: ignore[no-untyped-call]
        switches, own = _switches(), full_float32
        with own._lock:
            if not own._inside:
                own._before = tuple(switch.fp32_precision for switch in switches)
                for switch in switches:
                    switch.fp32_precision = "ieee"
            own._inside += 1

    def __exit__(self, *error: Any) -> None:
        own = full_float32
        with own._lock:
            own._inside -= 1
            if not own._inside:
                for switch, before in zip(_switches(), own._before, strict=True):
                    switch.fp32_precision = before
        self.autocast.__exit__(*error)


class one_thread:
    """Context in which torch computes on one CPU thread; with more, kernels round differently."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: Any) -> None:
        torch.set_num_threads(self.threads)


def computes_in_tf32() -> bool:
    """Whether convolutions or matrix products on CUDA use TF32 now."""
    return any(switch.fp32_precision == "tf32" for switch in _switches())


def _switches() -> tuple[Any, ...]:
    """torch's switches of how CUDA computes float32: in convolutions, in matrix products.

    The older `allow_tf32` cannot be read where somebody has set these, so it is not used.
    """
    backends: Any = torch.backends  # torch's stubs lack `conv`
    return (backends.cudnn.conv, backends.cuda.matmul)
