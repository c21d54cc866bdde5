"""An S3 server of a test: moto's, on a free port of this machine, with a note of each request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import Request, urlopen

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

BUCKET = "bucket"


@dataclass
class S3:
    """The server. `requests` are (method, path with its query), and `refused` gets a 403."""

    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    refused: Callable[[str, str], bool] = lambda method, path: False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a client finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "of-a-test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def objects(self) -> list[str]:
        """The keys of all objects, without those that stand for folders."""
        client = fs.S3FileSystem(endpoint_override=self.url, access_key="key", secret_key="x")
        found = client.get_file_info(fs.FileSelector(BUCKET, recursive=True))
        return sorted(each.path.removeprefix(f"{BUCKET}/") for each in found if each.is_file)

    def taken(self, method: str) -> list[str]:
        """The paths of the requests of one method, in order."""
        return [path for each, path in self.requests if each == method]


@contextmanager
def s3_server() -> Iterator[S3]:
    """Starts a server with an empty bucket, and ends it with the block."""
    about, moto = S3(), DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        path = environ["PATH_INFO"] + (f"?{query}" if query else "")
        method = environ["REQUEST_METHOD"]
        about.requests.append((method, path))
        if about.refused(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Length", "0")])
            return []
        answer: Iterable[bytes] = moto(environ, start_response)
        return answer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = make_server("127.0.0.1", 0, app, threaded=True)
    about.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        # All of moto's servers in a process share one store.
        urlopen(Request(f"{about.url}/moto-api/reset", method="POST"), timeout=60).close()
        about.requests.clear()
        client = fs.S3FileSystem(
            endpoint_override=about.url,
            access_key="key",
            secret_key="x",
            allow_bucket_creation=True,
        )
        client.create_dir(BUCKET)
        yield about
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3_environment(server: S3) -> Iterator[None]:
    """Points the clients of this process to the server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield
