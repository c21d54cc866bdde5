"""How this package runs Ray Data: quietly, in order, in small blocks. Holds no transforms.

The only file here that imports Ray at its top; others import it inside the functions that need it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

BLOCK_BYTES = 8 * 2**20
"""Least size of a block but the last. Blocks leave a task while it still runs. A reading task
yields 64 rows at once: at 224 px these are one block, which smaller blocks would cut with a copy.
"""
STEP_SECONDS = 0.05
DATA_LABEL = {"ray-subcluster": "data"}
"""Label of the nodes reserved for Ray Data, where a cluster has such nodes."""


class PausedStep(ExecutionCallback):  # type: ignore[misc]
    """Pauses the executor between two steps of its loop.

    Ray 2.60's loop waits for blocks, but not while ready blocks are held back for a slower
    consumer. It then spins, which takes half a core and the interpreter lock of the process that
    trains.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Sleeps; called by Ray Data after each step."""
        time.sleep(STEP_SECONDS)


def data_nodes() -> list[dict[str, Any]]:
    """Returns the living nodes reserved for Ray Data, as ray.nodes() describes them."""
    label = DATA_LABEL.items()
    return [node for node in ray.nodes() if node["Alive"] and label <= node["Labels"].items()]


def reading_cpus() -> float:
    """Returns the number of CPUs of the data nodes, or of all nodes where there are none."""
    nodes = data_nodes()
    cpus = [node["Resources"].get("CPU", 0.0) for node in nodes]
    return float(sum(cpus) if nodes else ray.cluster_resources().get("CPU", 1.0))


def map_tables(
    tables: Sequence[pa.Table],
    function: Callable[..., Any],
    *,
    num_cpus: float,
    max_tasks: int | None = None,
    confined: bool = True,
    **arguments: Any,
) -> Dataset:
    """Applies function(table, **arguments) to each table in a Ray task; returns a lazy dataset.

    Results keep the order of the tables. `function` returns a batch or yields several. A task
    claims `num_cpus`, and at most `max_tasks` run at once (None: as many as fit). Tasks run on the
    data nodes where there are any, and elsewhere only once those are lost. With `confined`,
    whatever else is made of the dataset runs on the data nodes as well.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    dataset = ray.data.from_arrow(list(tables))
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    context.raise_original_map_exception = True  # not one that says only that a block failed
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [PausedStep]
    placed: dict[str, Any] = {}
    if data_nodes():
        # The label of a task alone is not enough: Ray Data would count on other nodes' CPUs.
        context.execution_options.label_selector = DATA_LABEL if confined else None
        placed = {"label_selector": DATA_LABEL, "fallback_strategy": [{"label_selector": {}}]}
    return dataset.map_batches(
        function,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs=arguments,
        num_cpus=num_cpus,
        compute=TaskPoolStrategy(max_tasks),
        **placed,
    )
