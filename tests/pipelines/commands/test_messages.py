"""What a command says of an error that it did not expect: one message, a remedy, no traceback."""

from __future__ import annotations

import errno
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipelines.commands.errors import INTERRUPTED, Stopped, ending_well, resumable
from pipelines.commands.messages import EXTRAS, NEEDED_BY_RUNS, SHOW_TRACEBACKS, printable, told
from pipelines.stages.spec import StageFailed
from tests.root import ROOT


def ended(error: BaseException) -> Any:
    """The end of a command that meets the error."""

    def encode() -> None:
        raise error

    app = typer.Typer()
    app.command()(ending_well(encode))
    return CliRunner().invoke(app, [])


def of(number: int, name: str | bytes | None = "/data/x") -> OSError:
    return OSError(number, os.strerror(number), name) if name else OSError(number, "why")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (of(errno.ENOSPC), 1, "/data/x: No space left on device; free some space there"),
        (of(errno.ENOSPC), 1, "TMPDIR"),
        (of(errno.EIO), 1, "/data/x: Input/output error; the disk or the network drive"),
        (of(errno.EMFILE), 1, "Too many open files; raise the limit of open files"),
        (of(errno.EROFS), 2, "/data/x: Read-only file system; check its permissions"),
        (of(errno.EACCES), 2, "/data/x: Permission denied; check its permissions"),
        (of(errno.ENOENT), 2, "/data/x: No such file or directory; check the path"),
        (of(errno.EISDIR), 2, "it is a folder, and a file is needed"),
        (of(errno.EACCES, b"/d/caf\xe9.jpg"), 2, r"/d/caf\xe9.jpg: Permission denied"),
        (of(errno.EACCES, "/d/caf\udce9.jpg"), 2, r"/d/caf\xe9.jpg: Permission denied"),
        (OSError("s3://b/x cannot be written: slow down"), 1, "s3://b/x cannot be written"),
        (FileNotFoundError("no such file: s3://b/x"), 1, "no such file: s3://b/x"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 1, "refused"),
        (MemoryError(), 1, "out of memory: use smaller batches"),
    ],
)
def test_an_error_of_the_system_names_its_place_and_a_remedy(
    error: BaseException, code: int, message: str
) -> None:
    done = ended(error)
    assert done.exit_code == code, done.output
    assert f"error: {message}" in done.stderr or message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_an_error_nobody_has_foreseen_is_one_message_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = ended(KeyError("holdout/loss"))
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()
    assert first == "error: KeyError: 'holdout/loss'"
    (file,) = tmp_path.iterdir()
    assert second == (
        f"This is a fault of MANTiS or of a library that it uses. Its traceback is in {file}."
    )
    assert "raise error" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_traceback_can_be_asked_for_and_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert f"{SHOW_TRACEBACKS}=1 shows its traceback" in ended(KeyError("x")).stderr
    monkeypatch.setenv(SHOW_TRACEBACKS, "1")
    done = ended(KeyError("x"))
    assert done.stderr.startswith("Traceback")
    assert done.exit_code == 1


def test_an_error_carries_its_exit_code() -> None:
    class Own(ValueError):
        exit_code = 3

    done = ended(Own("three"))
    assert (done.exit_code, done.stderr) == (3, "error: three\n")
    assert ended(KeyboardInterrupt()).exit_code == INTERRUPTED


@pytest.mark.parametrize(
    ("command", "plain", "package", "extra"),
    [
        ("encode", False, "constriction.stream", "client"),
        ("encode", False, "mlflow", "train"),
        ("decode", False, "torchvision", "server"),
        ("run", False, "ray", "train"),
        ("run", True, "compressai", "plain"),
        ("up", False, "ray.util.state", "cluster"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    command: str, plain: bool, package: str, extra: str
) -> None:
    known = told(ModuleNotFoundError("No module", name=package), command, plain=plain)
    assert known is not None
    assert known.code == 2
    assert f"needs the package {package.partition('.')[0]}, which is not installed" in known.text
    assert known.text.endswith(f"installed: pip install 'mantis-codec[{extra}]'")


def test_a_missing_module_of_our_own_is_a_fault() -> None:
    assert told(ModuleNotFoundError("No module", name="pipelines.nothing"), "run") is None


def test_every_extra_that_a_message_names_exists_and_brings_what_it_should() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {*EXTRAS.values(), "train", "plain"} <= set(extras)
    assert all(any(each.startswith(name) for each in extras["train"]) for name in NEEDED_BY_RUNS)
    heavy = ("ray", "mlflow", "compressai", "torchvision", "pyarrow", "matplotlib", "optuna")
    alone = [*project["dependencies"], *extras["client"]]
    assert [each for each in alone if each.startswith(heavy)] == []


def run_that_fails(error: BaseException) -> Stopped:
    """How a run ends that has a log and meets the error."""
    with pytest.raises(Stopped) as stopped, resumable("mantis run -c x.yaml") as details:  # noqa: PT012
        details.append("runs/logs/today.log")
        raise error
    return stopped.value


def test_a_failed_stage_with_an_error_of_the_system_has_a_remedy_and_can_be_resumed() -> None:
    end = run_that_fails(StageFailed("stage1", of(errno.ENOSPC, "/data/stages")))
    text = str(end)
    assert end.code == 1
    assert text.startswith("stage1 failed: /data/stages: No space left on device; free some space")
    assert text.endswith("Details are in runs/logs/today.log. Resume with:\n  mantis run -c x.yaml")


def test_a_fault_in_a_run_names_the_log_that_has_the_traceback() -> None:
    text = str(run_that_fails(TypeError("None is no number")))
    assert text.startswith("TypeError: None is no number\nThis is a fault of MANTiS")
    assert "Its traceback is in runs/logs/today.log." in text
    assert text.endswith("Resume with:\n  mantis run -c x.yaml")


def test_a_name_that_is_no_text_can_be_printed() -> None:
    assert printable(b"a\xff.jpg") == r"a\xff.jpg"
    assert printable(Path("é.jpg")) == "é.jpg"
    assert printable(7) == "7"
