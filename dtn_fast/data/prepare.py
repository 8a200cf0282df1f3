"""Preparation of face crops from videos: parallel, resumable after any interruption, divisible among machines."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import multiprocessing
import os
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.config import FinderConfig, PrepareConfig, WorkConfig
from dtn_fast.data.crop_dataset import INDEX, SHARDS, VERSION, open_landmarks, open_masks, open_shard, sealed
from dtn_fast.data.face_finders import open_finder
from dtn_fast.data.face_tracker import FaceTracker, Tracked
from dtn_fast.data.faces import Box, crop_face, cut_of, resize_square
from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.forged_face import Mask, forged_faces, masks_of
from dtn_fast.data.frames import landmarks, video_frames
from dtn_fast.data.masks import FORGED
from dtn_fast.data.video import Frame, Reading
from dtn_fast.data.video_table import Video, VideoTable
from dtn_fast.data.yunet_finder import YUNET_SHA256
from dtn_fast.dataclass_json import differences
from dtn_fast.errors import DtnError, MediaError, UsageError, tell
from dtn_fast.files import write_whole

JOB = "job.json"
CHECKSUMS = ("crc32", "landmarks_crc32", "masks_crc32")
SHARD_CROPS = 256
"""Target number of crops per shard; an interruption costs each worker at most one shard."""


class PrepareProgress(NamedTuple):
    done: int
    """Number of finished videos of this worker share."""
    total: int
    faces: int
    checked: int = 0
    """Number of this share's shards that were there before."""
    damaged: int = 0
    """Number of those that are made again."""


class PrepareJob(NamedTuple):
    """All data that a worker process needs besides the number of its shard."""

    table: VideoTable
    out: Path
    size: int
    config: PrepareConfig
    shards: list[list[int]]


def prepare(
    table: VideoTable, out: Path, size: int, config: PrepareConfig, work: WorkConfig
) -> Iterator[PrepareProgress]:
    """Crops the faces of every video of ``table`` to ``size`` pixels into ``out``, yielding progress.

    The work is divided into shards, each of one or more reals with the fakes made from them.  Shard files are written
    atomically, so a killed run resumes where it stopped, and n machines with n worker shares fill one folder.  Videos
    without a face, or that cannot be read, are kept in the index with the reason.  Raises UsageError when ``out`` holds
    crops made with other settings or no face is found in any video, DtnError when the disk is full or a worker dies;
    finished shards are kept.
    """
    number, total_shares = work.place
    config = replace(config, masks=_stores_masks(table, out, config))
    job = PrepareJob(table, out, size, config, _shards(table, config))
    if not table.crops:
        open_finder(config.finder)  # its model file is fetched, and any fault told, before the workers start
    try:
        _claim(job)
        (out / SHARDS).mkdir(parents=True, exist_ok=True)
        mine = [k for k in range(len(job.shards)) if k % total_shares == number]
        total = sum(len(job.shards[k]) for k in mine)
        states = {k: state for k in mine if (state := _state(out, k, size, work.verify)) is not None}
        there = sum((out / SHARDS / f"{_name(k)}.json").is_file() for k in mine)
        checks = there, there - len(states)
        done, faces = sum(len(job.shards[k]) for k in states), sum(state["rows"] for state in states.values())
        yield PrepareProgress(done, total, faces, *checks)
        missing = [k for k in mine if k not in states]
        context = multiprocessing.get_context("spawn")
        size_of_pool = min(work.workers, max(len(missing), 1))
        with ProcessPoolExecutor(size_of_pool, mp_context=context, initializer=_begin, initargs=(job,)) as pool:
            running = {pool.submit(_make_shard, k): k for k in missing}
            try:
                for future in as_completed(running):
                    faces += future.result()
                    done += len(job.shards[running[future]])
                    yield PrepareProgress(done, total, faces, *checks)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        _write_index(job)
    except BrokenProcessPool as error:
        raise DtnError(f"{out}: a worker was killed (out of memory?); finished shards are kept: run the same "
                       "command again with fewer --workers") from error  # fmt: skip
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "remove the cause"
        raise DtnError(f"{out}: {error.strerror or error}; finished shards are kept: {remedy} and run the same "
                       "command again") from error  # fmt: skip


def finished(out: Path) -> bool:
    """Whether every shard of ``out`` is done and indexed."""
    return (out / INDEX).is_file()


