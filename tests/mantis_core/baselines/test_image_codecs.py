"""Files of image codecs: whole sizes, sizes without headers, and images that come back."""

import numpy as np
import pytest
from PIL import features

from mantis_core.baselines.image_codecs import (
    IMAGE_CODECS,
    CodecError,
    avif_media_bytes,
    coded_at,
    webp_frame_bytes,
)


def photograph(size: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth picture with a little noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = np.stack([np.sin(6 * x + c) + np.cos(5 * y - c) for c in range(3)], axis=-1)
    return np.clip(128 + 50 * waves + rng.normal(0, 4, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", IMAGE_CODECS)
def test_a_file_grows_with_its_quality_and_comes_nearer_to_the_image(name: str) -> None:
    codec, image = IMAGE_CODECS[name], photograph()
    sizes, errors = [], []
    for quality in (5, 40, 90):
        data = codec.encode(image, quality)
        again = codec.decode(data)
        assert again.shape == image.shape
        sizes.append(len(data))
        errors.append(np.abs(again.astype(float) - image).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", IMAGE_CODECS)
def test_an_image_is_coded_smaller_and_comes_back_in_its_size(name: str) -> None:
    codec, image = IMAGE_CODECS[name], photograph(65)
    whole, same = coded_at(codec, image, 50)
    assert (whole, same.tolist()) == (codec.encode(image, 50), codec.decode(whole).tolist())
    half, again = coded_at(codec, image, 50, 0.5)
    assert codec.decode(half).shape == (32, 32, 3)
    assert again.shape == image.shape
    assert len(half) < len(whole)
    assert np.abs(again.astype(float) - image).mean() < 12
    tiny, again = coded_at(codec, image, 50, 0.001)
    assert codec.decode(tiny).shape == (1, 1, 3)
    assert again.shape == image.shape


@pytest.mark.parametrize("size", [16, 64, 65])
def test_headers_are_what_the_formats_prescribe(size: int) -> None:
    for seed in range(3):
        files = {name: c.encode(photograph(size, seed), 50) for name, c in IMAGE_CODECS.items()}
        headers = {name: len(f) - IMAGE_CODECS[name].coded_bytes(f) for name, f in files.items()}
        assert headers["webp"] == 12 + 8 + 10  # RIFF, chunk, frame
        # A JPEG's tables: two for quantisation, four of at least 19 bytes for Huffman codes.
        assert headers["jpeg"] >= 2 + 18 + 2 * 69 + 19 + 4 * 19 + 14 + 2
        assert 100 < headers["avif"] < len(files["avif"])


def test_what_is_no_such_file_is_refused() -> None:
    with pytest.raises(CodecError, match="without an end"):
        IMAGE_CODECS["jpeg"].coded_bytes(b"\xff\xd8\xff\xe0\x00\x04ab")
    with pytest.raises(CodecError, match="without a picture"):
        webp_frame_bytes(b"RIFF\0\0\0\0WEBPEXIF\0\0\0\0")
    with pytest.raises(CodecError, match="box of 3 bytes"):
        avif_media_bytes(b"\0\0\0\3mdat")


def test_a_format_pillow_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(CodecError, match="built without WebP"):
        IMAGE_CODECS["webp"].require()
