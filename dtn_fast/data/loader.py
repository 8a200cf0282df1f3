"""Training batches of crops: shuffled, balanced, prefetched; the same for the same (seed, epoch) on any machine."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.masks import Masks
from dtn_fast.data.randomness import sample_seeds
from dtn_fast.device import to_device
from dtn_fast.errors import UsageError
from dtn_fast.producer_thread import produced

Transform = Callable[..., NDArray[np.uint8]]
"""Augmentation on the CPU, in the loader's thread: crops [n, S, S, 3], a seed per crop, which crops to augment strongly
(None: none) and, if the loader gives masks, these [n, S, S], to be moved in place -> augmented crops."""


class Emphasis(NamedTuple):
    """Crops to train on more than on others; arrays by crop number, over the whole dataset."""

    weights: NDArray[np.float32]
    """Weight of each crop in the losses of its label."""
    strongly: NDArray[np.bool_]
    """Crops to augment strongly and to draw ``draws`` times in an epoch."""
    draws: int


class Batch(NamedTuple):
    crops: Tensor
    """[n, S, S, 3] uint8 RGB on the loader's device."""
    labels: Tensor
    """[n] int64 on the loader's device."""
    rows: NDArray[np.int64]
    """[n] crop numbers in the dataset."""
    seeds: NDArray[np.uint64]
    """[n] seed of each sample, from (seed, epoch, position in the epoch), for augmentation on the device."""
    views: NDArray[np.int64]
    """[n] number of each sample's augmented view, below the loader's ``views``; 0 when every view is new."""
    weights: Tensor | None = None
    """[n] float32 weight of each sample on the loader's device; None: all count alike."""
    strongly: NDArray[np.bool_] | None = None
    """[n] samples to augment strongly; None: none."""
    masks: Tensor | None = None
    """[n, m, m] uint8 forged percentage of each pixel's area, or UNKNOWN, on the loader's device; None: not asked
    for."""
    buffer: Tensor | None = None
    """Host memory that holds ``crops``; :meth:`Loader.release` gives it back."""


def epoch_order(
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    real_repeat: int,
    seed: int,
    emphasis: Emphasis | None = None,
) -> NDArray[np.int64]:
    """The rows of one epoch in random order, each real ``real_repeat`` times (0: as many as balance the classes)."""
    if emphasis is not None:
        rows = np.repeat(rows, np.where(emphasis.strongly[rows], emphasis.draws, 1))
    fake = labels[rows] == 1
    repeat = real_repeat or max(1, round(int(fake.sum()) / max(int((~fake).sum()), 1)))
    return np.random.default_rng(seed).permutation(np.concatenate([rows[fake], np.tile(rows[~fake], repeat)]))


def replay_order(
    labels: NDArray[np.int64],
    new: NDArray[np.int64],
    old: NDArray[np.int64],
    share: float,
    seed: int,
    emphasis: Emphasis | None = None,
) -> NDArray[np.int64]:
    """The rows of one epoch of fine-tuning, a ``share`` of them old, with as many reals as fakes of either data.

    The larger class of the new data occurs once, the smaller is repeated, and one that is absent is the old data's.
    The old rows are drawn anew for each epoch, none twice before all have been.  Every batch has each group's share.
    """
    rng = np.random.default_rng(seed)
    if emphasis is not None:
        new, old = (np.repeat(of, np.where(emphasis.strongly[of], emphasis.draws, 1)) for of in (new, old))
    theirs = [old[labels[old] == label] for label in (0, 1)]
    ours = [new[labels[new] == label] for label in (0, 1)]
    count = max(map(len, ours))
    replayed = round(count * share / (1 - share))
    pairs = [(own if len(own) else other, count) for own, other in zip(ours, theirs, strict=True)]
    groups = [np.resize(rng.permutation(rows), n) for rows, n in [*pairs, *((rows, replayed) for rows in theirs)]]
    places = np.concatenate([(np.arange(len(g)) + rng.random(len(g))) / max(len(g), 1) for g in groups])
    return np.concatenate(groups)[np.argsort(places, kind="stable")]


_Places = tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]
"""Rows, seeds and views of a batch's samples."""


