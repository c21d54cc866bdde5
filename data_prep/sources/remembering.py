"""Remembers what sources were found to hold, so that one command looks at them once. Reads nothing.

A plan takes a fingerprint of the sources, a dry run says what they hold, and `prepare` lists them.
Within one_look() all three see the same files, each listed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Value = TypeVar("Value")

_seen: ContextVar[dict[tuple[str, ...], object] | None] = ContextVar("seen", default=None)


@contextmanager
def one_look() -> Iterator[None]:
    """Within the block this thread remembers what it sees of sources.

    Changes of their files go unnoticed there, so a block is for one command. A block inside another
    one has the memory of the outer one.
    """
    if _seen.get() is not None:
        yield
        return
    token = _seen.set({})
    try:
        yield
    finally:
        _seen.reset(token)


def remembered(key: tuple[str, ...], look: Callable[[], Value]) -> Value:
    """Returns what `look` found under this key before, or else finds now.

    The value is shared and must not be changed. Outside of one_look() nothing is remembered.
    """
    seen = _seen.get()
    if seen is None:
        return look()
    if key not in seen:
        seen[key] = look()
    found: Value = seen[key]  # type: ignore[assignment]
    return found


def forget() -> None:
    """Frees what is remembered: nobody asks again. Listings grow with the number of images."""
    seen = _seen.get()
    if seen is not None:
        seen.clear()
