"""Runs a training as one Ray Train run. This is the driver's side.

Imports neither torch nor the networks, which would slow the start of every stage in the driver and
in Ray's Train controller. `pipelines/training/worker.py` is the side of the workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.stages.spec import StageContext, StageSpec, upstream_folders
from pipelines.training.files import BEST, CHECKPOINT, COMPUTED_ON, HISTORY, rows_of
from pipelines.training.job import Training

if TYPE_CHECKING:
    from data_prep.manifest import Manifest, TaskTable
    from pipelines.settings.sections import Settings
    from pipelines.storage import Store


def run(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """Trains, or continues a training. Returns the stage's result."""
    if not context.store.exists(f"{spec.folder}/{BEST}"):  # written after all other files
        _fit(spec, context)
    writer = context.tracker.metric_writer(context.stage_run_id, spec.key)
    for epoch in context.store.read_json(f"{spec.folder}/{HISTORY}.json"):
        writer.write(epoch)  # skips epochs already logged
    context.store.delete(context.store.join("training", spec.key))
    return result_of(spec, context.store)


def result_of(spec: StageSpec, store: Store) -> dict[str, Any]:
    """Returns the result of a finished training: best holdout figures, model folder, rows.

    And the hardware that computed it.
    """
    history = store.read_json(f"{spec.folder}/{HISTORY}.json")
    figures = store.read_json(f"{spec.folder}/{BEST}")
    meta = store.read_json(f"{spec.folder}/{CHECKPOINT}/meta.json")
    shown = {k: figures[k] for k in ("holdout/loss", "holdout/bpp", "holdout/top1") if k in figures}
    return {
        "model_folder": CHECKPOINT,
        "metrics": figures,
        "rows": rows_of(history),
        COMPUTED_ON: [meta[COMPUTED_ON]],
        "summary": ", ".join(f"{k.split('/')[1]} {v:.4g}" for k, v in shown.items()),
    }


def training_of(
    spec: StageSpec, specs: Mapping[str, StageSpec], prepared: str, table: TaskTable, store: Store
) -> Training:
    """Returns the job for the workers of a stage. `prepared` is the folder of the shards."""
    from data_prep.manifest import read_manifest

    assert spec.stage.recipe is not None
    return Training(
        name=spec.name,
        kind=spec.kind,
        key=spec.key,
        settings=spec.settings,
        section=spec.training,
        recipe=spec.stage.recipe,
        prepared=prepared,
        folder=spec.folder,
        checkpoints=store.join("training", spec.key),
        # The shards may lie elsewhere than the chain would prepare them.
        upstream={**upstream_folders(spec, specs), "prepare": prepared},
        preparation=preparation(spec.settings, table, read_manifest(prepared)),
    )


def preparation(settings: Settings, table: TaskTable, manifest: Manifest) -> dict[str, Any]:
    """Returns how images became rows, without paths.

    `mantis score` prepares other images in the same way.
    """
    data = settings.data.model_dump(mode="json", exclude={"root"})
    data["sources"] = [
        {**source, "path": "."} if "path" in source else source for source in data["sources"]
    ]
    return {
        "seed": manifest.seed,
        "data": data,
        "batch_size": settings.evaluate.batch_size,
        "masks": list(table.masks),
        "ignored": [list(values) for values in table.ignored],
        "data_fingerprint": manifest.fingerprint,
    }


def _fit(spec: StageSpec, context: StageContext) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.storage import Store
    from pipelines.training.callback import StageCallback
    from pipelines.training.checkpoints import drop_notes
    from pipelines.training.process_group import torch_config

    cluster = spec.settings.cluster
    checkpoints = Store(context.store.join("training", spec.key))
    drop_notes(checkpoints)
    writer = context.tracker.metric_writer(context.stage_run_id, spec.key)
    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    trainer = TorchTrainer(
        start_worker,
        train_loop_config={
            "training": training_of(
                spec, context.specs, context.manifest_folder, context.table, context.store
            )
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
            # StageCallback counts the restarts, and ends at errors that no restart mends.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[StageCallback(writer, cluster.max_failures)],
        ),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            result = trainer.fit()
        if result.error is not None:
            raise result.error
    except Exception:
        # Ray Train has many errors for a failed write: test the storage itself.
        checkpoints.check_writable()
        raise


def start_worker(config: dict[str, Any]) -> None:
    """Runs in each Ray Train worker. Imports the training loop there only."""
    from pipelines.training.worker import ray_worker

    ray_worker(config)
