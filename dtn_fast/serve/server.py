"""The HTTP server: uvicorn, with limits for connections that do nothing, and an end that answers what was accepted."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dtn_fast.errors import UsageError
from dtn_fast.serve.app import Service
from dtn_fast.serve.config import ServeConfig

IDLE = 10.0
"""Seconds in which the head of a request must arrive, and in which a client must read some of its answer."""
CONNECTIONS = 512
"""Number of open connections above which a new one ends the one that has been idle for longest."""
KEEP_ALIVE = 5
"""Seconds for which a connection without a further request is kept."""


class Connection(H11Protocol):
    """A connection that is closed when it is idle: it sends no complete head of a request, or reads no answer.

    uvicorn itself closes a connection only after an answer, and only until the first byte of the next request.
    """

    since = 0.0
    """Clock of the event loop at which it became idle."""
    _timer: asyncio.TimerHandle | None = None
    _unsent = 0

    @property
    def idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        opened = [other for other in self.connections if not other.transport.is_closing()]
        if len(opened) > CONNECTIONS:
            idle = [other for other in opened if isinstance(other, Connection) and other.idle]
            min(idle, key=lambda other: other.since).transport.abort()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._wait()
        super().pause_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless it comes after the beginning of another answer."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps({"error": f"{msg.rstrip('.')}; this server takes HTTP/1.1"}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if not self.idle:  # the body is damaged; its request has had its answer now
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.since = self.loop.time()
        self._unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(IDLE, self._look)

    def _look(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if 0 < unsent < self._unsent:
            self._wait()  # a slow reader
        elif unsent or self.idle:
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server that, on the first signal, refuses new uploads and goes on until the accepted ones are answered;
    on the second it ends at once."""

    def __init__(self, service: Service) -> None:
        super().__init__(uvicorn.Config(
            service.app, http=Connection, ws="none", log_level="error", timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=KEEP_ALIVE,
        ))  # fmt: skip
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.ending:
            super().handle_exit(sig, frame)
        self.service.ending = self.service.ending or time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.service.ended


def listen(config: ServeConfig) -> tuple[socket.socket, str]:
    """The listening socket and its address.  Raises UsageError when the address is not to be had."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listening = socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (while")[0]
        raise UsageError(f"--host {config.host} --port {config.port}: {reason}; choose another") from error
    host, port = listening.getsockname()[:2]
    return listening, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
