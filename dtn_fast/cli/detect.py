"""Verbs that judge: detect, serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from dtn_fast.cli.options import Runtimed
from dtn_fast.cli.terminal import print_table, progress
from dtn_fast.detect.report import trained_on
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.runtime.config import Runtime
from dtn_fast.serve.config import ServeConfig


def detect(
    inputs: Annotated[list[str], tyro.conf.Positional],
    model: Path,
    out: Path = Path("detect"),
    frames: int = 32,
    rate: float = 0.0,
    threshold: float = 0.5,
    annotate: bool = False,
    runtime: Runtimed = Runtime(),
) -> int:
    """Say of images and videos whether their faces are forged, whose, when and where.

    Example: dtn-fast detect clip.mp4 photos/ "more/**/*.jpg" --model runs/first --out detect --annotate

    Prints a table and writes OUT/results.json and OUT/report.html.  Exit code 0: every input has a verdict; 1: some
    could not be read or show no face; 2: usage.

    Args:
        inputs: Images, videos, folders (searched recursively) and globs.
        model: A run, a checkpoint folder, or an .onnx, .mnn, .engine or .rtx file.
        out: Folder for the results.
        frames: Frames per video, spread evenly; 0: all.
        rate: Frames per second of video instead.
        threshold: P(fake) from which the verdict is fake.
        annotate: Also write each video with faces framed and forged spans marked.
        runtime: How the model runs.
    """
    from dtn_fast.data.faces import FaceFinder
    from dtn_fast.data.video import VIDEOS
    from dtn_fast.detect.annotate import annotate as write_annotated
    from dtn_fast.detect.inputs import find_inputs
    from dtn_fast.detect.pipeline import detect as run
    from dtn_fast.detect.report import write_report, write_results
    from dtn_fast.detect.verdict import RULE, Result, Timing
    from dtn_fast.runtime.load import load_scorer

    if frames < 0 or not rate >= 0:
        raise UsageError(f"--frames {frames}, --rate {rate}: not below 0")
    if not inputs:
        raise UsageError("no inputs; example: dtn-fast detect clip.mp4 --model runs/first")
    scorer, detector = load_scorer(model, runtime), FaceFinder()
    paths, results, timing, written, unwritten = list(find_inputs(inputs)), [], Timing(), [], 0
    with progress() as bar:
        task = bar.add_task("detecting", total=len(paths), note="")
        for number, (path, error) in enumerate(paths):
            tell = lambda read, path=path: bar.update(task, note=f"{path.name}, {read} frames")
            result = Result(path, error=error) if error else run(path, scorer, detector, frames, threshold, rate, tell)
            results.append(result)
            timing.add(result.timing)
            if result.error:
                print(f"dtn-fast: {result.error}", file=sys.stderr)
            elif annotate and path.suffix.lower() in VIDEOS:
                target = out / f"{number + 1:03d}-{path.stem}.mp4"
                try:
                    for drawn in write_annotated(result, target, threshold):
                        bar.update(task, note=f"{target.name}, {drawn} frames drawn")
                    written.append(target)
                except (DtnError, OSError, ValueError) as failed:  # PyAV's errors are OSErrors and ValueErrors
                    unwritten += 1
                    print(f"dtn-fast: {target}: the annotated video was not written ({failed})", file=sys.stderr)
            bar.advance(task)
    rows = [
        [str(r.path), r.verdict, f"{r.score:.3f}" if r.score is not None else "", str(len(r.people) or ""),
         ", ".join(f"{s.start:.1f}-{s.end:.1f}" for s in r.spans[:4]) + (", ..." if len(r.spans) > 4 else "")
         if r.path.suffix.lower() in VIDEOS else "", f"{len(r.frames)} of {r.frames_read}"]
        for r in results
    ]  # fmt: skip
    header = ["input", "verdict", "P(fake)", "people", "forged, seconds", "frames with a face"]
    print_table("Verdicts", header, rows)
    print(f"{RULE}; fake from {threshold} up" + (f"\n{scorer.notice}" if scorer.notice else ""))
    read = sum(r.frames_read for r in results)
    if read:
        print(
            f"{read} frames in {timing.wall:.1f} s, {read / max(timing.wall, 1e-9):.1f} frames/s; "
            f"work: {timing.shares()}"
        )
    write_results(out / "results.json", results, scorer.notice, threshold)
    write_report(out / "report.html", "Face forgery report", [trained_on(scorer.notice)], None, results, threshold)
    print("\n".join([f"report: {out / 'report.html'}", *(f"annotated: {path}" for path in written[:8])]))
    if len(written) > 8:
        print(f"and {len(written) - 8} more annotated videos in {out}")
    return int(unwritten > 0 or not all(r.ok for r in results))


def serve(
    model: Annotated[Path, tyro.conf.Positional],
    config: Annotated[ServeConfig, tyro.conf.OmitArgPrefixes] = ServeConfig(),
    runtime: Runtimed = Runtime(),
) -> None:
    """Serve a model over HTTP: a page to drop an image or a video on, and the same for programs.

    Example: dtn-fast serve runs/first --port 8000

    For programs: curl -T clip.mp4 "http://127.0.0.1:8000/v1/detect?name=clip.mp4"; also /healthz, /readyz, /metrics.

    Args:
        model: A run, a checkpoint folder, or an .onnx, .mnn, .engine or .rtx file.
        config: Limits and address.
        runtime: How the model runs.
    """
    from dtn_fast.runtime.load import load_scorer
    from dtn_fast.serve.app import run

    run(load_scorer(model, runtime), config)
