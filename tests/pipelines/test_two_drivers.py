"""Two drivers with one storage root in a bucket, where no file system locks."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from pipelines.commands.errors import MISTAKE
from pipelines.lease import NAME
from pipelines.storage import Store
from tests.faults.harness import Command, descendants
from tests.pipelines.experiment import last_json, mantis, paint, planned_hashes, write_config
from tests.s3 import S3, s3_environment, s3_server

ROOT = "s3://bucket/runs"
EPOCHS = 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_second_is_refused_and_goes_on_once_the_first_was_killed(tmp_path: Path) -> None:
    paint(tmp_path / "images", train=130)
    config = write_config(tmp_path)
    settings = ["cluster.workers=1", f"stage2.epochs={EPOCHS}", f"storage.root={ROOT}"]
    settings += [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    command = ["run", "--config", str(config), *settings]
    with s3_server() as server, s3_environment(server):
        with Command(command, tmp_path) as first:
            assert first.line(r"stage2: epoch 2/") is not None, first.output
            second = mantis(*command, folder=tmp_path, code=MISTAKE)
            assert "another process works on stage2" in second.stderr
            assert f"process {first.process.pid}" in second.stderr
            assert first.ended is None, "the first ended before the second was refused"
            assert leases(server)
            seen = len(first.lines)
            assert first.line(r"stage2: epoch \d+/", since=seen) is not None, first.output
            ray = descendants([first.process.pid])
            first.process.send_signal(signal.SIGKILL)
            for process in ray:
                process.kill()
            assert first.end(30) is not None
        epochs = [int(each) for each in re.findall(r"stage2: epoch (\d+)/", first.output)]
        assert epochs[-1] < EPOCHS, "the first was to be killed before its last epoch"

        third = mantis(*command, "--json", folder=tmp_path)
        result, printed = last_json(third), third.stdout + third.stderr
        statuses = {name: stage["status"] for name, stage in result["stages"].items()}
        assert (statuses["prepare"], statuses["stage1"]) == ("skipped", "skipped")
        assert statuses["stage2"] == "resumed"
        resumed = [int(each) for each in re.findall(r"stage2: epoch (\d+)/", printed)]
        assert resumed == list(range(resumed[0], EPOCHS + 1))
        assert resumed[0] in (epochs[-1], epochs[-1] + 1)
        assert not leases(server)
        Store(ROOT).download_folder("stages", tmp_path / "runs/stages")
    local = [*settings, f"storage.root={tmp_path / 'runs'}"]
    assert result["stages"]["stage2"]["rows"]["sha256"] == planned_hashes(config, "stage2", *local)


def leases(server: S3) -> list[str]:
    """The keys of the leases in the bucket."""
    return [key for key in server.objects() if key.rpartition("/")[2] == NAME]
