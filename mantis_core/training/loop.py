"""The training loop: any recipe over any iterable of batches, in a test, a script or a Ray worker.

Knows no Ray and no files; `folders.py` stores what `Session.state` gives.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mantis_core.config import TrainingConfig
from mantis_core.tasks import Batch
from mantis_core.training.means import average_buffers, gather_rows
from mantis_core.training.meter import Meter, consumed_rows, hash_of_rows
from mantis_core.training.optim import (
    MovingAverage,
    build_optimizer,
    lr_factor,
    parameter_groups,
    set_lr,
)
from mantis_core.training.recipe import Recipe, StepOutput

OnStep = Callable[[int, int, dict[str, float]], None]
OF_A_LEVEL = ("bits", "top1")
"""Held-back figures that a student of several rates has for each, `holdout/level-4/bits`."""


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite, or the data ended early.

    The same training would end there again.
    """

    exit_code = 2


class LossReader:
    """Losses on their way from the device to the CPU; one that is not finite is an error.

    A loss on a GPU is copied while the GPU goes on. One on the CPU is read when it is sent.
    """

    def __init__(self) -> None:
        self.sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, loss: Tensor) -> None:
        """Takes the loss () of a step, without a gradient. TrainingError as `read` raises it."""
        if not loss.is_cuda:
            self.sent.append((step, loss.cpu(), None))
            return self.read(left=0)
        host = torch.empty((), dtype=loss.dtype, pin_memory=True)
        host.copy_(loss, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self.sent.append((step, host, arrived))
        return None

    def read(self, *, left: int) -> None:
        """Waits for all but the last `left` losses. TrainingError for one that is not finite."""
        while len(self.sent) > left:
            step, loss, arrived = self.sent.popleft()
            if arrived is not None:
                arrived.synchronize()
            value = float(loss.numpy())
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {step}: lower the learning rate or the loss "
                    "weights"
                )


