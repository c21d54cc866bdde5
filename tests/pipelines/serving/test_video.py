"""Videos in front of a camera: which frames are taken, and what is said of a file that is none."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mantis_core.pixels import ImageError
from pipelines.__main__ import app
from pipelines.serving.video import frames
from tests.pipelines.serving.conftest import served

RATE, SECONDS, SIDE = 10, 3, 64


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey frames, each a little brighter."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(RATE))
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(RATE * SECONDS):
            pixels = np.full((SIDE, SIDE, 3), 40 + 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("per_second", "taken"),
    [
        (1, [0, 10, 20]),
        (2, [0, 5, 10, 15, 20, 25]),
        (4, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28]),
    ],
)
def test_so_many_frames_of_each_second_are_taken(
    video: Path, per_second: float, taken: list[int]
) -> None:
    found = list(frames(video, per_second))
    assert [frame.name for frame in found] == [f"{video}, {n / RATE:.2f} s" for n in taken]
    greys = [np.asarray(Image.open(io.BytesIO(frame.read()))).mean() for frame in found]
    np.testing.assert_allclose(greys, [40 + 5 * n for n in taken], atol=4)


def test_all_frames_are_taken_where_more_are_wanted_than_there_are(video: Path) -> None:
    assert len(list(frames(video, 1000))) == RATE * SECONDS


def test_a_camera_sends_the_frames_of_a_video(models: list[Path], video: Path) -> None:
    with served(models[:1]) as url:
        given = ["camera", str(models[0]), url, str(video), "--fps", "2", "--json"]
        done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    shots = json.loads(done.stdout)["shots"]
    assert [shot["file"] for shot in shots] == [f"{video}, {n / 2:.2f} s" for n in range(6)]
    assert all(shot["answers"] and not shot["error"] for shot in shots)


@pytest.mark.parametrize("data", [b"", b"no video", "cut"])
def test_a_file_that_is_no_video_is_named(video: Path, tmp_path: Path, data: bytes | str) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(video.read_bytes()[:400] if isinstance(data, str) else data)
    with pytest.raises(ImageError, match=r"broken\.mp4"):
        list(frames(broken, 1))
