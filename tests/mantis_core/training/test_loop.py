"""The training loop: resumed, averaged, distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mantis_core.config import OptimConfig, TrainingConfig
from mantis_core.folders import load_training_state, save_training_state
from mantis_core.tasks import IGNORE, Batch, Problem
from mantis_core.training.loop import Session, TrainingError, fit, step_seed, steps_per_epoch
from mantis_core.training.meter import Meter, hash_of_rows
from mantis_core.training.recipe import Recipe, StepOutput

STEPS = 2


class World:
    """Deterministic batches for a stage, by epoch."""

    def __init__(self, problem: Problem, batch_of: Callable[..., Batch]) -> None:
        self.problem, self.batch_of = problem, batch_of

    def train(self, epoch: int) -> list[Batch]:
        return [self.batch_of(self.problem, 4, seed=10 * epoch + i) for i in range(STEPS)]

    def holdout(self) -> Iterable[Batch]:
        return [self.batch_of(self.problem, 4, seed=99)]


@pytest.fixture
def world(problem: Problem, batch_of: Callable[..., Batch]) -> World:
    return World(problem, batch_of)


def session_of(recipe: Any, seed: int = 0) -> Session:
    return Session(recipe, recipe.config, steps_per_epoch=STEPS, seed=seed)


def everything(session: Session) -> dict[str, Tensor]:
    return session.state()[0]


@pytest.mark.parametrize("stage", ["stage1_of", "stage2_of"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_resumed_session_equals_an_uninterrupted_one_bit_for_bit(
    stage: str, kind: str, world: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make = request.getfixturevalue(stage)
    optim = OptimConfig(kind=kind, lr=1e-2)  # type: ignore[arg-type]
    whole = session_of(make(world.problem, optim=optim))
    whole_figures = list(fit(whole, world.train, world.holdout))

    first = session_of(make(world.problem, optim=optim))
    begun = fit(first, world.train, world.holdout)
    assert next(begun) == whole_figures[0]
    save_training_state(tmp_path, *first.state())

    resumed = session_of(make(world.problem, optim=optim, seed=5))  # its own weights must go
    resumed.load_state(*load_training_state(tmp_path))
    assert resumed.epoch == 1
    assert list(fit(resumed, world.train, world.holdout)) == whole_figures[1:]
    expected, found = everything(whole), everything(resumed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of dimensions longer than 1: the others mean nothing."""
    return tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_resumed_session_keeps_the_memory_format_of_all_that_a_step_updates(
    kind: str, world: World, stage2_of: Callable[..., Any], tmp_path: Path
) -> None:
    optim = OptimConfig(kind=kind)  # type: ignore[arg-type]
    first = session_of(stage2_of(world.problem, optim=optim))
    first.step(world.train(0)[0])
    save_training_state(tmp_path, *first.state())
    resumed = session_of(stage2_of(world.problem, optim=optim))
    resumed.load_state(*load_training_state(tmp_path))
    kernel = resumed.recipe.student.server.decoder.first[0].weight
    assert strides(kernel) != strides(kernel.contiguous())
    assert resumed.average is not None
    averaged = dict(resumed.average.module.named_parameters())
    for name, parameter in resumed.recipe.student.named_parameters():
        held = {"average": averaged[name], **resumed.optimizer.state[parameter]}
        for what, value in held.items():
            if isinstance(value, Tensor) and value.ndim:
                assert strides(value) == strides(parameter), f"{what} of {name}"


def test_a_state_of_another_schedule_is_refused(
    world: World, stage2_of: Callable[..., Any]
) -> None:
    session = session_of(stage2_of(world.problem))
    tensors, record = session.state()
    with pytest.raises(TrainingError, match="belongs to 9 steps, this run has 4"):
        session.load_state(tensors, {**record, "total_steps": 9})


def test_the_same_seed_gives_the_same_loss_and_another_seed_another(
    world: World, stage2_of: Callable[..., Any]
) -> None:
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(losses))  # what was drawn before must not matter
        session = session_of(stage2_of(world.problem), seed=seed)
        losses.append(session.train_epoch(world.train(0))["train/loss"])
    assert losses[0] == losses[1] != losses[2]
    assert step_seed(0, 1, 0) != step_seed(0, 1, 1)


class Ramp(Recipe):
    """A student of one weight whose training loss falls for ever and whose eval loss turns."""

    def __init__(self) -> None:
        super().__init__((), {})
        self.student = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.student.weight)  # type: ignore[arg-type]
        self.set_teacher(None)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        value = self.student.weight.sum()
        loss = -value if self.training else (value - 0.2).square()
        return StepOutput(loss, {}, len(batch))


