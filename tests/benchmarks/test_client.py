"""benchmarks/client.py: every part is measured. The client of imagenet.yaml has a size to keep."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.client import disturb, drawn_image, main, measure, spec_of, untrained
from data_prep.tasks import resolve_tasks
from mantis_core.architecture import ModelConfig
from mantis_core.codec.checkpoint import load_client, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.folders import load_folder
from pipelines.settings.reading import load_settings
from pipelines.training.problem import tasks_of
from tests.mantis_core.conftest import make_config

FITTED_TABLES = 960_000  # bytes of imagenet.yaml's packed tables of fitted densities, rounded up


def test_the_parts_of_a_client_and_its_folder_are_measured(tmp_path):
    model: ModelConfig = make_config(neighbour_contexts=True, prior="primary")
    image = drawn_image((64, 64))
    save_model(tmp_path / "codec", untrained(model, 2, (64, 64), image, 2), {})
    found = measure(tmp_path / "codec", image, 1)
    for name in ("image_to_stream", "network", "coding", "mobilenet_v3_large", "jpeg", "webp"):
        assert found[name] > 0
    assert found["latent"] == "4x8x8"
    assert found["table_bytes"] > 0
    rest = found["folder_bytes"] - sum(found[f"{n}_bytes"] for n in ("network", "table", "config"))
    assert 0 < rest < 2000
    assert found["stream_bytes"] > 11
    assert found["tasks"] == 2


def test_a_trained_codec_is_measured_on_a_photograph(tmp_path, monkeypatch, capsys):
    size = (64, 64)
    codec = untrained(make_config(), 3, size, drawn_image(size), 1)
    save_model(tmp_path / "codec", codec, {})
    photograph = tmp_path / "photograph.png"
    Image.fromarray(np.zeros((80, 100, 3), np.uint8)).save(photograph)
    arguments = ["--model", str(tmp_path / "codec"), "--image", str(photograph), "--pairs", "1"]
    monkeypatch.setattr("sys.argv", ["client", *arguments, "--json"])
    main()
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == 3
    black = torch.zeros(1, 3, *size, dtype=torch.uint8)
    assert found["stream_bytes"] == len(codec.client_codec().encode(black)[0])


def test_a_model_without_a_photograph_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["client", "--model", "somewhere"])
    with pytest.raises(SystemExit):
        main()
    assert "--model and --image go together" in capsys.readouterr().err


def test_the_folder_of_the_client_of_the_imagenet_config_takes_2_3_megabytes_at_most(tmp_path):
    """With its 1,000 classes and 13 levels, and tables of the size that training gives them."""
    settings = load_settings("configs/imagenet.yaml")
    table = resolve_tasks(settings.tasks, settings.data)
    named = {"classes": table.classes, "class_names": table.class_names, "tasks": tasks_of(table)}
    rates = {"rates": settings.stage2.rate_weights, "stream_version": 2}
    spec = spec_of(settings.model, len(table.tasks), settings.data.size)
    spec = spec.model_copy(update={**named, **rates})
    torch.manual_seed(0)
    codec = Mantis(spec)
    disturb(codec.client)
    codec.finish()
    save_model(tmp_path / "whole", codec, {})
    save_half(tmp_path / "client", tmp_path / "whole", "client")
    tables = load_folder(tmp_path / "client")[0]["bottleneck.table_counts"].nbytes
    size = sum(path.stat().st_size for path in (tmp_path / "client").iterdir())
    assert size - tables + max(tables, FITTED_TABLES) <= 2_300_000
    loaded = load_client(tmp_path / "client").client.state_dict()
    for name, weight in codec.client.state_dict().items():
        assert torch.equal(loaded[name], weight), name
