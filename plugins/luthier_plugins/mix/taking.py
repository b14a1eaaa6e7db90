"""How many rows of each dataset are taken, and which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from luthier.api import DataError
from luthier_plugins.mix.config import MixConfig


def order_of(ids: Sequence[str], seed: int) -> np.ndarray:
    """The places of rows in the order in which they are taken: told from their ids, so that adding rows moves few.

    Args:
        ids: What identifies each row.
        seed: Another one gives another order.
    """
    key = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in ids)
    return np.argsort(np.frombuffer(digests, "<u8"), kind="stable")


def times_of(config: MixConfig, orders: Sequence[np.ndarray], tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """How often each row of each dataset is taken.

    Args:
        config: The shares, and how far they may be met.
        orders: See `order_of`.
        tokens: Of each row, about.

    Raises:
        DataError: `size` is more than there is.
    """
    sizes = [np.ones(len(some), np.int64) if config.by == "rows" else some for some in tokens]
    caps = config.caps or [None] * len(orders)
    taken = [order if cap is None else order[:cap] for order, cap in zip(orders, caps, strict=True)]
    repeats = config.repeats or [1] * len(orders)
    there = [int(size[some].sum()) * often for size, some, often in zip(sizes, taken, repeats, strict=True)]
    wanted = _wanted(config, there)
    return [_spread(*given) for given in zip(sizes, taken, wanted, strict=True)]


def _wanted(config: MixConfig, there: Sequence[int]) -> list[int]:
    """Rows or tokens to take of each dataset."""
    if config.shares is None:
        return list(there)
    shares = [share / sum(config.shares) for share in config.shares]
    most = min(count / share for count, share in zip(there, shares, strict=True))
    if config.size is not None and config.size > most + 1:
        raise DataError(
            f"with these shares there are {int(most)} {config.by}, not {config.size}",
            hint="ask for fewer, or let rows be taken more than once with `repeats`",
        )
    return [round(share * (config.size or most)) for share in shares]


def _spread(sizes: np.ndarray, order: np.ndarray, wanted: int) -> np.ndarray:
    """How often each row is taken so that so much of it comes together: all of them as often as each other, but for
    once."""
    times = np.zeros(len(sizes), np.int64)
    whole = int(sizes[order].sum())
    if not whole:
        return times
    rounds, rest = divmod(wanted, whole)
    times[order] = rounds
    # A row more than half of which fits is taken.
    reached = np.cumsum(sizes[order]) - sizes[order] / 2
    times[order[reached < rest]] += 1
    return times
