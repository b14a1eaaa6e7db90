"""YAML text as plain values, with the line of every key and item."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from luthier.api.errors import Problem, RecipeError

Path = tuple[str | int, ...]
DEEPEST = 40
_Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc, valid-type]
    """Safe YAML with the scalars of YAML 1.2: ``no`` and ``on`` are words, ``1e-4`` is a number.

    Merge keys (``<<: *anchor``) are understood, as Docker Compose does: `parse` resolves them.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        "-+0123456789.",
    ),
):
    cast("Any", _Loader).add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int:
    """YAML 1.2: ``010`` is ten; octal numbers begin with ``0o``."""
    text = node.value.replace("_", "")
    return int(text, 0) if text.lower().startswith(("0o", "0x")) else int(text)


cast("Any", _Loader).add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_scalar(text: str) -> Any:
    """A value as it is written on the command line: YAML for one value."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML file.

    Attributes:
        file: Its name, as shown in messages.
        value: Its content as plain Python values.
        lines: The line (from 1) of every path into the content.
    """

    file: str
    value: Any
    lines: dict[Path, int] = field(default_factory=dict[Path, int])

    def line(self, path: Path) -> int | None:
        """The line of a path, or of its nearest parent that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def problem(self, path: Path, message: str, hint: str | None = None) -> Problem:
        """A problem at a path of this file."""
        dotted = ".".join(str(part) for part in path)
        return Problem(message, self.file, self.line(path) or 1, dotted or None, hint)


def parse(text: str, file: str) -> Document:
    """Parse YAML.

    Raises:
        RecipeError: it does not parse, or a key stands twice in one mapping.
    """
    loader: Any = cast("Any", _Loader)(text)
    try:
        node = loader.get_single_node()
        document = Document(file, None)
        value = _value(loader, node, (), document) if node is not None else None
        return Document(file, value, document.lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        message = f"this is not valid YAML: {error.problem}"
        problem = Problem(message, file, mark.line + 1 if mark else 1, None, "check indentation, quotes and colons")
        raise RecipeError([problem]) from error
    except yaml.YAMLError as error:
        raise RecipeError([Problem(f"this is not valid YAML: {error}", file, 1)]) from error
    finally:
        loader.dispose()


def _value(loader: Any, node: yaml.Node, path: Path, document: Document) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if len(path) > DEEPEST:
        message = "the recipe is nested too deeply: does an anchor contain itself?"
        raise RecipeError([Problem(message, document.file, node.start_mark.line + 1)])
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child, (*path, index), document) for index, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[str, Any] = {}
    own: set[str] = set()
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node))
        line = key_node.start_mark.line + 1
        if key == "<<" and key_node.style not in ("'", '"'):
            result = _merged(_value(loader, value_node, path, document), line, path, document) | result
            continue
        if key in own:
            raise RecipeError([Problem(f"the key '{key}' appears twice", document.file, line, _dotted((*path, key)))])
        own.add(key)
        document.lines[(*path, key)] = line
        result[key] = _value(loader, value_node, (*path, key), document)
    return result


def _merged(value: Any, line: int, path: Path, document: Document) -> dict[str, Any]:
    """The keys that ``<<: *anchor`` brings in; the mapping's own keys win over them."""
    parts = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) for part in parts):
        message = "'<<' takes a mapping, or a list of mappings"
        raise RecipeError([Problem(message, document.file, line, _dotted(path) or None)])
    found: dict[str, Any] = {}
    for part in cast("list[dict[str, Any]]", parts):
        found = part | found
    return found


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)
