"""Tensors, config, meta and training state on disk, whatever they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mantis_core.errors import ModelError
from mantis_core.folders import (
    load_folder,
    load_training_state,
    save_folder,
    save_training_state,
)


def test_shared_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    save_folder(tmp_path, {"a": base, "b": base.T, "c": base[0]}, {"k": 1}, {})
    tensors, config, _ = load_folder(tmp_path)
    assert torch.equal(tensors["b"], base.T)
    assert torch.equal(tensors["c"], base[0])
    assert config == {"k": 1}


def test_training_state_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"student/a": torch.randn(2, 2), "empty": torch.zeros(0, dtype=torch.int32)}
    save_training_state(tmp_path, tensors, {"step": 3, "best": {"loss": 0.1}})
    loaded, record = load_training_state(tmp_path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())
    assert (record["step"], record["best"]) == (3, {"loss": 0.1})


def test_damaged_or_incomplete_training_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no complete training state"):
        load_training_state(tmp_path)
    save_training_state(tmp_path, {"a": torch.ones(1)}, {"step": 3})
    good = (tmp_path / "training_state.json").read_text()
    (tmp_path / "training_state.json").write_text(good[:-3])
    with pytest.raises(ModelError, match="damaged"):
        load_training_state(tmp_path)
    (tmp_path / "training_state.json").write_text(good)
    save_file({"a": torch.zeros(1)}, tmp_path / "training_state.safetensors")
    with pytest.raises(ModelError, match="not the file that was saved"):
        load_training_state(tmp_path)
