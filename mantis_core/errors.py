"""The error of models, weights and classes; that of streams is in `bitstream/container.py`."""


class ModelError(ValueError):
    """A model, its weights or its classes do not fit the request."""

    exit_code = 2


class BudgetError(ModelError):
    """An image that no rate of the model codes in the bytes that were allowed."""
