"""Alerts reach a command and a webhook with all facts; what fails there is logged and ends nothing."""

import json
import logging
import os
import select
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from megads.config.schema import Budget
from megads.train.alerts import Alerts

FACTS = {
    "text": "costs $(touch x); `id` \"quoted\" 'too'\nsecond line",
    "step": 7,
    "cost": 12.5,
    "max_cost": None,
}
WRITE_ENVIRONMENT = """
import json, os, sys
json.dump({k: v for k, v in os.environ.items() if k.startswith("MEGADS_ALERT_")}, open(sys.argv[1], "w"))
"""


class Webhook(HTTPServer):
    """A local server that keeps what it is posted, and answers with `status` when `answers` is set."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str, Any]] = []
        self.status, self.answers = 200, threading.Event()
        self.answers.set()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/secret"


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], json.loads(body)))
        self.server.answers.wait()
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    server = Webhook()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.answers.set()
    server.shutdown()
    server.server_close()
    thread.join()


def send(alert_timeout_seconds: float = 60.0, **settings: Any) -> None:
    alerts = Alerts(Budget(max_hours=1, alert_timeout_seconds=alert_timeout_seconds, **settings))
    alerts.send(FACTS)
    alerts.close()


def test_the_command_has_the_facts_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    send(alert_command=(sys.executable, "-c", WRITE_ENVIRONMENT, str(out)))
    assert json.loads(out.read_text()) == {
        f"MEGADS_ALERT_{name.upper()}": str(value) for name, value in FACTS.items()
    }


def test_words_of_the_command_are_no_shell(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    word = f"$(touch {tmp_path}/touched); `touch {tmp_path}/touched`"
    send(alert_command=(sys.executable, "-c", WRITE_ENVIRONMENT, str(out), word))
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_the_webhook_gets_json(webhook: Webhook) -> None:
    send(alert_webhook=webhook.url)
    assert webhook.received == [("/secret", "application/json", FACTS)]


def test_the_address_can_be_in_the_environment(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_WEBHOOK", webhook.url)
    send(alert_webhook="$MY_WEBHOOK")
    assert len(webhook.received) == 1


def test_a_refusing_webhook_is_logged_without_its_secret(
    webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.status = 500
    with caplog.at_level(logging.WARNING):
        send(alert_webhook=webhook.url)
    assert len(webhook.received) == 1
    [record] = caplog.records
    assert "500" in record.getMessage()
    assert "secret" not in record.getMessage()


def test_a_slow_webhook_is_not_waited_for(webhook: Webhook, caplog: pytest.LogCaptureFixture) -> None:
    webhook.answers.clear()
    with caplog.at_level(logging.WARNING):
        send(alert_webhook=webhook.url, alert_timeout_seconds=0.2)
    assert "cannot be reached: timed out" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alert_webhook": "http://127.0.0.1:1/secret"}, "127.0.0.1:1 cannot be reached"),
        ({"alert_webhook": "$NO_SUCH_VARIABLE"}, "cannot be reached"),
        ({"alert_command": ("/no/such/program",)}, "/no/such/program cannot be run"),
        ({"alert_command": (sys.executable, "-c", "exit(3)")}, "exit code 3"),
        (
            {
                "alert_command": (sys.executable, "-c", "import time; time.sleep(60)"),
                "alert_timeout_seconds": 0.5,
            },
            "was ended after 0.5 s",
        ),
    ],
)
def test_failures_are_logged(settings: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        send(**settings)
    assert said in caplog.text


def test_a_child_of_the_command_does_not_outlive_its_time(tmp_path: Path) -> None:
    """A pipe that all of them can write to is at its end when the last of them is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.close(os.open(pipe, os.O_WRONLY))  # the end of one that nobody ever wrote to is not told
    try:
        script = 'exec > "$1"; sleep 600 & echo begun; wait'
        send(alert_command=("sh", "-c", script, "sh", str(pipe)), alert_timeout_seconds=1.0)
        os.set_blocking(reader, True)
        ended = False
        while not ended:
            assert select.select([reader], [], [], 30)[0], "the child lives on"
            ended = os.read(reader, 100) == b""
    finally:
        os.close(reader)
