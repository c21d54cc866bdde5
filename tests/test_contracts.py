"""What holds for every entry of each dict and every shipped config: a new one is tested unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import log_softmax

from data_prep.sources.base import SourceConfig
from data_prep.sources.kinds import SOURCES
from mantis_core.architecture import ConditioningConfig
from mantis_core.networks.blocks import modulate
from mantis_core.networks.conditioning import CONDITIONING, Layers, Modulation
from mantis_core.tasks import Batch, TaskSpec
from mantis_core.training.losses import CRITERIA, LOW_LEVEL, JointDecision
from pipelines.settings.reading import load_settings, to_yaml
from tests.root import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LAYERS = Layers((4, 6, 5), (1, 2, 2), 9)
TASKS = (
    TaskSpec("animals", "classification", 3, (0, 1, 2)),
    TaskSpec("tools", "classification", 2, (3, 4)),
    TaskSpec("ground", "segmentation", 3),
)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
class TestEveryConfig:
    def test_loads_and_reads_back_as_it_was(self, path: Path, tmp_path: Path) -> None:
        settings = load_settings(path)
        (tmp_path / "resolved.yaml").write_text(to_yaml(settings))
        assert load_settings(tmp_path / "resolved.yaml") == settings

    def test_keeps_its_runs_below_the_folder_it_is_started_in(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert Path(load_settings(path).storage.root) == tmp_path / "runs"

    def test_says_at_its_top_what_it_is_and_how_it_is_run(self, path: Path) -> None:
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert head.startswith("# ")
        assert path.name in path.read_text(encoding="utf-8")

    def test_names_only_kinds_of_sources_there_are(self, path: Path) -> None:
        assert {source.kind for source in load_settings(path).data.sources} <= set(SOURCES)


def test_configs_extend_one_level_only() -> None:
    for path in CONFIGS:
        parent = yaml.safe_load(path.read_text(encoding="utf-8")).get("extends")
        if parent:
            assert "extends" not in yaml.safe_load((path.parent / parent).read_text("utf-8"))


@pytest.mark.parametrize("kind", SOURCES)
class TestEverySourceKind:
    def test_has_a_frozen_config_that_refuses_unknown_keys(self, kind: str) -> None:
        config = SOURCES[kind]
        assert issubclass(config, SourceConfig)
        assert (config.model_config.get("frozen"), config.model_config.get("extra")) == (
            True,
            "forbid",
        )
        assert config.model_fields["kind"].default == kind

    def test_offers_what_preparing_asks_of_a_source(self, kind: str) -> None:
        for method in ("listing", "read", "state", "declared_classes"):
            assert callable(getattr(SOURCES[kind], method))


def test_every_kind_of_conditioning_may_be_named_in_a_config() -> None:
    allowed = get_args(ConditioningConfig.model_fields["kind"].annotation)
    assert set(allowed) == set(CONDITIONING)


@pytest.mark.parametrize("kind", CONDITIONING)
class TestEveryConditioning:
    def test_modulates_each_layer_image_by_image_or_leaves_it(self, kind: str) -> None:
        modulation = condition(kind, 5)
        assert len(modulation) == len(LAYERS.channels)
        for gamma_beta, x in zip(modulation, features(5), strict=True):
            assert modulate(x, gamma_beta).shape == x.shape
            for part in gamma_beta or ():
                assert part.shape in {(*x.shape[:2], 1, 1), x.shape}

    def test_is_identity_at_init(self, kind: str) -> None:
        for gamma_beta, x in zip(condition(kind, 2), features(2), strict=True):
            assert torch.equal(modulate(x, gamma_beta), x)

    def test_keeps_a_small_modulation_under_autocast(self, kind: str) -> None:
        module = CONDITIONING[kind](3, LAYERS, hidden=8)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(0.0 if parameter.ndim > 1 else 0.001)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            modulation = module(torch.rand(2, 3), torch.rand(2, 9, 4, 6))
        for gamma, beta in filter(None, modulation):
            expected = torch.full(gamma.shape, 1.0 if kind == "channels" else 1.001)
            torch.testing.assert_close(gamma.float(), expected, atol=1e-5, rtol=0)
            assert gamma.dtype == beta.dtype == torch.float32

    def test_can_be_trained(self, kind: str) -> None:
        module = CONDITIONING[kind](3, LAYERS, hidden=8)
        modulation = module(torch.rand(2, 3), torch.rand(2, 9, 4, 6))
        outputs = [
            modulate(x, gamma_beta).square().mean()
            for gamma_beta, x in zip(modulation, features(2), strict=True)
        ]
        if list(module.parameters()):
            torch.stack(outputs).sum().backward()
            assert all(p.grad is not None for p in module.parameters())


def condition(kind: str, count: int) -> Modulation:
    """What a new module of the kind makes of so many images whose detector's map is 4 by 6."""
    module = CONDITIONING[kind](3, LAYERS, hidden=8)
    return module(torch.rand(count, 3), torch.rand(count, 9, 4, 6))


