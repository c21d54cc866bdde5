"""Images as requests: streams and messages with the answers that are right, and JPEGs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.serving.bodies import Asked, Material, told
from benchmarks.serving.plain import Reply
from mantis_core.codec.checkpoint import load_model, save_model
from mantis_core.codec.client_codec import ClientCodec
from mantis_core.codec.server_codec import ServerCodec
from mantis_core.networks.inference import one_thread

DRAWN = 8  # images where none is given
MAX_BODY = 1 << 20  # of `mantis serve`
NUDGE = 1e-3  # of a server's weights, so that it is another model


def images_of(client: ClientCodec, paths: Sequence[Path]) -> Tensor:
    """Images of the client's size, uint8 (B, 3, H, W): those of the files, or drawn ones."""
    if paths:
        return client.prepare_images([path.read_bytes() for path in paths])
    from benchmarks.client import drawn_image

    torch.manual_seed(0)
    return torch.cat([drawn_image(client.spec.image_size) for _ in range(DRAWN)])


def request_of(client: ClientCodec) -> list[str] | None:
    """What a client is asked for: its first task if it must be asked, else it detects tasks."""
    return list(client.facts.tasks[:1]) if client.facts.requests == "asked" else None


def streams_of(client: ClientCodec, images: Tensor) -> list[bytes]:
    """A stream of each image."""
    with one_thread():
        return client.encode(images, request_of(client))


def right_answers(streams: Sequence[bytes], servers: Sequence[ServerCodec]) -> list[Asked]:
    """Streams as requests, with the answer of each of the servers."""
    with one_thread():
        found = [server.decode(streams) for server in servers]
    return [
        Asked(stream, right=tuple(told(answers[row].to_dict()) for answers in found))
        for row, stream in enumerate(streams)
    ]


def jpegs_of(images: Tensor, quality: int, reply: Reply) -> list[Asked]:
    """JPEGs as requests, with the answers of `reply`."""
    found = []
    with one_thread():
        for image in images:
            written = io.BytesIO()
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(written, "JPEG", quality=quality)
            body = written.getvalue()
            found.append(Asked(body, right=(told(reply(body)["answers"][0]),)))
    return found


def material_of(client: ClientCodec, images: Tensor, streams: Sequence[bytes]) -> Material:
    """What hostile requests are made of."""
    request = request_of(client)
    session = client.open(requests=request is not None)
    with one_thread():
        messages = session.encode(images, request)
    return Material(tuple(streams), session.hello, tuple(messages), MAX_BODY)


def another_server(folder: Path, whole: Path, seed: int) -> None:
    """Writes the codec `whole` with another server, which answers the same client's streams."""
    codec = load_model(whole)
    codec.eval()
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in codec.server.parameters():
            weight.add_(NUDGE * weight.abs().mean() * torch.randn(weight.shape, generator=drawn))
    codec.train().eval()  # forgets its id
    save_model(folder, codec, {"step": seed})