def _shards(table: VideoTable, config: PrepareConfig) -> list[list[int]]:
    """Divides the video numbers into shards; a real and the fakes made from it stay together, the real first."""
    groups: dict[tuple[str, tuple[tuple[str, int], ...]], list[int]] = {}
    for number, video in enumerate(table.videos):
        groups.setdefault((video.target or video.path, video.corruptions), []).append(number)
    shards: list[list[int]] = []
    for group in groups.values():
        group.sort(key=lambda number: table.videos[number].label)
        if not shards or len(shards[-1]) * config.frames >= SHARD_CROPS:
            shards.append([])
        shards[-1] += group
    return shards


def _stores_masks(table: VideoTable, out: Path, config: PrepareConfig) -> bool:
    """Whether to store masks: if ``config`` says so and the dataset has any, but not in a folder that was begun without
    them, as was the default of earlier versions."""
    if not config.masks or not any(video.mask for video in table.videos):
        return False
    try:
        begun = json.loads((out / JOB).read_text(encoding="utf-8"))["masks"]
    except (OSError, ValueError, KeyError, TypeError):
        return True  # not begun; _claim refuses a damaged file
    if begun is False:
        tell(f"{out}: was begun without masks and goes on without; choose another --out to store them")
    return begun is not False


def _claim(job: PrepareJob) -> None:
    """Records the job in ``out``/job.json.  Raises UsageError when that file records another job."""
    rows = json.dumps([_portable(video).to_json() for video in job.table.videos]).encode()
    wanted = {"version": VERSION, "size": job.size, **_settings(job.config), "dataset": job.table.dataset,
              "videos": len(job.table.videos), "manifest": hashlib.sha256(rows).hexdigest()}  # fmt: skip
    path = job.out / JOB
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(there, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UsageError(f"{path}: damaged ({error}); delete {job.out} and prepare again") from error
        if there.get("version") != VERSION:
            raise UsageError(f"{job.out}: crops of version {there.get('version')}, this program continues version "
                             f"{VERSION} only; choose another --out or delete it")  # fmt: skip
        if differ := differences(there, wanted):
            raise UsageError(f"{job.out}: holds crops with {differ}; repeat these, or choose another --out")
    write_whole(path, json.dumps(wanted, indent=1).encode(), shared=True)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings as JSON, with the checksums of model files, which may be elsewhere on another machine."""
    settings = asdict(config)
    for name in ("face_model", "landmark_model"):
        path = getattr(config.finder, name)
        settings["finder"][name] = path and hashlib.sha256(path.read_bytes()).hexdigest()
    settings["finder"]["faces"] = config.policy.finder
    if config.policy.finder == "yunet" and config.finder.face_model is None:
        settings["finder"]["face_model"] = YUNET_SHA256
    return {**settings, "crop": asdict(config.policy)}


def _portable(video: Video) -> Video:
    """The video without the folders of an absolute path, which may be mounted elsewhere on another machine."""
    return video._replace(path=Path(video.path).name) if Path(video.path).is_absolute() else video


def _state(out: Path, shard: int, size: int, verify: bool) -> dict[str, Any] | None:
    """The status of a finished shard, from its JSON file; None when the shard must be made."""
    try:
        state = json.loads((out / SHARDS / f"{_name(shard)}.json").read_text(encoding="utf-8"))
        if state.pop("check") != _check(state):
            return None
        at = out / SHARDS, _name(shard), state["rows"]
        open_shard(*at, size, state["crc32"] if verify else None)
        if state["landmarks"]:
            open_landmarks(*at, state["landmarks"], state["landmarks_crc32"] if verify else None)
        if state["masks"]:
            open_masks(*at, size, state["masks_crc32"] if verify else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state


def _check(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())


def _name(shard: int) -> str:
    return f"{shard:06d}"


class Cropped(NamedTuple):
    """One video's crops."""

    crops: list[NDArray[np.uint8]]
    rows: list[tuple[int, int, Box]]
    """(frame, person, box) of each crop."""
    points: list[NDArray[np.float32] | None]
    masks: list[Mask | None]
    """[S, S] each; None: unknown."""
    state: dict[str, Any]


_current: PrepareJob
"""Job of this worker process, sent once and not with every shard."""


def _begin(job: PrepareJob) -> None:
    global _current
    _current = job
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    cv2.setNumThreads(1)  # the pool already uses every core


def _end_with(parent: Any) -> None:
    """Ends this worker process once its parent has died, because nothing else would end it."""
    parent.join()
    os._exit(1)


def _make_shard(shard: int) -> int:
    """Crops the videos of a shard and writes its files, the status file last; returns the number of crops."""
    job = _current
    done: list[Cropped] = []
    reals: dict[str, Boxes] = {}
    for number in job.shards[shard]:
        done.append(_crop_video(job, job.table.videos[number], reals))
    crops = [crop for video in done for crop in video.crops]
    points = [point for video in done for point in video.points]
    array = np.array(crops, np.uint8).reshape(-1, job.size, job.size, 3)
    state: dict[str, Any] = {"rows": len(array), "crc32": zlib.crc32(array.data.cast("B")) if len(array) else 0}
    counts = [len(video.crops) for video in done]
    state["video"] = np.repeat(job.shards[shard], counts).tolist()
    rows = [row for video in done for row in video.rows]
    state["frame"], state["person"] = [row[0] for row in rows], [row[1] for row in rows]
    state["box"] = [list(row[2]) for row in rows]
    state["status"] = [video.state for video in done]
    state["landmarks"] = max((len(point) for point in points if point is not None), default=0)
    folder = job.out / SHARDS
    if len(array):
        write_whole(folder / f"{_name(shard)}.npy", _npy(array), shared=True)
    if state["landmarks"]:
        known = np.full((len(points), state["landmarks"], 2), np.nan, np.float32)
        for place, point in enumerate(points):
            if point is not None:
                known[place, : len(point)] = point
        state["landmarks_crc32"] = zlib.crc32(known.tobytes())
        write_whole(folder / f"{_name(shard)}.landmarks.npy", _npy(known), shared=True)
    state["masks"] = job.config.masks
    if job.config.masks:
        found = [mask for video in done for mask in video.masks]
        blank = np.zeros((job.size, job.size), np.uint8)
        whole = np.array([blank if mask is None else mask for mask in found], np.uint8).reshape(-1, job.size, job.size)
        masks = np.packbits(whole >= FORGED, axis=2)
        state["mask_known"] = [int(mask is not None) for mask in found]
        state["masks_crc32"] = zlib.crc32(masks.data.cast("B")) if len(masks) else 0
        if len(masks):
            write_whole(folder / f"{_name(shard)}.masks.npy", _npy(masks), shared=True)
    write_whole(folder / f"{_name(shard)}.json", json.dumps({**state, "check": _check(state)}).encode(), shared=True)
    return len(array)


Boxes = dict[int, tuple[tuple[int, ...], list[Tracked]]]
"""Frame number -> (shape of the frame, faces in it)."""


def _crop_video(job: PrepareJob, video: Video, reals: dict[str, Boxes]) -> Cropped:
    config, table = job.config, job.table
    state: dict[str, Any] = {
        "asked": config.frames, "frames": 0, "faces": 0, "boxes": "own", "error": None, "reason": None,
        "masked": 0, "not_largest": 0, "untouched": 0, "unmasked": 0, "lost": 0, "missing": 0, "crowded": 0,
    }  # fmt: skip
    reading = Reading()
    made = Cropped([], [], [], [], state)
    known = reals.get(video.target) if config.reuse_boxes and video.label else None
    found: Boxes = {}
    tracker = None if table.crops else FaceTracker(_finder(config.finder), config.every)
    names = {int(Path(name).stem): name for name in video.frames if Path(name).stem.isdecimal()}
    try:
        mask_of = _Masks(table, video, config) if video.label else None
        for frame in video_frames(table.root, video, config.frames, table.lmdb, reading=reading):
            state["frames"] += 1
            shape = frame.image.shape
            if tracker is None:
                faces, state["boxes"] = [Tracked(0, Box(0, 0, shape[1], shape[0]))], "whole"
            elif known is not None and frame.number in known and known[frame.number][0] == shape:
                faces = known[frame.number][1]
                state["boxes"] = "real" if state["boxes"] == "real" or not made.rows else "mixed"
            else:
                known, faces = None, tracker(frame.image)  # the videos differ: find faces from here on
                state["boxes"] = "mixed" if state["boxes"] == "real" else state["boxes"]
                found[frame.number] = (shape, faces)
                state["crowded"] += tracker.crowded
            mask = mask_of(frame) if mask_of else None
            if mask_of and tracker is not None:
                faces = mask_of.forged(faces, mask, state)
            if config.masks and not video.label:
                mask = np.zeros(shape[:2], np.uint8)
            for face in faces if config.people == "all" else faces[:1]:
                if tracker is None:
                    made.points.append(_points(job, names.get(frame.number), shape))
                    made.crops.append(resize_square(frame.image, job.size))
                    made.masks.append(None if mask is None else resize_square(mask, job.size))
                else:
                    cut = cut_of(face.box, face.degrees, config.policy)
                    made.crops.append(crop_face(frame.image, cut, job.size))
                    made.points.append(None if face.points is None else cut.placed(face.points, job.size))
                    made.masks.append(crop_face(mask, cut, job.size) if config.masks and mask is not None else None)
                made.rows.append((frame.number, face.person, face.box))
    except MediaError as error:
        state["error"] = str(error)
    state |= {"faces": len(made.crops), "lost": reading.lost, "missing": reading.missing}
    if not made.crops and not state["error"]:
        state["reason"] = f"no {'forged ' if state['masked'] else ''}face in {state['frames']} frames"
    if not video.label:
        reals[video.path] = found
    return made


class _Masks:
    """A fake's masks, and the people whom they have shown to be forged."""

    def __init__(self, table: VideoTable, video: Video, config: PrepareConfig) -> None:
        wanted = config.masks or not table.crops
        self.people = set[int]()
        self.known = bool(video.mask) and wanted
        try:
            self._mask_of = masks_of(table, video, config.frames) if wanted else None
        except MediaError:
            self._mask_of = None

    def __call__(self, frame: Frame) -> Mask | None:
        """The mask of the next frame; None when there is none, or it cannot be read."""
        try:
            return self._mask_of(frame) if self._mask_of else None
        except MediaError:
            self._mask_of = None
            return None

    def forged(self, faces: list[Tracked], mask: Mask | None, state: dict[str, Any]) -> list[Tracked]:
        """The forged faces of a frame: those that its mask touches; without its mask, of the people whom an earlier one
        touched, or else the largest.  Counts in ``state`` the frames in which that is not all or the largest."""
        if mask is not None:
            forged = forged_faces(faces, mask)
            state["masked"] += 1
            state["untouched"] += not forged
            state["not_largest"] += bool(forged and forged[0] is not faces[0])
            self.people |= {face.person for face in forged}
            return forged
        if not self.known:
            return faces
        state["unmasked"] += 1
        return [face for face in faces if face.person in self.people] if self.people else faces[:1]


def _points(job: PrepareJob, name: str | None, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    if name is None or job.table.lmdb:
        return None
    points = landmarks(job.table.root, name)
    return None if points is None else points * np.array([job.size / shape[1], job.size / shape[0]], np.float32)


@functools.cache
def _finder(config: FinderConfig) -> FaceFinder:
    return open_finder(config)


def _write_index(job: PrepareJob) -> None:
    """Joins the shards' status files into the index, once every shard of every worker share is finished."""
    states = []
    for shard in range(len(job.shards)):
        state = _state(job.out, shard, job.size, verify=False)
        if state is None:
            return  # another share is still at work
        states.append(state)
    lists = ("video", "frame", "person", "box", *(["mask_known"] if job.config.masks else []))
    joined = {name: [v for state in states for v in state[name]] for name in lists}
    if not joined["video"]:
        raise UsageError(f"{job.table.root}: no face was found in any of the {len(job.table.videos)} videos")
    status: list[dict[str, Any]] = [{}] * len(job.table.videos)
    for numbers, state in zip(job.shards, states, strict=True):
        for number, video in zip(numbers, state["status"], strict=True):
            status[number] = video
    index = {
        "version": VERSION,
        "size": job.size,
        "synthetic": job.table.synthetic,
        "dataset": job.table.dataset,
        **_settings(job.config),
        "crop": None if job.table.crops else asdict(job.config.policy),
        "landmarks": len(marks := {state["landmarks"] for state in states if state["rows"]}) == 1 and 0 not in marks,
        "notes": [*job.table.notes, *mask_notes(status)],
        "shards": [
            {"name": _name(k)} | {key: state[key] for key in ("rows", *CHECKSUMS) if key in state}
            for k, state in enumerate(states)
            if state["rows"]
        ],
        "videos": [video.to_json() for video in job.table.videos],
        "status": status,
        **joined,
    }
    write_whole(job.out / INDEX, sealed(index), shared=True)
    for partial in [*job.out.glob(".*.partial"), *(job.out / SHARDS).glob(".*.partial")]:  # of killed runs
        partial.unlink(missing_ok=True)


def mask_notes(status: list[dict[str, Any]]) -> list[str]:
    """Lines on how the masks and the largest faces disagree, and on frames without their mask; none when all agree."""
    total = {name: sum(state[name] for state in status) for name in ("masked", "not_largest", "untouched", "unmasked")}
    notes = []
    if total["not_largest"] or total["untouched"]:
        notes.append(f"in {total['not_largest']} of {total['masked']} frames with a mask the forged face is not the "
                     f"largest, and was cropped; in {total['untouched']} the mask touches no face that was found, and "
                     "none was cropped")  # fmt: skip
    if total["unmasked"]:
        notes.append(f"in {total['unmasked']} frames the mask is missing or cannot be read: the people forged in other "
                     "frames were cropped, or else the largest face")  # fmt: skip
    return notes


def _npy(array: NDArray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
