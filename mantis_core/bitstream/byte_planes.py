"""Numbers of two bytes, deflated: all low bytes first, then all high bytes, which repeat."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

_BYTES = 2


def deflate_planes(
    values: NDArray[np.uint16], strategy: int = zlib.Z_DEFAULT_STRATEGY
) -> NDArray[np.uint8]:
    """Returns zlib's bytes of all `values`. `strategy` is zlib's; reading does not depend on it."""
    planes = values.ravel().astype("<u2").view(np.uint8).reshape(-1, _BYTES).T
    deflate = zlib.compressobj(9, strategy=strategy)
    data = deflate.compress(planes.tobytes()) + deflate.flush()
    return np.frombuffer(data, np.uint8).copy()


def inflate_planes(packed: NDArray[np.uint8], count: int, name: str) -> NDArray[np.uint16]:
    """Returns the `count` values that were deflated; never makes many more bytes.

    Raises ValueError, which calls the bytes the packed `name`, for anything else.
    """
    inflate, size = zlib.decompressobj(), _BYTES * count
    try:
        found = inflate.decompress(packed.tobytes(), size + 1)
    except zlib.error as error:
        raise ValueError(f"the packed {name} are damaged: {error}") from None
    if len(found) != size or not inflate.eof or inflate.unused_data:
        raise ValueError(f"the packed {name} are not of this model")
    planes = np.frombuffer(found, np.uint8).reshape(_BYTES, -1)
    return np.ascontiguousarray(planes.T).view("<u2").ravel().astype(np.uint16, copy=False)