def features(count: int) -> list[Tensor]:
    """What LAYERS modulates beside such a map."""
    sizes = {1: (4, 6), 2: (2, 3)}
    return [
        torch.randn(count, channels, *sizes[step])
        for channels, step in zip(LAYERS.channels, LAYERS.steps, strict=True)
    ]


def make_batch(count: int = 6) -> Batch:
    """Images of classes 0 to 4 in turn, every other one with a segmentation mask."""
    class_label = torch.arange(count) % 5
    labels = torch.full((count, 3), -1)
    labels[:, 0] = torch.where(class_label < 3, class_label, -1)
    labels[:, 1] = torch.where(class_label >= 3, class_label - 3, -1)
    mask = labels >= 0
    mask[::2, 2] = True
    truth = torch.randint(0, 3, (count, 8, 8), dtype=torch.uint8)
    image = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    return Batch(image, class_label, labels, mask, {"ground": truth}, torch.arange(count))


def all_outputs(batch: Batch, *, flat: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The leaves that were drawn, and every output a recipe hands to a criterion."""
    torch.manual_seed(0)
    count = len(batch)
    sizes = {
        "logits": (5,),
        "task_logits": (3,),
        "class_logits": (6,),
        "joint": (5,),
        **{
            f"{prefix}/{task.name}": (task.num_classes + extra,)
            if task.is_classification
            else (task.num_classes, 8, 8)
            for prefix, extra in (("logits", 0), ("tasks", 1))
            for task in TASKS
        },
        **{f"exits/{task.name}": (task.num_classes,) for task in TASKS if task.is_classification},
    }
    if not flat:
        del sizes["logits"], sizes["joint"]
    leaves = {k: torch.randn(count, *size, requires_grad=True) for k, size in sizes.items()}
    others = ("tasks/", "exits/")
    outputs: dict[str, Any] = {k: v for k, v in leaves.items() if not k.startswith(others)}
    nobody = torch.zeros(count, 0)
    outputs["exits"] = tuple(leaves.get(f"exits/{task.name}", nobody) for task in TASKS)
    outputs["tasks"] = {
        task.name: log_softmax(leaves[f"tasks/{task.name}"], 1)
        if task.is_classification
        else leaves[f"tasks/{task.name}"]
        for task in TASKS
    }
    outputs["loss_mask"] = batch.task_mask
    return leaves, outputs


REACHES = {
    "TeacherLogits": ("logits", "logits/animals"),
    "TaskDetection": ("task_logits", "task_logits"),
    "ClassDetection": ("class_logits", "class_logits"),
    "TaskLosses": ("tasks/animals", "tasks/ground"),
    "ExitAnswers": ("exits/animals", "exits/animals"),
    "JointDecision": ("joint", "joint"),
    "TeacherDecision": ("joint", "tasks/animals"),
    "FlatLabels": ("logits", "logits/ground"),
}
"""The output that a criterion's gradient must reach, where images have one class and where not."""


def test_the_contract_test_knows_what_every_criterion_reads() -> None:
    assert set(REACHES) == set(CRITERIA)


@pytest.mark.parametrize(
    ("name", "flat"), [(n, f) for n in CRITERIA for f in (True, False) if f or n != "JointDecision"]
)
def test_every_criterion_is_finite_and_its_gradient_reaches_what_it_should(
    name: str, flat: bool
) -> None:
    build = CRITERIA[name]
    criterion = build() if build is JointDecision else build(TASKS)
    batch = make_batch()
    leaves, ours = all_outputs(batch, flat=flat)
    teachers, theirs = all_outputs(batch, flat=flat)
    theirs = {k: v for k, v in theirs.items() if k.startswith("logits")}
    theirs = {k: v.flip(0) for k, v in theirs.items()}
    loss = criterion({"outputs": ours}, {"outputs": theirs}, batch)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert float(loss.detach()) > 0
    loss.backward()
    gradient = leaves[REACHES[name][0 if flat else 1]].grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    assert all(value.grad is None for value in teachers.values())


@pytest.mark.parametrize("name", LOW_LEVEL)
def test_every_low_level_criterion_compares_two_tensors(name: str) -> None:
    criterion = LOW_LEVEL[name]()
    value = torch.randn(2, 4, 3, 3, requires_grad=True)
    target = torch.randn(2, 4, 3, 3)
    loss = criterion(value, target)
    assert loss.shape == ()
    loss.backward()
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()
    assert value.grad.abs().sum() > 0
    assert float(criterion(target, target)) == 0
