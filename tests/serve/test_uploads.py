"""Uploads: forms, slow clients, and the folders of servers that were killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ask, read, serving

from dtn_fast import DTN
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve import uploads
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.uploads import Uploads, sweep


def part(disposition: str, data: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"


def form(port: int, body: bytes, query: str = "", kind: str = "multipart/form-data; boundary=x") -> tuple[int, str]:
    status, text = ask(port, "POST", f"/v1/detect{query}", body, {"Content-Type": kind})
    found = json.loads(text)
    return status, found["path"] if status == 200 else found["error"]


def test_a_form(port: int, files: dict[str, bytes]) -> None:
    face = part('name="file"; filename="../../é face.jpg"', files["face.jpg"])
    other, end = part('name="note"', b"--hello--"), b"--x--\r\n"
    assert form(port, face + end) == (200, "../../é face.jpg")
    assert form(port, other + face + other + end, "?name=mine.jpg") == (200, "mine.jpg")
    assert form(port, other + end) == (400, "the form has no file in its field file; send one (curl -F file=@FILE)")
    assert form(port, face + face + end) == (400, "the form has two files; send one per request")
    assert form(port, face) == (400, "the form is cut off")
    assert form(port, b"hello, this is no form")[0] == 400
    assert form(port, face + end, kind="multipart/form-data")[0] == 400
    assert form(port, part('name="file"', b"x") + end)[0] == 415
    assert form(port, part('name="file"; filename="a.txt"', b"x") + end)[0] == 415
    assert form(port, part('name="file"; filename="a.jpg"', b"") + end)[0] == 400
    assert form(port, part('name="note"', bytes(200_000)) + face + end)[0] == 413
    assert form(port, part('name="file"; filename="a.jpg"', bytes(1_000_001)) + end)[0] == 413


def test_an_upload_that_trickles_gives_its_place_back(model: DTN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "GRACE", 0.5)
    with serving(TorchScorer(model), min_rate=100.0) as port, socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /v1/detect?name=a.jpg HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc")
        slow.settimeout(0.1)
        answer = b""
        while not answer:
            slow.sendall(b"x")
            try:
                answer = slow.recv(1000)
            except TimeoutError:
                continue
        slow.settimeout(30)
        answer += read(slow)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the upload came at less than 100 kB/s" in answer


def test_folders_of_killed_servers_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (  # a server that is killed while an upload arrives
        "import os, signal, tempfile; tempfile.tempdir = os.environ['FOLDER']\n"
        "from dtn_fast.serve.uploads import ServeConfig, Uploads\n"
        "made = Uploads(ServeConfig(), {'.jpg'})\n"
        "(made.folder / 'secret').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed_one = subprocess.run([sys.executable, "-c", code], env={**os.environ, "FOLDER": str(tmp_path)})
    assert killed_one.returncode == -signal.SIGKILL
    (killed,) = tmp_path.iterdir()
    assert (killed / "secret").exists()
    alive = Uploads(ServeConfig(), {".jpg"})  # it sweeps at its start
    foreign = tmp_path / f"{uploads.FOLDER}foreign"
    foreign.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / uploads.LOCK).touch()
    (tmp_path / f"{uploads.FOLDER}link").symlink_to(elsewhere)
    sweep()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {alive.folder.name, foreign.name, elsewhere.name, f"{uploads.FOLDER}link"}
    alive.close()
    assert not alive.folder.exists()
