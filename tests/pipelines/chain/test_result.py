"""What a run of the chain says of its stages."""

from __future__ import annotations

from pipelines.chain.result import hardware_tags

CPU = {"device": "cpu", "cuda": None, "precision": "float32", "tf32": False, "workers": 2}


def test_hardware_becomes_tags_by_which_runs_can_be_searched() -> None:
    assert hardware_tags({"computed_on": [CPU]}) == {
        "mantis.device": "cpu",
        "mantis.precision": "float32",
        "mantis.tf32": "false",
        "mantis.workers": "2",
    }


def test_unlike_machines_stand_beside_each_other_and_a_stage_without_any_has_no_tag() -> None:
    gpu = {**CPU, "device": "cuda", "cuda": "13.2"}
    tags = hardware_tags({"computed_on": [CPU, gpu]})
    assert tags["mantis.device"] == "cpu, cuda"
    assert tags["mantis.cuda"] == "13.2"
    assert tags["mantis.workers"] == "2"
    assert hardware_tags({"metrics": {}}) == {}
