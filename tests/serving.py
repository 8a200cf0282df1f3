"""A server on loopback for tests, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from dtn_fast.detect.config import DetectConfig
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve.app import Service
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.server import Server


class Slow(TorchScorer):
    """Takes its time, and counts."""

    wait = 0.0

    def score(self, crops: np.ndarray) -> np.ndarray:
        time.sleep(self.wait)
        return super().score(crops)

    def _logits(self, crops: np.ndarray) -> np.ndarray:
        time.sleep(self.wait)
        return super()._logits(crops)


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
