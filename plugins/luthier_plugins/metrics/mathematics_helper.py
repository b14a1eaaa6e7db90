"""The process in which the metric ``math`` compares answers: sympy may take for ever over what a model wrote."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from luthier_plugins.metrics.processes import serve

UNREADABLE = "the reference cannot be read"


def main() -> None:
    library: Any = import_module("math_verify")

    def answer(question: dict[str, str]) -> bool | str | None:
        """Whether both are equal; None where the answer holds nothing that can be compared, `UNREADABLE` where the
        reference does not."""
        # Whoever asks kills this process: their own alarms are not needed.
        right = _read(library, question["reference"])
        if not right:
            return UNREADABLE
        said = _read(library, question["answer"])
        return bool(library.verify(right, said, timeout_seconds=None)) if said else None

    def told(question: Any) -> Any:
        try:
            return answer(question)
        except Exception:  # noqa: BLE001 - sympy raises anything
            return None

    serve(told)


def _read(library: Any, text: str) -> Any:
    """What a text holds; nothing where it cannot be read."""
    try:
        return library.parse(text, parsing_timeout=None)
    except Exception:  # noqa: BLE001 - sympy raises anything
        return []


if __name__ == "__main__":
    main()
