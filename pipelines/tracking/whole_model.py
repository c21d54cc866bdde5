"""The registered model as MLflow runs it: image bytes in, answers out, through a real bitstream.

MLflow stores this file in the model and executes it on loading (models-from-code), so nothing is
unpickled. The codec itself is mantis_core, which is stored in the model as well.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH_SIZE = 32  # images decoded at a time, to bound memory


class MantisModel(PythonModel):
    """Runs client and server in one process. Each row is encoded and decoded from its stream."""

    def load_context(self, context: PythonModelContext) -> None:
        from mantis_core.codec.checkpoint import load_model

        self.codec = load_model(context.artifacts["checkpoint"])

    def predict(  # type: ignore[override]  # MLflow allows it without a context
        self, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """Maps column `image` (bytes of image files) to the columns that package.py declares.

        `class_index` is -1 and `class_name` None if the image has no single class, or if no decoded
        task has classes. `answer` is the whole answer as JSON. Raises mantis_core's ImageError with
        the rows that cannot be read, counted from 1.
        """
        images = self.codec.prepare_images(list(model_input["image"]))
        rows = []
        for start in range(0, len(images), BATCH_SIZE):
            streams = self.codec.encode(images[start : start + BATCH_SIZE])
            rows += [answer.to_row() for answer in self.codec.decode(streams)]
        return pd.DataFrame(rows, index=model_input.index)


set_model(MantisModel())
