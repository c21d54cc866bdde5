"""Weights of a client: rounded once where float16 holds them, packed and unpacked bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from mantis_core.codec.packed_weights import PACKED, pack_weights, round_weights, unpack_weights


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def assert_equal_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 5))


def test_rounding_moves_no_weight_further_than_half_a_step_of_float16(network: nn.Module) -> None:
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    round_weights(network)
    changed = 0
    for name, weight in network.named_parameters():
        assert torch.equal(weight, before[name].half().float()), name
        assert (weight - before[name]).abs().max() <= 2**-11 * before[name].abs().max()
        changed += int((weight != before[name]).sum())
    assert changed > 200
    once = {name: weight.clone() for name, weight in network.named_parameters()}
    round_weights(network)
    assert_equal_bits(dict(network.named_parameters()), once)


def test_buffers_are_not_rounded() -> None:
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(0.1)  # type: ignore[union-attr,operator]
    round_weights(norm)
    assert torch.equal(norm.running_mean, torch.full((3,), 0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [65_520.0, -1e9, float("inf"), float("nan")])
def test_a_tensor_with_a_value_that_float16_cannot_hold_stays_as_it_is(
    value: float, network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    weight = network[0].weight  # type: ignore[index]
    with torch.no_grad():
        weight[0, 0, 0, 0] = value
    before = {name: each.detach().clone() for name, each in network.named_parameters()}
    with caplog.at_level(logging.WARNING):
        round_weights(network)
    assert torch.equal(bits(weight.detach()), bits(before["0.weight"]))
    assert [record.args[0] for record in caplog.records if record.args] == ["0.weight"]  # type: ignore[index]
    state = network.state_dict()
    packed = pack_weights(state)
    assert packed.keys() == {"0.weight", PACKED}
    assert_equal_bits(unpack_weights(packed, state), state)
    assert not torch.equal(network[2].weight, before["2.weight"])  # type: ignore[index]


def test_a_row_of_tiny_weights_is_not_rounded_away(
    network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """A norm behind them may enlarge them again; float16 has no digits left below 2**-24."""
    weight = network[0].weight  # type: ignore[index]
    with torch.no_grad():
        weight[1] *= 1e-7
    before = weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        round_weights(network)
    assert torch.equal(weight, before)
    assert "0.weight stays float32" in caplog.text


def test_tiny_weights_beside_larger_ones_of_their_row_are_rounded(network: nn.Module) -> None:
    weight = network[0].weight  # type: ignore[index]
    with torch.no_grad():
        weight[1, 0] *= 1e-7
        weight[2] = 0
        weight[3] *= 2.0**-13 / weight[3].abs().max()
    round_weights(network)
    assert torch.equal(weight, weight.half().float())
    assert (weight[1, 0].abs() <= 2**-24).all()


def test_the_largest_float16_is_kept(network: nn.Module) -> None:
    weight = network[2].weight  # type: ignore[index]
    with torch.no_grad():
        weight[0, 0] = 65_519.0
    round_weights(network)
    assert weight[0, 0] == 65_504


@pytest.mark.parametrize("rounded", [True, False])
def test_packed_weights_come_back_bit_for_bit(rounded: bool, network: nn.Module) -> None:
    if rounded:
        round_weights(network)
    state = network.state_dict()
    state["2.bias"][0] = -0.0
    packed = pack_weights(state)
    exact = {name for name, weight in state.items() if torch.equal(weight, weight.half().float())}
    assert exact == (state.keys() if rounded else {"1.weight", "1.bias"})
    assert packed.keys() == (state.keys() - exact) | {PACKED}
    assert_equal_bits(unpack_weights(packed, state), state)
    assert_equal_bits(unpack_weights(state, state), state)
    again = pack_weights(packed)
    assert again.keys() == packed.keys()
    assert torch.equal(again[PACKED], packed[PACKED])


def test_packed_weights_take_less_than_two_bytes_each() -> None:
    torch.manual_seed(0)
    network = nn.Linear(256, 256)
    round_weights(network)
    count = sum(weight.numel() for weight in network.parameters())
    packed = pack_weights(network.state_dict())
    assert packed.keys() == {PACKED}
    assert packed[PACKED].nbytes < 1.75 * count


def test_the_form_of_the_memory_of_a_weight_does_not_matter() -> None:
    weight = torch.randn(4, 3, 3, 3).half().float()
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pack_weights({"a": weight})[PACKED], pack_weights({"a": last})[PACKED])


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "other"])
def test_bytes_of_something_else_are_refused(damage: str, network: nn.Module) -> None:
    round_weights(network)
    state = network.state_dict()
    packed = pack_weights(state)
    planes = packed[PACKED]
    wrong = {
        "cut": planes[:-1],
        "empty": planes[:0],
        "longer": torch.cat([planes, planes[:1]]),
        "other": planes.flip(0),
    }
    with pytest.raises(ValueError, match="packed weights are"):
        unpack_weights({PACKED: wrong[damage]}, state)


def test_weights_of_another_shape_are_refused(network: nn.Module) -> None:
    round_weights(network)
    state = network.state_dict()
    packed = pack_weights(state)
    for like in ({**state, "3.weight": torch.zeros(1)}, {**state, "2.bias": torch.zeros(4)}):
        with pytest.raises(ValueError, match="not of this model"):
            unpack_weights(packed, like)
