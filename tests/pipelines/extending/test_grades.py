"""Extensions of a codec from the command line and in a service; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mantis_core.codec.adding import check_same_codec, with_tasks
from mantis_core.codec.checkpoint import load_client, load_model, save_model
from mantis_core.codec.spec import AddedTask
from mantis_core.device import golden
from mantis_core.patch import apply_patch, write_patch
from pipelines.__main__ import app
from pipelines.serving.app import Desk
from pipelines.serving.camera import Frame, Link, Wanted, shots
from pipelines.serving.catalog import Catalog, entry_of
from pipelines.tracking.runs import Tracker
from pipelines.tracking.store.versions import PATCH, resolve_model
from tests.mantis_core.codec.test_adding import GRASS, PLACES, images
from tests.mantis_core.codec.test_extensions import CARS, extended
from tests.pipelines.experiment import last_json
from tests.pipelines.experiment import mantis as run_mantis
from tests.pipelines.export.codecs import codec_of
from tests.pipelines.extending.test_add_task import CONFIG
from tests.pipelines.serving.conftest import served
from tests.pipelines.tracking.test_registry import Chain


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A codec, that with an extension, and that with another one and a task of the server."""
    top = tmp_path_factory.mktemp("models")
    base = codec_of("asked")
    row = extended(base, PLACES.task)
    grass = AddedTask(task=GRASS.task, through=base.spec.task_names)
    both = extended(with_tasks(row, [grass]), CARS, rank=1)
    made = {"base": base, "row": row, "both": both}
    for name, codec in made.items():
        save_model(top / name, codec, {"step": 1})
    return {name: top / name for name in made}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        pixels = golden.procedural_image(number, (40, 40)).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def mantis(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.stdout if not code else " ".join(done.output.split())


def test_streams_of_an_extension_are_encoded_shown_and_decoded(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    for task in ("animals", "places"):
        mantis("encode", folders["row"], photos / "0.png", "-o", tmp_path / task, "--task", task)
    ids = {
        task: json.loads(mantis("info", tmp_path / task / "0.mts", "--json"))["stream_id"]
        for task in ("animals", "places")
    }
    meta = json.loads((folders["row"] / "meta.json").read_text())
    assert ids == {"animals": meta["stream_id"], "places": meta["extension_ids"][0]}
    mantis("decode", folders["row"], tmp_path, "-o", tmp_path / "answers")
    table = (tmp_path / "answers" / "answers.csv").read_text()
    assert "places" in table.splitlines()[0]
    found = mantis("decode", folders["base"], tmp_path / "places", code=2)
    assert f"was made by model {ids['places']}" in found
    said = mantis(
        *("encode", folders["row"], photos, "-o", tmp_path / "x.mts"),
        *("--task", "places", "--task", "animals"),
        code=2,
    )
    assert "sent in separate streams: ask once for each of these groups: animals; places" in said
    together = ("-o", tmp_path / "two.mts", "--task", "cars", "--level", "4")
    mantis("encode", folders["both"], photos, *together)
    rows = json.loads(mantis("decode", folders["both"], tmp_path / "two.mts", "--json"))
    assert [image["tasks"] for image in rows["streams"][0]["images"]] == [["cars"]] * 2
    told = json.loads(mantis("predict", folders["both"], photos, "--task", "cars", "--json"))
    assert all(image["tasks"] == ["cars"] for image in told["images"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extend.rank=2"], "extend.rank is for the grade adapter, and extend.grade is server"),
        (["--grade", "row", "extend.through=[cars]"], "extend.through names cars, and the client"),
        (["--grade", "row", "extend.compile=on"], "extend.compile is for the grade server: row is"),
        (["--grade", "adapter"], "more than 2% of the client's"),
    ],
)
def test_what_a_grade_cannot_do_is_said_before_anything_runs(
    folders: dict[str, Path], tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "more.yaml").write_text(CONFIG)
    given = ["add-task", folders["base"], "--config", tmp_path / "more.yaml", *words]
    assert said in mantis(*given, "--dry-run", code=2)


def test_a_service_answers_clients_of_before_and_of_now(
    folders: dict[str, Path], photos: Path
) -> None:
    desks: list[Desk] = []
    frames = [Frame(str(n), (photos / f"{n % 2}.png").read_bytes) for n in range(4)]
    before, now = load_client(folders["base"]), load_client(folders["both"])
    with served([folders["both"]], desks=desks) as url, Link(url) as link:
        for client, task in ((before, "animals"), (now, "tools"), (now, "places"), (now, "cars")):
            (stream,) = client.encode(images(client, 1), task)  # type: ignore[arg-type]
            status, content = link.ask("POST", "/v1/answers", stream)
            assert status == 200
            assert content["answers"][0]["tasks"] == [task]
        taken = shots(now, link, frames, Wanted(("animals",)))
        assert next(taken).tasks == ("animals",)
        body = json.dumps({"tasks": ["places"]}).encode()
        assert link.ask("PUT", "/v1/request", body)[1] == {"request": ["places"]}
        rest = list(taken)
        assert [shot.tasks for shot in rest] == [("animals",), ("places",), ("places",)]
        assert rest[-1].answers[0]["tasks"] == ["places"]
        body = json.dumps({"tasks": ["places", "cars"]}).encode()
        status, content = link.ask("PUT", "/v1/request", body)
        assert (status, content["reason"]) == (422, "request")
        assert "sent in separate streams" in content["error"]
        body = json.dumps({"tasks": ["grass"]}).encode()
        assert link.ask("PUT", "/v1/request", body)[1]["request"] == list(now.facts.tasks)
    with served([folders["base"]]) as url, Link(url) as link:
        (stream,) = now.encode(images(now, 1), "places")  # type: ignore[arg-type]
        status, content = link.ask("POST", "/v1/answers", stream)
        assert (status, content["reason"]) == (404, "another_model")
        assert "give it the version of the model that this client has" in content["error"]


def test_a_catalog_keeps_what_reads_streams_that_the_newest_does_not(
    folders: dict[str, Path],
) -> None:
    entries: dict[str, Any] = {name: entry_of(folder, name) for name, folder in folders.items()}
    names = [
        [
            each.source
            for each in Catalog().with_newer([entries[one]]).with_newer([entries[two]]).entries
        ]
        for one, two in (("base", "both"), ("both", "row"), ("row", "both"))
    ]
    assert names == [["both"], ["row", "both"], ["both"]]
    both = entries["both"]
    assert both.every_task == [*both.tasks, "grass", "places", "cars"]
    assert Catalog((both,)).find(next(iter(entries["row"].extensions))) is both


def test_a_registered_version_patches_registered_clients(
    folders: dict[str, Path], tracker: Tracker, tmp_path: Path
) -> None:
    whole = tmp_path / "made" / "model"
    save_model(whole, load_model(folders["row"]), {"step": 1})
    write_patch(whole / PATCH, load_model(whole))
    Chain(tracker, tmp_path / "runs", whole).register()  # type: ignore[no-untyped-call]
    found = resolve_model("models:/mantis@candidate", tracker.location.uri)
    assert resolve_model("models:/mantis-client@candidate", tracker.location.uri) != found
    apply_patch(folders["base"], found, tmp_path / "client")
    picture = images(load_model(whole), 1)
    known = load_client(whole).encode(picture, "places")
    assert load_client(tmp_path / "client").encode(picture, "places") == known


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_row_is_trained_measured_registered_and_promoted(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "more.yaml").write_text(CONFIG)
    words = ["add-task", str(folders["row"]), "--config", str(tmp_path / "more.yaml"), "--json"]
    result = last_json(run_mantis(*words, "--grade", "row", folder=tmp_path))
    assert [stage["status"] for stage in result["stages"].values()] == ["ran"] * 4
    assert 0 <= result["metrics"]["val/task/outline/top1"] <= 1
    assert 0 <= result["metrics"]["val/task/regions/miou"] <= 1
    (folder,) = (tmp_path / "runs/stages").glob("extend-*/checkpoint")
    before, after = load_model(folders["row"]), load_model(folder)
    check_same_codec(before, after, 2)
    assert after.stream_ids()[:2] == before.stream_ids()
    assert after.spec.families[2] == ("outline", "regions")
    (stage,) = (tmp_path / "runs/stages").glob("evaluate-*")
    arms = json.loads((stage / "evaluation.json").read_text())["arms"]
    assert [arm["level"] for arm in arms] == [0, 4]
    assert last_json(run_mantis("promote", "1", "--json", folder=tmp_path))["aliases"]
    run_mantis("patch", str(folders["row"]), "models:/mantis/1", "-o", "client", folder=tmp_path)
    picture = images(before, 1)
    known = after.encode(picture, ["outline", "regions"])
    assert load_client(tmp_path / "client").encode(picture, ["outline", "regions"]) == known
