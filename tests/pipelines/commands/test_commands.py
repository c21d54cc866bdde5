"""The command line: exit codes, messages, JSON, resume commands, and that `--help` stays light."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.stages.spec import StageContext, StageSpec, TrainingStopped
from pipelines.training.causes import MISTAKE, is_mistake
from tests.pipelines.fakes import fake_stages, same_code
from tests.root import ROOT

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 800, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train}
evaluate: {baselines: [none]}
tracking: {enabled: false}
"""
EVALUATION = {
    "arms": [
        {"name": "stage2", "metrics": {"val/top1": 0.9, "val/bpp": 0.0123, "val/wire_bytes": 60.0}},
        {"name": "teacher", "metrics": {"val/top1": 0.95}},
    ]
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return path


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """Stages that only note their figures, or raise what the test puts in under their name."""
    failures: dict[str, BaseException] = {}

    def runner(spec: StageSpec, context: StageContext) -> dict[str, Any]:
        print("chatter of a library")
        if spec.name in failures:
            raise failures[spec.name]
        if spec.kind == "evaluate":
            context.store.write_json(f"{spec.folder}/evaluation.json", EVALUATION)
            return {"metrics": EVALUATION["arms"][0]["metrics"]}
        return {"metrics": {"holdout/loss": 0.5}, "rows": {"train": 300}}

    fake_stages(monkeypatch, runner)
    return failures


def mantis(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("fakes")
def test_run_prints_one_json_object_and_nothing_else_on_stdout(config: Path) -> None:
    done = mantis("run", "--config", config, "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert set(result) == {"run_id", "root", "model", "stages", "metrics"}
    assert result["root"] == str(config.parent / "runs")
    assert result["metrics"]["val/top1"] == 0.9
    assert {stage["status"] for stage in result["stages"].values()} == {"ran"}
    assert all(len(stage["key"]) == 64 for stage in result["stages"].values())
    assert "chatter" not in done.output
    (log,) = (config.parent / "runs" / "logs").iterdir()
    assert "chatter of a library" in log.read_text()
    again = json.loads(mantis("run", "--config", config, "--json").stdout)
    assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
    assert again["metrics"] == result["metrics"]


@pytest.mark.usefixtures("fakes")
def test_run_in_a_pipe_tells_each_stage_and_the_results(config: Path) -> None:
    done = mantis("run", "--config", config)
    lines = done.stdout.splitlines()
    assert "stage2/none: started" in lines
    assert any(line.startswith("evaluate: ran in") for line in lines)
    assert any("stage2" in line and "0.0123" in line for line in lines)
    assert any(line.startswith("report: ") for line in lines)


@pytest.mark.usefixtures("fakes")
def test_a_stage_command_stops_after_its_stage(config: Path) -> None:
    done = mantis("stage1", "--config", config, "--json", "stage1.epochs=1")
    assert list(json.loads(done.stdout)["stages"]) == ["prepare", "teacher", "stage1"]
    done = mantis("evaluate", "--config", config, "--json", "stage1.epochs=1")
    assert list(json.loads(done.stdout)["stages"])[-1] == "evaluate"


@pytest.mark.usefixtures("fakes")
def test_a_dry_run_says_what_the_client_costs(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Any) -> list[str]:
        self.macs = (4_540_000, 1_200_000)
        return []

    monkeypatch.setattr("pipelines.chain.preflight.Preflight.check", check)
    said = "client: 4.5 million multiply-adds for an image of 64 x 64 pixels, 1.2 of them for"
    assert said in mantis("run", "--config", config, "--dry-run").stdout
    planned = json.loads(mantis("run", "--config", config, "--dry-run", "--json").stdout)
    assert planned["client"] == {"macs": 4_540_000, "detector_macs": 1_200_000}


@pytest.mark.usefixtures("fakes")
def test_a_dry_run_tells_what_would_run_and_writes_nothing(config: Path) -> None:
    done = mantis("run", "--config", config, "--dry-run", "--json", "stage2.epochs=3")
    planned = json.loads(done.stdout)
    actions = {stage["stage"]: stage["action"] for stage in planned["stages"]}
    assert set(actions.values()) == {"run"}
    assert planned["config"]["stage2"]["epochs"] == 3
    assert {s["stage"]: s["epochs"] for s in planned["stages"]}["stage2"] == 3
    assert {s["stage"]: s["training"] for s in planned["stages"]}["stage2"]["rows"] == 231
    assert any("stage2 trains for 3 steps on 231 images" in note for note in planned["notes"])
    assert not (config.parent / "runs").exists()
    mantis("stage1", "--config", config)
    text = mantis("run", "--config", config, "--dry-run").stdout
    lines = text.splitlines()
    assert "  weights: train" in lines
    assert "rate_weight" not in text  # it has its default
    stage1 = next(number for number, line in enumerate(lines) if line.startswith("stage1  "))
    assert " skip" in lines[stage1]
    assert " run  4 epochs" in lines[stage1 + 2]
    assert (
        "256 of 300 rows per epoch (44 left out, others in the next), 2 steps" in lines[stage1 + 3]
    )
    assert "batch 128 = 1 x 128; learning rate" in lines[stage1 + 3]
    text = mantis("run", "--config", config, "--dry-run", "stage1.epochs=9").stdout
    assert "stage1.epochs 4 -> 9 since" in text
    plan = mantis("run", "--config", config, "--dry-run", "--json", "stage1.epochs=9").stdout
    reasons = {stage["stage"]: stage["reason"] for stage in json.loads(plan)["stages"]}
    assert reasons["prepare"] == ""
    assert reasons["stage1"].startswith("stage1.epochs 4 -> 9 since")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--config", "nowhere.yaml"), "cannot read the config nowhere.yaml"),
        (("run", "--config", "tiny.yaml", "sead=1"), "did you mean 'seed'?"),
        (("run", "--config", "tiny.yaml", "cluster.workers=999"), "asks for 999 CPUs"),
        (("run", "--config", "tiny.yaml", "tasks.0.classes_from=shaped"), "shape"),
        (("teacher", "--config", "tiny.yaml", "teacher.weights=pretrained"), "no stage teacher"),
        (("evaluate",), "--config"),
        (("score", "m"), "DATA"),
        (("score", "m", "d"), "m is no model folder"),
        (("report", "--root", "empty"), "there are no runs in"),
        (("models",), "there are no runs in"),
        (("encode", "nomodel", "tiny.yaml", "-o", "a.mts"), "nomodel is no model folder"),
        (("encode", "m", "tiny.yaml", "-o", "tiny.yaml"), "tiny.yaml is a file. Give OUT.mts"),
        (("decode", "m", "nowhere.mts"), "cannot read nowhere.mts"),
        (("info", "tiny.yaml"), "stream"),
        (("run",), "--config"),
        (("frobnicate",), "frobnicate"),
    ],
)
@pytest.mark.usefixtures("config", "fakes")
def test_a_mistake_gets_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str
) -> None:
    done = mantis(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_a_failed_run_exits_1_with_the_command_that_resumes_it(
    config: Path, fakes: dict[str, BaseException]
) -> None:
    fakes["stage2"] = RuntimeError("the lights went out")
    done = mantis("run", "--config", config, "stage2.rate_weight=0.01")
    assert done.exit_code == 1
    assert "stage2 failed: RuntimeError: the lights went out" in done.stderr
    assert f"mantis run --config {config} stage2.rate_weight=0.01" in done.stderr
    assert "Traceback" not in done.output
    (log,) = (config.parent / "runs" / "logs").iterdir()
    assert "Traceback" in log.read_text()
    fakes.clear()
    again = mantis("run", "--config", config, "stage2.rate_weight=0.01", "--json")
    assert json.loads(again.stdout)["stages"]["stage2"]["status"] == "resumed"


def test_a_mistake_found_in_the_data_by_a_stage_exits_2(
    config: Path, fakes: dict[str, BaseException]
) -> None:
    from data_prep.errors import DataError

    fakes["prepare"] = DataError("the mask of image 7 holds 9")
    done = mantis("run", "--config", config)
    assert done.exit_code == 2
    assert done.stderr.splitlines() == ["error: prepare: the mask of image 7 holds 9"]


def test_a_loss_that_is_no_number_gets_one_line_and_no_command_that_resumes_it(
    config: Path, fakes: dict[str, BaseException]
) -> None:
    from mantis_core.training.loop import TrainingError

    fakes["stage1"] = TrainingError("the loss is nan at step 1: lower the learning rate")
    done = mantis("run", "--config", config)
    assert done.exit_code == 2
    line = "error: stage1: the loss is nan at step 1: lower the learning rate"
    assert done.stderr.splitlines() == [line]


def test_a_dry_run_prints_notes_and_refuses_what_cannot_be_trained(
    config: Path, fakes: dict[str, BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.settings.errors import SettingsError

    check = "pipelines.chain.preflight.Preflight.check"
    monkeypatch.setattr(check, lambda *_: ["stage1 trains for 2 steps"])
    done = mantis("run", "--config", config, "--dry-run")
    assert "note: stage1 trains for 2 steps" in done.stdout.splitlines()
    done = mantis("run", "--config", config, "--dry-run", "--json")
    assert json.loads(done.stdout)["notes"][0] == "stage1 trains for 2 steps"

    def refuse(*_: object) -> list[str]:
        raise SettingsError("teacher.training.batch_size is 128")

    monkeypatch.setattr(check, refuse)
    for more in (["--dry-run"], [], ["--plain"]):
        done = mantis("run", "--config", config, *more)
        assert done.exit_code == 2
        assert done.stderr == "error: teacher.training.batch_size is 128\n"


def test_an_interrupt_exits_130_with_the_command_that_resumes_it(
    config: Path, fakes: dict[str, BaseException]
) -> None:
    fakes["stage1"] = KeyboardInterrupt()
    done = mantis("run", "--config", config, "--json")
    assert done.exit_code == 130
    assert done.stdout == ""
    assert f"interrupted. Resume with:\n  mantis run --config {config}" in done.stderr


def test_what_a_user_can_mend_says_so_itself() -> None:
    from data_prep.errors import DataError
    from mantis_core.baselines.image_codecs import CodecError
    from mantis_core.bitstream.container import BitstreamError
    from mantis_core.errors import ModelError
    from mantis_core.training.loop import TrainingError
    from pipelines.cluster.local_cluster import LocalClusterError
    from pipelines.cluster.preflight import PreflightError
    from pipelines.report.report import ReportError
    from pipelines.settings.errors import SettingsError
    from pipelines.stages.record import StageBusy
    from pipelines.storage import StorageError
    from pipelines.tracking.registry import RegistryError
    from pipelines.tracking.runs import TrackingError

    errors = (
        DataError,
        BitstreamError,
        ModelError,
        CodecError,
        PreflightError,
        LocalClusterError,
        RegistryError,
        ReportError,
        StageBusy,
        SettingsError,
        StorageError,
        TrackingError,
        TrainingError,
    )
    assert {error.exit_code for error in errors} == {MISTAKE}


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), TrainingStopped("x")])
def test_no_other_error_is_taken_for_a_users_mistake(error: Exception) -> None:
    assert not is_mistake(error)


