"""What a training is told beside its recipe."""

from __future__ import annotations

from pipelines.stages.order import STAGES
from pipelines.training.job import stage_seed


def test_every_kind_of_stage_draws_from_a_seed_of_its_own() -> None:
    kinds = [stage.name for stage in STAGES.values() if stage.trains]
    seeds = {stage_seed(seed, kind) for seed in range(3) for kind in kinds}
    assert len(seeds) == 3 * len(kinds) > 12
    assert stage_seed(0, "stage1") == stage_seed(0, "stage1") < 2**63
