"""The client's own answer beside the latent: what it sends, and how the server decides with it.

A detector that names classes knows something of the answer. Its label within the primary task and
one of 8 levels of confidence cost a fraction of a byte. The server raises that label's probability
by as much as the level has earned.

Shapes: B batch, K tasks, N classification tasks among them, n labels of a task, W the largest n
plus one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from mantis_core.bitstream.coder import TOTAL
from mantis_core.bitstream.container import CONFIDENCE_LEVELS, CONFIDENCE_ROWS
from mantis_core.bitstream.packed_tables import integer_counts
from mantis_core.bitstream.wire import CodedImage
from mantis_core.device.look import EDGES
from mantis_core.networks.stacked import TaskLayout, TaskOutputs
from mantis_core.tasks import TaskSpec

_PRIOR_IMAGES = 4.0
"""Images that a level counts for beside those it was seen on, at the figures of all levels."""


class ClientAnswer(NamedTuple):
    """The client's label within an image's primary task and the level of its confidence.

    Both are (B,) int64, -1 where the primary task has no labels.
    """

    label: Tensor
    level: Tensor


class ClientAnswers(nn.Module):
    """Reads the client's answer from its class logits."""

    label_of: Tensor
    edges: Tensor

    def __init__(self, tasks: Sequence[TaskSpec], num_classes: int) -> None:
        super().__init__()
        label_of = torch.full((len(tasks), num_classes), -1)
        for k, task in enumerate(tasks):
            label_of[k, list(task.classes)] = torch.arange(len(task.classes))
        self.register_buffer("label_of", label_of, persistent=False)
        self.register_buffer("edges", torch.tensor(EDGES), persistent=False)

    def forward(self, class_logits: Tensor, primary: Tensor) -> ClientAnswer:
        """The answer of images with class logits (B, classes + 1) and primary tasks (B,)."""
        label_of = self.label_of[primary]
        probability = torch.softmax(class_logits.float(), dim=1)[:, :-1]
        best = probability.masked_fill(label_of < 0, -1.0).max(dim=1, keepdim=True)
        label = label_of.gather(1, best.indices)[:, 0]
        level = torch.bucketize(best.values[:, 0], self.edges, right=True)
        return ClientAnswer(label, torch.where(label < 0, label, level))


