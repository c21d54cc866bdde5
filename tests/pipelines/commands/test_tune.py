"""`mantis tune` on the command line: messages, exit codes, JSON, the command that resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.cluster.preflight import PreflightError
from pipelines.search import run as search
from pipelines.search.journal import Journal, TrialRecord
from pipelines.search.result import FrontPoint, SearchResult
from pipelines.search.space import searched_space
from pipelines.search.trial import search_settings
from pipelines.settings.reading import load_settings
from pipelines.stages.spec import StageFailed
from pipelines.storage import Store
from tests.pipelines.fakes import same_code
from tests.pipelines.search_bench import CONFIG, joint, small_task


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    same_code(monkeypatch)
    return path


def mantis(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def result(finished: int = 2, failed: dict[int, str] | None = None) -> SearchResult:
    front = (FrontPoint(0, 21.0, 0.8, {"stage2.rate_weight": 0.01}, "run0", "models:/mantis/1"),)
    failed = failed or {}
    counts = {"finished": finished, "stopped": 1, "failed": len(failed), "equal": 0}
    front = front if finished else ()
    return SearchResult("run", "/r", "/r/s", counts, front, 1.5, 1, 5, failed, 1, 61.0, 0.021)


def answer(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[Any]:
    """Makes the search end at once, and keeps what it was asked."""
    asked: list[Any] = []

    def run_search(settings: Any, options: Any, *, stream: Any, config_name: str) -> Any:
        asked.append(options)
        print("chatter of a library")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(search, "run_search", run_search)
    return asked


def test_tune_prints_one_json_object_and_nothing_else_on_stdout(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, result())
    command = ("tune", "--config", config, "--space", "joint", "--trials", 3, "--json", "seed=4")
    done = mantis(*command)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    printed = json.loads(line)
    assert printed["front"][0]["model"] == "models:/mantis/1"
    assert printed["overhead"] == 0.021
    assert "chatter" not in done.output
    (options,) = asked
    assert (options.kind, options.objective, options.seed) == ("optuna", "pareto", 4)


def test_tune_in_a_pipe_shows_the_front_and_the_overhead(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, result())
    done = mantis("tune", "--config", config, "--space", "joint", "--trials", 3, "--seed", 7)
    assert "rate_weight=0.01" in done.stdout
    assert "models:/mantis/1" in done.stdout
    assert "scheduler and Tune: 2.1 % of the trials' wall time" in done.stdout
    assert "report: /r/s/search.html" in done.stdout


def test_a_front_of_models_of_several_rates_names_the_level(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"model.prior": "shared"}
    front = tuple(
        FrontPoint(3, size, top1, params, "run3", "models:/mantis/1", level)
        for size, top1, level in ((21.5, 0.5, 8), (60.0, 0.75, 0))
    )
    answer(monkeypatch, replace(result(), front=front))
    done = mantis("tune", "--config", config, "--space", "joint", "--trials", 3)
    assert "level" in done.stdout
    lines = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    assert [line[:4] for line in lines if "models:/mantis/1" in line] == [
        ["3", "8", "0.5", "21.5"],
        ["3", "0", "0.75", "60.0"],
    ]
    assert done.stdout.count("model.prior=shared") == 1


def test_a_config_of_several_rates_has_no_rate_weight_to_search(config: Path) -> None:
    settings = load_settings(config)
    several = load_settings(config, ["stage2.rate_weights=[0.001, 0.01]"])
    fields = [
        set(searched_space(each, "joint", include_stage1=False)) for each in (settings, several)
    ]
    assert fields[0] - fields[1] == {"stage2.rate_weight"}
    assert fields[1] < fields[0]


@pytest.mark.parametrize(("finished", "code"), [(2, 3), (0, 1)])
def test_the_exit_code_tells_that_some_or_all_trials_failed(
    config: Path, monkeypatch: pytest.MonkeyPatch, finished: int, code: int
) -> None:
    answer(monkeypatch, result(finished, {4: "stage2 failed: TrainingError: the loss is nan"}))
    done = mantis("tune", "--config", config, "--space", "film", "--trials", 5, "--json")
    assert done.exit_code == code
    assert json.loads(done.stdout)["failed"] == {
        "4": "stage2 failed: TrainingError: the loss is nan"
    }
    assert "1 of 5 trials failed:\ntrial 4: stage2 failed: TrainingError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--space", "joimt", "--trials", "2"), "did you mean 'joint'"),
        (("--space", "joint", "--trials", "2", "--search", "grid"), "'grid' is not one of"),
        (("--space", "joint", "--trials", "2", "--objective", "psnr"), "'psnr' is not one of"),
        (("--space", "joint", "--trials", "0"), "--trials"),
        (("--trials", "2"), "--space"),
        (("--space", "joint", "--trials", "2", "cluster.workers=999"), "asks for 999 CPUs"),
        (("--space", "joint", "--trials", "2", "stage2.epoch=3"), "did you mean 'epochs'"),
        (
            ("--space", "joint", "--trials", "2", "--register", "tracking.enabled=false"),
            "--register needs MLflow",
        ),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(
    config: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = mantis("tune", "--config", config, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_search_that_was_begun_is_gone_on_with_on_demand_only(config: Path) -> None:
    from pipelines.search.result import SearchOptions
    from pipelines.search.run import search_key

    task = small_task(load_settings(config))
    key = search_key(task.plan({}), joint(), SearchOptions("joint", 2))
    root = Store(task.settings.storage.root)
    Journal(root, f"searches/joint-{key[:12]}").asked(TrialRecord(0, {}, 0.5))
    done = mantis("tune", "--config", config, "--space", "joint", "--trials", 2)
    assert done.exit_code == 2
    assert "was begun before" in done.stderr
    assert "add --resume" in done.stderr


def test_what_decides_trials_is_another_search_and_their_number_is_not(config: Path) -> None:
    from pipelines.search.result import SearchOptions
    from pipelines.search.run import search_key

    def key(*overrides: str, trials: int = 2, **options: Any) -> str:
        task = small_task(load_settings(config, overrides))
        return search_key(task.plan({}), joint(), SearchOptions("joint", trials, **options))

    one = key()
    assert key(trials=9, resume=True, register=True) == one
    assert key("cluster.workers=2", "tracking.enabled=false", "evaluate.baselines=[]") == one
    others = {
        key("stage2.epochs=3"),
        key("stage1.epochs=3"),
        key("tune.reduction_factor=2"),
        key(seed=1),
        key(kind="random"),
        key(objective="top1"),
    }
    assert len(others | {one}) == 7


def test_a_failed_search_exits_1_with_the_command_that_resumes_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, StageFailed("teacher", RuntimeError("the lights went out")))
    command = ("tune", "-c", config, "-s", "joint", "-n", 3, "--register", "stage2.epochs=3")
    done = mantis(*command)
    assert done.exit_code == 1
    assert "teacher failed: RuntimeError: the lights went out" in done.stderr
    again = f"mantis tune --config {config} --space joint --trials 3 --search optuna"
    assert f"{again} --objective pareto --register --resume stage2.epochs=3" in done.stderr


def test_an_interrupted_search_and_one_that_finds_no_cluster(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, KeyboardInterrupt())
    command = ("tune", "-c", config, "-s", "joint", "-n", 3)
    done = mantis(*command)
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    answer(monkeypatch, PreflightError("there is no Ray cluster at nowhere"))
    done = mantis(*command)
    assert (done.exit_code, done.stderr) == (2, "error: there is no Ray cluster at nowhere\n")


def test_a_search_trains_its_main_arm_alone(config: Path) -> None:
    settings = load_settings(config, ["evaluate.rate_weights=[0.01]", "evaluate.batch_size=7"])
    alone = search_settings(settings)
    assert alone.evaluate.rate_weights == alone.evaluate.baselines == ()
    assert alone.evaluate.batch_size == 7
    plan_ = small_task(settings).plan({"stage2.rate_weight": 0.01})
    names = [spec.name for spec in plan_.specs]
    assert names == ["prepare", "teacher", "stage1", "stage2", "evaluate", "register"]


def test_a_dry_run_shows_the_shared_stages_and_the_searched_fields(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, result())
    monkeypatch.setattr("pipelines.chain.preflight.Preflight.check", lambda *_, **__: ["a note"])
    command = ("tune", "--config", config, "--space", "rate", "--trials", 3, "--dry-run")
    command += tuple(f"{each}.batch_size=4" for each in ("teacher.training", "stage1", "stage2"))
    done = mantis(*command)
    assert done.exit_code == 0, done.output
    assert "searched: stage2.rate_weight in LogUniform(low=0.0003, high=0.03)" in done.stdout
    assert "note: a note" in done.stdout
    plan = json.loads(mantis(*command, "--json").stdout)
    assert [stage["stage"] for stage in plan["stages"]][-1] == "stage2"
    assert plan["space"]["stage1.rate_weight"] == "Choice(values=(0.001, 0.002, 0.004))"
    assert not asked
