"""Videos to crops: rows and reasons, kills, shards, a full disk, damage, people in motion, odd inputs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data
from small import SMALL

from dtn_fast.cli.prepare import prepare as prepare_verb
from dtn_fast.data import prepare as P
from dtn_fast.data import video
from dtn_fast.data.config import PrepareConfig, Source, WorkConfig
from dtn_fast.data.crop_dataset import open_crop_dataset
from dtn_fast.data.datasets import read
from dtn_fast.data.datasets.ffpp import read_ffpp
from dtn_fast.data.dlib_finders import DlibFinder
from dtn_fast.data.face_tracker import FaceTracker
from dtn_fast.data.faces import Box, FoundFace
from dtn_fast.data.prepare import PrepareProgress, prepare
from dtn_fast.data.video import read_frames
from dtn_fast.data.video_table import Video, VideoTable
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import MediaError, UsageError
from dtn_fast.files import write_whole
from dtn_fast.model.config import CropPolicy

SIZE = SMALL.image_size
EACH = PrepareConfig(frames=P.SHARD_CROPS, every=1)
"""As many frames as a part has crops: each video of the folder layout is a part of its own."""
FLAGS = ("--dataset", "folder", "--size", SIZE, "--frames", EACH.frames, "--every", EACH.every)
FACE = data.astronaut()[:256, 96:352]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(out: Path) -> dict[Path, int]:
    """The shards that are done, and when."""
    return {path: path.stat().st_mtime_ns for path in sorted((out / "shards").glob("[0-9]*.json"))}


def start(*words: object) -> subprocess.Popen[str]:
    """``dtn-fast prepare`` as a user runs it, in a process group of its own."""
    line = [sys.executable, "-m", "dtn_fast", "prepare", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    err = process.communicate(timeout=120)[1]
    return process.returncode, err


def wait_until(true: Callable[[], object], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.003)
    return bool(true())


class Thread(ThreadPoolExecutor):
    """A worker that needs no start: a thread of this process."""

    def __init__(self, workers: int, mp_context: object, **begin: Any) -> None:
        super().__init__(1, **begin)


@pytest.fixture(scope="module", autouse=True)
def inline() -> Iterator[None]:
    threads = cv2.getNumThreads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "ProcessPoolExecutor", Thread)
        yield
    cv2.setNumThreads(threads)


def run(table: VideoTable, out: Path, config: PrepareConfig = PrepareConfig(), **more: Any) -> dict[str, Any]:
    """Prepares, and reads the index; more: fields of WorkConfig."""
    for _ in prepare(table, out, SIZE, config, WorkConfig(**more)):
        pass
    return json.loads((out / "index.json").read_text())


@pytest.fixture(scope="module")
def many(video_set: Path, tmp_path_factory: pytest.TempPathFactory) -> VideoTable:
    """60 short videos, each a part."""
    root = tmp_path_factory.mktemp("many")
    sources = [*sorted(video_set.glob("*/*/c23/videos/*.mp4")), *sorted(video_set.glob("*/*/c23/videos/00[0-3]*.mp4"))]
    for number, source in enumerate(sources):
        folder = root / "test" / ("real" if "youtube" in source.parts else "forged")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / f"{number:03d}.mp4")
    return read(root, Source("folder"))


@pytest.fixture(scope="module")
def whole(many: VideoTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The crops of ``many``, made without interruption."""
    out = tmp_path_factory.mktemp("whole")
    run(many, out, EACH)
    assert len(finished(out)) == len(many.videos) == 60
    return out


def scene(*faces: tuple[int, int, int], width: int = 640) -> np.ndarray:
    """A grey picture with the astronaut at each (x, y, side); the middle of the face is at (0.5, 0.44) of the side."""
    image = np.full((320, width, 3), 90, np.uint8)
    for x, y, side in faces:
        image[y : y + side, x : x + side] = cv2.resize(FACE, (side, side), interpolation=cv2.INTER_AREA)
    return image


def texture(count: int) -> list[np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 255, (64, 96 + 3 * count, 3), np.uint8)
    return [np.ascontiguousarray(noise[:, 3 * i : 3 * i + 96]) for i in range(count)]


