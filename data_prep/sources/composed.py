"""Sources that make images of another source's photographs: `mosaic` and `attributes`.

With them several questions may be asked of one image, and what is asked has evidence of its own.
Labels are exact by construction. A reference holds in its `path`, as JSON, what an image is made
of.
"""

from __future__ import annotations

import io
import json
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator

from data_prep.errors import DataError
from data_prep.sources.auto import Images
from data_prep.sources.base import RawRow, SourceConfig, listing_of, references
from mantis_core.pixels import ImageError, read_pixels

Pixels = NDArray[np.uint8]
Place = tuple[str, int, int]  # path, position and row of an image in its own source

TILES = 4
TURNS = (0, 90, 180, 270)  # degrees, anticlockwise
TINTS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
TINT_SHARE = 0.3  # of the colour in a tinted pixel
SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")
"""The lit bars of the digits 0 to 9 on a display of seven: a to f clockwise from the top, then the
middle."""
BARS = {  # left, top, right, bottom on a grid of 5 x 9
    "a": (0, 0, 5, 1),
    "b": (4, 0, 5, 5),
    "c": (4, 4, 5, 9),
    "d": (0, 8, 5, 9),
    "e": (0, 4, 1, 9),
    "f": (0, 0, 1, 5),
    "g": (0, 4, 5, 5),
}


class Composed(SourceConfig, ABC):
    """A source whose images are made of those of another one."""

    of: Images
    """The source of the photographs, with the keys of its own kind."""
    size: int = Field(default=64, ge=16)
    """Side in pixels of the square images that are made; the default is that of
    `data.image_size`."""
    seed: int = 0
    """Seed of what is drawn by lot. It is not the experiment's `seed`, so that experiments of
    several seeds see the same images."""

    @property
    def declares_classes(self) -> bool:
        return True

    def state(self, root: str, split: str) -> Iterator[str]:
        yield self.model_dump_json(exclude={"of"})
        yield from self.of.state(root, split)

    def _random(self, split: str, *index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(split == "val"), *index])

    def _photographs(self, root: str, places: Iterable[Place], side: int) -> dict[Place, Any]:
        """Returns the photographs at places, each square (side, side, 3), or why it has none."""
        wanted = sorted(set(places))  # a source yields rows in the order of its listing
        columns = [list(column) for column in zip(*wanted, strict=True)]
        nobody = [""] * len(wanted)
        table = references(nobody, [[]] * len(wanted), *columns)
        found: dict[Place, Any] = {}
        for place, row in zip(wanted, self.of.read(root, table), strict=True):
            found[place] = row.error or "no image"
            if row.image and not row.error:
                try:
                    found[place] = read_pixels(row.image, (side, side), side)
                except ImageError as error:
                    found[place] = str(error)
        return found


