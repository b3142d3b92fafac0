"""Host files, as DeepSpeed and Open MPI have them: a line `HOST slots=N` per machine, `#` for comments."""

import re
from dataclasses import dataclass
from pathlib import Path

from megads.errors import ConfigError

# What ssh takes for a host and nothing else: a name, an address, user@name. No leading dash.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_\[:][A-Za-z0-9_.:\[\]-]*")


@dataclass(frozen=True)
class Host:
    """A machine and its number of GPUs; `slots` is None where the file does not say."""

    name: str
    slots: int | None

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in their order. Raises ConfigError with file and line for what is no host."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path} cannot be read ({error}): correct the path") from None
    hosts: dict[str, int] = {}
    found: list[Host] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _read_line(words, f"{path}:{number}")
        if host.address in hosts:
            raise ConfigError(
                f"{path}:{number}: {host.address} is in line {hosts[host.address]} already; name each host "
                "once, with the number of its GPUs as slots"
            )
        hosts[host.address] = number
        found.append(host)
    if not found:
        raise ConfigError(f"{path} names no host: write a line `HOST slots=N` for each machine")
    return found


def _read_line(words: list[str], where: str) -> Host:
    name, *rest = words
    if not _HOST.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no host; write HOST or USER@HOST, and slots=N after it")
    slots = None
    for word in rest:
        key, equals, value = word.partition("=")
        if key != "slots" or not equals or slots is not None:
            raise ConfigError(
                f"{where}: {word!r} is not understood; after the host only slots=N may stand, once"
            )
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"{where}: slots={value} must be the number of GPUs, at least 1")
        slots = int(value)
    return Host(name, slots)


def choose_hosts(
    hosts: list[Host], nodes: int | None, gpus: int | None, where: Path
) -> tuple[list[Host], int]:
    """(the first `nodes` hosts, processes on each). Raises ConfigError where they do not have that many.

    The layout counts on the same number everywhere, so `gpus` must be given where the slots differ.
    """
    if nodes is not None and nodes > len(hosts):
        raise ConfigError(
            f"--nodes {nodes}, but {where} names {len(hosts)} hosts: add some, or ask for fewer"
        )
    chosen = hosts[:nodes]
    slots = {host.slots for host in chosen}
    if gpus is None:
        if len(slots) > 1:
            raise ConfigError(
                f"{where}: the hosts have different numbers of slots ("
                + ", ".join(f"{host.name} {host.slots or '?'}" for host in chosen)
                + "); give --gpus N to use as many of each"
            )
        (only,) = slots
        if only is None:
            raise ConfigError(f"{where}: no host has slots=N; add it, or give --gpus N")
        return chosen, only
    for host in chosen:
        if host.slots is not None and host.slots < gpus:
            raise ConfigError(
                f"--gpus {gpus}, but {where} gives {host.name} slots={host.slots}: ask for fewer"
            )
    return chosen, gpus
