"""Why a stage has to run: what differs from the last time, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, cast

_MISSING = object()


def reason_to_run(
    payload: Mapping[str, Any], last: Mapping[str, Any], inputs: Mapping[str, list[str]], keys: Mapping[str, str]
) -> str:
    """One line: the changed fields and inputs, or that it never ran.

    Args:
        payload: What the key is made of now.
        last: What it was made of when this stage last ran; empty when it never did.
        inputs: The keys of the inputs by field.
        keys: The key of each stage that is needed, to name inputs by their stage.
    """
    if not last:
        return "was never run"
    names = {key: name for name, key in keys.items()}
    changes: list[str] = []
    for path, before, now in _differences("", last, payload):
        if path.startswith("inputs."):
            field = path.split(".")[1]
            changed = [
                names.get(key, key[:8]) for key in inputs.get(field, []) if key not in last["inputs"].get(field, [])
            ]
            text = f"input {', '.join(changed) or field} changed"
        elif path.startswith("sources."):
            text = f"the content of {path.removeprefix('sources.')} changed"
        elif path == "revision" or path.endswith(".revision"):
            text = f"the component has a new revision ({before} -> {now})"
        else:
            text = f"{_readable(path)}: {_show(before)} -> {_show(now)}"
        if text not in changes:
            changes.append(text)
    return "; ".join(changes) or "the result was removed from the store"


def _differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        old, new = cast("Mapping[str, Any]", before), cast("Mapping[str, Any]", now)
        for key in [*new, *(key for key in old if key not in new)]:
            inner = f"{path}.{key}" if path else key
            yield from _differences(inner, old.get(key, _MISSING), new.get(key, _MISSING))
    elif _choices(before) and _choices(now):
        ones, twos = cast("list[Any]", before), cast("list[Any]", now)
        pairs: Iterable[tuple[Any, Any]] = zip_longest(ones, twos, fillvalue=_MISSING)
        for place, (one, two) in enumerate(pairs):
            yield from _differences(f"{path}.{place}", one, two)
    elif before != now:
        yield path, before, now


def _choices(value: Any) -> bool:
    """Whether it is a list of components, which are compared one by one."""
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in cast("list[Any]", value))


def _show(value: Any) -> str:
    return "(unset)" if value is _MISSING else str(value)


def _readable(path: str) -> str:
    """The path as a recipe writes it: without the wrappers that only key payloads have."""
    return ".".join(part for part in path.split(".") if part != "config")
