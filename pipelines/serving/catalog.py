"""Which models a service has: by the id of their streams, so that several live side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mantis_core.codec.checkpoint import read_spec
from mantis_core.device.export import check_files, read_manifest
from mantis_core.device.requests import family_of
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder


@dataclass(frozen=True)
class Entry:
    """A model that answers. `source` is what names it on the command line.

    `tasks` are all tasks by name; `requests` is whether they are asked for, detected, or both.
    `added` are tasks that the server answers beside them, each with those of the client's that are
    asked for instead. `extensions` are tasks with streams of their own, by the id of these.
    `segmentation` names the label values of each task that answers with a mask.
    `encodes` tells whether the folder holds the client too. `exported` is a folder of that client
    as `mantis export` writes it, "" without one.
    """

    folder: str
    source: str
    stream_id: str
    model_id: str
    tasks: tuple[str, ...]
    requests: str
    image_size: tuple[int, int]
    rate_levels: int
    added: dict[str, list[str]] = field(default_factory=dict)
    extensions: dict[str, list[str]] = field(default_factory=dict)
    segmentation: dict[str, list[str]] = field(default_factory=dict)
    encodes: bool = False
    exported: str = ""

    def asks(self, task: str) -> list[str]:
        """What a camera is asked for so that a task can be answered; none if it cannot."""
        known = any(task in own for own in (self.tasks, *self.extensions.values()))
        return self.added.get(task, [task] if known else [])

    @property
    def every_task(self) -> list[str]:
        """All tasks that it answers."""
        extended = [name for own in self.extensions.values() for name in own]
        return [*self.tasks, *self.added, *extended]

    @property
    def stream_ids(self) -> set[str]:
        """The ids of all streams that it reads."""
        return {self.stream_id, *self.extensions}

    def check_asked(self, tasks: Sequence[str]) -> None:
        """ModelError for tasks of which its clients send several streams, so one image has not all.

        Those that it does not have are left to others.
        """
        family_of((self.tasks, *self.extensions.values()), tasks)

    def to_json(self) -> dict[str, Any]:
        """What a service tells of it; not where it lies."""
        told = asdict(self) | {"exported": bool(self.exported)}
        del told["folder"]
        return told


@dataclass(frozen=True)
class Catalog:
    """The models of a service. Of those that read a stream id the first, the newest, answers."""

    entries: tuple[Entry, ...] = ()

    def find(self, stream_id: str) -> Entry | None:
        """The model that answers the streams of a client."""
        return next((each for each in self.entries if stream_id in each.stream_ids), None)

    def with_newer(self, entries: Iterable[Entry]) -> Catalog:
        """A catalog in which `entries` stand first. What clients of before need is kept."""
        newest = {each.stream_id: each for each in entries}
        read = {stream_id for each in newest.values() for stream_id in each.stream_ids}
        kept = [each for each in self.entries if not each.stream_ids <= read]
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
        extensions={
            str(stream_id): [task.name for task in own.tasks]
            for stream_id, own in zip(meta.get("extension_ids", ()), spec.extensions, strict=True)
        },
        added={own.task.name: list(own.through or spec.task_names) for own in spec.added},
        segmentation={
            task.name: list(task.labels) for task in spec.every_task if not task.is_classification
        },
        encodes="half" not in meta,
    )


def with_exports(entries: Iterable[Entry], exports: Mapping[str, str]) -> list[Entry]:
    """Entries with the exported clients of their streams, folders by stream id."""
    return [replace(each, exported=exports.get(each.stream_id, "")) for each in entries]


def exports_by_stream(folders: Iterable[str | Path]) -> dict[str, str]:
    """Folders that `mantis export` wrote, by the id of their streams; ModelError for another."""
    found = {}
    for folder in folders:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        found[manifest.stream.model_id.hex()] = str(Path(folder).resolve())
    return found
