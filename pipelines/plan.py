"""Which stages an experiment has, in which order and under which keys; pure planning, runs nothing.

A stage's key is a hash over all that decides its result and nothing else: the part of the config it
reads, the keys of the stages it builds on, the data, package versions and the code it runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mantis_core.image_codecs import IMAGE_CODECS
from pipelines.settings import EvaluateConfig, Settings, with_overrides
from pipelines.settings_errors import SettingsError
from pipelines.source_hash import source_hash

if TYPE_CHECKING:
    from data_prep.schema import TaskTable

StageKind = Literal[
    "prepare",
    "teacher",
    "stage1",
    "stage2",
    "individual",
    "codec_teacher",
    "evaluate",
    "register",
]
TRAINING_KINDS = ("teacher", "stage1", "stage2", "individual", "codec_teacher")
TUNED = "_tuned"
"""Ends the kind of an arm whose teacher was fine-tuned on its codec's images."""

# Arms without conditioning, by what they change: with one prior; with the main arm's own; the
# entropic student of Matsubara et al. (WACV 2022), without tasks; and a codec a task.
UNCONDITIONED: dict[str, tuple[str, ...]] = {
    "none": ("model.conditioning.kind=none", "model.prior=shared"),
    "none_prior": ("model.conditioning.kind=none",),
    "student": ("model.conditioning.kind=none", "model.prior=shared", "model.single_task=true"),
    "per_task": ("model.conditioning.kind=none", "model.prior=shared", "model.per_task=true"),
}
CODEC_KINDS = ("mantis", *UNCONDITIONED)  # each a stage 2 of its own

DECIDING_PACKAGES = (
    "torch",
    "torchvision",
    "compressai",
    "torchdistill",
    "constriction",
    "numpy",
    "pillow",
    "pyarrow",
)

# Fields of `data` that shape batches in training; all others but `root` shape what is prepared.
READER_FIELDS = ("augmentation", "crop_padding", "min_crop_area", "flip", "shuffle_window_rows")
_READER = tuple(f"data.{name}" for name in READER_FIELDS)

# What each kind reads of the config. `storage`, `tracking` and `cluster` decide no result.
SLICES: dict[StageKind, tuple[str, ...]] = {
    "prepare": ("seed", "tasks", "data"),
    "teacher": ("seed", *_READER, "teacher"),
    "stage1": (
        "seed",
        *_READER,
        "teacher.name",
        "teacher.split",
        "model.stem",
        "model.detector",
        "model.encoder",
        "model.decoder.channels",
        "model.decoder.blocks",
        "model.quantizer",
        "model.neighbour_contexts",
        "stage1",
    ),
    "stage2": ("seed", *_READER, "model", "stage2"),
    "individual": ("seed", *_READER, "teacher.name", "teacher.split", "individual"),
    "codec_teacher": ("seed", *_READER, "teacher.name", "teacher.split", "codec_teacher"),
    "evaluate": ("evaluate.batch_size",),
    "register": (),
}

# The modules each kind starts from; what these import counts too.
ENTRIES: dict[StageKind, tuple[str, ...]] = {
    "prepare": ("data_prep.shards",),
    "teacher": ("pipelines.worker",),
    "stage1": ("pipelines.worker",),
    "stage2": ("pipelines.worker",),
    "individual": ("pipelines.worker",),
    "codec_teacher": ("pipelines.worker",),
    "evaluate": ("pipelines.evaluation",),
    "register": (
        "pipelines.mlflow_model",
        "pipelines.mlflow_client",
        "pipelines.mlflow_server",
    ),
}


@dataclass(frozen=True)
class StageSpec:
    """One planned stage.

    `name` is the kind, or `kind/arm`. `config` is the part of the config the key is made of;
    `recipe` is as the key, but says only what is made, not by which code and packages.
    `settings` is the whole config with the arm's overrides applied, from which the runner reads
    the same fields. `upstream` names stages planned before it. `folder` is a full address.
    """

    name: str
    kind: StageKind
    arm: str
    config: dict[str, Any]
    upstream: tuple[str, ...]
    key: str
    recipe: str
    folder: str
    settings: Settings


@dataclass(frozen=True)
class Arm:
    """One line of the evaluation: a baseline or codec at one rate and seed.

    `kind` is a key of `pipelines.evaluation.LABELS`; `quality` an image codec's, `exit_confidence`
    that of an arm whose client answers some images itself.
    `stage` is the stage whose checkpoint it measures, "" for a teacher that is not trained here.
    """

    name: str
    kind: str
    rate_weight: float | None
    seed: int
    stage: str
    quality: int | None = None
    exit_confidence: float | None = None


