"""What Ray costs a training step: a stage in the pipeline against the same loop in plain PyTorch.

    python -m benchmarks.overhead --config configs/quickstart.yaml --stage stage1 --pairs 3 \
        [key=value ...]

The stage is trained again and again, in turn by the pipeline (Ray Train with one worker, rows read
by Ray Data tasks in processes of their own) and by a fresh process without Ray (`train_stage` of
benchmarks/plain_chain.py: the same recipe and `mantis_core.training.fit`, rows decoded by as many
threads as there are cores). Both give torch a thread a core, and the hashes of their rows tell
whether they took the same batches. What the stage needs is prepared and trained first.

A step's time is that from the end of the step before it, so waiting for data counts; the first
steps of each epoch are warm-up. The last line is one JSON object: `step_ratio` is the median over
pairs of median step times, pipeline by plain; `mean_ratio` that of mean step times; `epoch_ratio`
that of whole epochs from their first request for data, holdout figures and checkpoints left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.plain_chain import Work, train_stage, upstream_folders
from benchmarks.program import one_message
from mantis_core.training import Session
from pipelines import trainer
from pipelines.console import Console
from pipelines.run_record import read_result
from pipelines.settings import load_settings
from pipelines.stages import Plan, make_plan, run_chain
from pipelines.storage import Store

WARM_UP = 10  # steps of each epoch
Clock = list[list[float]]
"""For each epoch, the moment it began and the end of each of its steps, in seconds."""


@dataclass(frozen=True)
class Times:
    """Seconds a step: median and mean after the warm-up, and of whole epochs."""

    median: float
    mean: float
    epoch: float


def times_of(clock: Clock, warm_up: int = WARM_UP) -> Times:
    """ValueError if no epoch has a step after the warm-up."""
    steps = [
        after - before
        for epoch in clock
        for before, after in zip(epoch[warm_up:], epoch[warm_up + 1 :], strict=False)
    ]
    if not steps:
        raise ValueError(f"no epoch has more than {warm_up} steps: give it more images")
    whole = sum(epoch[-1] - epoch[0] for epoch in clock) / sum(len(epoch) - 1 for epoch in clock)
    return Times(median(steps), fmean(steps), whole)


def ratios(pairs: Sequence[tuple[Times, Times]]) -> dict[str, float]:
    """Pipeline by plain, the median over pairs."""
    return {
        "step_ratio": median(ray.median / plain.median for ray, plain in pairs),
        "mean_ratio": median(ray.mean / plain.mean for ray, plain in pairs),
        "epoch_ratio": median(ray.epoch / plain.epoch for ray, plain in pairs),
    }


@contextmanager
def clocked() -> Iterator[Clock]:
    """Notes when epochs begin and steps end in every Session of this process."""
    epochs: Clock = []
    train_epoch, step = Session.train_epoch, Session.step

    def timed_epoch(self: Session, *arguments: Any) -> dict[str, float]:
        epochs.append([time.perf_counter()])
        return train_epoch(self, *arguments)

    def timed_step(self: Session, batch: Any) -> Any:
        output = step(self, batch)
        epochs[-1].append(time.perf_counter())
        return output

    Session.train_epoch, Session.step = timed_epoch, timed_step
    try:
        yield epochs
    finally:
        Session.train_epoch, Session.step = train_epoch, step


def timed_worker(config: dict[str, Any]) -> None:
    """In place of `pipelines.trainer.start_worker`: the same loop under the clock."""
    from pipelines.worker import worker_loop

    with clocked() as epochs:
        worker_loop(config)
    Path(config["folder"], "clock.json").write_text(json.dumps(epochs))


def in_pipeline(plan: Plan, stage: str) -> tuple[Clock, list[str]]:
    """Trains the stage anew through the chain; its clock and the hashes of its rows."""
    spec = next(spec for spec in plan.specs if spec.name == stage)
    store = Store(plan.settings.storage.root)
    store.delete(spec.folder)
    trainer.start_worker = timed_worker
    done = run_chain(plan, console=Console(sys.stderr), config_name="overhead", until=spec.kind)
    return store.read_json(f"{spec.folder}/clock.json"), done.stages[stage].rows["sha256"]


def in_plain_pytorch(plan: Plan, stage: str) -> tuple[Clock, list[str]]:
    """Trains the stage anew without Ray, in a process of its own; as `in_pipeline`."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(train_plainly, (plan, stage))


def train_plainly(plan: Plan, stage: str) -> tuple[Clock, list[str]]:
    specs = {spec.name: spec for spec in plan.specs}
    spec, store = specs[stage], Store(plan.settings.storage.root)
    store.delete(spec.folder)
    work = Work(spec, upstream_folders(spec, plan), specs["prepare"].folder, jobs=1)
    with clocked() as epochs:
        train_stage(work)
    return epochs, read_result(store, spec)["rows"]["sha256"]


@one_message
def main() -> int:
    """Trains what the stage needs, then the stage by either loop in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--stage", default="stage1", choices=("teacher", "stage1", "stage2"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    own = (
        "cluster.workers=1",
        f"cluster.gpus_per_worker={int(torch.cuda.is_available())}",
        f"cluster.threads_per_worker={len(os.sched_getaffinity(0))}",
        "tracking.enabled=false",
    )
    with tempfile.TemporaryDirectory(prefix="mantis-overhead-") as folder:
        overrides = [*arguments.overrides, *own, f"storage.root={folder}"]
        plan = make_plan(load_settings(arguments.config, overrides))
        in_pipeline(plan, arguments.stage)  # makes what the stage needs, and warms the disk
        pairs, same_rows = [], True
        for number in range(arguments.pairs):
            ray_clock, ray_rows = in_pipeline(plan, arguments.stage)
            plain_clock, plain_rows = in_plain_pytorch(plan, arguments.stage)
            pairs.append((times_of(ray_clock), times_of(plain_clock)))
            same_rows = same_rows and ray_rows == plain_rows
            shown = [f"{each.median * 1000:.1f} ms" for each in pairs[-1]]
            print(f"pair {number + 1}: pipeline {shown[0]}, plain {shown[1]}", file=sys.stderr)
    told = [{"pipeline": asdict(ray), "plain": asdict(plain)} for ray, plain in pairs]
    print(json.dumps({**ratios(pairs), "same_rows": same_rows, "pairs": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
