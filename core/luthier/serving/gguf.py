"""What converts an architecture to GGUF: plugins hand theirs over in the hook ``luthier_gguf_architectures``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

Metadata = dict[str, int | float | str | bool]


def unchanged(rows: np.ndarray) -> np.ndarray:
    """Most tensors are the same in GGUF."""
    return rows


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the GGUF file, and what it is made of.

    Attributes:
        name: Its name there.
        shape: Its shape there, rows first.
        sources: The tensors of the model that it is made of, concatenated along the first axis.
        convert: What becomes of some rows of a source, float32.
        unit: How many rows of a source have to be converted together.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    convert: Callable[[np.ndarray], np.ndarray] = unchanged
    unit: int = 1


class Architecture(Protocol):
    """Converts one architecture; made with the content of its ``config.json``."""

    name: str
    """The architecture's name in GGUF."""

    def metadata(self) -> Metadata:
        """The keys below ``<name>.``: sizes, counts, rotary settings."""
        ...

    def planned(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Planned]:
        """The tensors of the file, from the shapes of the model's. Raises ModelError for one that has no place."""
        ...

    def extra_tensors(self) -> dict[str, np.ndarray]:
        """Tensors of GGUF that no safetensors file has."""
        ...
