"""``dtn-fast serve``: a web page and an HTTP API in front of one scorer.

An upload is streamed into a private temporary file, waits in a bounded queue for one of a few workers, and is deleted
when its verdict is known.  Only the routes below exist: nothing is ever read from a path that a client names.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import html
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.limits import limits_of
from dtn_fast.detect.report import sentences
from dtn_fast.model.card import remarks
from dtn_fast.packages import require
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.edge import Edge, Receive, Refused
from dtn_fast.serve.jobs import Jobs, refusal
from dtn_fast.serve.judging import Judge, Progress
from dtn_fast.serve.openapi import document
from dtn_fast.serve.uploads import Upload
from dtn_fast.version import __version__


class Service:
    """The ASGI application ``app`` and what stands behind it.  Raises UsageError when its packages are missing."""

    def __init__(self, scorer: Scorer, config: ServeConfig, detection: DetectConfig = DetectConfig()) -> None:
        for package in ("starlette", "uvicorn", "python_multipart"):
            require(package)
        self.config, self.detection, self.scorer = config, detection, scorer
        self.judge = Judge(scorer, config, detection)
        self.jobs = Jobs(self.judge)
        self.ending = 0.0
        """Clock (monotonic) at which the end was asked for: no further upload is accepted; 0: not yet."""
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        self._page = page.replace("{{root}}", html.escape(f"{config.root_path}/" if config.root_path else ""))
        self.app = self._app()

    @property
    def ended(self) -> bool:
        """Whether nothing is left to wait for: uploads are answered; jobs are done and fetched, or out of time."""
        late = time.monotonic() - self.ending > self.config.timeout
        return bool(self.ending) and not self.judge.direct.inside and (late or not self._jobs_left)

    @property
    def _jobs_left(self) -> bool:
        return self.jobs.awaited or self.judge.jobs.inside > 0

    def _app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Route

        routes = [
            Route("/", self.page),
            Route("/openapi.json", self.openapi),
            Route("/v1/about", self.about),
            Route("/v1/detect", self.detect, methods=["POST", "PUT"]),
            Route("/v1/jobs", self.add_job, methods=["POST", "PUT"]),
            Route("/v1/jobs/{id}", self.job, methods=["GET", "DELETE"]),
            Route("/v1/jobs/{id}/result", self.result),
            Route("/healthz", self.healthy),
            Route("/readyz", self.ready),
            Route("/metrics", self.metrics),
        ]
        cors = Middleware(
            CORSMiddleware, allow_origins=self.config.allow_origin, allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"], expose_headers=["Location", "Retry-After"],
        )  # fmt: skip
        handlers: dict[Any, Any] = {Refused: self._refuse, HTTPException: self._no_route, 500: self._broken}
        app = Starlette(
            routes=routes, lifespan=self._lifespan, middleware=[cors] if self.config.allow_origin else [],
            exception_handlers=handlers,
        )  # fmt: skip
        app.router.redirect_slashes = False
        return Edge(app, self.config.root_path, _headers(self._page))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        yield
        await self.jobs.close()
        await asyncio.to_thread(self.judge.close)

    # -------------------------------------------------------------------------------------------- refusals

    async def _refuse(self, _: Any, error: Refused) -> Any:
        return _json({"error": str(error)}, error.status, error.headers)

    async def _broken(self, _: Any, error: Exception) -> Any:
        return _json({"error": "the server failed on this request; see its log"}, 500)

    async def _no_route(self, request: Any, error: Any) -> Any:
        """The answer to a path or method that does not exist, and to OPTIONS."""
        headers = dict(error.headers or {})
        if error.status_code != 405:
            return _json({"error": f"{request.url.path[:64]}: no such page; see openapi.json"}, error.status_code)
        headers["Allow"] = ", ".join(sorted({*headers["Allow"].split(", "), "OPTIONS"}))
        if request.method == "OPTIONS":
            return _json(None, 204, headers)
        return _json({"error": f"{request.method}: this page takes {headers['Allow']}"}, 405, headers)

    # -------------------------------------------------------------------------------------------- routes

    async def page(self, _: Any) -> Any:
        from starlette.responses import HTMLResponse

        return HTMLResponse(self._page)

    async def openapi(self, _: Any) -> Any:
        return _json(document(self.config.root_path))

    async def about(self, _: Any) -> Any:
        card, scorer = self.scorer.config.card, self.scorer
        facts = {"version": __version__, "runtime": scorer.name, "notice": scorer.notice,
                 "remarks": sentences(remarks(card)), "max_mb": self.config.max_mb,
                 "analysed": self.detection.analysed}  # fmt: skip
        kinds = (("pictures", False), ("videos", True))
        clips = scorer.clips is not None
        limits = {kind: limits_of(card, self.detection, moving, clips).to_json() for kind, moving in kinds}
        formats = {"formats": sorted(self.judge.formats), "video_formats": sorted(self.judge.videos)}
        return _json({**facts, **limits, **formats})

    async def detect(self, request: Any) -> Any:
        with self._counted(200), self.judge.direct.place():
            upload = await self.judge.uploads.receive(request)
            try:
                return _json(await self._verdict(upload, request.receive))
            finally:
                upload.path.unlink(missing_ok=True)

    async def _verdict(self, upload: Upload, receive: Receive) -> bytes:
        """The verdict of a worker; its work ends when the client leaves."""
        judge, progress = self.judge, Progress(self.config.timeout, "send a long video as a job, to v1/jobs")
        progress.begin = time.monotonic()
        verdict = functools.partial(judge.verdict, upload, progress, judge.direct)
        work = asyncio.get_running_loop().run_in_executor(judge.direct.pool, verdict)
        gone = asyncio.create_task(_left(receive))
        try:
            first: list[asyncio.Future[Any]] = [work, gone]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                progress.stopped.set()
            return await work
        finally:
            progress.stopped.set()  # also when this task is cancelled
            gone.cancel()

    async def add_job(self, request: Any) -> Any:
        with self._counted(202), contextlib.ExitStack() as place:
            place.enter_context(self.judge.jobs.place())
            upload = await self.judge.uploads.receive(request)
            job = self.jobs.add(upload, place.pop_all())
            return _json(job.to_json(), 202, {"Location": f"{self.config.root_path}/v1/jobs/{job.id}"})

    async def job(self, request: Any) -> Any:
        number = request.path_params["id"]
        found = self.jobs.remove(number) if request.method == "DELETE" else self.jobs.get(number)
        return _json(found.to_json())

    async def result(self, request: Any) -> Any:
        return _json(self.jobs.result(request.path_params["id"]))

    async def healthy(self, _: Any) -> Any:
        return _text(b"ok\n")

    async def ready(self, _: Any) -> Any:
        state = "ending" if self.ending else "busy" if self.judge.direct.full else "ready"
        return _text(f"{state}\n".encode(), 200 if state == "ready" else 503)

    async def metrics(self, _: Any) -> Any:
        return _text(self.judge.metrics.text(), kind="text/plain; version=0.0.4; charset=utf-8")

    @contextlib.contextmanager
    def _counted(self, status: int) -> Iterator[None]:
        """Counts an upload by the status of its answer: ``status``, or that of the refusal that every error becomes."""
        try:
            if self.ending:
                raise Refused(503, "the server is ending; try again in a few seconds", retry_after="5")
            yield
        except Exception as error:
            refused = refusal(error)
            status = refused.status
            raise refused from None
        finally:
            self.judge.metrics.requests.labels(str(status)).inc()


async def _left(receive: Receive) -> None:
    """Ends when the client leaves; called once the request's body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    """An answer of JSON; ``content``: a value, or JSON as bytes, or None for no body."""
    from starlette.responses import JSONResponse, Response

    if isinstance(content, bytes):
        return Response(content, status, headers, "application/json")
    return Response(None, status, headers) if content is None else JSONResponse(content, status, headers)


def _text(content: bytes, status: int = 200, kind: str = "text/plain; charset=utf-8") -> Any:
    from starlette.responses import Response

    return Response(content, status, {"Content-Type": kind})


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
