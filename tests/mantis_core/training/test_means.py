"""Means of parts are joined by the number of entries behind them, over batches and workers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mantis_core.training.losses import RelativeMSE
from mantis_core.training.means import Mean, Objective, Pool, add_up, loss_of


def mean(value: float, count: int) -> Mean:
    return Mean(torch.tensor(value), torch.tensor(count))


def objective(*, near: Mean, rate: float = 0.0, share: Mean | None = None) -> Objective:
    terms = {"near": (2.0, [near, mean(1.0, 1)]), "none": (1.0, [mean(0.0, 0)])}
    return Objective(terms, Mean(torch.tensor(rate), 4), share, "a")


def test_a_loss_is_the_weighted_terms_and_the_rate() -> None:
    loss, terms = loss_of([objective(near=mean(3.0, 5), rate=0.5)])
    assert float(loss) == 8.5
    assert {name: float(value) for name, value in terms.items()} == {"near": 8.0, "none": 0.0}


def test_objectives_count_by_their_share_of_the_images() -> None:
    quarter, half = mean(0.25, 4), mean(0.5, 4)
    loss, terms = loss_of(
        [objective(near=mean(3.0, 5), share=quarter), objective(near=mean(1.0, 5), share=half)]
    )
    assert float(loss) == 8 / 4 + 4 / 2
    assert float(terms["near"]) == 4.0


def test_batches_are_joined_by_the_entries_behind_each_mean() -> None:
    pool = Pool()
    pool.add([objective(near=mean(3.0, 1), rate=1.0)])
    pool.add([objective(near=mean(1.0, 3), rate=2.0)])
    pool.add([objective(near=mean(0.0, 0), rate=3.0)])
    assert pool.figures() == {
        "loss": pytest.approx(2 * (6 / 4 + 1) + 2.0),
        "loss/near": pytest.approx(2 * (6 / 4 + 1)),
        "loss/none": 0.0,
    }


def test_a_share_is_joined_over_batches_too() -> None:
    pool = Pool()
    pool.add([objective(near=mean(3.0, 2), share=Mean(torch.tensor(1.0), 2))])
    pool.add([objective(near=mean(9.0, 0), share=Mean(torch.tensor(0.0), 6))])
    assert pool.figures()["loss"] == pytest.approx(0.25 * 2 * (3 + 1))


def test_a_pool_without_batches_has_no_figures() -> None:
    assert Pool().figures() == {}


def test_a_quotient_over_parts_is_that_of_the_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    value, target = (torch.randn(7, 3, 2, 2, generator=draw) for _ in range(2))
    target = target * torch.arange(1, 8).reshape(7, 1, 1, 1)
    whole = RelativeMSE().mean(value, target)
    parts = [RelativeMSE().mean(value[own], target[own]) for own in (slice(2), slice(2, 7))]
    total = sum(float(part.value * part.count) for part in parts)
    count = sum(float(part.count) for part in parts)
    assert total / count == pytest.approx(float(whole.value), rel=1e-6)
    assert count == pytest.approx(float(whole.count), rel=1e-6)


def test_alone_sums_stay_as_they_are() -> None:
    own: dict[tuple[str, ...], Tensor] = {("a",): torch.ones(2)}
    assert add_up(own, 2, "cpu") == own