class Fusion(nn.Module):
    """The server's decision from its own outputs and the client's answer.

    log P'(c) = s_l log P(c) + w_l [c is the client's label], normalised over the labels of the
    primary task and "not mine"; l is the level of confidence. s starts at 1 and w at 0, where the
    client is not heard. Both are trained, as `log_scale` and `bonus`, and then fitted to rows that
    training has not seen: eval mode decides by what was fitted. A model of L > 1 rates has both for
    each of them, and a mixture between: the less the latent says, the more the answer weighs.
    `accuracy` is the share of right labels at each level.
    """

    fitted_log_scale: Tensor
    fitted_bonus: Tensor
    accuracy: Tensor

    def __init__(self, num_rates: int = 1) -> None:
        super().__init__()
        self.num_rates = num_rates
        shape = (num_rates, CONFIDENCE_LEVELS) if num_rates > 1 else (CONFIDENCE_LEVELS,)
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.bonus = nn.Parameter(torch.zeros(shape))
        self.register_buffer("fitted_log_scale", torch.zeros(shape))
        self.register_buffer("fitted_bonus", torch.zeros(shape))
        self.register_buffer("accuracy", torch.full((CONFIDENCE_LEVELS,), 0.5))

    def forward(self, log_p: Tensor, answer: ClientAnswer, shares: Tensor | None = None) -> Tensor:
        """The primary task's log P (B, W), -inf at padding, decided with the client's answer.

        Images without one keep theirs. `shares` (B, L) are those of the rates, for a model of
        several.
        """
        log_scale, bonus = self.fitted_log_scale, self.fitted_bonus
        if self.training:
            log_scale, bonus = self.log_scale, self.bonus
        level, heard = answer.level.clamp_min(0)[:, None], (answer.label >= 0)[:, None]
        if self.num_rates == 1:
            own_scale, own_bonus = log_scale[level], bonus[level]
        else:
            assert shares is not None
            mixed = shares.to(bonus.dtype)
            own_scale = (mixed @ log_scale).gather(1, level)
            own_bonus = (mixed @ bonus).gather(1, level)
        padding = log_p == -torch.inf
        scores = log_p.masked_fill(padding, 0.0) * own_scale.exp()
        said = one_hot(answer.label.clamp_min(0), log_p.shape[1]) * own_bonus
        fused = torch.log_softmax((scores + said).masked_fill(padding, -torch.inf), dim=1)
        return torch.where(heard, fused, log_p)

    def stacked(
        self,
        outputs: TaskOutputs,
        layout: TaskLayout,
        primary: Tensor,
        answer: ClientAnswer,
        shares: Tensor | None = None,
    ) -> TaskOutputs:
        """Outputs of all tasks, those of each image's primary task (B,) decided with its answer."""
        if outputs.log_p is None:
            return outputs
        is_primary = layout.columns == primary[:, None]  # (B, N)
        row = is_primary.int().argmax(dim=1)
        own = outputs.log_p[torch.arange(len(row), device=row.device), row]
        decided = self(own, answer, shares)[:, None, :]
        fused = torch.where(is_primary[:, :, None], decided, outputs.log_p)
        return TaskOutputs(outputs.layout, fused, outputs.segmentation)

    def calibrate(
        self,
        log_p: Tensor,
        answer: ClientAnswer,
        truth: Tensor,
        shares: Tensor | None = None,
    ) -> None:
        """Fits s and w of each level to rows that were held back from training.

        `log_p` (B, W) are the server's own outputs of the primary task, `truth` (B,) the right
        place among them, `shares` (B, L) those of the rates that they were coded at. What was
        trained counts as a few images of each level, so that a level which no image has keeps it,
        and is itself left as it is: it makes no difference how often this is called. Images without
        an answer do not count; nor do those with outputs that are not finite, of a training that
        diverged.
        """
        self.fitted_log_scale.copy_(self.log_scale.detach())
        self.fitted_bonus.copy_(self.bonus.detach())
        right_place = log_p.gather(1, truth[:, None])[:, 0]
        heard = (answer.label >= 0) & torch.isfinite(right_place)
        if not heard.any():
            return
        log_p, truth = log_p[heard].double(), truth[heard]
        shares = None if shares is None else shares[heard].double()
        answer = ClientAnswer(answer.label[heard], answer.level[heard])
        right = answer.label == truth
        everywhere = right.double().mean()
        hits = torch.bincount(answer.level, right.double(), CONFIDENCE_LEVELS)
        seen = torch.bincount(answer.level, minlength=CONFIDENCE_LEVELS)
        self.accuracy.copy_((hits + _PRIOR_IMAGES * everywhere) / (seen + _PRIOR_IMAGES))
        fitted = Fusion(self.num_rates).double()
        fitted.load_state_dict(self.state_dict())
        start = [value.detach().clone() for value in fitted.parameters()]
        optimiser = torch.optim.LBFGS(
            fitted.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            found = cross_entropy(fitted(log_p, answer, shares), truth, reduction="sum")
            for value, began in zip(fitted.parameters(), start, strict=True):
                found = found + 0.5 * _PRIOR_IMAGES * (value - began).square().sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        with torch.enable_grad():
            before = loss().item()
            optimiser.step(loss)  # type: ignore[no-untyped-call]
            after = loss().item()
        if after <= before:  # never true of nan
            self.fitted_log_scale.copy_(fitted.log_scale.detach())
            self.fitted_bonus.copy_(fitted.bonus.detach())


def answers_to(k: int, images: Sequence[CodedImage], device: torch.device) -> ClientAnswer:
    """The client's answers of images to their primary task, where that is task `k`."""
    said = [
        (image.label, image.confidence)
        if image.confidence is not None and image.tasks.primary == k
        else (-1, -1)
        for image in images
    ]
    label, level = torch.tensor(said, device=device).T
    return ClientAnswer(label, level)


def even_counts() -> Tensor:
    """Counts (17, 8) int32 that make all levels of confidence equally probable."""
    return torch.full((CONFIDENCE_ROWS, CONFIDENCE_LEVELS), TOTAL // CONFIDENCE_LEVELS).int()


def confidence_counts(task_level: NDArray[np.int64], level: NDArray[np.int64]) -> Tensor:
    """Counts (17, 8) int32 out of 2**16 of the levels of confidence, from rows held back.

    `task_level` (N,) are the levels of the primary tasks' probabilities, `level` (N,) those of
    confidence. The last row is for streams without the former: all images together. A row counts a
    few images more in the proportions of all.
    """
    seen = np.zeros((CONFIDENCE_ROWS, CONFIDENCE_LEVELS))
    np.add.at(seen, (task_level, level), 1)
    seen[-1] = seen.sum(axis=0)
    everywhere = (seen[-1] + 1) / (seen[-1] + 1).sum()
    mass = seen + _PRIOR_IMAGES * everywhere
    counts = integer_counts(mass / mass.sum(axis=1, keepdims=True))
    return torch.from_numpy(counts.astype(np.int32))
