"""benchmarks/scale.py: the made-up folder goes through all of a preparation."""

from __future__ import annotations

import json
import subprocess
import sys


def test_a_made_up_folder_is_prepared_and_each_size_has_a_figure() -> None:
    command = [sys.executable, "-m", "benchmarks.scale", "--images", "800,1600", "--classes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert [size["images"] for size in result["sizes"]] == [800, 1600]
    assert result["peak_mb"] == result["sizes"][-1]["rss_mb"] >= 0
    assert isinstance(result["bytes_per_row"], int)
    assert "800 images" in done.stderr
