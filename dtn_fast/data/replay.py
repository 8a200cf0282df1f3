"""New crops joined with the old ones that fine-tuning replays: one dataset, whose halves are still told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.blend import METHOD, self_blended
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.masks import Masks
from dtn_fast.data.video_table import SPLITS
from dtn_fast.errors import UsageError, tell

NEW, OLD = "new", "old"


class JoinedCrops:
    """Crops of several datasets, one after another."""

    def __init__(self, sets: Sequence[CropDataset]) -> None:
        self.size = sets[0].size
        self._sets = sets
        self._starts = np.cumsum([0, *(len(dataset.video) for dataset in sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0, masks: Masks | None = None) -> None:
        of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(of):
            places = np.flatnonzero(of == number)
            part = np.empty((len(places), *out.shape[1:]), np.uint8)
            own = None if masks is None else Masks(masks.pixels[places], masks.known[places])
            self._sets[number].fill(rows[places] - self._starts[number], part, epoch, own)
            out[places] = part
            if masks is not None and own is not None:
                masks.pixels[places], masks.known[places] = own


def joined(new: CropDataset, old: Sequence[CropDataset], methods: tuple[str, ...], learned: tuple[str, ...],
           seed: int) -> CropDataset:  # fmt: skip
    """``new`` and the crops of ``old`` as one dataset, whose masks ``fill`` alone gives.

    methods: forgeries of ``new`` to train on; empty: all.  learned: those that the model was trained on, which alone
    are kept of ``old``; empty: unknown, all are kept.  Of a model that learned from self-blended fakes alone, the old
    fakes are such, drawn with ``seed``.  Says so when ``new`` lacks a class, which is then ``old``'s.  Raises
    UsageError when the sets hold the same crops, a split of ``old`` lacks a class, or ``new`` has none to train or
    validate on.
    """
    absent = [name for name in methods if name not in new.methods]
    if absent:
        raise UsageError(f"--methods {' '.join(absent)}: not in {new.folder}, which holds {', '.join(new.methods)}")
    new = only(new, methods) if methods else new
    own = [self_blended(of, seed) if learned == (METHOD,) else of for of in old]
    sets = [new, *(only(of, learned) if set(learned) & set(of.methods) else of for of in own)]
    starts = np.cumsum([0, *(len(dataset.videos) for dataset in sets)])
    notes = [note for dataset in sets for note in dataset.notes]
    points = [dataset.landmarks for dataset in sets]
    alike = all(p is not None and p.shape[1] == points[0].shape[1] for p in points)  # type: ignore[union-attr]
    both = replace(
        new,
        crops=JoinedCrops(sets),
        video=np.concatenate([d.video + start for d, start in zip(sets, starts, strict=False)]),
        frame=np.concatenate([d.frame for d in sets]),
        person=np.concatenate([d.person for d in sets]),
        videos=[video for d in sets for video in d.videos],
        status=[state for d in sets for state in d.status],
        synthetic=any(d.synthetic for d in sets),
        notes=notes,
        crop=next((d.crop for d in sets if d.crop is not None), None),
        landmarks=np.concatenate(points) if alike else None,  # type: ignore[arg-type]
        masks=None,
        mask_known=np.concatenate([d.masked for d in sets]),
        every_face=any(d.every_face for d in sets),
        folder=f"{new.folder} --replay {' '.join(dataset.folder for dataset in old)}",
        first_old=len(new.videos),
    )
    _check(both, methods)
    return both


def only(dataset: CropDataset, methods: tuple[str, ...]) -> CropDataset:
    """``dataset`` with the fakes of other methods in no split."""
    return part(dataset, np.array([not v.label or v.method in methods for v in dataset.videos], bool))


def _check(both: CropDataset, methods: tuple[str, ...]) -> None:
    lacking: dict[str, list[str]] = {}
    for split in ("train", "val"):
        rows = both.select(split, methods)
        new, old = rows[~both.is_old(rows)], rows[both.is_old(rows)]
        if not len(new):
            raise UsageError(f"{both.folder}: the {split} split of the new data holds no crops; prepare them again "
                             "with --splits train val test")  # fmt: skip
        if set(both.labels[old].tolist()) != {0, 1}:
            raise UsageError(f"{both.folder}: the {split} split of the old data needs reals and fakes that the model "
                             "was trained on; name its training data by --replay")  # fmt: skip
        for label, name in enumerate(("reals", "fakes")):
            if not (both.labels[new] == label).any():
                lacking.setdefault(name, []).append(split)
        label = int(both.labels[new].any())  # reals may be in both: fakes of several kinds are made from them
        ours, theirs = (_places(both, of[both.labels[of] == label]) for of in (new, old))
        for place in sorted(ours.keys() & theirs.keys())[:1]:
            one, other = both.get(np.array([ours[place], theirs[place]]))
            if np.array_equal(one, other):
                raise UsageError(f"{both.folder}: {place[0]} is in the new and in the old data; name the new forgeries "
                                 "by --methods, or other crops")  # fmt: skip
    for name, splits in lacking.items():
        tell(f"the new data hold no {name} in {' and '.join(splits)}; the old data's are used")


def _places(dataset: CropDataset, rows: NDArray[np.int64]) -> dict[tuple[str, int], int]:
    """Row of each video's path and frame."""
    names = [dataset.videos[number].path for number in dataset.video[rows]]
    return {(name, int(frame)): int(row) for name, frame, row in zip(names, dataset.frame[rows], rows, strict=True)}


def parts_of(dataset: CropDataset) -> dict[str, NDArray[np.bool_]]:
    """Videos [V] of the new and of the old data, by name; none without old data.

    A class that a split of the new data lacks is the old data's, if that split holds the other.
    """
    if dataset.first_old is None:
        return {}
    old = np.arange(len(dataset.videos)) >= dataset.first_old
    new = ~old
    counted = np.bincount(dataset.video, minlength=len(old)) > 0
    for split in SPLITS:
        classes = [np.array([(v.split, v.label) == (split, label) for v in dataset.videos]) for label in (0, 1)]
        held = [bool((own & ~old & counted).any()) for own in classes]
        if any(held) and not all(held):
            new |= classes[held.index(False)] & old
    return {NEW: new, OLD: old}


def part(dataset: CropDataset, videos: NDArray[np.bool_]) -> CropDataset:
    """``dataset`` with all but ``videos`` in no split."""
    return replace(dataset, videos=[v if keep else v._replace(split="")
                                    for v, keep in zip(dataset.videos, videos, strict=True)])  # fmt: skip
