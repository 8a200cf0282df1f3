"""The load on ``dtn-fast serve``: its right answers, and that dropped and wrong ones are seen."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from dtn_fast import DTN
from dtn_fast.bench import run, serve
from dtn_fast.bench.serve import Request


def test_a_small_load(small: DTN, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.save_pretrained(tmp_path / "model")
    code = run.main(["serve", "--model", str(tmp_path / "model"), "--requests", "200"])
    said = capsys.readouterr().out
    assert "200 of 200 requests" in said, said
    assert "0 dropped, 0 wrong" in said, said
    assert "MB after warm-up" in said
    assert code == 0, said


def test_a_tenth_is_hostile_and_every_kind_comes() -> None:
    good, hostile = serve.requests()
    sent = list(serve.sequence(10_000, good, hostile))
    assert sum(request.hostile for request in sent) == 1000
    assert {request.kind for request in sent} == {request.kind for request in (*good, *hostile)}
    assert sum(request is hostile[-1] for request in sent) == 10


def test_dropped_and_wrong_answers_are_seen() -> None:
    """Four servers: one hangs up, one gives another status, one another verdict, one is busy at first."""
    replies = {
        "drops": [b""], "status": [b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}"],
        "verdict": [b'HTTP/1.1 200 OK\r\nContent-Length: 33\r\n\r\n{"verdict": "real", "score": 0.25}'[:-1]],
        "busy": [b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}",
                 b'HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{"verdict": "fake", "score": 0.75}'],
    }  # fmt: skip
    seen: dict[str, list[Any]] = {name: [] for name in replies}

    async def play() -> None:
        for name, answers in replies.items():
            turns = iter(answers)

            async def reply(reader: Any, writer: Any, turns: Any = turns) -> None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(next(turns))
                writer.close()

            server = await asyncio.start_server(reply, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            wanted = itertools.repeat(Request(name, "/v1/detect", b"x"), 1)
            await serve.load(port, wanted, 1, 1e12, lambda r, answer, _: seen[r.kind].append(answer))
            server.close()

    asyncio.run(play())
    request, right = Request("a", "/", words="fake"), ("fake", 0.75)
    assert isinstance(seen["drops"][0], EOFError)
    assert "status 500 in place of 200" in serve._fault(request, seen["status"][0], right)
    assert isinstance(seen["verdict"][0], ValueError)  # cut off in the middle
    assert [answer[0] for answer in seen["busy"]] == [503, 200]
    assert serve._fault(request, seen["busy"][1], right) == ""
    assert "real 0.25 in place of fake 0.75" in serve._fault(request, (200, {"verdict": "real", "score": 0.25}), right)
    assert "fake 0.7 in place of" in serve._fault(request, (200, {"verdict": "fake", "score": 0.7}), right)
    assert serve._fault(Request("b", "/", status=415, words="give"), (415, {"error": "other"}), None)


def test_a_model_that_does_not_serve(tmp_path: Path) -> None:
    with pytest.raises(serve.UsageError, match="serve needs --model"):
        run.main(["serve"])
    with pytest.raises(serve.UsageError, match="the server does not start"):
        run.main(["serve", "--model", str(tmp_path / "nothing")])
