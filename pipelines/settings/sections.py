"""The whole config of an experiment, and the sections of `pipelines` itself.

The sections of `mantis_core` and `data_prep` are in their own `config.py`. Importing this file
loads neither torch nor Ray nor MLflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from data_prep.config import DataConfig, TaskConfig
from data_prep.tasks import did_you_mean
from mantis_core.architecture import ModelConfig
from mantis_core.bitstream.container import MAX_TASKS
from mantis_core.config import (
    SHIPPED,
    CodecTeacherConfig,
    ExtendConfig,
    IndividualConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
)
from pipelines.settings.arms import baselines, image_codecs, unfit_requests

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Quality = Annotated[int, Field(ge=0, le=100)]
Scale = Annotated[float, Field(gt=0, le=1)]


def _one_of(allowed: Callable[[], tuple[str, ...]]) -> AfterValidator:
    """Returns a validator that accepts the names `allowed()` returns."""

    def check(name: str) -> str:
        if name not in allowed():
            hint = did_you_mean(name, allowed())
            raise ValueError(f"got {name!r}{hint}; allowed are {', '.join(allowed())}")
        return name

    return AfterValidator(check)


Baseline = Annotated[str, _one_of(baselines)]
CodecName = Annotated[str, _one_of(image_codecs)]


def _some_workers(workers: int | tuple[int, int]) -> int | tuple[int, int]:
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= fewest <= most:
        raise ValueError(
            f"got {workers if isinstance(workers, int) else list(workers)}; give a number of "
            "workers, at least 1, or [fewest, most]"
        )
    return workers


WorkerCount = Annotated[int | tuple[int, int], AfterValidator(_some_workers)]
TEACHER_KEYWORDS = ("train", *SHIPPED)  # any other teacher.weights is a file


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StorageConfig(_Section):
    """Where results are kept."""

    root: str = Field(default="./runs", min_length=1)
    """Folder or URI that all results are written to. A relative folder starts from the one in
    which the command is started. A cluster of several nodes needs a URI that all of them reach."""


class TrackingConfig(_Section):
    """What MLflow records."""

    enabled: bool = True
    """Whether runs are recorded in MLflow. Without MLflow no model is registered."""
    uri: str | None = None
    """MLflow tracking URI. Left out, it is MLFLOW_TRACKING_URI, or else an SQLite file under
    `storage.root`. A remote `storage.root` needs the URI of a server."""
    experiment: str = Field(default="mantis", min_length=1)
    """Name of the MLflow experiment that holds the runs. Left out, it is MLFLOW_EXPERIMENT_NAME,
    or else `mantis`."""
    model: str = Field(default="mantis", pattern=r"^[^/:@\"\s][^/:@\"]*$")
    """Name of the registered model. Its halves are registered as `<name>-client` and
    `<name>-server`. Give each kind of data a name of its own: models of one name take over each
    other's alias `candidate`."""
    system_metrics: bool = True
    """Whether the run of a pipeline gets the use of CPU, memory, disk, network and GPU on the
    driver's machine, every ten seconds. GPUs need the package `nvidia-ml-py`."""


