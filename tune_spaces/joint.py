"""Searches rate and conditioning together, and the latent channels, which limit both.

mantis tune --config configs/quickstart.yaml --space joint --trials 8

A field that touches stage 1 has at most three values, because each needs a stage 1 of its own.
"""

from tune_spaces.domains import Choice, Field, Integer, LogUniform, Space, Uniform

SPACE: Space = {
    "model.encoder.latent_channels": Field(Choice((4, 8, 16)), touches="stage1"),
    "stage2.rate_weight": Field(LogUniform(3e-4, 3e-2)),
    "stage2.rate_ramp_fraction": Field(Uniform(0.05, 0.75)),
    "model.conditioning.hidden": Field(Integer(8, 256, log=True)),
    "model.prior": Field(Choice(("primary", "per_task", "shared"))),
}
