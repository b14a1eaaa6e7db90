"""Who waits for large files to be read is told so."""

from __future__ import annotations

import io

from luthier.cli.reading import Reading


class Terminal(io.StringIO):
    """Text that is shown at once."""

    def isatty(self) -> bool:
        return True


def told(out: io.StringIO, times: list[float]) -> str:
    """What is said while 4 GB are read, a GB at each of the times."""
    clock = iter([0.0, *times])
    reading = Reading(out, lambda: next(clock))
    for done in range(1, len(times) + 1):
        reading(done * 10**9, len(times) * 10**9)
    return out.getvalue()


def test_what_takes_no_time_is_not_told() -> None:
    assert told(io.StringIO(), [0.1, 0.2, 0.3, 0.9]) == ""
    assert told(Terminal(), [0.1, 0.2, 0.3, 0.9]) == ""


def test_a_pipe_gets_one_line() -> None:
    assert told(io.StringIO(), [0.5, 1.5, 2.5, 3.5]) == "reading files to identify them, once: 4.0 GB\n"


def test_a_terminal_counts_in_one_line() -> None:
    shown = told(Terminal(), [0.5, 1.5, 1.6, 3.5])
    assert shown.split("\r")[1:] == [
        "reading files to identify them, once: 2.0 of 4.0 GB",
        "reading files to identify them, once: 4.0 GB, 3.5 s\n",
    ]
