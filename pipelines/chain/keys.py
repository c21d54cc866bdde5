"""The keys of stages: the part of the config a stage reads, without defaults, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.settings.sections import Settings
from pipelines.stages.spec import Stage, StageSpec

FIRST_DEFAULTS: dict[str, Any] = {}
"""The first default by dotted field, for fields whose default has changed since.

A digest leaves out a value that equals the field's first default. A new field therefore changes no
digest of a config that leaves it out, and a changed default changes the digest of all that use it.
"""

ROUNDING = ("compile",)
"""Fields of a training's section that change its result by rounding alone."""

REPLACED = {"rate_weight": "rate_weights"}
"""Fields of a training's section that decide nothing once another one of it is set."""


def config_slice(settings: Settings, stage: Stage) -> dict[str, Any]:
    """Returns the part of the config that decides a stage's result, as nested plain values."""
    return _picked(settings.model_dump(mode="json"), stage)


def slim_slice(settings: Settings, stage: Stage) -> dict[str, Any]:
    """Returns the same part without the fields that have their first default."""
    return _picked(without_defaults(settings), stage)


def without_defaults(model: BaseModel, place: str = "") -> dict[str, Any]:
    """Returns the fields that differ from their first defaults, as nested plain values.

    A field of a section is compared with the default of that section: `teacher.training` has the
    teacher's defaults, not those of every training. Elements of lists keep their `kind`.
    """
    return _differences(model, None, place)


def _differences(model: BaseModel, default: BaseModel | None, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    plain = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        where, value = f"{place}.{name}".lstrip("."), getattr(model, name)
        usual = _first_default(where, name, field, default)
        if isinstance(value, BaseModel):
            same_kind = usual if type(usual) is type(value) else None
            inner = _differences(value, same_kind, where)
            if inner or same_kind is None:
                found[name] = inner
        elif value != usual or type(value) is not type(usual):
            found[name] = _elements(value, plain[name], where)
    return found


def _elements(value: Any, plain: Any, place: str) -> Any:
    """Returns a value as plain values. Sections in lists and mappings lose their defaults."""
    if isinstance(value, Mapping):
        keys = zip(value.values(), plain.items(), strict=True)
        return {name: _elements(each, below, place) for each, (name, below) in keys}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_elements(*pair, place) for pair in zip(value, plain, strict=True)]
    if isinstance(value, BaseModel):
        kind = {"kind": plain["kind"]} if "kind" in plain else {}
        return {**kind, **_differences(value, None, f"{place}.{plain.get('kind', '')}".rstrip("."))}
    return plain


def _first_default(where: str, name: str, field: FieldInfo, default: BaseModel | None) -> Any:
    if where in FIRST_DEFAULTS:
        return FIRST_DEFAULTS[where]
    if default is not None:
        return getattr(default, name)
    return field.get_default(call_default_factory=True)


def _picked(resolved: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Returns the fields of nested values that a stage reads. Missing ones are left out."""
    picked: dict[str, Any] = {}
    for path in stage.reads:
        *above, last = path.split(".")
        source: Any = resolved
        for name in above:
            source = source.get(name, {})
        if last in source:
            target = picked
            for name in above:
                target = target.setdefault(name, {})
            target[last] = _copied(source[last])
    for path in stage.leaves_out:
        *above, last = path.split(".")
        target = picked
        for name in above:
            target = target.get(name, {})
        target.pop(last, None)
    if stage.section:
        section = stage.section.split(".")
        for name in ROUNDING:
            _leave_out(picked, [*section, name])
        for name, several in REPLACED.items():
            if picked.get(section[0], {}).get(several):
                _leave_out(picked, [*section, name])
    return picked


def _leave_out(values: dict[str, Any], path: Sequence[str]) -> None:
    """Removes a nested value, and the sections that held nothing else."""
    name, *below = path
    if below and name in values:
        _leave_out(values[name], below)
    if not below or not values.get(name, True):
        values.pop(name, None)


def _copied(value: Any) -> Any:
    return {name: _copied(each) for name, each in value.items()} if type(value) is dict else value


def plan_key(specs: Sequence[StageSpec]) -> str:
    """Returns the key of a whole pipeline: a hash over its stages' names and keys."""
    return digest({spec.name: spec.key for spec in specs})


def digest(value: Mapping[str, Any]) -> str:
    """Returns the sha256 of plain values. The order of their keys does not matter."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
