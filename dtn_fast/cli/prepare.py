"""Verbs that make data: synthesize, prepare, corrupt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dtn_fast.cli.terminal import progress
from dtn_fast.data.config import PrepareConfig, Source, SyntheticConfig, WorkConfig
from dtn_fast.data.prepare import PrepareProgress
from dtn_fast.data.synthetic_faces import make_synthetic
from dtn_fast.data.synthetic_marker import STAMP
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.evaluation.config import RobustnessConfig
from dtn_fast.ranges import Range, Seed, Side, Workers

ModelPreset = Literal["paper", "tiny"]
LOG_EVERY = 30
"""Seconds between progress lines without a terminal, as in the log file of a scheduler's job."""


def synthesize(
    out: Annotated[Path, tyro.conf.Positional],
    config: Annotated[SyntheticConfig, tyro.conf.OmitArgPrefixes] = SyntheticConfig(),
    workers: Workers = WorkConfig.workers,
) -> None:
    """Write the synthetic demo dataset, laid out like FaceForensics++.

    Example: dtn-fast synthesize data/synthetic --train 56 --val 14 --test 20

    Args:
        out: Folder to write; an interrupted run resumes there.
        config: Size of the dataset.
        workers: Number of worker processes.
    """
    with progress() as bar:
        task = bar.add_task("rendering videos", note="")
        for done, total in make_synthetic(out, config, workers):
            bar.update(task, completed=done, total=total)
    print(f"{total} videos in {out} ({STAMP})")


def prepare(
    root: Annotated[Path, tyro.conf.Positional],
    out: Path,
    source: Annotated[Source, tyro.conf.OmitArgPrefixes] = Source(),
    config: Annotated[PrepareConfig, tyro.conf.OmitArgPrefixes] = PrepareConfig(),
    work: Annotated[WorkConfig, tyro.conf.OmitArgPrefixes] = WorkConfig(),
    preset: ModelPreset = "paper",
    size: Side | None = None,
    audit_only: bool = False,
) -> None:
    """Audit a dataset and crop its faces for training and evaluation; the same command resumes it.

    Example: dtn-fast prepare /data/DFDC --out dfdc --dataset dfdc --share 3/8

    Test videos coded anew at each rate factor: dtn-fast prepare /data/FF++ --out h264 --splits test --corrupt video

    Every face, with landmarks and masks: dtn-fast prepare /data/FF++ --out ffpp --faces yunet --people all --masks

    Args:
        root: The dataset as it was downloaded.
        out: Folder for the crops; all worker shares of one dataset write to the same folder.
        source: Dataset, and the part of it to read.
        config: Options of face finding and cropping.
        work: Division of the work among processes and machines.
        preset: The model that will read the crops; it sets their size.
        size: Side of the crops in pixels instead of the preset's.
        audit_only: Check the dataset against its lists and published counts, then stop.
    """
    from dtn_fast.data.datasets import read
    from dtn_fast.data.prepare import finished
    from dtn_fast.data.prepare import prepare as run
    from dtn_fast.model.config import DTNConfig

    table = read(root, source)
    print("\n".join(f"{root}: {note}" for note in table.notes))
    if audit_only:
        return
    side = size or DTNConfig.preset(preset).image_size
    with progress() as bar:
        show = _Progress(bar)
        for state in run(table, out, side, config, work):
            show(state)
    if work.verify or state.damaged:
        print(f"{state.checked} shards checked, {state.damaged} of them damaged and made again")
    if not finished(out):
        print(f"worker share {work.share} is done: {state.faces} faces of {state.total} videos; the worker share that "
              "finishes last writes the index")  # fmt: skip
        return
    _print_prepared(out)


