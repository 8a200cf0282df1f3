"""The outermost layer of the service: one form of refusal, which every client sees.

A client that is still sending when its connection is closed loses the answer.  A refusal is therefore sent at once and
completely, and then the rest of the upload is read and thrown away, for a while, before the connection is closed.  A
client that waits for leave to send (``Expect: 100-continue``) is refused without it, since the server gives leave when
the application first reads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from dtn_fast.errors import DtnError

DRAIN, SILENCE = 30.0, 5.0
"""Seconds for which the rest of a refused upload is read: in all, and while nothing comes."""
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(DtnError):
    """A request that gets no verdict, with the HTTP status and the reason."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Edge:
    """ASGI layer that removes the path prefix, if the proxy has left it, and ends refused uploads as said above."""

    def __init__(self, app: Any, prefix: str, headers: Mapping[str, str]) -> None:
        self.app, self.prefix = app, prefix
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        """Headers of every answer."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path: str = scope["path"]
        if self.prefix and (path + "/").startswith(self.prefix + "/"):
            scope = {**scope, "path": path[len(self.prefix) :] or "/"}
        sent = dict(scope["headers"])
        unread = sent.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in sent

        async def heard() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                close = [(b"connection", b"close")] if unread else []
                message = {**message, "headers": [*message.get("headers", ()), *self.headers, *close]}
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _drain(heard, lambda: unread)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, heard, told)


async def _drain(receive: Receive, unread: Callable[[], bool]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN):
            while unread():
                await asyncio.wait_for(receive(), SILENCE)
