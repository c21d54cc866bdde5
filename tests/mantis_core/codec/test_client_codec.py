"""What a client may be asked: images, and tasks by name or image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mantis_core.bitstream.wire import read_stream
from mantis_core.codec.mantis import Mantis
from mantis_core.errors import ModelError
from mantis_core.tasks import Batch


def images(count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)


def test_a_request_for_tasks_is_what_the_stream_carries(codec: Mantis) -> None:
    for answer in codec.decode(codec.encode(images(), tasks=["kitchen"])):
        assert answer.tasks == ("kitchen",)
        assert answer.task_probability == {"kitchen": 1.0}
        assert answer.class_index in (4, 5)


def test_tasks_may_be_asked_for_image_by_image(codec: Mantis, batch: Batch) -> None:
    encoded = codec.encode_in_detail(batch.image, tasks=batch.task_mask)
    for each, asked in zip(encoded, batch.task_mask.numpy(), strict=True):
        np.testing.assert_array_equal(each.mask, asked)
        (image,) = read_stream(each.data, codec.tables(), codec.client_codec().stream_spec).images
        assert image.tasks.mask == tuple(asked.tolist())


def test_an_unknown_task_is_refused_with_those_there_are(codec: Mantis) -> None:
    with pytest.raises(ModelError, match=r"'cars'.* animals, tools, kitchen"):
        codec.encode(images(), tasks=["animals", "cars"])
    with pytest.raises(ModelError, match="none asked for"):
        codec.encode(images(), tasks=[])
    with pytest.raises(ModelError, match="image 1 is asked about no task"):
        codec.encode(images(2), tasks=torch.tensor([[True, False, False], [False] * 3]))


def test_one_name_and_one_row_ask_the_same_of_all_images(codec: Mantis) -> None:
    by_list = codec.encode(images(), tasks=["kitchen"])
    assert codec.encode(images(), tasks="kitchen") == by_list
    assert codec.encode(images(), tasks=("kitchen",)) == by_list
    assert codec.encode(images(), tasks=torch.tensor([[False, False, True]])) == by_list


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, 3),
        torch.ones(0, 3, dtype=torch.bool),
        np.ones((3, 3)),
        [True, False, True],
        [["kitchen"]],
        3,
    ],
)
def test_tasks_of_another_kind_are_refused_with_what_is_allowed(wrong: Any, codec: Mantis) -> None:
    with pytest.raises(ModelError, match=r"tasks are .*allowed.*bool"):
        codec.encode(images(), tasks=wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 32, dtype=torch.uint8),
        np.zeros((1, 3, 32, 32), dtype=np.uint8),
        [torch.zeros(3, 32, 32, dtype=torch.uint8)],
    ],
)
def test_images_of_another_kind_are_refused(wrong: Any, codec: Mantis) -> None:
    with pytest.raises(ModelError, match=r"allowed: (a )?uint8"):
        codec.encode(wrong)
