"""The arms of an honest comparison: the stages that train for them, and what they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.tasks import resolve_tasks
from pipelines.chain.plan import plan_stages
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings
from pipelines.stages.spec import StageSpec

CONFIG = """
data: {sources: [{kind: shapes}]}
tasks:
  - {name: outline, classes_from: shapes}
  - {name: texture, classes_from: shapes}
teacher: {weights: train}
model: {detector: {classes: true}}
evaluate: {baselines: []}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def planned(config: Path, overrides: Sequence[str]) -> dict[str, StageSpec]:
    settings = load_settings(config, overrides)
    table = resolve_tasks(settings.tasks, settings.data)
    return {spec.name: spec for spec in plan_stages(settings, table, "f")}


def test_a_student_with_another_client_starts_from_a_stage_1_of_its_own(config: Path) -> None:
    rates = ["evaluate.rate_weights=[0.1]", "evaluate.baseline_rate_weights=[0.1, 1e-3]"]
    stages = planned(config, ["evaluate.baselines=[student, student_wide]", *rates])
    own = stages["stage1/student_wide"]
    assert own.settings.model.wide_encoder
    assert not stages["stage1"].settings.model.wide_encoder
    assert own.key != stages["stage1"].key
    assert own.settings.stage1 == stages["stage1"].settings.stage1
    wide = [spec for name, spec in stages.items() if name.startswith("stage2/student_wide")]
    assert len(wide) == 2
    assert all("stage1/student_wide" in spec.upstream for spec in wide)
    others = [s for s in stages.values() if s.kind == "stage2" and s not in wide]
    assert all("stage1" in spec.upstream for spec in others)
    assert not any("stage1/student_wide" in spec.upstream for spec in others)
    without = planned(config, ["evaluate.baselines=[student]", *rates])
    assert "stage1/student_wide" not in without
    assert without["stage2/student"].key == stages["stage2/student"].key


def test_a_local_classifier_is_trained_for_the_epochs_of_both_stages(config: Path) -> None:
    epochs = ["stage1.epochs=5", "stage2.epochs=3", "evaluate.seeds=[4]"]
    stages = planned(config, ["evaluate.baselines=[local]", *epochs])
    assert stages["local"].training.epochs == 8
    assert stages["local/seed-4"].settings.seed == 4
    assert stages["stage1"].training.epochs == 5
    arms = {arm.name: arm for arm in stages["evaluate"].arms if arm.kind == "local"}
    assert {name: arm.stage for name, arm in arms.items()} == {
        "local": "local",
        "local/seed-4": "local/seed-4",
    }
    assert {"local", "local/seed-4"} <= set(stages["evaluate"].upstream)
    rarer = planned(config, ["evaluate.baselines=[local]", *epochs, "stage2.rate_weight=0.1"])
    assert rarer["local"].key == stages["local"].key


def test_every_kind_with_early_exit_comes_with_its_codec(config: Path) -> None:
    rate = "evaluate.early_exit={0.001: 0.5}"
    both = planned(config, [rate, "evaluate.baselines=[none, student]"])["evaluate"].arms
    exits = {arm.kind: arm.stage for arm in both if arm.exit_confidence is not None}
    assert exits == {
        "early_exit": "stage2",
        "none_exit": "stage2/none",
        "student_exit": "stage2/student",
    }
    alone = planned(config, [rate, "evaluate.baselines=[student]"])["evaluate"].arms
    assert "none_exit" not in {arm.kind for arm in alone}


def test_an_arm_of_another_arms_codec_needs_that_arm(config: Path) -> None:
    arms = planned(config, ["evaluate.baselines=[none, none_told]"])["evaluate"].arms
    assert next(arm for arm in arms if arm.kind == "none_told").stage == "stage2/none"
    with pytest.raises(SettingsError, match="`none_told` measures the codec of `none`"):
        planned(config, ["evaluate.baselines=[none_told]"])


@pytest.mark.parametrize("kind", ["answer", "none_answer"])
def test_an_answer_is_sent_by_a_detector_that_names_classes(config: Path, kind: str) -> None:
    asked = [f"evaluate.baselines=[{kind}]", "model.detector.classes=true"]
    stages = planned(config, asked)
    assert stages[f"stage2/{kind}"].settings.model.send_answer
    assert not stages["stage2"].settings.model.send_answer
    assert [name for name in stages if name.startswith("stage1")] == ["stage1"]
    with pytest.raises(SettingsError, match=f"`{kind}` sends the class .* this one names tasks"):
        planned(config, [asked[0], "model.detector.classes=false"])
    with pytest.raises(SettingsError, match=f"`{kind}` is an arm .* those of all arms do"):
        planned(config, [*asked, "model.send_answer=true"])


