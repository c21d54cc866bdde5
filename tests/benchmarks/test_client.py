"""benchmarks/client.py: every part is measured, and the folder holds network and tables."""

from benchmarks.client import measure
from mantis_core.config import ModelConfig
from tests.mantis_core.conftest import make_config


def test_the_parts_of_a_client_and_its_folder_are_measured():
    model: ModelConfig = make_config(neighbour_contexts=True, prior="primary")
    found = measure(model, 2, (64, 64), 1, 2)
    for name in ("image_to_stream", "network", "coding", "mobilenet_v3_large", "jpeg", "webp"):
        assert found[name] > 0
    assert found["latent"] == "4x8x8"
    assert found["table_bytes"] > 0
    assert found["folder_bytes"] > found["network_bytes"] + found["table_bytes"]
    assert found["stream_bytes"] > 11
