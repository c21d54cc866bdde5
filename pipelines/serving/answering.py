"""Streams and messages of one model to answers, many together. Knows no HTTP and no Ray."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mantis_core.bitstream.container import BitstreamError, Reason
from mantis_core.bitstream.wire import Unpacked
from mantis_core.codec.answer import Answer
from mantis_core.codec.server_codec import ServerCodec
from mantis_core.errors import ModelError

logger = logging.getLogger(__name__)

STATUS = {
    Reason.ANOTHER_MODEL: HTTPStatus.NOT_FOUND,
    Reason.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
}
"""Of a stream that is refused; 400 for all other reasons."""


@dataclass(frozen=True)
class Question:
    """A stream; or, with the `hello` of its session, a message.

    `tasks` are what was asked for in a session of requests, None elsewhere. With `masks` the
    answers of segmentation tasks come as pictures too.
    """

    body: bytes
    hello: bytes | None = None
    tasks: tuple[str, ...] | None = None
    masks: bool = False


@dataclass(frozen=True)
class Reply:
    """A status of HTTP, and what is said: the answers, or the error and its reason."""

    status: int
    content: dict[str, Any]


FAULT = Reply(
    int(HTTPStatus.INTERNAL_SERVER_ERROR),
    {"error": "the service could not answer; its log says why", "reason": "internal"},
)


def refusal(error: BitstreamError | ModelError) -> Reply:
    """What is replied to a stream that cannot be read."""
    if isinstance(error, BitstreamError):
        status = STATUS.get(error.reason, HTTPStatus.BAD_REQUEST)
        return Reply(int(status), {"error": str(error), "reason": error.reason.value})
    return Reply(int(HTTPStatus.BAD_REQUEST), {"error": str(error), "reason": "request"})


def replies(codec: ServerCodec, questions: Sequence[Question]) -> list[Reply]:
    """One reply to each question. One that cannot be read costs the others nothing."""
    read: list[Unpacked | Reply] = []
    for question in questions:
        try:
            read.append(_read(codec, question))
        except (BitstreamError, ModelError) as error:
            read.append(refusal(error))
        except Exception:
            logger.exception("a question could not be read")
            read.append(FAULT)
    good = [each for each in read if isinstance(each, Unpacked)]
    try:
        answers = iter(codec.answer(good))
    except Exception:  # such as no memory for all of them
        if len(questions) > 1:
            return [replies(codec, [question])[0] for question in questions]
        logger.exception("a question could not be answered")
        return [FAULT]
    found = []
    for question, each in zip(questions, read, strict=True):
        if isinstance(each, Reply):
            found.append(each)
            continue
        own = [_told(next(answers), masks=question.masks) for _ in each.images]
        found.append(Reply(int(HTTPStatus.OK), {"answers": own, "wire_bytes": each.wire_bytes}))
    return found


def _told(answer: Answer, *, masks: bool) -> dict[str, Any]:
    told = answer.to_dict()
    if masks:
        told["masks"] = {name: _png(mask) for name, mask in answer.segmentation.items()}
    return told


def _png(mask: NDArray[np.uint8]) -> str:
    """A mask (H, W) as a grey PNG whose pixels are its label values, in base64."""
    written = io.BytesIO()
    Image.fromarray(mask).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def _read(codec: ServerCodec, question: Question) -> Unpacked:
    if question.hello is None:
        return codec.read(question.body)
    session = codec.open(question.hello)
    (unpacked,) = session.read([question.body], question.tasks)
    return unpacked
