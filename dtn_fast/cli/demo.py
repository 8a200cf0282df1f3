"""The demo, in minutes on real files: makes a dataset, trains, distils, evaluates, exports, detects, reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.cli.evaluate import calibrate
from dtn_fast.cli.prepare import prepare, synthesize
from dtn_fast.cli.terminal import print_table
from dtn_fast.cli.train import distill, train
from dtn_fast.data.config import FinderConfig, PrepareConfig, SyntheticConfig, WorkConfig
from dtn_fast.data.crop_dataset import open_crop_dataset
from dtn_fast.data.pictures import read_image
from dtn_fast.data.prepare import finished
from dtn_fast.data.synthetic_faces import film
from dtn_fast.data.synthetic_marker import HELD_OUT, METHODS, STAMP
from dtn_fast.data.video_writer import write_video
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.pipeline import detect, finder_of
from dtn_fast.detect.report import ReportTable, sentences, trained_on, write_report, write_results
from dtn_fast.detect.verdict import Result
from dtn_fast.errors import DtnError
from dtn_fast.evaluation.evaluate import evaluate
from dtn_fast.export.to_onnx import Parity, export_onnx
from dtn_fast.model.card import remarks
from dtn_fast.model.detector import Detector
from dtn_fast.packages import require
from dtn_fast.ranges import Workers
from dtn_fast.runtime.load import load_model, load_scorer
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train.config import PRESETS, Recipe
from dtn_fast.train.run_folder import generation_folder, summarise

RECIPE, DETECTION = PRESETS["demo"].recipe, DetectConfig(frames=24)


@contextmanager
def _stage(number: int, title: str) -> Iterator[None]:
    start = time.perf_counter()
    print(f"\n[{number}/8] {title}", flush=True)
    yield
    print(f"      {time.perf_counter() - start:.0f} s", flush=True)


def run(out: Path, workers: int, size: SyntheticConfig = SyntheticConfig(), recipe: Recipe = RECIPE) -> None:
    """Runs the demo and prints its results.  Raises DtnError when the exported model gives other scores than torch."""
    begin = time.perf_counter()
    data, crops, training = out / "data", out / "crops", out / "run"
    with _stage(1, f"Rendering faces and forging them by {len(METHODS)} methods"):
        synthesize(data, size, workers)
    with _stage(2, "Finding and cropping faces with dlib"):
        if finished(crops):
            print("already done")
        else:
            # the rendered faces fill their frames, ten in a video
            near = PrepareConfig(8, FinderConfig(min_face=80), masks=True)
            prepare(data, crops, config=near, work=WorkConfig(workers), preset="tiny")
    with _stage(3, "Training the teacher (CE + Ct-c)"):
        train(crops, training, recipe, preset="demo")
    with _stage(4, "Distilling students (DSD)"):
        distill(crops, training, recipe=recipe)
    summary = summarise(training)
    with _stage(5, f"Evaluating on unseen identities; {HELD_OUT} was never trained on"):
        quality = _evaluate(training, crops, recipe, summary)
        print_table(*quality[:3])
    with _stage(6, "Calibrating: limits that keep a false-alarm rate"):
        calibrate(training, crops)
    model = load_model(training)
    with _stage(7, "Exporting to ONNX and comparing with torch"):
        parity = export_onnx(model, out / "dtn.onnx")
        worst = max(parity, key=lambda p: p.error)
        print(f"largest logit error {worst.error:.2e} over batch sizes {', '.join(str(p.batch) for p in parity)}")
    with _stage(8, "Detecting in videos"):
        results = _detect(model, out, size)
    _report(out, summary, quality, parity, results, model.notice, remarks(model.config.card))
    teacher, best = quality.rows[0], quality.rows[summary["best"]]
    print(f"\nDone in {time.perf_counter() - begin:.0f} s ({STAMP})")
    print(f"teacher   test frame AUC {teacher[1]}, held-out forgery {teacher[2]}")
    print(f"{best[0]:9s} test frame AUC {best[1]}, held-out forgery {best[2]} (best on validation)")
    print(f"ONNX      largest logit error {worst.error:.2e}")
    for result in results:
        print(f"{result.verdict:9s} {result.path}" + (f", P(fake) {result.score:.3f}" if result.ok else ""))
    print(f"report    {out / 'report.html'}")


def _evaluate(training: Path, crops: Path, recipe: Recipe, summary: dict[str, Any]) -> ReportTable:
    """Metrics of every generation on the test identities, for the training forgeries and the held-out one."""
    dataset, rows = open_crop_dataset(crops), []
    groups = {"trained on": recipe.methods, "held out": (HELD_OUT,)}
    for row in summary["generations"]:
        generation = row["generation"]
        measured = evaluate(load_scorer(generation_folder(training, generation)), dataset, groups=groups)
        seen, unseen = measured.rows
        rows.append([
            f"student {generation}" if generation else "teacher",
            *(r.text("auc") for r in (seen.frame, unseen.frame, seen.video, unseen.video)),
            "best on validation" if generation == summary["best"] else "",
        ])  # fmt: skip
    header = ["model", "frame AUC", f"{HELD_OUT}, frame", "video AUC", f"{HELD_OUT}, video", ""]
    return ReportTable(f"Test identities ({STAMP})", header, rows, measured.note())


def _detect(model: Detector, out: Path, size: SyntheticConfig) -> list[Result]:
    """Verdicts on three videos by the checkpoint.  Raises DtnError when the ONNX file gives other scores."""
    videos = make_videos(out / "videos", size.train + size.val, size.seed)
    scorers = TorchScorer(model), load_scorer(out / "dtn.onnx")
    finder = finder_of(scorers[0], DETECTION)
    results, onnx = ([detect(path, scorer, DETECTION, finder) for path in videos] for scorer in scorers)
    for a, b in zip(results, onnx, strict=True):
        if a.verdict != b.verdict or abs((a.score or 0) - (b.score or 0)) > 1e-3:
            raise DtnError(f"{a.path}: torch scores {a.score}, the exported model {b.score}; please report this")
    rows = [[str(r.path), r.verdict, f"{r.score:.3f}" if r.ok else r.error or ""] for r in results]
    print_table("Verdicts (the ONNX file gives the same)", ["input", "verdict", "P(fake)"], rows)
    return results


def _report(
    out: Path,
    summary: dict[str, Any],
    quality: ReportTable,
    parity: list[Parity],
    results: list[Result],
    notice: str,
    known: list[str],
) -> None:
    """Writes report.html and results.json."""
    generations = ReportTable("Generations", ["generation", "epochs", "validation frame AUC"], [
        [str(r["generation"]), str(r["epochs"]), f"{r['val_auc']:.4f}"] for r in summary["generations"]
    ])  # fmt: skip
    export_table = ReportTable("ONNX against torch", ["batch", "largest logit error"], [
        [str(p.batch), f"{p.error:.2e}"] for p in parity
    ])  # fmt: skip
    photos = "The photographs show real people; this model's verdicts on them mean nothing."
    notices, tables = [trained_on(notice), *sentences(known), photos], [generations, quality, export_table]
    write_report(out / "report.html", "dtn_fast demo", notices, tables, results)
    write_results(out / "results.json", results, notice, known)


def demo(out: Path = Path("runs/demo"), workers: Workers = WorkConfig.workers) -> None:
    """Run every step once, in minutes on real files: make a dataset, train, distil, evaluate, export, detect.

    Example: dtn-fast demo --out runs/demo

    Args:
        out: Folder for all files; an interrupted demo resumes there.
        workers: Number of processes that render and crop.
    """
    run(out, workers)


def make_videos(folder: Path, identity: int, seed: int) -> list[Path]:
    """Writes three test videos unless they exist (a synthetic real, its forgery, real photographs); their paths."""
    photos = folder / "photographs.mp4"
    made = {
        folder / "synthetic-real.mp4": lambda: film(identity, None, None, 48, 256, seed + 1, 12),
        folder / "synthetic-fake.mp4": lambda: film(identity, identity + 1, "SynthSwap", 48, 256, seed + 1, 12),
        photos: lambda: [*_pan(_astronaut()), *_pan(_hopper())],
    }
    for path, frames in made.items():
        if not path.is_file():
            write_video(path, frames(), fps=12)
    return list(made)


def _astronaut() -> NDArray[np.uint8]:
    data = require("skimage.data")
    return data.astronaut()


def _hopper() -> NDArray[np.uint8]:
    from matplotlib import cbook

    return read_image(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))


def _pan(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """A slow zoom into the upper middle of a photograph, 480x480."""
    height, width = image.shape[:2]
    out = []
    for index in range(DETECTION.frames):
        side = int(min(height, width) * (1 - 0.2 * index / DETECTION.frames))
        left, top = (width - side) // 2, int((height - side) * 0.1)
        out.append(cv2.resize(image[top : top + side, left : left + side], (480, 480), interpolation=cv2.INTER_AREA))
    return out
