"""The 1,000 classes of ImageNet-1k: ids, names, shipped groups. Reads two files of this package."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

import yaml


@cache
def imagenet_names() -> dict[str, str]:
    """Returns the readable name by WordNet id, in the usual index order (sorted ids)."""
    text = resources.files("data_prep").joinpath("imagenet_classes.csv").read_text("utf-8")
    return {row["wnid"]: row["name"] for row in csv.DictReader(text.splitlines())}


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """Returns the WordNet ids; a position is an ImageNet-1k index."""
    return tuple(imagenet_names())


@cache
def imagenet_groups() -> dict[str, tuple[str, ...]]:
    """Returns the WordNet ids of each shipped group by its name, in index order."""
    text = resources.files("data_prep").joinpath("imagenet_groups.yaml").read_text("utf-8")
    return {name: tuple(members) for name, members in yaml.safe_load(text).items()}
