"""Our own range coder against constriction: the same state after every value, and back again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from constriction import stream
from numpy.typing import NDArray

from mantis_core.bitstream import python_coder
from mantis_core.bitstream.coder import exact_model
from tests.root import ROOT

Draw = tuple[Any, Any, NDArray[np.int32]]


def _uniform(rng: np.random.Generator) -> Draw:
    count = int(rng.choice([2, 3, 7, 1000, 1 << 20, 1 << 24]))
    values = rng.choice([0, count - 1, int(rng.integers(count))], size=4).astype(np.int32)
    return stream.model.Uniform(count), python_coder.Uniform(count), values


def _categorical(rng: np.random.Generator) -> Draw:
    counts = rng.multinomial((1 << 16) - 9, rng.dirichlet(np.full(9, 0.2))) + 1
    weights = counts * 256.0 - 1
    values = rng.choice(9, size=20, p=counts / counts.sum()).astype(np.int32)
    theirs = stream.model.Categorical(weights, perfect=False)
    return theirs, python_coder.Categorical(weights), values


DRAWS: list[Callable[[np.random.Generator], Draw]] = [_uniform, _categorical]


@pytest.mark.parametrize("seed", range(200))
def test_it_is_constriction_to_the_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    theirs, ours = stream.queue.RangeEncoder(), python_coder.RangeEncoder()
    drawn = [DRAWS[rng.integers(2)](rng) for _ in range(30)]
    for their_model, our_model, values in drawn:
        theirs.encode(values, their_model)
        ours.encode(values, our_model)
        assert ours.pos() == theirs.pos()
    words = ours.get_compressed()
    decoder, other = python_coder.RangeDecoder(words), stream.queue.RangeDecoder(words)
    for their_model, our_model, values in drawn:
        assert decoder.decode(our_model, len(values)).tolist() == values.tolist()
        assert other.decode(their_model, len(values)).tolist() == values.tolist()


def test_a_carry_runs_through_all_the_words_before_it() -> None:
    encoder = python_coder.RangeEncoder()
    encoder._words, encoder._low = [0x12345678, 0xFFFFFFFF, 0xFFFFFFFF], (1 << 63) + (1 << 24)
    encoder.encode(1, python_coder.Uniform(2))
    assert encoder.get_compressed()[:3].tolist() == [0x12345679, 0, 0]
    assert encoder.pos()[1] == (1 << 23, ((1 << 40) - 1) << 23)


@pytest.mark.parametrize("seed", range(200))
def test_any_bytes_read_as_constriction_reads_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 32, size=rng.integers(2, 9), dtype=np.uint64).astype(np.uint32)
    words[rng.random(len(words)) < 0.3] = 0xFFFFFFFF
    ours, theirs = python_coder.RangeDecoder(words), stream.queue.RangeDecoder(words)
    for _ in range(40):
        their_model, our_model, _ = DRAWS[rng.integers(2)](rng)
        try:
            expected = theirs.decode(their_model)
        except AssertionError:
            with pytest.raises(AssertionError, match="invalid"):
                ours.decode(our_model)
            return
        assert ours.decode(our_model) == expected


def test_a_model_for_each_value_is_that_model() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 1000, size=(50, 3))
    counts[:, 2] = (1 << 16) - counts[:, :2].sum(axis=1)
    values = rng.integers(0, 3, size=50).astype(np.int32)
    together, one_by_one = python_coder.RangeEncoder(), stream.queue.RangeEncoder()
    together.encode(values, python_coder.Categorical(), counts * 256.0 - 1)
    for value, own in zip(values, counts, strict=True):
        one_by_one.encode(int(value), exact_model(own))
    assert together.pos() == one_by_one.pos()


@pytest.mark.parametrize(
    ("model", "value"),
    [(python_coder.Uniform(3), 3), (python_coder.Categorical(np.array([1.0, 2.0])), -1)],
)
def test_a_value_that_a_model_has_not_is_refused(model: Any, value: int) -> None:
    with pytest.raises(ValueError, match="is not between 0 and"):
        python_coder.RangeEncoder().encode(value, model)


WITHOUT = """
import sys
sys.modules["constriction"] = None
import pytest
options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--noconftest"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def test_golden_streams_and_damage_pass_without_constriction() -> None:
    """The tests of streams and messages, golden ones among them, by our own coder alone."""
    own = "tests/mantis_core/bitstream"
    files = [f"{own}/test_wire.py", f"{own}/test_task_field.py", "tests/golden/test_golden.py"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *files], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