class Mosaic(Composed):
    """Four photographs of different groups in every image, and a question about each group."""

    kind: Literal["mosaic"] = "mosaic"
    """Four photographs of different groups in every image, two by two, in random places."""
    groups: dict[str, tuple[str, ...]]
    """Class ids of each group by its name, at least four groups without a class in common. An
    image shows four of them. A task of a group's name has its classes by `classes_from`."""
    train_rows: int = Field(default=4000, ge=0)
    """Images of the train split. The default is enough for a short training on a laptop."""
    val_rows: int = Field(default=500, ge=0)
    """Images of the val split."""

    @field_validator("groups")
    @classmethod
    def _groups_are_apart(cls, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if len(groups) < TILES:
            raise ValueError(f"{len(groups)} groups; a mosaic shows {TILES} different ones")
        owner: dict[str, str] = {}
        for name, ids in groups.items():
            if not ids:
                raise ValueError(f"the group '{name}' has no class")
            for class_id in ids:
                if owner.setdefault(class_id, name) != name:
                    raise ValueError(
                        f"{class_id} is in the groups '{owner[class_id]}' and '{name}'"
                    )
        return groups

    def declared_classes(self, task: str) -> tuple[str, ...]:
        return self.groups.get(task, ())

    def listing(self, root: str, split: str) -> pa.Table:
        count = self.train_rows if split == "train" else self.val_rows
        photographs = listing_of(self.of, root, split)
        if not (count and photographs.num_rows):
            return references([], [], [], [], [])
        members = self._members(photographs, split)
        places = _places(photographs)
        names, classes, made_of = list(members), [], []
        for index in range(count):
            random = self._random(split, index)
            chosen = [members[names[k]] for k in random.permutation(len(names))[:TILES]]
            drawn = [own[int(random.integers(len(own)))] for own in chosen]
            classes.append([class_id for _, class_id in drawn])
            made_of.append(json.dumps([places[row] for row, _ in drawn]))
        ids = [f"{split}/{index:07d}" for index in range(count)]
        return references(ids, classes, made_of, list(range(count)), [0] * count)

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        wanted = [[_place(p) for p in json.loads(path)] for path in references["path"].to_pylist()]
        each = [place for places in wanted for place in places]
        found = self._photographs(root, each, self.size // 2)
        for places in wanted:
            tiles = [found[place] for place in places]
            if wrong := [tile for tile in tiles if isinstance(tile, str)]:
                yield RawRow(b"", {}, wrong[0])
                continue
            rows = [np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)]
            yield RawRow(_png(np.concatenate(rows)), {})

    def _members(self, photographs: pa.Table, split: str) -> dict[str, list[tuple[int, str]]]:
        """Returns each group's images as (row of the listing, class id)."""
        owner = {class_id: name for name, ids in self.groups.items() for class_id in ids}
        members: dict[str, list[tuple[int, str]]] = {name: [] for name in self.groups}
        for row, ids in enumerate(photographs["class_ids"].to_pylist()):
            for class_id in ids[:1]:
                if class_id in owner:
                    members[owner[class_id]].append((row, class_id))
        if empty := [name for name, own in members.items() if not own]:
            raise DataError(
                f"source '{self.source_name}' (mosaic): no image of the group '{empty[0]}' in the "
                f"{split} split of '{self.of.source_name}'; name classes that it has"
            )
        return members


class Attributes(Composed):
    """Photographs that are turned, tinted and marked with a digit, and a question about each."""

    kind: Literal["attributes"] = "attributes"
    """Photographs that are turned, tinted and marked with a digit: labels exact by construction."""
    apply: tuple[Literal["rotation", "glyph", "tint"], ...] = ("rotation", "glyph", "tint")
    """What is done to each photograph, drawn by lot. `rotation`: turned by 0, 90, 180 or 270
    degrees. `glyph`: a digit is drawn on it. `tint`: it is coloured in one of six ways. Each names
    a task, whose classes `classes_from` gives. None leaves the photographs as they are."""
    groups: dict[str, tuple[str, ...]] = Field(default={})
    """Class ids of each group by its name. A task `group` then asks for the group of the
    photograph, beside a task of all its classes: parent and child."""

    @property
    def may_be_mirrored(self) -> bool:
        return not {"rotation", "glyph"} & set(self.apply)

    def declared_classes(self, task: str) -> tuple[str, ...]:
        labels: dict[str, Iterable[object]] = {
            "rotation": TURNS,
            "glyph": range(len(SEGMENTS)),
            "tint": TINTS,
            "group": self.groups,
        }
        asked = task == "group" or task in self.apply
        return tuple(f"{task}/{label}" for label in labels.get(task, ()) if asked)

    def listing(self, root: str, split: str) -> pa.Table:
        photographs = listing_of(self.of, root, split)
        own = {name: self.declared_classes(name) for name in self.apply}
        owner = {class_id: name for name, ids in self.groups.items() for class_id in ids}
        random = self._random(split)
        drawn = {
            name: random.integers(len(labels), size=photographs.num_rows).tolist()
            for name, labels in own.items()
        }
        classes, paths = [], []
        for row, (place, ids) in enumerate(
            zip(_places(photographs), photographs["class_ids"].to_pylist(), strict=True)
        ):
            labels = {name: numbers[row] for name, numbers in drawn.items()}
            parents = [f"group/{owner[class_id]}" for class_id in ids if class_id in owner]
            classes.append([*ids, *(own[n][k] for n, k in labels.items()), *parents])
            paths.append(json.dumps([place, row, labels]))
        zeros = [0] * photographs.num_rows
        return references(photographs["source_id"].combine_chunks(), classes, paths, zeros, zeros)

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        wanted = [json.loads(path) for path in references["path"].to_pylist()]
        found = self._photographs(root, (_place(place) for place, _, _ in wanted), self.size)
        for place, row, labels in wanted:
            pixels = found[_place(place)]
            if isinstance(pixels, str):
                yield RawRow(b"", {}, pixels)
            else:
                yield RawRow(_png(self._made(pixels, row, labels)), {})

    def _made(self, pixels: Pixels, row: int, labels: Mapping[str, int]) -> Pixels:
        if "rotation" in labels:
            pixels = np.rot90(pixels, labels["rotation"]).copy()
        if "tint" in labels:
            colour = np.array(list(TINTS.values())[labels["tint"]])
            pixels = np.rint((1 - TINT_SHARE) * pixels + TINT_SHARE * colour).astype(np.uint8)
        if "glyph" in labels:
            random = np.random.default_rng([self.seed, row])
            _draw_digit(pixels, labels["glyph"], random)
        return pixels


def _draw_digit(pixels: Pixels, digit: int, random: np.random.Generator) -> None:
    """Draws a white digit on a black field, about a third of the image high, at a random place."""
    side = len(pixels)
    unit = max(1, round(side / 32))
    height, width = 11 * unit, 7 * unit  # with a margin of one unit
    top, left = random.integers((side - height + 1, side - width + 1))
    field = pixels[top : top + height, left : left + width]
    field[:] = 0
    for bar in SEGMENTS[digit]:
        x0, y0, x1, y1 = (unit * (edge + 1) for edge in BARS[bar])
        field[y0:y1, x0:x1] = 255


def _places(listing: pa.Table) -> list[Place]:
    columns = (listing[name].to_pylist() for name in ("path", "position", "row"))
    return list(zip(*columns, strict=True))


def _place(found: list[Any]) -> Place:
    path, position, row = found
    return path, position, row


def _png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
