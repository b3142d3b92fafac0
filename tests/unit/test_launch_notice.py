"""Preemption notices, asked for at a local server that answers as the metadata services document it."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megads.config.loader import load_config
from megads.config.validate import find_problems
from megads.launch import notice
from megads.launch.notice import SERVICES, Endpoint, NoticeWatch, build_check
from tests.waiting import LONGEST_SECONDS

TOKEN = "secret-token"


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks and who answers are one busy process here."""
    monkeypatch.setattr(notice, "ANSWER_SECONDS", LONGEST_SECONDS)


class Metadata(ThreadingHTTPServer):
    """AWS's, Google's and Azure's paths on one port; `noticed` switches all."""

    noticed = False
    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        lives = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._say(200 if self.path == "/latest/api/token" and lives else 400, TOKEN)

    def do_GET(self) -> None:
        self.server.asked += 1
        noticed = self.server.noticed
        if self.path == "/latest/meta-data/spot/instance-action":
            allowed = self.headers.get("X-aws-ec2-metadata-token") == TOKEN
            action = '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'
            self._say(401 if not allowed else 200 if noticed else 404, action)
        elif self.path == "/computeMetadata/v1/instance/preempted":
            allowed = self.headers.get("Metadata-Flavor") == "Google"
            self._say(200 if allowed else 403, "TRUE" if noticed else "FALSE")
        elif self.path.startswith("/metadata/scheduledevents?api-version="):
            allowed = self.headers.get("Metadata") == "true"
            kind = "Preempt" if noticed else "Reboot"
            self._say(200 if allowed else 400, f'{{"Events": [{{"EventType": "{kind}"}}]}}')
        elif self.path == "/own":
            self._say(200 if noticed else 404, "")
        else:
            self._say(500, "")

    def _say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), Handler) as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


@pytest.mark.parametrize("name", ["aws", "gcp", "azure", "url"])
def test_services(server: Metadata, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used
    if name == "url":
        check = build_check(f"{server.url}/own", ())
    else:
        here = SERVICES[name]
        for host in ("http://169.254.169.254", "http://metadata.google.internal"):
            here = replace(
                here,
                url=here.url.replace(host, server.url),
                token_url=here.token_url.replace(host, server.url),
            )
        assert here.url.startswith(server.url)
        monkeypatch.setitem(SERVICES, name, here)
        check = build_check(name, ())
    assert check is not None
    assert not check()
    server.noticed = True
    assert check()


def test_command() -> None:
    yes, no = build_check(None, ("true",)), build_check(None, ("false",))
    assert yes is not None
    assert no is not None
    assert yes()
    assert not no()
    assert build_check(None, ()) is None


def test_either_will_do(server: Metadata) -> None:
    check = build_check(f"{server.url}/own", ("true",))
    assert check is not None
    assert check()


@pytest.mark.parametrize("notice", ["amazon", "169.254.169.254/mine", "http://", ""])
def test_a_mistake_is_told_with_those_of_the_configuration(notice: str) -> None:
    config = load_config(None, {"checkpointing.preemption.notice": notice})
    problems = [one for one in find_problems(config, 1, cuda=False) if "notice" in one]
    assert len(problems) == 1
    assert "neither a URL nor one of aws, gcp, azure" in problems[0]


@pytest.mark.parametrize("notice", [*SERVICES, "http://127.0.0.1:8080/notice", None])
def test_what_can_be_asked(notice: str | None) -> None:
    config = load_config(None, {"checkpointing.preemption.notice": notice})
    assert not [one for one in find_problems(config, 1, cuda=False) if "notice" in one]


def test_who_answers_but_not_in_http_does_not_end_the_watch() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"hello\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(OSError, match="does not speak HTTP"):
            Endpoint(url).noticed()


def test_watch_outlives_a_service_that_is_away(server: Metadata, caplog: pytest.LogCaptureFixture) -> None:
    """Its failures are told once, and a notice that comes later is noticed."""
    answers: Iterator[OSError | bool] = iter([OSError("away"), OSError("away"), False, True])

    def check() -> bool:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    watch = NoticeWatch(check, 0.01)
    assert watch.noticed.wait(LONGEST_SECONDS)
    watch.close()
    assert caplog.text.count("cannot be asked") == 1


def test_watch_asks_again_and_again(server: Metadata) -> None:
    check = build_check(f"{server.url}/own", ())
    assert check is not None
    watch = NoticeWatch(check, 0.01)
    while server.asked < 3:
        assert not watch.noticed.wait(0.01)
    server.noticed = True
    assert watch.noticed.wait(LONGEST_SECONDS)
    watch.close()
