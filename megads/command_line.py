"""How every tool ends: with an exit code, and for a user's mistake one line instead of a traceback."""

import signal
import sys
from collections.abc import Callable

from megads.errors import MegadsError

INTERRUPTED = 130  # what shells give for SIGINT


def run_tool(run: Callable[[], int | None], *, interrupted: str = "", cleans_up: bool = False) -> int:
    """Call `run`; the exit code is what it returns (None: 0), that of a `MegadsError`, or 130 for Ctrl-C.

    `interrupted` is said after Ctrl-C: what there is to know about what was done already. With `cleans_up` a
    scheduler's SIGTERM ends `run` as an error would, so that its temporary files and workers go too; without,
    it ends the process at once, also in the middle of a library's call.
    """
    if cleans_up:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run() or 0
    except MegadsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return INTERRUPTED
