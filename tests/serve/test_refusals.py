"""Refusals that every client sees, connections that do nothing, and the service behind a proxy."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from serving import Slow, ask, judge, metric, proxy, read, serving, wait_for

from dtn_fast import DTN
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve import server as server_

CURL = shutil.which("curl")
WAYS = {
    "expect": [], "at once": ["-H", "Expect:"], "chunked": ["-H", "Expect:", "-H", "Transfer-Encoding: chunked"],
    "chunked, expect": ["-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue"], "HTTP/1.0": ["-0"],
    "form": ["-F"],
}  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 300 MB, far over the limit, which takes no space."""
    path = tmp_path_factory.mktemp("big") / "big.mp4"
    with path.open("wb") as file:
        file.truncate(300_000_000)
    return path


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("path", "status", "words"), [
    ("/v1/detect?name=big.mp4", 413, "larger than the limit of 1 MB"),
    ("/v1/jobs?name=big.xyz", 415, "give the file's name with one of"),
    ("/v1/nothing", 404, "no such page"),
    ("/healthz", 405, "this page takes GET, HEAD, OPTIONS"),
])  # fmt: skip
def test_curl_sees_every_refusal(way: str, path: str, status: int, words: str, port: int, big: Path) -> None:
    send = ["-F", f"file=@{big}"] if way == "form" else [*WAYS[way], "-T", str(big)]
    command = ["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code} %{size_upload}", *send]
    done = subprocess.run([*command, f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, numbers = done.stdout.split("\n")
    assert words in json.loads(text)["error"]
    assert numbers.split()[0] == str(status)
    assert int(numbers.split()[1]) < 150_000_000  # it need not send the rest
    if way == "expect" or (way == "form" and status == 413):
        assert numbers.split()[1] == "0"  # refused before leave to send


def test_a_client_that_sends_all_before_it_reads_sees_the_refusal(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(30)
        client.sendall(b"POST /v1/detect?name=a.mp4 HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        for _ in range(100):
            client.sendall(bytes(1_000_000))
        answer = read(client)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer
        assert b'{"error":"larger than the limit of 1 MB"}' in answer


def test_leave_to_send_is_given_to_accepted_uploads_alone(port: int, files: dict[str, bytes]) -> None:
    def first(name: str) -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(30)
            head = (
                f"PUT /v1/detect?name={name} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
            )
            client.sendall(head.encode())
            return client.recv(20)

    assert first("a.png").startswith(b"HTTP/1.1 100")
    assert first("a.txt").startswith(b"HTTP/1.1 415")


@pytest.mark.parametrize("raw", [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + bytes(70_000),
    b"POST /v1/detect?name=a.jpg HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
], ids=["words", "long head", "bad chunk"])  # fmt: skip
def test_what_is_no_http_is_answered(raw: bytes, port: int, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(30)
        client.sendall(raw)
        answer = read(client)
    assert answer.startswith(b"HTTP/1.1 400")
    assert "this server takes HTTP/1.1" in json.loads(answer.split(b"\r\n\r\n")[1])["error"]
    assert [record for record in caplog.records if record.exc_info] == []
    assert ask(port, "GET", "/healthz")[0] == 200


def test_connections_that_do_nothing_are_closed(
    model: DTN, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent, half a head, half a second head, and answers that nobody reads; a slow upload is none of these."""
    monkeypatch.setattr(server_, "IDLE", 0.5)
    heads = (b"", b"GET /v1", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /v1")
    with serving(TorchScorer(model)) as port, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in heads]
        deaf = opened.enter_context(socket.socket())
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", port))
        with contextlib.suppress(OSError):
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)  # about 20 MB of answers
        slow = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
        slow.sendall(b"POST /v1/detect?name=a.png HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        for client, head in zip(clients, heads, strict=True):
            client.settimeout(30)
            client.sendall(head)
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                read(client)
        wait_for(lambda: _cut(deaf))
        slow.sendall(b"hello")
        slow.settimeout(30)
        assert slow.recv(20).startswith(b"HTTP/1.1 422")


def test_a_crowd_of_idle_connections_keeps_nobody_out(
    model: DTN, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_, "CONNECTIONS", 4)
    with serving(TorchScorer(model)) as port, contextlib.ExitStack() as crowd:
        idle = [crowd.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(8)]
        assert judge(port, "face.jpg", files["face.jpg"])[0] == 200
        for client in idle[:4]:
            client.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""  # the oldest were closed
        idle[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert idle[-1].recv(15) == b"HTTP/1.1 200 OK"


def test_a_client_that_leaves_ends_the_work(model: DTN, files: dict[str, bytes]) -> None:
    scorer = Slow(model)
    scorer.wait = 0.3
    with serving(scorer, workers=1) as port:
        body = files["clip.mp4"]
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as client:
                head = f"POST /v1/detect?name=a.mp4 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
                wait_for(lambda: metric(port, "dtn_uploads_inside") >= 1)
        wait_for(lambda: metric(port, "dtn_uploads_inside") == 0)
        assert metric(port, 'dtn_requests_total{status="499"}') == 3
        assert judge(port, "face.jpg", files["face.jpg"])[0] == 200


# ------------------------------------------------------------------------------------------------ methods, origins


def test_head_and_options(port: int) -> None:
    for path in ("/", "/v1/about", "/openapi.json", "/healthz", "/metrics"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
        assert int(answer.headers["Content-Length"]) == len(ask(port, "GET", path)[1]) or path == "/metrics"
        connection.request("OPTIONS", path)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Allow"], answer.read()) == (204, "GET, HEAD, OPTIONS", b"")
    connection.request("OPTIONS", "/v1/jobs/x")
    assert connection.getresponse().headers["Allow"] == "DELETE, GET, HEAD, OPTIONS"
    connection.close()


def test_other_origins(model: DTN, port: int) -> None:
    def origin_of(port: int, method: str, origin: str) -> tuple[str | None, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        wish = {"Access-Control-Request-Method": "PUT"} if method == "OPTIONS" else {}
        connection.request(method, "/v1/about" if method == "GET" else "/v1/detect", headers={"Origin": origin, **wish})
        headers = connection.getresponse().headers
        connection.close()
        return headers["Access-Control-Allow-Origin"], headers["Access-Control-Allow-Methods"]

    assert origin_of(port, "GET", "https://a.org") == (None, None)
    assert origin_of(port, "OPTIONS", "https://a.org") == (None, None)
    with serving(TorchScorer(model), allow_origin=("https://a.org",)) as other:
        assert origin_of(other, "GET", "https://a.org")[0] == "https://a.org"
        assert origin_of(other, "GET", "https://b.org")[0] is None
        assert origin_of(other, "OPTIONS", "https://a.org") == ("https://a.org", "GET, POST, PUT, DELETE")
        assert origin_of(other, "OPTIONS", "https://b.org")[0] is None


# ------------------------------------------------------------------------------------------------ behind a proxy


def test_behind_a_path_prefix(model: DTN, files: dict[str, bytes]) -> None:
    """Behind a proxy that removes the prefix, and one that keeps it."""
    with serving(TorchScorer(model), root_path="/fakes") as inner:
        for strip in (True, False):
            with proxy(inner, "/fakes", strip) as port:
                assert b'<meta name="root" content="/fakes/">' in ask(port, "GET", "/fakes/")[1]
                assert ask(port, "GET", "/fakes/v1/about")[0] == 200
                assert json.loads(ask(port, "GET", "/fakes/openapi.json")[1])["servers"] == [{"url": "/fakes"}]
                assert ask(port, "POST", "/fakes/v1/detect?name=blank.png", files["blank.png"])[0] == 200
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", "/fakes/v1/jobs?name=blank.png", files["blank.png"])
                answer = connection.getresponse()
                assert (answer.status, json.loads(answer.read())["state"]) == (202, "queued")
                assert ask(port, "GET", answer.headers["Location"])[0] == 200
                connection.close()
        assert ask(inner, "GET", "/fakesv1/about")[0] == 404
        assert ask(inner, "GET", "/v1/about")[0] == 200


def _cut(client: socket.socket) -> bool:
    """Whether the server has ended a connection."""
    try:
        client.send(b"x")
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False
