"""Planning: which stages a config has, and which keys each field of the config changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.tasks import resolve_tasks
from mantis_core.baselines.image_codecs import CodecError
from pipelines.chain import plan
from pipelines.chain.keys import config_slice, plan_key
from pipelines.chain.plan import plan_stages
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings
from pipelines.stages.order import STAGES
from pipelines.stages.spec import READER, StageSpec, with_upstream

CONFIG = """
seed: 0
storage: {root: /somewhere}
data: {sources: [{kind: shapes}]}
tasks:
  - {name: outline, classes_from: shapes}
  - {name: texture, classes_from: shapes}
teacher: {weights: train}
evaluate: {baselines: [none, oracle, individual, teacher]}
"""
TUNED = "codec_teacher/webp"
CHAIN = ("prepare", "teacher", "stage1", "stage2", "individual", TUNED, "evaluate", "register")


@pytest.fixture(autouse=True)
def _same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "source_hash", lambda *entries: "code of " + " ".join(entries))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def planned(settings: Settings, fingerprint: str = "f") -> dict[str, StageSpec]:
    table = resolve_tasks(settings.tasks, settings.data)
    return {spec.name: spec for spec in plan_stages(settings, table, fingerprint)}


def test_stages_stand_after_those_they_build_on(config: Path) -> None:
    stages = planned(load_settings(config, ["evaluate.rate_weights=[0.1]", "evaluate.seeds=[1]"]))
    seen: set[str] = set()
    for name, spec in stages.items():
        assert set(spec.upstream) <= seen
        seen.add(name)
    assert [n for n in stages if "/" not in n] == [n for n in CHAIN if n != TUNED]


def test_every_rate_seed_and_baseline_is_an_arm_over_one_stage1(config: Path) -> None:
    overrides = ["evaluate.rate_weights=[0.1, 1e-05]", "evaluate.seeds=[7]"]
    stages = planned(load_settings(config, overrides))
    arms = [spec for spec in stages.values() if spec.kind == "stage2"]
    assert [spec.arm for spec in arms] == [
        "",
        "rate-0.1",
        "rate-1e-05",
        "seed-7",
        "rate-0.1-seed-7",
        "rate-1e-05-seed-7",
        "none",
        "none-seed-7",
    ]
    assert len({spec.key for spec in arms}) == len(arms)
    assert all(spec.upstream == ("prepare", "teacher", "stage1") for spec in arms)
    assert sum(spec.kind == "stage1" for spec in stages.values()) == 1
    assert "individual/seed-7" in stages
    assert set(stages["evaluate"].upstream) >= {spec.name for spec in arms}


def test_an_arm_carries_the_settings_its_runner_reads(config: Path) -> None:
    stages = planned(load_settings(config, ["evaluate.rate_weights=[0.1]"]))
    none, faint = stages["stage2/none"], stages["stage2/rate-0.1"]
    assert none.settings.model.conditioning.kind == "none"
    assert none.settings.model.prior == "shared"
    assert faint.settings.stage2.rate_weight == 0.1
    assert faint.config == config_slice(faint.settings, STAGES["stage2"])
    assert stages["stage2"].settings.stage2.rate_weight != 0.1


def test_the_evaluation_is_told_each_arm_and_the_stage_it_measures(config: Path) -> None:
    stages = planned(
        load_settings(
            config, ["evaluate.rate_weights=[0.1]", "evaluate.baseline_rate_weights=[0.1]"]
        )
    )
    arms = {arm["name"]: arm for arm in stages["evaluate"].config["arms"]}
    assert list(arms) == [
        "stage2",
        "stage2/rate-0.1",
        "stage2/none-rate-0.1",
        "oracle/rate-0.1",
        "individual",
        "teacher",
    ]
    assert arms["oracle/rate-0.1"]["stage"] == "stage2/rate-0.1"
    assert arms["teacher"] == {
        "name": "teacher",
        "kind": "teacher",
        "rate_weight": None,
        "seed": 0,
        "stage": "teacher",
        "quality": None,
        "exit_confidence": None,
    }
    assert all(arm["stage"] in stages for arm in arms.values())


def test_arms_with_early_exit_measure_the_stages_that_are_there(config: Path) -> None:
    classes = "model.detector.classes=true"
    plain = planned(load_settings(config, [classes]))
    rate = plain["stage2"].settings.stage2.rate_weight
    stages = planned(load_settings(config, [classes, f"evaluate.early_exit={{{rate}: 0.5}}"]))
    assert {n: s.key for n, s in stages.items() if s.kind == "stage2"} == {
        n: s.key for n, s in plain.items() if s.kind == "stage2"
    }
    arms = {arm["kind"]: arm for arm in stages["evaluate"].config["arms"]}
    assert arms["early_exit"]["stage"] == arms["mantis"]["stage"]
    assert arms["none_exit"]["stage"] == arms["none"]["stage"]
    assert arms["none_exit"]["exit_confidence"] == 0.5
    assert arms["mantis"]["exit_confidence"] is None


def test_a_recipe_says_what_is_made_and_a_key_by_what(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = planned(load_settings(config))
    monkeypatch.setattr("pipelines.chain.plan.source_hash", lambda *entries: "other code")
    after = planned(load_settings(config))
    changed = planned(load_settings(config, ["stage1.epochs=7"]))
    for name in ("stage1", "stage2"):
        assert after[name].key != before[name].key
        assert after[name].recipe == before[name].recipe != changed[name].recipe


def test_image_codecs_are_measured_in_front_of_the_teacher_and_train_nothing(config: Path) -> None:
    override = "evaluate.codecs={webp: [0, 75], jpeg: [20]}"
    plain, stages = planned(load_settings(config)), planned(load_settings(config, [override]))
    assert stages.keys() == plain.keys()
    arms = {arm["name"]: arm for arm in stages["evaluate"].config["arms"]}
    shown = [(a["kind"], a["quality"], a["stage"]) for n, a in arms.items() if "/quality" in n]
    assert shown == [("webp", 0, "teacher"), ("webp", 75, "teacher"), ("jpeg", 20, "teacher")]
    assert stages["evaluate"].key != plain["evaluate"].key
    assert stages["stage2"].key == plain["stage2"].key


def test_a_tuned_teacher_is_trained_once_a_codec_on_all_its_qualities(config: Path) -> None:
    overrides = ["evaluate.codecs={webp: [0, 75], jpeg: [20]}", "evaluate.codec_teachers=true"]
    stages = planned(load_settings(config, overrides))
    tuned = {name: spec for name, spec in stages.items() if spec.kind == "codec_teacher"}
    assert tuned.keys() == {"codec_teacher/webp", "codec_teacher/jpeg"}
    section = tuned["codec_teacher/webp"].settings.codec_teacher
    assert (section.codec, section.qualities) == ("webp", (0, 75))
    arms = [(a["kind"], a["quality"], a["stage"]) for a in stages["evaluate"].config["arms"]]
    assert ("webp_tuned", 75, "codec_teacher/webp") in arms
    assert ("jpeg_tuned", 20, "codec_teacher/jpeg") in arms
    assert set(tuned) <= set(stages["evaluate"].upstream)


def test_baselines_without_conditioning_differ_by_prior_and_tasks(config: Path) -> None:
    names = ("none", "none_prior", "student", "per_task")
    stages = planned(load_settings(config, [f"evaluate.baselines=[{', '.join(names)}]"]))
    models = {name: stages[f"stage2/{name}"].settings.model for name in names}
    assert {model.conditioning.kind for model in models.values()} == {"none"}
    assert [model.prior for model in models.values()] == ["shared", "primary", "shared", "shared"]
    assert [model.single_task for model in models.values()] == [False, False, True, False]
    assert [model.per_task for model in models.values()] == [False, False, False, True]
    assert len({stages[f"stage2/{name}"].key for name in models}) == 4
    assert sum(spec.kind == "stage1" for spec in stages.values()) == 1


def test_a_finished_teacher_has_no_stage_but_enters_the_keys(config: Path, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"one")
    settings = load_settings(config, [f"teacher.weights={weights}"])
    before = planned(settings)
    weights.write_bytes(b"two")
    after = planned(settings)
    assert "teacher" not in before
    assert before["prepare"].key == after["prepare"].key
    for name in ("stage1", "stage2", "individual", "evaluate"):
        assert before[name].key != after[name].key
    arms = {arm["name"]: arm for arm in before["evaluate"].config["arms"]}
    assert arms["teacher"]["stage"] == ""


def test_where_the_teacher_file_lies_enters_no_key(config: Path, tmp_path: Path) -> None:
    keys = []
    for name in ("here.pth", "there.pth"):
        (tmp_path / name).write_bytes(b"same")
        stages = planned(load_settings(config, [f"teacher.weights={tmp_path / name}"]))
        keys.append({name: spec.key for name, spec in stages.items()})
    assert keys[0] == keys[1]


def test_a_missing_teacher_file_is_refused_with_the_choices(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"teacher\.weights: there is no file .*`train`"):
        planned(load_settings(config, ["teacher.weights=nowhere.pth"]))


SECTIONS = ("teacher.training", "stage1", "stage2", "individual", "codec_teacher")
OF_STAGE2 = "conditioning prior send_probabilities send_answer coverage max_active_tasks exit_heads"
# What a changed field reruns, by longest prefix. Everything downstream follows.
FIRST_CHANGED: dict[str, tuple[str, ...]] = {
    "seed": CHAIN,
    "storage": (),
    "tracking": (),
    "cluster": (),
    "tune": (),
    "data": CHAIN,
    "data.root": (),
    "data.cache": (),
    "data.cache_gib": (),
    **dict.fromkeys(READER, CHAIN[1:]),
    **{f"{section}.compile": () for section in SECTIONS},
    "tasks": CHAIN,
    "teacher": CHAIN[1:],
    "teacher.weights": CHAIN[1:],
    "model": ("stage1", "stage2", "evaluate", "register"),
    **{f"model.{name}": ("stage2", "evaluate", "register") for name in OF_STAGE2.split()},
    "model.decoder.task_channels": ("stage2", "evaluate", "register"),
    "model.single_task": ("stage2", "evaluate", "register"),
    "model.per_task": ("stage2", "evaluate", "register"),
    "stage1": ("stage1", "stage2", "evaluate", "register"),
    "stage2": ("stage2", "evaluate", "register"),
    "individual": ("individual", "evaluate", "register"),
    "extend": (),
    "codec_teacher": (TUNED, "evaluate", "register"),
    "evaluate": ("evaluate", "register"),
}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from leaves(child, (*path, name))
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from leaves(child, (*path, str(index)))
    else:
        yield path, value


def mutated(model: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy with one field replaced, unchecked: only keys are looked at."""
    if not path:
        return value
    name, *rest = path
    if isinstance(model, tuple):
        index = int(name)
        return (*model[:index], mutated(model[index], tuple(rest), value), *model[index + 1 :])
    if isinstance(model, dict):
        return {**model, name: mutated(model[name], tuple(rest), value)}
    return model.model_copy(update={name: mutated(getattr(model, name), tuple(rest), value)})


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}-changed" if isinstance(value, str) else "changed"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_each_field_changes_the_keys_it_should_and_no_others(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["evaluate.baselines=[individual, teacher]", "evaluate.codecs={webp: [50]}"]
    settings = load_settings(config, [*overrides, "evaluate.codec_teachers=true"])
    table = resolve_tasks(settings.tasks, settings.data)
    for module in ("stage2", "baselines"):
        place = f"pipelines.stages.{module}.arm_settings"
        monkeypatch.setattr(place, lambda settings, arm: settings)
    before = {spec.name: spec.key for spec in plan_stages(settings, table, "f")}
    seen = 0
    for path, value in leaves(settings.model_dump(mode="json")):
        if path[0] == "evaluate" and path[1] != "batch_size":
            continue  # these add arms; their own tests stand above
        if path in (("teacher", "weights"), ("teacher", "start"), ("tracking", "enabled")):
            continue  # these add or drop a stage
        changed = mutated(settings, path, another(value))
        after = {spec.name: spec.key for spec in plan_stages(changed, table, "f")}
        dotted = ".".join(path)
        prefixes = [p for p in FIRST_CHANGED if dotted == p or dotted.startswith(f"{p}.")]
        expected = FIRST_CHANGED[max(prefixes, key=len)]
        assert tuple(name for name in before if before[name] != after[name]) == expected, dotted
        seen += 1
    assert seen > 100


