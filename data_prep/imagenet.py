"""The 1,000 classes of ImageNet-1k: ids, names, shipped groups. Reads two data files."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

import yaml


@cache
def imagenet_names() -> dict[str, str]:
    """WordNet id -> readable name, in the usual index order (sorted ids)."""
    text = resources.files("data_prep").joinpath("imagenet_classes.csv").read_text("utf-8")
    return {row["wnid"]: row["name"] for row in csv.DictReader(text.splitlines())}


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """WordNet ids; the position is the ImageNet-1k index."""
    return tuple(imagenet_names())


@cache
def imagenet_groups() -> dict[str, tuple[str, ...]]:
    """Group name -> WordNet ids in index order."""
    text = resources.files("data_prep").joinpath("imagenet_groups.yaml").read_text("utf-8")
    return {name: tuple(members) for name, members in yaml.safe_load(text).items()}