def python(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


COMMANDS = ("", "run", "tune", "evaluate", "score", "label", "encode", "models", "cluster up")
HELP = """
import json, sys
from pipelines.__main__ import main

heavy = ("torch", "ray", "mlflow", "pyarrow", "pandas", "matplotlib")
found = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["mantis", *command.split(), "--help"]
    try:
        main()
    except SystemExit as stop:
        found[command] = [stop.code, [name for name in heavy if name in sys.modules]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each command the exit code of `--help`, and what it and those before have imported."""
    done = python("-c", HELP, json.dumps(COMMANDS), cwd=tmp_path_factory.mktemp("help"))
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_heavy_imports(command: str, helped: dict[str, Any]) -> None:
    assert helped[command] == [0, []]


def test_the_module_is_the_program_and_exits_2_on_a_mistake(tmp_path: Path) -> None:
    done = python("-m", "pipelines", "run", "--config", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the config nowhere.yaml")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plain", "nowhere"], "nowhere holds no manifest.json"),
        (["nowhere"], "'nowhere' is not of the form key=value"),
        (["--plain", "one", "two"], "takes one folder of shards and overrides"),
        (["--jobs", "2"], "--jobs needs --plain"),
    ],
)
def test_run_refuses_words_that_it_cannot_take(
    words: list[str], message: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_code(monkeypatch)
    done = mantis("run", "--config", config, *words)
    assert done.exit_code == MISTAKE, done.output
    assert message in done.output


@pytest.mark.usefixtures("fakes")
def test_an_adopted_stage_is_planned_as_such(config: Path) -> None:
    assert mantis("prepare", "--config", config).exit_code == 0
    (folder,) = (config.parent / "runs" / "stages").glob("prepare-*")
    other = folder.with_name(f"prepare-{'f' * 12}")
    folder.rename(other)
    begun = json.loads((other / "STARTED").read_text())
    done = json.loads((other / "DONE").read_text())
    for name, record in (("STARTED", begun), ("DONE", done)):
        (other / name).write_text(json.dumps({**record, "key": "f" * 64}))
    plan = json.loads(mantis("prepare", "--config", config, "--dry-run", "--json").stdout)
    assert plan["stages"][0]["action"] == "run"
    command = ("prepare", "--config", config, "--adopt")
    plan = json.loads(mantis(*command, "--dry-run", "--json").stdout)
    assert plan["stages"][0]["action"] == "adopt"
    result = json.loads(mantis(*command, "--json").stdout)
    assert result["stages"]["prepare"]["status"] == "adopted"
    again = json.loads(mantis("prepare", "--config", config, "--json").stdout)
    assert again["stages"]["prepare"]["status"] == "adopted"


def test_sigterm_ends_a_run_as_an_interrupt_does(config: Path) -> None:
    code = """
import time
import pytest
from pipelines.__main__ import main
from tests.pipelines.fakes import fake_stages, same_code

def wait(spec, context):
    context.console.note("waiting")
    time.sleep(60)

fake_stages(pytest.MonkeyPatch(), wait)
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "waiting\n":
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted. Resume with:" in errors
