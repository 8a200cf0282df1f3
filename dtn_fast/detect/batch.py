"""Detection on many inputs, and its output files: results.json, report.html, annotated videos."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import torch

from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.video_index import comment_of
from dtn_fast.detect.annotate import MARK
from dtn_fast.detect.annotate import annotate as write_annotated
from dtn_fast.detect.config import BatchConfig, DetectConfig
from dtn_fast.detect.inputs import find_inputs
from dtn_fast.detect.pipeline import detect, finder_of
from dtn_fast.detect.report import DETAILS, sentences, trained_on, write_report, write_results
from dtn_fast.detect.verdict import Result, Timing
from dtn_fast.errors import DtnError, UsageError, one_line
from dtn_fast.files import check_writable, fitting_name
from dtn_fast.model.card import remarks
from dtn_fast.producer_thread import POLL, Stopped
from dtn_fast.runtime.scorer import Scorer

MOST_JOBS = 16
"""Maximum number of inputs judged at once unless more are asked for; each holds a few frames in memory."""


@dataclass
class BatchResult:
    """Results of many inputs."""

    inputs: int = 0
    """Number of inputs found."""
    done: int = 0
    """Number of inputs judged so far; later ones may be judged before an earlier one."""
    results: list[Result] = field(default_factory=list)
    """Result of each input, in order."""
    timing: Timing = field(default_factory=Timing)
    """Work on all inputs, and seconds elapsed."""
    own: int = 0
    """Number of annotated copies in the folder of the results, which were left out."""
    annotated: list[Path] = field(default_factory=list)
    """Annotated videos written."""
    notes: list[str] = field(default_factory=list)
    """A line for each input of which frames were lost, or not every face was judged."""
    problems: list[str] = field(default_factory=list)
    """A line for each input without a verdict, or with one on too few of its frames, and for each annotated video that
    could not be written."""

    @property
    def ok(self) -> bool:
        """Whether every input has a verdict on enough of its frames and every annotated video was written."""
        return not self.problems

    @property
    def uncertain(self) -> int:
        """Number of inputs whose verdict is uncertain."""
        return sum(result.verdict == "uncertain" for result in self.results)

    @property
    def frames_read(self) -> int:
        return sum(result.frames_read for result in self.results)


def detect_many(
    inputs: Sequence[str],
    scorer: Scorer,
    out: Path,
    config: DetectConfig = DetectConfig(),
    annotate: bool = False,
    finder: FaceFinder | None = None,
    watch: Callable[[BatchResult, str], object] = lambda _batch, _note: None,
    work: BatchConfig = BatchConfig(),
) -> BatchResult:
    """Runs :func:`detect` on images, videos, folders (searched recursively) and globs; writes ``out``/results.json and
    report.html.

    annotate: also write each video with its faces framed and the forged spans marked.  finder: face finder; default:
    the model's, as in :func:`detect`.  watch: called often with the batch so far and a note of the current work; an
    exception raised by it ends the work.  work: how many inputs are judged at once.  Raises UsageError without inputs;
    an input without a verdict adds a line to ``problems`` and does not stop the others.  Raises DtnError when
    ``scorer`` does, after writing the results of the inputs before.
    """
    if not inputs:
        raise UsageError("no inputs; name images, videos, folders or globs, such as clip.mp4")
    check_writable(out)  # before the work, which would be lost
    batch = BatchResult()
    paths = []
    for path, error in find_inputs(list(inputs)):
        own = str(path) not in inputs and path.parent.resolve() == out.resolve() and comment_of(path) == MARK
        paths += [] if own else [(path, error)]
        batch.own += own
    finder = finder or finder_of(scorer, config)
    batch.inputs = len(paths)
    jobs = min(work.jobs or min(torch.get_num_threads(), MOST_JOBS), max(len(paths), 1))
    begin = time.perf_counter()
    try:
        with closing(_Judging(scorer, out, config, finder, annotate, jobs).all(paths, batch, watch)) as every:
            for judged in every:
                result = judged.result
                batch.timing.add(result.timing)
                batch.problems += judged.problems
                batch.annotated += [judged.annotated] if judged.annotated else []
                doubts = [f"uncertain: {'; '.join(result.reasons)}"] if result.reasons else []
                batch.notes += [f"{result.path}: {note}" for note in [*doubts, *(result.notes if result.ok else ())]]
                batch.results.append(result)
                watch(batch, one_line(result.path.name))
    except DtnError as failed:  # no input's fault: a server that stays away, a model whose logits overflow
        if batch.results:
            kept = f"{len(batch.results)} of {batch.inputs} inputs are done, in {out}"
            batch.notes.append(f"{failed}; {kept}")
            _write(batch, scorer, out)
            raise type(failed)(f"{failed}; {kept}") from failed
        raise
    except KeyboardInterrupt:
        kept = f"{len(batch.results)} of {batch.inputs} inputs are done, in {out}"
        batch.notes.append(f"interrupted; {kept}")
        _write(batch, scorer, out)  # in place of an earlier run's
        raise KeyboardInterrupt(kept) from None
    batch.timing.wall = time.perf_counter() - begin
    if batch.own:
        batch.notes.append(f"{out}: {batch.own} annotated copies of an earlier run were left out")
    _write(batch, scorer, out)
    return batch


def _write(batch: BatchResult, scorer: Scorer, out: Path) -> None:
    known = remarks(scorer.config.card)
    write_results(out / "results.json", batch.results, scorer.notice, known)
    notices = [trained_on(scorer.notice), *sentences(known), *batch.notes]
    write_report(out / "report.html", "Face forgery report", notices, None, batch.results)


class _Judged(NamedTuple):
    result: Result
    annotated: Path | None
    problems: list[str]


class _Judging:
    """Judges inputs on ``jobs`` threads, which decode and find faces; one more thread scores the faces of all."""

    def __init__(
        self, scorer: Scorer, out: Path, config: DetectConfig, finder: FaceFinder, annotate: bool, jobs: int
    ) -> None:
        self._scorer, self._out, self._config, self._finder = scorer, out, config, finder
        self._annotate, self._jobs = annotate, jobs
        self._threads = max(torch.get_num_threads() // max(jobs, 1), 1)
        """Number of threads that each input's decoder takes."""
        self._notes: dict[int, str] = {}
        """Note of the current work on each input in work, by number."""
        self._done: list[int] = []
        """Numbers of the inputs that are judged."""
        self._stop = threading.Event()

    def all(
        self, paths: list[tuple[Path, str | None]], batch: BatchResult, watch: Callable[[BatchResult, str], object]
    ) -> Generator[_Judged, None, None]:
        """What came of each input, in order.  ``watch`` is called while it waits; an error, also of ``watch``, and
        closing the iterator end all."""
        with (
            _opencv_threads(self._threads),
            ThreadPoolExecutor(1, "scoring") as scoring,
            ThreadPoolExecutor(self._jobs, "judging") as pool,
        ):
            try:
                waiting = deque(pool.submit(self._one, *place, scoring) for place in enumerate(paths, 1))
                while waiting:
                    future = waiting.popleft()
                    while wait([future], timeout=POLL).not_done:
                        batch.done = len(self._done)
                        watch(batch, self._note())
                    batch.done = len(self._done)
                    yield future.result()
            finally:
                self._stop.set()
                scoring.shutdown(wait=False, cancel_futures=True)
                pool.shutdown(cancel_futures=True)

    def _one(self, number: int, given: tuple[Path, str | None], scoring: ThreadPoolExecutor) -> _Judged:
        path, error = given
        config, name = self._config, one_line(path.name)
        problems, annotated = list[str](), None
        try:
            tell = lambda frames: self._tell(number, f"{name}, {frames} frames")
            result = Result(path, error=error)
            if not error:
                result = detect(path, self._scorer, config, self._finder, tell, threads=self._threads, pool=scoring)
            if result.error:
                problems.append(result.error)
            elif self._annotate and result.moving:
                target = fitting_name(self._out, f"{number:03d}-{path.stem}", ".mp4")
                try:
                    for drawn in write_annotated(result, target):
                        self._tell(number, f"{one_line(target.name)}, {drawn} frames drawn")
                    annotated = target
                except (DtnError, OSError, ValueError) as failed:  # PyAV's errors are OSErrors and ValueErrors
                    problems.append(f"{target}: the annotated video was not written ({failed})")
            if result.ok and result.reading.share > config.max_lost:
                problems.append(f"{path}: {result.reading.note()}, over --max-lost {config.max_lost:g}")
            if number > DETAILS:
                result.pictures, result.whole = [], None  # the report does not show them, and thousands fill the memory
            return _Judged(result, annotated, problems)
        finally:
            self._notes.pop(number, None)
            self._done.append(number)

    def _tell(self, number: int, note: str) -> None:
        if self._stop.is_set():
            raise Stopped
        self._notes[number] = note

    def _note(self) -> str:
        """Note of the work on the earliest input that is not judged, and the number of others in work."""
        notes = sorted(self._notes.copy().items())
        others = f" and {len(notes) - 1} more" if len(notes) > 1 else ""
        return notes[0][1] + others if notes else ""


@contextmanager
def _opencv_threads(threads: int) -> Iterator[None]:
    """Limits OpenCV to ``threads`` threads a call inside."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
