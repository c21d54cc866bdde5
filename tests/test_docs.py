"""The documents: their examples run, their commands parse, their links and names lead somewhere.

Python blocks of a page run in order in one namespace, in a folder with a small codec and
photographs. YAML blocks load as configs: on top of the quickstart, or of `<!-- docs: base=NAME -->`
before the block, unless they are whole. Commands are parsed, never run.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from pydantic import BaseModel
from typer.main import get_command

from docs import reference
from mantis_core.codec.checkpoint import load_model, save_model
from pipelines.__main__ import app
from pipelines.settings.reading import load_settings, with_overrides
from tests.mantis_core.conftest import make_codec, make_problem

ROOT = Path(__file__).resolve().parents[1]
WRITTEN_ELSEWHERE = {"decisions.md"}
PAGES = [
    ROOT / "README.md",
    *sorted(
        path
        for path in (ROOT / "docs").rglob("*.md")
        if path.name not in WRITTEN_ELSEWHERE and "reference" not in path.parts
    ),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINKING = [*NAMES, "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
BLOCK = re.compile(
    r"(?:^<!-- docs: (?P<mark>.*?) -->\n)?^```(?P<info>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
GENERATED = [ROOT / "docs" / path for path in ("log.md", *reference.pages())]
CHECKPOINT = "runs/stages/stage2-<key>/checkpoint"
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
OTHER_PROGRAMS = {".", "export", "kubectl", "mlflow", "ray"}
SECTION = "data|tasks|teacher|model|stage1|stage2|evaluate|tune|cluster|tracking|storage"
KEY = re.compile(rf"({SECTION})(\.\w+)+(?=$|[=:])")
PATH = re.compile(
    r"(mantis_core|data_prep|pipelines|tune_spaces|benchmarks|tests|configs|deploy|results)"
    r"/[\w./-]*"
)


class Block(NamedTuple):
    """A fenced block: its text, the mark before it and its line."""

    text: str
    mark: str
    line: int


def blocks(page: str, info: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found["text"], found["mark"] or "", text[: found.start()].count("\n"))
        for found in BLOCK.finditer(text)
        if found["info"] == info
    ]


def pages_with(info: str) -> list[str]:
    return [name for name in NAMES if blocks(name, info)]


def inline_code(page: str) -> list[str]:
    """Code spans of the running text, blocks left out."""
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


# ---- Python ----


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
    namespace: dict[str, Any] = {"__name__": "docs_example"}
    for block in blocks(page, "python"):
        code = compile("\n" * block.line + block.text, str(ROOT / page), "exec", dont_inherit=True)
        exec(code, namespace)
    CHECKS.get(page, lambda *_: None)(namespace, world)


def check_split(made: dict[str, Any], world: Path) -> None:
    """A fifth of the photographs lies below val, and none is lost."""
    assert len(list((world / "photos/val").glob("*/*.jpg"))) == 4
    assert len(list((world / "photos/train").glob("*/*.jpg"))) == 8


def check_codec(made: dict[str, Any], world: Path) -> None:
    """Each half that was written apart loads alone."""
    from mantis_core.codec.checkpoint import load_client, load_server

    client, server = load_client(world / "client"), load_server(world / "server")
    image = client.prepare_image((world / "photo.jpg").read_bytes())
    assert server.decode(client.encode(image[None]))[0].wire_bytes > 0


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
    "docs/guide/data.md": check_split,
    "docs/guide/codec.md": check_codec,
    "docs/guide/python.md": check_python,
    "docs/guide/extending.md": check_extending,
}


# ---- YAML ----


def write_configs(page: str, folder: Path) -> Iterator[Path]:
    """Each YAML block of a page as a config file, named as its first comment says."""
    for block in blocks(page, "yaml"):
        named = re.match(r"# (\w+\.yaml)\b", block.text)
        raw = yaml.safe_load(block.text)
        whole = "extends" in raw or {"data", "tasks"} <= set(raw)
        base = re.sub(r"^base=", "", block.mark) or "quickstart"
        (folder / f"{base}.yaml").write_bytes((ROOT / f"configs/{base}.yaml").read_bytes())
        path = folder / (named.group(1) if named else f"line_{block.line}.yaml")
        path.write_text(block.text if whole else f"extends: {base}.yaml\n{block.text}", "utf-8")
        yield path


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_every_config_of_a_page_loads(page: str, tmp_path: Path) -> None:
    for path in write_configs(page, tmp_path):
        assert load_settings(path).tasks


# ---- commands ----


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of each line of the page's bash blocks, comments and continuations resolved."""
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["ray", "job", "submit"]:
                words = words[words.index("--") + 1 :]
            if words:
                yield words


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of a `mantis` line; raises what the command line would."""
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return dict(command.make_context("mantis", words).params)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_every_command_line_of_a_page_parses(page: str, tmp_path: Path) -> None:
    list(write_configs("README.md", tmp_path))
    for words in command_lines(page):
        if words[0] == "mantis" or words[:3] == ["python", "-m", "pipelines"]:
            found = parse(words[1:] if words[0] == "mantis" else words[3:])
            check_overrides(found, tmp_path)
        elif words[:2] == ["python", "-m"]:
            check_program(words[2:])
        elif words[0] == "make":
            assert words[1] in TARGETS, words
        else:
            assert words[0] in OTHER_PROGRAMS, words


def check_overrides(found: dict[str, Any], folder: Path) -> None:
    """The overrides of a line fit the config it names."""
    if found.get("config") is None:
        return
    named = Path(found["config"])
    path = ROOT / named if named.parts[0] == "configs" else folder / named
    overrides = [word for word in found.get("overrides") or () if "=" in word]
    assert load_settings(path, overrides).tasks


def check_program(words: list[str]) -> None:
    """The program is there and its source names each option."""
    place = ROOT / words[0].replace(".", "/")
    sources = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{words[0]} has no {word}"


@pytest.mark.parametrize("page", NAMES)
def test_every_command_in_the_text_exists(page: str) -> None:
    known = {" ".join(words): command for words, command in reference.commands()}
    for span in inline_code(page):
        words = span.split()
        if words[0] == "mantis" and len(words) > 1:
            name = " ".join(words[:3]) if " ".join(words[:3]) in known else " ".join(words[:2])
            assert name in known, span
            options = {opt for each in known[name].params for opt in each.opts} | {"--help"}
            used = {word.strip("[]") for word in words if word.strip("[").startswith("--")}
            assert used <= options, span
        elif words[:2] == ["python", "-m"] and words[2] != "pipelines":
            check_program(words[2:])
        elif words[0] == "make" and len(words) > 1:
            assert words[1] in TARGETS, words


# ---- names ----


def keys_of(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a loaded config, written as the reference writes them."""
    for name in type(section).model_fields:
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from keys_of(value, f"{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for each in value:
                yield from keys_of(each, f"{key}[].")
        elif isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
            for each in value.values():
                yield from keys_of(each, f"{key}.<name>.")
        else:
            yield key


@pytest.mark.parametrize("config", ["quickstart", "tiny_imagenet", "imagenet", "camvid"])
def test_the_reference_holds_every_config_field(config: str) -> None:
    shown = set(reference.config_keys())
    wanted = set(keys_of(load_settings(ROOT / f"configs/{config}.yaml")))
    assert {key for key in wanted - shown if not key.endswith("presence")} == set()


def test_the_reference_holds_every_command_with_its_options_and_an_example() -> None:
    page = reference.commands_page()
    for words, command in reference.commands():
        name = " ".join(words)
        assert f"{'#' * len(words)} {name}\n" in page
        for each in command.params:
            if each.param_type_name == "option" and not each.hidden:
                assert f"`{each.opts[0]}`" in page, f"{name}: {each.opts[0]}"
        if not hasattr(command, "commands"):
            example = command.help.partition("Example: ")[2]
            assert example.startswith(f"{name} ") or example == name, f"{name} has no example"


@pytest.mark.parametrize("page", NAMES)
def test_every_config_field_in_the_text_exists(page: str) -> None:
    shown = set(reference.config_keys())
    parts = [re.sub(r"\[\]|\.<name>", "", key).split(".") for key in shown]
    known = {".".join(each[:depth]) for each in parts for depth in range(1, len(each) + 1)}
    for span in inline_code(page):
        found = KEY.match(span)
        if found and not span.endswith((".py", ".yaml", ".json", ".md")):
            assert found.group() in known, span


@pytest.mark.parametrize("page", NAMES)
def test_every_file_in_the_text_exists(page: str) -> None:
    for span in inline_code(page):
        if PATH.fullmatch(span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("page", LINKING)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            path = (ROOT / page).parent.joinpath(target.partition("#")[0]).resolve()
            assert path.exists() or path in GENERATED, target


def test_the_log_links_only_to_pages_of_the_site() -> None:
    text = "[a](../docs/results.md#x) [b](rate_accuracy.csv) [c](#d) ![e](f.png)"
    assert reference.log_page(text) == "[a](results.md#x) b [c](#d) ![e](f.png)"


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example/x.js">',
        '<img alt="" src="http://example/x.png">',
        '<link rel="stylesheet" href="https://fonts.example/css">',
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(tag: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    with pytest.raises(Exception, match="loads from another host"):
        reference.on_post_page(tag, page, None)
    assert reference.on_post_page('<a href="https://example">', page, None)