def encode(path: Path, frames: list[np.ndarray], codec: str = "libx264", pixels: str = "yuv420p",
           times: list[int] | None = None, **options: str) -> Path:  # fmt: skip
    """Any codec; ``times``: of the frames, in ms."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=1000 if times else 25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rows(*names: str, label: int = 0, target: str = "") -> list[Video]:
    return [Video(name, label, "X" if label else "real", "test", target=target) for name in names]


def test_every_video_has_its_rows_or_a_reason(video_set, crops, dataset, tmp_path: Path, monkeypatch) -> None:
    there = lambda path: path and f"{video_set}/{path}"
    good = [v._replace(path=there(v.path), target=there(v.target), mask=there(v.mask))
            for v in read_ffpp(video_set).videos]  # fmt: skip
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "blank.mp4", [np.full((200, 200, 3), 90, np.uint8)] * 4)
    monkeypatch.setattr(P, "SHARD_CROPS", 1)
    out = tmp_path / "out"
    index = run(
        VideoTable(tmp_path, [good[0], *rows("text.mp4", "blank.mp4"), *good[1:]]), out, PrepareConfig(frames=3)
    )
    for folder, shards in ((out, 10), (crops, 1)):  # a real and its fakes stay together
        assert {path.name for path in folder.iterdir()} == {"index.json", "job.json", "shards"}
        assert len(finished(folder)) == shards
    some = open_crop_dataset(out, verify=True)
    order = np.lexsort((some.frame, some.video))
    assert some.video[order].tolist() == [number for number in (0, *range(3, 42)) for _ in range(3)]
    assert some.frame[order].tolist() == [0, 1, 2] * 40
    assert not some.person.any()
    assert some.labels[order].reshape(8, 5, 3)[:, :, 0].tolist() == [[0, 1, 1, 1, 1]] * 8
    assert len(some.select("test")) == 30
    pictures = some.get(order)
    assert (pictures.shape, pictures.dtype) == ((120, SIZE, SIZE, 3), np.uint8)
    assert np.array_equal(pictures, dataset.get(np.lexsort((dataset.frame, dataset.video)))), "whatever the shards"
    assert all(40 < box[2] - box[0] == pytest.approx(box[3] - box[1], abs=2) for box in index["box"])
    fine = {"asked": 3, "frames": 3, "faces": 3, "boxes": "own", "error": None, "reason": None}
    fine |= dict.fromkeys(("masked", "not_largest", "untouched", "unmasked", "lost", "missing", "crowded"), 0)
    text, blank = some.status[1:3]
    each = [fine, *[{**fine, "masked": 3}] * 4]  # a real and its fakes, which have masks
    assert [some.status[0], *some.status[3:]] == dataset.status == each * 8
    assert (text["frames"], text["faces"], text["reason"]) == (0, 0, None)
    assert "text.mp4: cannot read this video" in text["error"]
    assert blank == {**fine, "faces": 0, "reason": "no face in 3 frames"}


def test_no_face_anywhere_is_a_usage_error(tmp_path: Path) -> None:
    write_video(tmp_path / "blank.mp4", [np.full((200, 200, 3), 90, np.uint8)] * 2)
    with pytest.raises(UsageError, match="no face was found in any of the 1 videos"):
        run(VideoTable(tmp_path, rows("blank.mp4")), tmp_path / "out")
    with pytest.raises(UsageError, match="unfinished prepare"):
        open_crop_dataset(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"text"])
def test_damaged_landmarks_leave_the_rows_in_step(tmp_path: Path, content: bytes) -> None:
    videos = []
    for name in ("a", "b"):
        for kind in ("frames", "landmarks"):
            (tmp_path / "set" / kind / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(texture(1)[0]).save(tmp_path / f"set/frames/{name}/{i}.png")
            np.save(tmp_path / f"set/landmarks/{name}/{i}.npy", np.ones((5, 2)))
        pictures = tuple(f"set/frames/{name}/{i}.png" for i in range(3))
        videos.append(Video(name, 0, "real", "train", frames=pictures))
    (tmp_path / "set/landmarks/a/1.npy").write_bytes(content)
    index = run(VideoTable(tmp_path, videos, crops=True), tmp_path / "out")
    some = open_crop_dataset(tmp_path / "out")
    assert "1.npy: cannot read these landmarks" in some.status[0]["error"]
    assert some.landmarks is not None
    assert len(index["box"]) == len(some.frame) == len(some.video) == len(some.landmarks) == len(some.crops)
    assert [*zip(some.video.tolist(), some.frame.tolist(), strict=True)][-3:] == [(1, 0), (1, 1), (1, 2)]
    assert some.status[0]["faces"] == np.count_nonzero(some.video == 0)
    (tmp_path / "out/shards/000000.landmarks.npy").unlink()
    run(VideoTable(tmp_path, videos, crops=True), tmp_path / "out")
    open_crop_dataset(tmp_path / "out")


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(many: VideoTable, whole: Path, tmp_path: Path) -> None:
    done: dict[Path, int] = {}
    for part in (1, 20, 40):
        process = start(many.root, "--out", tmp_path, *FLAGS)
        try:
            assert wait_until(lambda least=part: len(finished(tmp_path)) >= least)
            time.sleep(random.uniform(0, 0.03))
            assert process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            ended(process)
        assert len(done) < len(finished(tmp_path)) < 60
        assert done.items() <= finished(tmp_path).items(), "what is done is not done again"
        assert not (tmp_path / "index.json").exists()
        done = finished(tmp_path)
    for name in (".job.json.1.partial", ".index.json.1.partial", "shards/.000000.npy.1.partial"):
        (tmp_path / name).touch()  # as when killed just then
    assert ended(start(many.root, "--out", tmp_path, *FLAGS)) == (0, "")
    assert done.items() <= finished(tmp_path).items()
    assert files(tmp_path) == files(whole)


def parent_of(process: int | str) -> int:
    """From Linux's /proc; 0 when the process has ended."""
    with contextlib.suppress(OSError):
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
        return 0 if state in "ZX" else int(parent)
    return 0


