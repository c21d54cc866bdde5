"""Runs the service in the foreground, and takes up new versions of its models while it runs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mantis_core.errors import ModelError
from pipelines.cluster.connect import connect
from pipelines.cluster.preflight import PreflightError, cluster_address
from pipelines.serving.app import Limits
from pipelines.serving.catalog import Catalog, Entry, entry_of, exports_by_stream, with_exports
from pipelines.serving.pages import Page
from pipelines.settings.sections import ClusterConfig

LOOPBACK = "127.0.0.1"
TOLD_S = 60.0
REQUEST_S = 60.0

Resolve = Callable[[str], Path]
"""The folder of a model that the command line names."""


@dataclass(frozen=True)
class Service:
    """How the service runs. `cpus` are set aside for each of `replicas`, and `threads` are its own.

    `every` are the seconds between two looks at the registry.
    """

    host: str = LOOPBACK
    port: int = 8000
    replicas: int = 1
    threads: int = 1
    cpus: float = 1.0
    every: float = 10.0
    page: Page | None = None
    address: str | None = None


def entries(models: Sequence[str], resolve: Resolve) -> list[Entry]:
    """The models that are named, as they are now; ModelError for one that is none."""
    return [entry_of(resolve(model), model) for model in models]


@contextmanager
def running(
    models: Sequence[str],
    resolve: Resolve,
    limits: Limits,
    service: Service,
    say: Callable[[str], None],
) -> Iterator[Running]:
    """The service inside the block. Ends with it, after the requests that it has let in."""
    exports = exports_by_stream(service.page.exports if service.page else ())
    named = with_exports(entries(models, resolve), exports)
    catalog = Catalog().with_newer(named)
    if left_out := [each.source for each in named if each not in catalog.entries]:
        raise ModelError(
            f"{', '.join(left_out)}: another model here answers the same clients' streams; name "
            "one of them"
        )
    if other := sorted(exports.keys() - {each.stream_id for each in named}):
        raise ModelError(
            f"{exports[other[0]]} is the client of streams {other[0]}; the models here have "
            f"{', '.join(each.stream_id for each in named)}"
        )
    check_port(service.host, service.port)
    cluster = ClusterConfig(address=service.address, workers=service.replicas)
    local = cluster_address(cluster) == "local"
    with connect(cluster, "", workers=0, note=say):  # sets what Ray reads when it is imported
        from ray import serve

        if not local and serve.status().proxies:
            raise PreflightError(
                "Ray Serve runs on this cluster already, with its own address: end it first, or "
                "use another cluster"
            )
        serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": service.host,
                "port": service.port,
                "request_timeout_s": REQUEST_S,
            },
        )
        try:
            inside = LOOPBACK if local else None
            own = Running(models, resolve, limits, service, catalog, exports, inside)
            own._try(catalog.entries)
            own.deploy()
            yield own
        finally:
            serve.shutdown()


def check_port(host: str, port: int) -> None:
    """PreflightError where nobody may listen: Ray shares a port that is taken with its owner."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        raise PreflightError(
            f"cannot listen on {host}, port {port}: {error}. Give another --port or --host."
        ) from None


class Running:
    """A service that runs."""

    def __init__(
        self,
        models: Sequence[str],
        resolve: Resolve,
        limits: Limits,
        service: Service,
        catalog: Catalog,
        exports: Mapping[str, str],
        inside: str | None,
    ) -> None:
        """`exports` are exported clients by stream id. `inside` is the interface between its own
        processes, None for all of a cluster."""
        self.models, self.resolve, self.exports, self.inside = models, resolve, exports, inside
        self.limits, self.service, self.catalog = limits, service, catalog

    def deploy(self) -> None:
        """Starts front and replicas."""
        from ray import serve

        from pipelines.serving.deployments import APP, application

        own = self.service
        bound = application(
            self.catalog,
            self.limits,
            own.page,
            replicas=own.replicas,
            threads=own.threads,
            cpus=own.cpus,
            host=self.inside,
        )
        serve.run(bound, name=APP, route_prefix="/")

    def look_again(self) -> list[Entry]:
        """Takes up the versions that the names of the models now mean; returns those that are new.

        A model of before is kept while clients may still send its streams. Where the registry does
        not answer, or a model cannot be loaded, nothing changes and the error is raised. No process
        restarts: the front is told.
        """
        named = with_exports(entries(self.models, self.resolve), self.exports)
        now = Catalog().with_newer(named).entries
        new = [each for each in now if each not in self.catalog.entries]
        if new:
            self._try(new)
            catalog = self.catalog.with_newer(new)
            self._tell(catalog)
            self.catalog = catalog
        return new

    def _try(self, new: Sequence[Entry]) -> None:
        """Loads models once, so that one that cannot be loaded never answers."""
        from mantis_core.codec.checkpoint import load_server

        for each in new:
            load_server(each.folder)

    def _tell(self, catalog: Catalog) -> None:
        from ray import serve

        from pipelines.serving.deployments import APP, FRONT

        front = serve.get_deployment_handle(FRONT, app_name=APP)
        front.reconfigure.remote(catalog.to_config()).result(timeout_s=TOLD_S)

    def watch(self, say: Callable[[str], None], rounds: int | None = None) -> None:
        """Looks again every few seconds, `rounds` times; None until the process is interrupted."""
        done = 0
        while rounds is None or done < rounds:
            time.sleep(self.service.every)
            done += 1
            try:
                new = self.look_again()
                self._tell(self.catalog)  # a front that has crashed knows the first one
            except Exception as error:  # whatever the registry or a model does, the service goes on
                say(f"the models stay as they are: {error}")
                continue
            for each in new:
                say(f"{each.source} is now model {each.model_id}, streams {each.stream_id}")
