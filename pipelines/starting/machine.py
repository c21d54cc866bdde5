"""Looks at this machine for a first config: GPUs, and whether torchvision's weights are at hand."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

from pipelines.starting.minutes import usable_cpus
from pipelines.starting.numbers import Machine

TIMEOUT_S = 3.0


def this_machine(teacher: str) -> Machine:
    """Returns what this machine has. Loads torch, downloads nothing."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(usable_cpus(), gpus, has_pretrained(teacher))


def has_pretrained(name: str) -> bool:
    """Returns whether torchvision's weights of a network are cached here or can be reached."""
    from torchvision.models import get_model_weights

    url = get_model_weights(name).DEFAULT.url  # type: ignore[attr-defined]
    return is_cached(url) or is_reachable(url)


def is_cached(url: str) -> bool:
    """Returns whether torch.hub has downloaded this file already."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(os.path.expanduser(home), "hub", "checkpoints", url.rsplit("/", 1)[-1]).is_file()


def is_reachable(url: str) -> bool:
    """Returns whether a server offers this file. Asks for its head alone."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False
