"""What a helper process does first: end with its parent, and leave the parent's signals to it."""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_helper_process() -> None:
    """Make this process, just started by `multiprocessing`, a helper without a will of its own.

    - It dies at once when its parent does, however that ended. A forked helper holds copies of its
      parent's sockets: were it to live on, the other ranks would not notice that their peer is gone.
      (Linux; the kernel ties this to the thread that started the helper, so start it from one that
      lives as long as the helper should.)
    - Ctrl-C and the scheduler's warning signals reach every process of a job; the parent alone acts
      on them. Handlers inherited by fork would run here otherwise.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)  # it died before the line above could notice
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
