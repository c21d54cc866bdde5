"""Networks built without values: what does not fit is found without data, weights or a download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import save_file

from data_prep.tasks import resolve_tasks
from mantis_core.errors import ModelError
from pipelines.chain.dry_build import check_networks
from pipelines.chain.effort import Cost
from pipelines.chain.plan import plan_stages
from pipelines.settings.reading import load_settings
from tests.mantis_core.lite_package import empty_package, install
from tests.mantis_core.narrow_resnet import NAME
from tests.pipelines.fakes import same_code
from tests.root import ROOT

SMALL = {"channels": 8, "blocks": 0}
CONFIG = {
    "data": {"sources": [{"kind": "shapes", "train_rows": 20, "val_rows": 10}], "image_size": 32},
    "tasks": [
        {"name": "outline", "classes_from": "shapes"},
        {"name": "texture", "classes_from": "shapes"},
    ],
    "teacher": {"name": NAME, "weights": "train", "split": "layer2"},
    "model": {
        "stem": {"channels": [8, 8]},
        "detector": {**SMALL, "hidden": 8},
        "encoder": {**SMALL, "latent_channels": 4},
        "decoder": {**SMALL, "task_channels": 8},
    },
    "evaluate": {"baselines": []},
}


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    same_code(monkeypatch)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def check(
    *overrides: str, config: str | Path = "tiny.yaml", single_class: bool = True
) -> dict[str, Cost]:
    settings = load_settings(config, overrides)
    table = resolve_tasks(settings.tasks, settings.data)
    trainings = [s for s in plan_stages(settings, table, "data") if s.stage.trains]
    return check_networks(trainings, table, single_class=single_class)


def teacher_file(path: Path, classes: int, name: str = NAME) -> Path:
    net = torchvision.models.get_model(name, weights=None, num_classes=classes)
    save_file(net.state_dict(), path)
    return path


@pytest.mark.parametrize("single_class", [True, False])
def test_networks_of_every_stage_and_arm_are_built(
    single_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    before = torch.get_rng_state()
    arms = "[none, none_prior, individual, per_task, teacher]"
    costs = check(f"evaluate.baselines={arms}", single_class=single_class)
    assert torch.equal(torch.get_rng_state(), before)
    assert {"teacher", "stage1", "stage2", "stage2/none"} <= costs.keys()
    assert "individual" not in costs  # it counts rows
    assert all(min(cost) > 0 for cost in costs.values())


def test_a_step_costs_more_where_more_is_trained() -> None:
    frozen, free = check()["stage2"], check("stage2.freeze_stem=false")["stage2"]
    assert frozen.macs < free.macs
    assert frozen.saved_bytes < free.saved_bytes
    assert frozen.held_bytes < free.held_bytes


def test_a_training_on_coded_images_is_built_and_not_counted() -> None:
    """Its codec needs pixels."""
    costs = check("evaluate.codecs={jpeg: [50]}", "evaluate.codec_teachers=true")
    assert costs.keys() == {"teacher", "stage1", "stage2"}


def test_a_config_for_large_images_is_built_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    empty_package(tmp_path, monkeypatch, "efficientnet_lite2")
    config = ROOT / "configs" / "imagenet.yaml"
    tracked: list[int] = []
    real = torch.nn.Conv2d.__init__

    def init(self: torch.nn.Conv2d, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        tracked.append(0 if self.weight.is_meta else self.weight.numel())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "__init__", init)
        costs = check("evaluate.baselines=[]", config=config)
    assert sum(tracked) < 1e7  # one EfficientNet-Lite2 with values, to look at its blocks
    assert 2e9 < costs["stage1"].macs < costs["stage2"].macs < 6e9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.name=nosuch", "there is no classification model 'nosuch'"),
        ("teacher.name=densenet121", "not built as blocks, mean pooling and one linear layer"),
        ("teacher.split=stage9", "teacher.split is 'stage9'; this teacher can be cut after one of"),
        ("stage1.losses.split.student=nosuch", "student module 'nosuch', which this model lacks"),
        ("stage1.losses.split.criterion=NoLoss", "'NoLoss' compares no two tensors"),
        ("stage2.losses.tasks.kwargs.frobnicate=1", "losses.tasks.kwargs do not fit TaskLosses"),
        ("stage1.losses.last.student=decoder", "stage1: its networks do not fit each other"),
        ("teacher.weights=pretrained", "pretrained has 1000 logits, the data has"),
    ],
)
def test_what_does_not_fit_is_named(override: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check(override)


def test_a_file_of_weights_must_fit_the_network_and_the_classes(tmp_path: Path) -> None:
    settings = load_settings("tiny.yaml")
    classes = len(resolve_tasks(settings.tasks, settings.data).classes)
    check(f"teacher.weights={teacher_file(tmp_path / 'good.safetensors', classes)}")
    with pytest.raises(ModelError, match=r"has 7 logits, the data has \d+ classes"):
        check(f"teacher.weights={teacher_file(tmp_path / 'seven.safetensors', 7)}")
    other = teacher_file(tmp_path / "other.safetensors", classes, "mobilenet_v2")
    with pytest.raises(ModelError, match=f"do not fit {NAME}"):
        check(f"teacher.weights={other}")
    with pytest.raises(ModelError, match=f"do not fit {NAME}"):
        check(f"teacher.start={other}")


def test_weights_to_begin_with_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, get_model = [], torchvision.models.get_model

    def get(name: str, weights: str | None) -> object:
        asked.append(weights)
        return get_model(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", get)
    check("teacher.start=pretrained")
    assert set(asked) == {None}


def test_a_loss_on_class_logits_needs_a_detector_that_names_classes() -> None:
    classes = "stage1.losses.classes={criterion: ClassDetection}"
    with pytest.raises(ModelError, match=r"model\.detector\.classes=true"):
        check(classes)
    check(classes, "model.detector.classes=true", "model.neighbour_contexts=true")
