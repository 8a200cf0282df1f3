"""``dtn-fast serve`` under load, a tenth of it hostile: ``dtn-fast bench serve --model MODEL``.

A server is started on loopback and asked by concurrent clients.  Every request has one right answer: the verdict that
the same upload gets alone, a refusal with its status and words, or the end of a connection that does nothing.  No
answer counts as dropped, another one as wrong; an upload that is refused with status 503 is sent again.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dtn_fast.bench.faces import portrait
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import UsageError

LIMIT_MB = 2
"""Upload limit of the server."""
ANSWER_WITHIN = 120.0
"""Seconds after which a request without an answer counts as dropped."""
WARM = 0.1
"""Share of the requests after which memory is measured for the first time."""
RARE = 100
"""Number of hostile requests of which one is a picture of 64 million pixels, which takes seconds."""
TICK = 0.5
"""Seconds between two bytes of a slow client, and between two looks at the server's memory."""


class Request(NamedTuple):
    """A kind of request, and its right answer."""

    kind: str
    path: str
    body: bytes = b""
    status: int = 200
    words: str = ""
    """Words of the error, or the verdict."""
    way: str = "whole"
    """``whole``, ``chunked``, ``form``, ``job``; ``slow``: byte after byte; ``half-open``: a part of the head, then
    nothing; ``leaves``: all but the end, then the client is gone; ``raw``: the body is everything that is sent."""
    hostile: bool = True


@dataclass
class Tally:
    """What became of one kind of request."""

    seconds: list[float] = field(default_factory=list)
    """Of those that were answered rightly."""
    again: int = 0
    dropped: int = 0
    wrong: list[str] = field(default_factory=list)


class Server:
    """A server process on loopback."""

    def __init__(self, model: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "dtn_fast", "serve", str(model), "--port", "0", "--max-mb", str(LIMIT_MB)]
        self._log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http://127.0.0.1:" not in line:
            self.process.wait()
            raise UsageError(f"--model {model}: the server does not start ({self.log()[-300:].strip()})")
        self.port = int(line.split("http://127.0.0.1:")[1].split()[0])

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def memory(self) -> float:
        """Resident memory in MB; 0 where /proc is missing."""
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3
        return 0.0

    def end(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ANSWER_WITHIN)


