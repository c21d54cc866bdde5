"""The registered server as MLflow runs it: streams in, answers out.

MLflow stores this file in the model and executes it on loading (models-from-code), so nothing is
unpickled. The codec itself is mantis_core, which is stored in the model as well.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH_SIZE = 32  # images decoded at a time, to bound memory


class MantisServer(PythonModel):
    """Decodes streams. Each row is one stream with one image."""

    def load_context(self, context: PythonModelContext) -> None:
        from mantis_core.codec.checkpoint import load_server

        self.codec = load_server(context.artifacts["checkpoint"])

    def predict(  # type: ignore[override]  # MLflow allows it without a context
        self, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """Maps column `stream` (bytes) to the output columns that package.py declares.

        `class_index` is -1 and `class_name` None if the image has no single class, or if no decoded
        task has classes. `answer` is the whole answer as JSON. A row whose stream cannot be decoded
        says why in `error`, which is missing in all others.
        """
        from mantis_core.codec.answer import COLUMNS

        streams, rows = list(model_input["stream"]), []
        for start in range(0, len(streams), BATCH_SIZE):
            rows += self._rows(streams[start : start + BATCH_SIZE])
        return pd.DataFrame(rows, index=model_input.index, columns=COLUMNS)

    def _rows(self, streams: list[Any]) -> list[dict[str, Any]]:
        """Returns a row for each stream. If one of them is bad, each is decoded alone."""
        from mantis_core.bitstream.container import BitstreamError
        from mantis_core.codec.answer import failed_row
        from mantis_core.errors import ModelError

        try:
            answers = self.codec.decode(streams)
            wrong = f"a stream of {len(answers)} images; give one image in each row"
        except (BitstreamError, ModelError) as error:
            answers, wrong = [], str(error)
        if len(answers) == len(streams):
            return [answer.to_row() for answer in answers]
        if len(streams) == 1:
            return [failed_row(wrong)]
        return [row for stream in streams for row in self._rows([stream])]


set_model(MantisServer())
