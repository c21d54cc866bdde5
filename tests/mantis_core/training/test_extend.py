"""Training of added tasks: it learns them, and moves nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mantis_core.codec.adding import check_unchanged
from mantis_core.codec.checkpoint import load_model
from mantis_core.codec.mantis import Mantis
from mantis_core.config import ExtendConfig
from mantis_core.errors import ModelError
from mantis_core.patch import read_patch
from mantis_core.tasks import Batch, Problem, TaskSpec
from mantis_core.training.extend import extend_recipe
from mantis_core.training.loop import Session
from tests.pipelines.export.codecs import codec_of

BRIGHT = TaskSpec("bright", "classification", 2, (0, 1), ("dark", "light"))
HALF = TaskSpec("half", "segmentation", 2, labels=("left", "right"))
COUNT = 32


def problem_of(codec: Mantis) -> Problem:
    size = codec.spec.image_size
    return Problem((BRIGHT, HALF), ("0", "1"), ("dark", "light"), False, size, size[0])


def batch_of(codec: Mantis) -> Batch:
    """Dark and bright images, and some that are about neither; the right half is "right"."""
    height, width = codec.spec.image_size
    draw = torch.Generator().manual_seed(0)
    label = torch.arange(COUNT) % 3 - 1
    level = torch.tensor([128, 20, 235])[label + 1 - (label + 1 > 2).long()]
    noise = torch.randint(-15, 16, (COUNT, 3, height, width), generator=draw)
    image = (level[:, None, None, None] + noise).clamp(0, 255).to(torch.uint8)
    mask = torch.stack([label >= 0, torch.ones(COUNT, dtype=torch.bool)], dim=1)
    labels = torch.stack([label, torch.full_like(label, -1)], dim=1)
    half = (torch.arange(width) >= width // 2).to(torch.uint8).expand(COUNT, height, width)
    return Batch(image, label, labels, mask, {"half": half.contiguous()}, torch.arange(COUNT))


@pytest.mark.parametrize("kind", ["asked", "attentive", "mapped"])
def test_added_tasks_are_learned_and_nothing_else_moves(kind: str, tmp_path: Path) -> None:
    base = codec_of(kind)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = ExtendConfig(epochs=30, batch_size=COUNT, optim={"lr": 3e-2}, ema_decay=0.5)
    recipe = extend_recipe(config, base, problem_of(base), seed=0)
    session = Session(recipe, config, steps_per_epoch=1, seed=0)
    batch = batch_of(base)
    losses = [float(session.step(batch).loss.detach()) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    student = session.best_student() if session.best else recipe.student
    recipe.save(student, tmp_path, "extend", {"step": 30})
    made = load_model(tmp_path)
    after = made.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert made.ids().stream == base.ids().stream
    way = {"tasks": list(base.spec.task_names)} if kind != "attentive" else {}
    check_unchanged(base, made, batch.image[:4], **way)
    answers = made.decode(made.encode(batch.image, **way))
    said = torch.tensor([answer.labels["bright"] for answer in answers])
    own = batch.class_label >= 0
    assert (said == batch.class_label)[own].float().mean() > 0.9
    about = torch.tensor([answer.task_probability["bright"] for answer in answers])
    assert about[own].mean() > about[~own].mean()


def test_a_model_that_is_asked_is_answered_through_all_its_tasks_unless_said() -> None:
    base = codec_of("asked")
    (first, *_) = base.spec.task_names
    config = ExtendConfig(epochs=1, batch_size=2)
    whole = extend_recipe(config, base, problem_of(base), seed=0)
    assert whole.student.spec.added[0].through == base.spec.task_names  # type: ignore[union-attr]
    one = extend_recipe(
        config.model_copy(update={"through": (first,)}), base, problem_of(base), seed=0
    )
    assert one.student.spec.added[0].through == (first,)  # type: ignore[union-attr]
    assert one.student.spec.added[0].task.classes == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "grade"), [("asked", "row"), ("attentive", "adapter")])
def test_an_extension_is_learned_and_nothing_else_moves(
    kind: str, grade: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mantis_core.networks.extension.MOST_OF_CLIENT", 1.0)  # of a tiny client
    base = codec_of(kind)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = ExtendConfig(
        epochs=30,
        batch_size=COUNT,
        grade=grade,
        rank=1 if grade == "adapter" else None,
        optim={"lr": 3e-2},
        ema_decay=0.5,
    )
    recipe = extend_recipe(config, base, problem_of(base), seed=0)
    session = Session(recipe, config, steps_per_epoch=1, seed=0)
    batch = batch_of(base)
    losses = [float(session.step(batch).loss.detach()) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    student = recipe.student
    assert isinstance(student, Mantis)
    started = {name for name, p in student.named_parameters() if p.grad is not None}
    assert started == {
        name
        for name, _ in student.named_parameters()
        if name.startswith("extensions.0.") and not name.endswith("quantiles")
    }
    recipe.save(session.shipped.cpu(), tmp_path, "extend", {"step": 30})
    made = load_model(tmp_path)
    assert read_patch(tmp_path)[0].child_id == made.stream_ids()[1].hex()
    after = made.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    way = {"tasks": list(base.spec.task_names)} if kind == "asked" else {}
    check_unchanged(base, made, batch.image[:4], **way)
    answers = made.decode(made.encode(batch.image, ["bright", "half"]))
    said = torch.tensor([answer.labels["bright"] for answer in answers])
    own = batch.class_label >= 0
    assert (said == batch.class_label)[own].float().mean() > 0.9


def test_the_rate_of_an_extension_is_weighed_as_the_codec_was_trained() -> None:
    several, one = codec_of("asked"), codec_of("attentive")
    config = ExtendConfig(epochs=1, batch_size=2, grade="row", rate_weight=0.5)
    weights = extend_recipe(config, several, problem_of(several), seed=0).level_weights
    assert weights[[0, 4]].tolist() == pytest.approx(list(several.spec.rates))
    single = codec_of("detecting")
    found = extend_recipe(config, single, problem_of(single), seed=0).level_weights
    assert found.tolist() == [0.5]
    assert len(extend_recipe(config, one, problem_of(one), seed=0).level_weights) == 5


def test_adapters_beyond_two_per_cent_of_the_client_are_refused() -> None:
    base = codec_of("asked")
    config = ExtendConfig(epochs=1, batch_size=2, grade="adapter")
    with pytest.raises(ModelError, match=r"more than 2% of the client's [\d,]+ parameters.*row"):
        extend_recipe(config, base, problem_of(base), seed=0)
