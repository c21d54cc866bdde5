"""Exported clients: in onnxruntime they send what they send in torch, and a server reads it."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mantis_core.bitstream.wire import Packed
from mantis_core.device import export, golden
from mantis_core.errors import BudgetError, ModelError
from mantis_core.networks.conditioning import shares_of
from mantis_lite import LiteClient, open_export
from pipelines.export import write
from pipelines.export.server import ABOUT, GRAPH, export_server
from pipelines.export.write import export_client
from tests.mantis_core.narrow_resnet import NAME
from tests.pipelines.export.codecs import KINDS, codec_of, copied_graphs
from tests.root import ROOT

Images = NDArray[np.uint8]


class Exported:
    """A codec and what was exported of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.codec, self.folder = kind, codec_of(kind, NAME), folder
        self.torch = self.codec.client_codec()
        self.report = export_client(self.torch, folder)
        self.lite = open_export(folder)
        self.names = self.codec.spec.task_names


@pytest.fixture(scope="module")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The export of a kind, which takes seconds and is made once."""
    folder = tmp_path_factory.mktemp("export")
    return cache(lambda kind: Exported(kind, folder / kind))


@pytest.fixture(scope="module", params=sorted(KINDS))
def exported(request: pytest.FixtureRequest, export_of: Callable[[str], Exported]) -> Exported:
    return export_of(request.param)


@pytest.fixture(scope="module")
def asked(export_of: Callable[[str], Exported]) -> Exported:
    return export_of("asked")


def pictures(exported: Exported, count: int = 4) -> Images:
    size = exported.codec.spec.image_size
    return np.stack([golden.procedural_image(500 + number, size) for number in range(count)])


def tensor(images: Images) -> torch.Tensor:
    return torch.from_numpy(images.copy())


def ways(exported: Exported) -> list[dict[str, Any]]:
    """Every kind of call that this client allows."""
    facts = exported.lite.facts
    found: list[dict[str, Any]] = []
    if facts.requests != "asked":
        found.append({"tasks": None})
    if facts.requests != "detect":
        found += [{"tasks": exported.names[0]}, {"tasks": list(exported.names[:2])}]
    if facts.rate_levels > 1:
        found += [{**way, "level": 3} for way in list(found)]
        found.append({**found[0], "max_bytes": 40})
    if facts.labels:
        found.append({**found[0], "exit_confidence": 0.4})
        found.append({**found[0], "exit_confidence": 0.0})
    return found


def test_the_graphs_compute_what_torch_computes(exported: Exported) -> None:
    images = pictures(exported)
    level = exported.lite.facts.rate_levels - 1
    condition = np.zeros((1, len(exported.names)), np.float32)
    condition[0, 1] = 1.0
    for image in images:
        ours = exported.lite.network.see(image[None])
        theirs = exported.torch.network.see(tensor(image[None]))
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)
        assert (ours.classes is None) == (theirs.classes is None)
        if ours.classes is not None:
            np.testing.assert_allclose(ours.classes, theirs.classes, atol=1e-5)
        mine = exported.lite.network.code(ours.features, [0], condition, level)
        known = exported.torch.network.code(theirs.features, [0], condition, level)
        assert np.abs(known.latent).max() > 0.5
        np.testing.assert_allclose(mine.latent, known.latent, atol=2e-3)
        assert (mine.answers is None) == (known.answers is None)
        if mine.answers is not None:
            np.testing.assert_allclose(mine.answers, known.answers, atol=1e-4)


def test_its_streams_are_those_of_torch_and_the_server_reads_them(exported: Exported) -> None:
    images = pictures(exported)
    same = total = 0
    for way in ways(exported):
        try:
            known = exported.torch.encode(tensor(images), **way)
        except BudgetError:
            with pytest.raises(BudgetError):
                exported.lite.encode(images, **way)
            continue
        sent = exported.lite.encode(images, **way)
        same += sum(mine == theirs for mine, theirs in zip(sent, known, strict=True))
        total += len(sent)
        answers = exported.codec.decode(sent)
        assert len(answers) == len(images)
        assert all(answer.tasks for answer in answers)
    assert total >= 2 * len(images)
    assert same >= 0.9 * total


def test_its_sessions_are_read_by_the_servers(exported: Exported) -> None:
    images = pictures(exported)
    is_asked = exported.lite.facts.requests != "detect"
    request = exported.names[0] if is_asked else None
    client = exported.lite.open(request=request)
    server = exported.codec.server_codec().open(client.hello, request=request)
    messages = client.encode(images)
    assert [answer.wire_bytes for answer in server.decode(messages)] == list(map(len, messages))
    if not is_asked:
        return
    client.request = server.request = [exported.names[1]]
    for answer in server.decode(client.encode(images)):
        assert answer.tasks == (exported.names[1],)


def test_it_reads_what_it_wrote(exported: Exported) -> None:
    images = pictures(exported, 1)
    tasks = None if exported.lite.facts.requests == "detect" else exported.names[:1]
    (seen,) = exported.lite.look(images, tasks)
    (stream,) = exported.lite.encode(images, tasks)
    (held,) = exported.lite.read(stream).images
    assert np.array_equal(held.map, seen.image.map)
    assert held.tasks == seen.image.tasks


def test_the_export_was_compared_and_its_golden_cases_hold(exported: Exported) -> None:
    assert exported.report.compared == 64
    assert exported.report.equal >= 0.9 * 64
    cases = golden.read_cases(exported.folder)
    assert len(cases) == golden.COUNT
    asked_for = {case.request for case in cases}
    requests = exported.lite.facts.requests
    assert (None in asked_for) == (requests != "asked")
    if requests != "detect":
        assert {(name,) for name in exported.names} <= asked_for
    assert {case.level for case in cases} == set(range(exported.lite.facts.rate_levels))
    found = golden.check(exported.lite, cases)
    assert found.cases == found.same == golden.COUNT


def test_the_manifest_is_what_was_written(exported: Exported) -> None:
    manifest = export.read_manifest(exported.folder)
    assert manifest == exported.lite.manifest
    assert manifest.facts == exported.codec.spec.facts
    assert manifest.stream == exported.torch.stream_spec
    assert manifest.files == export.hashes(exported.folder)
    written = json.loads((exported.folder / export.MANIFEST).read_text())
    assert written["stream"]["model_id"] == exported.torch.ids.stream.hex()
    sizes = {name: (exported.folder / name).stat().st_size for name in exported.report.files}
    assert sizes == exported.report.files
    tables = exported.lite.tables
    assert np.array_equal(tables.cdf, exported.torch.tables.cdf)


def test_a_symbol_that_codes_to_other_bytes_is_an_error(
    asked: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = golden.read_cases(asked.folder)
    longer = replace(cases[0], stream=cases[1].stream)
    assert golden.check(asked.lite, [longer]).same == 0  # coded exactly, of another image
    other = Packed(cases[1].stream, 0.0, 0)
    monkeypatch.setattr(golden, "write_stream", lambda *given: other)
    with pytest.raises(ModelError, match=r"golden case 0: .* coded to other bytes"):
        golden.check(asked.lite, cases[:1])


@pytest.mark.parametrize("name", export.CHECKED)
def test_a_damaged_file_is_named(name: str, asked: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(asked.folder, folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=f"{name} is not the file of this export"):
        open_export(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name} cannot be read"):
        open_export(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "has format 'mantis-export' version 2"),
        ({"format": "other"}, "has format 'other'"),
        ({"facts": {}}, "describes no client of this version"),
        ({"contexts": "many"}, "describes no client of this version"),
        ({"contexts": float("inf")}, "describes no client of this version"),
        ({"mask_threshold": float("nan")}, "threshold nan"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"prior": "mine"}, "prior is 'mine'"),
        ({"stream": {"model_id": "zz"}}, "describes no client of this version"),
    ],
)
def test_another_manifest_is_refused(
    change: dict[str, Any], said: str, asked: Exported, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(asked.folder, folder)
    path = folder / export.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=said):
        open_export(folder)
    for text in ("{", "[" * 100_000, " " * (export.MAX_JSON + 1)):
        path.write_text(text)
        with pytest.raises(ModelError, match="cannot be read"):
            open_export(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"has no manifest\.json"):
        open_export(folder)


def test_images_of_another_kind_are_refused(asked: Exported) -> None:
    height, width = asked.codec.spec.image_size
    wrong = np.zeros((1, 3, height, width + 1), np.uint8)
    with pytest.raises(ModelError, match=f"this export is of {height}x{width}"):
        asked.lite.encode(wrong, asked.names[0])
    for images in (wrong[0], wrong.astype(np.float32), torch.from_numpy(wrong), [wrong]):
        with pytest.raises(ModelError, match=r"allowed: .*uint8"):
            asked.lite.encode(images, asked.names[0])
    with pytest.raises(ModelError, match="its server asks for some"):
        asked.lite.encode(wrong)
    with pytest.raises(ModelError, match="threads is 0"):
        open_export(asked.folder, threads=0)


def test_int8_is_smaller_and_its_streams_decode(
    export_of: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_of("lite")
    codec, client = whole.codec, whole.torch
    size = codec.spec.image_size
    images = [golden.procedural_image(number, size) for number in range(8)]
    monkeypatch.setattr(write, "write_graphs", copied_graphs(whole.folder))
    report = export_client(client, tmp_path / "int8", images=images, int8=True, calibrating=4)
    assert report.files[export.LOOK] < 0.7 * whole.report.files[export.LOOK]
    assert report.files[export.CODE] == whole.report.files[export.CODE]
    lite = open_export(tmp_path / "int8")
    assert lite.manifest.precision == "int8"
    names = codec.spec.task_names
    streams = lite.encode(np.stack(images), names[0], level=0)
    assert [answer.tasks for answer in codec.decode(streams)] == [(names[0],)] * 8
    near = lite.network.see(images[0][None]).features["stem"]
    far = client.network.see(tensor(images[0][None])).features.stem.numpy()
    error = np.abs(near - far).mean() / np.abs(far).mean()
    assert 0 < error < 0.2


def test_nothing_is_left_of_an_export_that_fails(
    asked: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(write, "write_graphs", broken)
    with pytest.raises(OSError, match="disk full"):
        export_client(asked.torch, tmp_path / "client")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_export_is_not_written_over(asked: Exported, tmp_path: Path) -> None:
    (tmp_path / export.MANIFEST).write_text("{}")  # as a folder of shards has one too
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"holds something else than an export: notes\.txt"):
        export_client(asked.torch, tmp_path)
    with pytest.raises(ModelError, match=r"holds something else than an export: manifest\.json"):
        export_server(asked.codec.server_codec(), tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        export_client(asked.torch, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_graphs_that_compute_otherwise_are_no_export(
    asked: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = asked.torch.encode

    def other(images: torch.Tensor, *given: Any, **more: Any) -> list[bytes]:
        return turned(images.flip(3), *given, **more)

    monkeypatch.setattr(write, "write_graphs", copied_graphs(asked.folder))
    monkeypatch.setattr(asked.torch, "encode", other)
    with pytest.raises(ModelError, match="compute otherwise"):
        export_client(asked.torch, tmp_path / "client")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["detecting", "asked"])
def test_the_servers_graph_gives_the_output_of_every_task(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    codec = codec_of(kind, NAME)
    server = codec.server_codec()
    files = export_server(server, tmp_path / "server")
    assert set(files) == {GRAPH, ABOUT}
    about = json.loads((tmp_path / "server" / ABOUT).read_text())
    assert [task["name"] for task in about["tasks"]] == list(codec.spec.task_names)
    symbols = torch.randint(-3, 4, tuple(about["symbols"])).float()
    level = torch.tensor([codec.spec.rate_levels - 1])
    given = {"symbols": symbols.numpy(), "level": level.numpy()}
    session = onnxruntime.InferenceSession(str(tmp_path / "server" / GRAPH))
    assert [each.name for each in session.get_inputs()] == about["inputs"]
    outputs = [task["output"] for task in about["tasks"]]
    found = session.run(outputs, {name: given[name] for name in about["inputs"]})
    with torch.no_grad():
        split, last = codec.server.features(symbols, shares_of(level, codec.spec.num_rates))
        for task, own in zip(codec.spec.tasks, found, strict=True):
            known = codec.server.answer(task, split, last, codec.spec.image_size)
            np.testing.assert_allclose(own, known.numpy(), atol=1e-3)


def test_the_pixels_of_golden_images_do_not_change() -> None:
    image = golden.procedural_image(7, (16, 24))
    assert image.shape == (3, 16, 24)
    assert image.dtype == np.uint8
    assert golden.procedural_image(7, (16, 24)).tobytes() == image.tobytes()
    assert golden.procedural_image(8, (16, 24)).tobytes() != image.tobytes()
    assert zlib.crc32(image.tobytes()) == 653185836


def test_threads_are_the_users(asked: Exported) -> None:
    client = open_export(asked.folder, threads=2)
    assert isinstance(client, LiteClient)
    options = client.network.look.get_session_options()  # type: ignore[attr-defined]
    assert options.intra_op_num_threads == 2


def test_a_graph_holds_no_path_of_the_machine_that_wrote_it(exported: Exported) -> None:
    for name in (export.LOOK, export.CODE):
        data = (exported.folder / name).read_bytes()
        assert str(ROOT).encode() not in data
        assert b"stack_trace" not in data
