"""What results record of the hardware that computed them."""

from __future__ import annotations

import json

import pytest
import torch

from mantis_core.networks.inference import full_float32
from pipelines.training.hardware import computed_on


def test_a_cpu_is_named_by_its_instructions_and_has_neither_cuda_nor_tf32() -> None:
    found = computed_on(torch.device("cpu"), bf16=True, workers=2)
    assert found.pop("device_name") == torch.backends.cpu.get_cpu_capability()
    assert found == {
        "device": "cpu",
        "cuda": None,
        "precision": "bf16",
        "tf32": False,
        "workers": 2,
    }
    assert json.loads(json.dumps(found)) == found


def test_a_gpu_is_recorded_with_its_name_cuda_and_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    gpu = torch.device("cuda", 1)
    by_default = computed_on(gpu, bf16=False, workers=1)
    with full_float32("cpu"):
        exact = computed_on(gpu, bf16=False, workers=1)
    assert by_default == {
        "device": "cuda",
        "device_name": "a GPU, cuda:1",
        "cuda": torch.version.cuda,
        "precision": "float32",
        "tf32": True,
        "workers": 1,
    }
    assert exact == {**by_default, "tf32": False}