class Session:
    """One training stage in progress: recipe, optimiser, moving average, best weights so far.

    `step(batch)` is the whole of what happens to a batch. Randomness is seeded anew at every step
    from (seed, step, rank), so a resumed run draws what the uninterrupted one would have.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: TrainingConfig,
        *,
        steps_per_epoch: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
    ) -> None:
        if steps_per_epoch < 1:
            raise TrainingError("an epoch has no full batch: lower batch_size or add images")
        self.device, self.seed, self.rank = torch.device(device), seed, rank
        self.config = config
        self.recipe: Recipe = recipe.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.epochs
        groups = parameter_groups(recipe.student, loaded=recipe.loaded)
        self.optimizer = build_optimizer(groups, config.optim)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = MovingAverage(recipe.student, config.ema_decay) if config.ema_decay else None
        self.forward = self._compiled(self.recipe)
        self.step_index = 0
        self.losses = LossReader()
        self.rows_sha256 = ""  # of the last epoch trained, see hash_of_rows
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step_index // self.steps_per_epoch

    @property
    def shipped(self) -> nn.Module:
        """The student as it would be shipped: its moving average, where there is one."""
        if self.average is None or self.average.updates == 0:
            return self.recipe.student
        return self.average.module

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Takes the wrapper of the recipe that averages gradients over workers (DDP)."""
        self.forward = self._compiled(wrap(self.recipe))

    def step(self, batch: Batch) -> StepOutput:
        """Forward, loss, backward, clip, update. TrainingError on a loss that is not finite.

        All workers get that error at the same step, whichever worker's loss it was. On a GPU that
        is a step later, and the weights are then spoilt: no step waits for its loss.
        """
        progress = self.step_index / self.total_steps
        set_lr(self.optimizer, lr_factor(self.step_index, self.total_steps, self.config.optim))
        torch.manual_seed(step_seed(self.seed, self.step_index, self.rank))
        with self._autocast():
            output = self.forward(batch, progress)
        self.losses.send(self.step_index, output.loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.recipe.student)
        self.losses.read(left=1)
        self.step_index += 1
        return output

    def train_epoch(
        self, batches: Iterable[Batch], on_step: OnStep | None = None
    ) -> dict[str, float]:
        """The next epoch over `batches`, which must hold `steps_per_epoch` of them.

        `train/rows` counts the different rows in the batches of all workers; afterwards
        `rows_sha256` identifies them.
        """
        self.recipe.train()
        meter, recent = Meter(self.device), Meter()
        consumed: list[Tensor] = []
        goal = (self.epoch + 1) * self.steps_per_epoch
        for batch in batches:
            consumed.append(consumed_rows(self.step_index, batch))
            output = self.step(batch)
            pixels = batch.image.shape[2] * batch.image.shape[3]
            for each in (meter, recent):
                each.add(output, pixels)
            if on_step is not None and (self.step_index % 5 == 0 or self.step_index == goal):
                done = self.steps_per_epoch - (goal - self.step_index)
                on_step(done, self.steps_per_epoch, recent.figures("train"))
                recent = Meter()
            if self.step_index == goal:
                break
        if self.step_index != goal:
            raise TrainingError(
                f"the data ended {goal - self.step_index} batches before the epoch did: a shard is "
                "missing or a worker was given less than its share"
            )
        self.losses.read(left=0)
        average_buffers(self.recipe.student)
        if self.average is not None:
            copy_buffers(self.recipe.student, self.average.module)
        meter.reduce()
        figures = meter.figures("train")
        rows = gather_rows(torch.cat(consumed))
        figures["train/rows"] = len(np.unique(rows[:, 1].cpu().numpy()))
        self.rows_sha256 = hash_of_rows(rows)
        figures["train/lr"] = self.optimizer.param_groups[0]["lr"]
        return figures

    def evaluate(self, holdout: Callable[[], Iterable[Batch]]) -> dict[str, float]:
        """Figures on held-back rows, in eval mode, of the weights that would be shipped.

        `holdout` gives this worker's share of the rows, which may be none; the figures are those of
        all rows, whatever the shares and batches. A student of several rates is measured at each:
        its figures are the means, with bits and top1 of every level beside them. Keeps a copy of
        the weights if their loss is finite and the lowest so far. TrainingError if no row is held
        back.
        """
        student, self.recipe.student = self.recipe.student, self.shipped
        try:
            self.recipe.eval()
            self.recipe.calibrate(self.recipe.student, holdout(), gather_rows)
            meters = {level: Meter(self.device) for level in self.recipe.held_levels or (0,)}
            with torch.no_grad(), self._autocast():
                for batch in holdout():
                    pixels = batch.image.shape[2] * batch.image.shape[3]
                    for level, own in meters.items():
                        self.recipe.level = level
                        own.add(self.recipe(batch, 1.0), pixels)
            shipped = self.recipe.student.state_dict()
        finally:
            self.recipe.student = student
        copy_buffers(self.shipped, student)
        for own in meters.values():
            own.reduce()
        if not all(own.count for own in meters.values()):
            raise TrainingError(
                "no row is held back, so no epoch can be chosen: raise data.holdout_fraction or "
                "add images"
            )
        each = [own.figures("holdout") for own in meters.values()]
        figures = {name: fmean(found[name] for found in each) for name in each[0]}
        for level, found in zip(self.recipe.held_levels, each, strict=False):
            of_level = {n: found[f"holdout/{n}"] for n in OF_A_LEVEL if f"holdout/{n}" in found}
            figures |= {f"holdout/level-{level}/{n}": value for n, value in of_level.items()}
        lowest = self.best.get("holdout/loss", math.inf)
        if figures["holdout/loss"] < lowest:  # never true of nan
            self.best = {**figures, "epoch": float(self.epoch)}
            self.best_weights = {k: v.detach().cpu().clone() for k, v in shipped.items()}
        return figures

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a run needs to resume, as tensors and as JSON values."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.recipe.student.state_dict().items():
            tensors[f"student/{name}"] = value
        if self.average is not None:
            for name, value in self.average.state_dict().items():
                tensors[f"average/{name}"] = value
        if self.best.get("epoch") != self.epoch:  # else they are the shipped ones, stored above
            for name, value in self.best_weights.items():
                tensors[f"best/{name}"] = value
        for index, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if value is not None:
                    tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
        record = {"step": self.step_index, "best": self.best, "total_steps": self.total_steps}
        return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, record

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Takes all that `state` gave. Raises TrainingError if it belongs to another schedule."""
        if record["total_steps"] != self.total_steps:
            raise TrainingError(
                f"the checkpoint belongs to {record['total_steps']} steps, this run has "
                f"{self.total_steps}"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            start = len(prefix) + 1
            return {k[start:]: v for k, v in tensors.items() if k.startswith(prefix + "/")}

        self.recipe.student.load_state_dict(part("student"))
        if self.average is not None:
            self.average.load_state_dict(part("average"))
        self.best = dict(record["best"])
        saved = self.optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer").items():
            index, key = name.split("/", 1)
            entries.setdefault(int(index), {})[key] = _laid_out(value, self.trained[int(index)])
        saved["state"] = entries
        for group, live in zip(saved["param_groups"], self.optimizer.param_groups, strict=True):
            group["peak_lr"] = live.get("peak_lr", live["lr"])
        self.optimizer.load_state_dict(saved)
        self.step_index = int(record["step"])
        shipped = self.shipped.state_dict()
        stored = part("best") or {k: v.detach().cpu().clone() for k, v in shipped.items()}
        self.best_weights = stored if self.best else {}

    def best_student(self) -> nn.Module:
        """A copy of the student with the best weights so far, on CPU, in eval mode."""
        student = copy.deepcopy(self.shipped).cpu()
        student.load_state_dict(self.best_weights)
        return student.eval()

    @property
    def in_bf16(self) -> bool:
        """Whether networks compute in bfloat16."""
        on_cuda = self.device.type == "cuda"
        return self.config.amp == "bf16" or (self.config.amp == "auto" and on_cuda)

    def _compiled(self, module: nn.Module) -> Callable[[Batch, float], StepOutput]:
        """A step's forward pass and loss. Evaluation runs the recipe itself."""
        if self.config.compile == "off":
            return module
        from torch._dynamo.exc import TorchDynamoException  # a second of imports

        # Random numbers as without compiling, so that results differ by rounding alone.
        compiled = torch.compile(module, options={"fallback_random": True})

        def forward(batch: Batch, progress: float) -> StepOutput:
            try:
                output: StepOutput = compiled(batch, progress)
            except TorchDynamoException as error:
                reason = " ".join(str(error).split("\n")[:2])  # pages follow
                raise TrainingError(
                    f"torch.compile cannot compile this training here: {reason}. Set `compile: "
                    "off` in its section of the config."
                ) from error
            return output

        return forward

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.in_bf16)


