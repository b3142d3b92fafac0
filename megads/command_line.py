"""How every tool ends: with an exit code, and for a user's mistake one line instead of a traceback."""

import argparse
import errno
import io
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megads.errors import EnvironmentSetupError, MegadsError

INTERRUPTED = 130  # what shells give for SIGINT

# Refusals of the file system that no program can prevent.
REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
    errno.EMFILE,
}  # fmt: skip


def local_path(text: str) -> Path:
    """The type of an argument that names what a tool writes: argparse refuses a URL, which would become a
    directory called `s3:` here.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is a URL; give a path on this machine, and copy it there after"
        )
    return Path(text)


def positive_number(text: str) -> float:
    """The type of an argument that is an amount: argparse refuses what is not above 0 and finite."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def run_tool(run: Callable[[], int | None], *, interrupted: str = "", cleans_up: bool = False) -> int:
    """Call `run`; the exit code is what it returns (None: 0), that of a `MegadsError`, or 130 for Ctrl-C.
    A file system that is full, or refuses or fails to do what it is asked, is the machine's fault and no bug.

    `interrupted` is said after Ctrl-C: what there is to know about what was done already. With `cleans_up` a
    scheduler's SIGTERM ends `run` as an error would, so that its temporary files and workers go too; without,
    it ends the process at once, also in the middle of a library's call.
    """
    if cleans_up:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):  # names of files may have characters that the terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except MegadsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # who read the output wants no more of it, as `| head`
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EnvironmentSetupError.exit_code
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return INTERRUPTED
