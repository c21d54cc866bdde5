"""`mantis init`: the numbers it chooses, the config it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.chain.preflight import FEWEST_HELD_BACK, FEWEST_STEPS
from pipelines.settings.reading import load_settings
from pipelines.starting import machine as machine_module
from pipelines.starting import minutes as minutes_module
from pipelines.starting.document import document, minutes_text, scalar, task_name, tasks_of
from pipelines.starting.found import look
from pipelines.starting.minutes import Estimate, total_seconds
from pipelines.starting.numbers import Machine, Numbers, choose
from tests.pipelines.starting.photos import parquet, photos

LAPTOP, SERVER = Machine(2, 0, False), Machine(16, 1, True)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no GPU and no timing: this machine is a laptop of 50 images a second."""
    monkeypatch.setattr(machine_module, "is_reachable", lambda url: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(minutes_module, "seconds_an_image", lambda *_: 0.02)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def init(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


@pytest.mark.parametrize("images", [60, 100, 400, 3_000, 40_000, 600_000, 5_000_000])
@pytest.mark.parametrize("machine", [LAPTOP, SERVER], ids=["laptop", "gpu"])
@pytest.mark.parametrize("val", [0, 500])
def test_every_training_has_steps_enough_to_learn_from(
    images: int, machine: Machine, val: int
) -> None:
    numbers = choose(images, val, 300, 5, machine)
    assert min(numbers.steps) >= 3 * FEWEST_STEPS / 2
    assert numbers.batch_size <= numbers.train_rows
    assert max(numbers.steps) <= 250_000
    held = images - (0 if val else numbers.val_rows) - numbers.train_rows
    assert held >= min(FEWEST_HELD_BACK - 1, 0.1 * images)
    assert held <= 0.15 * images + 1


def test_the_image_size_fits_the_photos_and_the_machine() -> None:
    sides = (20, 32, 64, 100, 3000)
    sizes = [
        [choose(400, 0, side, 5, each).image_size for side in sides] for each in (LAPTOP, SERVER)
    ]
    assert sizes == [[32, 32, 64, 64, 64], [32, 32, 64, 96, 128]]


def test_the_config_loads_and_holds_what_was_found(tmp_path: Path) -> None:
    photos(tmp_path / "here/My Photos 2024", {"cat": 40, "dog": 40})
    done = init("My Photos 2024")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "  mantis run --config my.yaml"
    settings = load_settings("my.yaml")
    assert [(task.name, task.classes) for task in settings.tasks] == [
        ("my_photos_2024", ("cat", "dog"))
    ]
    assert settings.data.root == str(tmp_path / "here/My Photos 2024")
    assert settings.data.val_fraction == 0.2
    assert (settings.teacher.weights, settings.teacher.start) == ("train", None)
    assert settings.cluster.gpus_per_worker == 0
    assert {"oracle", "teacher"} <= set(settings.evaluate.baselines)
    numbers = choose(80, 0, 60, 2, LAPTOP)
    assert settings.stage1.epochs == numbers.stage1_epochs
    assert "timed on 2 CPU cores" in done.stdout or "CPU core" in done.stdout


def test_every_comment_fits_a_screen(tmp_path: Path) -> None:
    photos(tmp_path / "here/pets", {f"a rather long name of a class {n}": 2 for n in range(9)})
    init("pets")
    lines = Path("my.yaml").read_text().splitlines()
    assert max(len(line) for line in lines if line.startswith("#")) <= 100


def test_a_data_set_of_several_files_is_called_like_its_folder(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        path = tmp_path / f"here/Pets/data/{split}-00000-of-00001.parquet"
        parquet(path, {"label": ["cat", "dog"] * 20})
    assert init("Pets").exit_code == 0
    settings = load_settings("my.yaml")
    assert [task.name for task in settings.tasks] == ["pets"]
    assert settings.data.val_fraction is None


def test_an_existing_file_stays_without_force(tmp_path: Path) -> None:
    photos(tmp_path / "here/pets", {"cat": 4, "dog": 4})
    Path("my.yaml").write_text("mine")
    done = init("pets")
    assert (done.exit_code, Path("my.yaml").read_text()) == (2, "mine")
    assert "my.yaml exists: give another file with -o, or --force" in done.stderr
    assert init("pets", "-o", "other.yaml").exit_code == 0
    assert init("pets", "--force").exit_code == 0
    assert load_settings("my.yaml") == load_settings("other.yaml")


def test_json_says_the_same_and_nothing_else(tmp_path: Path) -> None:
    photos(tmp_path / "here/pets", {"cat": 40, "dog": 40})
    (line,) = init("pets", "--json").stdout.splitlines()
    said = json.loads(line)
    assert said["classes"] == {"cat": 40, "dog": 40}
    assert said["tasks"] == {"pets": ["cat", "dog"]}
    assert said["next"] == "mantis run --config my.yaml"
    assert said["minutes"] > 1


def test_a_mistake_ends_in_one_line(tmp_path: Path) -> None:
    done = init(photos(tmp_path / "flat", {".": 2}))
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert not Path("my.yaml").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["yes", "no"],
        ["1e3", "0x10", "017"],
        ["a, b", "c: d", "e # f"],
        ['say "hi"', "it's", "\\"],
        ["größe", "日本", "- x"],
        ["null", "true", "~", "{x}", "[y]"],
    ],
)
def test_every_name_of_a_class_survives_the_config(tmp_path: Path, names: list[str]) -> None:
    photos(tmp_path / "here/odd", dict.fromkeys(names, 2))
    assert init("odd").exit_code == 0
    (task,) = load_settings("my.yaml").tasks
    assert set(task.classes) == set(names)


def test_many_classes_are_not_written_one_by_one(tmp_path: Path) -> None:
    labels = [f"class {number % 150}" for number in range(300)]
    found = look([parquet(tmp_path / "many.parquet", {"label": labels})])
    text = document(found, choose(300, 0, 60, 150, LAPTOP), None, output=Path("a"), command="c")
    assert "{name: many, classes: all}" in text


def test_groups_of_the_data_become_tasks(tmp_path: Path) -> None:
    columns = {
        "label": ["cat", "dog", "bus", "tram"] * 3,
        "group_name": ["My pets", "My pets", "cars", "cars"] * 3,
    }
    found = look([parquet(tmp_path / "all.parquet", columns)])
    assert tasks_of(found) == {"my_pets": ("cat", "dog"), "cars": ("bus", "tram")}


def test_a_gpu_and_weights_at_hand_are_used(tmp_path: Path) -> None:
    found = look([photos(tmp_path / "pets", {"cat": 40, "dog": 40}, size=(400, 300))])
    numbers = choose(found.train_images, 0, found.short_side, 2, SERVER)
    Path("my.yaml").write_text(document(found, numbers, None, output=Path("my.yaml"), command="c"))
    settings = load_settings("my.yaml")
    assert settings.cluster.gpus_per_worker == 1
    assert settings.teacher.start == "pretrained"
    assert settings.data.image_size == 128


def test_cached_weights_are_found_without_a_network(tmp_path: Path) -> None:
    assert not machine_module.has_pretrained("resnet18")
    cache = tmp_path / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    (cache / "resnet18-f37072fd.pth").write_bytes(b"")
    assert machine_module.has_pretrained("resnet18")


def test_longer_schedules_take_longer_and_durations_are_rounded() -> None:
    def seconds(**changes: Any) -> float:
        numbers = Numbers(**{**vars(choose(400, 0, 64, 5, LAPTOP)), **changes})
        return total_seconds(numbers, 0.02, 2)

    assert seconds(teacher_epochs=80) - seconds(teacher_epochs=40) > 0.02 * 304 * 39
    assert minutes_text(0.2) == "about a minute"
    assert minutes_text(300) == "about 5 hours"
    assert minutes_text(9_000) == "about 6 days"
    assert Estimate(1.0, "x").minutes == 1.0


def test_names_of_folders_become_names_of_tasks() -> None:
    names = ["Photos", "2024 Fêtes!", "日本", "a__b-c"]
    assert [task_name(Path(name)) for name in names] == ["photos", "fetes", "images", "a_b_c"]
    assert scalar(["cat", "a: b", 3, None]) == '[cat, "a: b", 3, null]'
