"""Detection on many inputs, and its output files: results.json, report.html, annotated videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.video_index import comment_of
from dtn_fast.detect.annotate import MARK
from dtn_fast.detect.annotate import annotate as write_annotated
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.inputs import find_inputs
from dtn_fast.detect.pipeline import detect, finder_of
from dtn_fast.detect.report import DETAILS, sentences, trained_on, write_report, write_results
from dtn_fast.detect.verdict import Result, Timing
from dtn_fast.errors import DtnError, UsageError, one_line
from dtn_fast.files import check_writable, fitting_name
from dtn_fast.model.card import remarks
from dtn_fast.runtime.scorer import Scorer


@dataclass
class BatchResult:
    """Results of many inputs."""

    inputs: int = 0
    """Number of inputs found."""
    results: list[Result] = field(default_factory=list)
    """Result of each input, in order."""
    timing: Timing = field(default_factory=Timing)
    """Times, summed over all inputs."""
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
) -> BatchResult:
    """Runs :func:`detect` on images, videos, folders (searched recursively) and globs; writes ``out``/results.json and
    report.html.

    annotate: also write each video with its faces framed and the forged spans marked.  finder: face finder; default:
    the model's, as in :func:`detect`.  watch: called often with the batch so far and a note of the current work.
    Raises UsageError without inputs; an input without a verdict adds a line to ``problems`` and does not stop the
    others.  Raises DtnError when ``scorer`` does, after writing the results of the inputs before.
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
    for number, (path, error) in enumerate(paths, 1):
        tell = lambda frames, name=one_line(path.name): watch(batch, f"{name}, {frames} frames")
        try:
            result = Result(path, error=error) if error else detect(path, scorer, config, finder, tell)
        except DtnError as failed:  # no input's fault: a server that stays away, a model whose logits overflow
            if batch.results:
                kept = f"{len(batch.results)} of {batch.inputs} inputs are done, in {out}"
                batch.notes.append(f"{failed}; {kept}")
                _write(batch, scorer, out)
                raise type(failed)(f"{failed}; {kept}") from failed
            raise
        batch.timing.add(result.timing)
        if result.error:
            batch.problems.append(result.error)
        elif annotate and result.moving:
            target = fitting_name(out, f"{number:03d}-{path.stem}", ".mp4")
            try:
                for drawn in write_annotated(result, target):
                    watch(batch, f"{one_line(target.name)}, {drawn} frames drawn")
                batch.annotated.append(target)
            except (DtnError, OSError, ValueError) as failed:  # PyAV's errors are OSErrors and ValueErrors
                batch.problems.append(f"{target}: the annotated video was not written ({failed})")
        doubts = [f"uncertain: {'; '.join(result.reasons)}"] if result.reasons else []
        for note in [*doubts, *(result.notes if result.ok else ())]:
            batch.notes.append(f"{path}: {note}")
        if result.ok and result.reading.share > config.max_lost:
            batch.problems.append(f"{path}: {result.reading.note()}, over --max-lost {config.max_lost:g}")
        if number > DETAILS:
            result.pictures, result.whole = [], None  # the report does not show them, and thousands fill the memory
        batch.results.append(result)
        watch(batch, one_line(path.name))
    if batch.own:
        batch.notes.append(f"{out}: {batch.own} annotated copies of an earlier run were left out")
    _write(batch, scorer, out)
    return batch


def _write(batch: BatchResult, scorer: Scorer, out: Path) -> None:
    known = remarks(scorer.config.card)
    write_results(out / "results.json", batch.results, scorer.notice, known)
    notices = [trained_on(scorer.notice), *sentences(known), *batch.notes]
    write_report(out / "report.html", "Face forgery report", notices, None, batch.results)
