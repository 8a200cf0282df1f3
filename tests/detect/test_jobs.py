"""Several inputs judged at once: the same results in the same order, progress, errors, the end of the work."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.dlib_finders import DlibFinder
from dtn_fast.data.faces import FoundFace
from dtn_fast.data.media_frames import frames_of
from dtn_fast.data.video import Frame
from dtn_fast.data.video_writer import write_video
from dtn_fast.detect import detect_many
from dtn_fast.detect.batch import BatchResult
from dtn_fast.detect.config import BatchConfig, DetectConfig
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.model.config import CropPolicy
from dtn_fast.runtime.scorer import Scored
from dtn_fast.runtime.torch_scorer import TorchScorer

FACE = data.astronaut()[:256, 96:352]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Videos of 40, 3 and 17 frames, a picture, a blank one, and a file that is no video."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, count in (("a", 40), ("c", 3), ("d", 17)):
        write_video(folder / f"{name}.mp4", [np.roll(FACE, k, 1) for k in range(count)], fps=10)
    Image.fromarray(FACE).save(folder / "b.png")
    Image.fromarray(np.zeros_like(FACE)).save(folder / "e.png")
    (folder / "f.mp4").write_text("hello")
    return [str(folder / name) for name in ("a.mp4", "b.png", "c.mp4", "d.mp4", "e.png", "f.mp4")]


@pytest.fixture(scope="module")
def finder() -> DlibFinder:
    return DlibFinder()


def scorer(kind: type[TorchScorer] = TorchScorer) -> Any:
    return kind(DTN(dataclasses.replace(SMALL, crop=CropPolicy())).eval())


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    """No test leaves a thread of detection; a server that other tests share may have some."""
    before = set(threading.enumerate())
    yield
    names = ("decoding", "scoring", "judging")
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(names)]


def test_several_at_once_give_what_one_at_a_time_gives(inputs: list[str], finder: DlibFinder, tmp_path: Path) -> None:
    model, made = scorer(), []
    for jobs in (1, 4):
        out = tmp_path / str(jobs)
        made.append(detect_many(inputs, model, out, DetectConfig(0), True, finder, work=BatchConfig(jobs)))
        for row in (stored := json.loads((out / "results.json").read_text()))["results"]:
            del row["timing"]
        (out / "results.json").write_text(json.dumps(stored))
    one, four = made
    assert (tmp_path / "1" / "results.json").read_text() == (tmp_path / "4" / "results.json").read_text()
    assert [result.path.name for result in four.results] == [Path(name).name for name in inputs]
    assert [path.name for path in four.annotated] == ["001-a.mp4", "003-c.mp4", "004-d.mp4"]
    for path, other in zip(one.annotated, four.annotated, strict=True):
        assert path.read_bytes() == other.read_bytes()
    assert (one.problems, one.notes) == (four.problems, four.notes)
    assert [len(result.frames) for result in four.results] == [40, 1, 3, 17, 0, 0]
    for a, b in zip(one.results, four.results, strict=True):
        for p, q in zip(a.pictures, b.pictures, strict=True):
            assert np.array_equal(p.crop, q.crop)
            assert np.array_equal(p.heat, q.heat)


def test_the_first_input_may_be_the_last_to_end(inputs: list[str], tmp_path: Path) -> None:
    """Its search waits until the others are judged, which is told; results keep the order of the inputs."""
    others, seen = threading.Event(), list[tuple[int, int, str]]()

    class Slow(DlibFinder):
        waited = 0

        def _search(self, frame: np.ndarray, smallest: float, quick: bool = False) -> list[FoundFace]:
            if frame.shape[0] == 320 and not self.waited:
                self.waited += others.wait(60)
            return super()._search(frame, smallest, quick)

    write_video(tmp_path / "slow.mp4", [cv2.resize(FACE, (320, 320))] * 3)

    def watch(batch: BatchResult, note: str) -> None:
        seen.append((batch.done, len(batch.results), note))
        if batch.done == 6:
            others.set()

    finder, names = Slow(), [str(tmp_path / "slow.mp4"), *inputs]
    batch = detect_many(names, scorer(), tmp_path / "out", finder=finder, watch=watch, work=BatchConfig(2))
    assert finder.waited == 1
    assert [str(result.path) for result in batch.results] == names
    assert (6, 0, "slow.mp4, 1 frames") in seen
    assert any(note.startswith("slow.mp4, 1 frames and 1 more") for *_, note in seen)
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert seen[-1][:2] == (7, 7)
    assert batch.timing.wall > 0


def test_scoring_takes_turns_and_a_batch_holds_one_input(inputs: list[str], finder: DlibFinder, tmp_path: Path) -> None:
    at_once, batches = [0, 0], list[int]()

    class Counting(TorchScorer):
        def judge(self, crops: np.ndarray) -> Scored:
            at_once[0] += 1
            at_once[1] = max(at_once)
            batches.append(len(crops))
            scored = super().judge(crops)
            at_once[0] -= 1
            return scored

    detect_many(inputs, scorer(Counting), tmp_path, DetectConfig(0), finder=finder, work=BatchConfig(4))
    assert at_once == [0, 1]
    assert sorted(batches) == [1, 1, 3, 8, 16, 16, 16]


@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interrupt_ends_all(tmp_path: Path, jobs: int) -> None:
    begun, faces = threading.Event(), list[int]()

    class Held(DlibFinder):
        """Finds nothing before the interrupt."""

        def __call__(self, frames: Sequence[np.ndarray], turned: bool = True) -> list[list[FoundFace]]:
            begun.wait(60)
            faces.append(len(frames))
            return [[] for _ in frames]

    def watch(batch: BatchResult, note: str) -> None:
        if " frames" in note:
            begun.set()
            raise KeyboardInterrupt

    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "0.mp4", [np.zeros((64, 64, 3), np.uint8)] * 500)
    for number in range(1, 4):
        os.link(tmp_path / "in" / "0.mp4", tmp_path / "in" / f"{number}.mp4")
    many = [str(tmp_path / "in")]
    (tmp_path / "results.json").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt, match="0 of 4 inputs are done"):
        detect_many(many, scorer(), tmp_path, DetectConfig(0), finder=Held(), watch=watch, work=BatchConfig(jobs))
    assert len(faces) < 1000
    assert json.loads((tmp_path / "results.json").read_text())["results"] == []


def test_an_error_of_the_model_ends_all(inputs: list[str], finder: DlibFinder, tmp_path: Path) -> None:
    class Overflowing(TorchScorer):
        def judge(self, crops: np.ndarray) -> Scored:
            raise DtnError("logits are not finite")

    with pytest.raises(DtnError, match="not finite"):
        detect_many(inputs, scorer(Overflowing), tmp_path, finder=finder, work=BatchConfig(3))


def test_jobs_share_the_cores(
    inputs: list[str], finder: DlibFinder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = list[tuple[int, int]]()

    def frames(path: Path, wanted: Any, threads: int, *rest: Any) -> Iterator[Frame]:
        taken.append((threads, cv2.getNumThreads()))
        return frames_of(path, wanted, threads, *rest)

    monkeypatch.setattr("dtn_fast.detect.pipeline.frames_of", frames)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    before = cv2.getNumThreads()
    for jobs, given in ((0, (4, 4)), (1, (8, 8)), (16, (4, 4))):
        taken.clear()
        detect_many(inputs[1:3], scorer(), tmp_path, finder=finder, work=BatchConfig(jobs))
        assert taken == [given] * 2
    assert cv2.getNumThreads() == before
    with pytest.raises(UsageError, match="--jobs -1"):
        BatchConfig(-1)
