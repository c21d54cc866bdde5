"""Writes the site's generated pages: config fields, commands and the lab log. A hook of MkDocs.

Config fields come from the pydantic models, commands from the command line itself, the log from
results/LOG.md. Nothing written here is committed; `make docs` writes it anew.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

from pipelines.__main__ import app
from pipelines.settings.sections import Settings

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "results" / "LOG.md"
COMMAND_LINE = "mantis"
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
TYPE_NAMES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
FOREIGN_ASSET = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="https?://', re.IGNORECASE)
FOREIGN_SHEET = re.compile(
    r'<link\b(?=[^>]*rel="(?:stylesheet|preload|icon)")[^>]*https?://', re.IGNORECASE
)


# ---- MkDocs calls these ----


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuses a page that loads anything from another host."""
    from mkdocs.exceptions import PluginError

    found = FOREIGN_ASSET.search(output) or FOREIGN_SHEET.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from another host: {found.group()}")
    return output


# ---- pages ----


def pages() -> dict[str, str]:
    """Path below docs/ to Markdown, for every generated page."""
    found = {"reference/config.md": config_page(), "reference/commands.md": commands_page()}
    if LOG.is_file():
        found["log.md"] = log_page(LOG.read_text(encoding="utf-8"))
    return found


def config_page() -> str:
    """Every config field: its key, type, default and meaning."""
    lines = [
        "# Config fields",
        "",
        "A config is one YAML file of the sections below. Every field has a default, except "
        "`data.sources` and `tasks`. An override on the command line names a field by its dotted "
        "key, such as `stage2.rate_weight=0.01`. `<name>` stands for a name of your choice, `[]` "
        "for each entry of a list. Written from the code by `docs/reference.py`.",
        "",
        '<div class="reference" markdown>',
        "",
        "## The root",
        "",
    ]
    simple = [name for name, field in Settings.model_fields.items() if not _models(field)]
    lines += _table(Settings, None, "", only=simple)
    for name, field in Settings.model_fields.items():
        if name not in simple:
            lines += [f"## {name}", "", *_nested(field, _default(field, None), name, level=3)]
    return "\n".join([*lines, "", "</div>", ""])


def commands_page() -> str:
    """Every command: its help, usage, arguments, options and an example."""
    lines = [
        "# Commands",
        "",
        "`mantis` is `.venv/bin/mantis`, the same program as `python -m pipelines`. `--help` "
        "after any command prints what stands here. Exit codes: 0 done, 1 a failed run, 2 a "
        "mistake in what was asked, 3 some files or trials failed, 130 interrupted. Written from "
        "the code by `docs/reference.py`.",
        "",
        '<div class="reference" markdown>',
        "",
    ]
    for words, command in commands():
        lines += _command(words, command)
    return "\n".join([*lines, "</div>", ""])


def log_page(text: str) -> str:
    """The lab log. Its links into docs/ become links of the site, others plain text."""

    def moved(link: re.Match[str]) -> str:
        label, target = link.group(1), link.group(2)
        if target.startswith(("#", "http://", "https://")):
            return link.group()
        if target.startswith("../docs/"):
            return f"[{label}]({target.removeprefix('../docs/')})"
        return label

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", moved, text)


# ---- config fields ----


def config_keys() -> Iterator[str]:
    """Dotted keys of all fields, in the order of the page."""
    for line in config_page().splitlines():
        found = re.match(r"\| `([^`]+)` \|", line)
        if found:
            yield found.group(1)


def _nested(field: FieldInfo, value: Any, path: str, *, level: int) -> list[str]:
    """The tables of the models inside a field, each under the heading that stands before it."""
    lines: list[str] = []
    for model, place in _models(field):
        where = path + place
        kinds = model.model_fields.get("kind")
        several = len(_models(field)) > 1
        if several and kinds is not None:
            lines += [f"{'#' * level} {where}, kind `{kinds.default}`", ""]
        instance = value if isinstance(value, model) else None
        lines += _documentation(model) + _table(model, instance, where + ".")
        deeper = level + 1 if several else level
        for name, inner in model.model_fields.items():
            if _models(inner):
                below = f"{where}.{name}"
                lines += [f"{'#' * min(deeper, 4)} {below}", ""]
                held = _default(inner, getattr(instance, name, None) if instance else None)
                lines += _shown_default(below, held, inner)
                lines += _nested(inner, held, below, level=deeper + 1)
    return lines


def _table(
    model: type[BaseModel], instance: BaseModel | None, prefix: str, only: list[str] | None = None
) -> list[str]:
    rows = []
    comments = _comments(model)
    for name, field in model.model_fields.items():
        if (only is not None and name not in only) or (_models(field) and only is None):
            continue
        value = _default(field, getattr(instance, name, None) if instance else None)
        meaning = field.description or comments.get(name, "")
        shown = "required" if field.is_required() else _as_yaml(value)
        cells = (f"`{prefix}{name}`", _type(field), shown, _text(meaning))
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    if not rows:
        return []
    return ["| key | value | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]


def _models(field: FieldInfo) -> list[tuple[type[BaseModel], str]]:
    """Config models inside a field's type, each with what its key adds: "", "[]" or ".<name>"."""

    def walk(kind: Any, place: str) -> Iterator[tuple[type[BaseModel], str]]:
        origin, inner = get_origin(kind), get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind, place
        elif origin is Annotated:
            yield from walk(inner[0], place)
        elif origin in (Union, types.UnionType):
            for each in inner:
                yield from walk(each, place)
        elif origin in (tuple, list):
            for each in inner:
                yield from walk(each, place + "[]")
        elif origin is dict:
            yield from walk(inner[1], place + ".<name>")

    return list(dict.fromkeys(walk(field.annotation, "")))


def _default(field: FieldInfo, held: Any) -> Any:
    """The default of a field; `held` is that of the section it stands in, where it differs."""
    if held is not None:
        return held
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _shown_default(path: str, value: Any, field: FieldInfo) -> list[str]:
    """A block with the default of a mapping of models, such as loss terms."""
    lines = [_text(field.description), ""] if field.description else []
    if isinstance(value, Mapping) and value:
        plain = {
            name: term.model_dump(mode="json", exclude_defaults=True)
            for name, term in value.items()
        }
        block = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=80)
        return [*lines, f"The default of `{path}`:", "", "```yaml", block.rstrip(), "```", ""]
    return lines