class ClusterConfig(_Section):
    """Where Ray runs and how much it uses. Never part of a stage's key."""

    address: str | None = None
    """Address of a running Ray cluster. Left out, it is RAY_ADDRESS, or else a local Ray starts
    for the command."""
    workers: WorkerCount = 1
    """Number of workers of one training. With `[fewest, most]` a training grows and shrinks
    with the cluster. The global batch stays the same."""
    cpus_per_worker: float = Field(default=1, ge=0)
    """CPUs that Ray reserves for one training worker."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for one training worker or one evaluation actor. The default of 0
    runs both on CPUs."""
    data_cpus: float | None = Field(default=None, gt=0)
    """CPUs that stay free for data tasks. Left out, a local Ray keeps the CPUs that training
    leaves, at least 1, and a cluster keeps 1."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Torch threads of one training worker. Left out, the workers of a node share its cores
    evenly."""
    object_store_mb: int = Field(default=500, ge=100)
    """Shared memory of a local Ray in MB. The default leaves a small machine its memory and
    holds the batches that wait for training."""
    max_failures: int = Field(default=2, ge=0)
    """How often a training restarts from its checkpoint, after a worker was lost, without a
    finished epoch in between. With finished epochs there is no limit: on spot instances a long
    training loses many workers and still ends."""
    checkpoint_every_s: float = Field(default=0, ge=0)
    """Least seconds between two checkpoints of a training on Ray. The default writes one after each
    epoch. More saves time where epochs are short; a training that is killed repeats what it did
    since the last one."""
    start_timeout_s: float = Field(default=120, gt=0)
    """Seconds in which workers must start. With `autoscaling` also the seconds in which new
    nodes must join."""
    collective_timeout_s: float = Field(default=300, gt=0)
    """Seconds that training workers wait for a silent worker before the training fails and
    restarts. The default exceeds the pauses of a busy machine."""
    evaluation_actors: int | None = Field(default=None, ge=1)
    """Largest number of actors that measure images at the same time. Left out, it is one for
    each CPU, on GPUs at most four for each of them, and fewer where memory is short."""
    autoscaling: bool = False
    """Whether the cluster at `address` adds nodes on demand. The command then waits up to
    `start_timeout_s` for them."""

    @property
    def min_workers(self) -> int:
        """The fewest training workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most training workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class EvaluateConfig(_Section):
    """What is measured beside the main arm. Every rate and seed trains a stage 2 of its own."""

    rate_weights: tuple[Rate, ...] = ()
    """Further rate weights at which MANTiS is trained and measured. `stage2.rate_weight` is
    always measured."""
    baselines: tuple[Baseline, ...] = ("none", "oracle", "teacher")
    """Baselines to measure. The default is the cheapest set that shows the gain by conditioning
    (`none`), the loss by detection (`oracle`) and the accuracy without compression (`teacher`)."""
    codecs: dict[CodecName, tuple[Quality, ...]] = Field(default_factory=dict)
    """Image codecs that are measured in front of the teacher, each with a list of Pillow's
    qualities from 0 to 100."""
    codec_scales: tuple[Scale, ...] = Field(default=(1.0,), min_length=1)
    """Shares of an image's sides at which image codecs code it, each with all qualities. At less
    than 1 the image is reduced first, and enlarged again for the teacher. With several the report
    shows the points that no smaller file surpasses."""
    codec_teachers: bool = False
    """Whether each image codec is also measured in front of a teacher that is fine-tuned on its
    images. Off by default, because it trains one teacher for each codec."""
    baseline_rate_weights: tuple[Rate, ...] | None = None
    """Rate weights at which the compressed baselines are trained and measured. Left out, they
    have the main rate alone, which saves training."""
    early_exit: dict[Rate, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Confidence by rate weight. Arms at that rate are measured again with early exit: where
    the client is at least this sure, by its detector or its exit head, it answers itself."""
    batch_size: int = Field(default=128, ge=1)
    """Number of images that an actor measures together."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Further seeds. Each trains all arms but those of the teacher again. `seed` is always
    measured."""


class TuneConfig(_Section):
    """How `mantis tune` learns and stops trials early. Its options name what it searches."""

    stop_early: bool = True
    """Whether weak trials stop at a rung. Without it every trial trains all epochs of stage 2."""
    first_epochs: int = Field(default=1, ge=1)
    """Epochs of stage 2 up to the first rung, where a trial may stop. The default stops weak
    trials as early as possible."""
    reduction_factor: int = Field(default=3, ge=2)
    """One trial in this many continues past a rung; rungs lie this factor of epochs apart."""
    startup_trials: int = Field(default=8, ge=1)
    """Number of trials drawn evenly from the space before the search learns from results."""
    max_failures: int = Field(default=2, ge=0)
    """How often a trial restarts after its process died. After that the trial has failed."""
    concurrent: int | None = Field(default=None, ge=1)
    """Most trials that train at the same time. Left out, as many as fit into the cluster when the
    search begins. An autoscaling cluster begins small: give the number of trials that it is to
    have nodes for."""


