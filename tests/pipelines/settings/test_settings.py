"""Settings: what a config may say, how overrides apply, what a mistake is answered with."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings, to_yaml, with_overrides
from pipelines.settings.sections import Settings

BASE = """
data: {sources: [{kind: shapes}]}
tasks:
  - {name: outline, classes_from: shapes}
  - {name: texture, classes_from: shapes}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(BASE)
    return path


def test_a_minimal_config_gets_every_default(config: Path) -> None:
    settings = load_settings(config)
    assert settings.seed == 0
    assert settings.evaluate.baselines == ("none", "oracle", "teacher")
    assert settings.cluster.workers == 1
    assert settings.cluster.min_workers == settings.cluster.max_workers == 1
    assert [task.name for task in settings.tasks] == ["outline", "texture"]


def test_the_resolved_yaml_gives_equal_settings(config: Path, tmp_path: Path) -> None:
    settings = load_settings(config, ["stage2.rate_weight=1e-3", "evaluate.rate_weights=[0.1]"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(settings))
    assert load_settings(again) == settings


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("stage2.rate_weight=1e-3", lambda s: s.stage2.rate_weight == 0.001),
        ("stage2.epochs=7", lambda s: s.stage2.epochs == 7),
        ("tasks.1.name=stripes", lambda s: s.tasks[1].name == "stripes"),
        ("evaluate.seeds=[1, 2]", lambda s: s.evaluate.seeds == (1, 2)),
        ("cluster.threads_per_worker=null", lambda s: s.cluster.threads_per_worker is None),
        ("stage2.teacher_forcing.0=0.25", lambda s: s.stage2.teacher_forcing == (0.25, 0.0)),
        ("stage2.losses.tasks.weight=2", lambda s: s.stage2.losses["tasks"].weight == 2.0),
        ("model.encoder={channels: 8}", lambda s: s.model.encoder.channels == 8),
        ("tracking.experiment=yes", lambda s: s.tracking.experiment == "yes"),
        ("data.image_size=[64, 48]", lambda s: s.data.image_size == (64, 48)),
        ("stage2.rate_weight=1", lambda s: s.stage2.rate_weight == 1.0),
    ],
)
def test_overrides_reach_any_depth(config: Path, override: str, read: object) -> None:
    assert read(load_settings(config, [override]))


def test_an_override_of_a_default_loss_keeps_its_neighbours(config: Path) -> None:
    before, after = load_settings(config), load_settings(config, ["stage2.losses.tasks.weight=2"])
    assert after.stage2.losses.keys() == before.stage2.losses.keys()
    assert after.stage2.losses["tasks"].criterion == before.stage2.losses["tasks"].criterion


def test_a_loss_term_set_to_null_is_left_out(config: Path) -> None:
    before, after = load_settings(config), load_settings(config, ["stage2.losses.tasks=null"])
    assert before.stage2.losses.keys() - after.stage2.losses.keys() == {"tasks"}
    assert load_settings(config, ["stage2.losses.tasks=null"]) == after


