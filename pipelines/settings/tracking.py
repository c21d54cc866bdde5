"""The rule by which every command finds its MLflow store. Imports no MLflow.

The order is: the config (or --root, for a command without a config), the environment variables of
MLflow, the SQLite file below the storage root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.settings.errors import SettingsError
from pipelines.settings.sections import TrackingConfig

URI_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
_SQLITE = "sqlite:///"


def store_uri(
    configured: str | None, environment: Mapping[str, str] = os.environ, *, ask: bool = True
) -> str | None:
    """Returns the URI of the MLflow store; None means the SQLite file below the storage root.

    That is `configured` (`tracking.uri`), else the variable MLFLOW_TRACKING_URI unless it is empty
    or `ask` is False. The path of an SQLite file becomes absolute. Raises SettingsError for a URI
    that names no database and no server.
    """
    name, uri = "tracking.uri", configured
    if uri is None and ask:
        name, uri = URI_VARIABLE, environment.get(URI_VARIABLE, "").strip() or None
    if uri is None:
        return None
    scheme = re.split(r"[:+]", uri)[0]
    if scheme not in SCHEMES or "://" not in uri:
        shown = without_password(uri, uri)
        raise SettingsError(
            f"{name} is {shown!r}; its scheme must be one of {', '.join(SCHEMES)}, such as "
            f"http://host:5000 or sqlite:////folder/mlflow.db. {_unset(name)} for an SQLite file "
            "under storage.root"
        )
    if scheme != "sqlite":
        return uri
    path = uri.removeprefix(_SQLITE)
    if path in (uri, "", ":memory:"):
        raise SettingsError(
            f"{name} is {uri!r}, which names no file: give sqlite:////folder/mlflow.db. "
            f"{_unset(name)} for an SQLite file under storage.root"
        )
    return uri if path.startswith("/") else f"{_SQLITE}{os.getcwd()}/{path}"


def experiment_name(
    configured: str | None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Returns the name of the MLflow experiment: `configured`, else MLFLOW_EXPERIMENT_NAME.

    None means that neither names one.
    """
    return configured or environment.get(EXPERIMENT_VARIABLE, "").strip() or None


def sqlite_uri(file: Path) -> str:
    """Returns the URI of an SQLite file: `?` and what looks quoted in its path are quoted."""
    text = str(file)
    if "?" not in text and not re.search("%[0-9A-Fa-f]{2}", text):
        return f"{_SQLITE}{text}"
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=text).render_as_string()


def describe_store(tracking: TrackingConfig, root: str) -> str:
    """Returns where runs below `root` are recorded, for a person to read."""
    if not tracking.enabled:
        return "off (tracking.enabled is false)"
    uri = tracking.uri
    place = f"{root}/mlflow.db" if uri is None else without_password(uri, uri)
    return f"{place}, experiment {tracking.experiment}, model {tracking.model}"


def without_password(text: str, uri: str) -> str:
    """Hides the password of `uri` in `text`, because error messages repeat the whole URI."""
    try:
        password = urlsplit(uri).password
    except ValueError:
        return text
    return text.replace(f":{password}@", ":***@") if password else text


def _unset(name: str) -> str:
    return "Leave it out" if name == "tracking.uri" else f"Unset {name}"
