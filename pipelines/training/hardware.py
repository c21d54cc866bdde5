"""Names the hardware and the arithmetic that computed a result.

They decide the last digits of its figures, and bf16 more than those. Results record them; no key
has them, so that one machine can continue what another has begun.
"""

from __future__ import annotations

from typing import Any

import torch

from mantis_core.networks.inference import computes_in_tf32


def computed_on(device: torch.device, *, bf16: bool, workers: int) -> dict[str, Any]:
    """Returns what a result records, as JSON values.

    `device` is "cpu" or "cuda"; `device_name` is the name of the GPU, or the CPU's instruction set
    that torch uses; `cuda` is torch's version of CUDA, None on a CPU. `precision` is "bf16" if
    networks compute in it, else "float32"; `tf32` is whether CUDA computes float32 in TF32.
    `workers` is the number of processes that worked together.
    """
    on_gpu = device.type == "cuda"
    instructions = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else instructions,
        "cuda": torch.version.cuda if on_gpu else None,
        "precision": "bf16" if bf16 else "float32",
        "tf32": on_gpu and computes_in_tf32(),
        "workers": workers,
    }
