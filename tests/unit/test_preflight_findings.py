"""Mismatches and outliers among the machines of a job: found by host, and only where there are any."""

from dataclasses import replace
from pathlib import Path

import pytest

from megads.config.disk import checkpoint_bytes
from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.train import preflight
from megads.train.machines import (
    Report,
    Transfer,
    mismatches,
    pairings,
    places,
    skewed_clocks,
    slow_devices,
    slow_links,
    unseen_directories,
)

PER_HOST = 4
FACTS = {"torch": "2.11.0", "Python": "3.12.4"}


def job(hosts: int, per_host: int = PER_HOST) -> list[Report]:
    return [
        Report(rank, f"node{rank // per_host}", f"cuda:{rank % per_host}", FACTS, (1000.0, 1000.0), 600e12)
        for rank in range(hosts * per_host)
    ]


def links(reports: list[Report], slow: set[frozenset[int]], rounds: int = 8) -> list[Transfer]:
    """All links between counterparts at 40 to 44 GB/s, but 10 GB/s for `slow`, seen at one end only."""
    found = []
    for pairs in pairings(len(reports) // PER_HOST, rounds):
        for host, partner in pairs.items():
            for place in range(PER_HOST):
                rank, peer = host * PER_HOST + place, partner * PER_HOST + place
                is_slow = frozenset((rank, peer)) in slow and rank < peer
                found.append(Transfer(rank, peer, 10e9 if is_slow else (40 + rank % 5) * 1e9))
    return found


def test_equal_machines_have_no_findings() -> None:
    reports = job(4)
    assert not [*mismatches(reports), *unseen_directories(reports), *skewed_clocks(reports, 5)]
    assert not [*slow_devices(reports, 1.5, by_host=False), *slow_links(reports, links(reports, set()), 1.5)]


def test_the_minority_is_named_with_both_values() -> None:
    reports = job(4)
    for rank in (8, 9, 10, 11, 14):
        reports[rank] = replace(reports[rank], facts=FACTS | {"torch": "2.10.0"})
    [finding] = mismatches(reports)
    assert finding.kind == "error"
    assert finding.text.startswith(
        "torch is 2.10.0 on node2 (ranks 8-11), node3 (rank 14), but 2.11.0 on node0 (ranks 0-3), "
    )


def test_each_deviating_value_is_a_finding() -> None:
    reports = job(4, per_host=1)
    reports[1] = replace(reports[1], facts=FACTS | {"torch": "a"})
    reports[3] = replace(reports[3], facts=FACTS | {"torch": "b", "Python": "3.13.0"})
    assert [finding.text.split(" on ")[0] for finding in mismatches(reports)] == [
        "torch is a", "torch is b", "Python is 3.13.0",
    ]  # fmt: skip


def test_what_only_some_tell_is_compared_among_them() -> None:
    reports = job(2, per_host=2)
    for rank in (0, 2):
        reports[rank] = replace(reports[rank], facts=FACTS | {"code": "abc"})
    assert not list(mismatches(reports))
    reports[2] = replace(reports[2], facts=FACTS | {"code": "def"})
    [finding] = mismatches(reports)
    assert "code is def on node1 (rank 2), but abc on node0 (rank 0)" in finding.text


def test_a_directory_that_is_not_shared() -> None:
    reports = job(2)
    for rank in range(4, 8):
        reports[rank] = replace(reports[rank], hidden=("/scratch/run",))
    [finding] = unseen_directories(reports)
    assert finding.text.startswith(
        "/scratch/run: what rank 0 (node0) writes there is not seen on node1 (ranks 4-7)"
    )


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (1030.0, 1030.0, "30.0 s ahead of"),
        (992.5, 992.5, "7.5 s behind"),
        (1004.0, 1004.0, None),
        (1010.0, 1070.0, "10.0 s ahead of"),
        (920.0, 990.0, "10.0 s behind"),
    ],
)
def test_clocks(before: float, after: float, found: str | None) -> None:
    reports = job(5, per_host=1)
    reports[2] = replace(reports[2], clock_seconds=(before, after))
    texts = [finding.text for finding in skewed_clocks(reports, 5)]
    assert len(texts) == (found is not None)
    if found is not None:
        assert texts[0].startswith(f"the clock of node2 is at least {found} the median")


@pytest.mark.parametrize("held_up", [(1000.0, 1060.0), (940.0, 1000.0), (940.0, 1060.0)])
@pytest.mark.parametrize("per_host", [1, PER_HOST])
def test_a_process_that_is_held_up_is_no_skewed_clock(held_up: tuple[float, float], per_host: int) -> None:
    reports = job(3, per_host)
    reports[2] = replace(reports[2], clock_seconds=held_up)
    assert not list(skewed_clocks(reports, 5))


def test_a_process_that_is_held_up_hides_no_skewed_clock() -> None:
    """Its neighbours on the host looked in time."""
    reports = job(3)
    for rank in range(4, 8):
        reports[rank] = replace(reports[rank], clock_seconds=(1030.0, 1030.0))
    reports[5] = replace(reports[5], clock_seconds=(970.0, 1090.0))
    [finding] = skewed_clocks(reports, 5)
    assert finding.text.startswith("the clock of node1 is at least 30.0 s ahead of")