def test_adding_an_arm_leaves_the_others_alone(config: Path) -> None:
    before = planned(load_settings(config))
    after = planned(load_settings(config, ["evaluate.rate_weights=[0.3]"]))
    assert {name for name in before if before[name].key != after[name].key} == {
        "evaluate",
        "register",
    }
    assert set(after) - set(before) == {"stage2/rate-0.3"}


@pytest.mark.parametrize("changed", ["data", "packages", "code", "labels"])
def test_what_is_not_in_the_config_enters_the_keys_too(
    config: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    settings = load_settings(config)
    before = planned(settings)
    if changed == "packages":
        monkeypatch.setattr("pipelines.chain.plan.deciding", lambda: {"torch": "other"})
    if changed == "code":
        monkeypatch.setattr(plan, "source_hash", lambda *entries: "other code")
    if changed == "labels":
        settings = load_settings(config, ["tasks.0.exclude=[outline/star]"])
    after = planned(settings, "other" if changed == "data" else "f")
    assert all(before[name].key != after[name].key for name in before)


def test_the_plan_is_the_same_in_another_folder(config: Path) -> None:
    one = planned(load_settings(config, ["storage.root=/one"]))
    two = planned(load_settings(config, ["storage.root=s3://two/x", "cluster.workers=4"]))
    assert plan_key(tuple(one.values())) == plan_key(tuple(two.values()))
    assert one["stage2/none"].folder == f"/one/stages/stage2/none-{one['stage2/none'].key[:12]}"
    assert two["prepare"].folder.startswith("s3://two/x/stages/prepare-")


def test_without_tracking_nothing_is_registered(config: Path) -> None:
    stages = planned(load_settings(config, ["tracking.enabled=false"]))
    assert "register" not in stages
    assert stages["stage2"].key == planned(load_settings(config))["stage2"].key


def test_a_stage_alone_takes_only_its_ancestors(config: Path) -> None:
    stages = tuple(planned(load_settings(config, ["evaluate.rate_weights=[0.1]"])).values())
    alone = [spec.name for spec in with_upstream(stages, "stage2")]
    assert alone == ["prepare", "teacher", "stage1", "stage2"]


def test_the_file_a_teacher_begins_with_counts_by_its_content(config: Path, tmp_path: Path) -> None:
    keys = []
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("b.pth", b"two")):
        (tmp_path / name).write_bytes(content)
        stages = planned(load_settings(config, [f"teacher.start={tmp_path / name}"]))
        keys.append(stages["teacher"].key)
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] != planned(load_settings(config))["teacher"].key
    with pytest.raises(SettingsError, match=r"teacher\.start: there is no file .*`pretrained` to"):
        planned(load_settings(config, ["teacher.start=nowhere.pth"]))