def workers_of(process: int) -> list[int]:
    children = [path for path in Path("/proc").glob("[0-9]*") if parent_of(path.name) == process]
    return [int(path.name) for path in children if b"spawn_main" in (path / "cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_dead_process_ends_the_others(many: VideoTable, whole: Path, tmp_path: Path, victim: str) -> None:
    process = start(many.root, "--out", tmp_path, *FLAGS)
    try:
        assert wait_until(lambda: len(finished(tmp_path)) > 2)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
        process.wait(60)
        assert wait_until(lambda: not any(map(parent_of, workers)), 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code, err = ended(process)
    if victim == "worker":
        assert (code, err.count("\n")) == (1, 1)
        assert f"{tmp_path}: a worker was killed" in err
    done = len(finished(tmp_path))
    steps = [*prepare(many, tmp_path, SIZE, EACH, WorkConfig())]
    assert 2 < done == steps[0].done < steps[0].total == steps[-1].done == 60
    assert files(tmp_path) == files(whole)


def test_shares_on_several_machines_fill_one_folder(many: VideoTable, whole: Path, tmp_path: Path) -> None:
    both = [start(many.root, "--out", tmp_path, *FLAGS, "--share", f"{n}/3", "--workers", n) for n in (3, 1)]
    assert [ended(process) for process in both] == [(0, "")] * 2
    with pytest.raises(UsageError, match=r"index\.json is missing.*unfinished prepare"):
        open_crop_dataset(tmp_path)
    assert files(tmp_path).items() < files(whole).items()
    steps = [*prepare(many, tmp_path, SIZE, EACH, WorkConfig(share="2/3"))]
    assert (steps[0], steps[-1].done) == (PrepareProgress(0, 20, 0), 20)
    assert files(tmp_path) == files(whole)
    for wrong in ({"share": "0/3"}, {"share": "4/3"}, {"share": "half"}, {"workers": 0}):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
            run(many, tmp_path, EACH, **wrong)


def test_writers_with_the_same_process_number_do_not_meet(tmp_path: Path, monkeypatch) -> None:
    """Containers on two machines number their processes alike, and every shard writes job.json."""
    path, between = tmp_path / "job.json", list[int]()
    write = lambda: write_whole(path, b"same", shared=True)
    monkeypatch.setattr(os, "fsync", lambda file: between or between.append(file) or write())
    write()
    assert between
    assert files(tmp_path) == {"job.json": b"same"}
    sweep = lambda _file: [partial.unlink() for partial in tmp_path.glob(".*partial")]  # another machine has finished
    write_whole(path, sweep, shared=True)
    assert files(tmp_path) == {"job.json": b"same"}
    with pytest.raises(FileNotFoundError):
        write_whole(path, sweep)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs needs root: {getattr(error, 'stderr', None) or error!r}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_one_line_and_more_space_ends_it(many: VideoTable, whole: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    code, err = ended(start(many.root, "--out", out, *FLAGS))
    assert (code, err.count("\n")) == (1, 1)
    assert f"{out}: No space left" in err
    done = finished(out)
    assert 5 < len(done) < 60
    assert files(out).items() < files(whole).items(), "no partial file is left"
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert ended(start(many.root, "--out", out, *FLAGS)) == (0, "")
    assert done.items() <= finished(out).items()
    assert files(out) == files(whole)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], bool]] = {
    "half": ("npy", half, False),
    "empty": ("npy", lambda content: b"", False),
    "header": ("npy", lambda content: content[:8] + b"B" + content[9:], False),  # numpy reads half of it
    "pixel": ("npy", lambda content: content[:-1] + bytes([content[-1] ^ 1]), True),
    "status half": ("json", half, False),
    "status a list": ("json", lambda content: b"[]", False),
    "status without frames": ("json", lambda content: content.replace(b'"frame"', b'"drame"'), False),
    "status of other frames": ("json", lambda content: content.replace(b'"frame": [0', b'"frame": [7'), True),
}
"""Which file, what happens to it, whether only --verify sees it."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_only_the_damaged_part_is_made_again(many: VideoTable, whole: Path, tmp_path: Path, kind: str) -> None:
    suffix, damage, hidden = DAMAGE[kind]
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    victim = out / "shards" / f"000003.{suffix}"
    victim.write_bytes(damage(victim.read_bytes()))
    if suffix == "npy":
        with pytest.raises(UsageError, match=r"damaged crops .*--verify") as error:
            open_crop_dataset(out, verify=hidden)
        assert "\n" not in str(error.value)
    before = finished(out)
    run(many, out, EACH, verify=hidden)
    assert files(out) == files(whole)
    assert [path.name for path, when in finished(out).items() if before[path] != when] == ["000003.json"]
    open_crop_dataset(out, verify=True)


def test_a_lost_or_damaged_index_is_written_again(many: VideoTable, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    index, good = out / "index.json", (whole / "index.json").read_bytes()
    version = good.replace(b'"version": 4', b'"version": 1', 1)
    for content in (None, b"", b"[]", b"{}", b"null", b"\xff\xfe", half(good), version):
        index.unlink() if content is None else index.write_bytes(content)
        match = "index.json is missing" if content is None else "version 1" if content == version else "damaged crops"
        with pytest.raises(UsageError, match=match) as error:
            open_crop_dataset(out)
        assert "\n" not in str(error.value)
        run(many, out, EACH)
        assert index.read_bytes() == good
    assert files(out) == files(whole)


def test_a_flipped_bit_anywhere_in_the_index_is_refused(many: VideoTable, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    index, good = out / "index.json", (whole / "index.json").read_bytes()
    draw = random.Random(0)
    some = [draw.randrange(8 * len(good)) for _ in range(50)]
    label = good.index(b'"label": 0') + len(b'"label": ')  # a real becomes a fake
    for bit in (8 * label, *range(8 * 40), *some):  # 40: past the checksum and the version
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        index.write_bytes(flipped)
        with pytest.raises(UsageError, match=r"damaged crops \(.*run the same dtn-fast prepare") as error:
            open_crop_dataset(out)
        assert "\n" not in str(error.value)
    run(many, out, EACH)
    assert files(out) == files(whole)
    earlier = {key: value for key, value in json.loads(good).items() if key != "check"}
    index.write_text(json.dumps(earlier))
    assert np.array_equal(open_crop_dataset(out).labels, open_crop_dataset(whole).labels)


@pytest.mark.parametrize("suffix", ["npy", "landmarks.npy", "masks.npy"])
def test_verify_checks_every_shard_file_and_counts(tmp_path: Path, suffix: str, capsys, monkeypatch) -> None:
    for name in "ab":
        for kind in ("frames", "landmarks"):
            (tmp_path / "set" / kind / name).mkdir(parents=True)
        Image.fromarray(FACE).save(tmp_path / f"set/frames/{name}/0.png")
        np.save(tmp_path / f"set/landmarks/{name}/0.npy", np.full((5, 2), 7.0))
    videos = [Video(name, 0, "real", "test", mask="set", frames=(f"set/frames/{name}/0.png",)) for name in "ab"]
    monkeypatch.setattr("dtn_fast.data.datasets.read", lambda *_: VideoTable(tmp_path, videos, crops=True))
    out, config = tmp_path / "out", PrepareConfig(frames=P.SHARD_CROPS, masks=True)
    prepared = lambda verify: prepare_verb(tmp_path, out, config=config, work=WorkConfig(verify=verify), size=SIZE)
    prepared(False)
    whole = files(out)
    victim = out / "shards" / f"000001.{suffix}"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x01")
    assert files(out) != whole
    open_crop_dataset(out)
    with pytest.raises(UsageError, match=rf"damaged crops \({victim.name} has another checksum"):
        open_crop_dataset(out, verify=True)
    prepared(False)
    assert "checked" not in capsys.readouterr().out
    assert files(out) != whole, "not looked at"
    for damaged in (1, 0):
        prepared(True)
        assert f"2 shards checked, {damaged} of them damaged and made again" in capsys.readouterr().out
        assert files(out) == whole
    open_crop_dataset(out, verify=True)


def test_another_job_in_the_same_folder_is_refused(many: VideoTable, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    for table, size, config, match in [
        (many, SIZE, PrepareConfig(frames=9, every=1), "frames 256 .now 9."),
        (many, 32, EACH, "size 64 .now 32."),
        (VideoTable(many.root, many.videos[1:], "folder"), SIZE, EACH, "videos 60 .now 59."),
    ]:
        with pytest.raises(UsageError, match=f"holds crops with {match}") as error:
            next(prepare(table, tmp_path / "out", size, config, WorkConfig()))
        assert "\n" not in str(error.value)
    assert files(tmp_path / "out") == files(whole)
    job = tmp_path / "out" / "job.json"
    old = job.read_bytes().replace(b'"version": 4', b'"version": 1')
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", old):
        job.write_bytes(content)
        found = "crops of version 1, this program continues version 4 only"
        with pytest.raises(UsageError, match=found if content == old else r"job\.json: damaged"):
            next(prepare(many, tmp_path / "out", SIZE, EACH, WorkConfig()))
        assert job.read_bytes() == content


class KnownFaces:
    """A finder told where the faces of each frame are; remembers which frames it searched as a whole."""

    shake = 0.0

    def __init__(self, frames: list[list[Box]]) -> None:
        self.frames, self.whole = frames, list[int]()

    def __call__(self, frames: list[np.ndarray], turned: bool) -> list[list[FoundFace]]:
        (image,) = frames
        self.whole.append(int(image[0, 0, 0]))
        return [[FoundFace(box, 1.0) for box in sorted(self.frames[image[0, 0, 0]], key=lambda box: -box.area)]]

    def near(self, image: np.ndarray, face: FoundFace) -> FoundFace | None:
        here = [box for box in self.frames[image[0, 0, 0]] if box.overlap(face.box) > 0.1]
        return FoundFace(max(here, key=face.box.overlap), 1.0) if here else None


def track(frames: list[list[Box]], every: int) -> tuple[list[dict[int, Box]], list[int]]:
    """Per frame the box of each person; and the frames that were searched as a whole."""
    finder: Any = KnownFaces(frames)
    tracker, found = FaceTracker(finder, every), []
    for number in range(len(frames)):
        faces = tracker(np.full((1, 1, 3), number, np.uint8))
        found.append({face.person: face.box for face in faces})
        assert len(found[-1]) == len(faces)
        assert [face.box.area for face in faces] == sorted((face.box.area for face in faces), reverse=True)
    return found, finder.whole


def at(x: int, y: int = 0, side: int = 100) -> Box:
    return Box(x, y, x + side, y + side)


def test_the_whole_frame_is_searched_now_and_then_and_when_a_face_is_lost() -> None:
    steady = [[at(10 * i)] for i in range(20)]
    same = [{0: boxes[0]} for boxes in steady]
    assert track(steady, 8) == (same, [0, 8, 16])
    assert track(steady, 1) == (same, [*range(20)])
    gone = [[] if 3 <= i < 6 else [at(10 * i)] for i in range(12)]
    found = [*same[:3], {}, {}, {}, *same[6:12]]  # back soon and near: the same person
    assert track(gone, 8) == (found, [0, 3, 4, 5, 6])
    long = [[] if 3 <= i < 13 else [at(0)] for i in range(16)]  # the track has ended; a new one
    assert track(long, 8)[0] == [*[{0: at(0)}] * 3, *[{}] * 10, *[{1: at(0)}] * 3]
    assert track([[at(0)]] * 2 + [[at(500)]] * 2, 8) == ([{0: at(0)}] * 2 + [{1: at(500)}] * 2, [0, 2])


def test_people_who_cross_keep_their_numbers_and_newcomers_get_their_own() -> None:
    cross = [[at(10 * i, 0, 110), at(300 - 10 * i, 60)] for i in range(30)]
    for every in (1, 4, 30):
        assert track(cross, every)[0] == [{0: a, 1: b} for a, b in cross]
    merge = [[at(90 + 20 * i, 0, 110), at(150)] for i in range(16)]
    merge = [boxes[:1] if 2 < i < 5 else boxes for i, boxes in enumerate(merge)]  # the nearer one hides the other
    found, whole = track(merge, 4)
    assert whole == [0, 2, 3, 7, 11, 15]  # when they come close, when they are one, and every fourth
    assert [list(faces.values()) for faces in found] == [b[:1] if 2 < i < 7 else b for i, b in enumerate(merge)]
    assert [set(faces) for faces in found[:3]] == [{0, 1}] * 3
    assert [set(faces) for faces in found[7:]] == [{0, 1}] * 9  # hidden for a while, not forgotten
    newcomer = [[at(0)] + [at(400, 0, 80)] * (i >= 3) for i in range(10)]
    for every, seen in ((8, 8), (1, 3)):
        found, _ = track(newcomer, every)
        assert found == [{0: at(0)}] * seen + [{0: at(0), 1: at(400, 0, 80)}] * (10 - seen)


def test_two_people_keep_numbers_and_good_boxes_between_whole_searches(tmp_path: Path, monkeypatch) -> None:
    places = [((6 * i, 10, 240), (440 - 5 * i, 100, 180)) for i in range(20)]
    write_video(tmp_path / "two.mp4", [scene(*pair) for pair in places])
    table, search, searched = VideoTable(tmp_path, rows("two.mp4")), DlibFinder.__call__, [0]
    counted = lambda *a, **b: searched.append(searched.pop() + 1) or search(*a, **b)
    monkeypatch.setattr(DlibFinder, "__call__", counted)
    boxes = {}
    for every, times in ((1, 20), (8, 23)):
        index = run(table, tmp_path / f"{every}", PrepareConfig(frames=20, people="all", every=every))
        assert searched == [times]
        assert index["frame"] == [frame for frame in range(20) for _ in range(2)]
        assert index["person"] == [0, 1] * 20
        boxes[every] = [Box(*box) for box in index["box"]]
        for box, (x, y, side) in zip(boxes[every], (place for pair in places for place in pair), strict=True):
            middle = (box.left + box.right) / 2, (box.top + box.bottom) / 2
            assert middle == pytest.approx((x + 0.5 * side, y + 0.44 * side), abs=25)
    assert min(a.overlap(b) for a, b in zip(boxes[1], boxes[8], strict=True)) > 0.6
    index = run(table, tmp_path / "largest", PrepareConfig(frames=20))
    assert index["box"] == [list(box) for box in boxes[8][::2]]


def test_fakes_are_cropped_where_their_real_is(tmp_path: Path) -> None:
    frames = [scene((20 * i, 20, 240)) for i in range(4)]
    write_video(tmp_path / "real.mp4", frames)
    write_video(tmp_path / "faceless.mp4", [np.full_like(frame, 60) for frame in frames])
    write_video(tmp_path / "small.mp4", [cv2.resize(frame, (480, 240)) for frame in frames])
    fakes = rows("faceless.mp4", "small.mp4", label=1, target="real.mp4")
    table = VideoTable(tmp_path, [*fakes, *rows("real.mp4")])
    index = run(table, tmp_path / "out", PrepareConfig(frames=4, reuse_boxes=True))
    assert [state["boxes"] for state in index["status"]] == ["real", "own", "own"]
    boxes = [np.array([b for b, v in zip(index["box"], index["video"], strict=True) if v == n]) for n in range(3)]
    assert np.array_equal(boxes[0], boxes[2])
    assert np.abs(boxes[1] / 0.75 - boxes[2]).max() < 25
    assert boxes[2].shape == (4, 4)
    index = run(table, tmp_path / "own", PrepareConfig(frames=4, margin=1.7))
    assert open_crop_dataset(tmp_path / "own").crop == CropPolicy(margin=1.7)
    assert [state["boxes"] for state in index["status"]] == ["own"] * 3
    assert index["status"][0]["reason"] == "no face in 4 frames"


def same_frames(path: Path, total: int = 40, uneven: bool = False) -> None:
    """Picked frames are, bit for bit, those of decoding everything, at the same numbers and times, in order; uneven:
    those nearest to points in time."""
    everything = list(read_frames(path))
    assert [frame.number for frame in everything] == [*range(total)]
    for count in (1, 2, 5, 17, total):
        numbers = np.linspace(0, total - 1, min(count, total)).round().astype(int)
        if uneven and 1 < count < total:
            times = np.array([frame.seconds for frame in everything])
            points = np.linspace(0, times[-1], count)
            numbers = np.unique(np.abs(times[:, None] - points).argmin(0))
        wanted = [everything[n] for n in numbers]
        for threads in (1, 2):
            some = list(read_frames(path, count, threads))
            assert [frame.number for frame in some] == [frame.number for frame in wanted], (count, threads)
            for a, b in zip(some, wanted, strict=True):
                assert np.array_equal(a.image, b.image), (count, threads, a.number)
                assert a.seconds == pytest.approx(b.seconds), (count, threads, a.number)


STREAMS: dict[str, tuple[str, dict[str, str], int | None]] = {
    "one group.mp4": ("libx264", {"bf": "3"}, 39),
    "short groups.mp4": ("libx264", {"g": "5", "bf": "2"}, 15),
    "pairs.mov": ("libx264", {"g": "2", "bf": "1"}, 10),
    "key frames.mkv": ("libx264", {"g": "1"}, 6),
    "open groups.mkv": ("libx264", {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:b-adapt=0"}, 35),
    "one key frame.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=8"}, None),
    "short groups.webm": ("libvpx-vp9", {"g": "8", "deadline": "realtime", "cpu-used": "8"}, 30),
    "mpeg4.avi": ("mpeg4", {"g": "6"}, None),
    "mpeg4 with B.avi": ("mpeg4", {"g": "6", "bf": "2"}, None),
    "h264.avi": ("libx264", {"g": "12", "bf": "2"}, None),
    "h264 of key frames.avi": ("libx264", {"g": "1"}, None),
    "mpeg1.mpg": ("mpeg1video", {"g": "6"}, None),
}
"""Codec, its options, and how many of 40 frames may be decoded for 5: None where seeking cannot be relied on."""


@pytest.mark.parametrize("name", STREAMS)
def test_picked_frames_are_those_of_decoding_everything(tmp_path: Path, monkeypatch, name: str) -> None:
    codec, options, most = STREAMS[name]
    path = encode(tmp_path / name, texture(40), codec, **options)
    same_frames(path)
    decoded, decode = list[Any](), video._decode
    monkeypatch.setattr(video, "_decode", lambda *a, **k: (decoded.append(f) or f for f in decode(*a, **k)))
    assert len(list(read_frames(path, 5, threads=1))) == 5
    assert most is None or 5 <= len(decoded) <= most


def test_a_video_that_starts_between_key_frames(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mkv", texture(40), g="10", bf="2")
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.dts is not None and number >= 4:
                packet.stream = stream
                out.mux(packet)
    same_frames(tmp_path / "cut.mkv", 30)


def test_uneven_timestamps(tmp_path: Path) -> None:
    times = np.cumsum([0, *np.random.default_rng(1).choice([2, 17, 40, 41, 500], 39)]).tolist()
    for suffix in ("mkv", "mp4"):
        path = encode(tmp_path / f"a.{suffix}", texture(40), times=times, g="7", bf="2")
        assert [round(1000 * frame.seconds) for frame in read_frames(path)] == times
        same_frames(path, uneven=True)


PIXELS = [("mp4", "libx264", "yuv420p10le"), ("mkv", "ffv1", "yuva420p"), ("mov", "png", "rgba"),
          ("mov", "qtrle", "argb"), ("mkv", "ffv1", "gray")]  # fmt: skip


@pytest.mark.parametrize(("suffix", "codec", "pixels"), PIXELS)
def test_deep_and_transparent_pixels_are_rgb(tmp_path: Path, suffix: str, codec: str, pixels: str) -> None:
    frames = [np.full((64, 96, 3), (40 + 8 * i, 90, 200 - 8 * i), np.uint8) for i in range(16)]
    if pixels == "gray":
        frames = [np.full_like(frame, frame.mean()) for frame in frames]
    path = encode(tmp_path / f"a.{suffix}", frames, codec, pixels)
    some = list(read_frames(path, 4, 1))
    assert [frame.number for frame in some] == [0, 5, 10, 15]
    for frame in some:
        assert (frame.image.shape, frame.image.dtype) == ((64, 96, 3), np.uint8)
        assert np.abs(frame.image.astype(int) - frames[frame.number]).max() < 5
    same_frames(path, 16)


def test_one_bad_input_does_not_stop_the_others(tmp_path: Path) -> None:
    faces = [scene((20 + 2 * i, 20, 240), width=320) for i in range(12)]
    write_video(tmp_path / "portrait.mp4", [np.ascontiguousarray(np.rot90(f, -1)) for f in faces], rotation=90)
    encode(tmp_path / "deep.mp4", faces, pixels="yuv420p10le")
    encode(tmp_path / "alpha.mov", faces, "qtrle", "argb")
    encode(tmp_path / "uneven.mkv", faces, times=[i * i * 40 for i in range(12)])
    cut = encode(tmp_path / "cut.mkv", faces, g="3")
    cut.write_bytes(half(cut.read_bytes()))
    (tmp_path / "zero.mp4").touch()
    unknown = encode(tmp_path / "unknown.mp4", faces)
    unknown.write_bytes(unknown.read_bytes().replace(b"avc1", b"zzzz"))
    bad, good = ["zero.mp4", "unknown.mp4"], ["portrait.mp4", "deep.mp4", "alpha.mov", "uneven.mkv", "cut.mkv"]
    index = run(VideoTable(tmp_path, rows(*bad, *good)), tmp_path / "out", PrepareConfig(frames=4))
    for name, state in zip(bad, index["status"][:2], strict=True):
        assert f"{name}: " in state["error"]
        assert "\n" not in state["error"]
        assert (state["frames"], state["faces"]) == (0, 0)
        with pytest.raises(MediaError, match=name):
            list(read_frames(tmp_path / name))
    assert not any(state["error"] or state["reason"] for state in index["status"][2:])
    found = [[f for f, v in zip(index["frame"], index["video"], strict=True) if v == place] for place in range(2, 7)]
    assert found[:4] == [*[[0, 4, 7, 11]] * 3, [0, 6, 9, 11]]  # the last is even in time
    assert 2 <= len(found[4]) <= 4
    assert max(found[4]) < 11
    for frame, (left, _, right, _) in zip(index["frame"], index["box"], strict=True):
        assert (left + right) / 2 == pytest.approx(140 + 2 * frame, abs=25)


def test_one_bad_picture_does_not_cost_its_video_the_others(tmp_path: Path) -> None:
    names = [f"v/{number}.png" for number in range(4)]
    (tmp_path / "v").mkdir()
    for name in names:
        Image.fromarray(FACE).save(tmp_path / name)
    (tmp_path / names[1]).write_bytes(b"no picture")
    table = VideoTable(tmp_path, [Video("v", 0, "real", "test", frames=tuple(names))])
    index = run(table, tmp_path / "out")
    assert index["frame"] == [0, 2, 3]
    assert (index["status"][0]["lost"], index["status"][0]["error"]) == (1, None)
    for name in names:
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(UsageError, match="no face was found in any"):
        run(table, tmp_path / "none")
    state = json.loads((tmp_path / "none" / "shards" / "000000.json").read_text())["status"][0]
    assert "3.png: cannot read this image" in state["error"]
