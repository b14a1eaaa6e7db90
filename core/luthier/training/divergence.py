"""Notices a loss that runs away, and finds what set it off."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

FIRST = 10
"""Steps whose mean loss is what later ones are compared with."""
LAST = 10
"""Steps that have to be bad on the average before training is stopped."""
TIMES = 2.0
"""How many times the mean of the first steps is bad ..."""
NATS = 0.5
"""... if it is larger by so much, too: small losses double by chance."""


class Watch:
    """Follows the loss step by step.

    Args:
        began: The losses of the first steps, where a stage is resumed.
    """

    def __init__(self, began: Sequence[float] = ()) -> None:
        self.began = list(began)
        self._last: deque[float] = deque(maxlen=LAST)

    def add(self, loss: float) -> None:
        """The loss of the next step."""
        if len(self.began) < FIRST:
            self.began.append(loss)
        else:
            self._last.append(loss)

    @property
    def usual(self) -> float | None:
        """The mean of the first steps; None before these are done."""
        return sum(self.began) / FIRST if len(self.began) == FIRST else None

    def bad(self, loss: float) -> bool:
        """Whether a loss is far above those of the first steps."""
        usual = self.usual
        return not math.isfinite(loss) or (usual is not None and loss > max(TIMES * usual, usual + NATS))

    @property
    def spiking(self) -> bool:
        """Whether the last step's loss is bad: weights as they are now are no good checkpoint."""
        return bool(self._last) and self.bad(self._last[-1])

    @property
    def diverged(self) -> bool:
        """Whether the last steps are bad on the average."""
        return len(self._last) == LAST and self.bad(sum(self._last) / LAST)
