"""The registered client as MLflow runs it: image bytes in, streams out.

MLflow stores this file in the model and executes it on loading (models-from-code), so nothing is
unpickled. The codec itself is mantis_core, which is stored in the model as well.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class MantisClient(PythonModel):
    """Encodes images on the device, one stream per row."""

    def load_context(self, context: PythonModelContext) -> None:
        from mantis_core.codec.checkpoint import load_client

        self.codec = load_client(context.artifacts["checkpoint"])

    def predict(  # type: ignore[override]  # MLflow allows it without a context
        self, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """Maps column `image` (bytes of image files) to columns `stream` and `wire_bytes`.

        Raises mantis_core's ImageError with the rows that cannot be read, counted from 1.
        """
        streams = self.codec.encode(self.codec.prepare_images(list(model_input["image"])))
        return pd.DataFrame(
            {"stream": streams, "wire_bytes": [len(stream) for stream in streams]},
            index=model_input.index,
        )


set_model(MantisClient())
