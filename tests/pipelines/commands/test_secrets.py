"""Addresses with a key are refused by every command, and no message repeats the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.training.causes import MISTAKE

ADDRESS = "s3://name:hidden@bucket/folder"
OPTIONS = "s3://bucket/folder?endpoint_override=localhost:9000&token=hidden"
CONFIG = """
data: {sources: [{kind: image_folder}]}
tasks: [{name: letters, classes: [a, b]}]
teacher: {weights: train}
tracking: {enabled: false}
"""
FIELDS = (
    *("storage.root", "data.root", "data.sources.0.path", "data.sources.0.val_labels"),
    *("teacher.weights", "teacher.start"),
)


def refused(*arguments: str) -> str:
    """What a command says that ends as one with a mistake."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == MISTAKE, done.output
    assert "hidden" not in done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    return "tiny.yaml"


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_takes_an_address_with_a_key_or_options(config: str, field: str) -> None:
    for command in (["run"], ["run", "--dry-run"], ["tune", "--space", "film", "--trials", "1"]):
        said = refused(*command, "--config", config, f"{field}={ADDRESS}")
        assert "s3://bucket/folder is given with a user or a key" in said
        assert "AWS_ACCESS_KEY_ID" in said
        said = refused(*command, "--config", config, f"{field}={OPTIONS}")
        assert "AWS_ENDPOINT_URL" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "--root", ADDRESS),
        ("clean", "--root", ADDRESS),
        ("report", "--root", ADDRESS),
        ("predict", ADDRESS, "photo.jpg"),
        ("encode", ADDRESS, "photo.jpg", "-o", "out"),
        ("score", ADDRESS, "photos"),
    ],
)
def test_no_option_or_argument_takes_one(config: str, arguments: tuple[str, ...]) -> None:
    assert "AWS_ACCESS_KEY_ID" in refused(*arguments)


def test_shards_for_plain_processes_have_no_key(config: str, tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "1.png")
    assert "AWS_ACCESS_KEY_ID" in refused("run", "--plain", ADDRESS, "--config", config)


def test_a_model_in_a_bucket_is_refused_with_the_way_to_do_it(config: str) -> None:
    assert "s3://bucket/model is a URI: copy that folder" in refused(
        "predict", "s3://bucket/model", "photo.jpg"
    )
