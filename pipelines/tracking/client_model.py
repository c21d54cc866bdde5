"""The registered client as MLflow runs it: image bytes in, streams out.

MLflow stores this file in the model and executes it on loading (models-from-code), so nothing is
unpickled. The codec itself is mantis_core, which is stored in the model as well.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

COLUMNS = ["stream", "wire_bytes", "error"]


class MantisClient(PythonModel):
    """Encodes images on the device, one stream per row."""

    def load_context(self, context: PythonModelContext) -> None:
        from mantis_core.codec.checkpoint import load_client

        self.codec = load_client(context.artifacts["checkpoint"])

    def predict(  # type: ignore[override]  # MLflow allows it without a context
        self, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """Maps column `image` (bytes of image files) to `stream`, `wire_bytes` and `error`.

        `params` may name `level` or `max_bytes`, and in `tasks` what is asked for, with commas
        between: for all rows. A model that is asked is asked for all tasks if none are named. A row
        whose image cannot be read or does not fit has an empty stream and says why in `error`,
        which is missing in all others.
        """
        from mantis_core.device.requests import named_tasks
        from mantis_core.errors import BudgetError
        from mantis_core.pixels import ImageError

        given = {name: own for name, own in (params or {}).items() if own is not None}
        level, max_bytes = (
            None if given.get(name) is None else int(given[name]) for name in ("level", "max_bytes")
        )
        tasks = named_tasks(self.codec.facts, given.get("tasks"))
        rows = []
        for data in model_input["image"]:
            try:
                image = self.codec.prepare_image(data)
                (stream,) = self.codec.encode(image[None], tasks, level=level, max_bytes=max_bytes)
            except (ImageError, BudgetError) as error:
                rows.append({"stream": b"", "wire_bytes": 0, "error": str(error)})
                continue
            rows.append({"stream": stream, "wire_bytes": len(stream), "error": None})
        return pd.DataFrame(rows, index=model_input.index, columns=COLUMNS)


set_model(MantisClient())
