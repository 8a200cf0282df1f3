"""``dtn-fast serve``: a web page and an HTTP API in front of one scorer.

An upload is streamed into a private temporary file, waits in a bounded queue for one of a few workers, and is deleted
when its verdict is sent.  Only the routes below exist: nothing is ever read from a path that a client names.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.limits import limits_of
from dtn_fast.detect.pipeline import finder_of
from dtn_fast.detect.report import sentences
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.files import json_text
from dtn_fast.model.card import remarks
from dtn_fast.packages import require
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.serve.batching import MicroBatcher
from dtn_fast.serve.config import ServeConfig
from dtn_fast.version import __version__

DRAIN = 32_000_000
"""Maximum number of bytes of a refused upload that are still read."""


class Refused(DtnError):
    """A request that gets no verdict, with the HTTP status and the reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def create_app(scorer: Scorer, config: ServeConfig = ServeConfig(), detection: DetectConfig = DetectConfig()) -> Any:
    """The ASGI application.  Raises UsageError when its packages are not installed."""
    require("starlette")
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    judge = Judge(scorer, config, detection)
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = _headers(page)

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def about(_: Request) -> Response:
        limits = {"max_mb": config.max_mb, "analysed": detection.analysed}
        kinds = (("pictures", False), ("videos", True))
        limits |= {kind: limits_of(scorer.config.card, detection, moving).to_json() for kind, moving in kinds}
        facts = {"version": __version__, "runtime": scorer.name, "notice": scorer.notice,
                 "remarks": sentences(remarks(scorer.config.card))}  # fmt: skip
        return JSONResponse({**facts, **limits, "formats": sorted(judge.formats)}, headers=headers)

    async def detect(request: Request) -> Response:
        try:
            with judge.admitted():
                found = await judge.upload(request)
        except Exception as error:
            if not isinstance(error, Refused):
                logging.getLogger(__name__).exception("detection on an upload failed")
            reason = str(error) if isinstance(error, DtnError) else "the server failed on this upload; see its log"
            refused = error if isinstance(error, Refused) else Refused(500, reason)
            judge.metrics.requests.labels(str(refused.status)).inc()
            await _drain(request)
            again = {"Retry-After": "5"} if refused.status == 503 else {}
            return JSONResponse({"error": str(refused)}, refused.status, {**headers, **again, "Connection": "close"})
        judge.metrics.requests.labels("200").inc()
        return Response(json_text(found), headers=headers, media_type="application/json")

    async def healthy(_: Request) -> Response:
        return PlainTextResponse("ok\n", headers=headers)

    async def ready(_: Request) -> Response:
        full = judge.inside >= config.workers + config.waiting
        return PlainTextResponse("busy\n" if full else "ready\n", 503 if full else 200, headers)

    async def metrics(_: Request) -> Response:
        return Response(judge.metrics.text(), headers={**headers, "Content-Type": "text/plain; version=0.0.4"})

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(judge.close)

    routes = [
        Route("/", home), Route("/v1/about", about), Route("/v1/detect", detect, methods=["POST", "PUT"]),
        Route("/healthz", healthy), Route("/readyz", ready), Route("/metrics", metrics),
    ]  # fmt: skip
    return Starlette(routes=routes, lifespan=lifespan)


async def _drain(request: Any) -> None:
    """Reads the rest of a refused upload for a while, since a client cut off while sending does not see the answer."""
    from starlette.requests import ClientDisconnect

    left = DRAIN
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(5):
            async for chunk in request.stream():
                left -= len(chunk)
                if left < 0:
                    return


