"""`mantis-lite`, alone in an environment without torch, and what it says of mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mantis_core.device import export as export_files
from mantis_core.device import golden
from mantis_lite import open_export
from mantis_lite.__main__ import main
from pipelines.export.write import export_client
from tests.mantis_core.conftest import make_codec, make_config, make_problem
from tests.root import ROOT


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported client of three tasks that detects or is asked."""
    folder = tmp_path_factory.mktemp("export") / "client"
    export_client(make_codec(make_problem(), make_config()).client_codec(), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, one of them in a folder below, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "more/c.webp")):
        pixels = golden.procedural_image(number, (40, 56)).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


Told = pytest.CaptureFixture[str]


def told(capsys: Told) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_folder_is_encoded_and_a_bad_file_is_named(
    export: Path, photos: Path, tmp_path: Path, capsys: Told
) -> None:
    out = tmp_path / "streams"
    assert main(["encode", str(export), str(photos), "-o", str(out), "--json"]) == 3
    found = told(capsys)
    names = {str(path.relative_to(out)) for path in out.rglob("*.mts")}
    assert names == {"a.mts", "b.mts", "more/c.mts"}
    assert [Path(own["file"]).stat().st_size for own in found["streams"]] == [
        own["wire_bytes"] for own in found["streams"]
    ]
    assert [Path(own["file"]).name for own in found["failures"]] == ["broken.jpg"]
    assert "no readable image" in found["failures"][0]["error"]
    client = open_export(export)
    image = client.prepare_image((photos / "a.png").read_bytes())
    assert client.encode(image[None]) == [(out / "a.mts").read_bytes()]


def test_info_says_what_streams_hold(
    export: Path, photos: Path, tmp_path: Path, capsys: Told
) -> None:
    out = tmp_path / "streams"
    asked = ["--task", "kitchen", "--task", "tools"]
    assert main(["encode", str(export), str(photos / "a.png"), "-o", str(out), *asked]) == 0
    assert "1 streams" in capsys.readouterr().out
    assert main(["info", str(export), str(out), "--json"]) == 0
    (image,) = told(capsys)["images"]
    assert image["tasks"] == ["tools", "kitchen"]
    assert image["wire_bytes"] == (out / "a.mts").stat().st_size
    assert image["answered"] is False
    assert image["non_zero"] <= image["symbols"] == 4 * 4 * 4
    (out / "a.mts").write_bytes((out / "a.mts").read_bytes()[:-1])
    assert main(["info", str(export), str(out)]) == 2
    assert "damaged or cut short" in capsys.readouterr().err


def test_check_codes_the_golden_cases(export: Path, tmp_path: Path, capsys: Told) -> None:
    assert main(["check", str(export), "--json"]) == 0
    found = told(capsys)
    assert (found["cases"], found["same"], found["right"]) == (100, 100, True)
    other = tmp_path / "other"
    shutil.copytree(export, other)
    cases = golden.read_cases(export)
    turned = [
        golden.Case(case.number, case.request, case.level, cases[i - 1].stream)
        for i, case in enumerate(cases)
    ]
    golden.write_cases(other, turned)
    assert main(["check", str(other)]) == 2
    assert "golden.json is not the file of this export" in capsys.readouterr().err
    export_files.write_manifest(
        other, replace(export_files.read_manifest(other), files=export_files.hashes(other))
    )
    assert main(["check", str(other)]) == 1
    assert "under 95% of the cases gave the stream" in capsys.readouterr().err


def test_an_image_that_takes_too_many_bytes_does_not_end_the_work(
    export: Path, photos: Path, tmp_path: Path, capsys: Told
) -> None:
    client = open_export(export)
    sizes = {}
    for name in ("a.png", "b.jpg"):
        image = client.prepare_image((photos / name).read_bytes())
        sizes[name] = len(client.encode(image[None])[0])
    assert len(set(sizes.values())) == 2
    given = [str(photos / name) for name in sorted(sizes, key=lambda name: -sizes[name])]
    most = ["--max-bytes", str(min(sizes.values())), "--json"]
    assert main(["encode", str(export), *given, "-o", str(tmp_path / "out"), *most]) == 3
    found = told(capsys)
    assert len(found["streams"]) == len(found["failures"]) == 1
    assert "max_bytes is" in found["failures"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["encode", "{export}", "{photos}/none.png", "-o", "{out}"], "no such file"),
        (["encode", "{export}", "{out}", "-o", "{out}"], "no image was found"),
        (["encode", "{photos}", "{photos}", "-o", "{out}"], "holds no exported client"),
        (["encode", "{export}", "{photos}/a.png", "-o", "{photos}/a.png"], "is a file"),
        (
            ["encode", "{export}", "{photos}/a.png", "-o", "{out}", "--task", "cars"],
            "this model has animals, tools, kitchen",
        ),
        (
            ["encode", "{export}", "{photos}/a.png", "-o", "{out}", "--level", "3"],
            "this model has one rate",
        ),
        (
            ["encode", "{export}", "{photos}/a.png", "-o", "{out}", "--max-bytes", "12"],
            "max_bytes is 12",
        ),
    ],
)
def test_a_mistake_gets_one_message(
    arguments: list[str], said: str, export: Path, photos: Path, tmp_path: Path, capsys: Told
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    given = [each.format(export=export, photos=photos, out=out) for each in arguments]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("error:") == 1
    assert list(out.iterdir()) == []


ALONE_MODULES = ("errors", "pixels", "symbols")
ALONE = """
import sys
for name in ("torch", "torchvision", "compressai", "constriction", "pydantic", "yaml", "typer",
             "safetensors", "scipy", "pandas", "rich", "ray", "mlflow"):
    sys.modules[name] = None
sys.path[:] = [{wheel!r}] + [each for each in sys.path if each not in ("", {root!r})]
from mantis_lite.__main__ import main
import mantis_core
assert mantis_core.__file__.startswith({wheel!r}), mantis_core.__file__
sys.exit(main({arguments!r}))
"""


def test_its_wheel_needs_no_torch(export: Path, photos: Path, tmp_path: Path) -> None:
    """Built from its own pyproject, unpacked, and run with all but its dependencies blocked."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    source = tmp_path / "source"
    for package in ("mantis_lite", "mantis_core"):
        left = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(ROOT / package, source / package, ignore=left)
    subprocess.run([*build, "-w", str(tmp_path), str(source / "mantis_lite")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 200_000
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as files:
        files.extractall(unpacked)
    shipped = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*.py")}
    core = {name for name in shipped if name.startswith("mantis_core/") and name.count("/") == 1}
    assert core == {f"mantis_core/{name}.py" for name in ("__init__", *ALONE_MODULES)}
    assert {path.split("/")[1] for path in shipped - core} >= {"bitstream", "device", "client.py"}
    assert list(unpacked.rglob("LICENSE"))
    out = tmp_path / "streams"
    for arguments in (
        ["check", str(export)],
        ["encode", str(export), str(photos / "a.png"), "-o", str(out), "--task", "tools"],
        ["info", str(export), str(out)],
    ):
        code = ALONE.format(wheel=str(unpacked), root=str(ROOT), arguments=arguments)
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    client = open_export(export)
    image = client.prepare_image((photos / "a.png").read_bytes())
    assert client.encode(image[None], "tools") == [(out / "a.mts").read_bytes()]
