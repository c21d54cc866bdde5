"""What a person reads about a registered version: right figures, and a user's names kept plain."""

import pytest

from pipelines.tracking.pages.datasets import datasets
from pipelines.tracking.pages.description import model_description, version_description
from tests.pipelines.tracking.prepared import manifest

TAGS = {
    "mantis.stage_key": "key",
    "mantis.model_id": "0a1b2c3d",
    "mantis.config": "pets",
    "mantis.rate_weight": "0.001",
    "mantis.client_bytes": "120000",
    "mantis.client_macs": "4500000",
}
EVALUATION = {
    "rows": 9,
    "tasks": [
        {"name": "pets", "kind": "classification", "labels": ["cat", "dog"]},
        {"name": "a|b`<b>", "kind": "segmentation", "labels": []},
    ],
    "arms": [
        {
            "kind": "oracle",
            "label": "oracle tasks",
            "stage_key": "key",
            "rate_weight": 0.001,
            "seed": 0,
            "metrics": {"val/top1": 0.8, "val/wire_bytes": 61.0},
        },
        {
            "kind": "mantis",
            "label": "MANTiS",
            "stage_key": "key",
            "rate_weight": 0.001,
            "seed": 0,
            "metrics": {"val/top1": 0.75, "val/wire_bytes": 64.0, "val/bpp": 0.5},
        },
        {
            "kind": "webp",
            "label": "WebP, then the teacher",
            "stage_key": "",
            "quality": 5,
            "seed": 0,
            "metrics": {"val/top1": 0.7},
        },
    ],
}


def test_the_main_arm_comes_first_beside_all_others() -> None:
    data = datasets(manifest(), "/runs/p")["val"]
    text = version_description("whole", "models:/mantis/3", TAGS, EVALUATION, data)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        "| arm | top-1 accuracy, from end to end | bytes an image on the link | bits per pixel |",
        "| --- | ---: | ---: | ---: |",
        "| **MANTiS, rate weight 0.001** | 75.0 % | 64.0 | 0.5 |",
        "| oracle tasks, rate weight 0.001 | 80.0 % | 61.0 | - |",
        "| WebP, then the teacher, quality 5 | 70.0 % | - | - |",
    ]
    assert f"on 9 images of `photos-val`, digest `{data.digest}`" in text
    assert "Model id `0a1b2c3d`" in text
    assert "0.12 MB, 4.5 million multiply-adds" in text


def test_names_of_the_user_are_plain_text() -> None:
    text = version_description("whole", "models:/mantis/3", TAGS, EVALUATION, None)
    assert "- pets: 2 classes, cat, dog" in text
    assert "- a_b__b_: a mask for each image" in text
    assert "on the evaluation split" in text


def test_a_description_of_many_tasks_and_arms_fits_mlflows_column() -> None:
    labels = [f"label {'x' * 90} {number}" for number in range(30)]
    tasks = [{"name": "t" * 100, "kind": "classification", "labels": labels}] * 200
    main = EVALUATION["arms"][1] | {"label": "l" * 90}
    many = {"rows": 9, "tasks": tasks, "arms": [dict(main) for _ in range(200)]}
    for part in ("whole", "client", "server"):
        text = version_description(part, "models:/mantis-server/1000", TAGS, many, None)
        assert len(text) < 5000
        assert "and 190 more" in text
        assert "188 more arms" in text


@pytest.mark.parametrize(
    ("part", "said", "unsaid"),
    [
        ("whole", ["mantis encode", "mantis decode", '"image"'], []),
        ("client", ["mantis encode", '"image"'], ["mantis decode"]),
        ("server", ["mantis decode", '"stream"'], ["mantis encode"]),
    ],
)
def test_each_part_says_how_it_is_loaded(part: str, said: list[str], unsaid: list[str]) -> None:
    text = version_description(part, f"models:/m-{part}/1", TAGS, EVALUATION, None)
    assert all(words in text for words in [*said, f'load_model("models:/m-{part}/1")'])
    assert not any(words in text for words in unsaid)
    assert f"`m-{part}`" in model_description(part, f"m-{part}")
