"""An S3 server on a loopback port, over real HTTP: moto's, with the atomicity of the real one and faults on demand."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "3",  # the pauses between more of them would be most of a test's time
    # What a machine may have beside them must not decide.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


class S3Server:
    """Serves in threads of this process until closed.

    Attributes:
        url: for ``AWS_ENDPOINT_URL``.
        bucket: name of one to use.
        requests: method, path and query of everything that was asked.
        fault: called with method, path and query; what it returns (status line, body) is the answer, None lets pass.
    """

    bucket = "runs"

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self.requests: list[tuple[str, str, str]] = []
        self.fault: Callable[[str, str, str], tuple[str, bytes] | None] | None = None
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(timeout=10)
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return CREDENTIALS | {"AWS_ENDPOINT_URL": self.url}

    def client(self) -> Any:
        """Another client, with nothing cached."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="other",
            aws_secret_access_key="other",
            region_name="us-east-1",
        )

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    @contextmanager
    def faults(self, fault: Callable[[str, str, str], tuple[str, bytes] | None]) -> Iterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        self.requests.append(asked)
        answer = self.fault(*asked) if self.fault is not None else None
        if answer is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, body = answer
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body] if asked[0] != "HEAD" else []
        # S3 looks and creates in one step; the stand-in in two.
        with self._one_at_a_time:
            return list(self._application(environ, start_response))


def error_body(code: str) -> bytes:
    """An answer of S3 that refuses something."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} on demand</Message></Error>".encode()


class _Quiet(MotoRequestHandler):  # type: ignore[misc]
    def log_request(self, *_: object) -> None:
        return
