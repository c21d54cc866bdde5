"""Frames of a video, as a camera that takes a few pictures a second would have them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mantis_core.errors import ModelError
from mantis_core.pixels import ImageError
from pipelines.serving.camera import Frame

VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm"))


def frames(path: Path, per_second: float) -> Iterator[Frame]:
    """At most `per_second` frames of each second of a video, uncompressed.

    Each is the first at or behind its time. Needs the package PyAV. Raises ModelError without it,
    ImageError for a file that is no video, or one that ends before its first frame.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise ModelError(
            f"{path.name} is a video, which needs PyAV: pip install 'mantis-codec[video]'"
        ) from None
    number, due = 0, None
    try:
        with av.open(str(path)) as video:
            for frame in video.decode(video=0):
                at = number / per_second if frame.time is None else frame.time
                if due is not None and at < due - 1e-6:
                    continue
                due = (at if due is None else due) + 1 / per_second
                written = io.BytesIO()
                Image.fromarray(frame.to_ndarray(format="rgb24")).save(written, "BMP")
                yield Frame(f"{path}, {at:.2f} s", written.getvalue)
                number += 1
    except (av.FFmpegError, IndexError) as error:
        raise ImageError(f"{path} is no video that PyAV reads: {error}") from None
    if not number:
        raise ImageError(f"{path} holds no frame of a video")
