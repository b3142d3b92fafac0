"""An S3-speaking server (moto's) on a port of this machine, which can be away, and fail on order."""

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from megads.ports import free_port

BUCKET = "megads-test"


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class S3Server:
    """Objects outlive `stop`, as an outage ends. `fails(method, path)`: whether a request gets a 503."""

    def __init__(self) -> None:
        self.fails: Callable[[str, str], bool] = lambda method, path: False
        self.requests: list[tuple[str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        # Bound and never listening: nobody else gets the port while the server is away.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port: int = self._held.getsockname()[1]

    def start(self) -> None:
        self._server = make_server(
            "127.0.0.1", self.port or free_port(), self._answer, threaded=True, request_handler=_Quiet
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._held.close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self.fails(method, path):
            start_response("503 Slow Down", [("Content-Type", "text/plain")])
            return [b"injected"]
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer

    @property
    def environment(self) -> dict[str, str]:
        """What makes s3fs speak to it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server with one empty bucket, and this process's environment pointed at it."""
    import boto3
    import s3fs

    server = S3Server()
    server.start()
    reset = f"http://127.0.0.1:{server.port}/moto-api/reset"  # its objects belong to the process
    urllib.request.urlopen(urllib.request.Request(reset, method="POST"), timeout=30).close()
    for name, value in server.environment.items():
        patch.setenv(name, value)
    patch.setattr(s3fs.S3FileSystem, "retries", 1)
    for name in ("connect_timeout", "read_timeout"):  # a slow machine is no outage
        patch.setattr(s3fs.S3FileSystem, name, 60)
    client = boto3.client("s3", endpoint_url=server.environment["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket=BUCKET)
    try:
        yield server
    finally:
        server.close()
        s3fs.S3FileSystem.clear_instance_cache()
