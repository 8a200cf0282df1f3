"""Addresses and patience of the client for Triton Inference Server; tests/export has the tests with a real one."""

from __future__ import annotations

import http.server
import socket
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small import SMALL
from triton_server import free_ports
from tritonclient.utils import InferenceServerException

from dtn_fast.bench.server import Point, best
from dtn_fast.cli.detect import detect
from dtn_fast.errors import DtnError, DtnWarning, UsageError
from dtn_fast.runtime import Runtime, load_scorer, triton_server
from dtn_fast.runtime.triton_server import Connection, Refused, Served, TritonScorer, Unreachable, parse_address

FACTS = {"dtn_config": SMALL.to_json(), "notice": "a notice", "weights": "w"}


class Server:
    """What a stand-in server does with each call, in turn: an error to raise, or the facts that it answers with."""

    def __init__(self, *events: Exception | Served) -> None:
        self.events, self.connections = list(events), 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()

    class Connection:
        def __init__(self, address: object) -> None:
            server.connections += 1

        def describe(self) -> Served:
            event = server.events.pop(0)
            if isinstance(event, Exception):
                raise event
            return event

        def infer(self, crops: np.ndarray, outputs: list[str]) -> list[np.ndarray]:
            self.describe()
            assert outputs == ["logits", "novelty"]
            return [np.full((len(crops), 2), crops.mean(), np.float32), np.full((len(crops), 1), 1.5, np.float32)]

    monkeypatch.setattr(triton_server, "Connection", Connection)
    monkeypatch.setattr(triton_server, "CONNECTIONS", 1)
    monkeypatch.setattr(triton_server, "FIRST_PAUSE", 1e-6)
    return server


def test_addresses() -> None:
    for text, expected in (
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/dtn"),
        ("grpc://[::1]:8001/faces/", "grpc://[::1]:8001/faces"),
        (str(Path("http://host:80/m")), "http://host:80/m"),  # a path has one slash
    ):
        assert str(parse_address(text)) == expected
    for text in ("https://host:1", "http://host", "http://a:1/b/c", "grpcs://h:1", "http://user@h:1", "http://h:1/ x"):
        with pytest.raises(UsageError, match="not a server's address; write http://host:8000/model"):
            load_scorer(text)


