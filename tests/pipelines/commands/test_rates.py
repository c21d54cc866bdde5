"""encode and predict with a codec of several rates: levels and budgets of bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mantis_core.architecture import DetectorConfig
from mantis_core.codec.checkpoint import save_model
from tests.mantis_core.conftest import make_config, make_problem, make_stage2
from tests.pipelines.commands.test_many_files import rows
from tests.pipelines.commands.test_streams import mantis, picture

RATES = (1e-3, 1e-2)
LAST = 4


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """The folder of a codec of two rates, whose streams are shorter at the last level."""
    detector = DetectorConfig(channels=8, blocks=0, hidden=8)
    recipe = make_stage2(make_problem(), make_config(detector=detector), rate_weights=RATES)
    student = recipe.student
    channels = student.client.encoder.modulated_channels[-1]
    student.client.by_level.values.data[0, -2 * channels : -channels] = 8.0
    student.bottleneck.context_log_scale.data[1] += 1.0
    student.finish()
    save_model(tmp_path / "codec", student, {})
    return tmp_path / "codec"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(3):
        picture(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(folder.rglob("*.mts"))]


def test_a_level_is_chosen_or_found_within_a_budget(
    codec: Path, photos: Path, tmp_path: Path
) -> None:
    for level in (0, LAST):
        done = mantis("encode", codec, photos, "-o", tmp_path / str(level), "--level", level)
        assert done.exit_code == 0, done.stderr
    assert min(sizes(tmp_path / "0")) > max(sizes(tmp_path / str(LAST)))
    plain = mantis("encode", codec, photos, "-o", tmp_path / "plain")
    assert plain.exit_code == 0
    assert sizes(tmp_path / "plain") == sizes(tmp_path / "0")
    most = max(sizes(tmp_path / str(LAST))) + 1
    done = mantis("encode", codec, photos, "-o", tmp_path / "most", "--max-bytes", most)
    assert done.exit_code == 0
    assert max(sizes(tmp_path / "most")) <= most
    again = mantis(
        "encode", codec, photos, "-o", tmp_path / "0", "--max-bytes", most, "--skip-existing"
    )
    assert again.exit_code == 0
    assert max(sizes(tmp_path / "0")) <= most
    done = mantis("predict", codec, photos, "--max-bytes", most, "-o", tmp_path / "answers.csv")
    assert done.exit_code == 0
    assert [int(row["wire_bytes"]) for row in rows(tmp_path / "answers.csv")] == sizes(
        tmp_path / "most"
    )


def test_an_image_that_does_not_fit_is_named_and_the_others_go_on(
    codec: Path, photos: Path, tmp_path: Path
) -> None:
    mantis("encode", codec, photos, "-o", tmp_path / "all", "--level", LAST)
    found = sizes(tmp_path / "all")
    done = mantis("encode", codec, photos, "-o", tmp_path / "few", "--max-bytes", min(found) - 1)
    assert done.exit_code == 2
    assert f"bytes at the smallest rate, and max_bytes is {min(found) - 1}" in done.stderr
    assert sizes(tmp_path / "few") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "9"], f"level is 9: this model has levels 0 to {LAST}"),
        (["--level", "1", "--max-bytes", "50"], "not both"),
        (["--level", "1", "--skip-existing"], "--skip-existing cannot see the level"),
        (["--max-bytes", "0"], "max_bytes is 0: give a number of bytes from 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], message: str, codec: Path, photos: Path, tmp_path: Path
) -> None:
    done = mantis("encode", codec, photos, "-o", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_one_file_of_many_images_has_no_budget(codec: Path, photos: Path, tmp_path: Path) -> None:
    done = mantis("encode", codec, photos, "-o", tmp_path / "out.mts", "--max-bytes", 50)
    assert done.exit_code == 2
    assert "--max-bytes needs a folder as OUT" in done.stderr
    done = mantis("encode", codec, photos, "-o", tmp_path / "out.mts", "--level", 2)
    assert done.exit_code == 0
