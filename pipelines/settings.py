"""The whole config of an experiment: sections put together, `extends`, overrides, clear errors.

Holds the sections of `pipelines` itself; the others stand beside what they configure. Reading a
config imports neither torch nor Ray nor MLflow.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.schema import DataConfig, TaskConfig
from mantis_core.config import (
    CodecTeacherConfig,
    IndividualConfig,
    ModelConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
)
from pipelines.settings_errors import SettingsError, explain
from pipelines.storage import absolute_root

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Baseline = Literal["none", "none_prior", "student", "oracle", "per_task", "individual", "teacher"]
CodecName = Literal["jpeg", "webp", "avif"]
Quality = Annotated[int, Field(ge=0, le=100)]


def _some_workers(workers: int | tuple[int, int]) -> int | tuple[int, int]:
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= fewest <= most:
        raise ValueError(
            f"got {workers if isinstance(workers, int) else list(workers)}; give a number of "
            "workers, at least 1, or [fewest, most]"
        )
    return workers


WorkerCount = Annotated[int | tuple[int, int], AfterValidator(_some_workers)]
TEACHER_KEYWORDS = ("train", "pretrained")  # other values of teacher.weights are files


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageConfig(_Section):
    root: str = Field("./runs", min_length=1, description="folder or URI of everything written")


class TrackingConfig(_Section):
    enabled: bool = Field(True, description="false: no MLflow, and nothing is registered")
    uri: str | None = Field(None, description="MLflow tracking URI; none: sqlite under the root")
    experiment: str = Field("mantis", min_length=1)


class ClusterConfig(_Section):
    """Where and how wide Ray runs. Never part of a stage's key."""

    address: str | None = Field(
        None, description="of a running cluster; none: RAY_ADDRESS, else Ray starts here"
    )
    workers: WorkerCount = Field(
        1, description="of one training; [fewest, most] grows and shrinks with the cluster"
    )
    cpus_per_worker: float = Field(1, ge=0)
    gpus_per_worker: float = Field(0, ge=0)
    data_cpus: float | None = Field(
        None, gt=0, description="CPUs left to data tasks; none: what training leaves, at least 1"
    )
    threads_per_worker: int | None = Field(
        None, ge=1, description="torch threads; none: the node's cores shared by its workers"
    )
    object_store_mb: int = Field(500, ge=100, description="shared memory of a local Ray, MB")
    max_failures: int = Field(2, ge=0, description="restarts of a training after a lost worker")
    start_timeout_s: float = Field(120, gt=0, description="for workers (and new nodes) to start")
    collective_timeout_s: float = Field(300, gt=0, description="for a silent peer in a training")
    evaluation_actors: int | None = Field(
        None, ge=1, description="at most; none: one per free CPU or GPU"
    )
    autoscaling: bool = Field(False, description="the cluster at `address` adds nodes on demand")

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class EvaluateConfig(_Section):
    """What is measured beside the main arm; every rate, seed and `none` is a stage 2 of its own."""

    rate_weights: tuple[Rate, ...] = Field((), description="further stage-2 arms")
    baselines: tuple[Baseline, ...] = ("none", "oracle", "teacher")
    codecs: dict[CodecName, tuple[Quality, ...]] = Field(
        default_factory=dict,
        description="image codecs in front of the teacher, each with Pillow's qualities",
    )
    codec_teachers: bool = Field(
        False, description="each image codec also in front of a teacher fine-tuned on it"
    )
    baseline_rate_weights: tuple[Rate, ...] | None = Field(
        None, description="rates of compressed baselines; none: the main rate alone"
    )
    early_exit: dict[Rate, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="rate weight to confidence: its arms measured once more, images of whose class "
        "the detector is that sure being answered by the client",
    )
    batch_size: int = Field(128, ge=1, description="images an actor takes at a time")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="further seeds; each trains the arms anew over the same stage 1"
    )


class TuneConfig(_Section):
    """How `mantis tune` learns and stops trials early; its options say what it searches."""

    stop_early: bool = Field(True, description="false: every trial trains all epochs of stage 2")
    first_epochs: int = Field(1, ge=1, description="of stage 2 before a trial is judged at all")
    reduction_factor: int = Field(
        3, ge=2, description="of so many trials one goes on; also the ratio of epochs between halts"
    )
    startup_trials: int = Field(8, ge=1, description="drawn evenly before the search learns")
    max_failures: int = Field(2, ge=0, description="restarts of a trial whose process was lost")


