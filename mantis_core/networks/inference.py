"""Contexts that run a module as it is shipped: in eval mode, in float32, on one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class still:
    """Context in which a module is in eval mode and computes in float32, without autocast."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.was_training = module.training
        device = next(module.parameters()).device.type
        self.autocast = torch.autocast(device, enabled=False)

    def __enter__(self) -> None:
        if self.was_training:
            self.module.eval()
        self.autocast.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.autocast.__exit__(*error)
        if self.was_training:
            self.module.train()


class one_thread:
    """Context in which torch computes on one CPU thread; with more, kernels round differently."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: Any) -> None:
        torch.set_num_threads(self.threads)
