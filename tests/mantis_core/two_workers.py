"""Two gloo processes train stage 2 for two steps and write what each ended with. Run by a test.

python tests/mantis_core/two_workers.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_batch, make_problem, make_stage2
from torch import nn

from mantis_core.tasks import Batch
from mantis_core.training.loop import Session
from mantis_core.training.means import gather_rows


def worker(rank: int, folder: str) -> None:
    """Each rank has images of another task; holdout shares differ in size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    problem = make_problem()
    recipe = make_stage2(problem)
    session = Session(recipe, recipe.config, steps_per_epoch=2, seed=0, rank=rank)
    session.distribute(lambda module: nn.parallel.DistributedDataParallel(module))
    classes = ((0, 1, 2), (3, 5))[rank]
    batches = [make_batch(problem, 4, seed=2 * i + rank, classes=classes) for i in range(2)]
    for step, batch in enumerate(batches):
        batch.row_id[:] = torch.arange(4) + 4 * rank + 8 * step
    holdout = [make_batch(problem, 3 + rank, seed=9 + rank)]

    def share() -> list[Batch]:
        return holdout

    figures = session.train_epoch(batches) | session.evaluate(share)
    rows = gather_rows(torch.full((rank + 1, 2), float(rank)))
    own = {name: value.double().sum().item() for name, value in recipe.student.state_dict().items()}
    record = {"figures": figures, "rows": rows[:, 0].tolist(), "weights": own}
    record["sha256"] = session.rows_sha256
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, not spawned: what is imported above takes seconds and is imported once.
    torch.multiprocessing.start_processes(
        worker, args=(sys.argv[1],), nprocs=2, start_method="fork"
    )
