"""Searches the kind and size of the conditioning, and the sizes of decoder, detector and latent.

mantis tune --config configs/quickstart.yaml --space film --trials 8
"""

from tune_spaces.domains import Choice, Field, Integer, Space

SPACE: Space = {
    "model.conditioning.kind": Field(Choice(("attention", "film", "none"))),
    "model.conditioning.hidden": Field(Integer(8, 256, log=True)),
    "model.decoder.task_channels": Field(Choice((32, 64, 128))),
    "model.detector.hidden": Field(Choice((32, 64, 128)), touches="stage1", optional=True),
    "model.encoder.latent_channels": Field(Choice((4, 8, 16)), touches="stage1", optional=True),
}
