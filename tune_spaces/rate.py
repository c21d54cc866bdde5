"""Searches the rate weights of both stages, the ramp of stage 2's weight, and the prior.

mantis tune --config configs/quickstart.yaml --space rate --trials 8
"""

from tune_spaces.domains import Choice, Field, LogUniform, Space, Uniform

SPACE: Space = {
    "stage1.rate_weight": Field(Choice((1e-3, 2e-3, 4e-3)), touches="stage1"),
    "stage2.rate_weight": Field(LogUniform(3e-4, 3e-2)),
    "stage2.rate_ramp_fraction": Field(Uniform(0.05, 0.75)),
    "model.prior": Field(Choice(("primary", "per_task", "shared"))),
}
