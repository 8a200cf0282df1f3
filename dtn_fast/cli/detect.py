"""Verbs that give verdicts: detect, serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from dtn_fast.cli.terminal import print_table, progress
from dtn_fast.detect.batch import BatchResult, detect_many
from dtn_fast.detect.config import BatchConfig, DetectConfig
from dtn_fast.detect.report import limits_in_words, sentences
from dtn_fast.detect.verdict import Result, rule_of, short_names
from dtn_fast.errors import UsageError, one_line
from dtn_fast.model.card import remarks
from dtn_fast.packages import require
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_scorer
from dtn_fast.serve.config import ServeConfig

UNCERTAIN = 3
"""Exit code when every input was read and some verdict is uncertain."""
SPANS, FILES = 4, 8
"""Maximum number of forged spans per input, and of annotated videos, to print; the report has all spans."""


def detect(
    inputs: Annotated[list[str], tyro.conf.Positional],
    model: Path | None = None,
    server: str | None = None,
    out: Path = Path("detect"),
    config: Annotated[DetectConfig, tyro.conf.OmitArgPrefixes] = DetectConfig(),
    annotate: bool = False,
    work: Annotated[BatchConfig, tyro.conf.OmitArgPrefixes] = BatchConfig(),
    runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes] = Runtime(),
) -> int:
    """Detect forged faces in images and videos: which people, and when.

    Example: dtn-fast detect clip.mp4 photos/ "more/**/*.jpg" --model runs/first --out detect --annotate

    Prints a table and writes OUT/results.json and OUT/report.html.  Exit code 0: every input is called real or fake; 1:
    some could not be read, show no face or lost more than --max-lost of their frames; 2: wrong usage; 3: all were read,
    and some are uncertain.

    Faces are found as for the training crops of the model; --faces yunet finds small, turned and half hidden ones too.

    On a server: dtn-fast detect clip.mp4 --server http://host:8000/dtn (or grpc://host:8001/dtn) finds the faces here
    and scores them there, on the model that dtn-fast repository wrote.

    Args:
        inputs: Images, videos, folders (searched recursively) and globs.
        model: A run, a checkpoint folder, or an .onnx, .mnn, .engine or .rtx file.
        server: Address of a Triton Inference Server that holds the model, instead of --model.
        out: Folder for the results.
        config: Frames to analyse, limits of the verdict, and how faces are found.
        annotate: Also write each video with faces framed and forged spans marked.
        work: Number of inputs judged at once.
        runtime: Device and precision that the model runs with.
    """
    if (given := model or server) is None or (model and server):
        raise UsageError("name a model with --model, or the server that holds it with --server: one of the two")
    printed = 0
    scorer = load_scorer(given, runtime)
    with progress() as bar:
        task = bar.add_task("detecting", total=None, note="")

        def watch(batch: BatchResult, note: str) -> None:
            nonlocal printed
            bar.update(task, total=batch.inputs, completed=batch.done, note=note)
            for problem in batch.problems[printed:]:
                print(f"dtn-fast: {one_line(problem)}", file=sys.stderr)
            printed = len(batch.problems)

        batch = detect_many(inputs, scorer, out, config, annotate, watch=watch, work=work)
    header = ["input", "verdict", "P(fake)", "people", "forged, seconds", "frames with a face"]
    folder, names = short_names([result.path for result in batch.results])
    cells = [_cells(result, name) for result, name in zip(batch.results, names, strict=True)]
    print_table("Verdicts" + (f", in {folder}" if folder else ""), header, cells)
    print(
        "; ".join([rule_of(scorer.clips is not None), *limits_in_words(batch.results)])
        + (f"\n{scorer.notice}" if scorer.notice else "")
    )
    for sentence in sentences(remarks(scorer.config.card)):
        print(sentence)
    if batch.frames_read:
        wall = batch.timing.wall
        print(f"{batch.frames_read} frames in {wall:.1f} s, {batch.frames_read / max(wall, 1e-9):.1f} frames/s; "
              f"work: {batch.timing.shares()}")  # fmt: skip
    for note in batch.notes:
        print(one_line(note))
    print(f"report: {out / 'report.html'}")
    for path in batch.annotated[:FILES]:
        print(f"annotated: {one_line(str(path))}")
    if len(batch.annotated) > FILES:
        print(f"and {len(batch.annotated) - FILES} more annotated videos in {out}")
    return 1 if not batch.ok else UNCERTAIN if batch.uncertain else 0


def _cells(result: Result, name: str) -> list[str]:
    spans = [f"{span.start:.1f}-{span.end:.1f}" for span in result.spans]
    shown = ", ".join(spans[:SPANS]) + (", ..." if len(spans) > SPANS else "")
    score = f"{result.score:.3f}" if result.score is not None else ""
    faces = f"{len(result.frames)} of {result.frames_read}"
    return [name, result.verdict, score, str(len(result.people) or ""), shown, faces]


def serve(
    model: Annotated[Path, tyro.conf.Positional],
    config: Annotated[ServeConfig, tyro.conf.OmitArgPrefixes] = ServeConfig(),
    detection: Annotated[DetectConfig, tyro.conf.OmitArgPrefixes] = DetectConfig(),
    runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes] = Runtime(),
) -> None:
    """Serve a model over HTTP: a web page to drop images and videos on, and an API for programs.

    Example: dtn-fast serve runs/first --port 8000

    For programs: curl -T clip.mp4 "http://127.0.0.1:8000/v1/detect?name=clip.mp4", or a form, curl -F file=@clip.mp4
    http://127.0.0.1:8000/v1/detect; long videos as a job, with progress, at /v1/jobs.  /openapi.json describes all
    routes; also /healthz, /readyz, /metrics.

    Ctrl-C or SIGTERM: new uploads are refused with status 503, accepted uploads are answered, and accepted jobs are
    finished and their results kept for ten seconds, for up to --timeout seconds; then the exit code is 0.  A second
    signal ends at once.  Connections that send no request for ten seconds are closed.

    Args:
        model: A run, a checkpoint folder, or an .onnx, .mnn, .engine or .rtx file.
        config: Address and limits.
        detection: Frames to analyse, limits of the verdict, and how faces are found.
        runtime: Device and precision that the model runs with.
    """
    require("uvicorn")
    from dtn_fast.serve.app import Service
    from dtn_fast.serve.server import Server, listen

    listening, address = listen(config)
    with listening:
        scorer = load_scorer(model, runtime)
        server = Server(Service(scorer, config, detection))
        known = [scorer.notice] if scorer.notice else []
        address = f"{scorer.name} on {address} (web page at /, API at /v1/detect and /v1/jobs; Ctrl-C stops)"
        print("\n".join([address, *known, *sentences(remarks(scorer.config.card))]), flush=True)
        server.run(sockets=[listening])
