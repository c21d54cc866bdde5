"""Registers models, moves aliases, lists versions and traces them to their runs. Trains nothing.

Every codec is registered three times: whole, as a client and as a server. A version holds a
models-from-code file, the source of mantis_core and a checkpoint folder (safetensors, YAML, JSON).
Readers load the checkpoint folder only and unpickle nothing. The three versions of a codec have the
same tag `mantis.stage_key`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion

from pipelines.storage import Store, scratch
from pipelines.tracking import lookup
from pipelines.tracking.children import check_child
from pipelines.tracking.lookup import StageRun
from pipelines.tracking.pages.annotate import LOGGED_MODEL, annotate
from pipelines.tracking.pages.arms import find_arms
from pipelines.tracking.pages.datasets import inputs_of
from pipelines.tracking.pages.description import model_description
from pipelines.tracking.pages.logged_models import checkpoints, find_checkpoint
from pipelines.tracking.runs import Tracker
from pipelines.tracking.store.client import TRACKING_FAILURES, asking, explain, send_files, writing
from pipelines.tracking.store.moved import local_folder
from pipelines.tracking.store.versions import (
    CHECKPOINT_FILES,
    NAME,
    PATCH,
    RegistryError,
    codec_versions,
    files_of,
    find_version,
    has_files,
    part_names,
)
from pipelines.tracking.summaries import client_tags, codec_stage, summary, tags_of


def register(tracker: Tracker, run: str, experiment: str | None = None) -> dict[str, Any]:
    """Registers the main arm of a finished pipeline run, in the run's own experiment.

    `run` is its id or "latest", also of another experiment than `tracker`'s. The model has the name
    that the run's config gave it.
    """
    pipeline = lookup.find_pipeline(tracker, run, experiment)
    tracker = tracker.within(pipeline)
    stages = lookup.stages(tracker, pipeline)
    trained = "extend" if "extend" in stages else "stage2"
    missing = {trained, "evaluate"} - stages.keys()
    if missing:
        raise RegistryError(
            f"run {pipeline.info.run_id} has no finished {' and no '.join(sorted(missing))}. "
            "Finish it with `mantis run`, then register it."
        )
    version = register_stages(tracker, stages, pipeline.data.tags["mantis.name"])
    return {"model": f"models:/{tracker.model}/{version}", "version": version}


def promote(tracker: Tracker, version: str, alias: str = "champion") -> dict[str, Any]:
    """Moves `alias` to a version and its two halves. Returns the version as `models` lists it.

    `version` is `models:/NAME/VERSION` or `models:/NAME@ALIAS`, or a number if the store has models
    of one name, or of `mantis` beside others. Raises RegistryError for a version made by adding
    tasks that answers another task than before, see `check_child`.
    """
    uri = tracker.location.uri
    with asking(uri) as client:
        model = version if ":" in version else f"models:/{_only_name(client)}/{version}"
        found = find_version(client, uri, model)
        check_child(client, uri, found)
        for name, own in _parts_of(client, found).items():
            client.set_registered_model_alias(name, alias, own)
        moved = client.get_model_version(found.name, found.version)
        return summary(moved, sorted(moved.aliases))


def _only_name(client: MlflowClient) -> str:
    """Returns the name of the models in the store. Raises RegistryError if there are several."""
    names = {version.name for version, _ in codec_versions(client)} or {NAME}
    if len(names) == 1 or NAME in names:
        return NAME if NAME in names else names.pop()
    raise RegistryError(
        f"the store has models of several names ({', '.join(sorted(names))}): give one as "
        "`mantis models` lists it, such as models:/NAME/3."
    )


def models(
    tracker: Tracker, *, max_bpp: float | None = None, min_top1: float | None = None
) -> list[dict[str, Any]]:
    """Lists versions with their figures, newest first; with `max_bpp`, most accurate first.

    A bound also drops the versions that lack its figure. Of a model of several rates the figures
    are those of the level that keeps within the bounds.
    """
    with asking(tracker.location.uri) as client:
        found = list(codec_versions(client))
    found.sort(key=lambda each: (each[0].creation_timestamp, int(each[0].version)), reverse=True)
    summaries = [
        summary(version, aliases, max_bpp=max_bpp, min_top1=min_top1) for version, aliases in found
    ]
    if max_bpp is not None:
        summaries = [s for s in summaries if s["bpp"] is not None and s["bpp"] <= max_bpp]
    if min_top1 is not None:
        summaries = [s for s in summaries if s["top1"] is not None and s["top1"] >= min_top1]
    if max_bpp is None:
        return summaries
    return sorted(summaries, key=lambda each: -(each["top1"] or 0.0))


def lineage(tracker: Tracker, run: str, experiment: str | None = None) -> dict[str, Any]:
    """Returns the commit, package versions, data, stages, arms, files and models of a pipeline run.

    Each stage has its ancestors and, if it is a training, the MLflow id of its checkpoint.
    """
    pipeline = lookup.find_pipeline(tracker, run, experiment)
    tracker = tracker.within(pipeline)
    stages = lookup.stages(tracker, pipeline)
    keys = {stage.key for stage in stages.values()}
    with asking(tracker.location.uri) as client:
        registered = list(codec_versions(client))
        made = checkpoints(tracker, keys)
        arms = find_arms(tracker, stages.get("evaluate"))
        artifacts = [file.path for file in client.list_artifacts(pipeline.info.run_id)]
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
        "data": inputs_of(pipeline),
        "artifacts": artifacts,
        "stages": [
            {**asdict(stage), "checkpoint": made.get(stage.key)} for stage in stages.values()
        ],
        "arms": [asdict(arm) for arm in arms],
        "models": [
            summary(version, aliases)
            for version, aliases in registered
            if version.tags.get("mantis.stage_key") in keys
        ],
    }


def register_stages(tracker: Tracker, stages: Mapping[str, StageRun], config_name: str) -> str:
    """Registers the codec of a finished stage 2 and returns its version.

    A stage 2 key has one version. If it exists, only its tags and the alias `candidate` change, and
    files that are no longer there are written again.
    """
    main = codec_stage(stages)
    store = Store(main.folder)
    checkpoint = _read(store, "result.json")["model_folder"]
    evaluation = _read(Store(stages["evaluate"].folder), "evaluation.json")
    tags = tags_of(evaluation, stages, config_name)
    tags |= client_tags(store.read_json(f"{checkpoint}/meta.json"))
    names, uri = part_names(tracker.model), tracker.location.uri
    try:
        with writing(uri) as client:
            known = _versions_with(client, tracker.model, main.key)
        missing = [part for part, name in names.items() if name not in known]
        lost = [
            part
            for part, name in names.items()
            if name in known
            and not has_files(client, uri, client.get_model_version(name, known[name]))
        ]
        if missing or lost:
            root = main.folder.rpartition("/stages/")[0] or main.folder
            with scratch(root, "mantis-register") as made:
                folder = made / "checkpoint"
                folder.mkdir()
                for name in CHECKPOINT_FILES:  # leaves out the training state beside them
                    (folder / name).write_bytes(store.read_bytes(f"{checkpoint}/{name}"))
                store.download_folder(f"{checkpoint}/{PATCH}", folder / PATCH)  # if it has one
                for part in missing:
                    own = _part_folder(folder, part)
                    target = made / f"model-{part}"
                    made_version = _write_version(tracker, part, own, folder, main, target, tags)
                    known[names[part]] = made_version
                for part in lost:
                    own = _part_folder(folder, part)
                    empty = client.get_model_version(names[part], known[names[part]])
                    target = made / f"lost-{part}"
                    _write_files_again(client, uri, part, own, folder, empty, target)
        for part, name in names.items():
            annotate(tracker, part, (name, known[name]), tags, evaluation, stages)
        for name, version in known.items():
            for key, value in tags.items():
                client.set_model_version_tag(name, version, key, value)
        for name, version in known.items():
            client.set_registered_model_alias(name, "candidate", version)
    except TRACKING_FAILURES as error:
        raise RegistryError(
            f"the model could not be registered: {explain(error, uri)}. The trained model is kept "
            f"in {store.join(checkpoint)}; run the same command again when MLflow answers."
        ) from error
    return known[tracker.model]


def _read(store: Store, name: str) -> Any:
    """Reads a file of a finished stage. Raises RegistryError if it is not there."""
    try:
        return store.read_json(name)
    except FileNotFoundError as error:
        raise RegistryError(
            f"there is no {store.join(name)}, which the registration needs. Put the stage's folder "
            "back, or run `mantis run` with this storage.root again."
        ) from error


def _part_folder(whole: Path, part: str) -> Path:
    """Returns the checkpoint folder of a part. That of a half is written next to the whole one."""
    if part == "whole":
        return whole
    from mantis_core.codec.checkpoint import Half, save_half  # imports torch, which takes seconds

    half: Half = "client" if part == "client" else "server"
    folder = whole.parent / half / whole.name  # MLflow keeps the folder's name in the model
    save_half(folder, whole, half)
    return folder


def _versions_with(client: MlflowClient, model: str, stage_key: str) -> dict[str, str]:
    """Maps registered names to their version with this stage 2 key, for names that have one."""
    found = {}
    for name in part_names(model).values():
        versions = client.search_model_versions(
            f"name = \"{name}\" and tags.`mantis.stage_key` = '{stage_key}'"
        )
        if versions:
            found[name] = str(versions[0].version)
    return found


def _parts_of(client: MlflowClient, whole: ModelVersion) -> dict[str, str]:
    """Maps registered names to the versions of a codec and its halves."""
    key = whole.tags.get("mantis.stage_key")
    parts = _versions_with(client, whole.name, key) if key else {}
    return {**parts, whole.name: str(whole.version)}


def _write_version(
    tracker: Tracker,
    part: str,
    checkpoint: Path,
    whole: Path,
    stage: StageRun,
    package: Path,
    tags: Mapping[str, str],
) -> str:
    """Writes a version of one part and returns its number.

    `checkpoint` is the folder of the part, `whole` that of the whole codec. A version of the whole
    belongs to the logged model of its checkpoint, if there is one. Halves have their own.
    """
    from pipelines.tracking.package import example_input, write_package  # takes seconds

    client, name = tracker.client, part_names(tracker.model)[part]
    run_id = stage.run_id or None
    listed = find_checkpoint(tracker, stage.key) if part == "whole" else None
    logged = listed or client.create_logged_model(
        tracker.experiment_id,
        name=name,
        source_run_id=run_id,
        model_type="codec",
        tags=dict(tags),
        params={"tasks": tags["mantis.tasks"], "rate_weight": tags["mantis.rate_weight"]},
    )
    write_package(
        package,
        checkpoint,
        part=part,
        run_id=run_id,
        model_id=logged.model_id,
        example=example_input(part, whole),
    )
    send_files(client, logged.model_id, package)
    client.finalize_logged_model(logged.model_id, "READY")
    if listed is not None:
        client.set_logged_model_tags(logged.model_id, dict(tags))
    elif run_id is not None:
        client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step=0)])
    if not client.search_registered_models(f'name = "{name}"'):
        client.create_registered_model(name, description=model_description(part, name))
    if tracker.location.uri.startswith("http"):
        source: str = f"models:/{logged.model_id}"
        model_id: str | None = logged.model_id
    else:
        # Without a server, MLflow looks up a models:/ source, or a model without a run, in its
        # global tracking URI, which may differ from ours.
        source, model_id = logged.artifact_location, logged.model_id if run_id else None
    made_of = {LOGGED_MODEL: logged.model_id}
    created = client.create_model_version(name, source, run_id, tags=made_of, model_id=model_id)
    number = str(created.version)
    # MLflow's page of models reads the link to a version from this tag.
    link = json.dumps([{"name": name, "version": number}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})
    return number


def _write_files_again(
    client: MlflowClient,
    uri: str,
    part: str,
    checkpoint: Path,
    whole: Path,
    version: ModelVersion,
    package: Path,
) -> None:
    """Writes the files of a version that lost them, to where the registry says they are."""
    from pipelines.tracking.package import example_input, write_package  # takes seconds

    address = files_of(client, uri, version)
    found = re.search(r"m-[0-9a-f]{32}", version.model_id or address)
    if found is None:
        raise RegistryError(
            f"the files of models:/{version.name}/{version.version} are lost, and {address} cannot "
            "be written: delete that version in MLflow and register again."
        )
    run_id = version.run_id or None
    write_package(
        package,
        checkpoint,
        part=part,
        run_id=run_id,
        model_id=found[0],
        example=example_input(part, whole),
    )
    folder = local_folder(address)
    if folder is None:
        send_files(client, found[0], package)
    else:  # MLflow may remember where they were, by the model's id
        shutil.copytree(package, folder, dirs_exist_ok=True)
