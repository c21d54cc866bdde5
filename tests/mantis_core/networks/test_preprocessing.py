"""Image files as tensors: a client gets the pixels that training and evaluation get."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.checks import CleanImage, StoredFormat, clean_image
from data_prep.read.decoding import Decoder
from data_prep.reading import ReadingConfig
from mantis_core.networks.preprocessing import prepare_image, prepare_images
from mantis_core.pixels import ImageError
from tests.mantis_core.picture_files import FILES, encoded, photo

SIZES = [((64, 64), 64), ((64, 64), 80), ((48, 96), 48)]
"""(height, width) and the stored short side: no room, room to crop, stored images too narrow."""


def evaluated(
    data: bytes, size: tuple[int, int], short_side: int, stored_format: StoredFormat = "webp"
) -> Tensor:
    """A file as evaluation sees it: prepared, stored in a shard, and read from it."""
    clean = clean_image(
        data, short_side=short_side, max_pixels=1e8, stored_format=stored_format, jpeg_quality=95
    )
    assert isinstance(clean, CleanImage), clean
    row = {"row_id": 0, "image": clean.data, "class_label": 0, "labels": [0], "task_mask": [True]}
    schema = pa.schema(
        {
            "row_id": pa.int64(),
            "image": pa.binary(),
            "class_label": pa.int32(),
            "labels": pa.list_(pa.int16(), 1),
            "task_mask": pa.list_(pa.bool_(), 1),
        }
    )
    batch = Decoder(size, 1, (), ReadingConfig(), None).decode(
        pa.Table.from_pylist([row], schema=schema)
    )
    return torch.from_numpy(batch["image"][0])


@pytest.mark.parametrize(("size", "short_side"), SIZES)
@pytest.mark.parametrize("name", FILES)
def test_a_client_gets_the_pixels_of_evaluation(
    name: str, size: tuple[int, int], short_side: int
) -> None:
    data, _ = FILES[name]()
    seen = prepare_image(data, size, short_side)
    assert (seen.dtype, seen.shape) == (torch.uint8, (3, *size))
    assert torch.equal(seen, evaluated(data, size, short_side))


def test_a_kept_file_with_a_transparent_colour_is_white_on_both_sides() -> None:
    pixels = np.array(photo(64, 64))
    pixels[:32] = (7, 7, 7)
    data = encoded(Image.fromarray(pixels), transparency=(7, 7, 7))
    for seen in (prepare_image(data, (64, 64), 64), evaluated(data, (64, 64), 64)):
        assert (seen[:, :32] == 255).all()


def test_a_large_image_is_the_same_to_both_sides() -> None:
    data = encoded(photo(4000, 3000), "JPEG", quality=95)
    assert torch.equal(prepare_image(data, (224, 224), 256), evaluated(data, (224, 224), 256))


def test_images_stored_as_jpeg_differ_little() -> None:
    data = encoded(photo(1001, 703), "JPEG", quality=98)
    seen = prepare_image(data, (64, 64), 64).float()
    difference = (seen - evaluated(data, (64, 64), 64, "jpeg").float()).abs()
    assert 0 < difference.mean() < 2


def test_the_images_of_a_batch_are_prepared_like_each_alone() -> None:
    files = [FILES["RGBA"]()[0], FILES["turned JPEG"]()[0]]
    alone = torch.stack([prepare_image(data, (64, 48), 64) for data in files])
    assert torch.equal(prepare_images(files, (64, 48), 64), alone)
    assert prepare_images([], (64, 48), 64).shape == (0, 3, 64, 48)


def test_all_bad_images_of_a_batch_are_named() -> None:
    good = FILES["RGB"]()[0]
    with pytest.raises(ImageError) as caught:
        prepare_images([good, b"text", good, good[:900]], (64, 48), 64)
    assert "2 of 4 images cannot be read" in str(caught.value)
    assert "(image 2: not an image; image 4: truncated)" in str(caught.value)
    with pytest.raises(ImageError, match=r"image 5: empty file; \.\.\.\)"):
        prepare_images([b""] * 7, (64, 48), 64)
