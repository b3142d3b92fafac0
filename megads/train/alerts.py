"""Alerts to people: a command, and a JSON object posted to a webhook, beside the training.

Both run in a thread of their own for a limited time. What goes wrong with them is logged; it ends nothing.
"""

import json
import logging
import os
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from megads.config.schema import Budget

logger = logging.getLogger(__name__)

PREFIX = "MEGADS_ALERT_"
Facts = Mapping[str, Any]


class Alerts:
    """Sends what `budget` says: `alert_command`, `alert_webhook`, neither or both."""

    def __init__(self, settings: Budget) -> None:
        self._settings = settings
        self._threads: list[threading.Thread] = []

    def send(self, facts: Facts) -> None:
        """Begin to send; `facts` are plain values by lower-case names, "text" the sentence for people."""
        if self._settings.alert_command:
            self._start(self._run_command, facts)
        if self._settings.alert_webhook is not None:
            self._start(self._post, facts)

    def close(self) -> None:
        """Wait for what is under way, at most until it runs out of its time."""
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[[Facts], None], facts: Facts) -> None:
        thread = threading.Thread(target=target, args=(facts,), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _run_command(self, facts: Facts) -> None:
        """The facts are environment variables, and no shell reads the words: there is nothing to quote."""
        command, seconds = self._settings.alert_command, self._settings.alert_timeout_seconds
        environment = {f"{PREFIX}{name.upper()}": str(value) for name, value in facts.items()}
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env=os.environ | environment, start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            logger.warning("budget.alert_command %s cannot be run: %s", command[0], error)
            return
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            logger.warning("budget.alert_command %s was ended after %g s", command[0], seconds)
            return
        if code != 0:
            logger.warning("budget.alert_command %s ended with exit code %d", command[0], code)

    def _post(self, facts: Facts) -> None:
        url = webhook_url(self._settings)
        try:
            request = urllib.request.Request(
                url,
                data=json.dumps(dict(facts)).encode(),
                headers={"Content-Type": "application/json", "User-Agent": "megads"},
            )
            with urllib.request.urlopen(request, timeout=self._settings.alert_timeout_seconds):
                pass
        except (OSError, ValueError) as error:
            # The path of such an address is often its password.
            logger.warning("budget.alert_webhook at %s cannot be reached: %s", urlsplit(url).netloc, error)


def webhook_url(settings: Budget) -> str:
    """The address, from the environment where `alert_webhook` is $NAME; "" where that is not set."""
    url = settings.alert_webhook or ""
    return os.environ.get(url[1:], "") if url.startswith("$") else url
