"""NVIDIA's Triton Inference Server for the tests, from the environment that DTN_TRITON_SERVER names."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

FOLDER = os.environ.get("DTN_TRITON_SERVER", "")
needed = pytest.mark.skipif(not FOLDER, reason="needs Triton Inference Server; run: make test-server")
START, TAIL = 60, 40
"""Seconds that a start may take, and lines of the log that a failure shows."""


class TritonServer:
    """A server of a model repository on free ports of this machine; a context manager that always ends it."""

    def __init__(self, repository: Path, log: Path, *options: str) -> None:
        self.repository, self.log, self.options = repository, log, options
        self.http, self.grpc, self.metrics = free_ports(3)
        self._shm = f"dtn_test_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        packages = Path(FOLDER) / "lib" / f"python{version}" / "site-packages"
        triton = packages / "pytriton" / "tritonserver"
        stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            pytest.fail(
                f"{FOLDER}: no Triton Inference Server for Python {version}; remove it and run make test-server"
            )
        beside = triton / "backends" / "python" / stub.name
        if not beside.exists():
            beside.symlink_to(stub)
        # the stub ignores PYTHONPATH: it finds the packages of the first python3 on the PATH
        libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        env = {**os.environ, "LD_LIBRARY_PATH": libraries, "PATH": f"{Path(FOLDER) / 'bin'}:{os.environ['PATH']}"}
        addresses = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
        ports = [f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics}"]
        command = [str(triton / "bin" / "tritonserver"), f"--model-repository={self.repository}",
                   f"--backend-directory={triton / 'backends'}", *addresses, *ports, "--exit-timeout-secs=5",
                   f"--backend-config=python,shm-region-prefix-name={self._shm}", *self.options]  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + START
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                tail = self.log.read_text(errors="replace").splitlines()[-TAIL:]
                pytest.fail("Triton Inference Server did not start; the end of its log:\n" + "\n".join(tail))
            time.sleep(0.1)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """Ends the server and its models at once, as a power cut would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        for left in Path("/dev/shm").glob(f"{self._shm}*"):
            left.unlink()

    def metric(self, name: str, model: str) -> float:
        """Sum of a counter of the metrics endpoint over the rows of ``model``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as answer:
            rows = answer.read().decode().splitlines()
        wanted = [row for row in rows if row.startswith(f"{name}{{") and f'model="{model}"' in row]
        assert wanted, f"no {name} of {model} among the metrics"
        return sum(float(row.rsplit(" ", 1)[1]) for row in wanted)

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