def test_overrides_may_supply_what_the_file_lacks(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("data: {sources: [{kind: shapes}]}")
    settings = load_settings(path, ["tasks=[{name: outline, classes_from: shapes}]"])
    assert settings.tasks[0].name == "outline"


def test_settings_take_overrides_later_too(config: Path) -> None:
    settings = load_settings(config)
    arm = with_overrides(settings, ["model.conditioning.kind=none", "seed=3"])
    assert (arm.model.conditioning.kind, arm.seed) == ("none", 3)
    assert settings.model.conditioning.kind == "film"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage2.rate_wieght=1", "stage2.rate_wieght: unknown key; did you mean 'rate_weight'?"),
        ("sead=1", "sead: unknown key; did you mean 'seed'?"),
        ("data.sources.0.colour=1", "data.sources.0.colour: unknown key"),
        ("tasks.0.clases=[a]", "tasks.0.clases: unknown key; did you mean 'classes'?"),
        ("stage2.losses.tasks.wait=1", "stage2.losses.tasks.wait: unknown key; did you mean 'we"),
        ("stage2.epochs=ten", "stage2.epochs: got 'ten'; input should be a valid integer"),
        ("stage2.epochs=true", "stage2.epochs: got True; input should be a valid integer"),
        ("stage2.epochs='3'", "stage2.epochs: got '3'; input should be a valid integer"),
        ("stage2.epochs=2.0", "stage2.epochs: got 2.0; input should be a valid integer"),
        ("stage2.epochs=0", "stage2.epochs: got 0; input should be greater than or equal to 1"),
        ("stage2.rate_weight='1'", "stage2.rate_weight: got '1'; input should be a valid number"),
        ("stage2.rate_weight=true", "stage2.rate_weight: got True; input should be a valid numb"),
        ("data.holdout_fraction=0", "data.holdout_fraction is 0; give more than 0 and less than 1"),
        ("data.holdout_fraction=1", "data.holdout_fraction is 1; give more than 0 and less than 1"),
        ("data.val_fraction=1", "data.val_fraction: got 1; input should be less than 1"),
        ("data.sources.0={kind: parquet, train: a, val: a}", "data.sources.0: train and val are"),
        (
            "tasks.0.classes=al",
            "^tasks.0.classes: got 'al'; give a list of class ids, `all` or `rest`$",
        ),
        ("data.flip=1", "data.flip: got 1; input should be true or false"),
        ("data.flip='true'", "data.flip: got 'true'; input should be true or false"),
        ("tasks.0.name=3", "tasks.0.name: got 3; input should be a valid string"),
        ("tasks.0.indices=true", "tasks.0.indices: got True; input should be a valid integer"),
        ("evaluate.seeds=['1']", "evaluate.seeds.0: got '1'; input should be a valid integer"),
        ("evaluate.early_exit={0.1: '1'}", "evaluate.early_exit.0.1: got '1'; input should be a v"),
        (
            "model.prior=primry",
            "model.prior: got 'primry'; .*did you mean 'primary'",
        ),
        ("data.sources.0.kind=shape", "data.sources.0"),
        ("evaluate.baselines=[nothing]", "evaluate.baselines.0: got 'nothing'"),
        ("tasks.5.name=x", "tasks.5 does not exist; the list has elements 0 to 1"),
        ("seed.x=1", "seed is 0 and has no keys"),
        ("stage2.epochs", "not of the form key=value"),
        ("seed=[", "not valid YAML"),
        ("evaluate.rate_weights=[0.5, 0.5]", "must differ from each other"),
        ("evaluate.baseline_rate_weights=[0.7]", r"\[0.7\], which no MANTiS arm has"),
        ("evaluate.seeds=[0]", "must differ from each other and from the main seed 0"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_remedy(
    config: Path, override: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(config, [override])


def test_more_tasks_than_a_stream_can_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    for count in (256, 300):
        tasks = ", ".join(f"{{name: t{k}, classes_from: shapes}}" for k in range(count))
        path.write_text(f"data: {{sources: [{{kind: shapes}}]}}\ntasks: [{tasks}]\n")
        if count == 256:
            assert len(load_settings(path).tasks) == 256
            continue
        with pytest.raises(
            SettingsError, match=r"^tasks: there are 300, and a stream can name 256"
        ):
            load_settings(path)


def test_the_order_of_logits_belongs_to_a_file_of_weights(config: Path) -> None:
    given = ["teacher.weights=t.pth", "teacher.classes=names.txt"]
    assert Path(str(load_settings(config, given).teacher.classes)).is_absolute()
    given = ["teacher.weights=t.pth", "teacher.classes=sorted"]
    assert load_settings(config, given).teacher.classes == "sorted"
    with pytest.raises(SettingsError, match=r"orders the logits of a file, and teacher.weights is"):
        load_settings(config, ["teacher.classes=sorted"])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 1")
    with pytest.raises(SettingsError, match=r"data: missing.*\n.*tasks: missing"):
        load_settings(path)


def test_a_list_with_a_wrong_item_is_not_called_too_short_as_well(config: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, ["data.sources.0.colour=1"])
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(SettingsError, match=r"data\.sources: got a list; .*at least 1"):
        load_settings(config, ["data.sources=[]"])


def test_every_mistake_of_a_file_is_told_at_once(config: Path) -> None:
    with pytest.raises(SettingsError, match="sead") as caught:
        load_settings(config, ["sead=1", "stage1.epochs=-1"])
    assert len(str(caught.value).splitlines()) == 2


def test_extends_merges_mappings_and_replaces_lists(config: Path) -> None:
    child = config.with_name("child.yaml")
    child.write_text(
        "extends: tiny.yaml\nstage2: {epochs: 9}\ntasks: [{name: outline, classes_from: shapes}]"
    )
    config.write_text(BASE + "stage2: {rate_weight: 0.5, epochs: 2}")
    settings = load_settings(child)
    assert (settings.stage2.epochs, settings.stage2.rate_weight) == (9, 0.5)
    assert len(settings.tasks) == 1


def test_extends_goes_one_level(config: Path) -> None:
    config.with_name("middle.yaml").write_text("extends: tiny.yaml")
    leaf = config.with_name("leaf.yaml")
    leaf.write_text("extends: middle.yaml")
    with pytest.raises(SettingsError, match="only one level is allowed"):
        load_settings(leaf)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "the key 'seed' occurs twice, again in line 2"),
        ("- a\n- b", "holds list, not a mapping"),
        ("a: [", "not valid YAML"),
        ("seed: !!python/object:os.system x", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: No such file"):
        load_settings("nowhere.yaml")


def test_scalars_are_read_as_yaml_1_2(config: Path) -> None:
    overrides = ["tasks.0.classes_from=null", "tasks.0.classes=[on, 12:30, 2020-01-01, n02085620]"]
    settings = load_settings(config, overrides)
    assert settings.tasks[0].classes == ("on", "12:30", "2020-01-01", "n02085620")


def test_relative_paths_resolve_against_the_current_folder(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    monkeypatch.chdir(start)
    settings = load_settings(config, ["storage.root=out", "teacher.weights=t.safetensors"])
    assert settings.storage.root == str(start / "out")
    assert settings.data.root == str(start)
    assert settings.teacher.weights == str(start / "t.safetensors")
    assert load_settings(config, ["storage.root=s3://b/r"]).storage.root == "s3://b/r"
    assert load_settings(config, ["teacher.weights=train"]).teacher.weights == "train"


def test_settings_cannot_be_changed_in_place(config: Path) -> None:
    settings = load_settings(config)
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 1  # type: ignore[misc]
    assert isinstance(settings, Settings)


def test_reading_a_config_imports_no_heavy_package(config: Path) -> None:
    code = (
        "import sys; from pipelines.settings.reading import load_settings\n"
        "load_settings(sys.argv[1])\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(config)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.requests=asked", "evaluate.baselines=[student]"], "`student` detects tasks"),
        (["model.requests=asked", "evaluate.baselines=[none, features]"], "`features` detects"),
        (["model.requests=detect"], "`oracle` is asked for tasks, and model.requests is detect"),
        (["model.requests=asked", "model.conditioning.kind=attention"], "kind needs it"),
    ],
)
def test_arms_that_do_not_fit_who_names_the_tasks_are_refused(
    config: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(config, overrides)
    fits = ["model.requests=asked", "evaluate.baselines=[none, none_prior, oracle, teacher]"]
    assert load_settings(config, fits).model.requests == "asked"
