"""What the ranks of a job report of their machines, and what is wrong with it: mismatches and outliers.

Nothing is measured here and nothing communicates; `train/preflight.py` does that. Rates are compared with the
median of all, which a few bad machines do not move. Of an even number it is the upper one, so that of two the
faster is the measure.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median, median_high
from typing import Literal


@dataclass(frozen=True)
class Report:
    """One rank's machine. `facts` must be the same on all ranks that tell them, by name.

    `clock_seconds` is its time of day before and after a moment that is the same for all. `flops_per_second`
    None: not measured. `hidden` are the directories in which it does not see what rank 0 wrote.
    """

    rank: int
    host: str
    device: str
    facts: Mapping[str, str]
    clock_seconds: tuple[float, float]
    flops_per_second: float | None = None
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transfer:
    """What `rank` measured when it and `peer`, on another host, sent to each other."""

    rank: int
    peer: int
    bytes_per_second: float


@dataclass(frozen=True)
class Finding:
    """A sentence with host and values. error: a run cannot be right; slow: it can, but is held up."""

    kind: Literal["error", "slow", "warning"]
    text: str


def mismatches(reports: Sequence[Report]) -> Iterator[Finding]:
    """Facts that are not the same everywhere, against the value that most ranks have."""
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        telling = [report for report in reports if name in report.facts]
        counts = Counter(report.facts[name] for report in telling)
        usual = counts.most_common(1)[0][0]
        for value in counts:
            if value == usual:
                continue
            there = places([report for report in telling if report.facts[name] == value])
            elsewhere = places([report for report in telling if report.facts[name] == usual])
            yield Finding(
                "error",
                f"{name} is {value} on {there}, but {usual} on {elsewhere}: make it the same everywhere",
            )


def unseen_directories(reports: Sequence[Report]) -> Iterator[Finding]:
    """Directories that must be shared and are not."""
    for directory in dict.fromkeys(path for report in reports for path in report.hidden):
        there = places([report for report in reports if directory in report.hidden])
        yield Finding(
            "error",
            f"{directory}: what rank 0 ({reports[0].host}) writes there is not seen on {there}: it must be "
            "on a filesystem that all hosts share, mounted at the same place",
        )


def skewed_clocks(reports: Sequence[Report], most_seconds: float) -> Iterator[Finding]:
    """Hosts whose time of day is surely more than `most_seconds` from the median of all hosts.

    A process that was held up has a wide interval around the common moment, and is no skewed clock.
    """
    clocks: dict[str, tuple[float, float]] = {}
    for report in reports:
        before, after = clocks.get(report.host, report.clock_seconds)
        clocks[report.host] = max(before, report.clock_seconds[0]), min(after, report.clock_seconds[1])
    usual_before, usual_after = (median(times) for times in zip(*clocks.values(), strict=True))
    for host, (before, after) in clocks.items():
        ahead, behind = before - usual_after, usual_before - after
        if (skew := max(ahead, behind)) > most_seconds:
            which = "ahead of" if ahead > behind else "behind"
            yield Finding(
                "error",
                f"the clock of {host} is at least {skew:.1f} s {which} the median of all hosts: set it right "
                "(NTP; chronyc tracking)",
            )


def slow_devices(reports: Sequence[Report], factor: float, *, by_host: bool) -> Iterator[Finding]:
    """Devices whose matrix products take `factor` times as long as the median, or longer.

    `by_host`: processes of a host share its cores, so the fastest of them stands for all.
    """
    measured = [report for report in reports if report.flops_per_second is not None]
    if by_host:
        fastest = {report.host: report for report in sorted(measured, key=_rate)}
        measured = sorted(fastest.values(), key=lambda report: report.rank)
    if not measured:
        return
    usual = median_high(_rate(report) for report in measured)
    for report in measured:
        if _rate(report) * factor < usual:
            what = report.host if by_host else f"{report.device} of {report.host} (rank {report.rank})"
            yield Finding(
                "slow",
                f"{what} does {_rate(report) / 1e12:.3g} TFLOP/s in matrix products, the median is "
                f"{usual / 1e12:.3g}: {usual / _rate(report):.1f} times slower; look for other processes, "
                "clocks, temperature and power limit (nvidia-smi -q -d PERFORMANCE), or leave the host out",
            )


def slow_links(reports: Sequence[Report], transfers: Sequence[Transfer], factor: float) -> Iterator[Finding]:
    """Links whose transfers take `factor` times as long as the median of the ranks' best ones, or longer.

    The best, since a bad host makes a link of each of its partners slow. Where most links of a rank are slow
    it is its own end: that one is named, not its partners.
    """
    rates: dict[frozenset[int], float] = {}
    for transfer in transfers:
        link = frozenset((transfer.rank, transfer.peer))
        rates[link] = min(transfer.bytes_per_second, rates.get(link, transfer.bytes_per_second))
    if not rates:
        return
    links_of: dict[int, list[frozenset[int]]] = defaultdict(list)
    for link in rates:
        for rank in link:
            links_of[rank].append(link)
    usual = median_high(max(rates[link] for link in links) for links in links_of.values())
    slow = {link for link, rate in rates.items() if rate * factor < usual}
    bad_ends = {
        rank for rank, links in links_of.items() if len(links) > 1 and len(slow & {*links}) * 2 > len(links)
    }
    if bad_ends:
        rate = median(rates[link] for rank in bad_ends for link in links_of[rank])
        there = places([report for report in reports if report.rank in bad_ends])
        yield _slow_link(f"most transfers of {there}", rate, usual)
    for link in sorted(slow, key=sorted):
        if not link & bad_ends:
            ends = " and ".join(places([report]) for report in reports if report.rank in link)
            yield _slow_link(f"transfers between {ends}", rates[link], usual)


def _slow_link(what: str, rate: float, usual: float) -> Finding:
    return Finding(
        "slow",
        f"{what} are slow: {rate / 1e9:.3g} GB/s, the median is {usual / 1e9:.3g}; look at ports, cables and "
        "NCCL's choice of network (NCCL_DEBUG=INFO), or leave the host out",
    )


def places(reports: Sequence[Report]) -> str:
    """The hosts with their ranks, for people: "node3 (ranks 24-31), node4 (rank 32)"."""
    by_host: dict[str, list[int]] = {}
    for report in reports:
        by_host.setdefault(report.host, []).append(report.rank)
    return ", ".join(f"{host} ({_ranks(ranks)})" for host, ranks in by_host.items())


def _ranks(ranks: list[int]) -> str:
    runs = []
    for _, run in groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0]):
        numbers = [rank for _, rank in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(runs)


def _rate(report: Report) -> float:
    assert report.flops_per_second is not None
    return report.flops_per_second


def pairings(hosts: int, rounds: int) -> list[dict[int, int]]:
    """At most so many rounds in which every host has another partner (round robin, the circle method).

    Each round maps a host to its partner; with an odd number one host sits out.
    """
    players: list[int | None] = [*range(hosts), *([None] if hosts % 2 else [])]
    found = []
    for _ in range(min(rounds, len(players) - 1)):
        pairs = zip(players[: len(players) // 2], reversed(players[len(players) // 2 :]), strict=True)
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        found.append(dict([*both, *((b, a) for a, b in both)]))
        players = [players[0], players[-1], *players[1:-1]]
    return found
