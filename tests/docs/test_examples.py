"""The documents' examples: Python runs, configs load.

Python blocks of a page run in order in one namespace, in a folder with a small codec and
photographs. YAML blocks load as configs: on top of the quickstart, or of `<!-- docs: base=NAME -->`
before the block, unless they are whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from mantis_core.codec.adding import with_tasks
from mantis_core.codec.checkpoint import load_client, load_model, load_server, save_model
from mantis_core.codec.spec import AddedTask
from mantis_core.tasks import TaskSpec
from pipelines.export.write import export_client
from pipelines.settings.reading import load_settings, with_overrides
from tests.docs.pages import blocks, pages_with, write_configs
from tests.mantis_core.conftest import make_codec, make_problem
from tests.root import ROOT

CHECKPOINT = "runs/stages/stage2-<key>/checkpoint"
EXTENDED = "runs/stages/extend-<key>/checkpoint"
RED = AddedTask(task=TaskSpec("red", "classification", 2, labels=("disc", "ring")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small codec, untrained, whose first task is called `pets` as in the documents."""
    problem = make_problem()
    first, *others = problem.tasks
    tasks = (type(first)(**{**vars(first), "name": "pets"}), *others)
    torch.manual_seed(0)
    codec = make_codec(type(problem)(**{**vars(problem), "tasks": tasks}))
    codec.finish()
    folder = tmp_path_factory.mktemp("codec") / "checkpoint"
    save_model(folder, codec, {"step": 0})
    return folder


@pytest.fixture
def world(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a reader works: photographs, configs, the checkpoint of a run."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            picture(tmp_path / "photos" / name / f"{number}.jpg", number)
    picture(tmp_path / "photo.jpg", 9)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / CHECKPOINT).parent.mkdir(parents=True)
    (tmp_path / CHECKPOINT).symlink_to(checkpoint)
    save_model(tmp_path / EXTENDED, with_tasks(load_model(checkpoint), [RED]), {"step": 0})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path: Path, seed: int) -> None:
    pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.byte().numpy()).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())


class Registered:
    """A model as MLflow would load it, over the checkpoint of the reader's folder."""

    def __init__(self, uri: str) -> None:
        assert uri.startswith("models:/mantis")
        self.codec = load_model(CHECKPOINT)

    def predict(self, rows: pd.DataFrame) -> pd.DataFrame:
        images = [self.codec.prepare_image(data) for data in rows["image"]]
        streams = self.codec.encode(torch.stack(images))
        return pd.DataFrame([answer.to_row() for answer in self.codec.decode(streams)])


@pytest.mark.parametrize("page", pages_with("python"))
def test_every_python_example_of_a_page_runs(
    page: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import mlflow.pyfunc  # the module itself, not what stands for it until it is used

    monkeypatch.setattr(mlflow.pyfunc, "load_model", Registered)
    monkeypatch.setattr(mlflow, "set_tracking_uri", lambda uri: None)
    if "open_export(" in "".join(block.text for block in blocks(page, "python")):
        export_client(load_client(CHECKPOINT), world / "camera")
    namespace: dict[str, Any] = {"__name__": "docs_example"}
    for block in blocks(page, "python"):
        code = compile("\n" * block.line + block.text, str(ROOT / page), "exec", dont_inherit=True)
        exec(code, namespace)
    CHECKS.get(page, lambda *_: None)(namespace, world)


def check_codec(made: dict[str, Any], world: Path) -> None:
    """Each half that was written apart loads alone."""
    client, server = load_client(world / "client"), load_server(world / "server")
    image = client.prepare_image((world / "photo.jpg").read_bytes())
    assert server.decode(client.encode(image[None]))[0].wire_bytes > 0


def check_device(made: dict[str, Any], world: Path) -> None:
    """The stream and the message of the page are read by the server."""
    server = load_server(world / CHECKPOINT)
    (answer,) = server.decode([made["stream"]])
    (reply,) = server.open(made["session"].hello, request="pets").decode([made["message"]])
    assert answer.tasks == reply.tasks == ("pets",)
    assert reply.wire_bytes < answer.wire_bytes


def check_python(made: dict[str, Any], world: Path) -> None:
    assert {"tasks", "wire_bytes", "class_name", "class_index", "answer"} <= set(made["rows"])
    assert made["longer"].stage1.epochs == 8


def check_extending(made: dict[str, Any], world: Path) -> None:
    """Each example does what the contract tests ask of its kind."""
    check_source(made["CsvFiles"], world)
    check_conditioning(made["ScaleOnly"])
    logits = torch.randn(4, 3, requires_grad=True)
    loss = made["FewTasks"](())({"outputs": {"task_logits": logits}}, {}, None)
    loss.backward()
    assert logits.grad is not None
    assert 0 < float(loss.detach()) < 3
    quickstart = load_settings(ROOT / "configs/quickstart.yaml")
    for key, field in made["SPACE"].items():
        value = getattr(field.domain, "low", None) or field.domain.values[0]
        with_overrides(quickstart, [f"{key}={value}"])
    with_overrides(quickstart, made["NOISE"].overrides)
    assert (made["COUNT"].name, made["COUNT"].run) == ("count", made["run"])


def check_source(kind: Callable[..., Any], world: Path) -> None:
    from data_prep.errors import DataError

    table = "file,class\nphotos/cat/0.jpg,cat\nphotos/dog/0.jpg,dog\ngone.jpg,dog\n"
    (world / "train.csv").write_text(table, encoding="utf-8-sig")
    source = kind()
    listing = source.listing(str(world), "train")
    assert listing["class_ids"].to_pylist() == [["cat"], ["dog"], ["dog"]]
    first, second, gone = source.read(str(world), listing)
    assert first.image == (world / "photos/cat/0.jpg").read_bytes()
    assert (second.error, bool(gone.error), gone.image) == ("", True, b"")
    before = list(source.state(str(world), "train"))
    (world / "train.csv").write_text(table.replace("gone", "lost"), encoding="utf-8")
    assert before != list(source.state(str(world), "train"))
    with pytest.raises(DataError, match="val table"):
        source.listing(str(world), "val")
    (world / "val.csv").write_text("name,label\n", encoding="utf-8")
    with pytest.raises(DataError, match="columns"):
        source.listing(str(world), "val")


def check_conditioning(kind: Callable[..., Any]) -> None:
    from mantis_core.networks.blocks import modulate
    from mantis_core.networks.conditioning import Layers

    module = kind(3, Layers((4, 6), (1, 2), 9), hidden=8)
    modulation = module(torch.rand(2, 3), torch.rand(2, 9, 4, 4))
    features = [torch.randn(2, channels, 4, 4) for channels in (4, 6)]
    for x, gamma_beta in zip(features, modulation, strict=True):
        assert torch.equal(modulate(x, gamma_beta), x)
    sum(gamma.sum() for gamma, _ in modulation).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


CHECKS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "docs/guide/codec.md": check_codec,
    "docs/guide/device.md": check_device,
    "docs/guide/python.md": check_python,
    "docs/guide/extending.md": check_extending,
}


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_every_config_of_a_page_loads(page: str, tmp_path: Path) -> None:
    for path in write_configs(page, tmp_path):
        assert load_settings(path).tasks
