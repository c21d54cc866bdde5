"""`mantis serve` and `mantis camera`: the server half as a service, and a client in front of it."""

from __future__ import annotations

import ipaddress
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.errors import FAILURE, MISTAKE, Stopped, ending_well, print_json
from pipelines.commands.options import (
    AsJson,
    Images,
    Level,
    MaxBytes,
    Model,
    Root,
    Tasks,
    model_folder,
)

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
    service = Service(host, port, replicas, every=every, address=address)
    limits = Limits(token, max_body, rate)

    def resolve(model: str) -> Path:
        return model_folder(model, root)

    with running(models, resolve, limits, service, _note) as own:
        for each in own.catalog.entries:
            _note(f"{each.source}: model {each.model_id}, streams {each.stream_id}")
        where = f"[{host}]" if ":" in host else host
        _note(f"answers at http://{where}:{port}/v1/answers; Ctrl-C ends it")
        own.watch(_note)


@ending_well
def camera(
    model: Model,
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of `mantis serve`.")],
    paths: Images,
    task: Tasks = None,
    level: Level = None,
    max_bytes: MaxBytes = None,
    token_file: Token = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Send images to a service, one by one, and show its answers.

    MODEL may be a whole codec or its client half. What the service asks for (`PUT /v1/request`)
    changes what is sent, from the next image on; --task holds until then.

    Example: mantis camera models:/mantis-client@champion http://127.0.0.1:8000 photos/
    """
    from mantis_core.codec.checkpoint import load_client
    from mantis_core.errors import ModelError
    from pipelines.commands.streams import find_images
    from pipelines.serving.camera import Link, ServiceError, Shot, Wanted, shots

    found = find_images(paths, None)
    client = load_client(model_folder(model, root))
    wanted = Wanted(tuple(task) if task else None, level, max_bytes)
    made: list[Shot] = []
    try:
        with Link(url, _token(token_file)) as link:
            for shot in shots(client, link, found.sources, wanted):
                made.append(shot)
                if not as_json:
                    typer.echo(shot.line(), err=bool(shot.error))
    except ServiceError as error:
        raise Stopped(f"error: {error}", FAILURE) from None
    except ModelError as error:
        raise Stopped(f"error: {error}", MISTAKE) from None
    sent = [shot for shot in made if not shot.error]
    if as_json:
        total: dict[str, Any] = {"shots": [shot.to_json() for shot in made]}
        print_json({**total, "failures": [f.to_dict() for f in found.failures]})
    elif sent:
        size = sum(shot.wire_bytes for shot in sent) / len(sent)
        typer.echo(f"{len(sent)} images, {size:.1f} bytes each")
    if len(sent) < len(made) or found.failures:
        raise Stopped("", 3 if sent else MISTAKE)


COMMANDS = (serve, camera)


def _note(line: str) -> None:
    typer.echo(line, err=True)


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
