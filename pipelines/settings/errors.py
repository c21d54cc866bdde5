"""Turns pydantic's errors into lines that name the key, its value and what is allowed."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from data_prep.tasks import did_you_mean


class SettingsError(ValueError):
    """A user's mistake in a config file or an override."""

    exit_code = 2


def explain(error: ValidationError, model: type[BaseModel], raw: Any) -> str:
    """Returns one line per mistake. Each names the dotted key as the user would write it."""
    details = error.errors(include_url=False)
    # pydantic also calls a list too short if it has dropped wrong items.
    inner = {each["loc"][:depth] for each in details for depth in range(len(each["loc"]))}
    details = [d for d in details if d["type"] != "too_short" or d["loc"] not in inner]
    lines = [_line(detail, model, raw) for detail in details]
    return "\n".join(dict.fromkeys(lines))


def _line(detail: ErrorDetails, model: type[BaseModel], raw: Any) -> str:
    location = detail["loc"]
    key = _dotted(location, raw)
    if detail["type"] == "extra_forbidden":
        fields = {name for found in _models_at(model, location[:-1]) for name in found.model_fields}
        hint = did_you_mean(str(location[-1]), fields)
        known = f"; known are: {', '.join(sorted(fields))}"
        return f"{key}: unknown key{hint or known}"
    if detail["type"] == "missing":
        return f"{key}: missing; add it to the config or as {key}=VALUE"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "bool_type":
        message = "Input should be true or false"
    if detail["type"] in ("value_error", "assertion_error"):
        return f"{key}: {message}" if key and not message.startswith(key) else message
    came = detail["input"]
    shown = repr(came) if not isinstance(came, dict | list) else f"a {type(came).__name__}"
    hint = ""
    if detail["type"] == "literal_error" and isinstance(came, str):
        expected = detail["ctx"]["expected"].replace(" or ", ",")
        allowed = [word.strip("' ") for word in expected.split(",")]
        hint = did_you_mean(came, allowed)
    return f"{key}: got {shown}; {message[0].lower()}{message[1:]}{hint}"


def _dotted(location: Sequence[int | str], raw: Any) -> str:
    """Returns the key in the user's file: the location without the union tags pydantic adds."""
    parts: list[str] = []
    node = raw
    for depth, step in enumerate(location):
        if isinstance(node, dict) and node.get("kind") == step and step not in node:
            continue  # the tag of a union
        in_list = isinstance(node, list) and isinstance(step, int) and step < len(node)
        if in_list or (isinstance(node, dict) and step in node):
            node = node[step]
        elif depth < len(location) - 1 or not isinstance(node, dict):
            continue
        parts.append(str(step))
    return ".".join(parts)


def _models_at(root: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Returns the config models that can be at a location."""
    places: list[Any] = [root]
    for step in location:
        below = [child for place in places for child in _children(place, step)]
        if not below:  # a union tag: keep the members that have it
            below = [place for place in places if _is_tagged(place, step)] or places
        places = below
    return [place for place in places if isinstance(place, type) and issubclass(place, BaseModel)]


def _children(place: Any, step: int | str) -> list[Any]:
    if isinstance(place, type) and issubclass(place, BaseModel):
        field = place.model_fields.get(str(step))
        return _members(field.annotation) if field else []
    origin, arguments = get_origin(place), get_args(place)
    if origin in (tuple, list) and isinstance(step, int):
        return _members(arguments[0])
    if origin is dict:
        return _members(arguments[1])
    return []


def _members(annotation: Any) -> list[Any]:
    """Returns the alternatives of an annotation, with Annotated[...] and unions unpacked."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _is_tagged(place: Any, tag: int | str) -> bool:
    if not (isinstance(place, type) and issubclass(place, BaseModel)):
        return False
    kinds = (field.annotation for field in place.model_fields.values())
    return any(get_origin(kind) is Literal and tag in get_args(kind) for kind in kinds)
