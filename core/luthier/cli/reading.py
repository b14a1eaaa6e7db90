"""Plans for the command line: who waits for large files to be read is told so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from luthier.artifacts.store import Store
from luthier.planning import Plan, plan
from luthier.recipe import Recipe

SILENT = 1.0
"""Seconds that nobody asks about."""
EVERY = 0.2
"""Seconds between two looks at how far it is, on a terminal."""


class Reading:
    """Says on stderr how far the reading of files is that identifies them: a line that counts on a terminal, one line
    where it is piped.

    Args:
        out: Where to.
        clock: Gives seconds.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._began = self._last = clock()
        self._said = False

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of so many are read."""
        now = self._clock()
        live = self._out.isatty()
        if done < total and (now - self._began < SILENT or now - self._last < EVERY or (self._said and not live)):
            return
        what = "reading files to identify them, once"
        if done < total:
            self._said = True
            self._last = now
            text = f"\r{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB" if live else f"{what}: {total / 1e9:.1f} GB\n"
            print(text, end="", file=self._out, flush=True)
        elif self._said and live:
            print(f"\r{what}: {total / 1e9:.1f} GB, {now - self._began:.1f} s", file=self._out, flush=True)


def planned(recipe: Recipe | Path, store: Store | Path | None, overrides: Sequence[str] = ()) -> Plan:
    """A plan, see `luthier.planning.plan`; what takes long on the way is told on stderr."""
    return plan(recipe, store, overrides=overrides, reading=Reading(sys.stderr))
