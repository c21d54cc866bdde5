"""What all tests share: the environment of Ray, set before its import, and one local Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)

for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)  # a developer's own store


HERE = Path(__file__).parent
LONGEST = (
    "pipelines/test_end_to_end.py",
    "pipelines/extending/test_add_task.py",
    "pipelines/tracking/test_registry.py",
    "pipelines/export/test_export.py",
    "mantis_core/training/test_many_workers.py",
    "pipelines/serving/test_end_to_end.py",
    "mantis_core/training/test_one_graph.py",
    "benchmarks/test_scale.py",
    "mantis_core/codec/test_adding.py",
    "pipelines/commands/test_commands.py",
    "pipelines/chain/test_dry_build.py",
    "benchmarks/test_digests.py",
)
"""The files that take longest. They begin first: one that began last would end alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of LONGEST first, the rest as they are."""
    place = {HERE / name: number for number, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in place), "LONGEST names a file that is not there"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for those Ray Data raises about its own settings on copying them."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:ray.data.context")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One Ray of two CPUs for the whole test session."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
