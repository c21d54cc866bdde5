"""The page of a service: a person drops a photograph and asks; the client half runs in the browser.

    GET /                        the page
    GET /page/..., /runtime/...  its files, and those of onnxruntime-web
    GET /v1/clients/ID/NAME      files of the exported client whose streams have that id

Nothing is loaded from elsewhere. Without onnxruntime-web, or without the exported client of a
model, the page has the service encode.
"""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles

from mantis_core.device.export import CODE, LOOK, MANIFEST, TABLES
from pipelines.serving.answering import Reply
from pipelines.serving.app import Desk, Refused, enter

FILES = Path(__file__).parent / "page"
RUNTIME = FILES / "runtime"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
CLIENT_FILES = (MANIFEST, LOOK, CODE, TABLES)
POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'"
)
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


@dataclass(frozen=True)
class Page:
    """`runtime` is a folder with RUNTIME_FILES, "" for none; `exports` are exported clients."""

    runtime: str = ""
    exports: tuple[str, ...] = ()


def lacking(runtime: Path) -> list[str]:
    """The files of onnxruntime-web that a folder lacks."""
    return [name for name in RUNTIME_FILES if not (runtime / name).is_file()]


def add_page(app: FastAPI, desk: Desk, page: Page) -> None:
    """Adds the page to the application of a desk."""
    for suffix, kind in TYPES.items():
        mimetypes.add_type(kind, suffix)
    app.mount("/page", StaticFiles(directory=FILES))
    if page.runtime:
        app.mount("/runtime", StaticFiles(directory=page.runtime))

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return FileResponse(FILES / "index.html", headers=headers)

    @app.get("/v1/clients/{stream_id}/{name}")
    async def client(request: Request, stream_id: str, name: str) -> FileResponse:
        """A file of the exported client whose streams have that id."""
        enter(desk, request)
        entry = desk.model_of(stream_id)
        if not entry.exported or name not in CLIENT_FILES:
            raise Refused(404, "no_client", f"no {name} of an exported client of {stream_id} here")
        return FileResponse(Path(entry.exported) / name, media_type="application/octet-stream")

    @app.get("/v1/page", include_in_schema=False)
    async def about(request: Request) -> JSONResponse:
        """What the page has to know beside the models."""
        return desk.content(Reply(200, {"runtime": bool(page.runtime)}))