def test_options_of_files_are_not_for_servers_and_the_reverse(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device cpu: not for http://h:1, a server"):
        load_scorer("http://h:1", Runtime(device="cpu"))
    with pytest.raises(UsageError, match=r"--patience 3: not for .*m.onnx, a .onnx file"):
        load_scorer(tmp_path / "m.onnx", Runtime(patience=3))
    with pytest.raises(UsageError, match="--patience -1"):
        Runtime(patience=-1)


@pytest.mark.parametrize("given", [{}, {"model": Path("m.onnx"), "server": "http://h:1"}])
def test_detect_takes_a_model_or_a_server(given: dict) -> None:
    with pytest.raises(UsageError, match="--model, or the server that holds it with --server: one of the two"):
        detect(["x.png"], **given)


def test_a_server_is_tried_again_and_then_named(stand_in: Server) -> None:
    here, gone = Served(8, ("logits", "score", "novelty"), FACTS), Unreachable("Connection refused")
    stand_in.events = [gone, gone, here]
    with pytest.warns(DtnWarning, match="http://h:1: cannot be reached .Connection refused.; trying again for 5 s"):
        scorer = TritonScorer(parse_address("http://h:1"), 5)
    assert (scorer.batch_size, scorer.notice, scorer.weights, scorer.config) == (8, "a notice", "w", SMALL)
    crops = np.full((20, 64, 64, 3), 7, np.uint8)
    # three batches; the server goes away in the second, and the first try to connect again fails too
    stand_in.events = [here, gone, gone, here, here, here]
    assert np.array_equal(scorer.outputs(crops), [[7, 7, 1.5]] * 20)
    assert not stand_in.events
    stand_in.events = [gone] * 100
    scorer.patience = 0.1
    with pytest.raises(DtnError, match=r"http://h:1: no answer in 0.1 s of tries \(Connection refused\); start the"):
        scorer.logits(crops)
    assert len(stand_in.events) > 80  # pauses grow
    stand_in.events = [here._replace(parameters={**FACTS, "weights": "others"})]
    with pytest.raises(DtnError, match="http://h:1/dtn: serves another model than before"):
        scorer.logits(crops)


def test_features_of_a_temporal_head_are_not_asked_for(stand_in: Server) -> None:
    """No temporal head runs here: their columns would be taken for the novelty."""
    stand_in.events = [Served(8, ("logits", "score", "features", "novelty"), FACTS)]
    assert TritonScorer(parse_address("http://h:1"), 5)._names == ["logits", "novelty"]


@pytest.fixture
def web_page() -> Iterator[int]:
    """Port of a server that knows nothing of models."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_no_server_of_models_is_named(web_page: int) -> None:
    with pytest.raises(UsageError, match=f"http://127.0.0.1:{web_page}: answers, but not as Triton Inference Server"):
        load_scorer(f"http://127.0.0.1:{web_page}", Runtime(patience=0))
    (port,) = free_ports(1)
    for scheme in ("http", "grpc"):
        with pytest.raises(DtnError, match=f"{scheme}://127.0.0.1:{port}: no answer in 0 s of tries .*refused"):
            load_scorer(f"{scheme}://127.0.0.1:{port}/dtn", Runtime(patience=0))


def test_an_answer_without_its_values_is_refused() -> None:
    """A server of 2.51 with numpy 2 in its Python states a shape and sends nothing."""
    connection = Connection(parse_address("http://h:1"))
    answer = types.SimpleNamespace(as_numpy=lambda _: np.empty(0).reshape(1, 2))
    connection._client = types.SimpleNamespace(infer=lambda *_, **__: answer)
    with pytest.raises(Refused, match=r"http://h:1/dtn: its answer has not the shape that it states .*numpy<2"):
        connection.infer(np.zeros((1, 64, 64, 3), np.uint8), ["logits"])


@pytest.mark.parametrize(("raised", "seen", "text"), [
    (ConnectionResetError(104, "Connection reset by peer"), Unreachable, "Connection reset by peer"),
    (TimeoutError("timed out"), Unreachable, "timed out"),
    (ValueError("half an answer"), Unreachable, "half an answer"),
    (socket.gaierror(socket.EAI_AGAIN, "try again"), Unreachable, "try again"),
    (socket.gaierror(socket.EAI_NONAME, "not known"), UsageError, "http://h:1: no such host .not known"),
    (InferenceServerException("stopping", "503"), Unreachable, "stopping"),
    (InferenceServerException("gone", "StatusCode.UNAVAILABLE"), Unreachable, "gone"),
    (InferenceServerException("unexpected shape", "400"), Refused, "^http://h:1/dtn: unexpected shape$"),
])  # fmt: skip
def test_what_may_be_tried_again(raised: Exception, seen: type[Exception], text: str) -> None:
    def infer(*_: object, **__: object) -> None:
        raise raised

    connection = Connection(parse_address("http://h:1"))
    connection._client = types.SimpleNamespace(infer=infer)
    with pytest.raises(seen, match=text):
        connection.infer(np.zeros((1, 64, 64, 3), np.uint8), ["logits"])


def test_the_best_point_keeps_its_latency() -> None:
    points = [Point(batch, 1, speed, p95, p95, p95, 0, 1, batch) for batch, speed, p95 in ((1, 50, 9), (8, 200, 90))]
    assert "50.0 crops/s at batch 1, 1 requests at a time" in best(points, 10)
    assert "200.0 crops/s at batch 8" in best(points, 90)
    assert best(points, 5) == "no point has a p95 of at most 5 ms; the least is 9.0 ms"
