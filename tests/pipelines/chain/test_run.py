"""Running a chain with fake runners: what runs, what is skipped, what is left after a failure."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import DataError
from pipelines.chain.plan import make_plan
from pipelines.chain.preflight import Preflight
from pipelines.chain.run import ChainResult, run_chain, watched_machine
from pipelines.cluster.preflight import PreflightError
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings
from pipelines.stages.record import StageBusy, claim, read_result
from pipelines.stages.spec import StageContext, StageFailed, StageSpec
from pipelines.storage import Store
from pipelines.terminal.console import Console
from tests.pipelines.fakes import fake_stages, in_a_lock

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 20, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train}
evaluate: {baselines: [none]}
"""
ORDER = [
    "prepare",
    "teacher",
    "stage1",
    "stage2",
    "stage2/none",
    "evaluate",
    "register",
]


class FakeTracker:
    """Remembers what MLflow would be told."""

    was_away = False

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.tags: dict[str, Any] = {}

    def check_access(self) -> None:
        """The server lets everybody in."""

    def ask_again(self) -> None:
        self.calls.append(("asked", "again"))

    def open_pipeline(self, name: str, settings: object, plan_key: str) -> str:
        self.calls.append(("pipeline", name))
        return "run-1"

    def open_stage(
        self, parent_id: str, name: str, key: str, params: object, **rest: object
    ) -> str:
        self.calls.append(("finished" if rest["finished"] else "opened", name))
        return f"run of {name}"

    def finish(
        self, run_id: str, status: str, *, tags: dict[str, str] | None = None, **_: object
    ) -> None:
        self.calls.append((status, run_id))
        self.tags[run_id] = tags

    def close(self, status: str) -> None:
        self.calls.append(("closed", status))


class Bench:
    """Runs chains whose stages only note that they ran."""

    def __init__(self, config: Path, root: Path) -> None:
        self.config, self.root = config, root
        self.ran: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.tracker = FakeTracker()
        self.sessions = 0
        self.text = ""

    def runner(self, spec: StageSpec, context: StageContext) -> dict[str, Any]:
        self.ran.append(spec.name)
        assert context.stage_run_id == f"run of {spec.name}"
        assert context.manifest_folder == context.specs["prepare"].folder
        for name in spec.upstream:
            read_result(context.store, context.specs[name])
        if spec.name in self.fail:
            raise self.fail[spec.name]
        result: dict[str, Any] = {"metrics": {"val/top1": float(len(spec.name))}}
        if spec.stage.trains:
            result["computed_on"] = [{"device": "cpu", "workers": 2}]
        return result | ({"model": "models:/mantis/1"} if spec.kind == "register" else {})

    def run(self, *overrides: str, until: str | None = None) -> ChainResult:
        self.ran.clear()
        self.tracker.calls.clear()
        settings = load_settings(self.config, [f"storage.root={self.root}", *overrides])
        stream = io.StringIO()
        try:
            return run_chain(
                make_plan(settings), console=Console(stream), config_name="tiny", until=until
            )
        finally:
            self.text = stream.getvalue()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    bench = Bench(config, tmp_path / "runs")

    @contextlib.contextmanager
    def session(*_: object) -> Iterator[None]:
        bench.sessions += 1
        yield

    fake_stages(monkeypatch, bench.runner)
    monkeypatch.setattr("pipelines.chain.run.ray_session", session)
    monkeypatch.setattr("pipelines.chain.run.make_tracker", lambda *_: bench.tracker)
    return bench


def statuses(result: ChainResult) -> dict[str, str]:
    return {name: outcome.status for name, outcome in result.stages.items()}


def test_a_stages_run_is_tagged_with_what_computed_it(bench: Bench) -> None:
    bench.run()
    tags = {"mantis.device": "cpu", "mantis.workers": "2"}
    assert bench.tracker.tags["run of stage1"] == bench.tracker.tags["run of stage2/none"] == tags
    assert bench.tracker.tags["run of prepare"] == {}


def test_a_first_run_runs_every_stage_in_order(bench: Bench) -> None:
    result = bench.run()
    assert bench.ran == ORDER
    assert set(statuses(result).values()) == {"ran"}
    assert result.metrics == {"val/top1": float(len("register"))}
    assert (result.model, result.run_id, result.root) == (
        "models:/mantis/1",
        "run-1",
        str(bench.root),
    )
    assert ("FINISHED", "run-1") in bench.tracker.calls


