"""Parameter groups, optimiser, learning-rate schedule and the moving average of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mantis_core.config import OptimConfig

GROUPS = ("new", "new_no_decay", "fine_tuned", "fine_tuned_no_decay", "density")
_DECAYED = (nn.Linear, nn.modules.conv._ConvNd)


def parameter_groups(
    student: nn.Module, *, loaded: Collection[str] = ()
) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter of `student` in exactly one named group.

    "frozen" has no gradient; "quantiles" are CompressAI's, found by search when tables are built;
    "density" is the rest of the entropy model. The others are "fine_tuned" where `loaded` has their
    name, else "new", each split by whether weight decay applies: to the weights of linear layers
    and convolutions alone, whatever the shape of other parameters.
    """
    decayed = {id(layer.weight) for layer in student.modules() if isinstance(layer, _DECAYED)}
    groups: dict[str, dict[str, nn.Parameter]] = {
        name: {} for name in (*GROUPS, "frozen", "quantiles")
    }
    for name, parameter in student.named_parameters():
        if name.endswith("quantiles"):
            group = "quantiles"
        elif not parameter.requires_grad:
            group = "frozen"
        elif "bottleneck" in name.split("."):
            group = "density"
        else:
            group = "fine_tuned" if name in loaded else "new"
            group += "" if id(parameter) in decayed else "_no_decay"
        groups[group][name] = parameter
    return groups


def build_optimizer(
    groups: dict[str, dict[str, nn.Parameter]], config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW or SGD over the trained groups, each with its own peak rate.

    One kernel updates many parameters at once: AdamW's fused one where they are on a GPU.
    """
    peaks = {"new": config.lr, "fine_tuned": config.fine_tune_lr, "density": config.density_lr}
    wanted: list[dict[str, Any]] = []
    for name in GROUPS:
        if groups[name]:
            wanted.append(
                {
                    "params": list(groups[name].values()),
                    "lr": peaks[name.removesuffix("_no_decay")],
                    "weight_decay": config.weight_decay if name in ("new", "fine_tuned") else 0.0,
                }
            )
    if config.kind == "adamw":
        on_gpu = all(p.is_cuda for group in wanted for p in group["params"])
        return torch.optim.AdamW(wanted, fused=on_gpu, foreach=not on_gpu)
    return torch.optim.SGD(wanted, momentum=config.momentum, nesterov=config.momentum > 0)


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then half a cosine: the factor on each group's peak rate at one step."""
    warmup = max(1, round(config.warmup_fraction * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    low = config.final_lr_fraction
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate to its own peak times `factor`."""
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor


class MovingAverage(nn.Module):
    """A copy of the student, `module`, whose weights are a moving average of the student's.

    Exponential, warmed up so that short runs work too: the decay after n updates is
    min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage. Buffers are copied,
    not averaged. The state dict is that of torch's AveragedModel. The number of updates is kept on
    the CPU as well, so that no step waits for a GPU.
    """

    n_averaged: Tensor

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(student)
        self.decay, self.updates = decay, 0
        device = next(student.parameters()).device
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.long, device=device))
        self.register_load_state_dict_post_hook(_read_updates)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update_parameters(self, student: nn.Module) -> None:
        """Takes in the student's weights as they are now; frozen ones are what they were."""
        pairs = zip(self.module.parameters(), student.parameters(), strict=True)
        trained = [(average, own) for average, own in pairs if own.requires_grad]
        averages: list[Tensor] = [average for average, _ in trained]
        current: list[Tensor] = [own for _, own in trained]
        if not self.updates:
            torch._foreach_copy_(averages, current)
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(averages, current, 1 - decay)
        buffers = list(self.module.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(student.buffers()))
        self.updates += 1
        self.n_averaged.fill_(self.updates)


def _read_updates(average: MovingAverage, _: object) -> None:
    average.updates = int(average.n_averaged)
