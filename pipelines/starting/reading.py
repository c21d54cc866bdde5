"""A way to read a folder of images as a source, and the words by which folders name their splits.

Looks at no folder; folders.py and files.py do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class StartError(ValueError):
    """A folder of images that cannot be read in one way alone, or not at all."""

    exit_code = 2


@dataclass(frozen=True)
class Reading:
    """One way to read a folder: the source of a config, and what it leaves out.

    `root` is the folder that the source's paths start from. `what` says in a few words how the
    images lie. `groups` has the classes of each task, where the data names tasks.
    """

    root: Path
    source: Mapping[str, Any]
    what: str
    notes: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def has_val(self) -> bool:
        """Returns whether the source has a val split of its own."""
        return self.source.get("val") is not None


def split_of(path: str) -> str | None:
    """Returns the split that a relative path names: train, val or test. None if it names none.

    The file's own name counts before those of its folders.
    """
    for part in reversed(path.split("/")):
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word]
        found = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        if found:
            return found[0]
    return None


def without_split(path: str) -> str:
    """Returns a file's relative path without the words of its split, numbers and suffix.

    Files of one data set have the same.
    """
    words = [word for word in re.split(r"[^a-z]+", path.lower()) if word]
    kept = [word for word in words if word not in (*SPLIT_WORDS, "of", "parquet", "tar", "data")]
    return " ".join(kept)


def some(names: Iterable[str], most: int = 5) -> str:
    """Returns the first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
