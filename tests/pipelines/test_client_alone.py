"""A machine that has only what a client needs: the commands that work, and what the others say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.root import ROOT

STREAM = ROOT / "tests" / "golden" / "primary.mts"
WITHOUT = """
import contextlib, importlib.abc, io, json, sys
EXTRAS = ("bjontegaard", "compressai", "jinja2", "matplotlib", "mlflow", "optuna", "pandas",
          "psutil", "pyarrow", "ray", "scipy", "torchdistill", "torchmetrics", "torchvision")

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from pipelines.__main__ import main
ends = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["mantis", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    ends.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_a_client_needs_none_of_the_extras_and_other_commands_name_theirs(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "x.yaml").write_text(
        "data: {sources: [{kind: shapes}]}\ntasks: [{name: outline, classes_from: shapes}]\n"
    )
    commands = [
        ["info", str(STREAM)],
        ["encode", "nowhere", "a.png", "-o", "a.mts"],  # imports all of the client first
        ["decode", "nowhere", str(STREAM)],
        ["check"],
        ["run", "-c", "x.yaml", "--plain"],
        ["models"],
        ["cluster", "up"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    info, encode, *others = json.loads(done.stdout.splitlines()[-1])
    assert info[0] == 0
    assert "input_shape" in info[1]
    assert encode[0] == 2
    assert encode[2].startswith("error: nowhere")
    extras = ("server", "plain", "plain", "train", "cluster")
    for (code, out, err), extra in zip(others, extras, strict=True):
        assert (code, out) == (2, ""), err
        assert "which is not installed" in err
        assert err.endswith(f"installed: pip install 'mantis-codec[{extra}]'\n"), err
