"""JSON as data files hold it: lines, or one array of any size, each row read strictly."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, cast

import orjson

from luthier.data.files import BLOCK, LONGEST, Stream

DEEPEST = 100
"""Levels of a row, at most; libraries call themselves for each of them."""
SIGNS = re.compile(rb'\\(?:.|\Z)|["\[\]{}]', re.DOTALL)
"""What decides how deep JSON is nested; a sign behind a backslash does not."""
KEY = re.compile(rb'"\s*:')
"""The end of a key, or of a text that ends with a quotation mark before a colon."""
LARGEST = 2**63 - 1


def parsed(text: bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or says something that cannot be kept as it is: a key twice, a number that is none, half
            a sign.
    """
    if _nesting(text) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    # Of two equal keys one is lost, of a whole number with more than 64 bits its last digits: where either may be, each
    # object and number is looked at.
    if value is None or len(KEY.findall(text)) != _keys(value):
        value = _strictly(text)
    if b"\\u0000" in text and _has_null(value):
        raise ValueError("a text has a null character, which ends texts in other programs")
    return value


def _strictly(text: bytes) -> Any:
    """The same by the standard library, which can be asked about every object and number."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text, at byte {error.start + 1}") from error
    value = json.loads(decoded, object_pairs_hook=_object, parse_constant=_no_number, parse_int=_whole)
    try:
        # Half a surrogate pair is valid JSON, but no text that can be stored.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a text has half of a sign (a lone surrogate)") from error
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) <= 20 else LARGEST + 1
    if not -LARGEST <= number <= LARGEST:
        raise ValueError(f"{digits[:30]} has more than 64 bits: quote it, to keep it as a text")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key is lost to another of the same name.

    Raises:
        ValueError: a key occurs twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' occurs twice in one object")
    return made


def _keys(value: Any) -> int:
    """How many keys there are; -1 or less where a number may have lost digits."""
    if isinstance(value, str):
        return 0
    if isinstance(value, dict):
        inside = cast("dict[str, Any]", value)
        return len(inside) + sum(map(_keys, inside.values()))
    if isinstance(value, list):
        return sum(map(_keys, cast("list[Any]", value)))
    return -sys.maxsize if isinstance(value, float) and abs(value) > LARGEST else 0


def _has_null(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_null(item) for pair in cast("dict[str, Any]", value).items() for item in pair)
    return isinstance(value, list) and any(map(_has_null, cast("list[Any]", value)))


def _nesting(text: bytes) -> int:
    """How deep a text of JSON is nested; 0 where it cannot be deep."""
    if text.count(b"[") + text.count(b"{") <= DEEPEST:
        return 0
    depth = deepest = 0
    inside = False
    for sign in SIGNS.findall(text):
        if sign == b'"':
            inside = not inside
        elif not inside and sign in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not inside and sign in b"]}":
            depth -= 1
    return deepest


def lines(stream: Stream) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers, from 1; None for one that is longer than a row can be, which is not held.

    Args:
        stream: The file, from its beginning.
    """
    number, rest, skipping = 0, b"", False
    while block := stream.read(BLOCK):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            number += 1
            yield number, None if skipping or len(line) > LONGEST else line
            skipping = False
        if len(rest) > LONGEST:
            rest, skipping = b"", True
    if rest or skipping:
        yield number + 1, None if skipping else rest


def array_items(stream: Stream) -> Iterator[tuple[int, bytes | None]]:
    """The items of the one array that a file holds, each with the line that it begins in; see `lines`.

    What stands between objects, such as a bare number, is an item too. An array without an end ends with what there is
    of its last item.

    Args:
        stream: The file, from its beginning.
    """
    held, line, depth, inside = b"", 1, 0, False
    scan = start = 0
    while block := stream.read(BLOCK):
        held += block
        for match in SIGNS.finditer(held, scan):
            sign, scan = match[0], match.end()
            if sign == b"\\":
                # Its other half is in the next block.
                scan = match.start()
                break
            if sign == b'"':
                inside = not inside
            elif inside or sign[:1] == b"\\":
                continue
            elif sign in b"[{":
                depth += 1
                if depth <= 2:
                    yield from _between(held[start : match.start()], line)
                    line += held.count(b"\n", start, match.start())
                    start = match.start() if depth == 2 else match.end()
            else:
                depth -= 1
                if depth == 1:
                    yield line, held[start : match.end()]
                    line += held.count(b"\n", start, match.end())
                    start = match.end()
                elif depth == 0:
                    yield from _between(held[start : match.start()], line)
                    line += held.count(b"\n", start, match.start())
                    start = match.end()
        else:
            scan = len(held)
        if len(held) - start > LONGEST:
            yield line, None
            return
        held, scan, start = held[start:], scan - start, 0
    if depth:
        yield line, held.strip() or b"[the array has no end"
    else:
        yield from _between(held, line)


def _between(text: bytes, line: int) -> Iterator[tuple[int, bytes]]:
    """What stands between two objects and is none."""
    odd = text.strip(b" \t\r\n,")
    if odd:
        yield line, odd