def test_a_slow_device_is_named() -> None:
    reports = [replace(report, flops_per_second=(600 + report.rank) * 1e12) for report in job(3)]
    reports[6] = replace(reports[6], flops_per_second=200e12)
    [finding] = slow_devices(reports, 1.5, by_host=False)
    assert finding.kind == "slow"
    assert finding.text.startswith("cuda:2 of node1 (rank 6) does 200 TFLOP/s")
    assert "3.0 times slower" in finding.text
    assert not list(slow_devices(reports, 4.0, by_host=False))


def test_many_slow_devices_do_not_hide_each_other() -> None:
    reports = [
        replace(r, flops_per_second=1e12 * (100 if r.rank in (0, 1, 2, 3, 4) else 600)) for r in job(3)
    ]
    assert len(list(slow_devices(reports, 1.5, by_host=False))) == 5


def test_of_two_the_faster_is_the_measure() -> None:
    reports = [replace(report, flops_per_second=1e12 * (1 + report.rank)) for report in job(2, per_host=1)]
    [finding] = slow_devices(reports, 1.5, by_host=False)
    assert "(rank 0)" in finding.text


def test_processes_that_share_cores_are_no_devices() -> None:
    """On a CPU one busy process of a host says nothing; a host whose fastest is slow does."""
    reports = job(3)
    reports[1] = replace(reports[1], flops_per_second=1e12)
    assert not list(slow_devices(reports, 1.5, by_host=True))
    reports = [replace(r, flops_per_second=1e12) if r.host == "node1" else r for r in reports]
    [finding] = slow_devices(reports, 1.5, by_host=True)
    assert finding.text.startswith("node1 does")


def test_one_slow_link_names_both_ends() -> None:
    reports = job(4)
    [finding] = slow_links(reports, links(reports, {frozenset((1, 9))}), 1.5)
    assert finding.text.startswith("transfers between node0 (rank 1) and node2 (rank 9) are slow: 10 GB/s")


def test_a_slow_end_is_named_alone() -> None:
    reports = job(4)
    slow = {frozenset((6, other)) for other in (2, 10, 14)}
    [finding] = slow_links(reports, links(reports, slow), 1.5)
    assert finding.text.startswith("most transfers of node1 (rank 6) are slow")


def test_a_slow_host_is_named_once() -> None:
    reports = job(5)
    slow = {frozenset((4 * host + i, 12 + i)) for host in (0, 1, 2, 4) for i in range(4)}
    [finding] = slow_links(reports, links(reports, slow), 1.5)
    assert finding.text.startswith("most transfers of node3 (ranks 12-15) are slow")


def test_a_slow_port_between_two_hosts() -> None:
    reports = job(2)
    [finding] = slow_links(reports, links(reports, {frozenset((2, 6))}), 1.5)
    assert finding.text.startswith("transfers between node0 (rank 2) and node1 (rank 6)")


@pytest.mark.parametrize("hosts", [2, 3, 4, 7, 8, 33])
def test_pairings_are_a_tournament(hosts: int) -> None:
    rounds = pairings(hosts, hosts)
    met = [frozenset(pair) for pairs in rounds for pair in pairs.items()]
    assert all(pairs[partner] == host != partner for pairs in rounds for host, partner in pairs.items())
    assert len(met) == hosts * (hosts - 1), "each host meets each other one, seen from both"
    assert len(set(met)) == hosts * (hosts - 1) // 2
    assert len(pairings(hosts, 3)) == min(3, hosts - 1 + hosts % 2)


def test_places() -> None:
    reports = job(3)
    assert places([reports[rank] for rank in (0, 1, 3, 8)]) == "node0 (ranks 0-1, 3), node2 (rank 8)"


# --- the disk ------------------------------------------------------------------------------------


def disk_findings(monkeypatch: pytest.MonkeyPatch, free_checkpoints: float, **settings: object) -> list[str]:
    overrides = {f"checkpointing.{name}": value for name, value in settings.items()}
    config = load_config("configs/debug.json", overrides)
    resolved = resolve(config, 1, cuda=False)
    one = checkpoint_bytes(config, resolved.precision)
    usage = (0, 0, int(free_checkpoints * one) + 1)
    named = type("Usage", (), {"free": usage[2]})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: named)
    return [finding.kind for finding in preflight.free_disk_findings(config, resolved)]


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = {"save_dir": str(tmp_path)}
    assert disk_findings(monkeypatch, 0.9, **place) == ["error"]
    assert disk_findings(monkeypatch, 3, keep_last_n=5, **place) == ["warning"]
    assert disk_findings(monkeypatch, 7, keep_last_n=5, **place) == []
    assert disk_findings(monkeypatch, 3, keep_last_n=0, **place) == []


def test_a_checkpoint_without_optimizer_is_smaller() -> None:
    config = load_config("configs/debug.json", {"checkpointing.save_optimizer": False})
    whole = load_config("configs/debug.json")
    assert checkpoint_bytes(config, "bf16") * 7 == pytest.approx(checkpoint_bytes(whole, "bf16"), abs=10)


def test_the_hash_of_the_code_is_of_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = type("Package", (), {"__file__": f"{tmp_path}/__init__.py"})
    monkeypatch.setattr(preflight, "megads", package)
    Path(package.__file__).write_text("a = 1\n")
    first = preflight.code_hash()
    Path(package.__file__).write_text("a = 2\n")
    assert preflight.code_hash() != first


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("", "unknown"),
    ],
)
def test_the_version_of_the_driver(text: str, version: str) -> None:
    assert preflight.driver_version(text) == version
