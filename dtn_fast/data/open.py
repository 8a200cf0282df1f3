"""Opening of a folder of prepared crops or of face pictures as a crop dataset."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import INDEX, CropDataset, open_crop_dataset, unfinished
from dtn_fast.data.datasets.folder import has_classes, read_folder, read_reals
from dtn_fast.data.faces import resize_square
from dtn_fast.data.masks import Masks
from dtn_fast.data.pictures import read_image
from dtn_fast.data.video_table import VideoTable
from dtn_fast.errors import UsageError, tell

THREADS = 2
"""Number of threads that decode pictures."""


class PictureFiles:
    """Crops decoded from image files at each access, on threads, without shard files."""

    def __init__(self, root: Path, names: Sequence[str], size: int) -> None:
        self.size, self._root, self._names = size, root, names
        self._pool = ThreadPoolExecutor(THREADS)

    def __len__(self) -> int:
        return len(self._names)

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0, masks: Masks | None = None) -> None:
        for place, image in enumerate(self._pool.map(self._read, rows.tolist())):
            out[place] = image

    def _read(self, row: int) -> NDArray[np.uint8]:
        return resize_square(read_image(self._root / self._names[row]), self.size)


def open_pictures(table: VideoTable, size: int) -> CropDataset:
    """The pictures of a video table as a crop dataset without shard files: decoded and resized at each access.

    Raises UsageError when the table holds videos, which must be prepared first.
    """
    names: list[str] = []
    video: list[int] = []
    for number, row in enumerate(table.videos):
        if not row.frames or table.lmdb:
            raise UsageError(f"{table.root}: {row.path} is not a picture or folder of pictures; run dtn-fast prepare")
        names += row.frames
        video += [number] * len(row.frames)
    status = [{"asked": len(v.frames), "frames": len(v.frames), "faces": len(v.frames), "boxes": "whole", "error": None,
               "reason": None} for v in table.videos]  # fmt: skip
    frame = np.concatenate([np.arange(len(v.frames)) for v in table.videos])
    return CropDataset(PictureFiles(table.root, names, size), np.array(video), frame, np.zeros(len(names), np.int64),
                  table.videos, status, table.synthetic, table.notes, folder=str(table.root.absolute()))  # fmt: skip


def open_data(folder: Path, size: int) -> CropDataset:
    """Opens prepared crops, or else the face pictures in ``folder``: <split>/<real or a forgery's name>/, the same
    without <split>/ (80 percent are train, 10 val, 10 test), or reals.

    size: side in pixels that pictures are resized to.  Raises UsageError when ``folder`` holds neither.
    """
    if (folder / INDEX).is_file() or unfinished(folder) or not folder.is_dir():
        return open_crop_dataset(folder)
    try:
        table = (read_folder if has_classes(folder) else read_reals)(folder)
        for note in table.notes:
            tell(f"{folder}: {note}")
        return open_pictures(table, size)
    except UsageError as error:
        raise UsageError(f"{error}; a dataset of videos needs dtn-fast prepare first") from error
