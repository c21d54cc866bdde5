"""A step's forward pass and loss as one graph for torch.compile, and trainings that use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from mantis_core.architecture import DetectorConfig, ModelConfig
from mantis_core.config import LossTerm, TeacherConfig
from mantis_core.tasks import Batch, Problem
from mantis_core.training.loop import Session, TrainingError
from mantis_core.training.recipe import Recipe
from mantis_core.training.teacher import teacher_recipe
from tests.mantis_core.narrow_resnet import NAME

WATCHED = {
    "split": LossTerm(criterion="RelativeMSE", student="decoder", teacher="@split"),
    "layer3": LossTerm(criterion="RelativeMSE", student="tail.layer3", teacher="layer3"),
    "logits": LossTerm(criterion="TeacherLogits"),
    "classes": LossTerm(criterion="ClassDetection"),
}


@pytest.fixture
def recipes(
    problem: Problem,
    stage1_of: Callable[..., Any],
    stage2_of: Callable[..., Any],
    small_config: Callable[..., ModelConfig],
) -> dict[str, Callable[[], Recipe]]:
    detector = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
    model = small_config(detector=detector, neighbour_contexts=True)
    teacher = TeacherConfig(name=NAME, split="layer2", weights="train")
    return {
        "teacher": lambda: teacher_recipe(teacher, problem, seed=0),
        "stage1": lambda: stage1_of(problem, model, losses=WATCHED),
        "stage2": lambda: stage2_of(problem, model),
    }


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_teachers_forward_and_loss_are_one_graph_with_the_same_loss(
    recipes: dict[str, Callable[[], Recipe]], batch: Batch
) -> None:
    recipe = recipes["teacher"]().train()
    compiled = torch.compile(recipe.forward, fullgraph=True, backend="eager")
    losses = []
    for forward in (recipe.forward, compiled):
        torch.manual_seed(0)
        losses.append(forward(batch, 0.5).loss)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)


STEPS = 6


def session_with(compile: Literal["off", "on"], recipe: Recipe) -> Session:
    config = recipe.config.model_copy(update={"compile": compile, "epochs": 1, "amp": "off"})
    session = Session(recipe, config, steps_per_epoch=STEPS, seed=0)
    session.recipe.train()
    return session


def losses_of(session: Session, batch: Batch, steps: int) -> list[float]:
    return [float(session.step(batch).loss.detach()) for _ in range(steps)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_compiled_training_is_one_graph_with_the_losses_of_one_that_is_not(
    stage: str,
    recipes: dict[str, Callable[[], Recipe]],
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compilations = 0
    compiler = torch.compile

    def without_a_compiler(module: Any, *, options: dict[str, Any]) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            nonlocal compilations
            compilations += 1
            return graph.forward

        assert options == {"fallback_random": True}
        return compiler(module, backend=backend, fullgraph=True)  # refuses a second graph

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    plain, compiled = (session_with(each, recipes[stage]()) for each in ("off", "on"))
    ours, theirs = (losses_of(each, batch, STEPS) for each in (compiled, plain))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert 1 <= compilations <= 4  # as progress becomes a variable, and the rate's ramp ends
    assert compiled.state()[0].keys() == plain.state()[0].keys()
    assert compiled.evaluate(lambda: [batch])["holdout/loss"] == pytest.approx(
        plain.evaluate(lambda: [batch])["holdout/loss"], rel=1e-4
    )


def test_a_machine_that_cannot_compile_gets_one_message(
    recipes: dict[str, Callable[[], Recipe]], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = torch.compile

    def broken(module: Any, **how: Any) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler is found\n a page of more")

        return compiler(module, backend=backend)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", broken)
    session = session_with("on", recipes["stage1"]())
    with pytest.raises(TrainingError, match=r"(?s)no C\+\+ compiler.*`compile: off`"):
        session.step(batch)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles for minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="it needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_compiler_trains_as_without_it(
    recipes: dict[str, Callable[[], Recipe]], batch: Batch
) -> None:
    torch.compiler.reset()
    plain, compiled = (session_with(each, recipes["stage1"]()) for each in ("off", "on"))
    assert losses_of(compiled, batch, 4) == pytest.approx(losses_of(plain, batch, 4), rel=1e-4)
