"""DeepfakeBench's LMDB of pictures."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.video import decode_image
from dtn_fast.errors import MediaError, UsageError
from dtn_fast.packages import require


class Lmdb:
    """Pictures by their relative path, as DeepfakeBench stores them; opened read-only."""

    def __init__(self, path: Path) -> None:
        lmdb = require("lmdb", "lmdb")
        self.path = path
        try:
            self._open = lmdb.open(str(path), readonly=True, lock=False, subdir=path.is_dir())
        except lmdb.Error as error:
            raise UsageError(f"{path}: cannot open this LMDB ({error})") from error

    def _find(self, transaction, name: str) -> bytes | None:
        for key in (name, name.replace("/", "\\"), f"./{name}"):
            cursor = transaction.cursor()
            if cursor.set_key(key.encode()):
                return cursor.value()
        return None

    def __contains__(self, name: str) -> bool:
        with self._open.begin(buffers=True) as transaction:
            return self._find(transaction, name) is not None

    def image(self, name: str) -> NDArray[np.uint8]:
        with self._open.begin() as transaction:
            data = self._find(transaction, name)
        if data is None:
            raise MediaError(f"{self.path}: holds no {name}")
        return decode_image(data, f"{self.path}:{name}")


@functools.cache
def open_lmdb(path: Path) -> Lmdb:
    """One handle per file and process: LMDB forbids a second."""
    return Lmdb(path)
