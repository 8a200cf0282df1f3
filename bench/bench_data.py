"""Benchmark of the data path on one core: decoding, face finding, preparing, reading crops, augmentation; and of
detection on whole videos with all cores.

Run: dtn-fast bench data
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dtn_fast import DTN, DTNConfig
from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import Case
from dtn_fast.data.augment import Augment, DeviceAugment
from dtn_fast.data.blend import self_blended
from dtn_fast.data.config import AUGMENTATIONS, FinderConfig, PrepareConfig
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.dlib_finders import DlibFinder
from dtn_fast.data.face_finders import open_finder
from dtn_fast.data.face_tracker import FaceTracker
from dtn_fast.data.faces import Box, crop_face, cut_of
from dtn_fast.data.loader import Loader
from dtn_fast.data.open import open_data
from dtn_fast.data.randomness import sample_seeds
from dtn_fast.data.video import read_frames
from dtn_fast.data.video_table import Video
from dtn_fast.data.video_writer import write_video
from dtn_fast.model.config import CropPolicy, FinderName
from dtn_fast.packages import require
from dtn_fast.runtime.torch_scorer import TorchScorer

SUITE = "data"
FRAMES, SAMPLED, CROPS, BATCH = 120, 24, 1024, 64


def cases(machine: Machine | None = None, quick: bool = False) -> Iterator[Case]:
    """Every case that this machine has the packages for."""
    with tempfile.TemporaryDirectory() as folder:
        with one_core():
            if videos := all(map(importlib.util.find_spec, ("av", "dlib", "skimage"))):
                video = film(Path(folder), FRAMES // (6 if quick else 1))
                for case in (prepare_case, decode_case, detect_case):
                    yield case(*video)
            kept = stored(Path(folder), CROPS // (8 if quick else 1))
            yield reading_case(*kept)
            for preset in sorted(AUGMENTATIONS):
                yield augment_case(kept[0], preset)
            yield blend_case(kept[1])
        if videos:
            for name in throughput_finders():
                yield throughput_case(video[0], name)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Limits OpenCV and torch to one thread inside the ``with`` block, to measure one core."""
    threads = torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(-1)
        torch.set_num_threads(threads)


def film(folder: Path, count: int) -> tuple[Path, list[Box]]:
    """Writes a 1280x720 video of a photographed face that moves and changes size; its path, and a box per frame."""
    from skimage import data

    face = data.astronaut()[:280, 90:370]
    true = DlibFinder()([face])[0][0].box
    rng, frames, boxes = np.random.default_rng(0), [], []
    back = cv2.resize(rng.integers(60, 140, (18, 32, 3), np.uint8), (1280, 720), interpolation=cv2.INTER_CUBIC)
    for index in range(count):
        side = int(280 * (1.1 + 0.4 * np.sin(index / 30)))
        left, top = int(500 + 350 * np.sin(index / 25)), int(180 + 100 * np.cos(index / 19))
        frame = back.copy()
        frame[top : top + side, left : left + side] = cv2.resize(face, (side, side))
        noisy = frame + rng.normal(0, 3, frame.shape)
        frames.append(np.clip(noisy, 0, 255).astype(np.uint8))
        x, y = true.center
        boxes.append(Box.around((left + x * side / 280, top + y * side / 280), true.side * side / 280))
    write_video(folder / "face.mp4", frames, fps=30)
    return folder / "face.mp4", boxes


def _fast(path: Path) -> dict[int, Box]:
    """Boxes found as by prepare: sampled frames, face tracker, crops."""
    tracker, found = FaceTracker(DlibFinder(), PrepareConfig.every), {}
    for frame in read_frames(path, SAMPLED, threads=1):
        if faces := tracker(frame.image):
            crop_face(frame.image, cut_of(faces[0].box, None, CropPolicy()), 256)
            found[frame.number] = faces[0].box
    return found


