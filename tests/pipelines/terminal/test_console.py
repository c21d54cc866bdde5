"""The console, the log capture, and progress that travels from Ray workers to the driver."""

import io
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.terminal.console import Console
from pipelines.terminal.logs import captured_output


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_a_pipe_gets_one_plain_line_for_each_event(stream: io.StringIO) -> None:
    with Console(stream) as console:
        console.plan(["prepare", "stage1"])
        console.stage_finished("prepare", "skipped", 0.0)
        console.stage_started("stage1")
        console.progress("stage1", {"step": 3, "steps": 9, "train/loss": 1.5})
        console.epoch("stage1", {"epoch": 1.0, "epochs": 2, "val/top1": 0.25, "train/loss/x": 1.0})
        console.stage_finished("stage1", "ran", 75.0, "top1 0.25")
    assert stream.getvalue().splitlines() == [
        "prepare: skipped",
        "stage1: started",
        "stage1: epoch 1/2, val/top1 0.25",
        "stage1: ran in 1 min 15 s, top1 0.25",
    ]


def test_a_pipe_gets_a_line_a_minute_about_a_stage_that_still_runs(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("pipelines.terminal.console.time.monotonic", lambda: now[-1])
    console = Console(stream)
    console.plan(["prepare", "stage1"])
    console.stage_started("prepare")
    for clock in (10, 50, 61, 62, 119, 125):
        now.append(clock)
        console.progress("prepare", {"done": clock, "total": 250})
    console.stage_finished("prepare", "ran", 130.0)
    now.append(130.0)
    console.stage_started("stage1")
    for clock in (150.0, 200.0):
        now.append(clock)
        console.progress(
            "stage1", {"epoch": 1, "epochs": 2, "step": 5, "steps": 10, "train/loss": 0.5}
        )
    now.append(255.0)
    console.epoch("stage1", {"epoch": 1, "epochs": 2, "train/loss": 0.25})
    now.append(260.0)
    console.progress("stage1", {"epoch": 2, "epochs": 2, "step": 1, "steps": 10})
    assert stream.getvalue().splitlines() == [
        "prepare: started",
        "prepare: 61/250 done, 1 min 01 s so far, 3 min 09 s left",
        "prepare: 125/250 done, 2 min 05 s so far, 2 min 05 s left",
        "prepare: ran in 2 min 10 s",
        "stage1: started",
        "stage1: in epoch 1/2, step 5/10, loss 0.5, 1 min 10 s so far, 3 min 30 s left",
        "stage1: epoch 1/2, train/loss 0.25",
    ]


def test_a_long_line_is_not_broken_in_a_pipe(stream: io.StringIO) -> None:
    Console(stream).note("x" * 300)
    assert stream.getvalue() == "x" * 300 + "\n"


def test_markup_in_a_message_is_printed_as_it_is(stream: io.StringIO) -> None:
    Console(stream).note("[red]model.losses[0][/]")
    assert stream.getvalue() == "[red]model.losses[0][/]\n"


def test_a_terminal_shows_the_stages_with_their_newest_values(stream: io.StringIO) -> None:
    with Console(stream, live=True) as console:
        console.plan(["prepare", "stage1"])
        console.stage_started("stage1")
        console.progress(
            "stage1",
            {"epoch": 2, "epochs": 4, "step": 5, "steps": 10, "train/loss": 1.25, "val/top1": 0.5},
        )
    shown = stream.getvalue()
    assert "2/4" in shown
    assert "5/10" in shown
    assert "1.25" in shown
    assert "0.5" in shown


def test_a_table_of_results_holds_every_row(stream: io.StringIO) -> None:
    Console(stream).final_table("Results", ("arm", "top1"), [["stage2", "0.9"], ["none", "0.8"]])
    text = stream.getvalue()
    assert all(word in text for word in ("Results", "stage2", "0.9", "none", "0.8"))


@pytest.mark.parametrize("live", [False, True])
def test_the_log_has_the_lines_and_results_that_were_shown(
    stream: io.StringIO, caplog: pytest.LogCaptureFixture, live: bool
) -> None:
    caplog.set_level(logging.INFO, "pipelines.terminal.console")
    with Console(stream, live=live) as console:
        console.plan(["stage1"])
        console.stage_started("stage1")
        console.note("100 % of it")
        console.epoch("stage1", {"epoch": 1, "epochs": 2, "val/top1": 0.25})
        console.final_table("Results", ("arm", "top1"), [["stage2", "0.9"]])
    assert caplog.messages == [
        "stage1: started",
        "100 % of it",
        "stage1: epoch 1/2, val/top1 0.25",
        "Results\narm  top1\nstage2  0.9",
    ]


def test_chatter_goes_to_the_log_and_the_console_keeps_its_stream(tmp_path: Path) -> None:
    code = """
import logging, os, sys, warnings
from pathlib import Path
from pipelines.terminal.logs import captured_output
with captured_output(Path(sys.argv[1])) as (out, err, log):
    print("print to stdout")
    print("print to stderr", file=sys.stderr)
    logging.getLogger("ray.data").info("a log line")
    warnings.warn("a warning")
    os.system("echo from a child process")
    out.write("kept out\\n")
    err.write("kept err\\n")
print("after")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "kept out\nafter\n"
    assert done.stderr == "kept err\n"
    (log,) = tmp_path.iterdir()
    text = log.read_text()
    chatter = ("print to stdout", "print to stderr", "a log line", "a warning", "child process")
    assert all(line in text for line in chatter)


def test_streams_and_logging_are_as_before_after_an_error(tmp_path: Path) -> None:
    before = (sys.stdout, sys.stderr, logging.getLogger().handlers[:])
    with pytest.raises(RuntimeError, match="boom"), captured_output(tmp_path):
        raise RuntimeError("boom")
    assert (sys.stdout, sys.stderr, logging.getLogger().handlers[:]) == before
    with captured_output(tmp_path) as (_, _, log):
        os.write(1, b"descriptor\n")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("second capture", stacklevel=1)
    assert "descriptor" in log.read_text()


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=100 * 10**6,
            log_to_driver=False,
        )
    yield
    if started_here:
        ray.shutdown()


def test_progress_of_a_ray_worker_reaches_the_console(local_ray: None, stream: io.StringIO) -> None:
    import ray

    from pipelines.terminal.progress import report_epoch, report_step, watch_progress

    @ray.remote(num_cpus=0)
    def work() -> None:
        report_step("stage1", {"step": 1, "steps": 2, "train/loss": 3.0})
        report_epoch("stage1", {"epoch": 1, "epochs": 2, "val/top1": 0.75})

    console = Console(stream)
    with watch_progress(console):
        ray.get(work.remote())
        deadline = time.monotonic() + 60  # updates are sent without waiting for them
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    ray.get(work.remote())  # nobody watches any more: still no error
    assert stream.getvalue() == "stage1: epoch 1/2, val/top1 0.75\n"


@pytest.mark.parametrize("error", [ValueError("no actor"), RuntimeError("the GCS is gone")])
def test_progress_that_cannot_be_sent_does_not_end_a_training(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from pipelines.terminal import progress

    asked = []

    def lost(name: str) -> None:
        asked.append(name)
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_actor", lost)
    progress.report_epoch("stage1", {"train/loss": 1.0})
    progress.report_note("a file is unreadable")
    assert asked == [progress.BOARD_NAME] * 2


def test_a_name_that_is_no_text_reaches_the_terminal_as_its_stream_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = (tmp_path / "terminal").open("w", encoding="utf-8", errors="backslashreplace")
    saved = os.dup(1)
    os.dup2(target.fileno(), 1)
    try:
        with open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            with captured_output(tmp_path / "logs") as (stream, _, _):
                stream.write("caf\udce9.jpg\n")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        target.close()
    assert (tmp_path / "terminal").read_text() == "caf\\udce9.jpg\n"


def test_the_log_leaves_out_what_ray_repeats_each_second(tmp_path: Path) -> None:
    with captured_output(tmp_path) as (_, _, log):
        print("before")
        print("(pid=1) Failed to query Ray Train Controller actor state. State API may be away.")
        print("after")
    assert log.read_text() == "before\nafter\n"