class _Progress:
    """Progress of ``prepare``: a bar or, without a terminal, a line every LOG_EVERY seconds."""

    def __init__(self, bar) -> None:
        self._bar, self._task = bar, bar.add_task("cropping faces", total=None, note="")
        self._begin = self._printed = time.monotonic()
        self._first: int | None = None

    def __call__(self, state: PrepareProgress) -> None:
        now = time.monotonic()
        self._first = state.done if self._first is None else self._first
        rate = (state.done - self._first) / max(now - self._begin, 1e-3)
        note = f"{state.faces} faces, {rate:.1f} videos/s"
        self._bar.update(self._task, completed=state.done, total=state.total, note=note)
        if self._bar.disable and now - self._printed > LOG_EVERY and rate:
            self._printed, left = now, (state.total - state.done) / rate
            print(f"{state.done} of {state.total} videos, {note}, {left / 60:.0f} minutes left", flush=True)


def _print_prepared(out: Path) -> None:
    """Prints the counts of the crop dataset in ``out``.  Raises DtnError when videos could not be read."""
    from dtn_fast.data.crop_dataset import open_crop_dataset
    from dtn_fast.data.finder_base import MAX_FACES
    from dtn_fast.data.prepare import mask_notes
    from dtn_fast.data.video_table import noun

    made = open_crop_dataset(out)
    unit = noun(made.videos)
    bad = [state["error"] for state in made.status if state["error"]]
    empty = sum(bool(state["reason"]) for state in made.status)
    short = sum(0 < state["frames"] < state["asked"] for state in made.status)
    print(f"{len(made.video)} faces of {len(made.videos)} {unit} in {out}; {empty} {unit} without a face, {short} with "
          f"fewer frames than requested, {len(bad)} unreadable")  # fmt: skip
    for note in mask_notes(made.status):
        print(note)
    if crowded := sum(state.get("crowded", 0) for state in made.status):
        print(f"in {crowded} frames only the {MAX_FACES} largest faces were considered")
    damaged = [state for state in made.status if state.get("lost") or state.get("missing")]
    if damaged:
        lost, asked, missing = (sum(state[name] for state in damaged) for name in ("lost", "asked", "missing"))
        print(f"{len(damaged)} videos are damaged: {lost} of {asked} frames wanted of them could not be decoded, and "
              f"{missing} are missing from the files; index.json says which")  # fmt: skip
    if bad:
        raise DtnError(f"{len(bad)} {unit} could not be read to the end, the first: {bad[0]}; the others are in {out}")


def corrupt(
    source: Annotated[Path, tyro.conf.Positional],
    out: Path,
    kind: str,
    level: Annotated[int, Range(0, 5)] = 3,
    seed: Seed = RobustnessConfig.seed,
) -> None:
    """Write a corrupted copy of an image (.png) or a video (.mp4), as the robustness protocol does.

    Example: dtn-fast corrupt clip.mp4 --out worse.mp4 --kind video --level 5

    Args:
        source: An image or a video.
        out: The file to write: .png for an image, .mp4 for a video.
        kind: saturation, contrast, blocks, gaussian_noise, uniform_noise, blur, pixelation, jpeg, video (H.264, of
            videos) or h264_still (of a picture, or of each frame by itself).
        level: 1 (mild) to 5 (strong); 0 leaves the pixels as they are.
        seed: Seed of noise and blocks.
    """
    from PIL import Image

    from dtn_fast.data.corrupt import check, corrupt_video
    from dtn_fast.data.corrupt import corrupt as run
    from dtn_fast.data.media import PICTURES
    from dtn_fast.data.pictures import read_image

    check(kind, level)
    image = source.suffix.lower() in PICTURES
    if out.suffix.lower() != (".png" if image else ".mp4"):
        raise UsageError(f"--out {out}: the name must end in {'.png' if image else '.mp4'}")
    if image:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(run(read_image(source), kind, level, seed)).save(out)
    else:
        with progress() as bar:
            task = bar.add_task("frames", total=None, note="")
            for done in corrupt_video(source, out, [(kind, level)], seed):
                bar.update(task, completed=done)
    print(f"{out}: {source.name} with {kind}, level {level}")
