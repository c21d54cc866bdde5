"""benchmarks/client.py: every part is measured. The client of imagenet.yaml is below a megabyte."""

import torch

from benchmarks.client import disturb, measure, spec_of
from data_prep.tasks import resolve_tasks
from mantis_core.codec.checkpoint import load_client, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.config import ModelConfig
from mantis_core.folders import load_folder
from pipelines.settings.reading import load_settings
from pipelines.training.problem import tasks_of
from tests.mantis_core.conftest import make_config

FITTED_TABLES = 215_000  # bytes of imagenet.yaml's packed tables of fitted densities, rounded up


def test_the_parts_of_a_client_and_its_folder_are_measured():
    model: ModelConfig = make_config(neighbour_contexts=True, prior="primary")
    found = measure(model, 2, (64, 64), 1, 2)
    for name in ("image_to_stream", "network", "coding", "mobilenet_v3_large", "jpeg", "webp"):
        assert found[name] > 0
    assert found["latent"] == "4x8x8"
    assert found["table_bytes"] > 0
    rest = found["folder_bytes"] - sum(found[f"{n}_bytes"] for n in ("network", "table", "config"))
    assert 0 < rest < 2000
    assert found["stream_bytes"] > 11


def test_the_folder_of_the_client_of_the_imagenet_config_takes_less_than_a_megabyte(tmp_path):
    """With its 484 classes, and tables of the size that training gives them."""
    settings = load_settings("configs/imagenet.yaml")
    table = resolve_tasks(settings.tasks, settings.data)
    named = {"classes": table.classes, "class_names": table.class_names, "tasks": tasks_of(table)}
    spec = spec_of(settings.model, len(table.tasks), settings.data.size).model_copy(update=named)
    torch.manual_seed(0)
    codec = Mantis(spec)
    disturb(codec.client)
    codec.finish()
    save_model(tmp_path / "whole", codec, {})
    save_half(tmp_path / "client", tmp_path / "whole", "client")
    tables = load_folder(tmp_path / "client")[0]["bottleneck.table_counts"].nbytes
    size = sum(path.stat().st_size for path in (tmp_path / "client").iterdir())
    assert size - tables + max(tables, FITTED_TABLES) <= 1_000_000
    loaded = load_client(tmp_path / "client").client.state_dict()
    for name, weight in codec.client.state_dict().items():
        assert torch.equal(loaded[name], weight), name