def test_a_second_run_runs_nothing_and_starts_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.run()
    monkeypatch.setattr(
        "pipelines.chain.run.make_tracker", lambda *_: pytest.fail("MLflow was asked")
    )
    second = bench.run()
    assert bench.ran == []
    assert bench.sessions == 1
    assert set(statuses(second).values()) == {"skipped"}
    assert (second.run_id, second.metrics, second.model) == (
        first.run_id,
        first.metrics,
        first.model,
    )


def test_mlflow_back_after_an_absence_is_told_of_every_stage(bench: Bench) -> None:
    bench.tracker.was_away = True
    bench.run()
    told = [name for call, name in bench.tracker.calls if call == "finished"]
    assert told == ORDER
    assert bench.tracker.calls[-1] == ("FINISHED", "run-1")


def test_every_stage_is_shown_in_mlflow_and_again_after_an_absence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        "pipelines.chain.run.track_stage", lambda spec, **_: shown.append(spec.name)
    )
    bench.run(until="stage1")
    assert shown == ORDER[:3]
    bench.tracker.was_away = True
    shown.clear()
    bench.run()
    assert shown == ORDER + ORDER


@pytest.mark.parametrize(
    ("overrides", "watched"),
    [((), 1), (("tracking.system_metrics=false",), 0), (("tracking.enabled=false",), 0)],
)
def test_the_machine_is_watched_unless_the_config_turns_it_off(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], watched: int
) -> None:
    asked: list[str] = []

    @contextlib.contextmanager
    def watching(tracker: object, run_id: str) -> Iterator[None]:
        asked.append(run_id)
        yield

    monkeypatch.setattr("pipelines.chain.run.watched_machine", watched_machine)
    monkeypatch.setattr("pipelines.tracking.pages.system_metrics.system_metrics", watching)
    bench.run(*overrides)
    assert asked == ["run-1"] * watched


def test_figures_left_in_the_spool_are_sent_though_nothing_is_left_to_run(bench: Bench) -> None:
    bench.run()
    (bench.root / "spool").mkdir()
    (bench.root / "spool/key.jsonl").write_text("{}")
    bench.run()
    assert bench.ran == []
    assert [name for call, name in bench.tracker.calls if call == "finished"] == ORDER


def test_a_changed_field_reruns_its_stage_and_those_downstream(bench: Bench) -> None:
    bench.run()
    bench.run("stage2.epochs=1")
    assert bench.ran == ["stage2", "stage2/none", "evaluate", "register"]
    assert ("finished", "stage1") in bench.tracker.calls
    bench.run()
    assert bench.ran == []


def test_a_failed_stage_is_resumed_and_those_before_it_skipped(bench: Bench) -> None:
    bench.fail["stage2"] = RuntimeError("the lights went out")
    with pytest.raises(StageFailed, match="stage2 failed: RuntimeError: the lights went out"):
        bench.run()
    assert bench.ran == ["prepare", "teacher", "stage1", "stage2"]
    assert ("FAILED", "run of stage2") in bench.tracker.calls
    assert ("closed", "FAILED") in bench.tracker.calls
    assert "stage2: failed" in bench.text
    bench.fail.clear()
    result = bench.run()
    assert bench.ran == ORDER[3:]
    assert statuses(result)["stage2"] == "resumed"
    assert statuses(result)["stage1"] == "skipped"
    assert statuses(result)["stage2/none"] == "ran"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(0), in_a_lock()])
def test_an_interrupt_marks_runs_killed_and_never_looks_like_success(
    bench: Bench, stop: BaseException
) -> None:
    bench.fail["stage1"] = stop
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert ("closed", "KILLED") in bench.tracker.calls
    bench.fail.clear()
    assert statuses(bench.run())["stage1"] == "resumed"


class WorkerGroupError(RuntimeError):
    worker_failures = {0: DataError("no such class")}  # noqa: RUF012


def test_the_error_of_a_worker_is_the_cause_that_is_told(bench: Bench) -> None:
    bench.fail["teacher"] = WorkerGroupError("two pages of traceback")
    with pytest.raises(StageFailed, match="no such class") as caught:
        bench.run()
    assert isinstance(caught.value.cause, DataError)


