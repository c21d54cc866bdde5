"""What holds for every stage and every kind of arm: a new one is tested before it has a test.

Two toys show that adding one touches one file: a record in STAGES, a record in ARM_KINDS.
"""

from __future__ import annotations

import importlib
import io
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from mantis_core.baselines.image_codecs import IMAGE_CODECS
from mantis_core.config import TrainingConfig
from pipelines.chain.keys import config_slice
from pipelines.chain.plan import make_plan
from pipelines.chain.run import run_chain
from pipelines.evaluation.answers import ANSWERS
from pipelines.evaluation.coded import CODED
from pipelines.settings.arms import ARM_KINDS, TUNED, ArmKind, Look, baselines, image_codecs
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings
from pipelines.stages.order import STAGES
from pipelines.stages.spec import Stage, StageContext, StageSpec
from pipelines.terminal.console import Console
from tests.pipelines.fakes import fake_stages

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 20, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train}
evaluate:
  baselines: [none, oracle, individual, teacher]
  codecs: {webp: [50]}
  codec_teachers: true
tracking: {enabled: false}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
class TestEveryStage:
    def test_stands_under_its_own_name(self, stage: Stage) -> None:
        assert STAGES[stage.name] is stage

    def test_builds_on_stages_that_stand_before_it(self, stage: Stage) -> None:
        order = list(STAGES)
        for name in stage.after:
            kind, _, every = name.partition("/")
            assert order.index(kind) < order.index(stage.name)
            assert every in ("", "*")

    def test_reads_fields_that_the_config_has(self, stage: Stage, config: Path) -> None:
        settings = load_settings(config)
        found = config_slice(settings, stage)
        for path in set(stage.reads) - set(stage.leaves_out):
            node: Any = found
            for name in path.split("."):
                assert name in node, path
                node = node[name]

    def test_a_training_has_its_section_and_its_recipe(self, stage: Stage, config: Path) -> None:
        assert (stage.section == "") == (stage.recipe is None) == (not stage.trains)
        if stage.section:
            section = attrgetter(stage.section)(load_settings(config))
            assert isinstance(section, TrainingConfig)

    def test_reaches_workers_by_name(self, stage: Stage) -> None:
        for function in (stage.run, stage.recipe):
            if function is not None:
                module = importlib.import_module(function.__module__)
                assert getattr(module, function.__qualname__) is function

    def test_a_command_says_what_it_does(self, stage: Stage) -> None:
        assert stage.help == "" or (stage.help[0].isupper() and stage.help.endswith("."))


@pytest.mark.parametrize("kind", ARM_KINDS.values(), ids=ARM_KINDS)
class TestEveryKindOfArm:
    def test_stands_under_its_own_name(self, kind: ArmKind) -> None:
        assert ARM_KINDS[kind.name] is kind

    def test_is_answered_by_a_function(self, kind: ArmKind) -> None:
        assert (kind.answers in ANSWERS) is not (kind.answers in CODED)

    def test_overrides_fields_that_the_config_has(self, kind: ArmKind, config: Path) -> None:
        if kind.overrides:
            assert kind.measures == "own"
            load_settings(config, ["model.detector.classes=true", *kind.overrides])

    def test_has_a_label_and_a_look_of_its_own(self, kind: ArmKind) -> None:
        others = [other for other in ARM_KINDS.values() if other is not kind]
        assert kind.label not in {other.label for other in others}
        assert kind.look not in [other.look for other in others]


def test_the_functions_that_answer_are_all_used() -> None:
    assert {kind.answers for kind in ARM_KINDS.values()} == {*ANSWERS, *CODED}


def test_the_kinds_of_image_codecs_are_those_there_are() -> None:
    assert set(image_codecs()) == set(IMAGE_CODECS)
    assert {f"{name}{TUNED}" for name in IMAGE_CODECS} <= ARM_KINDS.keys()


def test_a_name_that_is_no_baseline_is_refused_with_those_there_are(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"baselines.*'orakel'.*'oracle'.*allowed are answer,"):
        load_settings(config, ["evaluate.baselines=[orakel]"])
    with pytest.raises(SettingsError, match=r"got 'webq'.*allowed are jpeg, webp, avif"):
        load_settings(config, ["evaluate.codecs={webq: [5]}"])
    assert "mantis" not in baselines()


def test_a_toy_arm_is_one_record(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ArmKind(
        "toy",
        "MANTiS with one prior",
        Look("#123456", "#abcdef", "o"),
        measures="own",
        overrides=("model.prior=shared",),
    )
    monkeypatch.setitem(ARM_KINDS, "toy", toy)
    monkeypatch.setattr("pipelines.chain.plan.source_hash", lambda *code: "code")
    plan = make_plan(load_settings(config, ["evaluate.baselines=[toy]"]))
    arm = next(arm for arm in plan.arms if arm.kind == "toy")
    assert arm.stage == "stage2/toy"
    assert plan.by_name["stage2/toy"].settings.model.prior == "shared"
    assert "stage2/toy" in plan.by_name["evaluate"].upstream


def test_a_toy_stage_is_one_record(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(spec: StageSpec, context: StageContext) -> dict[str, Any]:
        ran.append(spec.name)
        return {"metrics": {}}

    toy = Stage(
        name="toy",
        help="Count the shards.",
        after=("prepare", "stage2"),
        reads=("evaluate.batch_size",),
        code=("pipelines.stages.prepare",),
        run=note,
    )
    fake_stages(monkeypatch, note)
    monkeypatch.setitem(STAGES, "toy", toy)
    plan = make_plan(load_settings(config))
    assert plan.by_name["toy"].upstream == ("prepare", "stage2")
    run_chain(plan, console=Console(io.StringIO()), config_name="tiny", until="toy")
    assert ran == ["prepare", "teacher", "stage1", "stage2", "toy"]
    other = make_plan(load_settings(config, ["evaluate.batch_size=7"]))
    assert other.by_name["toy"].key != plan.by_name["toy"].key
    assert other.by_name["stage2"].key == plan.by_name["stage2"].key
