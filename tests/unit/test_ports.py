"""Ports for jobs: free ones, and not those that outgoing connections get."""

import random
import socket
from pathlib import Path

import pytest

from megads import ports
from megads.errors import EnvironmentSetupError


def test_the_port_can_be_listened_on_and_is_no_outgoing_one() -> None:
    port = ports.free_port()
    with socket.create_server(("", port)):
        pass
    setting = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_outgoing = int(setting.read_text().split()[0]) if setting.exists() else 32768
    assert 1024 <= port < first_outgoing


def test_ports_that_are_taken_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", ports.free_port())) as taken:
        number = taken.getsockname()[1]
        other = ports.free_port()
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *asked: [number, other])
        assert ports.free_port() == other
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *asked: [number])
        with pytest.raises(EnvironmentSetupError, match="MASTER_PORT"):
            ports.free_port()
