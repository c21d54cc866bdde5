"""Models made of others by adding tasks: what was asked before is answered as before."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.tracking.store.versions import RegistryError, codec_versions, resolve_model

PARENT = "mantis.parent"


def check_child(client: MlflowClient, uri: str, child: ModelVersion) -> None:
    """Raises RegistryError for a version that answers a task of its parent otherwise, by one bit.

    The parent is the registered version with the id that the child names. One that is not in this
    store was compared when the task was added.
    """
    wanted = child.tags.get(PARENT)
    parent = next(
        (
            version
            for version, _ in codec_versions(client)
            if wanted and version.tags.get("mantis.model_id") == wanted
        ),
        None,
    )
    if parent is None:
        return
    from mantis_core.codec.adding import check_same_codec  # imports torch, which takes seconds
    from mantis_core.codec.checkpoint import load_model
    from mantis_core.errors import ModelError

    names = [f"models:/{each.name}/{each.version}" for each in (parent, child)]
    before, after = (load_model(resolve_model(name, uri)) for name in names)
    try:
        check_same_codec(before, after)
    except ModelError as error:
        raise RegistryError(
            f"{names[1]} was made of {names[0]} and is no longer like it: {error}. It is not "
            "promoted; add the task to that version again."
        ) from None