def _headers(page: str) -> dict[str, str]:
    """Security headers: only the page's own script and style run, and nothing is fetched from other hosts."""
    own = {
        kind: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for kind, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    policy = f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; img-src data: blob:; "
    return {
        "Content-Security-Policy": policy + "connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    }  # fmt: skip


class Metrics:
    """Prometheus counters of one application."""

    def __init__(self, judge: Judge) -> None:
        prometheus = require("prometheus_client")

        self._registry = prometheus.CollectorRegistry()
        where = {"registry": self._registry}
        self.requests = prometheus.Counter("dtn_requests", "Uploads by the HTTP status of the answer",
                                           ["status"], **where)  # fmt: skip
        self.frames = prometheus.Counter("dtn_frames", "Frames analysed", **where)
        self.faces = prometheus.Counter("dtn_faces", "Faces scored", **where)
        self.verdicts = prometheus.Counter("dtn_verdicts", "Verdicts", ["verdict"], **where)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        help_text = "Seconds from the upload's end to its verdict"
        self.seconds = prometheus.Histogram("dtn_judge_seconds", help_text, buckets=buckets, **where)
        for name, text, value in (
            ("dtn_uploads_inside", "Uploads arriving, waiting or being judged", lambda: judge.inside),
            ("dtn_batches", "Batches run", lambda: judge.batcher.batches),
        ):
            prometheus.Gauge(name, text, **where).set_function(value)
        self._write = prometheus.generate_latest

    def text(self) -> bytes:
        return self._write(self._registry)


class Judge:
    """Admits uploads, stores and judges them."""

    def __init__(self, scorer: Scorer, config: ServeConfig, detection: DetectConfig) -> None:
        from dtn_fast.data.media import PICTURES, VIDEOS

        self.config, self.detection = config, detection
        self.formats = PICTURES | VIDEOS
        self.batcher = MicroBatcher(scorer)
        self.inside = 0
        self._pool = ThreadPoolExecutor(config.workers, "judging")
        self._finder = finder_of(scorer, detection)
        self._folder = tempfile.TemporaryDirectory(prefix="dtn-fast-")
        self._model = getattr(scorer, "model", None)
        self.metrics = Metrics(self)

    @contextlib.contextmanager
    def admitted(self) -> Any:
        """Holds a place for an upload.  Raises Refused when all are taken; call it only on the event loop."""
        if self.inside >= self.config.workers + self.config.waiting:
            raise Refused(503, "busy: all places are taken; try again in a few seconds")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def upload(self, request: Any) -> dict[str, Any]:
        """The verdict on a request's body.  Raises Refused when there is none."""
        name = request.query_params.get("name", "")
        suffix = Path(name[-64:]).suffix.lower()
        if suffix not in self.formats:
            raise Refused(415, f"?name={name[:64]}: give the file's name with one of {' '.join(sorted(self.formats))}")
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise Refused(415, "send the file itself as the body (curl -T FILE), not a form")
        limit = int(self.config.max_mb * 1e6)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise Refused(413, f"larger than the limit of {self.config.max_mb:g} MB")
        with tempfile.NamedTemporaryFile(dir=self._folder.name, suffix=suffix, buffering=0) as file:
            try:
                async with asyncio.timeout(self.config.timeout):
                    size = await self._receive(request, file, limit)
            except TimeoutError:
                raise Refused(408, f"the upload took longer than {self.config.timeout:g} s") from None
            except OSError as error:
                raise Refused(507, f"the upload cannot be stored ({error.strerror})") from error
            if not size:
                raise Refused(400, "the body is empty; send the file itself (curl -T FILE)")
            begin = time.monotonic()
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._pool, self._judge, Path(file.name), name, begin)
            self.metrics.seconds.observe(time.monotonic() - begin)
            return found

    async def _receive(self, request: Any, file: Any, limit: int) -> int:
        from starlette.requests import ClientDisconnect

        size = 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise Refused(413, f"larger than the limit of {self.config.max_mb:g} MB")
                file.write(chunk)
        except ClientDisconnect:
            raise Refused(400, "the upload was interrupted") from None
        return size

    def _judge(self, path: Path, name: str, begin: float) -> dict[str, Any]:
        from dtn_fast.detect.pipeline import detect
        from dtn_fast.detect.report import heat_uri, jpeg_uri
        from dtn_fast.detect.verdict import RULE

        def watch(_: int) -> None:
            if time.monotonic() - begin > self.config.timeout:
                raise Refused(504, f"no verdict within {self.config.timeout:g} s; send a shorter video")

        watch(0)  # the upload may have waited too long
        result = detect(path, self.batcher, self.detection, self._finder, watch, self._model)
        self.metrics.frames.inc(result.frames_read)
        self.metrics.faces.inc(sum(len(frame.faces) for frame in result.frames))
        if result.verdict == "failed":
            raise Refused(422, (result.error or "").replace(str(path), name))
        self.metrics.verdicts.labels(result.verdict).inc()
        pictures = [
            {**p.to_json(), "face": jpeg_uri(p.crop), "heat": None if p.heat is None else heat_uri(p)}
            for p in result.pictures
        ]
        facts = {"path": name, "rule": RULE, "notice": self.batcher.notice}
        error = result.error and result.error.replace(str(path), name)
        return {**result.to_json(), **facts, "error": error, "pictures": pictures}

    def close(self) -> None:
        self._pool.shutdown()
        self.batcher.close()
        self._folder.cleanup()


def run(scorer: Scorer, config: ServeConfig, detection: DetectConfig) -> None:
    """Serves until interrupted; uploads already accepted are still answered."""
    app = create_app(scorer, config, detection)
    uvicorn = require("uvicorn")
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (while")[0]
        raise UsageError(f"--host {config.host} --port {config.port}: {reason}; choose another") from error
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    known = [scorer.notice] if scorer.notice else []
    print("\n".join([f"{scorer.name} on http://{host}:{port} (web page at /, API at /v1/detect; Ctrl-C stops)", *known,
                     *sentences(remarks(scorer.config.card))]), flush=True)  # fmt: skip
    with listening:
        server = uvicorn.Server(uvicorn.Config(
            app, log_level="warning", timeout_keep_alive=5, limit_concurrency=256,
            timeout_graceful_shutdown=int(config.timeout) + 5,
        ))  # fmt: skip
        server.run(sockets=[listening])
