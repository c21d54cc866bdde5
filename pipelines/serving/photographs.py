"""Photographs to streams, for callers that cannot encode themselves. Knows no HTTP and no Ray."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from http import HTTPStatus

from mantis_core.codec.client_codec import ClientCodec
from mantis_core.device.requests import named_tasks
from mantis_core.errors import BudgetError, ModelError
from mantis_core.pixels import ImageError
from pipelines.serving.answering import FAULT, Reply, refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photograph:
    """An image file, and what its stream shall be for: arguments as `ClientCodec.encode`."""

    body: bytes
    tasks: tuple[str, ...] | None = None
    level: int | None = None
    max_bytes: int | None = None


def stream_of(codec: ClientCodec, photograph: Photograph) -> bytes | Reply:
    """The stream of a photograph, or why there is none."""
    tasks = named_tasks(codec.facts, None) if photograph.tasks is None else list(photograph.tasks)
    try:
        image = codec.prepare_image(photograph.body)
        (stream,) = codec.encode(
            image[None], tasks, level=photograph.level, max_bytes=photograph.max_bytes
        )
        return stream
    except ImageError as error:
        content = {"error": f"no photograph: {error}", "reason": "image"}
        return Reply(int(HTTPStatus.UNPROCESSABLE_ENTITY), content)
    except BudgetError as error:
        content = {"error": str(error), "reason": "budget"}
        return Reply(int(HTTPStatus.UNPROCESSABLE_ENTITY), content)
    except ModelError as error:
        return refusal(error)
    except Exception:
        logger.exception("a photograph could not be encoded")
        return FAULT