class Loader:
    """Batches of a split for one rank of ``world`` processes.

    The order of epoch e depends on (seed, e) alone.  A global batch is ``batch_size * world`` consecutive positions of
    that order, and each rank takes every ``world``-th of them: ranks never share a sample, and together they see the
    same samples as one process would.  ``resident`` keeps the crops of ``rows`` in the device's memory.  ``transform``
    runs in the loader's thread.  ``prefetch`` batches are made in advance; for a GPU they are copied from pinned memory
    on a separate stream.  ``views``: number of fixed seeds per crop, whose augmented views recur in every epoch; 0:
    every view is new.  ``emphasis``: crops that are drawn, weighted and augmented more.  ``replay``: share of old
    crops, if the dataset has such.  ``mask_side``: side m of the masks beside the crops; 0: none.  Raises UsageError
    when there are fewer ``rows`` than ``world``, or the crops do not fit the device's memory.
    """

    def __init__(
        self,
        dataset: CropDataset,
        rows: NDArray[np.int64],
        batch_size: int,
        seed: tuple[int, ...],
        real_repeat: int,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        resident: bool = False,
        transform: Transform | None = None,
        prefetch: int = 2,
        views: int = 0,
        emphasis: Emphasis | None = None,
        replay: float = 0.0,
        mask_side: int = 0,
    ) -> None:
        if len(rows) < world:
            raise UsageError(f"{len(rows)} crops cannot be shared by {world} processes; use fewer")
        self.dataset, self.rows, self.batch_size, self.seed, self.repeat = dataset, rows, batch_size, seed, real_repeat
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.transform, self.prefetch, self.views, self.emphasis = transform, max(prefetch, 1), views, emphasis
        self._mask_side = mask_side
        self._resident_masks: Tensor | None = None
        self._replay, old = replay, dataset.is_old(rows)
        self._new, self._old = rows[~old], rows[old]
        self.waited = 0.0
        """Seconds that the consumer has waited for data so far."""
        self._labels = dataset.labels
        self._free: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        self._view_seed = int(np.random.SeedSequence((*seed, 1 << 32)).generate_state(1, np.uint64)[0])
        self.total = len(self._order(0))
        """Number of samples in an epoch, over all ranks."""
        self._resident = self._upload() if resident else None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        """Number of batches in an epoch; samples that do not fill a global batch are left out, others in each epoch."""
        return max(self.total // (self.batch_size * self.world), 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from number ``start`` on, which is how a run resumes inside an epoch."""
        order_seed, sample_seed = (
            int(s) for s in np.random.SeedSequence((*self.seed, epoch)).generate_state(2, np.uint64)
        )
        order = self._order(order_seed)
        plan = []
        for step in range(start, len(self)):
            places = np.arange(step * self.batch_size * self.world, (step + 1) * self.batch_size * self.world)
            places = places[places < len(order)][self.rank :: self.world]
            rows, seeds, views = order[places], sample_seeds(sample_seed, places), np.zeros(len(places), np.int64)
            if self.views:
                views = (seeds % np.uint64(self.views)).astype(np.int64)
                seeds = sample_seeds(self._view_seed, rows * self.views + views)
            plan.append((rows, seeds, views))
        if self._resident is not None and self.transform is None:
            for rows, seeds, views in plan:
                index = self._place_of(rows)
                crops, labels = self._resident.index_select(0, index), to_device(self._labels[rows], self.device)
                masks = None if self._resident_masks is None else self._resident_masks.index_select(0, index)
                yield Batch(crops, labels, rows, seeds, views, *self._stress(rows), masks)
        else:
            yield from self._prefetched(plan, epoch)

    def _order(self, seed: int) -> NDArray[np.int64]:
        if self.dataset.first_old is None:
            return epoch_order(self._labels, self.rows, self.repeat, seed, self.emphasis)
        return replay_order(self._labels, self._new, self._old, self._replay, seed, self.emphasis)

    def _read(
        self, rows: NDArray[np.int64], seeds: NDArray[np.uint64], epoch: int, out: NDArray[np.uint8]
    ) -> Tensor | None:
        """Writes a batch's augmented crops into ``out``; returns their masks [n, m, m], if wanted, on the device."""
        masks = self._masks(len(rows))
        self.dataset.fill(rows, out, epoch, masks)
        if self.transform is not None:
            strongly = None if self.emphasis is None else self.emphasis.strongly[rows]
            out[...] = self.transform(out, seeds, strongly, *([] if masks is None else [masks.pixels]))
        return None if masks is None else to_device(masks.small(self._mask_side), self.device)

    def _masks(self, count: int) -> Masks | None:
        return Masks.empty(count, self.dataset.size) if self._mask_side else None

    def _stress(self, rows: NDArray[np.int64]) -> tuple[Tensor | None, NDArray[np.bool_] | None]:
        """Weights of a batch's samples on the device, and which to augment strongly."""
        if self.emphasis is None:
            return None, None
        return to_device(self.emphasis.weights[rows], self.device), self.emphasis.strongly[rows]

    def release(self, batch: Batch) -> None:
        """Gives the host memory of ``batch`` back for reuse; without this call the memory is simply freed."""
        if batch.buffer is not None:
            self._free.put((batch.buffer, None))

    def _prefetched(self, plan: list[_Places], epoch: int) -> Iterator[Batch]:
        batches = produced(lambda check: self._made(plan, epoch), self.prefetch, "loading")
        try:
            while True:
                began = time.perf_counter()
                item = next(batches, None)
                self.waited += time.perf_counter() - began
                if item is None:
                    return
                batch, event = item
                if event is not None:
                    torch.cuda.current_stream(self.device).wait_event(event)
                    for tensor in filter(torch.is_tensor, (batch.crops, batch.labels, batch.weights, batch.masks)):
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield batch
        finally:
            batches.close()

    def _made(self, plan: list[_Places], epoch: int) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
        """Yields the batches of a plan, for a GPU with the event that marks the end of the copy to it."""
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # one for all epochs: there are 32, and then they repeat
        stream = self._stream
        for rows, seeds, views in plan:
            buffer = self._buffer()
            crops = buffer[: len(rows)]
            if stream is None:
                masks = self._read(rows, seeds, epoch, crops.numpy())
                labels = to_device(self._labels[rows], self.device)
                yield Batch(crops, labels, rows, seeds, views, *self._stress(rows), masks, buffer), None
                continue
            with torch.cuda.stream(stream):
                masks = self._read(rows, seeds, epoch, crops.numpy())
                crops = crops.to(self.device, non_blocking=True)
                labels, stress = to_device(self._labels[rows], self.device), self._stress(rows)
                event = stream.record_event()
            self._free.put((buffer, event))  # reused once the copy from it has ended
            yield Batch(crops, labels, rows, seeds, views, *stress, masks), event

    def _buffer(self) -> Tensor:
        """Unused host memory for a batch, pinned for a GPU.  Buffers are reused because page faults in fresh memory
        cost more than the copy into it.  On a GPU there are at least two, so that one is filled while another is
        copied."""
        try:
            if self.device.type == "cuda" and self._free.qsize() < 2:
                raise queue.Empty
            buffer, event = self._free.get_nowait()
        except queue.Empty:
            side = self.dataset.size
            return torch.empty(
                (self.batch_size, side, side, 3), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
            )
        if event is not None:
            event.synchronize()
        return buffer

    def _upload(self) -> Tensor:
        """Copies all crops of ``rows`` to the device, in chunks."""
        size = len(self.rows) * self.dataset.size**2 * 3
        if self.device.type == "cuda" and size > 0.8 * torch.cuda.mem_get_info(self.device)[0]:
            raise UsageError(
                f"{size / 1e9:.1f} GB of crops do not fit {self.device}'s free memory; leave --resident out"
            )
        self._sorted, small = np.unique(self.rows), list[Tensor]()
        store = torch.empty((len(self._sorted), *(self.dataset.size,) * 2, 3), dtype=torch.uint8, device=self.device)
        for first in range(0, len(self._sorted), 256):
            part = self._sorted[first : first + 256]
            crops, masks = np.empty((len(part), *store.shape[1:]), np.uint8), self._masks(len(part))
            self.dataset.fill(part, crops, masks=masks)
            store[first : first + len(part)] = torch.from_numpy(crops).to(self.device)
            if masks is not None:
                small.append(to_device(masks.small(self._mask_side), self.device))
        self._resident_masks = torch.cat(small) if small else None
        return store

    def _place_of(self, rows: NDArray[np.int64]) -> Tensor:
        return to_device(np.searchsorted(self._sorted, rows), self.device)
