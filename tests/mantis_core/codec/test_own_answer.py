"""The client's answer: what is read of the detector, how the server decides with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mantis_core.architecture import DetectorConfig, ModelConfig
from mantis_core.bitstream.coder import TOTAL
from mantis_core.bitstream.wire import read_stream
from mantis_core.codec.checkpoint import load_client, load_server, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.own_answer import (
    EDGES,
    ClientAnswer,
    ClientAnswers,
    Fusion,
    confidence_counts,
)
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder, save_folder
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem, TaskSpec
from mantis_core.training.stage2 import Stage2Recipe

DETECTOR = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
TASKS = (
    TaskSpec("a", "classification", 2, (3, 1)),
    TaskSpec("b", "classification", 3, (0, 1, 2)),
    TaskSpec("ground", "segmentation", 2),
)


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities).log()


class ManyMinds(torch.nn.Module):
    """In place of a detector's MLP: logits from -4 to 4 that differ from image to image."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.waves = torch.nn.Parameter(100.0 + 7 * torch.arange(outputs))

    def forward(self, pooled: Tensor) -> Tensor:
        return 4 * torch.sin(pooled.sum(dim=1, keepdim=True) * self.waves)


def of_many_minds(codec: Mantis) -> None:
    """Gives the detector other answers for other images, some sure and some not."""
    codec.client.detector.mlp = ManyMinds(codec.client.detector.mlp[-1].out_features)


def test_the_answer_is_the_best_label_of_the_primary_task_and_how_probable_it_is() -> None:
    answers = ClientAnswers(TASKS, 4)
    logits = logits_of([[0.6, 0.25, 0.05, 0.05, 0.05]] * 3)
    found = answers(logits, torch.tensor([0, 1, 2]))
    assert found.label.tolist() == [1, 0, -1]
    assert found.level.tolist() == [1, 3, -1]


def test_levels_of_confidence_rise_with_it() -> None:
    answers = ClientAnswers((TaskSpec("a", "classification", 2, (0, 1)),), 2)
    steps = [0.1, *(edge + 1e-4 for edge in EDGES)]
    logits = logits_of([[p, 0.0, 1 - p] for p in steps])
    assert answers(logits, torch.zeros(8).long()).level.tolist() == list(range(8))


def test_fusion_starts_without_effect_and_leaves_images_without_an_answer_alone() -> None:
    log_p = torch.log_softmax(torch.randn(5, 4), dim=1)
    log_p[:, 3] = -torch.inf
    log_p = torch.log_softmax(log_p, dim=1)
    answer = ClientAnswer(torch.tensor([0, 1, 2, -1, 0]), torch.tensor([7, 6, 0, -1, 3]))
    fusion = Fusion()
    torch.testing.assert_close(fusion(log_p, answer), log_p)
    with torch.no_grad():
        fusion.bonus.fill_(2.0)
    fused = fusion(log_p, answer)
    assert torch.equal(fused[3], log_p[3])
    assert (fused.exp().sum(dim=1) - 1).abs().max() < 1e-6
    for row in (0, 1, 2, 4):
        label = answer.label[row]
        rise = fused[row] - log_p[row]
        others = [place for place in range(3) if place != label]
        torch.testing.assert_close(
            rise[label] - rise[others], torch.full((2,), 2.0), atol=1e-5, rtol=0
        )
    fused.exp()[:, 0].sum().backward()
    assert torch.isfinite(fusion.bonus.grad).all()
    assert torch.isfinite(fusion.log_scale.grad).all()


def test_calibration_finds_the_rule_that_made_the_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    count, places = 20_000, 4
    log_p = torch.log_softmax(torch.randn(count, places, generator=draw), dim=1)
    label = torch.randint(0, 3, (count,), generator=draw)
    level = torch.randint(0, 7, (count,), generator=draw)  # no image has the last one
    rule = Fusion()
    with torch.no_grad():
        rule.bonus.copy_(torch.linspace(-1, 3, 8))
        rule.log_scale.copy_(torch.linspace(0.4, -0.4, 8))
        fused = rule(log_p, ClientAnswer(label, level)).exp()
    truth = torch.multinomial(fused, 1, generator=draw)[:, 0]
    found = Fusion()
    with torch.no_grad():
        found.bonus[7] = 0.7
    trained = {name: value.clone() for name, value in found.named_parameters()}
    found.calibrate(log_p, ClientAnswer(label, level), truth)
    torch.testing.assert_close(found.fitted_bonus[:7], rule.bonus[:7], atol=0.2, rtol=0)
    torch.testing.assert_close(found.fitted_log_scale[:7], rule.log_scale[:7], atol=0.12, rtol=0)
    assert float(found.fitted_bonus[7]) == pytest.approx(0.7, abs=1e-3)  # as it was trained
    assert all(torch.equal(value, trained[name]) for name, value in found.named_parameters())
    once = found.fitted_bonus.clone()
    found.calibrate(log_p, ClientAnswer(label, level), truth)
    assert torch.equal(found.fitted_bonus, once)
    # In training what is trained decides, afterwards what was fitted.
    answer = ClientAnswer(label[:50], level[:50])
    trained_only = Fusion()
    trained_only.load_state_dict(found.state_dict())
    trained_only.fitted_bonus.zero_()
    assert torch.equal(found.train()(log_p[:50], answer), trained_only.train()(log_p[:50], answer))
    assert not torch.equal(
        found.eval()(log_p[:50], answer), trained_only.eval()(log_p[:50], answer)
    )
    for own in range(7):
        share = (label == truth)[level == own].float().mean()
        assert float(found.accuracy[own]) == pytest.approx(float(share), abs=0.01)


