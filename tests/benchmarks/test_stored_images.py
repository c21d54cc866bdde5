"""The comparison of ways to store images."""

from __future__ import annotations

import pytest

from benchmarks.stored_images import FORMATS, measure
from data_prep.checks import ENCODINGS
from tests.mantis_core.picture_files import photo


@pytest.mark.parametrize("name", FORMATS)
def test_only_png_and_webp_keep_every_pixel(name: str) -> None:
    measured = measure([photo()], *FORMATS[name])
    assert measured["bytes"] > 0
    assert (measured["difference"] == 0) == name.startswith(("PNG", "WebP"))


def test_what_prepare_writes_is_among_the_formats() -> None:
    assert ("WEBP", ENCODINGS["WEBP"]) in FORMATS.values()
