"""Which models a service has: by the id of their streams, so that several live side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mantis_core.codec.checkpoint import read_spec
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder


@dataclass(frozen=True)
class Entry:
    """A model that answers. `source` is what names it on the command line.

    `tasks` are all tasks by name; `requests` is whether they are asked for, detected, or both.
    """

    folder: str
    source: str
    stream_id: str
    model_id: str
    tasks: tuple[str, ...]
    requests: str
    image_size: tuple[int, int]
    rate_levels: int

    def to_json(self) -> dict[str, Any]:
        """What a service tells of it; not where it lies."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


@dataclass(frozen=True)
class Catalog:
    """The models of a service; of those with one stream id the newest answers."""

    entries: tuple[Entry, ...] = ()

    def find(self, stream_id: str) -> Entry | None:
        """The model that answers the streams of a client."""
        return next((each for each in self.entries if each.stream_id == stream_id), None)

    def with_newer(self, entries: Iterable[Entry]) -> Catalog:
        """A catalog in which `entries` stand first. What clients of before need is kept."""
        newest = {each.stream_id: each for each in entries}
        kept = [each for each in self.entries if each.stream_id not in newest]
        return Catalog((*newest.values(), *kept))

    def to_config(self) -> list[dict[str, Any]]:
        """The catalog as JSON values, for a replica."""
        return [asdict(each) for each in self.entries]


def from_config(config: Iterable[dict[str, Any]]) -> Catalog:
    """What `Catalog.to_config` gave, once through JSON."""
    return Catalog(
        tuple(
            Entry(
                **{
                    **each,
                    "tasks": tuple(each["tasks"]),
                    "image_size": tuple(each["image_size"]),
                }
            )
            for each in config
        )
    )


def entry_of(folder: str | Path, source: str) -> Entry:
    """The entry of a model folder, without its weights. ModelError if it holds no server."""
    _, config, meta = load_folder(folder, wanted=())
    if meta.get("half", "server") != "server":
        raise ModelError(
            f"{folder} holds the {meta['half']} of a codec; a service needs the whole or its server"
        )
    try:
        spec = read_spec(config)
        model_id = str(meta["model_id"])
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder} holds no codec of this version: {error}") from None
    return Entry(
        folder=str(Path(folder).resolve()),
        source=source,
        stream_id=str(meta.get("stream_id", model_id)),
        model_id=model_id,
        tasks=spec.task_names,
        requests=spec.model.requests,
        image_size=spec.image_size,
        rate_levels=spec.rate_levels,
    )
