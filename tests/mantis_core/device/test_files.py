"""Which files a command takes, how their outputs are named, and that outputs are whole."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.sources.folder import IMAGE_SUFFIXES as TRAINED_ON
from mantis_core.bitstream.container import MAX_IMAGES
from mantis_core.device.files import (
    IMAGE_SUFFIXES,
    FilesError,
    Source,
    find,
    read,
    shown,
    targets,
    write_whole,
)
from pipelines.coding.work import check_room, check_together

NOT_UTF8 = os.fsdecode(b"caf\xe9.jpg")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def places(folder: Path, *outputs: Path) -> list[str]:
    return [each.place for each in find([folder], IMAGE_SUFFIXES, outputs=outputs).sources]


def test_a_folder_gives_its_images_in_order_and_counts_the_rest(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("b/2.JPG", "a/1.v2.png", "a/x.jfif", "t.txt", "no")))
    touch(*(tmp_path / name for name in (".DS_Store", "a/._1.png", ".cache/1.png")))
    found = find([tmp_path], IMAGE_SUFFIXES)
    assert [each.place for each in found.sources] == ["a/1.v2", "a/x", "b/2"]
    line = "left out: 2 of other kinds (no suffix 1, .txt 1), 2 whose names begin with a dot"
    assert found.left_out() == line
    assert find([tmp_path / "a"], IMAGE_SUFFIXES).left_out().startswith("left out: 1 whose")


def test_every_image_that_prepare_takes_is_taken() -> None:
    assert set(TRAINED_ON) <= IMAGE_SUFFIXES


def test_a_given_file_may_have_any_suffix_and_a_missing_one_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "upload")
    found = find([tmp_path / "upload", tmp_path / "gone.jpg"], IMAGE_SUFFIXES)
    assert [each.path for each in found.sources] == [tmp_path / "upload"]
    assert [each.path for each in found.failures] == [tmp_path / "gone.jpg"]


def test_outputs_of_an_earlier_run_are_no_inputs(tmp_path: Path) -> None:
    touch(tmp_path / "1.png", tmp_path / "masks/1.areas.png")
    assert places(tmp_path, tmp_path / "masks") == ["1"]


def test_links_are_followed_and_a_ring_of_them_ends(tmp_path: Path) -> None:
    touch(tmp_path / "photos/cat/1.png", tmp_path / "elsewhere/2.png")
    (tmp_path / "photos/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/cat/again").symlink_to(tmp_path / "photos")
    assert places(tmp_path / "photos") == ["cat/1", "dog/2"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    touch(tmp_path / "open/1.png", tmp_path / "shut/2.png")
    (tmp_path / "shut").chmod(0)
    found = find([tmp_path], IMAGE_SUFFIXES)
    (tmp_path / "shut").chmod(0o700)
    assert [each.place for each in found.sources] == ["open/1"]
    (failure,) = found.failures
    assert "Permission denied" in failure.reason


def test_two_sources_of_one_output_are_refused_with_their_names(tmp_path: Path) -> None:
    sources = [Source(Path(f"{folder}/1.jpg"), "1") for folder in ("a", "b")]
    with pytest.raises(FilesError, match=r"a/1\.jpg and b/1\.jpg would both be written to"):
        targets(sources, tmp_path, ".mts")


def test_a_suffix_like_part_of_a_name_stays(tmp_path: Path) -> None:
    assert list(targets([Source(Path("a.b.jpg"), "a.b")], tmp_path, ".mts")) == [
        tmp_path / "a.b.mts"
    ]


def test_a_name_that_is_no_text_is_shown_as_text(tmp_path: Path) -> None:
    touch(tmp_path / NOT_UTF8)
    (source,) = find([tmp_path], IMAGE_SUFFIXES).sources
    assert shown(source.path).endswith(r"/caf\xe9.jpg")
    assert shown("two\nlines\x1b[31m") == r"two\nlines\x1b[31m"
    assert shown("größe 1.png") == "größe 1.png"
    (target,) = targets([source], tmp_path / "out", ".mts")
    write_whole(target, b"stream")
    assert read(target) == b"stream"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.mts"
    write_whole(target, b"old")

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as stream:
            stream.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FilesError, match=r"cannot write .*a\.mts: No space left on device"):
        write_whole(target, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["a.mts"]
    assert target.read_bytes() == b"old"


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "file")
    with pytest.raises(FilesError, match="cannot write"):
        write_whole(tmp_path / "file/a.mts", b"")


def test_more_images_than_a_stream_holds_are_refused() -> None:
    check_together(MAX_IMAGES)
    with pytest.raises(FilesError, match="257 images are more than the 256"):
        check_together(MAX_IMAGES + 1)
    spec = SimpleNamespace(image_size=(1024, 1024))
    large: Any = SimpleNamespace(spec=spec, stream_spec=SimpleNamespace(max_total_pixels=2**26))
    check_room(large, 64)
    with pytest.raises(FilesError, match="65 images of 1024 x 1024 pixels are more than the 64"):
        check_room(large, 65)
