"""Notices that a spot machine will be taken away, asked for at its metadata service, a URL, or by a command.

Sources: AWS, "Spot Instance interruption notices" (2 minutes before; IMDSv2); Google Cloud, "Preemptible VM
instances", metadata `instance/preempted` (30 s); Azure, "Scheduled Events" (at least 30 s).
"""

import http.client
import logging
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
LARGEST_ANSWER_BYTES = 2**20
# A metadata service is never reached through a proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Endpoint:
    """A URL to ask. A notice is an answer 200 that `pattern` is found in; 404 is none.

    `token_url`: asked first, by PUT with `token_headers`; its answer goes into the header `token_header`.
    """

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    pattern: str = ""
    token_url: str = ""
    token_headers: dict[str, str] = field(default_factory=dict)
    token_header: str = ""

    def noticed(self) -> bool:
        """Whether there is a notice. Raises OSError where the service does not answer."""
        headers = dict(self.headers)
        if self.token_url:
            token, _ = _ask(urllib.request.Request(self.token_url, headers=self.token_headers, method="PUT"))
            headers[self.token_header] = token
        answer, there = _ask(urllib.request.Request(self.url, headers=headers))
        return there and re.search(self.pattern, answer) is not None


SERVICES = {
    "aws": Endpoint(
        "http://169.254.169.254/latest/meta-data/spot/instance-action",
        token_url="http://169.254.169.254/latest/api/token",
        token_headers={"X-aws-ec2-metadata-token-ttl-seconds": "300"},
        token_header="X-aws-ec2-metadata-token",
    ),
    "gcp": Endpoint(
        "http://metadata.google.internal/computeMetadata/v1/instance/preempted",
        headers={"Metadata-Flavor": "Google"},
        pattern="TRUE",
    ),
    "azure": Endpoint(
        "http://169.254.169.254/metadata/scheduledevents?api-version=2020-07-01",
        headers={"Metadata": "true"},
        pattern=r'"EventType"\s*:\s*"Preempt"',
    ),
}


def _ask(request: urllib.request.Request) -> tuple[str, bool]:
    """(answer, whether it is there: not a 404)."""
    try:
        with _OPENER.open(request, timeout=ANSWER_SECONDS) as response:
            return response.read(LARGEST_ANSWER_BYTES).decode(errors="replace"), response.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return "", False
        raise
    except http.client.HTTPException as error:
        raise OSError(f"{request.full_url} does not speak HTTP: {type(error).__name__}: {error}") from error


def build_check(notice: str | None, command: Sequence[str]) -> Callable[[], bool] | None:
    """What to ask, None for nothing; `notice` is one of `SERVICES` or a URL."""
    checks: list[Callable[[], bool]] = []
    if notice is not None:
        checks.append(SERVICES.get(notice, Endpoint(notice)).noticed)
    if command:
        checks.append(lambda: _succeeds(command))
    return (lambda: any(check() for check in checks)) if checks else None


def _succeeds(command: Sequence[str]) -> bool:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_SECONDS, check=False
    )
    return done.returncode == 0


class NoticeWatch:
    """Asks every `interval_seconds` in a thread; `noticed` is set when there is a notice, and stays set."""

    def __init__(self, check: Callable[[], bool], interval_seconds: float) -> None:
        self.noticed = threading.Event()
        self._check, self._interval_seconds = check, interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preemption", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        told = False
        while not self._stop.is_set():
            try:
                if self._check():
                    self.noticed.set()
                    return
                told = False
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                if not told:
                    logger.warning("preemption notices cannot be asked for: %s; asking on", error)
                told = True
            self._stop.wait(self._interval_seconds)

    def close(self) -> None:
        """Ask no more."""
        self._stop.set()
