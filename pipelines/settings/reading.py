"""Reads a config: parses YAML, follows `extends`, applies overrides, checks the result."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mantis_core.config import SHIPPED, SORTED
from pipelines.settings.errors import SettingsError, explain
from pipelines.settings.sections import TEACHER_KEYWORDS, Settings
from pipelines.settings.tracking import experiment_name, store_uri, without_password
from pipelines.storage import absolute_root


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file and the file it extends, then applies overrides such as `seed=1`.

    `storage.root`, `data.root`, `teacher.start` and a file in `teacher.weights` or
    `teacher.classes` become absolute against the current folder. What `tracking` leaves out comes
    from MLflow's variables. Raises SettingsError, or StorageError for a root that cannot be used.
    """
    raw = _with_experiment(_read_with_parent(Path(path)))
    if overrides:
        # The overrides may add what the file lacks. The check below reports what is still wrong.
        with contextlib.suppress(SettingsError):
            raw = _validate(raw).model_dump(mode="json")
    return _with_absolute_paths(_with_store(_validate(_override(raw, overrides))))


def with_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Returns the settings with overrides applied. Raises SettingsError."""
    return _validate(_override(settings.model_dump(mode="json"), overrides))


def to_yaml(settings: Settings) -> str:
    """Returns the resolved config as YAML, without the password of a tracking URI.

    Reading it back gives equal settings, but for that password.
    """
    plain = printable(settings).model_dump(mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def printable(settings: Settings) -> Settings:
    """Returns the settings without the password of a tracking URI."""
    tracking = settings.tracking
    if tracking.uri is None:
        return settings
    hidden = {"uri": without_password(tracking.uri, tracking.uri)}
    return settings.model_copy(update={"tracking": tracking.model_copy(update=hidden)})


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2 scalars: 1e-3 is a number; yes, on, 12:30 and dates are text.

    Refuses a key that occurs twice.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} occurs twice, again in line {line}"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML reads 010 as octal


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
            f"{path} extends {parent_path}, which itself extends {parent['extends']}: only one "
            "level is allowed. Extend the last file directly."
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
    """Merges mappings key by key. Replaces everything else, lists too."""
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


def _with_experiment(raw: dict[str, Any]) -> dict[str, Any]:
    """Adds the experiment of MLFLOW_EXPERIMENT_NAME to a config that names none."""
    tracking, name = raw.get("tracking") or {}, experiment_name(None)
    if name is None or not isinstance(tracking, dict):
        return raw
    return {**raw, "tracking": {"experiment": name, **tracking}}


def _with_store(settings: Settings) -> Settings:
    """Settles the URI of the MLflow store: workers on other nodes may lack the variable."""
    tracking = settings.tracking
    if not tracking.enabled:
        return settings
    found = tracking.model_copy(update={"uri": store_uri(tracking.uri)})
    return settings.model_copy(update={"tracking": found})


def _with_absolute_paths(settings: Settings) -> Settings:
    teacher = settings.teacher
    if teacher.weights not in TEACHER_KEYWORDS:
        teacher = teacher.model_copy(update={"weights": absolute_root(teacher.weights)})
    if teacher.classes is not None and teacher.classes != SORTED:
        teacher = teacher.model_copy(update={"classes": absolute_root(teacher.classes)})
    if teacher.start is not None and teacher.start not in SHIPPED:
        teacher = teacher.model_copy(update={"start": absolute_root(teacher.start)})
    storage = settings.storage.model_copy(update={"root": absolute_root(settings.storage.root)})
    data = settings.data.model_copy(update={"root": absolute_root(settings.data.root)})
    return settings.model_copy(update={"storage": storage, "data": data, "teacher": teacher})
