"""benchmarks/redundancy.py: contexts, thresholds and flips, on latents whose figures are known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.redundancy import (
    bits_per_image,
    coded_contexts,
    flipped,
    main,
    near_threshold,
    prefix_bits,
    with_noise,
)
from mantis_core.codec.checkpoint import save_model
from mantis_core.networks.bottleneck import _context_rows
from mantis_core.symbols import CONTEXTS
from tests.mantis_core.conftest import make_batch, make_codec, make_problem, make_stage2


def of(*values: float) -> np.ndarray:
    return np.array(values, np.float32).reshape(1, 1, 1, -1)


def test_symbols_near_the_threshold_towards_zero_are_counted() -> None:
    assert near_threshold(of(0.0, 0.4, 0.49)) == 0  # no symbol is sent
    assert near_threshold(of(0.55, -0.59, 0.7, 1.4)) == 0.5
    assert near_threshold(of(1.55, -1.45, 0.95)) == pytest.approx(1 / 3)


def test_changed_symbols_are_counted_for_each_that_is_not_zero() -> None:
    assert flipped(of(0.1, 0.6, -2.0), of(0.2, 0.4, -2.0)) == 0.5
    assert flipped(of(0.1), of(0.7)) == 1.0  # from zero, and no symbol was sent
    latents = np.random.default_rng(1).normal(0, 1, (50, 2, 8, 8)).astype(np.float32)
    changed = with_noise(latents, 0.01) - latents
    assert changed.std() == pytest.approx(0.01, rel=0.05)
    assert 0 < flipped(latents, with_noise(latents, 0.01)) < 0.05


def test_a_context_that_tells_the_symbol_saves_its_bits() -> None:
    symbols = np.random.default_rng(0).integers(-1, 2, (200, 1, 4, 4))
    nothing = bits_per_image(symbols, np.zeros_like(symbols))
    assert nothing == pytest.approx(16 * np.log2(3), rel=0.02)
    assert bits_per_image(symbols, symbols + 1) < 0.1 * nothing


def test_a_prefix_costs_what_it_does_not_tell() -> None:
    symbols = np.random.default_rng(0).integers(-1, 2, (2000, 1, 4, 4))
    same = prefix_bits(symbols, symbols)
    assert same.rest < 0.1 * same.alone
    assert same.prefix == same.alone
    signless = prefix_bits(symbols, np.abs(symbols))  # it tells all but the sign
    assert signless.rest == pytest.approx(16 * 2 / 3, rel=0.1)
    assert signless.change == pytest.approx(0, abs=0.05)
    other = np.random.default_rng(1).integers(-1, 2, symbols.shape)
    assert prefix_bits(symbols, other).change == pytest.approx(1, abs=0.2)  # it tells nothing


def test_the_contexts_are_those_that_are_coded() -> None:
    symbols = np.random.default_rng(0).integers(-3, 4, (2, 3, 5, 6))
    rows = _context_rows(torch.from_numpy(symbols).float()).numpy()
    channels = np.arange(3)[:, None, None]
    np.testing.assert_array_equal(coded_contexts(symbols), rows - CONTEXTS * channels)


def photographs(file: Path) -> str:
    """A Parquet file of six small images."""
    files = []
    for image in make_batch(make_problem(), 6).image:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        files.append(buffer.getvalue())
    pq.write_table(pa.table({"image": files}), file)
    return str(file)


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> Any:
    """What the program prints as its last line."""
    monkeypatch.setattr("sys.argv", ["redundancy", *arguments])
    assert main() == 0
    return json.loads(capsys.readouterr().out)


def test_a_codec_is_read_and_its_figures_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "codec", make_codec(make_problem()), {})
    images = photographs(tmp_path / "images.parquet")
    found = printed(monkeypatch, capsys, str(tmp_path / "codec"), images, "--images", "5")
    assert found["images"] == 5
    assert 0 < found["near_threshold"] < 1
    assert found["flipped"]["jpeg"] > found["flipped"]["noise"] >= 0
    assert found["bits"]["nothing"] > 0


def test_the_levels_of_a_model_are_compared_where_one_is_above_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = make_stage2(make_problem(), rate_weights=(1e-3, 1e-2)).student
    codec.finish()
    save_model(tmp_path / "codec", codec, {})
    own = [str(tmp_path / "codec"), photographs(tmp_path / "images.parquet")]
    cost = printed(monkeypatch, capsys, *own, "--level", "1", "--prefix", "4")["prefix"]
    assert cost.keys() == {"alone", "prefix", "rest"}
    assert cost["prefix"] + cost["rest"] > 0
    with pytest.raises(SystemExit):
        printed(monkeypatch, capsys, *own, "--level", "4", "--prefix", "1")
    assert "--prefix is 1: it must be above --level, which is 4" in capsys.readouterr().err