@contextmanager
def running(model: Path) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(model, Path(folder))
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def requests() -> tuple[list[Request], list[Request]]:
    """Good and hostile kinds of requests; the last hostile one is the rare one."""
    face = portrait(256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.fromarray(face).save(folder / "face.jpg")
        Image.fromarray(np.zeros((90, 70, 3), np.uint8)).save(folder / "blank.png")
        Image.fromarray(np.zeros((8100, 8100), np.uint8)).save(folder / "over.png")
        Image.fromarray(np.zeros((8000, 8000), np.uint8)).save(folder / "large.png")
        write_video(folder / "clip.mp4", [face, np.roll(face, 4, 1), np.roll(face, 8, 1)], fps=2)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    picture, clip = files["face.jpg"], files["clip.mp4"]
    ask = "/v1/detect?name="
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n--x--\r\n'
    good = [
        Request("picture", ask + "face.jpg", picture),
        Request("picture, chunked", ask + "face.jpg", picture, way="chunked"),
        Request("form", "/v1/detect", part % (b"face.jpg", picture), way="form"),
        Request("no face", ask + "blank.png", files["blank.png"], words="no face"),
        Request("video", ask + "clip.mp4", clip), Request("job", "/v1/jobs?name=clip.mp4", clip, way="job"),
    ]  # fmt: skip
    big, endings = bytes(LIMIT_MB * 1_000_000 + 1), "give the file's name with one of"
    hostile = [
        Request("truncated video", ask + "cut.mp4", clip[: len(clip) // 3], 422, "cannot read this video"),
        Request("truncated picture", ask + "cut.jpg", picture[: len(picture) // 2], 422, "cannot read this image"),
        Request("text as picture", ask + "text.png", b"hello", 422, "cannot read this image"),
        Request("playlist as video", ask + "list.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", 422, "cannot read"),
        Request("bomb", ask + "over.png", files["over.png"], 422, "over the limit of 64000000"),
        Request("name of a path", ask + "../../etc/passwd", b"x", 415, endings),
        Request("path in a form", "/v1/detect", part % (b"../../../etc/cron.d/x", b"x"), 415, endings, "form"),
        Request("wrong type", ask + "notes.txt", b"hello", 415, endings),
        Request("too large", ask + "big.mp4", big, 413, "larger than the limit"),
        Request("too large, chunked", ask + "big.mp4", big, 413, "larger than the limit", "chunked"),
        Request("empty", ask + "empty.jpg", b"", 400, "the upload is empty"),
        Request("damaged form", "/v1/detect", b"--x\r\nhello", 400, "the form", "form"),
        Request("no HTTP", "", b"hello\r\n\r\n", 400, "this server takes HTTP/1.1", "raw"),
        Request("slow", ask + "slow.jpg", picture, 408, "the upload came at less than", "slow"),
        Request("half-open", "", b"POST /v1/detect?name=a.jpg HTTP/1.1\r\nHost:", 0, "", "half-open"),
        Request("leaves", ask + "clip.mp4", clip, 0, "", "leaves"),
        Request("large picture", ask + "large.png", files["large.png"], words="no face"),
    ]
    return [request._replace(hostile=False) for request in good], hostile


def sequence(count: int, good: list[Request], hostile: list[Request]) -> Iterator[Request]:
    """``count`` requests, every tenth of them hostile."""
    usual, bad = itertools.cycle(good), itertools.cycle(hostile[:-1])
    for number in range(count):
        ordinary = number % 10 != 9
        rare = number // 10 % RARE == RARE // 2
        yield next(usual) if ordinary else hostile[-1] if rare else next(bad)


# ------------------------------------------------------------------------------------------------ clients


async def answer_to(port: int, request: Request) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer; status 0: the server closed the connection, as it is to.  Raises OSError, EOFError
    or TimeoutError when there is no answer."""
    if request.way == "job":
        return await _job(port, request)
    async with asyncio.timeout(ANSWER_WITHIN):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sending = asyncio.create_task(_send(writer, request))
        try:
            if request.way == "leaves":
                await sending
                return 0, {}
            if request.way == "half-open":
                return (0, {}) if await _closed(reader) else (1, {})
            return await _answer(reader)
        finally:
            sending.cancel()
            with suppress(OSError, asyncio.CancelledError):
                await sending
            writer.transport.abort() if request.way == "leaves" else writer.close()


async def _send(writer: asyncio.StreamWriter, request: Request) -> None:
    with suppress(ConnectionError):  # after a refusal the server need not read on
        if request.way in ("raw", "half-open"):
            writer.write(request.body)
            return await writer.drain()
        kind = "multipart/form-data; boundary=x" if request.way == "form" else "application/octet-stream"
        chunked = request.way == "chunked"
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(request.body)}"
        writer.write(f"POST {request.path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{length}\r\n\r\n".encode())
        step = 1 if request.way == "slow" else 65536
        for place in range(0, len(request.body) - (request.way == "leaves"), step):
            piece = request.body[place : place + step]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            if request.way == "slow":
                await asyncio.sleep(TICK)
        if chunked:
            writer.write(b"0\r\n\r\n")


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    status = int((await reader.readuntil(b"\r\n")).split()[1])
    length = 0
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, json.loads(await reader.readexactly(length) or b"{}")


async def _closed(reader: asyncio.StreamReader) -> bool:
    with suppress(ConnectionError):
        return not await reader.read(1)
    return True


async def _job(port: int, request: Request) -> tuple[int, dict[str, Any]]:
    status, job = await answer_to(port, request._replace(way="whole"))
    if status != 202:
        return status, job
    path, deadline = f"/v1/jobs/{job['id']}", time.monotonic() + ANSWER_WITHIN
    while time.monotonic() < deadline:
        if (await _get(port, path))[1]["state"] not in ("queued", "running"):
            return await _get(port, f"{path}/result")
        await asyncio.sleep(0.1)
    raise TimeoutError


async def _get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    return await answer_to(port, Request("get", "", f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), way="raw"))


async def load(port: int, wanted: Iterator[Request], clients: int, deadline: float, done: Any) -> None:
    """Sends ``wanted`` from ``clients`` clients, and slow and half-open ones from as many others; ``done`` is called
    with each request, the answer or error, and its seconds."""
    quick, patient = asyncio.Semaphore(clients), asyncio.Semaphore(clients)

    async def one(request: Request, place: asyncio.Semaphore) -> None:
        try:
            while True:
                start = time.monotonic()
                try:
                    answer: Any = await answer_to(port, request)
                except (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError) as error:
                    answer = error
                again = isinstance(answer, tuple) and answer[0] == 503
                done(request, answer, time.monotonic() - start)
                if not again:
                    return
                await asyncio.sleep(1)
        finally:
            place.release()

    async with asyncio.TaskGroup() as group:
        for request in wanted:
            if time.monotonic() > deadline:
                return
            place = patient if request.way in ("slow", "half-open") else quick
            await place.acquire()
            group.create_task(one(request, place))


# ------------------------------------------------------------------------------------------------ the suite


def measure_serve(model: Path, count: int, clients: int, budget: float) -> int:
    """Runs the suite and prints its table; the number of dropped and wrong answers."""
    good, hostile = requests()
    tallies: dict[str, Tally] = {request.kind: Tally() for request in (*good, *hostile)}
    right: dict[str, tuple[str, float | None]] = {}
    memory: list[float] = []
    with running(model) as server:
        for request in (*good, hostile[-1]):
            status, found = asyncio.run(answer_to(server.port, request))
            if status != 200 or request.words not in found["verdict"]:
                raise UsageError(f"{request.kind}: answered {status} {str(found)[:200]}; see that the model serves")
            right[request.kind] = found["verdict"], found["score"]

        def done(request: Request, answer: Any, seconds: float) -> None:
            tally = tallies[request.kind]
            if isinstance(answer, BaseException):
                tally.dropped += 1
                tally.wrong += [f"{request.kind}: {type(answer).__name__} {answer}"][: tally.dropped == 1]
            elif answer[0] == 503:
                tally.again += 1
            elif fault := _fault(request, answer, right.get(request.kind)):
                tally.wrong.append(fault)
            else:
                tally.seconds.append(seconds)

        deadline, start = time.monotonic() + budget, time.monotonic()
        wanted = sequence(count, good, hostile)
        warm = itertools.islice(wanted, max(int(WARM * count), 1))
        asyncio.run(load(server.port, warm, clients, deadline, done))
        level = server.memory()
        asyncio.run(_watched(server, memory, load(server.port, wanted, clients, deadline, done)))
        elapsed, last = time.monotonic() - start, server.memory()
        code = server.end()
        log = server.log()
    return _print(tallies, elapsed, [level, *memory, last], code, log, count)


def _fault(request: Request, answer: tuple[int, dict[str, Any]], right: tuple[str, float | None] | None) -> str:
    """How an answer differs from the right one; empty: it does not."""
    status, found = answer
    if status != request.status:
        return f"{request.kind}: status {status} in place of {request.status}: {str(found)[:120]}"
    if right is None:
        return "" if request.words in found.get("error", "") else f"{request.kind}: {found}"
    verdict, score = found["verdict"], found["score"]
    same = verdict == right[0] and (score is right[1] is None or abs(score - right[1]) < 1e-4)
    return "" if same else f"{request.kind}: {verdict} {score} in place of {right[0]} {right[1]}"


async def _watched(server: Server, memory: list[float], work: Any) -> None:
    """Does ``work`` and notes the server's memory meanwhile."""

    async def look() -> None:
        while True:
            memory.append(server.memory())
            await asyncio.sleep(TICK)

    looking = asyncio.create_task(look())
    try:
        await work
    finally:
        looking.cancel()


def _print(tallies: dict[str, Tally], elapsed: float, memory: list[float], code: int, log: str, count: int) -> int:
    total = collections.Counter[str]()
    print(f"{'request':20} {'right':>6} {'again':>6} {'dropped':>8} {'wrong':>6} {'p50 ms':>8} {'p95':>8} {'p99':>8}")
    for kind, tally in tallies.items():
        wrong = len(tally.wrong) - bool(tally.dropped)
        times = "".join(f" {1e3 * t:8.0f}" for t in np.percentile(tally.seconds or [0], (50, 95, 99)))
        print(f"{kind:20} {len(tally.seconds):6} {tally.again:6} {tally.dropped:8} {wrong:6}{times}")
        total.update(right=len(tally.seconds), again=tally.again, dropped=tally.dropped, wrong=wrong)
    finished = total["right"] + total["dropped"] + total["wrong"]
    print(f"{finished} of {count} requests in {elapsed:.1f} s, {finished / elapsed:.1f} requests/s; {total['dropped']} "
          f"dropped, {total['wrong']} wrong, {total['again']} sent again after status 503")  # fmt: skip
    warm, last = memory[0], memory[-1]
    steps = " ".join(f"{memory[round(place)]:.0f}" for place in np.linspace(0, len(memory) - 1, 10))
    print(f"memory: {warm:.0f} MB after warm-up, {last:.0f} MB at the end ({last / max(warm, 1):.2f} times), "
          f"{max(memory):.0f} MB at most; on the way: {steps}")  # fmt: skip
    faults = [fault for tally in tallies.values() for fault in tally.wrong[:3]]
    faults += [f"the server's exit code is {code}"] * bool(code)
    faults += [f"the server's log: {log[-2000:]}"] * ("Traceback" in log)
    print(*faults, sep="\n")
    return len(faults)
