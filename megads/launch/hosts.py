"""The hosts of a file, each with its torchrun, started through ssh and ended together."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from megads.errors import EnvironmentSetupError
from megads.launch.commands import torchrun_on_host
from megads.launch.hostfile import Host

AGENT = Path(__file__).with_name("host_agent.py")
# BatchMode: no password is asked for, an error comes instead. The keep-alives notice a host that is gone.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
# Variables that follow to the hosts. Nothing that may be a secret: they stand on a command line.
PASSED_ON = ("NCCL_", "GLOO_", "UCX_", "OMP_", "TORCH_", "CUDA_DEVICE_", "PYTHONPATH")
SECONDS_TO_STOP = 60.0


@dataclass(frozen=True)
class OverSsh:
    """One ssh command per host."""

    hosts: tuple[Host, ...]
    commands: tuple[tuple[str, ...], ...]

    def describe(self) -> str:
        """A line per host, as a shell would be given it."""
        return "\n".join(shlex.join(command) for command in self.commands)

    def run(self) -> int:
        """Start all, wait for all; when one fails, or this process is to stop, the others are stopped.

        The exit code is that of the first to fail, 0 if none does, 128 + N when signal N ended it.
        """
        if shutil.which("ssh") is None:
            raise EnvironmentSetupError(
                "--hostfile needs ssh, which is not on the PATH: install openssh-client"
            )
        return _Group(self.hosts, self.commands).run()


def over_ssh(
    hosts: Sequence[Host],
    processes: int,
    port: int,
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> OverSsh:
    """The commands for `hosts`, `processes` on each; the first one is where the ranks meet."""
    passed = [f"{name}={value}" for name, value in sorted(environment.items()) if name.startswith(PASSED_ON)]
    commands = []
    for rank, host in enumerate(hosts):
        command = torchrun_on_host(rank, len(hosts), processes, (hosts[0].address, port), arguments)
        agent = ["exec", "env", *passed, sys.executable, str(AGENT), *command]
        commands.append((*SSH, host.name, f"cd {shlex.quote(os.getcwd())} && {shlex.join(agent)}"))
    return OverSsh(tuple(hosts), tuple(commands))


class _Group:
    """The running ssh processes. Their standard inputs hold the far ends: closing one stops its host."""

    def __init__(self, hosts: Sequence[Host], commands: Sequence[Sequence[str]]) -> None:
        self._hosts = hosts
        self._signal: int | None = None
        # Before anything runs that a signal would leave to itself.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._remember)
        # Sessions of their own: Ctrl-C reaches this process alone, which then stops them in order.
        self._ssh = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command in commands
        ]  # fmt: skip
        self._readers = [
            threading.Thread(target=_pass_on, args=(host.name, ssh.stdout), daemon=True)
            for host, ssh in zip(hosts, self._ssh, strict=True)
        ]

    def run(self) -> int:
        for reader in self._readers:
            reader.start()
        try:
            code = self._wait()
        finally:
            self._stop()
        for reader in self._readers:
            reader.join(timeout=5)
        return code

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _wait(self) -> int:
        """Until all have ended well, one has not, or a signal came."""
        while True:
            codes = [ssh.poll() for ssh in self._ssh]
            for host, code in zip(self._hosts, codes, strict=True):
                if code:
                    why = (
                        "ssh could not connect, or lost the connection"
                        if code == 255
                        else f"exit code {code}"
                    )
                    print(f"{host.name}: {why}; stopping the other hosts", file=sys.stderr, flush=True)
                    return code if code > 0 else 128 - code
            if all(code == 0 for code in codes):
                return 0
            if self._signal is not None:
                print(f"{signal.Signals(self._signal).name}: stopping all hosts", file=sys.stderr, flush=True)
                return 128 + self._signal
            time.sleep(0.1)

    def _stop(self) -> None:
        for ssh in self._ssh:
            if ssh.stdin is not None:
                ssh.stdin.close()
        deadline = time.monotonic() + SECONDS_TO_STOP
        for host, ssh in zip(self._hosts, self._ssh, strict=True):
            try:
                ssh.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{host.name}: does not stop; look for processes there", file=sys.stderr, flush=True)
                ssh.kill()
                ssh.wait()


def _pass_on(host: str, stream: IO[bytes]) -> None:
    """What a host prints, each line after its name."""
    for line in stream:
        sys.stdout.buffer.write(f"{host}: ".encode() + line)
        sys.stdout.buffer.flush()