def test_calibration_without_answers_changes_nothing() -> None:
    fusion, nobody = Fusion(), torch.full((3,), -1)
    fusion.calibrate(torch.zeros(3, 4), ClientAnswer(nobody, nobody), torch.zeros(3).long())
    assert not fusion.fitted_bonus.any()
    assert not fusion.fitted_log_scale.any()


def test_a_diverged_epoch_leaves_the_rule_as_it_was_trained() -> None:
    fusion = Fusion()
    with torch.no_grad():
        fusion.bonus.fill_(0.5)
    log_p = torch.full((3, 4), torch.nan)
    answer = ClientAnswer(torch.zeros(3).long(), torch.zeros(3).long())
    fusion.calibrate(log_p, answer, torch.zeros(3).long())
    assert fusion.fitted_bonus.tolist() == [0.5] * 8


def test_counts_follow_the_images_and_leave_no_level_out() -> None:
    task_level = np.array([0] * 900 + [3] * 100)
    level = np.array([7] * 880 + [6] * 20 + [2] * 100)
    counts = confidence_counts(task_level, level).numpy()
    assert counts.shape == (17, 8)
    assert (counts.sum(axis=1) == TOTAL).all()
    assert counts.min() >= 1
    assert counts[0, 7] / TOTAL == pytest.approx(0.975, abs=0.01)
    assert counts[3, 2] / TOTAL == pytest.approx(0.96, abs=0.02)
    assert counts[16, 2] / TOTAL == pytest.approx(0.1, abs=0.02)
    assert counts[9].argmax() == 7  # no image: as all of them
    assert (confidence_counts(task_level[:0], level[:0]).numpy().sum(axis=1) == TOTAL).all()


@pytest.fixture
def recipe(
    problem: Problem,
    stage2_of: Callable[..., Stage2Recipe],
    small_config: Callable[..., ModelConfig],
) -> Stage2Recipe:
    return stage2_of(problem, small_config(detector=DETECTOR, send_answer=True))


