"""Losses as means, each with the number of entries behind it; often only some entries count.

No criterion, no config.

Shapes: B batch, N tasks side by side, W the most labels of one of them and one more, n labels, H W
pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mantis_core.tasks import IGNORE
from mantis_core.training.means import Mean


class RelativeMSE(nn.Module):
    """Mean squared error over the mean square of the target: layers of any scale compare."""

    def forward(self, value: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape (B, ...) to a scalar; no gradient to the target."""
        return self.mean(value, target).value

    def mean(self, value: Tensor, target: Tensor) -> Mean:
        """The quotient with its divisor, summed over images: both are means over all images."""
        target = target.detach().float()
        scale = target.square().mean().clamp_min(1e-6)
        return Mean((value.float() - target).square().mean() / scale, scale * len(target))


def mean_over(values: Tensor, keep: Tensor, dim: int | None = None) -> Mean:
    """Sum over the kept entries / their count; 0, in the graph, where there is none.

    With `dim` only that dimension is summed: a mean for each place of the others.
    """
    weight = keep.to(values.dtype)
    count = weight.sum(dim)
    return Mean((values * weight).sum(dim) / count.clamp_min(1), count)


def label_losses(log_p: Tensor, labels: Tensor) -> Tensor:
    """-log P of M labels of each task (B, N, M), from log P (B, N, W). -1 is read as 0."""
    return -log_p.gather(2, labels.clamp_min(0))


def pixel_loss(logits: Tensor, truth: Tensor, active: Tensor) -> Mean:
    """Mean cross-entropy (B, n, H, W) over labelled pixels (B, H, W) of active images (B,)."""
    valid = (truth != IGNORE) & active[:, None, None]
    target = truth.long().masked_fill(~valid, 0)
    return mean_over(cross_entropy(logits, target, reduction="none"), valid)


def divergence(ours: Tensor, theirs: Tensor, keep: Tensor | None, temperature: float) -> Mean:
    """KL of logits (B, n) or (B, n, H, W), the mean over kept images and pixels.

    `keep` is (B,), or None for all images.
    """
    of_entry = kl_div(
        log_softmax(_warmed(ours.float(), temperature), dim=1),
        log_softmax(_warmed(theirs.detach().float(), temperature), dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    if keep is None:
        return Mean(of_entry.mean(), of_entry.numel()).times(temperature**2)
    if of_entry.dim() > 1:
        keep = keep.reshape(-1, *[1] * (of_entry.dim() - 1)).expand_as(of_entry)
    return mean_over(of_entry, keep).times(temperature**2)


def divergences(
    ours: Tensor, theirs: Tensor, is_label: Tensor, keep: Tensor, temperature: float
) -> Mean:
    """KL of stacked logits (B, N, W) over the labels alone: for each task the mean over its images.

    `is_label` (N, W) and `keep` (B, N) are bool.
    """
    of_entry = kl_div(
        _label_log_softmax(_warmed(ours, temperature), is_label),
        _label_log_softmax(_warmed(theirs.detach(), temperature), is_label),
        reduction="none",
        log_target=True,
    ).sum(dim=2)
    return mean_over(of_entry, keep, dim=0).times(temperature**2)


def smoothed_losses(
    logits: Tensor, labels: Tensor, is_label: Tensor, label_smoothing: float
) -> Tensor:
    """Cross-entropy (B, N) of stacked logits (B, N, W) over the labels alone.

    As torch's, `label_smoothing` is the share of the target that all labels of a task have equally.
    """
    log_p = _label_log_softmax(logits, is_label)
    loss = label_losses(log_p, labels[:, :, None])[:, :, 0]
    if not label_smoothing:
        return loss
    equally = -log_p.sum(dim=2) / is_label.sum(dim=1)
    return (1 - label_smoothing) * loss + label_smoothing * equally


def _warmed(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _label_log_softmax(logits: Tensor, is_label: Tensor) -> Tensor:
    """Float32 log-softmax of (B, N, W) over each task's labels; 0 at the other places."""
    own = logits.float().masked_fill(~is_label, -torch.inf)
    return log_softmax(own, dim=2).masked_fill(~is_label, 0.0)