def test_a_teacher_may_begin_with_torchvisions_weights(config: Path) -> None:
    keys = {
        planned(load_settings(config, ["teacher.start=pretrained", *more]))["teacher"].key
        for more in ([], ["teacher.name=resnet34"])
    }
    keys.add(planned(load_settings(config))["teacher"].key)
    assert len(keys) == 3


def test_the_order_of_a_teachers_logits_counts_by_its_content(config: Path, tmp_path: Path) -> None:
    (tmp_path / "t.pth").write_bytes(b"weights")
    given = [f"teacher.weights={tmp_path / 't.pth'}"]
    keys = [planned(load_settings(config, given))["stage1"].key]
    for name, content in (("a.txt", "one"), ("b.txt", "one"), ("b.txt", "two")):
        (tmp_path / name).write_text(content)
        order = f"teacher.classes={tmp_path / name}"
        keys.append(planned(load_settings(config, [*given, order]))["stage1"].key)
    keys.append(planned(load_settings(config, [*given, "teacher.classes=sorted"]))["stage1"].key)
    assert keys[1] == keys[2]
    assert len(set(keys)) == 4
    with pytest.raises(SettingsError, match=r"teacher\.classes: there is no file .* or `sorted`"):
        planned(load_settings(config, [*given, "teacher.classes=nowhere.txt"]))


def test_an_arm_that_cannot_be_measured_is_refused_before_anything_is_trained(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmented = load_settings(
        config,
        [
            "evaluate.baselines=[student]",
            "tasks.0={name: regions, kind: segmentation, labels: [a, b]}",
        ],
    )
    with pytest.raises(SettingsError, match=r"'regions' is a segmentation\. Leave `student` out"):
        planned(segmented)
    monkeypatch.setattr("PIL.features.check", lambda _: False)
    with pytest.raises(CodecError, match="built without AVIF"):
        planned(load_settings(config, ["evaluate.codecs={avif: [30]}"]))
