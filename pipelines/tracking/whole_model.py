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
        task has classes. `answer` is the whole answer as JSON. A row whose image cannot be read
        or does not fit says why in `error`, which is missing in all others. `params` may name
        `level` or `max_bytes`, and in `tasks` what is asked for, with commas between: for all rows.
        A model that is asked is asked for all tasks if none are named.
        """
        from mantis_core.codec.answer import COLUMNS, failed_row
        from mantis_core.device.requests import named_tasks
        from mantis_core.errors import BudgetError
        from mantis_core.pixels import ImageError

        given = {name: own for name, own in (params or {}).items() if own is not None}
        level, max_bytes = (
            None if given.get(name) is None else int(given[name]) for name in ("level", "max_bytes")
        )
        tasks = named_tasks(self.codec.spec.facts, given.get("tasks"))
        rows: dict[int, dict[str, Any]] = {}
        streams: dict[int, bytes] = {}
        for row, data in enumerate(model_input["image"]):
            try:
                image = self.codec.prepare_image(data)
                (streams[row],) = self.codec.encode(
                    image[None], tasks, level=level, max_bytes=max_bytes
                )
            except (ImageError, BudgetError) as error:
                rows[row] = failed_row(str(error))
        good = list(streams)
        for start in range(0, len(good), BATCH_SIZE):
            some = good[start : start + BATCH_SIZE]
            answers = self.codec.decode([streams[row] for row in some])
            rows |= {row: each.to_row() for row, each in zip(some, answers, strict=True)}
        listed = [rows[row] for row in range(len(rows))]
        return pd.DataFrame(listed, index=model_input.index, columns=COLUMNS)


set_model(MantisModel())