def fit(
    session: Session,
    train_batches: Callable[[int], Iterable[Batch]],
    holdout: Callable[[], Iterable[Batch]],
    *,
    on_step: OnStep | None = None,
) -> Iterator[dict[str, float]]:
    """Trains the epochs that are left; yields the figures of each when it is over.

    Raises TrainingError at the end if no epoch is worth shipping.
    """
    while session.epoch < session.config.epochs:
        figures = session.train_epoch(train_batches(session.epoch), on_step)
        figures |= session.evaluate(holdout)
        yield {**figures, "epoch": float(session.epoch), "step": float(session.step_index)}
    if not session.best:
        raise TrainingError(
            "no epoch had a finite loss on the held-back rows, so there is nothing to ship: lower "
            "the learning rate or the loss weights"
        )


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment of a parameter in the parameter's memory format, which files do not keep.

    Optimisers need equal strides: fused ones refuse others, foreach falls back to a slow path.
    """
    if value.ndim == 0:
        return value  # the number of steps
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for one step of one worker."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copies buffers of `source` into those of the same name and shape in `target`."""
    own = dict(target.named_buffers())
    for name, buffer in source.named_buffers():
        if name in own and own[name].shape == buffer.shape:
            own[name].copy_(buffer)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Full global batches in an epoch of `rows` images."""
    return math.floor(rows / batch_size)
