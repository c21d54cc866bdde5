"""How a codec grows: a row for each number of tasks, and no silent change of an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import adding
from mantis_core.codec.mantis import Mantis
from mantis_core.errors import ModelError
from tests.mantis_core.narrow_resnet import NAME
from tests.pipelines.export.codecs import codec_of


def test_only_the_server_grows() -> None:
    rows = adding.grown(codec_of("asked", NAME), 2, 3, 2)
    assert [row["added"] for row in rows] == [0, 1, 2]
    client = [row["client_bytes"] for row in rows]
    server = [row["server_bytes"] for row in rows]
    assert max(client) - min(client) < 1000  # the config names the tasks
    assert server[0] < server[1] < server[2]
    assert all(row["decode_ms"] > 0 for row in rows)


def test_a_changed_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adding.with_tasks

    def spoiled(codec: Mantis, added: Any) -> Mantis:
        made = real(codec, added)
        with torch.no_grad():
            for weight in made.server.tails.parameters():
                weight.add_(0.1)
        return made

    monkeypatch.setattr(adding, "with_tasks", spoiled)
    with pytest.raises(ModelError, match="have changed"):
        adding.grown(codec_of("asked", NAME), 1, 3, 2)
