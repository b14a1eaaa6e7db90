"""The process in which the metric ``math`` compares answers: sympy may take for ever over what a model wrote."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from luthier_plugins.metrics.processes import serve


def main() -> None:
    library: Any = import_module("math_verify")

    def answer(question: dict[str, str]) -> bool | None:
        """Whether both are equal; None where the answer holds nothing that can be compared."""
        # Whoever asks kills this process: their own alarms are not needed.
        right = library.parse(question["reference"], parsing_timeout=None)
        said = library.parse(question["answer"], parsing_timeout=None)
        if not right:
            raise ValueError("the reference cannot be read")
        return bool(library.verify(right, said, timeout_seconds=None)) if said else None

    def told(question: Any) -> Any:
        try:
            return answer(question)
        except Exception as error:  # noqa: BLE001 - sympy raises anything
            return {"error": f"{type(error).__name__}: {error}"}

    serve(told)


if __name__ == "__main__":
    main()
