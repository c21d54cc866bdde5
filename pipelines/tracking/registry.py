"""Registers models, moves aliases, lists versions and traces them to their runs. Trains nothing.

Every codec is registered three times: whole, as a client and as a server. A version holds a
models-from-code file, the source of mantis_core and a checkpoint folder (safetensors, YAML, JSON).
Readers load the checkpoint folder only and unpickle nothing. The three versions of a codec have the
same tag `mantis.stage_key`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipelines.storage import Store
from pipelines.tracking import lookup
from pipelines.tracking.lookup import StageRun
from pipelines.tracking.metric_writer import bounded_client, failure_text, finite
from pipelines.tracking.runs import Tracker

NAME = "mantis"
NAMES = {"whole": NAME, "client": "mantis-client", "server": "mantis-server"}
CHECKPOINT_FILES = ("weights.safetensors", "config.yaml", "meta.json")
FIGURES = ("val/top1", "val/bpp", "val/wire_bytes")


class RegistryError(ValueError):
    """Raised if a model, version or run cannot be used. The message says what is allowed."""

    exit_code = 2


def register(tracker: Tracker, run: str) -> dict[str, Any]:
    """Registers the main arm of a finished pipeline run. `run` is its id or "latest"."""
    pipeline = lookup.find_pipeline(tracker, run)
    stages = lookup.stages(tracker, pipeline)
    missing = {"stage2", "evaluate"} - stages.keys()
    if missing:
        raise RegistryError(
            f"run {pipeline.info.run_id} has no finished {' and no '.join(sorted(missing))}. "
            "Finish it with `mantis run`, then register it."
        )
    version = register_stages(tracker, stages, pipeline.data.tags["mantis.name"])
    return {"model": f"models:/{NAME}/{version}", "version": version}


def promote(tracker: Tracker, version: str, alias: str = "champion") -> dict[str, Any]:
    """Moves `alias` to a version and its two halves. Returns the version as `models` lists it."""
    client = tracker.client
    found = _version(client, tracker.location.uri, f"models:/{NAME}/{version}")
    for name, own in _parts_of(client, found).items():
        client.set_registered_model_alias(name, alias, own)
    return _summary(client.get_model_version(NAME, found.version))


def models(
    tracker: Tracker, *, max_bpp: float | None = None, min_top1: float | None = None
) -> list[dict[str, Any]]:
    """Lists versions with their figures, newest first; with `max_bpp`, most accurate first.

    A bound also drops the versions that lack its figure.
    """
    found = tracker.client.search_model_versions(f"name = '{NAME}'", max_results=10_000)
    # The result of a search has no aliases, so each version is fetched.
    summaries = [_summary(tracker.client.get_model_version(NAME, v.version)) for v in found]
    if max_bpp is not None:
        summaries = [s for s in summaries if s["bpp"] is not None and s["bpp"] <= max_bpp]
    if min_top1 is not None:
        summaries = [s for s in summaries if s["top1"] is not None and s["top1"] >= min_top1]
    newest = sorted(summaries, key=lambda summary: -int(summary["version"]))
    if max_bpp is None:
        return newest
    return sorted(newest, key=lambda summary: -(summary["top1"] or 0.0))


def lineage(tracker: Tracker, run: str) -> dict[str, Any]:
    """Returns the commit, package versions, stages with ancestors, and models of a pipeline run."""
    pipeline = lookup.find_pipeline(tracker, run)
    stages = lookup.stages(tracker, pipeline)
    keys = {stage.key for stage in stages.values()}
    registered = tracker.client.search_model_versions(f"name = '{NAME}'", max_results=10_000)
    return {
        "run_id": pipeline.info.run_id,
        "name": pipeline.data.tags["mantis.name"],
        "status": pipeline.info.status,
        "git_commit": pipeline.data.tags.get("mlflow.source.git.commit"),
        "source_sha256": pipeline.data.tags.get("mantis.source_sha256"),
        "uncommitted_changes": pipeline.data.tags.get("mantis.uncommitted_changes") == "true",
        "versions": yaml.safe_load(pipeline.data.tags["mantis.versions"]),
        "adopted": sorted(
            tag.removeprefix("mantis.adopted.")
            for tag in pipeline.data.tags
            if tag.startswith("mantis.adopted.")
        ),
        "stages": [asdict(stage) for stage in stages.values()],
        "models": [
            _summary(tracker.client.get_model_version(NAME, version.version))
            for version in registered
            if version.tags.get("mantis.stage_key") in keys
        ],
    }


def resolve_model(model: str, uri: str) -> Path:
    """Returns the local checkpoint folder of a model.

    `model` is `models:/mantis@<alias>`, `models:/mantis/<version>`, the same with `mantis-client`
    or `mantis-server`, or a checkpoint folder. `uri` is the tracking URI. Files of a remote store
    are downloaded to a temporary folder. Loads and unpickles nothing.
    """
    if not model.startswith("models:"):
        folder = Path(model)
        _require_checkpoint(folder, model)
        return folder
    client = bounded_client(uri)
    version = _version(client, uri, model)
    try:
        location = client.get_model_version_download_uri(version.name, version.version)
        folder = Path(
            download_artifacts(artifact_uri=f"{location}/artifacts/checkpoint", tracking_uri=uri)
        )
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"the files of {model} cannot be read ({failure_text(error, uri)}). Check that MLflow "
            "and its artifact store answer."
        ) from error
    _require_checkpoint(folder, model)
    return folder


def register_stages(tracker: Tracker, stages: Mapping[str, StageRun], config_name: str) -> str:
    """Registers the codec of a finished stage 2 and returns its version.

    A stage 2 key has one version. If it exists, only its tags and the alias `candidate` change.
    """
    main = stages["stage2"]
    store = Store(main.folder)
    checkpoint = store.read_json("result.json")["model_folder"]
    evaluation = Store(stages["evaluate"].folder).read_json("evaluation.json")
    tags = _tags(evaluation, stages, config_name)
    tags |= _client_tags(store.read_json(f"{checkpoint}/meta.json"))
    client = tracker.client
    try:
        known = _versions_with(client, main.key)
        missing = [part for part, name in NAMES.items() if name not in known]
        if missing:
            with tempfile.TemporaryDirectory(prefix="mantis-register-") as scratch:
                folder = Path(scratch) / "checkpoint"
                folder.mkdir()
                for name in CHECKPOINT_FILES:  # leaves out the training state beside them
                    (folder / name).write_bytes(store.read_bytes(f"{checkpoint}/{name}"))
                for part in missing:
                    own = _part_folder(folder, part)
                    target = Path(scratch) / f"model-{part}"
                    known[NAMES[part]] = _write_version(tracker, part, own, main, target, tags)
        for name, version in known.items():
            for key, value in tags.items():
                client.set_model_version_tag(name, version, key, value)
        for name, version in known.items():
            client.set_registered_model_alias(name, "candidate", version)
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"the model could not be registered with MLflow at {tracker.place} "
            f"({failure_text(error, tracker.location.uri)}). The trained model is kept in "
            f"{store.join(checkpoint)}; run the same command again when MLflow answers."
        ) from error
    return known[NAME]


def _part_folder(whole: Path, part: str) -> Path:
    """Returns the checkpoint folder of a part. That of a half is written next to the whole one."""
    if part == "whole":
        return whole
    from mantis_core.codec.checkpoint import Half, save_half  # imports torch, which takes seconds

    half: Half = "client" if part == "client" else "server"
    folder = whole.parent / half / whole.name  # MLflow keeps the folder's name in the model
    save_half(folder, whole, half)
    return folder


def _versions_with(client: MlflowClient, stage_key: str) -> dict[str, str]:
    """Maps registered names to their version with this stage 2 key, for names that have one."""
    found = {}
    for name in NAMES.values():
        versions = client.search_model_versions(
            f"name = '{name}' and tags.`mantis.stage_key` = '{stage_key}'"
        )
        if versions:
            found[name] = str(versions[0].version)
    return found


def _parts_of(client: MlflowClient, whole: ModelVersion) -> dict[str, str]:
    """Maps registered names to the versions of a codec and its halves."""
    key = whole.tags.get("mantis.stage_key")
    return {**(_versions_with(client, key) if key else {}), NAME: str(whole.version)}


def _write_version(
    tracker: Tracker,
    part: str,
    checkpoint: Path,
    stage: StageRun,
    scratch: Path,
    tags: Mapping[str, str],
) -> str:
    from pipelines.tracking.package import write_package  # imports mlflow.pyfunc: takes seconds

    client, name = tracker.client, NAMES[part]
    run_id = stage.run_id or None
    logged = client.create_logged_model(
        tracker.experiment_id, name=name, source_run_id=run_id, model_type="codec", tags=dict(tags)
    )
    write_package(scratch, checkpoint, part=part, run_id=run_id, model_id=logged.model_id)
    client.log_model_artifacts(logged.model_id, str(scratch))
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id is not None:
        client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step=0)])
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    if tracker.location.uri.startswith("http"):
        source: str = f"models:/{logged.model_id}"
        model_id: str | None = logged.model_id
    else:
        # Without a server, MLflow looks up a models:/ source, or a model without a run, in its
        # global tracking URI, which may differ from ours.
        source, model_id = logged.artifact_location, logged.model_id if run_id else None
    created = client.create_model_version(name, source, run_id, model_id=model_id)
    return str(created.version)


def _tags(
    evaluation: Mapping[str, Any], stages: Mapping[str, StageRun], config_name: str
) -> dict[str, str]:
    key = stages["stage2"].key
    arm = next(a for a in evaluation["arms"] if a["kind"] == "mantis" and a["stage_key"] == key)
    figures = finite(arm["metrics"])
    return {
        "mantis.stage_key": key,
        "mantis.evaluate_key": stages["evaluate"].key,
        "mantis.data_key": stages["prepare"].key,
        "mantis.config": config_name,
        "mantis.tasks": ", ".join(task["name"] for task in evaluation["tasks"]),
        "mantis.rate_weight": str(arm["rate_weight"]),
        **{name: str(figures[name]) for name in FIGURES if name in figures},
    }


def _client_tags(meta: Mapping[str, Any]) -> dict[str, str]:
    """Returns tags with the cost of the client and the model id that its streams carry."""
    tags = {f"mantis.{name}": str(value) for name, value in meta.get("client", {}).items()}
    return {**tags, "mantis.model_id": meta["model_id"]}


def _summary(version: ModelVersion) -> dict[str, Any]:
    figures = {name: version.tags.get(name) for name in (*FIGURES, "mantis.rate_weight")}
    top1, bpp, wire_bytes, rate_weight = (
        None if value is None else float(value) for value in figures.values()
    )
    return {
        "model": f"models:/{NAME}/{version.version}",
        "version": str(version.version),
        "aliases": sorted(version.aliases),
        "top1": top1,
        "bpp": bpp,
        "wire_bytes": wire_bytes,
        "rate_weight": rate_weight,
        "client_bytes": _whole_number(version.tags.get("mantis.client_bytes")),
        "client_macs": _whole_number(version.tags.get("mantis.client_macs")),
        "model_id": version.tags.get("mantis.model_id"),
        "config": version.tags.get("mantis.config"),
        "trial": _whole_number(version.tags.get("mantis.trial")),
        "overrides": json.loads(version.tags.get("mantis.overrides", "{}")),
        "tasks": version.tags.get("mantis.tasks"),
        "data_key": version.tags.get("mantis.data_key"),
        "stage_key": version.tags.get("mantis.stage_key"),
        "evaluate_key": version.tags.get("mantis.evaluate_key"),
        "run_id": version.run_id,
    }


def _whole_number(tag: str | None) -> int | None:
    return None if tag is None else int(tag)


def _version(client: MlflowClient, uri: str, model: str) -> ModelVersion:
    names = "|".join(NAMES.values())
    match = re.fullmatch(
        rf"models:/(?P<name>{names})(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))", model
    )
    if match is None:
        raise RegistryError(
            f"{model!r} is not the name of a model. Give models:/{NAME}@champion, "
            f"models:/{NAME}/<version>, the same with {NAMES['client']} or {NAMES['server']}, or a "
            "checkpoint folder."
        )
    try:
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        raise RegistryError(
            f"there is no model {model} ({failure_text(error, uri)}). `mantis models` lists the "
            "registered models; --root or MLFLOW_TRACKING_URI selects another store."
        ) from error


def _require_checkpoint(folder: Path, model: str) -> None:
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise RegistryError(
            f"{model} is not a checkpoint: {', '.join(missing)} not found. Give a folder that "
            f"holds {', '.join(CHECKPOINT_FILES)}, or models:/{NAME}@champion."
        )