def _slow(path: Path) -> dict[int, Box]:
    """Boxes found by decoding every frame and searching it at full size."""
    import dlib

    detect, found = dlib.get_frontal_face_detector(), {}
    for frame in read_frames(path, threads=1):
        rectangles = sorted(detect(frame.image, 0), key=lambda r: -r.area())
        if rectangles:
            r = rectangles[0]
            found[frame.number] = Box(r.left(), r.top(), r.right() + 1, r.bottom() + 1)
            crop_face(frame.image, cut_of(found[frame.number], None, CropPolicy()), 256)
    return found


def _recall(found: dict[int, Box], true: list[Box], frames: list[int]) -> float:
    return float(np.mean([number in found and found[number].overlap(true[number]) > 0.5 for number in frames]))


def prepare_case(path: Path, true: list[Box]) -> Case:
    """Case of faces cropped per second; the notes give both ways' recall on the frames that the fast way samples."""
    fast, slow = _fast(path), _slow(path)
    sampled = [frame.number for frame in read_frames(path, SAMPLED, threads=1)]
    notes = (f"recall on {len(sampled)} sampled frames (overlap > 0.5): prepare {_recall(fast, true, sampled):.2f}, "
             f"every frame at full size {_recall(slow, true, sampled):.2f}",
             f"the slow way searches {len(true)} frames to crop the same {len(sampled)}")  # fmt: skip
    return Case(
        SUITE, f"Prepare, 1280x720, {len(sampled)} of {len(true)} frames, one core",
        {"every frame decoded, full-size detection": lambda: _slow(path), "prepare": lambda: _fast(path)},
        "prepare", "every frame decoded, full-size detection", len(sampled), notes=notes, rounds=3,
    )  # fmt: skip


