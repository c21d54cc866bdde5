"""The registered client as MLflow runs it: image bytes in, streams out.

MLflow copies this file into the model and executes it to load one (models-from-code), so nothing
is unpickled. It holds no codec; that is mantis_core, which travels beside it.
"""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class MantisClient(PythonModel):
    """What runs on the device: every row becomes one stream."""

    def load_context(self, context: PythonModelContext) -> None:
        from mantis_core.checkpoint import load_client

        self.codec = load_client(context.artifacts["checkpoint"])

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Column `image` (JPEG or PNG bytes) to columns `stream` and `wire_bytes`."""
        streams = []
        for data in model_input["image"]:
            streams += self.codec.encode(self.codec.prepare_image(data)[None])
        return pd.DataFrame(
            {"stream": streams, "wire_bytes": [len(stream) for stream in streams]},
            index=model_input.index,
        )


set_model(MantisClient())
