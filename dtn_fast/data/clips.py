"""Clips: successive crops of one person in one video, in temporal order.

A clip of a track in evaluation begins where the one before it ends, and the last one ends with the track; in training
it begins anywhere.  A track of fewer frames is stretched: some of its frames occur several times, evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.loader import Transform, epoch_order
from dtn_fast.data.randomness import sample_seeds, uniform
from dtn_fast.errors import UsageError


def tracks_of(dataset: CropDataset, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The crops ``rows`` of each person of each video, in temporal order."""
    keys = dataset.frame[rows], dataset.person[rows], dataset.video[rows]
    rows = rows[np.lexsort(keys)]
    changes = (np.diff(dataset.video[rows]) != 0) | (np.diff(dataset.person[rows]) != 0)
    return np.split(rows, np.flatnonzero(changes) + 1) if len(rows) else []


def stretched(count: int, clip: int) -> NDArray[np.int64]:
    """Places of a clip's frames in a track of ``count`` frames, fewer than ``clip``."""
    return np.linspace(0, count - 1, clip).round().astype(np.int64)


class Places(NamedTuple):
    """Clips of a track in evaluation."""

    frames: NDArray[np.int64]
    """[clips, T] places of each clip's frames in the track."""
    of: NDArray[np.int64]
    """[count] number of the clip that counts for each frame: the first one that holds it."""


def clips_of(count: int, clip: int) -> Places:
    """The clips of ``clip`` frames that a track of ``count`` frames is divided into."""
    if count < clip:
        return Places(stretched(count, clip)[None], np.zeros(count, np.int64))
    starts = np.array([*range(0, count - clip, clip), count - clip])
    return Places(starts[:, None] + np.arange(clip), np.arange(count) // clip)


class ClipBatch(NamedTuple):
    rows: NDArray[np.int64]
    """[n, T] crop numbers of each clip's frames, in temporal order."""
    labels: NDArray[np.int64]
    """[n] 0 real, 1 fake."""
    tracks: NDArray[np.int64]
    """[n] number of each clip's track."""
    views: NDArray[np.int64]
    """[n] number of each clip's augmented view; 0: as it is."""


class ClipLoader:
    """Training clips, one of each track in an epoch, both classes as often.

    The order, the clips' beginnings and views of epoch e depend on (``seed``, e) alone; ranks share the positions of
    one order, as those of :class:`~dtn_fast.data.loader.Loader`.  clip: frames of a clip.  views: number of versions of
    each track, of which 0 is not augmented.  real_repeat: repeats of a real track per epoch, 0: as many as balance the
    classes.  Raises UsageError when a class is missing, or there are fewer tracks than ``world``.
    """

    def __init__(
        self, dataset: CropDataset, rows: NDArray[np.int64], clip: int, batch_size: int, seed: tuple[int, ...],
        views: int, real_repeat: int, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.dataset, self.clip, self.batch_size, self.seed, self.views = dataset, clip, batch_size, seed, views
        self.tracks = tracks_of(dataset, rows)
        labels = dataset.labels
        self.labels = np.array([labels[track[0]] for track in self.tracks], np.int64)
        if set(self.labels.tolist()) != {0, 1} or len(self.tracks) < world:
            raise UsageError(f"{dataset.folder}: {len(self.tracks)} tracks to train on; clips need reals and fakes, "
                             "and at least one for each process")  # fmt: skip
        self.rank, self.world, self._repeat = rank, world, real_repeat
        self.waited = 0.0
        """Seconds that the consumer has waited for data so far: clips are numbers of crops, which are at hand."""
        self.total = len(self._order(0))
        self._view_seed = int(np.random.SeedSequence((*seed, 1 << 32)).generate_state(1, np.uint64)[0])

    def __len__(self) -> int:
        """Number of batches in an epoch; clips that do not fill a global batch are left out, others in each epoch."""
        return max(self.total // (self.batch_size * self.world), 1)

    def _order(self, seed: int) -> NDArray[np.int64]:
        return epoch_order(self.labels, np.arange(len(self.tracks)), self._repeat, seed)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[ClipBatch]:
        """Yields the batches of an epoch from number ``start`` on."""
        order_seed, clip_seed = (
            int(s) for s in np.random.SeedSequence((*self.seed, epoch)).generate_state(2, np.uint64)
        )
        order = self._order(order_seed)
        for step in range(start, len(self)):
            places = np.arange(step * self.batch_size * self.world, (step + 1) * self.batch_size * self.world)
            places = places[places < len(order)][self.rank :: self.world]
            tracks, draw = order[places], uniform(sample_seeds(clip_seed, places), 2)
            rows = [self._clip(self.tracks[track], at) for track, at in zip(tracks, draw[:, 0], strict=True)]
            yield ClipBatch(np.stack(rows), self.labels[tracks], tracks, (draw[:, 1] * self.views).astype(np.int64))

    def _clip(self, track: NDArray[np.int64], at: float) -> NDArray[np.int64]:
        """The clip of a track that begins ``at`` that share of the places where it can."""
        if len(track) < self.clip:
            return track[stretched(len(track), self.clip)]
        begin = int(at * (len(track) - self.clip + 1))
        return track[begin : begin + self.clip]

    def crops(self, rows: NDArray[np.int64], track: int, view: int, transform: Transform | None) -> NDArray[np.uint8]:
        """The crops ``rows`` [n] of a track as its ``view`` shows them, [n, S, S, 3]: one seed for all of them, so that
        geometry and colour change alike."""
        crops = self.dataset.get(rows)
        if view == 0 or transform is None:
            return crops
        seed = sample_seeds(self._view_seed, np.array([track * self.views + view]))
        return transform(crops, np.repeat(seed, len(crops)), None)
