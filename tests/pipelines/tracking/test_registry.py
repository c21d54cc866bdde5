"""A registered model is found by alias and loads in a fresh process without unpickling anything."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image

from mantis_core.architecture import (
    ConditioningConfig,
    DecoderConfig,
    DetectorConfig,
    EncoderConfig,
    ModelConfig,
    StemConfig,
)
from mantis_core.codec.checkpoint import load_client, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import model_spec
from mantis_core.config import TeacherConfig
from mantis_core.folders import load_folder
from mantis_core.tasks import Problem, TaskSpec
from mantis_core.training.teacher import new_teacher
from pipelines.stages import register as register_stage
from pipelines.tracking import lookup, registry
from pipelines.tracking import package as model_package
from pipelines.tracking.registry import (
    RegistryError,
    lineage,
    models,
    promote,
    register,
)
from pipelines.tracking.runs import Tracker, locate_tracking
from pipelines.tracking.store.versions import part_names, resolve_model

LOAD_IN_A_FRESH_PROCESS = """
import json, sys
import mlflow, pandas

using = False
found = []

def audit(event, arguments):
    if using and event == "pickle.find_class":
        found.append(arguments)

sys.addaudithook(audit)
mlflow.set_tracking_uri(sys.argv[1])
using = True
images = pandas.DataFrame({"image": [open(path, "rb").read() for path in sys.argv[3:]]})
if sys.argv[2] == "whole":
    model = mlflow.pyfunc.load_model("models:/mantis@candidate")
    answers = model.predict(images)
else:
    model = mlflow.pyfunc.load_model("models:/mantis-client@candidate")
    streams = model.predict(images)
    server = mlflow.pyfunc.load_model("models:/mantis-server@candidate")
    answers = server.predict(streams[["stream"]])
    assert list(streams["wire_bytes"]) == list(answers["wire_bytes"])
    assert server.predict(server.input_example)["tasks"][0]
assert model.predict(model.input_example)["wire_bytes"][0] > 0
sizes = list(answers["wire_bytes"])
assert list(model.predict(images, params={"level": 0})["wire_bytes"]) == sizes
assert list(model.predict(images, params={"max_bytes": 10_000})["wire_bytes"]) == sizes
few = model.predict(images, params={"max_bytes": 3})
assert all("max_bytes is 3" in error for error in few["error"])
using = False
code = sys.modules["mantis_core.codec.checkpoint"].__file__
print(json.dumps({"unpickled": found, "code": code, "rows": answers.to_dict("records")}))
"""

COMMANDS_UNDER_AUDIT = """
import json, sys