@pytest.mark.parametrize("kind", ["student", "student_wide", "local"])
def test_a_single_answer_needs_images_of_one_class(config: Path, kind: str) -> None:
    mask = "tasks.0={name: regions, kind: segmentation, labels: [a, b]}"
    with pytest.raises(SettingsError, match=f"`{kind}` needs images of one class each"):
        planned(config, [mask, f"evaluate.baselines=[{kind}]"])


def test_image_codecs_are_measured_at_every_scale_and_tuned_on_all_of_them(config: Path) -> None:
    codecs = ["evaluate.codecs={webp: [5, 50]}", "evaluate.codec_scales=[1, 0.5]"]
    stages = planned(config, [*codecs, "evaluate.codec_teachers=true"])
    found = {arm.name: (arm.quality, arm.scale) for arm in stages["evaluate"].arms[1:]}
    assert found == {
        f"{kind}/quality-{quality}{end}": (quality, scale)
        for kind in ("webp", "webp_tuned")
        for quality in (5, 50)
        for end, scale in (("", None), ("-scale-0.5", 0.5))
    }
    tuned = stages["codec_teacher/webp"].settings.codec_teacher
    assert (tuned.qualities, tuned.scales) == ((5, 50), (1.0, 0.5))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("codecs={webp: [5, 5]}", r"codecs\.webp \[5, 5\]"),
        ("codec_scales=[1, 1.0]", "codec_scales"),
    ],
)
def test_a_quality_or_a_scale_is_measured_once(config: Path, override: str, named: str) -> None:
    with pytest.raises(SettingsError, match=rf"evaluate\.{named}.* must differ"):
        planned(config, [f"evaluate.{override}"])


def test_an_encoder_takes_the_place_of_no_detector_that_is_needed(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"model\.wide_encoder leaves nothing that detects"):
        planned(config, ["model.wide_encoder=true"])


def test_one_training_serves_all_levels_of_an_arm(config: Path) -> None:
    asked = ["stage2.rate_weights=[1e-3, 1e-2, 1e-1]", "evaluate.baselines=[none, oracle]"]
    stages = planned(config, [*asked, "evaluate.early_exit={1.e-2: 0.4}", "evaluate.seeds=[7]"])
    assert [name for name in stages if name.startswith("stage2")] == [
        "stage2",
        "stage2/seed-7",
        "stage2/none",
        "stage2/none-seed-7",
    ]
    assert stages["stage2/none"].settings.stage2.rate_weights == (1e-3, 1e-2, 1e-1)
    arms = stages["evaluate"].arms
    assert arms[0].name == "stage2"
    found = {arm.name: (arm.stage, arm.level, arm.rate_weight, arm.kind) for arm in arms}
    assert len(found) == len(arms)
    assert found["stage2"] == ("stage2", 0, 1e-3, "mantis")
    assert found["mantis/level-4"] == ("stage2", 4, 1e-2, "mantis")
    assert found["none/level-8-seed-7"] == ("stage2/none-seed-7", 8, 1e-1, "none")
    assert found["early_exit/level-4"] == ("stage2", 4, 1e-2, "early_exit")
    assert found["oracle/level-8"] == ("stage2", 8, 1e-1, "oracle")
    exits = [arm for arm in arms if arm.kind == "early_exit"]
    assert [arm.exit_confidence for arm in exits] == [0.4, 0.4]


def test_rates_of_one_model_and_of_several_exclude_each_other(config: Path) -> None:
    levels = "stage2.rate_weights=[1e-3, 1e-2]"
    for other in (
        "rate_weights=[1e-3]",
        "baseline_rate_weights=[1e-3]",
        "baseline_rate_weights=[]",
    ):
        with pytest.raises(SettingsError, match=r"set\s+evaluate\.rate_weights to \[\]"):
            planned(config, [levels, f"evaluate.{other}"])
    with pytest.raises(SettingsError, match=r"use members of stage2\.rate_weights"):
        planned(config, [levels, "evaluate.early_exit={5.e-3: 0.4}"])


def test_one_rate_decides_nothing_beside_several(config: Path) -> None:
    levels = ["stage2.rate_weights=[1e-3, 1e-2]", "evaluate.baselines=[none]"]
    one, other = (
        planned(config, [*levels, f"stage2.rate_weight={rate}"]) for rate in ("1e-3", "0.5")
    )
    assert {name: spec.key for name, spec in one.items()} == {
        name: spec.key for name, spec in other.items()
    }