def _type(field: FieldInfo) -> str:
    """What may be given, in words."""

    def walk(kind: Any) -> str:
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return walk(inner[0]) + _bounds(inner[1:])
        if origin is Literal:
            return ", ".join(f"`{value}`" for value in inner)
        if origin in (Union, types.UnionType):
            return " or ".join(walk(each) for each in inner)
        if origin is tuple and Ellipsis not in inner:
            return f"[{', '.join(walk(each) for each in inner)}]"
        if origin in (tuple, list):
            return f"list of: {walk(inner[0])}"
        if origin is dict:
            return f"mapping of {walk(inner[0])} to {walk(inner[1])}"
        if kind is type(None):
            return "`null`"
        return TYPE_NAMES.get(kind, getattr(kind, "__name__", "anything"))

    return walk(field.annotation) + _bounds(field.metadata)


def _bounds(extras: Iterable[Any]) -> str:
    """Limits of a number in words, with a comma before them; "" where there are none."""
    found = [
        f"{words} {limit if isinstance(limit, int) else f'{limit:g}'}"
        for extra in extras
        for each in (extra, *getattr(extra, "metadata", ()))
        for name, words in BOUNDS.items()
        if isinstance(limit := getattr(each, name, None), int | float)
    ]
    return f", {' and '.join(found)}" if found else ""


def _as_yaml(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "`null`"
    if isinstance(value, tuple | list | set):
        return f"`[{', '.join(map(_plain, value))}]`"
    if isinstance(value, Mapping):
        return f"`{{{', '.join(f'{key}: {_plain(held)}' for key, held in value.items())}}}`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value >= 1000 and value.is_integer() else f"{value:g}"
    return str(value)


@cache
def _comments(model: type[BaseModel]) -> dict[str, str]:
    """Comments beside the fields of a model, of its bases too: those without a description."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if not (isinstance(each, type) and issubclass(each, BaseModel)) or each is BaseModel:
            continue
        source = textwrap.dedent(inspect.getsource(each))
        comments = {
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                last = node.end_lineno or node.lineno
                words = [comments[n][0] for n in range(node.lineno, last + 1) if n in comments]
                while words and comments.get(last + 1, ("", False))[1]:
                    last += 1
                    words.append(comments[last][0])
                if words:
                    found[node.target.id] = " ".join(words)
    return found


def _documentation(model: type[BaseModel]) -> list[str]:
    text = model.__dict__.get("__doc__")
    return [*_paragraphs(inspect.cleandoc(text)), ""] if text else []


# ---- commands ----


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command, those of a group behind it."""

    def walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, below in getattr(command, "commands", {}).items():
            yield (*words, name), below
            yield from walk((*words, name), below)

    yield from walk((COMMAND_LINE,), get_command(app))


def _command(words: tuple[str, ...], command: Any) -> list[str]:
    lines = [f"{'#' * len(words)} {' '.join(words)}", ""]
    text = inspect.cleandoc(command.help or "").replace("\b", "").split("\f")[0]
    text, _, example = text.partition("Example:")
    lines += [*_paragraphs(text), ""]
    if getattr(command, "commands", None):
        return lines
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    names = [_argument_name(each) for each in arguments]
    lines += ["```text", " ".join([*words, *names, "[OPTIONS]"]), "```", ""]
    rows = [(f"`{_argument_name(each)}`", each) for each in arguments]
    rows += [
        (" ".join(f"`{name}`" for name in [*each.opts, *each.secondary_opts]), each)
        for each in command.params
        if each.param_type_name == "option" and not each.hidden
    ]
    if rows:
        lines += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
        for name, each in rows:
            cells = (name, _option_default(each), _text(each.help or ""))
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
        lines.append("")
    if example:
        lines += ["Example:", "", "```text", example.strip(), "```", ""]
    return lines


def _argument_name(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name = f"{name}..." if argument.nargs == -1 and not name.endswith("...") else name
    return name if argument.required else f"[{name.strip('[]')}]"


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    if value is None or value is False or callable(value):
        return f"`{option.envvar}`" if option.envvar else ""
    return f"`{value}`"


def _paragraphs(text: str) -> list[str]:
    """Text of a docstring as Markdown: indented lines become a block of code."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if all(line.startswith("  ") for line in block.splitlines()) and block.strip():
            lines += ["```text", textwrap.dedent(block), "```", ""]
        else:
            lines += [_escaped(" ".join(block.split())), ""]
    return lines[:-1]


def _escaped(text: str) -> str:
    """Brackets and stars of a docstring are no Markdown; code spans stay as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\[\]*_<>])", r"\\\1", part) for part in parts
    )


def _text(text: str) -> str:
    return _escaped(" ".join((text or "").split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
