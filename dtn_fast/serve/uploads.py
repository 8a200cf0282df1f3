"""Uploads: a request's body, raw or a form, streamed into a private folder within limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from dtn_fast.packages import require
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.edge import Refused

FOLDER, LOCK = "dtn-fast-serve-", "lock"
"""Beginning of the names of servers' folders in the temporary folder, and the file that a living server locks in its
own."""
GRACE = 10.0
"""Seconds after which an upload must keep to the lowest rate."""
FORM = 65_536
"""Maximum number of bytes of a form around its file."""
LONGEST_NAME = 255
"""Longest name of an upload; of a longer one the end is kept."""


class Upload(NamedTuple):
    """A stored upload."""

    path: Path
    name: str
    """Name that the client gave, never a path that is read."""


class Uploads:
    """The private folder of a server's uploads, which is deleted with it."""

    def __init__(self, config: ServeConfig, formats: Collection[str]) -> None:
        sweep()
        self.config, self.formats = config, formats
        made = Path(tempfile.mkdtemp(prefix=f".{FOLDER}"))
        self._lock = FileLock(made / LOCK, blocking=False)
        self._lock.acquire()
        self.folder = made.rename(made.with_name(made.name[1:]))  # so that no folder of that name was ever unlocked
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    async def receive(self, request: Any) -> Upload:
        """Stores the body of a request; the caller deletes the file.  Raises Refused."""
        form = _form_of(request)
        name = request.query_params.get("name", "")
        suffix = self._suffix(name) if name or form is None else None
        limit = int(self.config.max_mb * 1e6)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit + FORM * (form is not None):
            raise self._too_large()
        handle, path = tempfile.mkstemp(dir=self.folder)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                size = await self._stream(request, form, file, limit)
            if form is not None:
                name = name or form.end()
                suffix = suffix or self._suffix(name)
            if not size:
                raise Refused(400, "the upload is empty; send the file itself (curl -T FILE)")
            return Upload(Path(path).rename(path + (suffix or "")), name[-LONGEST_NAME:])
        except OSError as error:
            Path(path).unlink(missing_ok=True)
            raise Refused(507, f"the upload cannot be stored ({error.strerror})") from error
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    async def _stream(self, request: Any, form: Form | None, file: Any, limit: int) -> int:
        """Writes the body, or the file of the form, into ``file``; returns its size."""
        from starlette.requests import ClientDisconnect

        size = total = 0
        begin, rate, longest = asyncio.get_running_loop().time(), 1e3 * self.config.min_rate, self.config.timeout
        due = lambda: begin + (min(longest, GRACE + total / rate) if rate else longest)
        try:
            async with asyncio.timeout_at(due()) as clock:
                async for chunk in request.stream():
                    total += len(chunk)
                    data = form.file_bytes(chunk) if form else chunk
                    size += len(data)
                    if size > limit or total > size + FORM:
                        raise self._too_large()
                    if form and form.name:
                        self._suffix(form.name)  # a wrong one is refused at once
                    file.write(data)
                    clock.reschedule(due())
        except TimeoutError:
            slow = f"came at less than {self.config.min_rate:g} kB/s"
            late = slow if due() < begin + longest else f"took longer than {longest:g} s"
            raise Refused(408, f"the upload {late}") from None
        except ClientDisconnect:
            raise Refused(400, "the upload was interrupted") from None
        return size

    def _too_large(self) -> Refused:
        return Refused(413, f"larger than the limit of {self.config.max_mb:g} MB")

    def _suffix(self, name: str) -> str:
        suffix = Path(name[-64:]).suffix.lower()
        if suffix not in self.formats:
            known = " ".join(sorted(self.formats))
            raise Refused(415, f"?name={name[:64]}: give the file's name with one of {known}")
        return suffix

    def close(self) -> None:
        self._remove()
        self._lock.release()


def sweep() -> None:
    """Deletes the folders of this user's servers that were killed: those whose lock nobody holds."""
    own = getattr(os, "getuid", lambda: 0)()
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError, Timeout):  # another server may delete it at the same time
            found, lock = folder.lstat(), folder / LOCK
            if stat.S_ISDIR(found.st_mode) and found.st_uid == own and stat.S_ISREG(lock.lstat().st_mode):
                with FileLock(lock, blocking=False):
                    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------ forms


class Form:
    """Parser of a multipart form, of which the field ``file`` is the upload and other fields are ignored."""

    def __init__(self, boundary: bytes) -> None:
        multipart = require("python_multipart.multipart")
        self.name = ""
        """Name of the file, once its part has begun."""
        self._options = multipart.parse_options_header
        self._header, self._value, self._begun, self._inside, self._ended = b"", b"", False, False, False
        self._data: list[bytes] = []
        self._parser = multipart.MultipartParser(boundary, {
            "on_header_field": self._on_header, "on_header_value": self._on_value, "on_header_end": self._on_header_end,
            "on_part_data": self._on_data, "on_part_end": self._on_part_end, "on_end": self._on_end,
        })  # fmt: skip

    def file_bytes(self, chunk: bytes) -> bytes:
        """The file's bytes in the next chunk of the body.  Raises Refused when the form is damaged."""
        try:
            self._parser.write(chunk)
        except ValueError as error:
            raise Refused(400, f"the form cannot be read ({error})") from None
        data, self._data = b"".join(self._data), []
        return data

    def end(self) -> str:
        """The file's name, once all chunks were read.  Raises Refused when the form is cut off or has no file."""
        if not self._ended:
            raise Refused(400, "the form is cut off")
        if not self._begun:
            raise Refused(400, "the form has no file in its field file; send one (curl -F file=@FILE)")
        return self.name

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = self._options(self._value)[1]
            if options.get(b"name") == b"file":
                if self._begun:
                    raise Refused(400, "the form has two files; send one per request")
                self._begun = self._inside = True
                self.name = options.get(b"filename", b"").decode(errors="replace")
        self._header = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._inside:
            self._data.append(data[start:end])

    def _on_part_end(self) -> None:
        self._inside = False

    def _on_end(self) -> None:
        self._ended = True


def _form_of(request: Any) -> Form | None:
    """The parser of a request whose body is a form; None: the body is the file.  Raises Refused."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/"):
        return None
    options = require("python_multipart.multipart").parse_options_header(kind)[1]
    try:
        return Form(options[b"boundary"])
    except (KeyError, ValueError):
        raise Refused(400, "the form has no usable boundary in its Content-Type") from None
