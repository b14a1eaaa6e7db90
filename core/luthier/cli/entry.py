"""Where the program begins: what ends it from outside ends it with exit code 130, from the first moment on.

Nothing is imported here that takes time.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point of ``luthier``."""
    ended = False

    def end(number: int, frame: object) -> None:
        nonlocal ended
        # Once it is ending, another signal changes nothing.
        if not ended:
            ended = True
            raise KeyboardInterrupt

    code: object = 130
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # What a shell has programs in the background ignore is not taken back.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, end)
        from luthier.cli.main import main as run

        run()
        code = 0
    except SystemExit as exit:
        code = exit.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    ended = True
    for number in (signal.SIGINT, signal.SIGTERM):
        # While it ends, Python itself would take its own handlers back, and let the default end it.
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code if isinstance(code, int | str) or code is None else 1)
