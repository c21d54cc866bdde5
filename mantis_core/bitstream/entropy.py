"""The range coder of the bitstream: constriction's, or where that is not installed our own in
Python, which writes the same bytes."""

from __future__ import annotations

__all__ = ["stream"]

try:
    from constriction import stream
except ModuleNotFoundError:  # a device, see mantis_lite
    from mantis_core.bitstream import python_coder as stream  # type: ignore[no-redef]
