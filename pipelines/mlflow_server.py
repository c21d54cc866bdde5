"""The registered server as MLflow runs it: streams in, answers out.

MLflow copies this file into the model and executes it to load one (models-from-code), so nothing
is unpickled. It holds no codec; that is mantis_core, which travels beside it.
"""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

BATCH_SIZE = 32  # images decoded at a time, to bound memory


class MantisServer(PythonModel):
    """What runs where the bits arrive: every row is one stream of one image."""

    def load_context(self, context: PythonModelContext) -> None:
        from mantis_core.checkpoint import load_server

        self.codec = load_server(context.artifacts["checkpoint"])

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Column `stream` (bytes) to one row each of what pipelines.model_package declares.

        `class_index` is -1 and `class_name` None where the image has no single class; `answer` is
        the whole answer as JSON.
        """
        streams = list(model_input["stream"])
        rows = []
        for start in range(0, len(streams), BATCH_SIZE):
            rows += [
                answer.to_row() for answer in self.codec.decode(streams[start : start + BATCH_SIZE])
            ]
        return pd.DataFrame(rows, index=model_input.index)


set_model(MantisServer())
