"""Label files: which image a line names, which class it gives, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.sources.folder import ImageFolder
from data_prep.sources.labels import read_labels
from tests.data_prep.rows import listed


def read(text: str, *images: str, where: str = "labels.csv") -> dict[str, str]:
    return read_labels(text.encode(), where, images, folder="val")


@pytest.mark.parametrize("where", ["labels.csv", "labels.txt"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/1.jpg,cat\nb/1.jpg,dog\n", {"a/1.jpg": "cat", "b/1.jpg": "dog"}),
        ("val/a/1.jpg,cat\nval/b/1.jpg,dog\n", {"a/1.jpg": "cat", "b/1.jpg": "dog"}),
        ("./a/1.jpg,cat\n/old/set/b/1.jpg,dog\n", {"a/1.jpg": "cat", "b/1.jpg": "dog"}),
        ("val\\a\\1.jpg,cat\r\nval\\b\\1.jpg,dog\r\n", {"a/1.jpg": "cat", "b/1.jpg": "dog"}),
        ("1.jpg,cat\n1.png,dog\n", {"1.jpg": "cat", "1.png": "dog"}),
        ("1.jpg,cat\n1.png,dog\n1.bmp,cow\n", {"1.jpg": "cat", "1.png": "dog"}),
        ("x.jpg,golden retriever\n", {"x.jpg": "golden retriever"}),
        ('x.jpg,"tench, Tinca tinca"\n', {"x.jpg": "tench, Tinca tinca"}),
        ('"x.jpg","cat"\n', {"x.jpg": "cat"}),
        ("\ufeffx.jpg,cat\ny.jpg,dog\n", {"x.jpg": "cat", "y.jpg": "dog"}),
        ("IMG 1.jpg,cat\nmy cat.jpg\tdog\n", {"IMG 1.jpg": "cat", "my cat.jpg": "dog"}),
        ("IMG.jpg,cat\nIMG 1.jpg,dog\n", {"IMG.jpg": "cat", "IMG 1.jpg": "dog"}),
        ("x.jpg cat\nmy cat.jpg dog\n", {"x.jpg": "cat", "my cat.jpg": "dog"}),
        ("x.jpg golden retriever\n", {"x.jpg": "golden retriever"}),
        ("x.jpg;cat\ny.jpg;cat, dog\n", {"x.jpg": "cat", "y.jpg": "cat, dog"}),
        ("id,file,label\n7,x.jpg,cat\n8,y.jpg,dog\n", {"x.jpg": "cat", "y.jpg": "dog"}),
        (",Image Name,Class ID\n0,x.jpg,cat\n", {"x.jpg": "cat"}),
        ("breed,id\ncat,x\ndog,y\n", {"x.jpg": "cat", "y.jpg": "dog"}),
        ("filename,label\nx.jpg,cat\n", {"x.jpg": "cat"}),
        ("# of 2026\nx.jpg,cat\n", {"x.jpg": "cat"}),
        ("x.jpg,cat,train\n", {"x.jpg": "cat"}),
        ("x.JPG,cat\nimg.001,dog\n", {"x.jpg": "cat", "img.001.jpg": "dog"}),
        ("#1.jpg,cat\ncafe\u0301,dog\n", {"#1.jpg": "cat", "café.jpg": "dog"}),
        ("gone.jpg,name\nx.jpg,cat\n", {"x.jpg": "cat"}),
        ("a/1.jpg,cat\nc/1.jpg,dog\n", {"a/1.jpg": "cat"}),
        ("x.jpg,cat\nx.jpg,cat\n", {"x.jpg": "cat"}),
        ("x.jpg n1 0 0 9 9\ny.jpg\tn2\t0\t0\t9\t9\n", {"x.jpg": "n1", "y.jpg": "n2"}),
        ("ImageId,PredictionString\nx,n1 1 2 3 4 n1 5 6 7 8 \n", {"x.jpg": "n1"}),
    ],
)
def test_a_line_names_an_image_and_its_class(
    text: str, expected: dict[str, str], where: str
) -> None:
    assert read(text, *expected, where=where) == expected


def test_a_quoted_field_may_span_lines_in_a_csv() -> None:
    assert read('x.jpg,"a\nb"\ny.jpg,c\n', "x.jpg", "y.jpg") == {"x.jpg": "a\nb", "y.jpg": "c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x.jpg,cat\nx.jpg,dog\n", r"line 2: 'x\.jpg' has the class 'dog', and 'cat' in line 1"),
        ("x.jpg,cat\nx,dog\n", "line 2: 'x' has the class 'dog', and 'cat' in line 1"),
        ("file,class\n1.jpg,cat\n", r"line 2: '1\.jpg' may mean 2 images \(a/1\.jpg, b/1\.jpg\)"),
        ("2,cat\n", r"line 1: '2' may mean 2 images \(2\.jpg, 2\.png\)"),
        ("x.jpg,\n", r"line 1: 'x\.jpg' has no class"),
        ("y.jpg,cat\nx.jpg\n", r"line 2: 'x\.jpg' has no class"),
        ("490\n361\n171\n", "one number a line.*names no image"),
        ("number,file,kind\n1,x.jpg,cat\n", "columns number, file, kind.*'file' and 'class'"),
        ('x.jpg,"cat\n', "line 1: .*correct the quotes"),
    ],
)
def test_a_line_that_decides_nothing_is_refused_by_its_number(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(text, "x.jpg", "y.jpg", "a/1.jpg", "b/1.jpg", "2.jpg", "2.png")
    assert str(caught.value).startswith("labels.csv")


@pytest.mark.parametrize("content", ["x.jpg,cat".encode("utf-16"), "é.jpg,cat".encode("latin-1")])
def test_a_file_of_another_encoding_is_named(content: bytes) -> None:
    with pytest.raises(DataError, match=r"labels\.csv is not UTF-8 .*save it as UTF-8"):
        read_labels(content, "labels.csv", ["x.jpg"])


def test_images_of_one_name_in_several_folders_keep_their_own_labels(tmp_path: Path) -> None:
    for name in ("a/001.jpg", "b/001.jpg"):
        (tmp_path / "val" / name).parent.mkdir(parents=True)
        (tmp_path / "val" / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("a/001.jpg,cat\nb/001.jpg,dog\n")
    rows = listed(ImageFolder(val_labels="labels.csv"), tmp_path, "val")
    assert rows == [("val/a/001.jpg", ["cat"]), ("val/b/001.jpg", ["dog"])]
