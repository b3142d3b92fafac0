"""Host files: what is read, and what is refused with file and line."""

from pathlib import Path

import pytest

from megads.errors import ConfigError
from megads.launch.hostfile import Host, choose_hosts, read_hostfile


def read(tmp_path: Path, text: str) -> list[Host]:
    path = tmp_path / "hosts"
    path.write_text(text)
    return read_hostfile(path)


def test_hosts_in_their_order(tmp_path: Path) -> None:
    text = "# GPUs\nb slots=8\n\n  a  slots=8 # spare\nme@10.0.0.1 slots=4\nfe80::1\n"
    assert read(tmp_path, text) == [Host("b", 8), Host("a", 8), Host("me@10.0.0.1", 4), Host("fe80::1", None)]
    assert Host("me@10.0.0.1", 4).address == "10.0.0.1"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a slots=8\nb\n\nuser@a slots=4\n", 4, "is in line 1 already"),
        ("a slots=0\n", 1, "at least 1"),
        ("a slots=x\n", 1, "at least 1"),
        ("a slots=²\n", 1, "at least 1"),
        ("a 8\n", 1, "only slots=N"),
        ("a slots=8 slots=8\n", 1, "only slots=N"),
        ("a max_slots=8\n", 1, "only slots=N"),
        ("\n-oProxyCommand=touch${IFS}x slots=8\n", 2, "is no host"),
        ("a;touch slots=8\n", 1, "is no host"),
        ("$(touch) slots=8\n", 1, "is no host"),
    ],
)
def test_what_is_no_host_is_refused(tmp_path: Path, text: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert f"hosts:{line}: " in str(raised.value)
    assert said in str(raised.value)


def test_a_file_without_hosts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no host"):
        read(tmp_path, "# nothing\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path)


def test_the_same_number_of_processes_on_each() -> None:
    where, unequal = Path("hosts"), [Host("a", 8), Host("b", 4)]
    assert choose_hosts([Host("a", 8), Host("b", 8)], None, None, where) == ([Host("a", 8), Host("b", 8)], 8)
    assert choose_hosts(unequal, 1, None, where) == ([Host("a", 8)], 8)
    assert choose_hosts(unequal, None, 4, where) == (unequal, 4)
    assert choose_hosts([Host("a", None)], None, 2, where) == ([Host("a", None)], 2)
    for hosts, nodes, gpus, said in (
        (unequal, None, None, "a 8, b 4"),
        (unequal, None, 8, "slots=4"),
        (unequal, 3, None, "names 2 hosts"),
        ([Host("a", None)], None, None, "add it, or give --gpus"),
    ):
        with pytest.raises(ConfigError, match=said):
            choose_hosts(hosts, nodes, gpus, where)
