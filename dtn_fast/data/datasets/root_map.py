"""Paths of a list that was written on another machine, mapped to folders of this one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dtn_fast.data.datasets.parsing import LONGEST, safe_path
from dtn_fast.errors import UsageError


class RootMap:
    """The ``--root-map`` pairs OLD=NEW: a listed path that begins with the folder OLD lies in the folder NEW.

    root: the dataset's root, which a relative NEW is below.  holds: whether a path below the root is there, to propose
    a pair.  Raises UsageError on a pair that is not OLD=NEW, or a NEW that is no folder.
    """

    def __init__(self, root: Path, pairs: Sequence[str], holds: Callable[[str], bool]) -> None:
        self._root, self._holds = root, holds
        self._pairs = sorted((self._pair(text) for text in pairs), key=lambda pair: -len(pair[0]))

    def _pair(self, text: str) -> tuple[str, str]:
        old, equals, new = text.partition("=")
        new = new.replace("\\", "/").removeprefix("./").rstrip("/") or "/"
        if not (old and equals and new != "/" and ".." not in new.split("/") and (self._root / new).is_dir()):
            raise UsageError(f"--root-map {text}: OLD=NEW was expected, NEW being a folder below {self._root} (. for "
                             "itself) or the absolute path of another")  # fmt: skip
        return _slashed(old).rstrip("/") + "/", "" if new == "." else f"{new}/"

    def path(self, name: object, listed_in: Path) -> str:
        """A listed path as one below the root, or below a NEW.  Raises UsageError when it is neither."""
        text = _slashed(name) if isinstance(name, str) else ""
        for old, new in self._pairs:
            if text.startswith(old) or old == "./":
                return new + safe_path(text.removeprefix(old), listed_in)
        try:
            return safe_path(name, listed_in)
        except UsageError as error:
            old = self._old(text)
            pair = (
                f"{shlex.quote(old + '=.')} finds it" if old else "OLD=NEW says where the folder OLD of such paths is"
            )
            raise UsageError(f"{error}; --root-map {pair}" if text else str(error)) from error

    def check(self, frames: Iterable[str], listed_in: Path) -> None:
        """Raises UsageError when a frame is not there, but would be with a pair."""
        tops = {tuple(frame.split("/")[:2]): frame for frame in frames}
        for frame in tops.values():
            if not self._holds(frame) and (old := self._old(frame)):
                pair = shlex.quote(f"{old}=.")
                raise UsageError(f"{listed_in}: {frame} is not below {self._root}; --root-map {pair} finds it")

    def _old(self, text: str) -> str:
        """The beginning of a listed path whose end is there below the root; empty: none."""
        parts = text.split("/") if text.isprintable() and len(text) <= LONGEST else []
        for cut in range(1, len(parts)):
            end = parts[cut:]
            if not {"", ".", ".."} & set(end) and self._holds("/".join(end)):
                return "/".join(parts[:cut]) or "/"
        return ""


def _slashed(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")
