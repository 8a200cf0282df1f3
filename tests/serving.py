"""A server on loopback for tests, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dtn_fast.detect.config import DetectConfig
from dtn_fast.runtime.scorer import Scored
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve.app import Service
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.server import Server


class Slow(TorchScorer):
    """Takes its time, and counts."""

    wait = 0.0

    def judge(self, crops: np.ndarray) -> Scored:
        time.sleep(self.wait)
        return super().judge(crops)

    def _outputs(self, crops: np.ndarray) -> np.ndarray:
        time.sleep(self.wait)
        return super()._outputs(crops)


@contextlib.contextmanager
def serving(scorer: TorchScorer, **limits: Any) -> Iterator[int]:
    """The port of a server in a thread; limits: fields of ServeConfig and DetectConfig."""
    looked = DetectConfig(**{name: limits.pop(name) for name in ("frames", "threshold") if name in limits})
    server = Server(Service(scorer, ServeConfig(**limits), looked))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def judge(port: int, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
    status, text = ask(port, "POST", f"/v1/detect?name={name}", body)
    return status, json.loads(text)


def metric(port: int, name: str) -> float:
    lines = ask(port, "GET", "/metrics")[1].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def proxy(target: int, prefix: str, strip: bool) -> Iterator[int]:
    """The port of a reverse proxy that shows ``target`` under ``prefix`` and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self.path.startswith(prefix + "/"):
                return self.send_error(404)
            path = self.path.removeprefix(prefix) if strip else self.path
            connection = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
            connection.request(self.command, path, body)
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name in ("Content-Type", "Location", "Content-Length", "Content-Security-Policy"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.read())
            connection.close()

        do_GET = do_POST = do_DELETE = forward

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def read(client: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until ``condition()`` is true, for a minute at most."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
