"""Ports on which the processes of a job find each other."""

import random
import socket

from megads.errors import EnvironmentSetupError

# Below those that the kernel gives to outgoing connections (Linux: from 32768, others from 49152): between
# the question for a free port and its use, one of these may go to anybody.
CANDIDATES = range(20_000, 32_000)


def free_port() -> int:
    """A port that nobody listens on; two programs that ask at once get different ones, almost surely.

    Raises:
        EnvironmentSetupError: none was found.
    """
    for port in random.SystemRandom().sample(CANDIDATES, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise EnvironmentSetupError(
        f"of 100 ports between {CANDIDATES.start} and {CANDIDATES.stop} none is free on this machine: set "
        "MASTER_PORT, and look for what listens there"
    )