class Settings(_Section):
    """The root of a config file."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything random: the holdout, initial weights, the order of images and their
    augmentation."""
    storage: StorageConfig = StorageConfig()
    """Where results are kept."""
    data: DataConfig
    """Where images come from and how they become batches."""
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """Tasks that the codec serves. It needs at least one, and a stream can name 256."""
    teacher: TeacherConfig = TeacherConfig()
    """The uncompressed network that is distilled."""
    model: ModelConfig = ModelConfig()
    """The architecture of the codec."""
    stage1: Stage1Config = Stage1Config()
    """The training of the task-agnostic codec."""
    stage2: Stage2Config = Stage2Config()
    """The training of the task-aware codec."""
    individual: IndividualConfig = IndividualConfig()
    """The training of the baseline `individual`: one uncompressed network for each task."""
    codec_teacher: CodecTeacherConfig = CodecTeacherConfig()
    """The fine-tuning of a teacher on the images of an image codec."""
    extend: ExtendConfig = ExtendConfig()
    """The training of tasks that `mantis add-task` adds to a trained codec."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured beside the main arm."""
    tune: TuneConfig = TuneConfig()
    """How `mantis tune` learns and stops trials early."""
    cluster: ClusterConfig = ClusterConfig()
    """Where Ray runs and how much it uses."""
    tracking: TrackingConfig = TrackingConfig()
    """What MLflow records."""

    @field_validator("tasks")
    @classmethod
    def _a_stream_can_name_them(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        if len(tasks) > MAX_TASKS:
            raise ValueError(
                f"there are {len(tasks)}, and a stream can name {MAX_TASKS}: join some into a task "
                "of more labels, or train several models"
            )
        return tasks

    @model_validator(mode="after")
    def _arms_are_distinct(self) -> Settings:
        rates, seeds = self.evaluate.rate_weights, self.evaluate.seeds
        levels = self.stage2.rate_weights
        if levels and (rates or self.evaluate.baseline_rate_weights is not None):
            raise ValueError(
                "stage2.rate_weights trains one model that is measured at all of them: set "
                "evaluate.rate_weights to [] and evaluate.baseline_rate_weights to null"
            )
        if len(set(rates)) < len(rates) or self.stage2.rate_weight in rates:
            raise ValueError(
                f"evaluate.rate_weights {list(rates)} must differ from each other and from the "
                f"main rate, stage2.rate_weight {self.stage2.rate_weight}, which is always measured"
            )
        scales = self.evaluate.codec_scales
        for name, values in {**self.evaluate.codecs, "codec_scales": scales}.items():
            if len(set(values)) < len(values):
                field = name if values is scales else f"codecs.{name}"
                raise ValueError(f"evaluate.{field} {list(values)} must differ from each other")
        if len(set(seeds)) < len(seeds) or self.seed in seeds:
            raise ValueError(
                f"evaluate.seeds {list(seeds)} must differ from each other and from the main "
                f"seed {self.seed}, which is always measured"
            )
        stray = set(self.evaluate.baseline_rate_weights or ()) - {self.stage2.rate_weight, *rates}
        if stray:
            raise ValueError(
                f"evaluate.baseline_rate_weights has {sorted(stray)}, which no MANTiS arm has: use "
                "stage2.rate_weight or members of evaluate.rate_weights, or add them there"
            )
        exits = self.evaluate.early_exit
        stray = set(exits) - {*(levels or (self.stage2.rate_weight, *rates))}
        if stray:
            where = (
                "members of stage2.rate_weights"
                if levels
                else "stage2.rate_weight or members of evaluate.rate_weights, or add them there"
            )
            raise ValueError(
                f"evaluate.early_exit has {sorted(stray)}, which no MANTiS arm has: use {where}"
            )
        asked = self.model.requests == "asked"
        if exits and not (self.model.exit_heads if asked else self.model.detector.classes):
            needs = "a detector that names classes: set model.detector.classes=true (with the loss "
            needs += "ClassDetection)"
            if asked:
                needs = "exit heads: set model.exit_heads=true (with the loss ExitAnswers)"
            raise ValueError(f"evaluate.early_exit needs {needs}, or remove evaluate.early_exit")
        return self

    @model_validator(mode="after")
    def _arms_fit_who_names_the_tasks(self) -> Settings:
        requests = self.model.requests
        wrong = [kind for kind in self.evaluate.baselines if requests in unfit_requests(kind)]
        if wrong:
            why = {"asked": "detects tasks or classes", "detect": "is asked for tasks"}[requests]
            raise ValueError(
                f"evaluate.baselines: `{wrong[0]}` {why}, and model.requests is {requests}. Leave "
                f"`{wrong[0]}` out, or set model.requests=both"
            )
        return self