class Settings(_Section):
    """The root of a config file."""

    seed: int = Field(0, ge=0, lt=2**31)
    storage: StorageConfig = StorageConfig()
    data: DataConfig
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    teacher: TeacherConfig = TeacherConfig()
    model: ModelConfig = ModelConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    individual: IndividualConfig = IndividualConfig()
    codec_teacher: CodecTeacherConfig = CodecTeacherConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _arms_can_be_told_apart(self) -> Settings:
        rates, seeds = self.evaluate.rate_weights, self.evaluate.seeds
        if len(set(rates)) < len(rates) or self.stage2.rate_weight in rates:
            raise ValueError(
                f"evaluate.rate_weights {list(rates)} must differ from each other and from the "
                f"main rate, stage2.rate_weight {self.stage2.rate_weight}, which is always measured"
            )
        if len(set(seeds)) < len(seeds) or self.seed in seeds:
            raise ValueError(
                f"evaluate.seeds {list(seeds)} must differ from each other and from the main "
                f"seed {self.seed}, which is always measured"
            )
        stray = set(self.evaluate.baseline_rate_weights or ()) - {self.stage2.rate_weight, *rates}
        if stray:
            raise ValueError(
                f"evaluate.baseline_rate_weights {sorted(stray)} are measured by no arm: use "
                "stage2.rate_weight or members of evaluate.rate_weights, or add them there"
            )
        exits = self.evaluate.early_exit
        stray = set(exits) - {self.stage2.rate_weight, *rates}
        if stray:
            raise ValueError(
                f"evaluate.early_exit has rate weights {sorted(stray)} that no arm has: use "
                "stage2.rate_weight or members of evaluate.rate_weights, or add them there"
            )
        if exits and not self.model.detector.classes:
            raise ValueError(
                "evaluate.early_exit needs a detector that names classes: set "
                "model.detector.classes=true (with the loss ClassDetection), or leave it out"
            )
        return self


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file, what it extends, and overrides such as `stage2.rate_weight=0.01`.

    `storage.root`, `data.root` and a file in `teacher.weights` become absolute against the current
    folder. Raises SettingsError.
    """
    raw = _read_with_parent(Path(path))
    if overrides:
        # A file may lack what the overrides add; what is still wrong after them is told below.
        with contextlib.suppress(SettingsError):
            raw = _validate(raw).model_dump(mode="json")
    return _with_absolute_paths(_validate(_override(raw, overrides)))


def with_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The same settings with overrides applied. Raises SettingsError."""
    return _validate(_override(settings.model_dump(mode="json"), overrides))


def to_yaml(settings: Settings) -> str:
    """The resolved config: read back, it gives equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-3 is a number; yes, on, 12:30 and dates are text), no double keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} stands twice, again in line {line}"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML reads 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _read_with_parent(path: Path) -> dict[str, Any]:
    raw = _read_yaml(path)
    parent_name = raw.pop("extends", None)
    if parent_name is None:
        return raw
    if not isinstance(parent_name, str):
        raise SettingsError(f"{path}: extends is {parent_name!r}; give one file name")
    parent_path = path.parent / parent_name
    parent = _read_yaml(parent_path)
    if "extends" in parent:
        raise SettingsError(
            f"{path} extends {parent_path}, which itself extends {parent['extends']}: one level "
            "is allowed. Extend the last one directly."
        )
    return _merge(parent, raw)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"cannot read the config {path}: {reason}") from error
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise SettingsError(f"{path} holds {type(raw).__name__}, not a mapping of sections")
    return raw


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else, lists too, is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _override(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    root: dict[str, Any] = copy.deepcopy(dict(raw))
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise SettingsError(
                f"override {override!r} is not of the form key=value, e.g. stage2.rate_weight=0.01"
            )
        node: Any = root
        for depth, key in enumerate(keys):
            place = ".".join(keys[: depth + 1])
            last = depth == len(keys) - 1
            if isinstance(node, list):
                if not key.isdigit() or int(key) >= len(node):
                    raise SettingsError(
                        f"override {override!r}: {place} does not exist; "
                        f"the list has elements 0 to {len(node) - 1}"
                    )
                if last:
                    node[int(key)] = _parse(text, override)
                node = node[int(key)]
            elif isinstance(node, dict):
                if last:
                    node[key] = _parse(text, override)
                elif node.get(key) is None:
                    node[key] = {}
                node = node[key]
            else:
                raise SettingsError(
                    f"override {override!r}: {'.'.join(keys[:depth])} is {node!r} and has no keys"
                )
    return root


def _validate(raw: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate_json(json.dumps(raw), strict=True)
    except TypeError as error:
        raise SettingsError(f"the config holds a value that is not plain YAML: {error}") from error
    except ValidationError as error:
        raise SettingsError(explain(error, Settings, raw)) from error


def _with_absolute_paths(settings: Settings) -> Settings:
    teacher = settings.teacher
    if teacher.weights not in TEACHER_KEYWORDS:
        teacher = teacher.model_copy(update={"weights": absolute_root(teacher.weights)})
    if teacher.start is not None:
        teacher = teacher.model_copy(update={"start": absolute_root(teacher.start)})
    storage = settings.storage.model_copy(update={"root": absolute_root(settings.storage.root)})
    data = settings.data.model_copy(update={"root": absolute_root(settings.data.root)})
    return settings.model_copy(update={"storage": storage, "data": data, "teacher": teacher})
