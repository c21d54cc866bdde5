"""Runs the service in the foreground, and takes up new versions of its models while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mantis_core.errors import ModelError
from pipelines.cluster.connect import connect
from pipelines.serving.app import Limits
from pipelines.serving.catalog import Catalog, Entry, entry_of
from pipelines.settings.sections import ClusterConfig

LOOPBACK = "127.0.0.1"

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
    catalog = Catalog().with_newer(entries(models, resolve))
    cluster = ClusterConfig(address=service.address, workers=service.replicas)
    with connect(cluster, "", workers=0, note=say):  # sets what Ray reads when it is imported
        from ray import serve

        serve.start(http_options={"host": service.host, "port": service.port})
        try:
            own = Running(models, resolve, limits, service, catalog)
            own.deploy()
            yield own
        finally:
            serve.shutdown()


class Running:
    """A service that runs."""

    def __init__(
        self,
        models: Sequence[str],
        resolve: Resolve,
        limits: Limits,
        service: Service,
        catalog: Catalog,
    ) -> None:
        self.models, self.resolve = models, resolve
        self.limits, self.service, self.catalog = limits, service, catalog

    def deploy(self) -> None:
        """Tells the replicas of the catalog. Only the first time does any of them start."""
        from ray import serve

        from pipelines.serving.deployments import APP, application

        own = self.service
        bound = application(
            self.catalog,
            self.limits,
            replicas=own.replicas,
            threads=own.threads,
            cpus=own.cpus,
            host=LOOPBACK if own.address is None else None,
        )
        serve.run(bound, name=APP, route_prefix="/")

    def look_again(self) -> list[Entry]:
        """Takes up the versions that the names of the models now mean; returns those that are new.

        A model of before is kept while clients may still send its streams. Where the registry does
        not answer, or a model cannot be read, nothing changes and the error is raised.
        """
        now = entries(self.models, self.resolve)
        new = [each for each in now if each not in self.catalog.entries]
        if new:
            self.catalog = self.catalog.with_newer(new)
            self.deploy()
        return new

    def watch(self, say: Callable[[str], None], rounds: int | None = None) -> None:
        """Looks again every few seconds, `rounds` times; None until the process is interrupted."""
        done = 0
        while rounds is None or done < rounds:
            time.sleep(self.service.every)
            done += 1
            try:
                new = self.look_again()
            except (ModelError, ValueError, OSError) as error:
                say(f"the models stay as they are: {error}")
                continue
            for each in new:
                say(f"{each.source} is now model {each.model_id}, streams {each.stream_id}")
