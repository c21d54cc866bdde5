"""The folder of an export: it appears whole or not at all; and what an export leaves out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mantis_core.errors import ModelError


def check_target(folder: Path, names: Collection[str]) -> Path:
    """The absolute path of a folder to write; ModelError where something else lies there.

    `names` are the files of an export of its kind: a folder may hold these and no others.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file; give a folder")
    others = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if strangers := [name for name in others if name not in names]:
        raise ModelError(
            f"{folder} holds something else than an export: {', '.join(strangers[:3])}; give a new "
            "folder"
        )
    return folder


@contextmanager
def whole(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` at the end of the block.

    An error in the block leaves what was there. Errors as `check_target`.
    """
    folder = check_target(folder, names)
    folder.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    made, before = room / "made", room / "before"
    try:
        made.mkdir()
        yield made
        if folder.exists():
            os.rename(folder, before)
        try:
            os.rename(made, folder)
        except OSError:
            if before.exists():
                os.rename(before, folder)
            raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def unexported(families: Sequence[Sequence[str]]) -> list[str]:
    """Says which tasks an exported server has not: those with streams of their own."""
    return [
        f"{', '.join(own)}: sent in streams of their own, which an exported server does not answer"
        for own in families[1:]
    ]
