"""The server half: latent to features, task decoders and tails, the joint decision.

Shapes: B batch, K tasks, C channels, H W input pixels, h w latent size, n labels of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.nn.functional import group_norm as normalised_groups

from mantis_core.architecture import DecoderConfig
from mantis_core.networks.blocks import (
    ResidualBlock,
    SegmentationHead,
    TaskModules,
    group_norm,
    modulate,
)
from mantis_core.networks.conditioning import LevelModulation
from mantis_core.networks.stacked import TaskLayout, TaskOutputs, as_stacked, end_to_end
from mantis_core.tasks import TaskSpec, class_slots


class FeatureDecoder(nn.Module):
    """The received latent back to the teacher's feature at its split; serves every task.

    y_hat (B, C, h, w) ─ conv3x3 ─ residual blocks ─ [up or down by 2] ─ conv1x1 ─▶ (B, C', h', w')

    Where the sides do not divide, the rebuilt map is larger than the feature; of an input of the
    model's own size it is cut to the feature's.
    """

    def __init__(
        self,
        latent_channels: int,
        target: tuple[int, int, int],
        latent_size: tuple[int, int],
        *,
        channels: int,
        blocks: int,
        signed: bool = False,
        num_rates: int = 1,
    ) -> None:
        """Takes the feature's shape `target` and the latent's (h, w) for the model's own size.

        `signed`: whether the feature has negative values, as behind a linear layer.
        """
        super().__init__()
        self.target, self.latent_size, self.signed = target, latent_size, signed
        self.first = nn.Sequential(
            nn.Conv2d(latent_channels, channels, 3, 1, 1), group_norm(channels)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(channels, channels) for _ in range(blocks)))
        steps = _doublings(latent_size, target[1:])
        scale: list[nn.Module] = []
        for _ in range(abs(steps)):
            if steps > 0:
                scale += [
                    nn.Conv2d(channels, 4 * channels, 3, 1, 1),
                    nn.PixelShuffle(2),
                    nn.ReLU(),
                ]
            else:
                scale.append(ResidualBlock(channels, channels, stride=2))
        self.scale = nn.Sequential(*scale)
        self.last = nn.Conv2d(channels, target[0], 1)
        self.by_level: LevelModulation | None = None
        if num_rates > 1:
            self.by_level = LevelModulation(num_rates, (latent_channels, channels))

    def forward(self, latent: Tensor, shares: Tensor | None = None) -> Tensor:
        """(B, C, h, w) to the feature (B, C', h', w') at the teacher's split.

        `shares` (B, L) are those of the rates, for a model of several.
        """
        if self.by_level is None:
            x = self.first(latent)
        else:
            assert shares is not None
            before, behind = self.by_level(shares)
            x = modulate(self.first(modulate(latent, before)), behind)
        x = self.scale(self.blocks(torch.relu(x)))
        if latent.shape[2:] == self.latent_size:
            x = x[..., : self.target[1], : self.target[2]]
        feature = self.last(x)
        return feature if self.signed else torch.relu(feature)


class TaskDecoder(nn.Module):
    """One task's own reconstruction of the deep feature from the shared one.

    deep ─┬─ scale and shift a channel ──────────────┬─ [ReLU] ─▶ (B, C, h, w)
          └─ conv1x1 ─ norm ─ ReLU ─ conv1x1 (0) ────┘       the identity at init

    There is no ReLU at the end where the deep feature has negative values (`signed`).
    """

    def __init__(self, channels: int, hidden: int, *, signed: bool = False) -> None:
        super().__init__()
        self.signed = signed
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.first = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = group_norm(hidden)
        self.last = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, deep: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        own = self.last(torch.relu(self.norm(self.first(deep))))
        rebuilt = deep * self.scale + self.shift + own
        return rebuilt if self.signed else torch.relu(rebuilt)


def pooled_features(decoders: Sequence[Any], deep: Tensor) -> Tensor:
    """The means over space of what N task decoders make of (B, C, h, w): (N, B, C).

    As each would give by itself, but all run as one: parameters are stacked, and products batched.
    """
    count, channels, norm = len(decoders), deep.shape[1], decoders[0].norm

    def joined(name: str) -> Tensor:  # one parameter of each, end to end
        return end_to_end([decoder.get_parameter(name) for decoder in decoders])

    hidden = normalised_groups(
        conv2d(deep, joined("first.weight")),
        count * norm.num_groups,
        joined("norm.weight"),
        joined("norm.bias"),
        norm.eps,
    )
    hidden = torch.relu(hidden).permute(0, 2, 3, 1).reshape(-1, count, norm.num_channels)
    weight = joined("last.weight").view(count, channels, -1)
    own = torch.bmm(hidden.transpose(0, 1), weight.transpose(1, 2))  # (N, B h w, C)
    shift = joined("shift").view(count, 1, -1) + joined("last.bias").view(count, 1, -1)
    flat = deep.permute(0, 2, 3, 1).reshape(1, -1, channels)
    rebuilt = torch.addcmul(shift, flat, joined("scale").view(count, 1, -1)).add_(own)
    if not decoders[0].signed:
        rebuilt = rebuilt.relu_()
    return rebuilt.view(count, len(deep), -1, channels).mean(dim=2)


class ClassificationTail(nn.Module):
    """Pooled feature to the log-probability of each label and, last, of "not mine"."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes + 1)

    def forward(self, deep: Tensor) -> Tensor:
        """(B, C, h, w) to log P (B, n + 1); float32."""
        logits = self.linear(deep.mean(dim=(2, 3)))
        return torch.log_softmax(logits.float(), dim=1)


class AnswersLater(nn.Module):
    """Decoders and tails of tasks that were added to a trained server."""

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        *,
        split_channels: int,
        last_channels: int,
        hidden: int,
        signed: bool,
    ) -> None:
        super().__init__()
        self.task_decoders = TaskModules()
        self.tails = TaskModules()
        for task in tasks:
            self.task_decoders[task.name] = TaskDecoder(last_channels, hidden, signed=signed)
            self.tails[task.name] = (
                ClassificationTail(last_channels, task.num_classes)
                if task.is_classification
                else SegmentationHead(split_channels, last_channels, task.num_classes)
            )

    def forward(self, task: TaskSpec, split: Tensor, last: Tensor, size: tuple[int, int]) -> Tensor:
        """One task's output, as `Server.answer`."""
        own = self.task_decoders[task.name](last)
        if task.is_classification:
            return self.tails[task.name](own)  # type: ignore[no-any-return]
        return self.tails[task.name](split, own, size)  # type: ignore[no-any-return]


class Server(nn.Module):
    """All that runs where the bits arrive.

    y_hat ─ decoder ─┬─ trunk ─┬─ decoder_k ─ tail_k   for each active task k
                     └─────────┴─▶ segmentation tails read both depths

    `trunk` is a copy of the teacher's blocks behind its split, fine-tuned in stage 2; its batch
    norms keep the teacher's statistics.
    """

    tail_rows: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        tasks: Sequence[TaskSpec],
        *,
        latent_channels: int,
        latent_size: tuple[int, int],
        split_shape: tuple[int, int, int],
        last_shape: tuple[int, int, int],
        trunk: nn.Module,
        split_signed: bool = False,
        last_signed: bool = False,
        num_rates: int = 1,
        added: Sequence[TaskSpec] = (),
    ) -> None:
        """Sizes are those of the model's own input. `added` are tasks that the client has not.

        `split_signed` and `last_signed` say whether the feature at the split and the deep one have
        negative values.
        """
        super().__init__()
        self.tasks = tuple(tasks)
        self.decoder = FeatureDecoder(
            latent_channels,
            split_shape,
            latent_size,
            channels=config.channels,
            blocks=config.blocks,
            signed=split_signed,
            num_rates=num_rates,
        )
        self.trunk = trunk
        self.task_decoders = TaskModules()
        self.tails = TaskModules()
        for task in tasks:
            self.task_decoders[task.name] = TaskDecoder(
                last_shape[0], config.task_channels, signed=last_signed
            )
            self.tails[task.name] = (
                ClassificationTail(last_shape[0], task.num_classes)
                if task.is_classification
                else SegmentationHead(split_shape[0], last_shape[0], task.num_classes)
            )
        self.added = AnswersLater(
            added,
            split_channels=split_shape[0],
            last_channels=last_shape[0],
            hidden=config.task_channels,
            signed=last_signed,
        )
        self.layout = TaskLayout(tasks)
        self.register_buffer("tail_rows", _rows_of(self.layout), persistent=False)

    def features(self, latent: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The received latent (B, C, h, w) to the split feature and the deep one.

        `shares` (B, L) are those of the rates, for a model of several.
        """
        split = self.decoder(latent, shares)
        return split, self.trunk(split)

    def answer(self, task: TaskSpec, split: Tensor, last: Tensor, size: tuple[int, int]) -> Tensor:
        """One task's output: log P (B, n + 1), or segmentation logits (B, n, H, W)."""
        if task.name in self.added.tails:
            return self.added(task, split, last, size)  # type: ignore[no-any-return]
        own = self.task_decoders[task.name](last)
        if task.is_classification:
            return self.tails[task.name](own)  # type: ignore[no-any-return]
        return self.tails[task.name](split, own, size)  # type: ignore[no-any-return]

    def forward(
        self, latent: Tensor, size: tuple[int, int], shares: Tensor | None = None
    ) -> TaskOutputs:
        """The received latent (B, C, h, w) to every task's output, of images of `size` (H, W).

        `shares` are as `features` takes them.

        For training: all decoders take part in every step. Those of the classification tasks run
        as one; what grows with the number of tasks is the arithmetic, and a view and a gradient for
        each of a task's nine parameters. Each segmentation runs by itself.
        """
        split, last = self.features(latent, shares)
        segmentation = {
            task.name: self.answer(task, split, last, size)
            for task in self.tasks
            if not task.is_classification
        }
        log_p = self._classify(last) if len(self.layout) else None
        return TaskOutputs(self.layout, log_p, segmentation)

    def _classify(self, last: Tensor) -> Tensor:
        """What `answer` gives of the N classification tasks, side by side: (B, N, W), float32."""
        decoders = [self.task_decoders[name] for name in self.layout.places]
        pooled = pooled_features(decoders, last)
        tails: list[Any] = [self.tails[name] for name in self.layout.places]
        weight, bias = (
            end_to_end([tail.linear.get_parameter(name) for tail in tails]).index_select(
                0, self.tail_rows
            )
            for name in ("weight", "bias")
        )
        weight = weight.view(len(tails), self.layout.width, -1).transpose(1, 2)
        logits = torch.baddbmm(bias.view(len(tails), 1, -1), pooled, weight)
        logits = logits.float().transpose(0, 1).masked_fill(~self.layout.is_output, -torch.inf)
        return torch.log_softmax(logits, dim=2)

    def train(self, mode: bool = True) -> Server:
        """Switches the mode; batch norms of the trunk keep the teacher's statistics."""
        super().train(mode)
        still_batch_norms(self.trunk)
        return self


class JointDecision(nn.Module):
    """Compares all decoded tasks' labels as classes of one image.

    A class is scored by the log-sum-exp over tasks k of log p_k + log P(c | k).
    """

    slots: Tensor

    def __init__(self, tasks: Sequence[TaskSpec], num_classes: int) -> None:
        super().__init__()
        self.layout = TaskLayout(tasks)
        places = _label_places(tasks)
        slots = places[class_slots(tasks, num_classes)]  # (classes, M)
        self.register_buffer("slots", slots.squeeze(1), persistent=False)

    def forward(self, outputs: Mapping[str, Tensor], log_p: Tensor) -> Tensor:
        """Scores of all classes, (B, classes), not normalised.

        `outputs` holds log P (B, n + 1) by task; `log_p` (B, K) is the natural logarithm of each
        task's probability, -inf for tasks that were not decoded.
        """
        stacked = as_stacked(outputs, self.layout)
        assert stacked.log_p is not None
        labels = (stacked.log_p + stacked.layout.own(log_p)[:, :, None]).flatten(1)
        scores = pad(labels, (0, 1), value=-torch.inf)[:, self.slots]
        return scores if scores.dim() == 2 else scores.logsumexp(dim=2)


def decided(scores: Tensor) -> Tensor:
    """The class (B,) with the best of a joint decision's scores (B, classes).

    -1 for an image of whose decoded tasks none has classes: all its scores are -inf.
    """
    best = scores.detach().max(dim=1)
    return best.indices.masked_fill(best.values == -torch.inf, -1)


def _rows_of(layout: TaskLayout) -> Tensor:
    """For each place of stacked outputs the row of all tails' weights laid end to end, (N W,).

    Padding names the first row: it gets no gradient from there.
    """
    return (layout.is_output.flatten().cumsum(0) - 1) * layout.is_output.flatten()


def _label_places(tasks: Sequence[TaskSpec]) -> Tensor:
    """For each label of all tasks laid end to end its place in flattened stacked outputs (N W,).

    One more at the end: the place behind all of them.
    """
    counts = [task.num_classes for task in tasks if task.is_classification]
    width = max(counts, default=0) + 1
    places = [row * width + label for row, count in enumerate(counts) for label in range(count)]
    return torch.tensor([*places, len(counts) * width])


def _doublings(latent_size: tuple[int, int], target: tuple[int, int]) -> int:
    """How often the latent's sides are doubled, or halved if negative, to cover the target's.

    The fewest doublings, or the most halvings (rounded up), after which no side is too short.
    """
    (height, width), steps = latent_size, 0
    while height < target[0] or width < target[1]:
        height, width, steps = 2 * height, 2 * width, steps + 1
    if steps:
        return steps
    while max(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
        if height < target[0] or width < target[1]:
            break
        steps -= 1
    return steps


def still_batch_norms(module: nn.Module) -> None:
    """Puts every batch norm inside in eval mode."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
