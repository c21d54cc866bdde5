"""`mantis add-task`: its plan, what it makes, and what `promote` says of a child that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mantis_core.codec.adding import check_same_codec
from mantis_core.codec.checkpoint import load_client, load_model, load_server, save_half, save_model
from mantis_core.errors import ModelError
from pipelines.__main__ import app
from pipelines.extending.plan import extension_plan
from tests.mantis_core.conftest import make_codec, make_problem
from tests.pipelines.experiment import last_json, mantis
from tests.pipelines.export.codecs import codec_of

CONFIG = """
data:
  sources: [{kind: shapes, train_rows: 96, val_rows: 24, size: 32}]
  holdout_fraction: 0.2
tasks:
  - {name: outline, classes_from: shapes}
  - {name: regions, kind: segmentation, labels: [background, red, green, blue]}
extend: {epochs: 2, batch_size: 16, ema_decay: 0, optim: {lr: 3.e-2}}
cluster: {object_store_mb: 100}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "codec"
    save_model(folder, codec_of("asked"), {"step": 1})
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "more.yaml"
    path.write_text(CONFIG)
    return path


def test_the_plan_takes_images_as_the_codec_does(base: Path, config: Path) -> None:
    plan = extension_plan(base, config, ["storage.root=runs"])
    assert [spec.name for spec in plan.specs] == ["prepare", "extend", "evaluate", "register"]
    assert plan.settings.data.size == load_model(base).spec.image_size
    assert [arm.level for arm in plan.arms] == [0, 4]
    assert {arm.stage for arm in plan.arms} == {"extend"}


def test_a_key_depends_on_the_weights_and_not_on_where_they_lie(
    base: Path, config: Path, tmp_path: Path
) -> None:
    def keys(folder: Path) -> dict[str, str]:
        plan = extension_plan(folder, config, ["storage.root=runs"])
        return {spec.name: spec.key for spec in plan.specs}

    save_model(tmp_path / "same", load_model(base), {"step": 2})
    other = codec_of("asked")
    with torch.no_grad():
        other.client.encoder.to_latent.weight.mul_(1.5)
    other.train().finish()
    save_model(tmp_path / "other", other, {"step": 1})
    before = keys(base)
    assert keys(tmp_path / "same") == before
    after = keys(tmp_path / "other")
    assert {name for name in before if before[name] != after[name]} == {
        "extend",
        "evaluate",
        "register",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("epochs: 2", "through: [cars], epochs: 2"), "through cars, and the client has animals"),
        (("epochs: 2", "grade: rows, epochs: 2"), "extend.grade"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(
    base: Path, config: Path, change: tuple[str, str], said: str
) -> None:
    config.write_text(CONFIG.replace(*change))
    done = CliRunner().invoke(app, ["add-task", str(base), "--config", str(config), "--dry-run"])
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())


def test_a_name_that_is_taken_is_refused(config: Path, tmp_path: Path) -> None:
    codec = make_codec(make_problem(names=("outline",)))
    codec.finish()
    save_model(tmp_path / "codec", codec, {"step": 1})
    with pytest.raises(ModelError, match="has outline already: give the task another name"):
        extension_plan(tmp_path / "codec", config, [])


def test_a_half_is_refused(base: Path, config: Path, tmp_path: Path) -> None:
    save_half(tmp_path / "server", base, "server")
    with pytest.raises(ModelError, match="holds the server alone"):
        extension_plan(tmp_path / "server", config, [])


@pytest.mark.timeout(600)
def test_a_task_is_added_measured_registered_and_promoted(
    base: Path, config: Path, tmp_path: Path
) -> None:
    words = ["add-task", str(base), "--config", str(config), "--json"]
    result = last_json(mantis(*words, folder=tmp_path))
    assert [stage["status"] for stage in result["stages"].values()] == ["ran"] * 4
    metrics = result["metrics"]
    assert 0 <= metrics["val/task/outline/top1"] <= 1
    assert 0 <= metrics["val/task/regions/miou"] <= 1
    assert metrics["val/wire_bytes"] > 11
    (folder,) = (tmp_path / "runs/stages").glob("extend-*/checkpoint")
    before, after = load_model(base), load_model(folder)
    check_same_codec(before, after, 4)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["parent"] == before.ids().model.hex()
    image = torch.randint(0, 256, (1, 3, *before.spec.image_size), dtype=torch.uint8)
    (stream,) = load_client(base).encode(image, list(before.spec.task_names))
    (answer,) = load_server(folder).decode([stream])
    assert answer.tasks[-2:] == ("outline", "regions")
    again = last_json(mantis(*words, folder=tmp_path))
    assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
    (listed,) = last_json(mantis("models", "--json", folder=tmp_path))["models"]
    assert listed["parent"] == before.ids().model.hex()
    assert last_json(mantis("promote", "1", "--json", folder=tmp_path))["aliases"]


def test_a_child_that_answers_otherwise_is_not_promoted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.tracking import children
    from pipelines.tracking.store.versions import RegistryError

    changed = load_model(base)
    with torch.no_grad():
        for weight in changed.server.tails.parameters():
            weight.add_(0.1)
    changed.train().eval()
    save_model(tmp_path / "child", changed, {"step": 2})

    class Version:
        def __init__(self, number: int, **tags: str) -> None:
            self.name, self.version = "mantis", number
            self.tags = {f"mantis.{name}": tag for name, tag in tags.items()}

    parent, child = Version(1, model_id="aa"), Version(2, model_id="bb", parent="aa")
    folders = {"models:/mantis/1": base, "models:/mantis/2": tmp_path / "child"}
    monkeypatch.setattr(children, "codec_versions", lambda client: [(parent, []), (child, [])])
    monkeypatch.setattr(children, "resolve_model", lambda name, uri: folders[name])
    nobody: Any = None
    with pytest.raises(RegistryError, match=r"models:/mantis/2 was made of models:/mantis/1"):
        children.check_child(nobody, "", child)  # type: ignore[arg-type]
    folders["models:/mantis/2"] = base
    children.check_child(nobody, "", child)  # type: ignore[arg-type]
    children.check_child(nobody, "", Version(3, model_id="cc", parent="gone"))  # type: ignore[arg-type]
