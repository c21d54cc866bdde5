"""One training stage as one Ray Train run, seen from the driver. The loop itself is worker.py.

Imports neither torch nor mantis_core's models: driver and Train controller would pay for them at
the start of every stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mantis_core.config import TrainingConfig
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.plan import StageSpec
    from pipelines.stages import StageContext

CHECKPOINT = "checkpoint"
"""Where, in a stage's folder, its model folder is."""
HISTORY = "history"
"""Figures of all epochs: a metric of every report (JSON text), in the end a file of the stage."""
BEST = "best.json"
"""Figures of the best epoch, written when the model folder is complete."""
ROWS = "train/rows"
"""Rows an epoch consumed; begins the names of all that is told of them, the same in every epoch."""
ROWS_LEFT_OUT = "train/rows_left_out"
"""Training rows that filled no global batch in an epoch; others in the next."""
ROWS_SHA256 = "train/rows_sha256"
"""Which rows each step of an epoch consumed, whatever the number of workers; text."""


def train(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """Runs or resumes a training stage; returns its result (best holdout figures, model folder)."""
    if not context.store.exists(f"{spec.folder}/{BEST}"):  # written when all else is in place
        _fit(spec, context)
    writer = context.tracker.metric_writer(context.stage_run_id, spec.key)
    history = context.store.read_json(f"{spec.folder}/{HISTORY}.json")
    for epoch in history:
        writer.write(epoch)  # those already logged are skipped
    context.store.delete(context.store.join("training", spec.key))
    figures = context.store.read_json(f"{spec.folder}/{BEST}")
    shown = {k: figures[k] for k in ("holdout/loss", "holdout/bpp", "holdout/top1") if k in figures}
    return {
        "model_folder": CHECKPOINT,
        "metrics": figures,
        "rows": rows_of(history),
        "summary": ", ".join(f"{k.split('/')[1]} {v:.4g}" for k, v in shown.items()),
    }


def rows_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a training consumed: rows an epoch, rows left out of each, a hash for every epoch."""
    return {
        "per_epoch": history[-1][ROWS],
        "left_out": history[-1][ROWS_LEFT_OUT],
        "sha256": [epoch[ROWS_SHA256] for epoch in history],
    }


def _fit(spec: StageSpec, context: StageContext) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.process_group import torch_config
    from pipelines.run_checkpoints import drop_unreadable_notes
    from pipelines.schedule import check_batches
    from pipelines.stage_callback import StageCallback
    from pipelines.storage import Store

    check_batches([spec])  # a sample of a search is checked by nobody before
    cluster = spec.settings.cluster
    checkpoints = context.store.join("training", spec.key)
    drop_unreadable_notes(Store(checkpoints))
    writer = context.tracker.metric_writer(context.stage_run_id, spec.key)
    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    trainer = TorchTrainer(
        start_worker,
        train_loop_config={
            "name": spec.name,
            "kind": spec.kind,
            "key": spec.key,
            "settings": spec.settings.model_dump(mode="json"),
            "manifest_folder": context.manifest_folder,
            "folder": spec.folder,
            "checkpoints": checkpoints,
            "upstream": {
                context.specs[name].kind: context.specs[name].folder for name in spec.upstream
            },
        },
        torch_config=torch_config(cluster.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,  # a tuple is elastic
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=RunConfig(
            name=spec.key,
            storage_path=context.store.join("training"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=2
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[StageCallback(writer)],
        ),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            result = trainer.fit()
        if result.error is not None:
            raise result.error
    except Exception:
        # Ray Train tells in many ways that it could not write: ask the storage itself.
        Store(checkpoints).check_writable()
        raise


def start_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker; only there the loop and its libraries are imported."""
    from pipelines.worker import worker_loop

    worker_loop(config)


def training_config(settings: Settings, kind: str) -> TrainingConfig:
    """The section that says how long and how fast a training kind trains."""
    return TRAINING_SECTIONS[kind](settings)


TRAINING_SECTIONS: dict[str, Callable[[Settings], TrainingConfig]] = {
    "teacher": lambda settings: settings.teacher.training,
    "stage1": lambda settings: settings.stage1,
    "stage2": lambda settings: settings.stage2,
    "individual": lambda settings: settings.individual,
    "codec_teacher": lambda settings: settings.codec_teacher,
}
