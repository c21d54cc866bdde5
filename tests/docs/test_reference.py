"""The site's generated pages: they hold every config field and command, and load nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

from docs import reference
from pipelines.settings.reading import load_settings
from tests.root import ROOT


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
    listed = {"stage2.requests"}  # its entries have a table of their own, and none is the default
    assert {key for key in wanted - shown - listed if not key.endswith("presence")} == set()
    assert {f"{key}[].tasks" for key in listed} <= shown


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
