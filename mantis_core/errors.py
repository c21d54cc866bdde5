"""The error of models, weights and classes; that of streams is in bitstream.py."""


class ModelError(ValueError):
    """A model, its weights or its classes do not fit what was asked of them."""

    exit_code = 2