HARMS: dict[str, Callable[[Path], object]] = {
    "result damaged": lambda folder: (folder / "result.json").write_text("{}"),
    "result lost": lambda folder: (folder / "result.json").unlink(),
    "DONE torn": lambda folder: (folder / "DONE").write_text('{"key": '),
    "another key": lambda folder: (folder / "DONE").write_text(
        (folder / "DONE").read_text().replace('"key": "', '"key": "0')
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_folder_that_is_not_whole_is_never_taken_for_done(bench: Bench, harm: str) -> None:
    key = bench.run().stages["evaluate"].key
    HARMS[harm](bench.root / "stages" / f"evaluate-{key[:12]}")
    result = bench.run()
    assert bench.ran == ["evaluate"]
    assert statuses(result)["evaluate"] == "ran"  # from the beginning


def test_until_a_stage_runs_it_and_what_it_needs(bench: Bench) -> None:
    result = bench.run(until="stage1")
    assert bench.ran == ["prepare", "teacher", "stage1"]
    assert result.model is None
    assert result.metrics == {"val/top1": float(len("stage1"))}
    bench.run(until="stage1")
    assert bench.ran == []


def test_another_tracking_server_gets_the_model_too(bench: Bench) -> None:
    bench.run()
    sessions = bench.sessions
    bench.run("tracking.uri=http://user:secret@elsewhere:5000")
    assert bench.ran == ["register"]
    assert bench.sessions == sessions
    written = [path.read_text() for path in bench.root.rglob("*") if path.is_file()]
    assert not any("secret" in text for text in written)


def test_a_model_of_another_name_is_registered_too(bench: Bench) -> None:
    bench.run()
    bench.run("tracking.model=pets")
    assert bench.ran == ["register"]


def test_another_experiment_gets_the_runs_too(bench: Bench) -> None:
    bench.run()
    bench.run("tracking.experiment=third")
    assert bench.ran == []
    assert [name for call, name in bench.tracker.calls if call == "finished"] == ORDER
    bench.tracker.calls.clear()
    bench.run("tracking.experiment=third")
    assert bench.tracker.calls == []


def test_a_run_that_earlier_code_remembered_is_recalled(bench: Bench) -> None:
    bench.run()
    (plan,) = (path for path in (bench.root / "plans").iterdir() if "stages" not in path.name)
    record = json.loads(plan.read_text())
    plan.write_text(json.dumps({name: record[name] for name in ("plan_key", "run_id")}))
    assert bench.run().run_id == "run-1"
    assert bench.tracker.calls == []


def test_two_processes_never_work_on_one_stage(bench: Bench) -> None:
    (begun,) = (
        spec
        for spec in make_plan(load_settings(bench.config, [f"storage.root={bench.root}"])).specs
        if spec.name == "stage1"
    )
    with (
        claim(Store(bench.root), begun),
        pytest.raises(StageBusy, match="another process works on stage1"),
    ):
        bench.run()
    assert bench.ran == ["prepare", "teacher"]
    bench.run()
    assert bench.ran == ORDER[2:]


def test_rows_are_checked_as_soon_as_there_are_some(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def check(preflight: Preflight, *, remarked: bool = False) -> list[str]:
        assert remarked == bool(bench.ran)  # prepare says its remarks itself
        asked.append(list(bench.ran))
        if bench.ran:
            raise SettingsError("stage1.batch_size is 128, and there are 58 training images")
        return ["the networks fit"]

    monkeypatch.setattr(Preflight, "check", check)
    with pytest.raises(SettingsError, match="58 training images"):
        bench.run()
    assert asked == [[], ["prepare"]]
    assert "note: the networks fit" in bench.text
    assert ("closed", "FAILED") in bench.tracker.calls


def test_notes_on_the_rows_of_a_finished_prepare_are_printed_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run(until="prepare")

    def check(preflight: Preflight, *, remarked: bool = False) -> list[str]:
        preflight.saw_rows = True
        return ["few steps"]

    monkeypatch.setattr(Preflight, "check", check)
    bench.run()
    assert bench.text.count("note: few steps") == 1


def test_nothing_is_left_half_said_when_preflight_refuses(bench: Bench) -> None:
    with pytest.raises(PreflightError, match=r"cluster\.workers 9999"):
        bench.run("cluster.workers=9999")
    assert bench.ran == []
    assert not Store(bench.root).list("stages")


def test_the_same_stage_has_one_folder_with_its_config_in_it(bench: Bench) -> None:
    outcome = bench.run().stages["stage2/none"]
    folder = bench.root / "stages" / "stage2" / f"none-{outcome.key[:12]}"
    assert {path.name for path in folder.iterdir()} == {"LOCK", "STARTED", "result.json", "DONE"}
    started = Store(folder).read_json("STARTED")
    assert started["key"] == outcome.key
    assert started["config"]["model"]["conditioning"]["kind"] == "none"