def test_stage_2_trains_the_rule_and_calibrates_it_on_rows_held_back(
    recipe: Stage2Recipe, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    fusion = recipe.student.fusion
    assert fusion is not None
    recipe.train()
    recipe(batch_of(problem), 0.5).loss.backward()
    assert fusion.bonus.grad is not None
    assert fusion.bonus.grad.any()
    recipe.zero_grad()
    recipe.config = recipe.config.model_copy(update={"answer_dropout": 1.0})
    recipe(batch_of(problem), 0.5).loss.backward()
    assert not fusion.bonus.grad.any()
    assert recipe.student.client.detector is not None
    batches = [batch_of(problem, 32, seed=seed) for seed in range(3)]
    before = recipe.student.answer_counts.clone()
    recipe.calibrate(recipe.student, batches, lambda rows: rows)
    assert not torch.equal(recipe.student.answer_counts, before)
    assert fusion.fitted_bonus.any()


def test_the_rule_is_fitted_to_what_the_server_says_by_itself(
    recipe: Stage2Recipe,
    problem: Problem,
    batch_of: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = recipe.student
    assert student.fusion is not None
    of_many_minds(student)
    student.fusion.fitted_bonus.fill_(7.0)  # must not be heard
    given: list[tuple[Tensor, ClientAnswer, Tensor, Tensor | None]] = []
    monkeypatch.setattr(student.fusion, "calibrate", lambda *rows: given.append(rows))
    batch = batch_of(problem, 32)
    recipe.calibrate(student, [batch], lambda rows: rows)
    log_p, answer, truth, shares = given[0]
    assert shares is None
    student.eval()
    with torch.no_grad():
        view = student.client(normalise(batch.image))
        nobody = torch.zeros(32, dtype=torch.bool)
        output = student(normalise(batch.image), view=view, heard=nobody)
    assert len({*view.logits.argmax(dim=1).tolist()}) > 1
    for row, first in enumerate(view.logits.argmax(dim=1).tolist()):
        task, label = problem.tasks[first], int(batch.labels[row, first])
        own = output.tasks[task.name][row]
        torch.testing.assert_close(log_p[row, : len(own)], own)
        assert (log_p[row, len(own) :] == -torch.inf).all()
        assert int(truth[row]) == (task.num_classes if label < 0 else label)
    told = student.own_answers(view.class_logits, view.logits.argmax(dim=1))
    assert torch.equal(answer.label, told.label)
    assert torch.equal(answer.level, told.level)


def test_a_forced_image_hears_no_answer_for_it_would_be_within_its_true_task(
    recipe: Stage2Recipe, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    recipe.train()
    updates = {"teacher_forcing": (1.0, 1.0), "answer_dropout": 0.0}
    recipe.config = recipe.asking.config = recipe.config.model_copy(update=updates)
    recipe(batch_of(problem), 0.5).loss.backward()
    assert not recipe.student.fusion.bonus.grad.any()


def test_the_answer_gives_the_detector_no_gradient(
    recipe: Stage2Recipe, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    student = recipe.student
    with torch.no_grad():
        student.fusion.fitted_bonus.fill_(1.0)
        student.fusion.bonus.fill_(1.0)
    view = student.client(normalise(batch_of(problem).image))
    output = student(normalise(batch_of(problem).image), view=view)
    output.tasks["animals"].sum().backward()
    assert view.class_logits is not None
    assert all(p.grad is None for p in student.client.detector.mlp.parameters())


def test_streams_decide_as_the_codec_does_in_evaluation(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    codec = codec_of(problem, small_config(detector=DETECTOR, send_answer=True))
    of_many_minds(codec)
    codec.fusion.fitted_bonus.copy_(torch.tensor([-4.0, 1, 5, -2, 3, -1, 6, 2]))
    codec.fusion.fitted_log_scale.copy_(torch.linspace(-1, 1, 8))
    codec.load_state_dict(codec.state_dict())
    image = batch_of(problem, 16).image
    sent = codec.encode_in_detail(image)
    answers = codec.decode([each.data for each in sent])
    with torch.no_grad():
        output = codec(normalise(image))
        silent = codec(normalise(image), heard=torch.zeros(16, dtype=torch.bool))
        view = codec.client(normalise(image))
    assert [a.class_index for a in answers] == output.decision.tolist()
    assert output.decision.tolist() != silent.decision.tolist()
    primary = view.logits.argmax(dim=1)
    own = codec.own_answers(view.class_logits, primary)
    assert len(set(own.level.tolist())) >= 3
    spec = codec.client_codec().stream_spec
    for row, (each, answer) in enumerate(zip(sent, answers, strict=True)):
        (found,) = read_stream(each.data, codec.tables(), spec).images
        assert found.has_latent
        assert found.tasks.primary == int(primary[row])
        assert (found.label, found.confidence) == (int(own.label[row]), int(own.level[row]))
        task = codec.spec.tasks[found.tasks.primary]
        fused = output.tasks[task.name][row, :-1].exp()
        assert answer.label_probability[task.name] == pytest.approx(float(fused.max()), abs=1e-3)


def test_an_asked_image_carries_no_answer(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    codec = codec_of(problem, small_config(detector=DETECTOR, send_answer=True))
    (data,) = codec.encode(batch_of(problem, 1).image, "tools")
    (found,) = read_stream(data, codec.tables(), codec.client_codec().stream_spec).images
    assert (found.label, found.confidence, found.tasks.levels) == (None, None, None)


def test_an_answer_alone_has_the_probability_of_its_level(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    codec = codec_of(problem, small_config(detector=DETECTOR, send_answer=True))
    of_many_minds(codec)
    codec.fusion.accuracy.copy_(torch.linspace(0.1, 0.8, 8))
    codec.load_state_dict(codec.state_dict())
    image = batch_of(problem, 4).image
    sent = codec.encode_in_detail(image, exit_confidence=0.0)
    assert all(each.answered for each in sent)
    assert max(each.session_bytes for each in sent) <= 6
    with torch.no_grad():
        sure = torch.softmax(codec.client(normalise(image)).class_logits, dim=1)[:, :-1]
    assert len(set(sure.argmax(dim=1).tolist())) > 1
    for row, (each, answer) in enumerate(
        zip(sent, codec.decode([e.data for e in sent]), strict=True)
    ):
        assert answer.answered
        assert answer.class_index == each.client_class == int(sure[row].argmax())
        level = sum(float(sure[row].max()) >= edge for edge in EDGES)
        assert answer.class_probability == pytest.approx(0.1 * (level + 1))


def test_a_detector_that_names_tasks_has_no_answer_to_send() -> None:
    with pytest.raises(ValidationError, match=r"model\.send_answer"):
        ModelConfig(detector=DetectorConfig(classes=False), send_answer=True)


def test_counts_of_confidence_that_no_stream_can_have_are_refused(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    tmp_path: Path,
) -> None:
    codec = codec_of(problem, small_config(detector=DETECTOR, send_answer=True))
    save_model(tmp_path / "model", codec, {})
    tensors, config, meta = load_folder(tmp_path / "model")
    tensors["answer_counts"][3, 0] += 1
    save_folder(tmp_path / "model", tensors, config, meta)
    for load in (load_client, load_server):
        with pytest.raises(ModelError, match="holds no counts of confidence"):
            load(tmp_path / "model")
    del tensors["answer_counts"]
    save_folder(tmp_path / "model", tensors, config, meta)
    for load in (load_client, load_server):
        with pytest.raises(ModelError, match="lacks answer_counts"):
            load(tmp_path / "model")
