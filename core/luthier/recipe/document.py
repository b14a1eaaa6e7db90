"""YAML text as plain values, with the line of every key and item."""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import yaml

from luthier.api.errors import Problem, RecipeError

Path = tuple[str | int, ...]
DEEPEST = 40
MOST = 100_000
"""Values of a recipe, each as often as anchors repeat it."""
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
    """A value as it is written on the command line: YAML for one value.

    Raises:
        RecipeError: it is YAML, and its value none that a recipe may have.
    """
    try:
        return parse(text, "the command line").value
    except RecipeError as error:
        if isinstance(error.__cause__, yaml.YAMLError):
            return text
        raise


TOO_DEEP = "the recipe is nested too deeply: does an anchor contain itself?"


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
    loader: Any = None
    try:
        _check_depth(text, file)
        loader = cast("Any", _Loader)(text)
        node = loader.get_single_node()
        reader = _Reader(loader, Document(file, None))
        value = reader.value(node, ()) if node is not None else None
        return Document(file, value, reader.document.lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        message = f"this is not valid YAML: {error.problem}"
        problem = Problem(message, file, mark.line + 1 if mark else 1, None, "check indentation, quotes and colons")
        raise RecipeError([problem]) from error
    except yaml.YAMLError as error:
        raise RecipeError([Problem(f"this is not valid YAML: {error}", file, 1)]) from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(text: str, file: str) -> None:
    """Refuse what is nested so deep that libyaml, which calls itself for each level, would end the process.

    Raises:
        RecipeError: it is.
    """
    depth = 0
    for event in cast("Any", yaml).parse(text, Loader=_Base):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise RecipeError([Problem(TOO_DEEP, file, event.start_mark.line + 1)])


class _Reader:
    """Makes plain values of YAML's nodes."""

    def __init__(self, loader: Any, document: Document) -> None:
        self.loader = loader
        self.document = document
        self.count = 0
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node.

        Raises:
            RecipeError: a key stands twice, an anchor contains itself, or a value is none that a recipe may have.
        """
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        self.count += 1
        if self.count > MOST:
            self._fail(f"anchors repeat so much that the recipe has more than {MOST:,} values", path, line)
        if len(path) > DEEPEST or any(node is other for other in self.open):
            self._fail(TOO_DEEP, path, line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self.open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode), "there are no other nodes"
            return self._mapping(node, path)
        finally:
            self.open.pop()

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        line = node.start_mark.line + 1
        try:
            found = self.loader.construct_object(node)
        except yaml.YAMLError:
            raise
        # What libraries make of a text with a wrong tag ends in errors of all kinds.
        except Exception:  # noqa: BLE001
            self._fail(f"{node.value[:60]!r} is no value of the kind {node.tag.rpartition(':')[2]}", path, line)
        if isinstance(found, float) and not math.isfinite(found):
            self._fail(f"{node.value} is no number that a recipe may have", path, line)
        if found is not None and not isinstance(found, str | int | float | datetime.date):
            self._fail(f"a value of the kind {node.tag.rpartition(':')[2]} has no place in a recipe", path, line)
        return found

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        own: set[str] = set()
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail("a key is a text, not a list or a mapping", path, line)
            key = str(self._scalar(key_node, path))
            if key == "<<" and key_node.style not in ("'", '"'):
                result = _merged(self.value(value_node, path), line, path, self.document) | result
                continue
            if key in own:
                self._fail(f"the key '{key}' appears twice", (*path, key), line)
            own.add(key)
            self.document.lines[(*path, key)] = line
            result[key] = self.value(value_node, (*path, key))
        return result

    def _fail(self, message: str, path: Path, line: int) -> NoReturn:
        raise RecipeError([Problem(message, self.document.file, line, _dotted(path) or None)])


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
