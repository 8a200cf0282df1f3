"""Reading of pictures from DeepfakeBench's LMDB."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.pictures import decode_image
from dtn_fast.errors import MediaError, UsageError
from dtn_fast.packages import require


class Lmdb:
    """A read-only LMDB of pictures by relative path, as DeepfakeBench stores them."""

    def __init__(self, path: Path) -> None:
        lmdb = require("lmdb")
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
    """Opens an LMDB once per process, because LMDB forbids a second handle on one file."""
    return Lmdb(path)
