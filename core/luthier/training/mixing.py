"""Several datasets in given shares: which rows an epoch takes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mix:
    """How many rows of each dataset an epoch takes: all of the first, and of the others what their weights ask for.

    Attributes:
        sizes: The rows of each dataset; their places follow each other.
        taken: How many of them an epoch takes. A dataset that has fewer is begun anew, one that has more goes on in the
            next epoch where it was.
    """

    sizes: tuple[int, ...]
    taken: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], weights: Sequence[float] | None) -> Mix:
        """That of weights, which are relative shares of rows; None: all rows of all."""
        if weights is None:
            return cls(tuple(sizes), tuple(sizes))
        shares = [weight / weights[0] for weight in weights]
        return cls(tuple(sizes), (sizes[0], *(round(sizes[0] * share) for share in shares[1:])))

    def __len__(self) -> int:
        return sum(self.taken)

    def order(self, seed: int, epoch: int) -> Tensor:
        """The places of an epoch's rows, shuffled."""
        generator = torch.Generator().manual_seed(seed + epoch)
        if self.taken == self.sizes:
            return torch.randperm(sum(self.sizes), generator=generator)
        starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        parts = [
            start + _stretch(size, taken, epoch, seed + number)
            for number, (start, size, taken) in enumerate(zip(starts, self.sizes, self.taken, strict=True))
        ]
        places = torch.cat(parts)
        return places[torch.randperm(len(places), generator=generator)]


def _stretch(size: int, taken: int, epoch: int, seed: int) -> Tensor:
    """The rows that an epoch takes of a dataset that is gone through again and again, each time in another order."""
    first, behind = epoch * taken, (epoch + 1) * taken
    passes = range(first // size, -(-behind // size))
    orders = [torch.randperm(size, generator=torch.Generator().manual_seed(_mixed(seed, number))) for number in passes]
    start = first - passes.start * size
    return torch.cat(orders)[start : start + taken] if orders else torch.zeros(0, dtype=torch.int64)


def _mixed(seed: int, number: int) -> int:
    """A seed for each pass, far from those of epochs."""
    return (seed * 1_000_003 + number + 1_000_000_007) % 2**63
