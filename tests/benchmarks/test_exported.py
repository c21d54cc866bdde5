"""benchmarks/exported.py: what an exported client sends beside torch's, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.exported import CLIENTS, FIGURES, Asked, figures, main, same, share_right
from mantis_core.bitstream.task_field import TaskField
from mantis_core.bitstream.wire import CodedImage
from mantis_core.codec.checkpoint import load_client, save_model
from mantis_core.device import golden
from mantis_core.tasks import IGNORE
from pipelines.export import write
from pipelines.export.graphs import write_graphs
from tests.mantis_core.conftest import SIZE, make_config, make_problem, make_stage2

LEVELS = (0, 2)
CLASSES = 6


class Printed(NamedTuple):
    """What a run of the program has printed and written."""

    result: dict[str, Any]
    text: str
    rows: list[dict[str, str]]


def photographs(folder: Path, first: int) -> Path:
    """A folder with an image of each class, in folders by class."""
    for number in range(CLASSES):
        own = folder / f"c{number}"
        own.mkdir(parents=True)
        pixels = golden.procedural_image(first + number, (SIZE, SIZE)).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(own / "image.png")
    return folder


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["exported", *map(str, words)])
        return main()


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 take seconds."""
    monkeypatch.setattr("mantis_core.measure.bd_rate.REPLICATES", 50)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of several rates that is asked, with random weights."""
    torch.manual_seed(1)
    config = make_config(requests="asked", prior="request")
    codec = make_stage2(make_problem(), config, rate_weights=(1e-3, 4e-3)).student
    codec.client.encoder.to_latent.weight.data.mul_(8)
    codec.finish()
    data = {"sources": [{"kind": "image_folder", "path": "elsewhere"}], "image_size": SIZE}
    masks = {"masks": [""] * 3, "ignored": [[]] * 3}
    folder = tmp_path_factory.mktemp("asked") / "model"
    save_model(folder, codec, {"preparation": {"seed": 0, "data": data, **masks}})
    return folder


@pytest.fixture(scope="module")
def printed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Printed:
    """A run of the whole program. Its exports share their graphs, which take seconds to write."""
    folder, kept = tmp_path_factory.mktemp("run"), list[Path]()

    def once(codec: Any, *paths: Path) -> None:
        if not kept:
            write_graphs(codec, paths[0], paths[1])
            kept.extend(Path(shutil.copy(path, folder)) for path in paths)
        for own, path in zip(kept, paths, strict=True):
            shutil.copy(own, path)

    words = ["--data", photographs(folder / "val", 0), "--levels", "0,2"]
    words += ["--calibration", photographs(folder / "other", 4), "--rows", folder / "rows.csv"]
    out, text = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(text):
        patch.setattr(write, "write_graphs", once)
        assert run(model, *words) == 0
    with (folder / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Printed(json.loads(out.getvalue().splitlines()[-1]), text.getvalue(), rows)


def test_each_task_of_an_image_is_asked_for_at_each_level_of_each_client(printed: Printed) -> None:
    asked = Counter((row["task"], row["level"], row["client"]) for row in printed.rows)
    ways = {(task, str(n), own) for task in ("animals", "tools") for n in LEVELS for own in CLIENTS}
    assert set(asked) == ways
    assert len(printed.rows) == printed.result["requests"] * len(LEVELS) * len(CLIENTS)


def test_an_image_that_calibrates_is_not_measured(printed: Printed) -> None:
    assert printed.result["calibrated_by"] == CLASSES
    assert printed.result["images"] == CLASSES - 2  # the first two that calibrate are the last two


def test_streams_are_those_that_the_clients_send(model: Path, printed: Printed) -> None:
    client = load_client(model)
    images = [golden.procedural_image(number, (SIZE, SIZE)) for number in range(3)]
    stacked = torch.from_numpy(np.stack(images))
    for level in LEVELS:
        sent = sorted(len(data) for data in client.encode(stacked, "animals", level=level))
        session = client.open(request="animals")
        short = sorted(len(data) for data in session.encode(stacked, level=level))
        rows = [row for row in printed.rows if row["task"] == "animals"]
        own = [row for row in rows if (row["client"], row["level"]) == ("torch", str(level))]
        assert sorted(int(row["wire_bytes"]) for row in own) == sent
        assert sorted(int(row["session_bytes"]) for row in own) == short


def test_float32_sends_what_torch_sends_and_the_server_reads_all(printed: Printed) -> None:
    clients = printed.result["clients"]
    assert list(clients) == list(CLIENTS)
    for name, own in clients.items():
        assert own["read"] == 1
        assert own["bytes"] > 1000
        assert 0 <= own["right"] <= 1
        assert len(own["by_level"]) == len(LEVELS)
        assert (own["equal"] == 1) == (own["symbols"] == 0), name
    assert clients["torch"]["equal"] == 1
    assert clients["float32"]["equal"] >= golden.LEAST_SAME


def test_the_table_has_a_row_for_each_level_and_client(printed: Printed) -> None:
    lines = [line.replace("│", " ").split() for line in printed.text.splitlines()]
    shown = [tuple(cells[:2]) for cells in lines if len(cells) > 2 and cells[1] in CLIENTS]
    assert shown == [(level, client) for level in ("0", "2", "all") for client in CLIENTS]
    assert "BD-rate of int8 against float32, wire_bytes: the first curve has" in printed.text


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--levels", "0,9"], "level is 9: this model has levels 0 to"),
        (["--tasks", "cars"], "asked for; this model has animals, tools, kitchen"),
        ([], "no image is left to calibrate int8: give --calibration, or --no-int8"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_exported(
    words: list[str], why: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(model, "--data", photographs(tmp_path / "val", 0), *words)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def asked(image: int, sizes: list[float], right: float) -> Asked:
    """An image whose second and third client send `sizes` times as much as the first's 100 bytes.

    At four levels, each with half the bytes, and an accuracy of `right` less 0.2 a level.
    """
    values = np.zeros((len(FIGURES), 3, 4))
    levels = np.arange(4)
    values[0] = values[1] = np.outer(sizes, 100 / 2**levels)
    values[2:4], values[5] = 1, right - 0.2 * levels
    return Asked(image, "animals", values)


def test_a_bd_rate_is_the_bytes_more_at_equal_accuracy() -> None:
    found = [asked(image, [1.0, 1.0, 1.1], 0.9 + 0.01 * (image % 3)) for image in range(40)]
    result = figures(found, range(4))
    for size in ("wire_bytes", "session_bytes"):
        own = result["int8_against_float32"][size]
        assert own["low"] <= own["mean"] <= own["high"]
        assert own["mean"] == pytest.approx(10, abs=0.1)
    assert result["clients"]["int8"]["by_level"][1]["change"] == [0, 0]
    assert result["clients"]["int8"]["by_level"][1]["wire_bytes"] == pytest.approx(55)


def test_answers_without_a_label_count_nowhere() -> None:
    unknown = asked(1, [1.0, 1.0, 1.0], np.nan)
    result = figures([unknown], range(4))
    assert result["clients"]["torch"]["right"] is None
    assert result["int8_against_float32"]["wire_bytes"] == {"refused": "no image has a label"}
    both = figures([unknown, asked(2, [1.0, 1.0, 1.0], 1.0)], range(4))
    assert both["clients"]["torch"]["by_level"][0]["right"] == 1


def test_of_a_mask_the_labelled_pixels_count() -> None:
    spec: Any = SimpleNamespace(task_names=("ground",), single_class=False)
    truth = {
        "labels": np.array([-1]),
        "segmentation/ground": np.array([[0, 1], [1, IGNORE]], np.uint8),
    }
    mask = np.array([[0, 1], [0, 0]], np.uint8)
    answer: Any = SimpleNamespace(labels={}, segmentation={"ground": mask})
    assert share_right(spec, answer, truth, "ground") == pytest.approx(2 / 3)
    assert share_right(spec, None, truth, "ground") == 0


def test_without_a_request_the_class_counts_where_an_image_has_one() -> None:
    truth = {"labels": np.array([1, -1]), "class_label": np.array(4)}
    answer: Any = SimpleNamespace(labels={"animals": 0}, class_index=4)
    spec: Any = SimpleNamespace(task_names=("animals", "tools"), single_class=True)
    assert share_right(spec, answer, truth, None) == 1
    spec.single_class = False
    assert share_right(spec, answer, truth, None) == 0
    assert share_right(spec, None, truth, "animals") == 0
    assert np.isnan(share_right(spec, answer, truth, "tools"))


def test_a_stream_is_read_if_tasks_and_symbols_are_those_that_were_coded() -> None:
    field, symbols = TaskField((True, False), 0, None), np.zeros((1, 2, 2), np.int32)
    coded = CodedImage(field, symbols)
    assert same(CodedImage(field, symbols.copy()), coded)
    assert not same(CodedImage(field, symbols + 1), coded)
    assert not same(CodedImage(TaskField((False, True), 1, None), symbols), coded)
    assert not same(CodedImage(field, symbols, rate_level=1), coded)
