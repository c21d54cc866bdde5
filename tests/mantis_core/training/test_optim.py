"""Parameter groups, schedule, moving average."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mantis_core.config import OptimConfig
from mantis_core.networks.server import TaskDecoder
from mantis_core.tasks import Problem
from mantis_core.training.optim import (
    GROUPS,
    MovingAverage,
    build_optimizer,
    lr_factor,
    parameter_groups,
    set_lr,
)

EMPTY: dict[str, dict[str, nn.Parameter]] = {name: {} for name in GROUPS}


@pytest.mark.parametrize("stage", ["stage1_of", "stage2_of"])
def test_every_parameter_is_in_exactly_one_group(
    stage: str, problem: Problem, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(stage)(problem)
    groups = parameter_groups(recipe.student, loaded=recipe.loaded)
    grouped = [name for group in groups.values() for name in group]
    assert sorted(grouped) == sorted(name for name, _ in recipe.student.named_parameters())


def test_the_optimiser_holds_all_that_has_a_gradient_and_nothing_frozen(
    problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    recipe = stage2_of(problem)
    groups = parameter_groups(recipe.student, loaded=recipe.loaded)
    optimizer = build_optimizer(groups, OptimConfig())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = [id(p) for p in recipe.student.parameters() if p.requires_grad]
    assert sorted(held) == sorted(wanted)
    stem = recipe.student.client.stem.parameters()
    assert not {id(p) for p in stem} & set(held)


def rates_and_decays(
    student: nn.Module, config: OptimConfig, loaded: Collection[str] = ()
) -> dict[str, tuple[float, float]]:
    """The peak rate and the weight decay of every trained parameter."""
    held = {
        id(p): (group["lr"], group["weight_decay"])
        for group in build_optimizer(parameter_groups(student, loaded=loaded), config).param_groups
        for p in group["params"]
    }
    return {name: held[id(p)] for name, p in student.named_parameters() if id(p) in held}


def test_loaded_weights_learn_at_the_fine_tuning_rate_and_only_kernels_decay() -> None:
    student = nn.ModuleDict({"old": nn.Linear(2, 2), "older": nn.Conv2d(2, 2, 1)})
    config = OptimConfig(lr=0.1, fine_tune_lr=0.01, weight_decay=0.5)
    assert rates_and_decays(student, config, ["old.weight", "old.bias"]) == {
        "old.weight": (0.01, 0.5),
        "old.bias": (0.01, 0.0),
        "older.weight": (0.1, 0.5),
        "older.bias": (0.1, 0.0),
    }


def test_scales_shifts_and_norms_do_not_decay_whatever_their_shape() -> None:
    student = nn.ModuleDict({"task": TaskDecoder(8, 4), "norm": nn.GroupNorm(2, 8)})
    config = OptimConfig(weight_decay=0.5)
    decays = {name: decay for name, (_, decay) in rates_and_decays(student, config).items()}
    assert {name for name, decay in decays.items() if decay} == {
        "task.first.weight",
        "task.last.weight",
    }


@pytest.mark.parametrize("stage", ["stage1_of", "stage2_of"])
def test_only_weights_of_layers_decay_in_either_stage(
    stage: str, problem: Problem, request: pytest.FixtureRequest
) -> None:
    student = request.getfixturevalue(stage)(problem).student
    layers = (nn.Linear, nn.Conv2d)
    weights = {
        f"{name}.weight" for name, layer in student.named_modules() if isinstance(layer, layers)
    }
    decays = rates_and_decays(student, OptimConfig(weight_decay=0.5))
    assert {name for name, (_, decay) in decays.items() if decay} == weights & decays.keys()


def test_the_density_does_not_decay_and_its_quantiles_are_not_trained(
    problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    groups = parameter_groups(stage2_of(problem).student)
    assert list(groups["quantiles"]) == ["bottleneck.density.quantiles"]
    assert groups["density"]
    assert all(name.startswith("bottleneck.density.") for name in groups["density"])
    config = OptimConfig(density_lr=0.3, weight_decay=0.5)
    held = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in build_optimizer(groups, config).param_groups
        for parameter in group["params"]
    }
    assert {held[id(parameter)] for parameter in groups["density"].values()} == {(0.3, 0.0)}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_either_optimiser_takes_a_step(kind: str) -> None:
    student = nn.Linear(2, 2)
    before = student.weight.detach().clone()
    optimizer = build_optimizer(parameter_groups(student), OptimConfig(kind=kind))  # type: ignore[arg-type]
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(student.weight, before)


def test_adamw_is_fused_where_all_parameters_are_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels() -> tuple[bool, bool]:
        (group,) = build_optimizer({**EMPTY, "new": {"x": parameter}}, OptimConfig()).param_groups
        return group["fused"], group["foreach"]

    parameter = nn.Parameter(torch.ones(2, 2))
    assert kernels() == (False, True)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    assert kernels() == (True, False)


def test_the_rate_warms_up_to_its_peak_and_decays_to_its_last_share() -> None:
    config = OptimConfig(warmup_fraction=0.1, final_lr_fraction=0.01)
    factors = [lr_factor(step, 100, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx((1 + 0.01) / 2)
    assert factors[100] == pytest.approx(0.01)


def test_setting_the_rate_twice_starts_from_the_peak_both_times() -> None:
    config = OptimConfig(lr=0.1)
    optimizer = build_optimizer(parameter_groups(nn.Linear(2, 2)), config)
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


def test_the_moving_average_warms_up_then_has_its_decay() -> None:
    student = nn.Linear(1, 1, bias=False)
    average = MovingAverage(student, 0.5)
    expected, values = 0.0, [1.0, 2.0, -3.0, 5.0, 4.0, 0.5, 7.0, 1.5, 2.5, 3.5, 9.0]
    for n, value in enumerate(values):
        with torch.no_grad():
            student.weight.fill_(value)
        average.update_parameters(student)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if n == 0 else decay * expected + (1 - decay) * value
        assert float(average.module.weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_moving_average_takes_buffers_as_they_are() -> None:
    student = nn.BatchNorm1d(2)
    average = MovingAverage(student, 0.999)
    for _ in range(3):
        student(torch.randn(8, 2))
        average.update_parameters(student)
    assert torch.equal(average.module.running_mean, student.running_mean)


def test_the_moving_average_is_stored_as_torchs_own_and_goes_on_where_it_was() -> None:
    student = nn.Linear(1, 1)
    average, again = MovingAverage(student, 0.9), MovingAverage(student, 0.9)
    assert list(average.state_dict()) == list(AveragedModel(student).state_dict())
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(student.weight, value)
        average.update_parameters(student)
    again.load_state_dict(average.state_dict())
    assert again.updates == int(again.n_averaged) == 3
    for each in (average, again):
        nn.init.constant_(student.weight, 7.0)
        each.update_parameters(student)
    assert torch.equal(average.module.weight, again.module.weight)
