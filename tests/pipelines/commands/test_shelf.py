"""`mantis ls` and `clean` on a root that a chain of made-up stages has left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.stages.spec import StageContext, StageSpec
from tests.pipelines.fakes import fake_stages

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 20, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train}
evaluate: {baselines: [none]}
tracking: {enabled: false}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in the current folder, with stages that write one result each."""

    def runner(spec: StageSpec, context: StageContext) -> dict[str, Any]:
        if spec.kind == "evaluate":
            arm = {"name": "stage2", "metrics": {"val/top1": 0.9}}
            context.store.write_json(f"{spec.folder}/evaluation.json", {"arms": [arm]})
        return {"metrics": {}}

    fake_stages(monkeypatch, runner)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.shelf.sessions.ray_folders", lambda: [tmp_path / "ray"])
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def mantis(*arguments: object, answer: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)


def stages() -> dict[str, dict[str, Any]]:
    listed = json.loads(mantis("ls", "--json").stdout)["stages"]
    return {stage["path"]: stage for stage in listed}


def test_ls_names_the_stages_and_runs_of_a_root(config: Path) -> None:
    assert mantis("run", "--config", config).exit_code == 0
    found = stages()
    assert {stage["name"] for stage in found.values()} == {
        *("prepare", "teacher", "stage1", "stage2", "stage2/none", "evaluate"),
    }
    assert {stage["state"] for stage in found.values()} == {"done"}
    assert all(stage["used_by"] == ["tiny"] and stage["size"] > 0 for stage in found.values())
    text = mantis("ls").stdout.splitlines()
    assert text[-2].startswith("6 stages in ")
    assert text[-1].startswith("run - ")
    assert text[-1].endswith("  tiny")
    (run,) = json.loads(mantis("ls", "--json").stdout)["runs"]
    assert (run["config"], run["run_id"]) == ("tiny", None)


def test_clean_removes_what_an_earlier_plan_alone_needs(config: Path) -> None:
    mantis("run", "--config", config, "stage2.epochs=1")
    before = stages()
    mantis("run", "--config", config, "stage2.epochs=2")
    assert mantis("clean", "--dry-run").stdout == "nothing to remove; 9 of 9 stages stay\n"
    shown = mantis("clean", "--older-than", "0d", "--dry-run")
    assert "3 to remove" in shown.stdout
    assert "only of an earlier plan of tiny" in shown.stdout
    assert len(stages()) == 9
    refused = mantis("clean", "--older-than", "0d", answer="n\n")
    assert "Remove them?" in refused.stdout
    assert len(stages()) == 9
    done = mantis("clean", "--older-than", "0d", "--yes", "--json")
    assert done.exit_code == 0
    gone = {Path(item["path"]).name for item in json.loads(done.stdout)["items"]}
    assert gone == {Path(path).name for path in set(before) - set(stages())}
    assert len(stages()) == 6
    again = mantis("run", "--config", config, "stage2.epochs=2", "--json")
    status = {stage["status"] for stage in json.loads(again.stdout)["stages"].values()}
    assert status == {"skipped"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clean", "--older-than", "soon"), "'soon' is no age"),
        (("clean", "--json"), "Add --yes or --dry-run"),
        (("ls", "--root", "nowhere"), "there is no folder"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str, config: Path) -> None:
    (config.parent / "runs").mkdir()
    done = mantis(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_nothing_is_removed_while_models_may_be_registered_elsewhere(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mantis("run", "--config", config, "stage2.epochs=1")
    mantis("run", "--config", config)
    (plan,) = [p for p in (config.parent / "runs/plans").glob("*.json") if "-stages" in p.name][:1]
    away = plan.with_name(plan.name.replace("-stages", ""))
    away.write_text('{"plan_key": "k", "run_id": null, "store": "http://host:5000"}')
    done = mantis("clean", "--older-than", "0d", "--yes")
    assert done.exit_code == 2
    assert "recorded in http://host:5000: set MLFLOW_TRACKING_URI" in done.stderr
    assert len(stages_by_hand(config)) == 9


def test_nothing_is_removed_while_the_registry_does_not_answer(
    config: Path, monkeypatch: pytest.MonkeyPatch, mlflow_template: Path
) -> None:
    mantis("run", "--config", config, "stage2.epochs=1")
    mantis("run", "--config", config)

    class Away(ValueError):
        exit_code = 2

    def away(*_: object) -> None:
        raise Away("MLflow does not answer")

    shutil.copy(mlflow_template, config.parent / "runs/mlflow.db")
    monkeypatch.setattr("pipelines.tracking.registry.models", away)
    done = mantis("clean", "--older-than", "0d", "--yes")
    assert done.exit_code == 2
    assert len(stages_by_hand(config)) == 9


def stages_by_hand(config: Path) -> list[Path]:
    return sorted((config.parent / "runs/stages").rglob("DONE"))