found = []
sys.addaudithook(
    lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None
)
from pipelines.__main__ import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["mantis", *command]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, command
print(json.dumps({"unpickled": found, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The checkpoint of a real codec of two tasks, untrained."""
    torch.manual_seed(0)
    tasks = (
        TaskSpec("animals", "classification", 2, (0, 1), ("cat", "dog")),
        TaskSpec("vehicles", "classification", 2, (2, 3), ("car", "bus")),
    )
    names = ("cat", "dog", "car", "bus")
    problem = Problem(tasks, names, names, True, (32, 32), 32)
    small = TeacherConfig(name="shufflenet_v2_x0_5", weights="train", split="stage2")
    teacher = new_teacher(small, problem)
    config = ModelConfig(
        stem=StemConfig(channels=(4, 4)),
        detector=DetectorConfig(channels=4, blocks=0, hidden=4),
        conditioning=ConditioningConfig(hidden=4),
        encoder=EncoderConfig(channels=4, blocks=0, latent_channels=4),
        decoder=DecoderConfig(channels=4, blocks=0, task_channels=4),
    )
    model = Mantis(model_spec(config, teacher, problem))
    model.finish()
    folder = tmp_path_factory.mktemp("codec") / "model"
    save_model(folder, model, {"step": 0})
    return folder


class Chain:
    """What a finished chain leaves: stage folders with results, and runs of them."""

    config_name = "quickstart"

    def __init__(self, tracker: Tracker, root: Path, checkpoint: Path, tag: str = "a", **figures):
        self.specs = {}
        self.tracker, self.root = tracker, root
        upstream = {
            "prepare": (),
            "stage2": ("prepare",),
            "evaluate": ("prepare", "stage2"),
            "register": ("stage2", "evaluate"),
        }
        self.run_id = tracker.open_pipeline("quickstart", {"seed": 0}, f"plan-{tag}")
        for name, parents in upstream.items():
            folder = root / "stages" / f"{name}-{tag}"
            folder.mkdir(parents=True)
            spec = SimpleNamespace(
                name=name, key=f"{name}-{tag}", folder=str(folder), upstream=parents
            )
            self.specs[name] = spec
            run_id = tracker.open_stage(
                self.run_id,
                name,
                spec.key,
                {},
                folder=spec.folder,
                upstream_keys=[self.specs[parent].key for parent in parents],
            )
            tracker.finish(run_id, "FINISHED")
        model = Path(self.specs["stage2"].folder) / "model"
        shutil.copytree(checkpoint, model, copy_function=os.link)
        (model / "training_state.safetensors").write_bytes(b"not to be shipped")
        self.write("stage2", "result.json", {"model_folder": "model"})
        metrics = {"val/top1": 0.75, "val/bpp": 0.5, "val/wire_bytes": 64.0, **figures}
        main = {"name": "stage2", "kind": "mantis", "stage_key": f"stage2-{tag}"}
        self.evaluation = {
            "tasks": [{"name": "animals"}, {"name": "vehicles"}],
            "arms": [{**main, "rate_weight": 0.01, "metrics": metrics}],
        }
        self.write("evaluate", "evaluation.json", self.evaluation)

    def write(self, stage: str, name: str, content: dict) -> None:
        (Path(self.specs[stage].folder) / name).write_text(json.dumps(content))

    def register(self) -> dict:
        return register_stage.run(self.specs["register"], self)


@pytest.fixture
def chain(tracker, tmp_path, checkpoint) -> Chain:
    return Chain(tracker, tmp_path / "runs", checkpoint)


@pytest.fixture(scope="module")
def registered(tmp_path_factory, mlflow_template, checkpoint) -> Chain:
    """A chain whose codec is registered, which takes seconds; for tests that only look at it."""
    root = tmp_path_factory.mktemp("registered") / "runs"
    root.mkdir()
    shutil.copy(mlflow_template, root / "mlflow.db")
    chain = Chain(Tracker(locate_tracking(None, str(root)), "mantis"), root, checkpoint)
    assert chain.register() == {"model": "models:/mantis/1", "version": "1"}
    return chain


def image_file(path: Path, colour: str) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), colour).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize("parts", ["whole", "halves"])
def test_the_candidate_answers_in_a_fresh_process_and_nothing_is_unpickled(
    registered, tmp_path, parts
):
    images = [image_file(tmp_path / f"{name}.jpg", name) for name in ("red", "blue")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    python = [sys.executable, "-W", "ignore", "-c", LOAD_IN_A_FRESH_PROCESS]
    done = subprocess.run(
        [*python, registered.tracker.location.uri, parts, *map(str, images)],
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])

    assert loaded["unpickled"] == []
    assert "mlartifacts" in loaded["code"]
    assert len(loaded["rows"]) == 2
    for row in loaded["rows"]:
        answer = json.loads(row["answer"])
        assert row["wire_bytes"] == answer["wire_bytes"] > 0
        assert row["tasks"] == answer["tasks"]
        assert row["class_name"] in ("cat", "dog", "car", "bus")


def test_the_commands_from_image_to_answer_unpickle_nothing(registered, tmp_path):
    root, stream = str(registered.root), str(tmp_path / "out.mts")
    images = [str(image_file(tmp_path / f"{name}.jpg", name)) for name in ("red", "blue")]
    client, server = (f"models:/mantis-{half}@candidate" for half in ("client", "server"))
    commands = [
        ["encode", client, *images, "-o", stream, "--root", root],
        ["info", stream],
        ["decode", server, stream, "--json", "--root", root],
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS_UNDER_AUDIT, json.dumps(commands)],
        cwd=Path(registry.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *_, answers, seen = done.stdout.splitlines()
    (decoded,) = json.loads(answers)["streams"]
    assert len(decoded["images"]) == 2
    assert json.loads(seen) == {"unpickled": [], "torch": True}


def test_the_stored_model_holds_no_pickle_and_no_path_of_this_machine(registered):
    files = [f for f in (registered.root / "mlartifacts").rglob("*") if f.is_file()]
    assert "training_state.safetensors" not in {file.name for file in files}
    suffixes = {file.suffix for file in files}
    assert suffixes <= {"", ".py", ".safetensors", ".yaml", ".json", ".txt"}
    texts = [file for file in files if file.suffix != ".safetensors"]
    assert not [file for file in texts if str(registered.root.parent) in file.read_text()]
    assert not [
        file for file in texts if str(Path(model_package.__file__).parent) in file.read_text()
    ]
    models = [yaml.safe_load(file.read_text()) for file in files if file.name == "MLmodel"]
    assert {model["flavors"]["python_function"]["model_code_path"] for model in models} == {
        "whole_model.py",
        "client_model.py",
        "server_model.py",
    }


def test_a_version_is_tagged_with_its_figures_and_sources(registered, checkpoint):
    [version] = models(registered.tracker)
    assert version["aliases"] == ["candidate"]
    assert (version["top1"], version["bpp"], version["wire_bytes"]) == (0.75, 0.5, 64.0)
    assert version["rate_weight"] == 0.01
    assert version["config"] == "quickstart"
    assert version["tasks"] == "animals, vehicles"
    assert (version["stage_key"], version["data_key"]) == ("stage2-a", "prepare-a")
    assert version["run_id"] == lookup.stage_run_id(registered.tracker, "stage2-a")
    described = load_client(checkpoint).describe()
    assert version["client_bytes"] == described["client_bytes"] > 0
    assert version["client_macs"] == described["client_macs"] > 0
    assert version["model_id"] == load_client(checkpoint).ids.model.hex()


def test_the_same_weights_are_registered_once_and_the_figures_follow(chain):
    first = chain.register()
    arm = {"kind": "mantis", "stage_key": "stage2-a", "rate_weight": 0.01}
    evaluation = {"tasks": [], "arms": [{**arm, "metrics": {"val/top1": 0.8}}]}
    chain.write("evaluate", "evaluation.json", evaluation)
    assert register(chain.tracker, "latest") == first
    [version] = models(chain.tracker)
    assert version["top1"] == 0.8


def test_candidate_moves_to_new_weights_and_champion_only_when_promoted(
    chain, tracker, tmp_path, checkpoint
):
    chain.register()
    promote(tracker, "1")
    better = Chain(tracker, tmp_path / "runs", checkpoint, "b", **{"val/top1": 0.9, "val/bpp": 0.9})
    better.register()
    assert {v["version"]: v["aliases"] for v in models(tracker)} == {
        "2": ["candidate"],
        "1": ["champion"],
    }
    assert [v["version"] for v in models(tracker, max_bpp=0.6)] == ["1"]
    assert [v["version"] for v in models(tracker, min_top1=0.8)] == ["2"]
    assert models(tracker, max_bpp=0.6, min_top1=0.8) == []
    assert promote(tracker, "2")["aliases"] == ["candidate", "champion"]
    for name in part_names("mantis").values():
        for alias in ("candidate", "champion"):
            found = tracker.client.get_model_version_by_alias(name, alias)
            assert str(found.version) == "2"


def test_a_half_that_was_lost_is_registered_again_beside_the_same_whole(chain, tracker):
    first = chain.register()
    tracker.client.delete_registered_model("mantis-server")
    assert chain.register() == first
    found = tracker.client.get_model_version_by_alias("mantis-server", "candidate")
    assert found.tags["mantis.stage_key"] == "stage2-a"
    assert len(tracker.client.search_model_versions("name = 'mantis-client'")) == 1


def test_a_model_is_resolved_to_its_checkpoint_folder(registered, checkpoint):
    for model in ("models:/mantis@candidate", "models:/mantis/1", str(checkpoint)):
        folder = resolve_model(model, registered.tracker.location.uri)
        weights = (folder / "weights.safetensors").read_bytes()
        assert weights == (checkpoint / "weights.safetensors").read_bytes()


def test_each_half_is_a_model_of_its_own_without_the_others_weights(registered):
    for half, other in (("client", "server."), ("server", "client.")):
        folder = resolve_model(f"models:/mantis-{half}@candidate", registered.tracker.location.uri)
        tensors, _, meta = load_folder(folder)
        assert meta["half"] == half
        assert any(name.startswith(f"{half}.") for name in tensors)
        assert not any(name.startswith(other) for name in tensors)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/mantis@champion", "mantis models"),
        ("models:/mantis/7", "mantis models"),
        ("models:/other/1", "no model models:/other/1"),
        ("models:/mantis/latest", "is not the name of a model"),
        ("models:/mantis/../../etc", "is not the name of a model"),
        ("no/such/folder", "weights.safetensors"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_message(tracker, model, message):
    with pytest.raises(RegistryError, match=message):
        resolve_model(model, tracker.location.uri)


def test_promoting_an_unknown_version_is_one_clear_message(tracker):
    with pytest.raises(RegistryError, match="no model models:/mantis/3"):
        promote(tracker, "3")


def test_an_unfinished_run_is_not_registered(tracker):
    tracker.open_pipeline("quickstart", {}, "plan")
    with pytest.raises(RegistryError, match="no finished evaluate and no stage2"):
        register(tracker, "latest")


def test_lineage_names_every_stage_its_ancestors_and_the_models_made(registered):
    found = lineage(registered.tracker, registered.run_id)
    assert [stage["name"] for stage in found["stages"]] == [
        "prepare",
        "stage2",
        "evaluate",
        "register",
    ]
    assert found["stages"][2]["upstream_keys"] == ("prepare-a", "stage2-a")
    assert [model["model"] for model in found["models"]] == ["models:/mantis/1"]
    assert found["versions"]["torch"]
    json.dumps(found)


def test_a_store_that_fails_leaves_the_trained_model_and_says_so(chain, monkeypatch):
    def fail(*args, **kwargs):
        raise MlflowException("disk full")

    monkeypatch.setattr(model_package, "save_model", fail)
    with pytest.raises(RegistryError, match=r"disk full.*stage2-a/model"):
        chain.register()