def decode_case(path: Path, true: list[Box]) -> Case:
    step = max(len(true) // SAMPLED, 1)
    return Case(
        SUITE, f"Decode, 1280x720 H.264, {min(SAMPLED, len(true))} of {len(true)} frames, one core",
        {
            "every frame, then choose": lambda: [f for f in read_frames(path, threads=1) if f.number % step == 0],
            "read_frames(count)": lambda: list(read_frames(path, SAMPLED, threads=1)),
        },
        "read_frames(count)", "every frame, then choose", min(SAMPLED, len(true)),
    )  # fmt: skip


def detect_case(path: Path, true: list[Box]) -> Case:
    frames = list(read_frames(path, SAMPLED, threads=1))
    finder, dlib = DlibFinder(), require("dlib").get_frontal_face_detector()

    def track() -> list[Box]:
        tracker = FaceTracker(finder, PrepareConfig.every)
        return [faces[0].box for frame in frames if (faces := tracker(frame.image))]

    return Case(
        SUITE, "Detect, 1280x720, one core",
        {
            "dlib HOG at full size": lambda: [dlib(frame.image, 0) for frame in frames],
            "DlibFinder": lambda: finder([frame.image for frame in frames]),
            "FaceTracker": track,
        },
        "FaceTracker", "dlib HOG at full size", len(frames), rounds=3,
    )  # fmt: skip


def throughput_finders() -> dict[FinderName, Path | None]:
    """Model file by finder: dlib, which has none, and YuNet if $DTN_YUNET names its file."""
    yunet = os.environ.get("DTN_YUNET")
    return {"dlib": None, **({"yunet": Path(yunet)} if yunet else {})}


def throughput_case(path: Path, name: FinderName) -> Case:
    """Case of whole videos judged one at a time and several at once, two for each core and every frame of each.

    The lower bound is the larger of two times: the CPU seconds of the three stages, each run alone (decoding; finding,
    following and cropping faces; scoring), divided by the number of cores; and the seconds of the slowest stage of one
    video, since a video's frames are decoded and searched in order.  The rest of the time goes to queues, copies,
    threads in each other's way, heat maps and the report.
    """
    from dtn_fast.detect.batch import detect_many  # needs packages that the other suites do not
    from dtn_fast.detect.config import BatchConfig, DetectConfig
    from dtn_fast.detect.pipeline import BATCH as SCORED

    cores, finder = torch.get_num_threads(), open_finder(FinderConfig(name, throughput_finders()[name]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset = "paper" if device == "cuda" else "tiny"
    torch.manual_seed(0)
    scorer = TorchScorer(DTN(DTNConfig.preset(preset)).eval().to(device))
    config, inputs, out = DetectConfig(frames=0), list[str](), path.parent / "detected"
    for number in range(2 * cores):
        inputs.append(str(path.with_name(f"{number}.mp4")))
        Path(inputs[-1]).write_bytes(path.read_bytes())

    def faces() -> list[np.ndarray]:
        tracker = FaceTracker(finder, config.every)
        cut = lambda image, face: crop_face(image, cut_of(face.box, None, CropPolicy()), scorer.config.image_size)
        return [cut(frame.image, face) for frame in frames for face in tracker(frame.image)]

    frames = list(read_frames(path))
    crops = np.stack(faces())
    stages: dict[str, Callable[[], object]] = {
        "decoding": lambda: list(read_frames(path)), "finding faces": faces,
        "scoring": lambda: [scorer.score(crops[k : k + SCORED]) for k in range(0, len(crops), SCORED)],
    }  # fmt: skip
    alone = {name: min(_seconds(stage) for _ in range(3)) for name, stage in stages.items()}
    work = len(inputs) * sum(cpu for _, cpu in alone.values()) / cores
    many = lambda jobs: lambda: detect_many(inputs, scorer, out, config, finder=finder, work=BatchConfig(jobs))
    each = ", ".join(f"{name} {wall:.2f} s ({cpu:.2f} CPU seconds)" for name, (wall, cpu) in alone.items())
    return Case(
        SUITE, f"Detect, {len(inputs)} videos of 1280x720, {len(frames)} frames each, {name}, {preset} model, "
        f"{cores} cores, share of the slowest stage",
        {f"detect --jobs {jobs}": many(jobs) for jobs in (1, cores)}, f"detect --jobs {cores}", "detect --jobs 1",
        len(inputs) * len(frames), lower_bound=max(work, *(wall for wall, _ in alone.values())),
        notes=(f"the stages of one video alone, on the {device}: {each}",), rounds=3,
    )  # fmt: skip


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a call takes, and CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


class _Jpegs(Dataset):
    """Dataset of an image file per sample, read by PIL, as in most training code."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(self.paths[index]).convert("RGB")))


def stored(root: Path, count: int) -> tuple[np.ndarray, CropDataset, Path]:
    """Writes the same 256x256 pictures as one memory map, as shard files of 256, and as JPEGs of quality 95."""
    rng = np.random.default_rng(0)
    face = cv2.resize(rng.integers(0, 255, (32, 32, 3), np.uint8), (256, 256), interpolation=cv2.INTER_CUBIC)
    crops = np.stack([np.roll(face, int(rng.integers(256)), 1) for _ in range(count)])
    np.save(root / "all.npy", crops)
    parts = []
    for first in range(0, count, 256):
        np.save(root / f"{first}.npy", crops[first : first + 256])
        parts.append(np.load(root / f"{first}.npy", mmap_mode="r"))
    for number, crop in enumerate(crops):
        path = root / "jpeg" / "train" / ("real" if number % 2 else "Swap") / "video" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    zeros = np.zeros(count, np.int64)
    videos = [Video("real", 0, "real", "train"), Video("fake", 1, "Swap", "train")]
    dataset = CropDataset(ShardFiles(parts, 256), np.arange(count) % 2, zeros, zeros, videos, [{}, {}], False)
    return np.load(root / "all.npy", mmap_mode="r"), dataset, root / "jpeg"


def reading_case(flat: np.ndarray, dataset: CropDataset, jpegs: Path) -> Case:
    """Case of a shuffled epoch in batches of 64; the baseline is a bare gather from one memory map."""
    order = np.random.default_rng(1).permutation(len(flat))
    batches = order.reshape(-1, BATCH)
    folder, buffer = open_data(jpegs, 256), np.empty((BATCH, 256, 256, 3), np.uint8)
    pictures = _Jpegs(sorted(jpegs.rglob("*.jpg")))

    epoch = (0,), 0  # seed, repeats of a real: as many as balance the classes

    def drain(loader: Loader) -> None:
        for batch in loader.epoch(0):
            loader.release(batch)

    contenders: dict[str, Callable[[], object]] = {
        "DataLoader + PIL, JPEG q95": lambda: list(map(len, DataLoader(pictures, BATCH, sampler=order.tolist()))),
        "Loader, folder of JPEGs (2 threads)": lambda: drain(Loader(folder, order, BATCH, *epoch)),
        "CropDataset.get": lambda: [dataset.get(rows) for rows in batches],
        "Loader, shards": lambda: drain(Loader(dataset, order, BATCH, *epoch)),
        "bare numpy gather, one memory map": lambda: [flat[rows] for rows in batches],
        "the same into one buffer": lambda: [np.take(flat, rows, 0, buffer, "clip") for rows in batches],
    }
    if torch.cuda.is_available():
        contenders["Loader, shards to the GPU"] = lambda: drain(Loader(dataset, order, BATCH, *epoch, device="cuda"))
    return Case(
        SUITE, f"Reading 256x256 crops from the page cache, batches of {BATCH}", contenders,
        "Loader, shards", "bare numpy gather, one memory map", len(flat), bytes=2.0 * flat.nbytes,
    )  # fmt: skip


def augment_case(flat: np.ndarray, preset: str) -> Case:
    crops, seeds = np.array(flat[:BATCH]), sample_seeds(0, np.arange(BATCH))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device, tensor = DeviceAugment(AUGMENTATIONS[preset]), torch.from_numpy(crops).to(device)
    contenders: dict[str, Callable[[], object]] = {}
    notes: tuple[str, ...] = () if device == "cuda" else ("on a GPU, for which the device pipeline is made: not run",)
    if importlib.util.find_spec("albumentations"):
        on_cpu = Augment(AUGMENTATIONS[preset])
        contenders["albumentations"] = lambda: on_cpu(crops, seeds)
    else:
        notes = (*notes, "albumentations is not installed: not run")
    batched = f"device pipeline, on the {device}"
    contenders[batched] = lambda: on_device(tensor, seeds)
    baseline = next(iter(contenders))
    ours = batched if device == "cuda" else baseline
    return Case(SUITE, f"Augmentation '{preset}', 256x256, one core", contenders, ours, baseline, BATCH, notes=notes,
                rounds=5)  # fmt: skip


def blend_case(dataset: CropDataset) -> Case:
    blended = self_blended(dataset, 0)
    rows = np.arange(BATCH) + len(blended.crops) // 2
    return Case(SUITE, "Self-blending, 256x256, all cores", {"self_blended": lambda: blended.get(rows)}, "self_blended",
                "self_blended", BATCH, rounds=5)  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[np.ndarray, CropDataset, Path]]:
    with one_core():
        yield stored(tmp_path_factory.mktemp("stored"), CROPS)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Box]]]:
    with one_core():
        yield film(tmp_path_factory.mktemp("film"), FRAMES)


@pytest.mark.parametrize("case", [prepare_case, decode_case, detect_case])
def bench_video(compare, video: tuple[Path, list[Box]], case: Callable[..., Case]) -> None:
    compare(case(*video))


@pytest.mark.parametrize("name", throughput_finders())
def bench_throughput(compare, video: tuple[Path, list[Box]], name: FinderName) -> None:
    compare(throughput_case(video[0], name))


def bench_reading(compare, kept: tuple[np.ndarray, CropDataset, Path]) -> None:
    compare(reading_case(*kept))


@pytest.mark.parametrize("preset", sorted(AUGMENTATIONS))
def bench_augment(compare, kept: tuple[np.ndarray, CropDataset, Path], preset: str) -> None:
    compare(augment_case(kept[0], preset))


def bench_self_blend(compare, kept: tuple[np.ndarray, CropDataset, Path]) -> None:
    compare(blend_case(kept[1]))
