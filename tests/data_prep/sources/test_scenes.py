"""Scenes: repeatable, one figure on each sign, drawn independently."""

from __future__ import annotations

import io
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.scenes import FIGURES, HUES, Scenes


@pytest.mark.parametrize("things", [2, 4, 8])
def test_a_scene_answers_each_of_its_questions_once(things: int) -> None:
    source = Scenes(things=things, train_rows=5, val_rows=3)
    signs = list(HUES)[:things]
    table = source.listing(".", "train")
    for ids in table["class_ids"].to_pylist():
        assert [class_id.split("/")[0] for class_id in ids] == signs
        for sign, class_id in zip(signs, ids, strict=True):
            assert class_id in source.declared_classes(sign)
    assert source.declared_classes("white") == ()
    assert source.listing(".", "val").num_rows == 3
    sizes = {Image.open(io.BytesIO(row.image)).size for row in source.read(".", table)}
    assert sizes == {(64, 64)}


def test_scenes_are_a_function_of_their_seed() -> None:
    source, other = Scenes(train_rows=4), Scenes(train_rows=4, seed=1)
    images = [row.image for row in source.read(".", source.listing(".", "train"))]
    assert images == [row.image for row in source.read(".", source.listing(".", "train"))]
    assert images != [row.image for row in other.read(".", other.listing(".", "train"))]
    val = [row.image for row in source.read(".", source.listing(".", "val").slice(0, 4))]
    assert not set(images) & set(val)


def test_figures_are_equally_frequent_and_say_nothing_of_each_other() -> None:
    source = Scenes(things=4, train_rows=4000)
    rows = source.listing(".", "train")["class_ids"].to_pylist()
    for first, second in combinations(range(4), 2):
        pairs = Counter((row[first], row[second]) for row in rows)
        assert len(pairs) == len(FIGURES) ** 2
        assert all(190 <= count <= 310 for count in pairs.values())  # 250, four deviations


def test_a_sign_stands_in_its_colour_and_its_figure_is_dark() -> None:
    source = Scenes(things=2, train_rows=40)
    table = source.listing(".", "train")
    areas: dict[str, list[int]] = {figure: [] for figure in FIGURES}
    for ids, row in zip(table["class_ids"].to_pylist(), source.read(".", table), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(row.image))).astype(int)
        red = (pixels[..., 0] > 150) & (pixels[..., 1] < 140) & (pixels[..., 2] < 140)
        y, x = np.nonzero(red)
        inside = pixels[y.min() : y.max() + 1, x.min() : x.max() + 1]
        assert 20 <= len(inside) <= 33
        areas[ids[0].split("/")[1]].append(int((inside.max(axis=2) < 90).sum()))
    means = {figure: np.mean(found) for figure, found in areas.items()}
    assert means["disc"] > means["cross"] > means["ring"] > 0
