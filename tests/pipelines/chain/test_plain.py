"""The stage chain without Ray and MLflow: the same stages, under the same keys."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.chain.plan import make_plan
from pipelines.settings.reading import load_settings
from pipelines.stages.record import stage_state
from pipelines.stages.spec import with_upstream
from pipelines.storage import Store
from tests.pipelines.experiment import CLASSES, VAL_ROWS, mantis, paint, write_config

ROOT = Path(__file__).resolve().parents[3]
# As on a machine that has neither: an import of either fails.
RUN = """
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None
from pipelines.__main__ import main

if __name__ == "__main__":
    main()
"""
SAID = re.compile(r"(\S+) seed \d+: |(\S+:) \{")  # a stage is trained, an arm is measured


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_finishes_the_stages_that_the_chain_would(tmp_path):
    paint(tmp_path / "images", train=12)
    config = write_config(tmp_path)
    mantis("prepare", "--config", str(config), folder=tmp_path)
    prepared = next((tmp_path / "runs/stages").glob("prepare-*"))
    script = tmp_path / "plain.py"
    script.write_text(RUN)
    root = tmp_path / "plain"
    tuned = "codec_teacher={epochs: 1, batch_size: 16}"
    overrides = [f"storage.root={root}", "evaluate.codec_teachers=true", tuned]
    command = [sys.executable, str(script)]
    done = subprocess.run(
        [
            *command,
            "run",
            "--plain",
            str(prepared),
            "--config",
            str(config),
            "--jobs",
            "2",
            "--json",
            *overrides,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = filter(None, map(SAID.match, done.stderr.splitlines()))
    said = [line[1] or line[2] for line in lines]
    assert said[0] == "stage1"
    assert said[-1] == "evaluate"
    trained = [name for name in said[:-1] if not name.endswith(":")]
    assert sorted(trained) == ["codec_teacher/webp", "stage1", "stage2"]
    measured = [name for name in said if name.endswith(":")]
    # MANTiS, told the tasks, the teacher; two qualities in front of it and of the tuned one.
    assert len(measured) == len(set(measured)) == 3 + 2 * 2
    assert said.index("stage2") < said.index("stage2:")
    assert "epoch 1 of 1" in done.stderr
    plan = make_plan(load_settings(str(config), overrides))
    specs = {spec.name: spec for spec in with_upstream(plan.specs, "evaluate")}
    states = {name: stage_state(Store(str(root)), spec, None) for name, spec in specs.items()}
    assert states.pop("prepare") == "new"
    assert states == dict.fromkeys(("stage1", "stage2", "codec_teacher/webp", "evaluate"), "done")
    written = Path(specs["evaluate"].folder, "evaluation.json")
    result = json.loads(done.stdout)
    assert set(result["stages"]) == {"stage1", "stage2", "codec_teacher/webp", "evaluate"}
    assert {stage["status"] for stage in result["stages"].values()} == {"ran"}
    assert (written.parent / "report/report.html").is_file()
    evaluation = json.loads(written.read_text())
    assert evaluation["rows"] == VAL_ROWS * len(CLASSES)
    by_kind = {arm["kind"]: arm["metrics"] for arm in evaluation["arms"]}
    assert by_kind.keys() == {"mantis", "oracle", "teacher", "webp", "webp_tuned"}
    assert by_kind["mantis"]["val/wire_bytes"] > by_kind["mantis"]["val/payload_bytes"] > 0
