"""A registered version says what it is, and its figures are also those of its logged model."""

from __future__ import annotations

import json

import yaml

from pipelines.tracking import lookup, package
from pipelines.tracking.pages.description import version_description
from pipelines.tracking.pages.logged_models import log_checkpoint
from pipelines.tracking.runs import Tracker
from pipelines.tracking.store.versions import part_names, resolve_model
from tests.pipelines.tracking.test_registry import Chain, chain, checkpoint

__all__ = ["chain", "checkpoint"]  # fixtures of the tests below


def test_a_version_says_what_it_is_and_an_edited_description_stays(
    chain: Chain, tracker: Tracker
) -> None:
    chain.register()
    client = tracker.client
    for part, name in part_names("mantis").items():
        version = client.get_model_version(name, "1")
        assert version.description == version_description(
            part, f"models:/{name}/1", version.tags, chain.evaluation, None
        )
        assert "candidate" in client.get_registered_model(name).description
        folder = resolve_model(f"models:/{name}/1", tracker.location.uri)
        model = yaml.safe_load((folder.parents[1] / "MLmodel").read_text())
        assert model["metadata"]["input_example"] == package.EXAMPLE
        assert model["saved_input_example_info"]["type"] == "dataframe"
        assert model["signature"]["inputs"]
    client.update_model_version("mantis", "1", "ours")
    chain.evaluation["arms"][0]["metrics"]["val/top1"] = 0.875
    chain.write("evaluate", "evaluation.json", chain.evaluation)
    chain.register()
    assert client.get_model_version("mantis", "1").description == "ours"
    assert "87.5 %" in client.get_model_version("mantis-client", "1").description


def test_a_version_belongs_to_the_logged_model_of_its_checkpoint(
    chain: Chain, tracker: Tracker
) -> None:
    run_id = lookup.stage_run_id(tracker, "stage2-a")
    about = {"stage": "stage2", "key": "stage2-a", "kind": "codec", "location": "stages/stage2-a"}
    model_id = log_checkpoint(tracker, run_id, **about, params={}, figures={}, dataset=None)
    measured = lookup.stage_run_id(tracker, "evaluate-a")
    tracker.finish(measured, "FINISHED", metrics={"val/top1": 0.75})
    chain.register()
    ids = {
        name: tracker.client.get_model_version(name, "1").tags["mantis.logged_model"]
        for name in part_names("mantis").values()
    }
    assert ids["mantis"] == model_id
    assert len(set(ids.values())) == 3
    for name, logged_model in ids.items():
        model = tracker.client.get_logged_model(logged_model)
        [figure] = model.metrics
        assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": "1"}]
        assert (figure.key, figure.value) == ("val/top1", 0.75)
