"""Registered models by name: finds versions and their files. Registers nothing.

A codec has three registered models: `<name>`, `<name>-client` and `<name>-server`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipelines.storage import cache_folder, private_folder
from pipelines.tracking.store.client import (
    TrackingError,
    asking,
    explain,
    failure_text,
    is_missing,
    sqlite_file,
    transferring,
)
from pipelines.tracking.store.moved import local_folder, relocated

NAME = "mantis"
"""The name of models that are registered without another one in `tracking.model`."""
PARTS = ("whole", "client", "server")
CHECKPOINT_FILES = ("weights.safetensors", "config.yaml", "meta.json")
PATCH = "patch"  # folder in a checkpoint that `add-task` made for clients at work; see patch.py


class RegistryError(ValueError):
    """Raised if a model, version or run cannot be used. The message says what is allowed."""

    exit_code = 2


def part_names(name: str) -> dict[str, str]:
    """Returns the registered name of each part of a codec."""
    return {part: name if part == "whole" else f"{name}-{part}" for part in PARTS}


def codec_versions(client: MlflowClient) -> Iterator[tuple[ModelVersion, list[str]]]:
    """Yields the versions of whole codecs under any name, each with its aliases."""
    names: dict[str, dict[str, str]] = {}
    token: str | None = None
    while True:
        page = client.search_registered_models(page_token=token)
        names |= {model.name: model.aliases for model in page}
        if not (token := page.token):
            break
    halves = {half for name in names for half in list(part_names(name).values())[1:]}
    for name in sorted(names.keys() - halves):
        for version in client.search_model_versions(f'name = "{name}"', max_results=10_000):
            if "mantis.stage_key" in version.tags:
                own = [a for a, of in names[name].items() if str(of) == str(version.version)]
                yield version, sorted(own)


def find_version(client: MlflowClient, uri: str, model: str) -> ModelVersion:
    """Returns the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises RegistryError if there is none, TrackingError if MLflow does not answer.
    """
    match = re.fullmatch(
        r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))", model
    )
    if match is None:
        raise RegistryError(
            f"{model!r} is not the name of a model. Give models:/{NAME}@champion, "
            f"models:/{NAME}/<version>, another name that `mantis models` lists, the same with "
            "-client or -server behind the name, or a checkpoint folder."
        )
    try:
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if not is_missing(error):
            raise TrackingError(explain(error, uri)) from error
        raise RegistryError(
            f"there is no model {model} ({failure_text(error, uri)}). `mantis models` lists the "
            "registered models; --root or MLFLOW_TRACKING_URI selects another store."
        ) from error


def resolve_model(model: str, uri: str) -> Path:
    """Returns the local checkpoint folder of a model.

    `model` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`, where NAME may be that of a half, or
    a checkpoint folder. `uri` is the tracking URI. Files of a remote store are downloaded once to
    the user's cache. Loads and unpickles nothing.
    """
    if not model.startswith("models:"):
        require_checkpoint(Path(model), model)
        return Path(model)
    with asking(uri) as client:
        version = find_version(client, uri, model)
        location = files_of(client, uri, version)
    below = local_folder(location)
    if below is not None:
        folder = below / "artifacts/checkpoint"
        if not has_checkpoint(folder):
            raise RegistryError(
                f"the files of {model} are not in {folder}. If the runs were moved without "
                "`mlartifacts`, `mantis register RUN` writes them again; otherwise put them back."
            )
        return folder
    try:
        folder = _downloaded(location, version, uri)
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"the files of {model} cannot be read ({failure_text(error, uri)}). Check that MLflow "
            "and its artifact store answer."
        ) from error
    require_checkpoint(folder, model)
    return folder


def files_of(client: MlflowClient, uri: str, version: ModelVersion) -> str:
    """Returns the address of a version's files: of an SQLite store those beside it, if moved."""
    address = str(client.get_model_version_download_uri(version.name, str(version.version)))
    file = sqlite_file(uri)
    return address if file is None else relocated(address, file.parent)


def has_files(client: MlflowClient, uri: str, version: ModelVersion) -> bool:
    """Returns whether the checkpoint of a version is where the registry says."""
    location = files_of(client, uri, version)
    below = local_folder(location)
    if below is not None:
        return has_checkpoint(below / "artifacts/checkpoint")
    try:
        found = list_artifacts(f"{location}/artifacts/checkpoint", tracking_uri=uri)
    except MlflowException as error:
        if is_missing(error):
            return False
        raise
    return set(CHECKPOINT_FILES) <= {PurePosixPath(each.path).name for each in found}


def has_checkpoint(folder: Path) -> bool:
    """Returns whether a folder holds a whole checkpoint."""
    return all((folder / name).is_file() for name in CHECKPOINT_FILES)


def require_checkpoint(folder: Path, model: str) -> None:
    """Raises RegistryError if a folder holds no checkpoint. `model` is what the user gave."""
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise RegistryError(
            f"{model} is not a checkpoint: {', '.join(missing)} not found. Give a folder that "
            f"holds {', '.join(CHECKPOINT_FILES)}, or models:/{NAME}@champion."
        )


def _downloaded(location: str, version: ModelVersion, uri: str) -> Path:
    """Returns the checkpoint in the cache, downloaded at the first call. Raises OSError."""
    what = f"{uri} {location} {version.name} {version.version} {version.creation_timestamp}"
    folder = cache_folder() / "models" / sha256(what.encode()).hexdigest()[:16]
    if has_checkpoint(folder):
        return folder
    private_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with transferring():
            made = download_artifacts(
                artifact_uri=f"{location}/artifacts/checkpoint", dst_path=scratch, tracking_uri=uri
            )
        if not has_checkpoint(folder):  # another process may have been faster
            os.replace(made, folder)
    return folder
