"""A runs folder that was moved or copied: where its artifacts and stages are now.

MLflow keeps absolute addresses of artifacts for ever. Below a root they are found by the part that
follows `mlartifacts`, and a stage by its name and key.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns in which MLflow keeps addresses of artifacts."""


def artifact_address(path: Path) -> str:
    """Returns the address of a local folder of artifacts as MLflow reads it.

    MLflow unquotes plain paths too, so one with `%` or `?` becomes a URI.
    """
    return path.as_uri() if {"%", "?", "#"} & set(str(path)) else str(path)


def local_folder(address: str) -> Path | None:
    """Returns the local folder of an address of artifacts, or None if it is remote."""
    if address.startswith("file:"):
        return Path(unquote(urlsplit(address).path))
    return None if ":" in address.split("/")[0] else Path(address)


def relocated(address: str, home: Path) -> str:
    """Returns the address of the same artifacts below the root `home`.

    An address stays as it is if it is remote, is not below a folder `mlartifacts`, or leads to
    files that `home` has no copy of.
    """
    folder = local_folder(address)
    if folder is None or ARTIFACTS not in folder.parts:
        return address
    place = len(folder.parts) - folder.parts[::-1].index(ARTIFACTS)
    here = home.joinpath(ARTIFACTS, *folder.parts[place:])
    if here == folder or (folder.exists() and not here.exists()):
        return address
    return artifact_address(here)


def relocate_all(database: Path) -> int:
    """Rewrites the addresses in an SQLite store beside which its artifacts lie now.

    So what is logged from now on does not go to the folder that the store was copied from. Returns
    how many addresses changed. Raises sqlite3.Error.
    """
    home, changed = database.parent, 0
    connection = sqlite3.connect(database, timeout=20)
    try:
        with connection:
            for table, column in COLUMNS:
                query = f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL"
                for (address,) in connection.execute(query).fetchall():
                    here = relocated(address, home)
                    if here != address:
                        update = f"UPDATE {table} SET {column} = ? WHERE {column} = ?"
                        changed += connection.execute(update, (here, address)).rowcount
    finally:
        connection.close()
    return changed
