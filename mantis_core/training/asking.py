"""Which tasks the images of a step are coded for: detected, true ones, or asked for.

Shapes: B batch, K tasks, N requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mantis_core.architecture import ModelConfig
from mantis_core.config import Request, Stage2Config
from mantis_core.errors import ModelError
from mantis_core.tasks import Batch

_GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill the unit interval evenly


class Conditions(NamedTuple):
    """Of each image what the encoder reads, what the stream would carry, whose losses count.

    All three are (B, K), the first float. `forced` (B,) are the images that the detector did not
    decide about. `shares` (K,) are how often images that have a task are asked for it: the mean
    loss over those that are asked counts that much, so that a rate weight means the same whatever
    is asked for. None counts each fully.
    """

    condition: Tensor
    mask: Tensor
    loss_mask: Tensor
    forced: Tensor
    shares: Tensor | None = None


class Asking(nn.Module):
    """Says for which tasks an image of a step is coded.

    A model that is asked draws one of the requests for each image, by their weights, among those
    that the image's labels answer; in eval mode by its row id. Another one follows the detector,
    but for a share of the images in training (`teacher_forcing`): these are forced to their true
    tasks, and some of them to a part of these, a request if there are any.
    """

    asked: Tensor
    weights: Tensor

    def __init__(self, config: Stage2Config, model: ModelConfig, tasks: Sequence[str]) -> None:
        """`tasks` are their names. Raises ModelError for a request of others."""
        super().__init__()
        self.config = config
        self.always = model.requests == "asked"
        # What is sent then depends on no request, so all that an image has counts.
        self.same_for_all = model.conditioning.kind == "none" and model.prior == "shared"
        requests = config.requests
        if self.always and not requests:
            requests = tuple(Request(tasks=(name,)) for name in tasks)
            if len(tasks) > 1:  # asked for less, this reply becomes the sum of the single replies
                requests += (Request(tasks="all", weight=len(tasks)),)
        named = [tasks if each.tasks == "all" else each.tasks for each in requests]
        if unknown := sorted({name for names in named for name in names} - set(tasks)):
            raise ModelError(
                f"stage2.requests: there is no task {unknown[0]!r}; the tasks are "
                f"{', '.join(tasks)}"
            )
        asked = torch.tensor([[name in names for name in tasks] for names in named])
        self.register_buffer("asked", asked.view(-1, len(tasks)), persistent=False)
        weights = torch.tensor([each.weight for each in requests])
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, detected: Tensor, mask: Tensor, batch: Batch, progress: float) -> Conditions:
        """The detector's p and the mask of it, both (B, K), at `progress` through training."""
        truth = batch.task_mask
        if self.always:
            wanted = self._requested(batch)
            forced = wanted.any(dim=1)
            if self.same_for_all:
                return Conditions(wanted.float(), wanted, truth, forced)
            return Conditions(wanted.float(), wanted, truth & wanted, forced, self._shares(truth))
        if not self.training:
            return Conditions(detected, mask, truth, mask.new_zeros(len(mask)))
        first, last = self.config.teacher_forcing
        share = first + (last - first) * progress
        count, device = len(batch), detected.device
        forced = (torch.rand(count, device=device) < share) & truth.any(dim=1)
        subset = torch.rand(count, device=device) < self.config.subset_fraction
        wanted = torch.where(subset[:, None], self._part_of(truth, batch), truth)
        rows = forced[:, None]
        return Conditions(
            torch.where(rows, wanted.float(), detected),
            torch.where(rows, wanted, mask),
            torch.where(rows, wanted, truth),
            forced,
        )

    def _part_of(self, truth: Tensor, batch: Batch) -> Tensor:
        """Some of the true tasks of each image, not none: of a request, or of a random number."""
        if len(self.weights):
            wanted = self._requested(batch) & truth
            return torch.where(wanted.any(dim=1, keepdim=True), wanted, truth)
        count, device = len(truth), truth.device
        order = torch.rand(truth.shape, device=device).masked_fill(~truth, 2.0).argsort().argsort()
        size = (torch.rand(count, device=device) * truth.sum(dim=1)).floor() + 1
        return truth & (order < size[:, None])

    def _shares(self, truth: Tensor) -> Tensor:
        """How often images that have a task are asked for it, (K,); `truth` (B, K) bool."""
        of_task = (self.weights[:, None] * self.asked).sum(dim=0)  # (K,)
        of_image = (self._answered(truth) * self.weights).sum(dim=1, keepdim=True)  # (B, 1)
        return (truth * of_task / of_image).sum(dim=0) / truth.sum(dim=0).clamp_min(1)

    def _answered(self, truth: Tensor) -> Tensor:
        """Which requests each image answers, bool (B, N); one that answers none is asked any."""
        answered = (self.asked & truth[:, None]).any(dim=2)
        return answered | ~answered.any(dim=1, keepdim=True)

    def _requested(self, batch: Batch) -> Tensor:
        """One request for each image, bool (B, K)."""
        answered = self._answered(batch.task_mask)
        shares = (answered * self.weights).cumsum(dim=1)
        if self.training:
            drawn = torch.rand(len(batch), device=shares.device)
        else:
            drawn = ((batch.row_id + 1).double() * _GOLDEN).frac().float()
        places = shares[:, :-1] / shares[:, -1:]
        return self.asked[(drawn[:, None] >= places).sum(dim=1)]
