"""benchmarks/scale.py: the made-up folder goes through all of a preparation."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def scale(*arguments: str) -> tuple[dict[str, Any], str]:
    """The program's JSON object and what it said."""
    command = [sys.executable, "-m", "benchmarks.scale", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_made_up_folder_is_prepared_and_each_size_has_a_figure() -> None:
    result, said = scale("--images", "800,1600", "--classes", "4", "--files", "40")
    assert [size["images"] for size in result["sizes"]] == [800, 1600]
    assert result["peak_mb"] == result["sizes"][-1]["peak_mb"] > 0
    assert isinstance(result["driver_bytes_per_row"], int)
    assert "800 images" in said
    parquet, images = result["calls"]["parquet"], result["calls"]["images"]
    assert parquet["calls_per_file"] == pytest.approx(3 + 1 / 40, abs=0.01)  # and the listing
    assert images["calls_per_file"] == 2
    assert min(parquet["most_in_flight"], images["most_in_flight"]) > 1


def test_a_row_takes_few_bytes_of_the_driver() -> None:
    result, _ = scale("--images", "30000", "--classes", "20", "--files", "1")
    assert result["sizes"][0]["arrow_bytes_per_row"] < 220
    assert result["driver_bytes_per_row"] is None
