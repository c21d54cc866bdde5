"""Contexts that run a module as it is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import nn

from mantis_core.networks.inference import computes_in_tf32, full_float32, still

CONVOLUTIONS, PRODUCTS = torch.backends.cudnn.conv, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def as_torch_starts() -> Iterator[None]:
    """TF32 in cuDNN and not in matrix products, before and after each test."""
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    assert torch.backends.cudnn.allow_tf32  # an error if a switch is not as before
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_still_module_computes_without_tf32_and_the_switches_are_restored() -> None:
    module = nn.Linear(2, 2)
    assert computes_in_tf32()
    with torch.autocast("cpu", dtype=torch.bfloat16), still(module):
        assert not module.training
        assert CONVOLUTIONS.fp32_precision == PRODUCTS.fp32_precision == "ieee"
        assert not computes_in_tf32()
        assert module(torch.ones(1, 2)).dtype == torch.float32
    assert module.training
    assert computes_in_tf32()


@pytest.mark.parametrize("allowed", [True, False])
def test_what_a_program_has_set_by_the_older_switches_is_restored(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    with full_float32("cpu"):
        assert not computes_in_tf32()
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.backends.cuda.matmul.allow_tf32 == allowed
    as_first = torch.backends
    as_first.cudnn.allow_tf32, as_first.cuda.matmul.allow_tf32 = True, False


def test_what_a_program_has_set_by_the_newer_switches_is_restored() -> None:
    CONVOLUTIONS.fp32_precision = "ieee"
    with full_float32("cpu"):
        assert not computes_in_tf32()
    assert CONVOLUTIONS.fp32_precision == "ieee"
    CONVOLUTIONS.fp32_precision = "tf32"


def test_a_switch_is_restored_after_an_error() -> None:
    with suppress(ValueError), still(nn.Linear(2, 2)):
        raise ValueError
    assert computes_in_tf32()


def test_the_first_of_two_threads_to_leave_does_not_turn_tf32_on_for_the_other() -> None:
    one, other = full_float32("cpu"), full_float32("cpu")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not computes_in_tf32()
    other.__exit__(None, None, None)
    assert computes_in_tf32()
