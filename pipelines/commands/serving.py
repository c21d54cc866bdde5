"""`mantis serve` and `mantis camera`: the server half as a service, and a client in front of it."""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.errors import FAILURE, MISTAKE, Stopped, ending_well, print_json
from pipelines.commands.options import (
    AsJson,
    Level,
    MaxBytes,
    Model,
    Root,
    Tasks,
    model_folder,
)

if TYPE_CHECKING:
    from mantis_core.device.files import Failure
    from pipelines.serving.camera import Frame
    from pipelines.serving.pages import Page

TOKEN_VARIABLE = "MANTIS_SERVE_TOKEN"

Token = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help=f"File with the token that callers send. {TOKEN_VARIABLE} holds it otherwise.",
    ),
]


@ending_well
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Whole codecs or their servers: models:/NAME@ALIAS, models:/NAME/VERSION, or "
            "checkpoint folders.",
        ),
    ],
    host: Annotated[
        str,
        typer.Option("--host", help="Interface to listen on. Others than loopback need a token."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port.")] = 8000,
    token_file: Token = None,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Processes that answer, a CPU each.")
    ] = 1,
    max_body: Annotated[
        int, typer.Option("--max-body", min=64, help="Most bytes of a request's body.")
    ] = 1 << 20,
    rate: Annotated[
        float,
        typer.Option("--rate", min=0, help="Most requests a second of one caller; 0 for any."),
    ] = 0.0,
    every: Annotated[
        float,
        typer.Option("--every", min=0.5, help="Seconds between two looks at the registry."),
    ] = 10.0,
    with_page: Annotated[
        bool, typer.Option("--page/--no-page", help="Whether `/` is a page to try the models on.")
    ] = True,
    clients: Annotated[
        list[Path] | None,
        typer.Option(
            "--client",
            metavar="FOLDER",
            help="Client that `mantis export` wrote, for the page to encode in the browser.",
        ),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            "--runtime",
            metavar="FOLDER",
            help="Folder of onnxruntime-web's files; where `make page` puts them otherwise.",
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Ray cluster to join; a local Ray otherwise.")
    ] = None,
    root: Root = None,
) -> None:
    """Answer streams over HTTP, on Ray Serve. Ctrl-C ends it.

    Several models live side by side: the id of a stream says whose it is. When an alias moves, the
    new version is taken up without a pause, and the one before still answers its own clients.

    Example: mantis serve models:/mantis@champion --port 8000
    """
    from pipelines.serving.app import Limits
    from pipelines.serving.service import Service, running

    token = _token(token_file)
    if not _is_loopback(host) and not token:
        raise Stopped(
            f"error: --host {host} can be reached from other machines: give --token-file, or a "
            f"token in {TOKEN_VARIABLE}, such as {secrets.token_urlsafe(24)}",
            MISTAKE,
        )
    page = _page(clients or [], runtime) if with_page else None
    if page is None and (clients or runtime):
        raise Stopped(
            "error: --client and --runtime are for the page: leave --no-page out", MISTAKE
        )
    service = Service(host, port, replicas, every=every, page=page, address=address)
    limits = Limits(token, max_body, rate)

    def resolve(model: str) -> Path:
        return model_folder(model, root)

    with running(models, resolve, limits, service, _note) as own:
        for each in own.catalog.entries:
            _note(f"{each.source}: model {each.model_id}, streams {each.stream_id}")
        where = f"[{host}]" if ":" in host else host
        if page is not None:
            _note(f"page at http://{where}:{port}/, which encodes {_where_it_encodes(page)}")
        _note(f"answers at http://{where}:{port}/v1/answers; Ctrl-C ends it")
        own.watch(_note)


@ending_well
def camera(
    model: Model,
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of `mantis serve`.")],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="Videos, image files, Parquet files or tars of images, or folders of images.",
        ),
    ],
    fps: Annotated[
        float,
        typer.Option("--fps", min=0.001, help="Of a video, so many frames a second are sent."),
    ] = 1.0,
    task: Tasks = None,
    level: Level = None,
    max_bytes: MaxBytes = None,
    token_file: Token = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Send images or frames of videos to a service, one by one, and show its answers.

    MODEL may be a whole codec or its client half. What the service asks for (`PUT /v1/request`)
    changes what is sent, from the next image on; --task holds until then.

    Example: mantis camera models:/mantis-client@champion http://127.0.0.1:8000 photos/
    """
    from mantis_core.codec.checkpoint import load_client
    from mantis_core.errors import ModelError
    from mantis_core.pixels import ImageError
    from pipelines.serving.camera import Link, ServiceError, Shot, Wanted, shots

    frames, failures = _frames(paths, fps)
    client = load_client(model_folder(model, root))
    wanted = Wanted(tuple(task) if task else None, level, max_bytes)
    made: list[Shot] = []
    try:
        with Link(url, _token(token_file)) as link:
            for shot in shots(client, link, frames, wanted):
                made.append(shot)
                if not as_json:
                    typer.echo(shot.line(), err=bool(shot.error))
    except ServiceError as error:
        raise Stopped(f"error: {error}", FAILURE) from None
    except (ImageError, ModelError) as error:
        raise Stopped(f"error: {error}", MISTAKE) from None
    sent = [shot for shot in made if not shot.error]
    if as_json:
        total: dict[str, Any] = {"shots": [shot.to_json() for shot in made]}
        print_json({**total, "failures": [f.to_dict() for f in failures]})
    elif sent:
        size = sum(shot.wire_bytes for shot in sent) / len(sent)
        typer.echo(f"{len(sent)} images, {size:.1f} bytes each")
    if len(sent) < len(made) or failures:
        raise Stopped("", 3 if sent else MISTAKE)


COMMANDS = (serve, camera)


def _note(line: str) -> None:
    typer.echo(line, err=True)


def _frames(paths: Sequence[Path], fps: float) -> tuple[Iterator[Frame], list[Failure]]:
    """Images and frames of videos, the images first, and the files that cannot be read."""
    from mantis_core.device.files import shown
    from pipelines.coding.packed import read_image
    from pipelines.commands.streams import find_images
    from pipelines.serving.camera import Frame
    from pipelines.serving.video import VIDEO_SUFFIXES, frames

    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]
    others = [path for path in paths if path not in videos]
    found = find_images(others, None) if others else None
    images = (
        Frame(shown(source.path), partial(read_image, source))
        for source in (found.sources if found else ())
    )
    moving = (frame for video in videos for frame in frames(video, fps))
    return chain(images, moving), found.failures if found else []


def _page(clients: Sequence[Path], runtime: Path | None) -> Page:
    from pipelines.serving.pages import RUNTIME, Page, lacking

    missing = lacking(runtime or RUNTIME)
    if runtime is not None and missing:
        raise Stopped(
            f"error: {runtime} lacks {', '.join(missing)}: give the folder `dist` of the package "
            "onnxruntime-web",
            MISTAKE,
        )
    found = "" if missing else str((runtime or RUNTIME).resolve())
    return Page(found, tuple(str(client) for client in clients))


def _where_it_encodes(page: Page) -> str:
    if not page.runtime:
        return "here: `make page` brings what browsers need to encode"
    if not page.exports:
        return "here: give --client with what `mantis export` wrote to encode in the browser"
    return "in the browser"


def _token(file: Path | None) -> str:
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
    else:
        try:
            token = file.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise Stopped(f"error: cannot read {file}: {error.strerror}", MISTAKE) from None
        if not token:
            raise Stopped(f"error: {file} holds no token", MISTAKE)
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise Stopped("error: a token is one line of printable ASCII without blanks", MISTAKE)
    return token


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