def plan_stages(
    settings: Settings, table: TaskTable, data_fingerprint: str
) -> tuple[StageSpec, ...]:
    """All stages of the config, each after those it builds on.

    Raises SettingsError if a file of teacher weights is not there or an arm does not fit the tasks,
    CodecError for an image codec that cannot be written here.
    """
    _check_arms(settings, table)
    planned: dict[str, StageSpec] = {}
    versions = {name: metadata.version(name) for name in DECIDING_PACKAGES}

    def add(
        kind: StageKind,
        upstream: tuple[str, ...],
        *,
        arm: str = "",
        own: Settings = settings,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        name = f"{kind}/{arm}" if arm else kind
        config = {**config_slice(own, kind), **(extra or {})}
        upstream = tuple(stage for stage in upstream if stage in planned)
        made = {"kind": kind, "config": config}
        key = _digest(
            {
                **made,
                "upstream": {stage: planned[stage].key for stage in upstream},
                "versions": versions,
                "code": source_hash(*ENTRIES[kind]),
            }
        )
        recipe = _digest({**made, "upstream": {s: planned[s].recipe for s in upstream}})
        folder = f"{settings.storage.root}/stages/{name}-{key[:12]}"
        planned[name] = StageSpec(name, kind, arm, config, upstream, key, recipe, folder, own)

    classes = {"task_table": asdict(table), "data_fingerprint": data_fingerprint}
    add("prepare", (), extra=classes)
    trained = settings.teacher.weights == "train"
    weights = {} if trained else {"teacher_weights": teacher_identity(settings)}
    if trained:
        start = settings.teacher.start
        add(
            "teacher",
            ("prepare",),
            extra={"start": _file_identity("start", start)} if start else {},
        )
    add("stage1", ("prepare", "teacher"), extra=weights)
    arms = tuple(plan_arms(settings))
    for arm in arms:
        if arm.kind in CODEC_KINDS:
            own = _arm_settings(settings, arm)
            add("stage2", ("prepare", "teacher", "stage1"), arm=_suffix(arm), own=own)
        elif arm.kind == "individual":
            own = _arm_settings(settings, arm)
            add("individual", ("prepare", "teacher"), arm=_suffix(arm), own=own, extra=weights)
        elif arm.stage.startswith("codec_teacher/") and arm.stage not in planned:
            codec = arm.stage.partition("/")[2]
            own = _codec_settings(settings, codec)
            add("codec_teacher", ("prepare", "teacher"), arm=codec, own=own, extra=weights)
    evaluated = tuple(name for name in planned if name != "stage1")
    add("evaluate", evaluated, extra={"arms": [asdict(arm) for arm in arms]})
    if settings.tracking.enabled:
        add("register", ("stage2", "evaluate"))
    return tuple(planned.values())


def plan_arms(settings: Settings) -> Iterator[Arm]:
    """What `evaluate` measures, the main arm first. Raises nothing: the settings were checked."""
    evaluate, main_rate = settings.evaluate, settings.stage2.rate_weight
    seeds = (settings.seed, *evaluate.seeds)
    baseline_rates = evaluate.baseline_rate_weights
    rates = (main_rate,) if baseline_rates is None else baseline_rates

    def named(kind: str, rate: float, seed: int) -> str:
        parts = [
            *([kind] if kind in UNCONDITIONED else []),
            *([f"rate-{rate!r}"] if rate != main_rate else []),
            *([f"seed-{seed}"] if seed != settings.seed else []),
        ]
        first = "stage2" if kind in CODEC_KINDS else kind
        return f"{first}/{'-'.join(parts)}" if parts else first

    for seed in seeds:
        for rate in (main_rate, *evaluate.rate_weights):
            name = named("mantis", rate, seed)
            yield Arm(name, "mantis", rate, seed, name)
            if rate in evaluate.early_exit:
                exits = evaluate.early_exit[rate]
                yield Arm(
                    named("early_exit", rate, seed), "early_exit", rate, seed, name, None, exits
                )
    for seed in seeds:
        for rate in rates:
            for kind in UNCONDITIONED:
                if kind in evaluate.baselines:
                    name = named(kind, rate, seed)
                    yield Arm(name, kind, rate, seed, name)
            if "none" in evaluate.baselines and rate in evaluate.early_exit:
                measured, exits = named("none", rate, seed), evaluate.early_exit[rate]
                name = named("none_exit", rate, seed)
                yield Arm(name, "none_exit", rate, seed, measured, None, exits)
            if "oracle" in evaluate.baselines:
                measured = named("mantis", rate, seed)
                yield Arm(named("oracle", rate, seed), "oracle", rate, seed, measured)
        if "individual" in evaluate.baselines:
            name = named("individual", main_rate, seed)
            yield Arm(name, "individual", None, seed, name)
    teacher = "teacher" if settings.teacher.weights == "train" else ""
    for codec, qualities in evaluate.codecs.items():
        for quality in qualities:
            name = f"{codec}/quality-{quality}"
            yield Arm(name, codec, None, settings.seed, teacher, quality)
            if evaluate.codec_teachers:
                tuned = f"codec_teacher/{codec}"
                kind = codec + TUNED
                yield Arm(f"{kind}/quality-{quality}", kind, None, settings.seed, tuned, quality)
    if "teacher" in evaluate.baselines:
        yield Arm("teacher", "teacher", None, settings.seed, teacher)


def config_slice(settings: Settings, kind: StageKind) -> dict[str, Any]:
    """The part of the config a kind reads, as nested plain values."""
    resolved = settings.model_dump(mode="json")
    picked: dict[str, Any] = {}
    for path in SLICES[kind]:
        *above, last = path.split(".")
        source, target = resolved, picked
        for name in above:
            source, target = source[name], target.setdefault(name, {})
        target[last] = source[last]
    if kind == "prepare":
        unread = {"root", *READER_FIELDS}
        picked["data"] = {k: v for k, v in picked["data"].items() if k not in unread}
    if kind == "teacher":  # the file counts, not where it lies
        picked["teacher"] = {k: v for k, v in picked["teacher"].items() if k != "start"}
    return picked


def teacher_identity(settings: Settings) -> str:
    """What stands for the weights of a teacher that is not trained here: name or sha256."""
    weights = settings.teacher.weights
    if weights == "pretrained":
        return f"pretrained:{settings.teacher.name}"
    return _file_identity("weights", weights)


def plan_key(specs: tuple[StageSpec, ...]) -> str:
    """Identifies a whole pipeline: a hash over its stages' names and keys."""
    return _digest({spec.name: spec.key for spec in specs})


def with_upstream(specs: tuple[StageSpec, ...], name: str) -> tuple[StageSpec, ...]:
    """A stage and everything it builds on, in order."""
    wanted = {name}
    for spec in reversed(specs):
        if spec.name in wanted:
            wanted.update(spec.upstream)
    return tuple(spec for spec in specs if spec.name in wanted)


def _check_arms(settings: Settings, table: TaskTable) -> None:
    """Refuses before anything is trained what would fail when the arm's turn comes."""
    masks = [task.name for task in table.tasks if task.kind == "segmentation"]
    if "student" in settings.evaluate.baselines and masks:
        raise SettingsError(
            f"evaluate.baselines: `student` needs images of one class each, and task '{masks[0]}' "
            "is a segmentation; leave `student` out"
        )
    for codec in settings.evaluate.codecs:
        IMAGE_CODECS[codec].require()


def _file_identity(field: str, file: str) -> str:
    """A file of weights by its sha256; SettingsError if it is not there."""
    path = Path(file)
    if not path.is_file():
        raise SettingsError(
            f"teacher.{field}: there is no file {file}; give an existing .safetensors or .pth "
            "file, `train` to train the teacher here, or `pretrained` to download it"
        )
    with path.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _arm_settings(settings: Settings, arm: Arm) -> Settings:
    overrides = [f"seed={arm.seed}"]
    if arm.rate_weight is not None:
        overrides.append(f"stage2.rate_weight={arm.rate_weight!r}")
    overrides += UNCONDITIONED.get(arm.kind, ())
    # The arms of an arm are its own: none.
    return with_overrides(settings.model_copy(update={"evaluate": EvaluateConfig()}), overrides)


def _codec_settings(settings: Settings, codec: str) -> Settings:
    qualities = list(settings.evaluate.codecs[codec])  # type: ignore[index]
    overrides = [f"codec_teacher.codec={codec}", f"codec_teacher.qualities={qualities}"]
    return with_overrides(settings.model_copy(update={"evaluate": EvaluateConfig()}), overrides)


def _suffix(arm: Arm) -> str:
    return arm.name.partition("/")[2]


def _digest(value: Mapping[str, Any]) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
