"""Blocks that client, server and teacher share."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn

from mantis_core.networks.blocks import TaskModules

NAMES = sorted(n for n in dir(nn.ModuleDict()) if re.fullmatch(r"[a-z][a-z0-9_]*", n))
"""All names of tasks that nn.ModuleDict refuses."""


def test_modules_of_tasks_may_have_any_name_that_a_config_allows() -> None:
    assert {"train", "items", "type", "to", "keys", "forward"} <= set(NAMES)
    modules = TaskModules({name: nn.Linear(1, 1) for name in NAMES})
    assert list(modules) == NAMES == [name for name, _ in modules.items()]
    assert len(list(modules.parameters())) == 2 * len(NAMES)
    assert "nothing" not in modules
    again = TaskModules({name: nn.Linear(1, 1) for name in NAMES})
    again.load_state_dict(modules.state_dict())
    assert torch.equal(again["train"].weight, modules["train"].weight)  # type: ignore[arg-type]
    copied = copy.deepcopy(modules).eval()
    assert not copied["items"].training
    assert modules["items"].training
    assert copied["items"] is not modules["items"]


def test_modules_of_tasks_are_saved_under_the_names_that_module_dicts_had() -> None:
    parts = {"animals": nn.Linear(1, 1), "road": nn.BatchNorm2d(2)}
    assert list(TaskModules(parts).state_dict()) == list(nn.ModuleDict(parts).state_dict())
