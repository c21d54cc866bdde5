"""`mantis-lite`: an exported client on files and folders."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mantis_core.bitstream.container import BitstreamError
from mantis_core.bitstream.wire import Unpacked
from mantis_core.device import golden
from mantis_core.device.files import (
    IMAGE_SUFFIXES,
    STREAM_SUFFIXES,
    Failure,
    FilesError,
    Found,
    find,
    read,
    shown,
    summary,
    targets,
    write_whole,
)
from mantis_core.errors import BudgetError, ModelError
from mantis_core.pixels import ImageError
from mantis_lite.client import LiteClient, open_export

MISTAKE, SOME_FAILED = 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for a mistake, 3 where some files failed, 1
    where golden cases differ."""
    given = command_line().parse_args(arguments)
    try:
        code: int = given.run(given)
        return code
    except (BitstreamError, FilesError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except ImportError as error:
        print(f"error: {error}; install onnxruntime, numpy and pillow", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("stopped; every stream that was written is whole", file=sys.stderr)
        return 130


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mantis-lite", description="Encode images by an exported MANTiS client."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    encode = _command(commands, "encode", _encode, "encode images to streams, one each")
    encode.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="images, or folders")
    encode.add_argument("-o", "--output", type=Path, required=True, help="folder of the streams")
    encode.add_argument(
        "--task", action="append", help="a task that the server asks for; repeat it for several"
    )
    encode.add_argument("--level", type=int, help="rate level; 0 is the largest, and the default")
    encode.add_argument("--max-bytes", type=int, help="the most that a stream may take")
    encode.add_argument(
        "--exit-confidence", type=float, help="how sure the client must be to answer itself"
    )
    info = _command(commands, "info", _info, "say what streams hold")
    info.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="streams, or folders")
    _command(commands, "check", _check, "code the golden cases on this machine")
    return parser


def _command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}."
    )
    command.set_defaults(run=run)
    command.add_argument("export", type=Path, metavar="EXPORT", help="folder of `mantis export`")
    command.add_argument("--threads", type=int, default=1, help="of onnxruntime; 1 by default")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return command


def _encode(given: argparse.Namespace) -> int:
    client = open_export(given.export, threads=given.threads)
    if given.output.is_file():
        raise FilesError(f"{shown(given.output)} is a file; give a folder")
    found = find(given.paths, IMAGE_SUFFIXES, outputs=[given.output])
    _require(found, "image", IMAGE_SUFFIXES)
    written: list[dict[str, Any]] = []
    failures = list(found.failures)
    for target, source in targets(found.sources, given.output, ".mts").items():
        begun = time.perf_counter()
        try:
            image = client.prepare_image(read(source.path))
            (stream,) = client.encode(
                image[None],
                given.task,
                exit_confidence=given.exit_confidence,
                level=given.level,
                max_bytes=given.max_bytes,
            )
        except FilesError as error:
            failures.append(Failure(source.path, str(error)))
            continue
        except BudgetError as error:
            failures.append(Failure(source.path, f"{shown(source.path)}: {error}"))
            continue
        except ImageError as error:
            reason = f"{shown(source.path)} is no readable image: {error}"
            failures.append(Failure(source.path, reason))
            continue
        milliseconds = 1000 * (time.perf_counter() - begun)
        write_whole(target, stream)
        written.append(
            {
                "file": shown(target),
                "image": shown(source.path),
                "wire_bytes": len(stream),
                "milliseconds": round(milliseconds, 2),
            }
        )
        if not given.json:
            print(f"{shown(target)}  {len(stream)} bytes, {milliseconds:.1f} ms")
    return _end(given, "streams", written, failures, found)


def _info(given: argparse.Namespace) -> int:
    client = open_export(given.export, threads=given.threads)
    found = find(given.paths, STREAM_SUFFIXES)
    _require(found, "stream", STREAM_SUFFIXES)
    told: list[dict[str, Any]] = []
    failures = list(found.failures)
    for source in found.sources:
        try:
            data = read(source.path)
            held = client.read(data)
        except (BitstreamError, FilesError) as error:
            failures.append(Failure(source.path, f"{shown(source.path)}: {error}"))
            continue
        for own in _told(client.of_stream(data), held):
            told.append({"file": shown(source.path), **own})
            if not given.json:
                print("  ".join(f"{name} {value}" for name, value in told[-1].items()))
    return _end(given, "images", told, failures, found)


def _told(client: LiteClient, held: Unpacked) -> Iterator[dict[str, Any]]:
    for image in held.images:
        tasks = [name for name, on in zip(client.facts.tasks, image.tasks.mask, strict=True) if on]
        yield {
            "wire_bytes": held.wire_bytes,
            "tasks": tasks,
            "level": image.rate_level,
            "answered": not image.has_latent,
            "label": image.label,
            "symbols": int(image.map.size) if image.has_latent else 0,
            "non_zero": int(np.count_nonzero(image.map)),
        }


def _check(given: argparse.Namespace) -> int:
    client = open_export(given.export, threads=given.threads)
    cases = golden.read_cases(given.export)
    begun = time.perf_counter()
    found = golden.check(client, cases)
    each = 1000 * (time.perf_counter() - begun) / max(1, found.cases)
    right = found.same >= golden.LEAST_SAME * found.cases
    if given.json:
        print(
            json.dumps(
                {
                    "cases": found.cases,
                    "same": found.same,
                    "right": right,
                    "milliseconds": round(each, 2),
                }
            )
        )
    else:
        print(
            f"{found.cases} golden cases: coded and read exactly; {found.same} gave the very same "
            f"stream, {each:.1f} ms each"
        )
    if not right:
        print(
            f"error: under {golden.LEAST_SAME:.0%} of the cases gave the stream they should: this "
            "machine computes otherwise. Export without --int8, or try another onnxruntime.",
            file=sys.stderr,
        )
    return 0 if right else 1


def _require(found: Found, what: str, suffixes: frozenset[str]) -> None:
    if not found.sources and not found.failures:
        raise FilesError(f"no {what} was found; the suffixes are {', '.join(sorted(suffixes))}")


def _end(
    given: argparse.Namespace,
    what: str,
    done: list[dict[str, Any]],
    failures: list[Failure],
    found: Found,
) -> int:
    for failure in failures:
        print(f"error: {failure.reason}", file=sys.stderr)
    if given.json:
        print(json.dumps({what: done, "failures": [each.to_dict() for each in failures]}))
    else:
        print(summary({what: len(done), "failed": len(failures)}))
        if left_out := found.left_out():
            print(left_out, file=sys.stderr)
    if not failures:
        return 0
    return SOME_FAILED if done else MISTAKE


if __name__ == "__main__":
    sys.exit(main())
