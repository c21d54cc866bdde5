"""The MLflow store: its client, whether it answers, and what its failures mean to a user.

Knows no runs and no models.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import shlex
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import requests
from alembic.util import CommandError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _initialize_tables
from sqlalchemy import NullPool, create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError, NoSuchModuleError, SQLAlchemyError

from pipelines.settings.tracking import sqlite_uri, without_password
from pipelines.tracking.store.moved import relocate_all

logger = logging.getLogger(__name__)

TRACKING_FAILURES = (
    MlflowException,
    SQLAlchemyError,
    CommandError,
    requests.RequestException,
    sqlite3.Error,
    OSError,
)
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Error codes by which MLflow says that it has no such run, version or alias."""
_HELD: set[Path] = set()  # SQLite files whose lock this process holds
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""Error codes by which MLflow answers, and would give the same answer again."""
DENIALS = ("PERMISSION_DENIED", "UNAUTHENTICATED")
"""Error codes by which MLflow says that this user may not do this."""
PATIENCE_S = 5.0  # for a connection to a database server
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

# MLflow's defaults draw progress bars and block a call for four minutes if the server is away.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


TRANSFER_TIMEOUT_S = 600
"""For each file of a model or a report: a server may store it elsewhere before it answers."""


class TrackingError(ValueError):
    """Raised if a store, a run or a setting of tracking cannot be used.

    The message says what to do.
    """

    exit_code = 2


class StoreUnusable(OSError):
    """Raised if the database of a store cannot be used as it is. The message says what to do."""


@contextlib.contextmanager
def asking(uri: str) -> Iterator[MlflowClient]:
    """Yields the client of a store. Turns what it raises inside the block into TrackingError."""
    try:
        yield bounded_client(uri)
    except TRACKING_FAILURES as error:
        raise TrackingError(explain(error, uri)) from error


def bounded_client(uri: str) -> MlflowClient:
    """Returns a client that waits seconds, not minutes, for a store that is away.

    Variables that the user has set are kept. Raises one of TRACKING_FAILURES if a database does not
    answer.
    """
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    probe(uri)
    with sole_access(uri) if _is_new(uri) else contextlib.nullcontext():
        create_store(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    _remove_stray_folder(uri, client)
    return client


@contextlib.contextmanager
def transferring() -> Iterator[None]:
    """Gives files on their way to or from a server TRANSFER_TIMEOUT_S inside the block."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    usual = os.environ.get(name)
    os.environ[name] = str(max(TRANSFER_TIMEOUT_S, int(usual or 0)))
    try:
        yield
    finally:
        if usual is None:
            del os.environ[name]
        else:
            os.environ[name] = usual


def send_files(client: MlflowClient, model_id: str, folder: Path) -> None:
    """Sends the files of a folder to a LoggedModel."""
    with transferring():
        client.log_model_artifacts(model_id, str(folder))


def check_access(uri: str) -> None:
    """Raises TrackingError if a server answers that this client may not use it.

    Raises one of TRACKING_FAILURES if it does not answer.
    """
    if not uri.startswith("http"):
        return
    try:
        bounded_client(uri).search_experiments(max_results=1)
    except TRACKING_FAILURES as error:
        if not is_denied(error, uri):
            raise
        raise TrackingError(
            f"{explain(error, uri)}; tracking.enabled=false works without MLflow"
        ) from error


def probe(uri: str) -> None:
    """Asks a database whether it answers and has MLflow's tables, or none yet.

    MLflow itself would try for 101 seconds in each call, and would migrate an older schema unasked.
    Raises StoreUnusable, or what the connection raises.
    """
    if uri.startswith("http"):
        return
    file = sqlite_file(uri)
    if file is None or not _is_new(uri):
        _ask_database(uri)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"{file} cannot be written")


def _is_new(uri: str) -> bool:
    """Returns whether a store is an SQLite file without content."""
    file = sqlite_file(uri)
    return file is not None and not (file.exists() and file.stat().st_size)


def create_store(uri: str) -> None:
    """Makes the tables of a new SQLite store, all of them or none. Leaves every other store alone.

    MLflow makes them in place, in many steps that take seconds. A process killed between two of
    them left a file that MLflow could neither use nor complete.
    """
    if not _is_new(uri):
        return
    with sole_access(uri):
        file = sqlite_file(uri)
        if file is None or not _is_new(uri):  # another process has made them
            return
        file = file.resolve()
        partial = file.with_name(f"{file.name}.partial")
        for stale in (partial, partial.with_name(f"{partial.name}-journal")):
            stale.unlink(missing_ok=True)
        engine = create_engine(sqlite_uri(partial), poolclass=NullPool)
        _initialize_tables(engine)  # type: ignore[no-untyped-call]
        engine.dispose()
        os.replace(partial, file)


@contextlib.contextmanager
def sole_access(uri: str) -> Iterator[None]:
    """Holds the lock of an SQLite store. Two processes must not create its tables at once."""
    file = sqlite_file(uri)
    if file is None or file in _HELD:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(file).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _HELD.add(file)
        try:
            yield
        finally:
            _HELD.discard(file)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[MlflowClient]:
    """Yields the client for the first writes to a store, alone among processes.

    If an SQLite store was moved or copied with its root, its addresses of artifacts become those of
    this root. Raises one of TRACKING_FAILURES.
    """
    with sole_access(uri):
        file, new = sqlite_file(uri), _is_new(uri)
        client = bounded_client(uri)
        if file is not None and not new:
            client.search_experiments(max_results=1)  # MLflow refuses another schema here
            if changed := relocate_all(file):
                logger.info("%d addresses of artifacts now lie below %s", changed, file.parent)
        yield client


EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Without it MLflow's pages take the experiment for one of prompts and hide columns of models."""


def experiment_of(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    """Returns the id of an experiment, which is created if it does not exist.

    Raises TrackingError if it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_root, tags=EXPERIMENT_TAGS))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:  # no other process was faster
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted. Restore it (mlflow experiments restore "
            f"-x {found.experiment_id}) or set tracking.experiment to another name."
        )
    return str(found.experiment_id)


def explain(error: Exception, uri: str) -> str:
    """Returns a sentence that names the store and the cause, and what to do."""
    if isinstance(error, StoreUnusable):
        return str(error)
    if "out-of-date database schema" in str(error):
        return _other_schema(uri)
    place, cause = without_password(uri, uri), failure_text(error, uri)
    if is_denied(error, uri):
        return (
            f"MLflow at {place} refuses this client ({cause}): check user and password, or start "
            "the server with --allowed-hosts"
        )
    if is_refusal(error) or is_missing(error):
        return f"MLflow at {place} refuses this ({cause})"
    return f"MLflow at {place} does not answer ({cause})"


def failure_text(error: Exception, uri: str) -> str:
    """Returns the first line of an error, without the password of `uri`, at most 200 characters."""
    lines = str(error).splitlines() or [type(error).__name__]
    return without_password(lines[0], uri)[:200]


def is_denied(error: Exception, uri: str) -> bool:
    """Returns whether a server answered that it does not let this client in (401 or 403)."""
    code = getattr(error, "error_code", "")
    return code in DENIALS or bool(re.search("error code 40[13]", failure_text(error, uri)))


def is_missing(error: Exception) -> bool:
    """Returns whether MLflow answered that it has no such thing."""
    return isinstance(error, MlflowException) and error.error_code in NOT_FOUND


def is_refusal(error: Exception) -> bool:
    """Returns whether MLflow answered, and would give the same answer again."""
    return isinstance(error, MlflowException) and error.error_code in REFUSALS


def sqlite_file(uri: str) -> Path | None:
    """Returns the file of an SQLite store, or None for another. The inverse of `sqlite_uri`."""
    if not uri.startswith("sqlite"):
        return None
    database = make_url(uri).database
    return Path(database) if database else None


@functools.cache
def _ask_database(uri: str) -> None:
    """Raises as `probe` does. A database that answered is not asked again."""
    place = without_password(uri, uri)
    try:
        url = make_url(uri)
        engine = create_engine(url, poolclass=NullPool)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise StoreUnusable(
            f"MLflow's store {place} needs a database driver that is not installed ({error}): "
            "install it, or use an MLflow server"
        ) from error
    if url.host:
        port = url.port or PORTS.get(url.get_backend_name(), 0)
        try:
            socket.create_connection((url.host, port), timeout=PATIENCE_S).close()
        except OSError as error:
            raise ConnectionError(f"{url.host}:{port}: {error}") from error
    try:
        with _after_creation(uri):
            tables = {name for name in inspect(engine).get_table_names() if "alembic" not in name}
    except DatabaseError as error:
        if url.get_backend_name() != "sqlite" or "locked" in str(error):
            raise
        raise StoreUnusable(
            f"{url.database} cannot be read as an MLflow store ({failure_text(error, uri)}): put "
            "back a copy of it, or move it away to begin a new one"
        ) from error
    if tables and "experiments" not in tables:
        raise StoreUnusable(
            f"the database {place} has tables of something else and none of MLflow: give another"
        )
    if tables and _tables_of_mlflow() - tables:
        raise StoreUnusable(_other_schema(uri))


@contextlib.contextmanager
def _after_creation(uri: str) -> Iterator[None]:
    """Waits for a process that creates the tables of an SQLite store, if there is one."""
    file = sqlite_file(uri)
    if file is None or file in _HELD or not _lock_file(file).exists():
        yield
        return
    with _lock_file(file).open("r") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@functools.cache
def _tables_of_mlflow() -> frozenset[str]:
    import mlflow.store.model_registry.dbmodels.models
    import mlflow.store.tracking.dbmodels.models  # noqa: F401
    from mlflow.store.db.base_sql_model import Base

    return frozenset(Base.metadata.tables)


def _other_schema(uri: str) -> str:
    import mlflow

    place = without_password(uri, uri)
    return (
        f"the schema of MLflow's store {place} is not that of the installed MLflow "
        f"{mlflow.__version__}. If it is older, make a copy of the store and run `mlflow db "
        f"upgrade {shlex.quote(place)}`; if it is newer, install the MLflow that wrote it"
    )


def _lock_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.lock")


def _remove_stray_folder(uri: str, client: MlflowClient) -> None:
    """Removes the folder that MLflow makes for an SQLite file as it is spelt in a quoted URI."""
    file, spelt = sqlite_file(uri), Path(uri.removeprefix("sqlite:///"))
    if file is None or file == spelt or not spelt.is_absolute():
        return
    _open_registry(uri)
    for stray, real in zip(spelt.parents, file.parents, strict=False):
        if stray != real:
            with contextlib.suppress(OSError):
                stray.rmdir()


@functools.cache
def _open_registry(uri: str) -> None:
    """Lets MLflow open its second connection, which makes the stray folder again."""
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_registered_models(max_results=1)
