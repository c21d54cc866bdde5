"""Arms of the evaluation on single batches; whole passes are in test_end_to_end.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mantis_core.architecture import ConditioningConfig, DetectorConfig
from mantis_core.baselines.per_task import PerTaskCodecs
from mantis_core.codec.answer import Answer
from mantis_core.codec.mantis import Mantis
from mantis_core.networks.preprocessing import normalise
from pipelines.evaluation.answers import (
    client_cost,
    run_image_codec,
    run_per_task,
    run_teacher,
)
from pipelines.evaluation.arms import Arm, ArmSource, by_model
from pipelines.evaluation.coded import code, ways_of
from pipelines.evaluation.rows import with_pixels_summed
from pipelines.evaluation.split_pass import Evaluated, arm_figures
from tests.mantis_core.baselines.test_per_task import make_recipe
from tests.mantis_core.conftest import (
    make_batch,
    make_codec,
    make_config,
    make_problem,
    make_teacher,
)
from tests.pipelines.evaluation.measured import rows_of


@pytest.mark.parametrize("single_class", [True, False])
def test_an_image_is_sent_once_for_each_task_it_carries(single_class: bool) -> None:
    problem = make_problem(single_class=single_class)
    codecs = make_recipe(problem).student
    assert isinstance(codecs, PerTaskCodecs)
    codecs.finish()
    batch = make_batch(problem, 4, classes=(1, 4))
    arrays = {
        "task_mask": batch.task_mask.numpy(),
        **{f"segmentation/{name}": mask.numpy() for name, mask in batch.segmentation.items()},
    }
    padded = torch.cat([batch.image, batch.image[:1]])
    rows = run_per_task(codecs, padded, arrays, problem)
    assert rows["wire_bytes"].tolist()[4] == 0
    for index in range(4):
        sizes = 0
        for k, task in enumerate(problem.tasks):
            if not batch.task_mask[index, k]:
                assert rows["predicted"][index, k] == -1
                continue
            (stream,) = codecs[task.name].encode(batch.image[index : index + 1])
            (answer,) = codecs[task.name].decode([stream])
            sizes += len(stream)
            if task.is_classification:
                assert rows["predicted"][index, k] == answer.labels[task.name]
                if single_class and int(batch.task_mask[index].sum()) == 1:
                    expected = task.classes[answer.labels[task.name]]
                    assert rows["class_index"][index] == expected
            else:
                counted = rows[f"confusion/{task.name}"][index].sum()
                assert counted == (batch.segmentation[task.name][index] != 255).sum()
        assert rows["wire_bytes"][index] == sizes
        assert 0 < rows["payload_bytes"][index] < sizes
    np.testing.assert_array_equal(rows["decoded"][:4], arrays["task_mask"])
    if not single_class:
        assert (rows["class_index"] == -1).all()


def test_a_students_detector_costs_nothing_unless_it_answers() -> None:
    problem = make_problem()
    codec = make_codec(problem)
    whole = codec.client_codec().describe()
    plain = client_cost(ArmSource("a", "mantis", None), codec, problem)
    assert plain["client_macs"] == whole["client_macs"]
    assert plain["client_bytes"] == whole["client_bytes"]
    student = client_cost(ArmSource("a", "student", None), codec, problem)
    assert student["client_macs"] == whole["client_macs"] - whole["detector_macs"]
    exits = ArmSource("a", "student_exit", None, exit_confidence=0.5)
    assert client_cost(exits, codec, problem)["client_macs"] == whole["client_macs"]
    assert client_cost(ArmSource("a", "teacher", None), make_teacher(problem), problem) == {}
    detector = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
    sends = make_codec(problem, make_config(detector=detector, send_answer=True))
    whole = sends.client_codec().describe()
    student = client_cost(ArmSource("a", "student", None), sends, problem)
    assert student["client_macs"] == whole["client_macs"]


def test_sizes_in_a_session_are_those_of_models_that_have_sessions() -> None:
    problem, batch = make_problem(), make_batch(make_problem(), 4)
    arrays = {"task_mask": batch.task_mask.numpy()}
    codec = make_codec(problem)
    rows = rows_of(codec, batch.image, arrays, problem)
    assert (rows["session_bytes"] == rows["wire_bytes"] - 9).all()
    first = Mantis(codec.spec.model_copy(update={"stream_version": 1}))
    first.load_state_dict(codec.state_dict())
    rows = rows_of(first.eval(), batch.image, arrays, problem)
    assert (rows["wire_bytes"] > 0).all()
    assert (rows["session_bytes"] == -1).all()


def test_an_image_codec_is_spared_its_headers_in_a_session() -> None:
    problem, batch = make_problem(), make_batch(make_problem(), 4)
    arrays = {"task_mask": batch.task_mask.numpy(), "row_id": np.arange(4)}
    source = ArmSource("webp/quality-50", "webp", None, quality=50)
    with torch.no_grad():
        rows = run_image_codec(make_teacher(problem), batch.image, arrays, problem, source)
    assert (rows["session_bytes"] == rows["payload_bytes"]).all()
    assert (rows["session_bytes"] < rows["wire_bytes"]).all()


def test_with_early_exit_a_clients_answers_are_told_apart_and_counted() -> None:
    problem = make_problem()
    detector = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
    codec = make_codec(problem, make_config(detector=detector))
    batch = make_batch(problem, 6)
    arrays = {"task_mask": batch.task_mask.numpy()}
    every = rows_of(codec, batch.image, arrays, problem, exit_confidence=0.0)
    none = rows_of(codec, batch.image, arrays, problem, exit_confidence=1.0)
    plain = rows_of(codec, batch.image, arrays, problem)
    assert every["answered"].all()
    assert not none["answered"].any()
    assert every["wire_bytes"].max() < none["wire_bytes"].min()
    assert (every["decoded"].sum(axis=1) == 1).all()
    for name in ("wire_bytes", "class_index", "predicted"):
        np.testing.assert_array_equal(none[name], plain[name])


def test_arms_of_one_model_share_its_work_and_answer_as_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_problem()
    detector = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
    codec = make_codec(problem, make_config(detector=detector))
    batch = make_batch(problem, 6)
    arrays = {"task_mask": batch.task_mask.numpy()}
    with torch.no_grad():
        logits = codec.client(normalise(batch.image)).class_logits
    middle = float(torch.softmax(logits, dim=1)[:, :-1].amax(dim=1).median())
    sources = [
        ArmSource("plain", "mantis", None),
        ArmSource("exit", "early_exit", None, exit_confidence=middle),
        ArmSource("told", "oracle", None),
    ]
    ways = [way for source in sources for way in ways_of(source, codec, 6, arrays, problem)]
    alone = [code(codec, batch.image, [way])[0] for way in ways]
    asked: list[int] = []
    decode = Mantis.decode

    def counted(self: Mantis, streams: list[bytes]) -> list[Answer]:
        asked.append(len(streams))
        return decode(self, streams)

    monkeypatch.setattr(Mantis, "decode", counted)
    together = code(codec, batch.image, ways)
    answered = sum(sent.answered for sent in together[1].encoded)
    assert 0 < answered < 6
    assert asked == [6, answered, 6]
    for own, shared in zip(alone, together, strict=True):
        assert [a.data for a in own.encoded] == [b.data for b in shared.encoded]
        assert [a.session_bytes for a in own.encoded] == [b.session_bytes for b in shared.encoded]
        assert [a.to_dict() for a in own.answers] == [b.to_dict() for b in shared.answers]


def test_arms_of_one_model_stand_together() -> None:
    arms = [
        Arm("stage2", "mantis", 1e-3, 0, "stage2"),
        Arm("webp/quality-5", "webp", None, 0, "teacher", quality=5),
        Arm("stage2/none", "none", 1e-3, 0, "stage2/none"),
        Arm("stage2/exit", "early_exit", 1e-3, 0, "stage2", exit_confidence=0.5),
        Arm("oracle", "oracle", 1e-3, 0, "stage2"),
        Arm("teacher", "teacher", None, 0, "teacher"),
    ]
    names = [[arm.name for arm in together] for together in by_model(arms)]
    assert names == [
        ["stage2", "stage2/exit", "oracle"],
        ["webp/quality-5"],
        ["stage2/none"],
        ["teacher"],
    ]


@pytest.mark.parametrize("kind", ["gated", "none"])
def test_a_codec_that_is_asked_is_measured_request_by_request(kind: str) -> None:
    problem = make_problem()
    conditioning = ConditioningConfig(kind=kind, hidden=8)
    prior = "shared" if kind == "none" else "request"
    config = make_config(requests="asked", prior=prior, conditioning=conditioning)
    codec = make_codec(problem, config)
    if kind == "gated":
        with torch.no_grad():
            codec.client.conditioning.sets.open[0, 1:] = -1.0
        codec.finish()
    batch = make_batch(problem, 5)
    arrays = {
        "task_mask": batch.task_mask.numpy(),
        **{f"segmentation/{name}": mask.numpy() for name, mask in batch.segmentation.items()},
    }
    rows = rows_of(codec, batch.image, arrays, problem)
    sizes = []
    for k, task in enumerate(problem.tasks):
        sent = codec.encode_in_detail(batch.image, task.name)
        sizes.append([len(each.data) for each in sent])
        session = [each.session_bytes for each in sent]
        assert rows["request_session_bytes"][:, k].tolist() == session
        if task.is_classification:
            answers = codec.decode([each.data for each in sent])
            assert rows["predicted"][:, k].tolist() == [a.labels[task.name] for a in answers]
    np.testing.assert_array_equal(rows["request_wire_bytes"], np.transpose(sizes))
    np.testing.assert_allclose(rows["wire_bytes"], np.mean(sizes, axis=0))
    assert (rows["request_wire_bytes"][:, 0] < rows["request_wire_bytes"][:, 1]).all() is (
        np.bool_(kind == "gated")
    )
    assert rows["decoded"].all()
    assert (rows["probabilities"] == -1).all()
    told = json.loads(rows["answer"][0])
    assert told["tasks"] == [task.name for task in problem.tasks]
    assert set(told["labels"]) == {t.name for t in problem.tasks if t.is_classification}
    ids = {"row_id": np.arange(5), "labels": batch.labels.numpy()}
    own = {**with_pixels_summed(rows), **arrays, **ids, "class_label": np.full(5, -1)}
    metrics = arm_figures(Evaluated({"arm": own}, problem.tasks, False, (32, 32)), "arm")["metrics"]
    for k, task in enumerate(problem.tasks):
        active = arrays["task_mask"][:, k]
        expected = rows["request_session_bytes"][active, k].mean()
        assert metrics[f"val/task/{task.name}/session_bytes"] == pytest.approx(expected)
    together = rows_of(codec, batch.image, arrays, problem, "oracle")
    assert (together["request_wire_bytes"] == -1).all()
    np.testing.assert_array_equal(together["decoded"], arrays["task_mask"])


def test_every_arm_but_the_teacher_itself_is_compared_with_the_teacher() -> None:
    problem, batch = make_problem(), make_batch(make_problem(), 5)
    arrays = {"task_mask": batch.task_mask.numpy(), "row_id": np.arange(5)}
    truth = {"class_label": np.full(5, -1), "labels": batch.labels.numpy()}
    teacher, codec = make_teacher(problem), make_codec(problem)
    with torch.no_grad():
        plain = run_teacher(teacher, batch.image, arrays, problem)
    answers = {"teacher": plain, "mantis": rows_of(codec, batch.image, arrays, problem)}
    done = Evaluated(
        {k: {**with_pixels_summed(v), **arrays, **truth} for k, v in answers.items()},
        problem.tasks,
        True,
        (32, 32),
    )
    found = arm_figures(done, "mantis")["metrics"]
    same = answers["mantis"]["class_index"] == plain["class_index"]
    assert found["val/agreement"] == same.mean()
    assert "val/top1" not in found  # no image has a known class
    names = {n for n in found if n.endswith("/agreement")} - {"val/agreement"}
    carried = arrays["task_mask"].any(axis=0)
    assert names == {
        f"val/task/{task.name}/agreement"
        for task, any_image in zip(problem.tasks, carried, strict=True)
        if task.is_classification and any_image
    }
    assert not [n for n in arm_figures(done, "teacher")["metrics"] if "agreement" in n]
    alone = Evaluated({"mantis": done.answers["mantis"]}, problem.tasks, True, (32, 32))
    assert not [n for n in arm_figures(alone, "mantis")["metrics"] if "agreement" in n]