class Told(Ramp):
    """A recipe whose holdout losses are told to it, one an epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = iter(losses)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        if self.training:
            return super().forward(batch, progress)
        return StepOutput(torch.tensor(next(self.losses)), {}, len(batch))


def told_session(*losses: float) -> Session:
    config = TrainingConfig(epochs=len(losses), batch_size=4, ema_decay=0)
    return Session(Told(list(losses)), config, steps_per_epoch=1, seed=0)


def test_an_epoch_whose_holdout_loss_is_not_finite_is_never_the_best(world: World) -> None:
    session = told_session(math.nan, 1.0, math.nan, 0.5, math.inf)
    figures = list(fit(session, world.train, world.holdout))
    assert math.isnan(figures[0]["holdout/loss"])
    assert (session.best["epoch"], session.best["holdout/loss"]) == (4, 0.5)


def test_a_training_without_a_finite_holdout_loss_ends_with_an_error(world: World) -> None:
    epochs = fit(told_session(math.nan, math.nan), world.train, world.holdout)
    assert [next(epochs)["epoch"], next(epochs)["epoch"]] == [1, 2]
    with pytest.raises(TrainingError, match="no epoch had a finite loss on the held-back rows"):
        next(epochs)


def test_a_holdout_without_rows_is_refused(world: World, stage2_of: Callable[..., Any]) -> None:
    session = session_of(stage2_of(world.problem))
    with pytest.raises(TrainingError, match=r"raise data\.holdout_fraction or add images"):
        session.evaluate(list)


@pytest.mark.parametrize("stage", ["stage1_of", "stage2_of"])
def test_holdout_figures_do_not_depend_on_how_rows_are_batched(
    stage: str,
    mixed_problem: Problem,
    batch_of: Callable[..., Batch],
    request: pytest.FixtureRequest,
) -> None:
    whole = batch_of(mixed_problem, 7, seed=3)
    for row, truth in enumerate(whole.segmentation["ground"]):
        truth[: 4 * row] = IGNORE
        whole.image[row] //= row + 1
    recipe = request.getfixturevalue(stage)(mixed_problem)
    session = session_of(recipe)
    found = []
    for cuts in ((0, 7), (0, 4, 7), (0, 1, 2, 7), range(8)):
        parts = [rows_of(whole, start, stop) for start, stop in pairwise(cuts)]
        found.append(session.evaluate(lambda parts=parts: parts))  # type: ignore[misc]
    assert "holdout/loss/distillation" in found[0] or "holdout/loss/split" in found[0]
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], rel=2e-5, abs=1e-7)


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    own = slice(start, stop)
    return Batch(
        batch.image[own],
        batch.class_label[own],
        batch.labels[own],
        batch.task_mask[own],
        {name: truth[own] for name, truth in batch.segmentation.items()},
        batch.row_id[own],
    )


def ramp_session(ema_decay: float = 0.0, epochs: int = 4, lr: float = 0.1) -> Session:
    optim = OptimConfig(
        kind="sgd", lr=lr, momentum=0, weight_decay=0, warmup_fraction=0, final_lr_fraction=1
    )
    config = TrainingConfig(epochs=epochs, batch_size=4, optim=optim, ema_decay=ema_decay)
    return Session(Ramp(), config, steps_per_epoch=1, seed=0)


def test_best_weights_are_those_of_the_lowest_eval_loss(world: World) -> None:
    session = ramp_session()
    figures = list(fit(session, world.train, world.holdout))
    assert [f["epoch"] for f in figures] == [1, 2, 3, 4]
    assert session.best["epoch"] == 2
    assert session.best["holdout/loss"] == pytest.approx(0, abs=1e-6)
    assert session.recipe.student.weight.tolist() == [[pytest.approx(0.4)]]
    best = session.best_student()
    assert best.weight.tolist() == [[pytest.approx(0.2)]]
    assert not best.training


def test_the_averaged_weights_are_evaluated_and_training_goes_on_from_the_raw_ones(
    world: World,
) -> None:
    session = ramp_session(ema_decay=0.9)
    student = session.recipe.student
    for epoch in range(2):
        session.train_epoch(world.train(epoch))
        figures = session.evaluate(world.holdout)
    assert session.recipe.student is student
    assert student.weight.tolist() == [[pytest.approx(0.2)]]
    averaged = 2 / 11 * 0.1 + 9 / 11 * 0.2  # the decay after one update is (1 + 1) / (10 + 1)
    assert session.shipped.weight.tolist() == [[pytest.approx(averaged)]]
    assert figures["holdout/loss"] == pytest.approx((averaged - 0.2) ** 2, abs=1e-7)


def test_evaluating_changes_no_weight(world: World, stage2_of: Callable[..., Any]) -> None:
    session = session_of(stage2_of(world.problem))
    session.train_epoch(world.train(0))
    before = {k: v for k, v in everything(session).items() if "mask_threshold" not in k}
    session.evaluate(world.holdout)
    after = everything(session)
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


def test_evaluation_calibrates_the_weights_that_are_kept(
    world: World, stage2_of: Callable[..., Any]
) -> None:
    session = session_of(stage2_of(world.problem))
    session.train_epoch(world.train(0))
    session.evaluate(world.holdout)
    threshold = session.best_weights["mask_threshold"]
    assert 0 < float(threshold) <= 0.5
    assert torch.equal(session.recipe.student.mask_threshold, threshold)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_remedy(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ramp_session()
    with torch.no_grad():
        session.recipe.student.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="nan at step 0: lower the learning rate"):
        session.train_epoch(world.train(0))


class Dice(Ramp):
    """Notes what each step draws."""

    def __init__(self, drawn: list[float]) -> None:
        super().__init__()
        self.drawn = drawn

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        self.drawn.append(float(torch.rand(())))
        return super().forward(batch, progress)


def test_every_step_of_every_worker_draws_its_own_numbers(world: World) -> None:
    config = TrainingConfig(epochs=1, batch_size=4)
    drawn: list[list[float]] = [[], [], []]
    for run, rank in enumerate((0, 0, 1)):
        session = Session(Dice(drawn[run]), config, steps_per_epoch=STEPS, seed=0, rank=rank)
        session.train_epoch(world.train(0))
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 2 * STEPS


def test_data_that_ends_early_is_an_error_and_data_left_over_is_not(world: World) -> None:
    with pytest.raises(TrainingError, match="ended 1 batches before"):
        ramp_session().train_epoch([])
    session = ramp_session()
    session.train_epoch(world.train(0))
    assert session.step_index == 1


def test_an_epoch_without_a_full_batch_is_refused() -> None:
    assert steps_per_epoch(rows=100, batch_size=32) == 3
    with pytest.raises(TrainingError, match="lower batch_size or add images"):
        Session(Ramp(), TrainingConfig(), steps_per_epoch=steps_per_epoch(10, 32), seed=0)


def test_progress_is_told_at_the_end_of_an_epoch(world: World) -> None:
    seen: list[tuple[int, int, float]] = []

    def on_step(done: int, of: int, figures: dict[str, float]) -> None:
        seen.append((done, of, figures["train/loss"]))

    session = ramp_session()
    session.train_epoch(world.train(0), on_step)
    assert seen == [(1, 1, 0.0)]


def test_figures_are_sums_over_counts_not_means_of_means() -> None:
    meter = Meter()
    one, three = torch.tensor(1.0), torch.tensor(3.0)
    meter.add(
        StepOutput(one, {"bits": 10 * one, "top1/hits": one, "top1/asked": one}, 1), pixels=50
    )
    meter.add(
        StepOutput(three, {"bits": 90 * one, "top1/hits": one, "top1/asked": three}, 3), pixels=50
    )
    assert meter.figures("val") == {
        "val/loss": 2.5,
        "val/bits": 25.0,
        "val/bpp": 0.5,
        "val/top1": 0.5,
    }


def test_segmentation_is_trained_end_to_end(
    mixed_problem: Problem, batch_of: Callable[..., Batch], stage2_of: Callable[..., Any]
) -> None:
    world = World(mixed_problem, batch_of)
    session = session_of(stage2_of(mixed_problem))
    head = session.recipe.student.server.tails["ground"].last.weight
    before = head.detach().clone()
    figures = list(fit(session, world.train, world.holdout))
    assert all(math.isfinite(f["train/loss"]) for f in figures)
    assert not torch.equal(head, before)
    codec = session.best_student()
    codec.finish()
    images = world.train(0)[0].image
    (answer, *_) = codec.decode(codec.encode(images, tasks=["ground"]))
    assert answer.segmentation["ground"].shape == (32, 32)


def test_a_hash_tells_steps_and_rows_apart_but_no_order_within_a_step() -> None:
    rows = torch.tensor([[0, 5], [0, 3], [1, 4]])
    assert hash_of_rows(rows) == hash_of_rows(rows[[1, 0, 2]])
    other_step = torch.tensor([[0, 5], [1, 3], [1, 4]])
    doubled = torch.tensor([[0, 5], [0, 5], [1, 4]])
    assert len({hash_of_rows(each) for each in (rows, other_step, doubled)}) == 3


def test_a_session_hashes_what_it_was_given_and_not_what_it_was_promised(
    world: World, stage2_of: Callable[..., Any]
) -> None:
    batches = world.train(0)
    for step, batch in enumerate(batches):
        batch.row_id[:] = torch.arange(4) + 4 * step
    session = session_of(stage2_of(world.problem))
    assert session.train_epoch(batches)["train/rows"] == 4 * STEPS
    again = session_of(stage2_of(world.problem))
    assert again.train_epoch([batches[0]] * STEPS)["train/rows"] == 4
    assert again.rows_sha256 != session.rows_sha256
