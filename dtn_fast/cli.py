"""The command line: one verb per task, options from dataclasses, progress bars, one-line errors."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dtn_fast import deploy, experiments
from dtn_fast.data.prepare import PrepareConfig
from dtn_fast.data.readers import Source
from dtn_fast.data.synthetic import STAMP, SyntheticConfig, make_synthetic
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.runtime import Device, best_checkpoint, choose_device
from dtn_fast.terminal import print_table, progress
from dtn_fast.train.distributed import connect, ranks
from dtn_fast.train.recipe import PRESETS, Execution, Recipe, RunPreset

PresetName = Literal["paper", "tiny"]


# ------------------------------------------------------------------------------------------------- verbs


def synthesize(
    out: Annotated[Path, tyro.conf.Positional],
    config: Annotated[SyntheticConfig, tyro.conf.OmitArgPrefixes] = SyntheticConfig(),
    workers: int = 2,
) -> None:
    """Write the synthetic demo set, laid out like FaceForensics++.

    Example: dtn-fast synthesize data/synthetic --train 56 --val 14 --test 20

    Args:
        out: Folder to write; an interrupted run goes on there.
        config: Size of the set.
        workers: Processes.
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
    preset: PresetName = "paper",
    size: int | None = None,
    workers: int = 2,
    shard: str = "1/1",
    verify: bool = False,
    audit_only: bool = False,
) -> None:
    """Audit a dataset and crop its faces, once, for training and evaluation; the same command resumes it.

    Example: dtn-fast prepare /data/DFDC --out dfdc --dataset dfdc --frames 32 --shard 3/8

    Args:
        root: The dataset as it was downloaded.
        out: Folder for the crops; all shards of one dataset share it.
        source: Which dataset, and which part of it.
        config: How faces are found and cropped.
        preset: The model that will read the crops; it sets their size.
        size: Side of the crops in pixels instead of the preset's.
        workers: Processes.
        shard: i/n does every n-th part of the work; whichever shard ends last writes the index.
        verify: Compare checksums of what is already there, and make damaged parts again.
        audit_only: Check the dataset against its lists and published counts, then stop.
    """
    from dtn_fast.config import DTNConfig
    from dtn_fast.data.prepare import finished
    from dtn_fast.data.prepare import prepare as run
    from dtn_fast.data.readers import read
    from dtn_fast.data.shards import open_shards

    number, slash, shards = shard.partition("/")
    if not (slash and number.isdecimal() and shards.isdecimal()):
        raise UsageError(f"--shard {shard}: i/n was expected, for example 1/4")
    if size is not None and size < 16:
        raise UsageError(f"--size {size}: at least 16 pixels")
    manifest = read(root, source)
    print("\n".join(f"{root}: {note}" for note in manifest.notes))
    if audit_only:
        return
    side = size or DTNConfig.preset(preset).image_size
    begin = said = time.monotonic()
    first = None
    with progress() as bar:
        task = bar.add_task("cropping faces", total=None, note="")
        for state in run(manifest, out, side, config, workers, (int(number), int(shards)), verify):
            now = time.monotonic()
            first = state.done if first is None else first
            rate = (state.done - first) / max(now - begin, 1e-3)
            note = f"{state.faces} faces, {rate:.1f} videos/s"
            bar.update(task, completed=state.done, total=state.total, note=note)
            if bar.disable and now - said > 30 and rate:  # a log file of a scheduler's job
                said, left = now, (state.total - state.done) / rate
                print(f"{state.done} of {state.total} videos, {note}, {left / 60:.0f} minutes left", flush=True)
    if not finished(out):
        print(f"shard {shard} is done: {state.faces} faces of {state.total} videos; the last shard writes the index")
        return
    made = open_shards(out)
    bad = [state["error"] for state in made.status if state["error"]]
    empty = sum(bool(state["reason"]) for state in made.status)
    short = sum(0 < state["frames"] < state["asked"] for state in made.status)
    print(f"{len(made.video)} faces of {len(made.videos)} videos in {out}; {empty} videos without a face, {short} with "
          f"fewer frames than asked, {len(bad)} unreadable")  # fmt: skip
    if bad:
        raise DtnError(
            f"{len(bad)} videos could not be read or broke off, the first: {bad[0]}; the others are in {out}"
        )


def corrupt(
    source: Annotated[Path, tyro.conf.Positional],
    out: Path,
    kind: str,
    level: int = 3,
    seed: int = 0,
) -> None:
    """Write a corrupted copy of an image (.png) or a video (.mp4), as the robustness protocol does.

    Example: dtn-fast corrupt clip.mp4 --out worse.mp4 --kind video --level 5

    Args:
        source: An image or a video.
        out: The file to write: .png of an image, .mp4 of a video.
        kind: saturation, contrast, blocks, gaussian_noise, uniform_noise, blur, pixelation, jpeg or video (H.264).
        level: 1 to 5; 0 leaves the pixels as they are.
        seed: Of noise and blocks.
    """
    from PIL import Image

    from dtn_fast.data.corrupt import check, corrupt_video
    from dtn_fast.data.corrupt import corrupt as run
    from dtn_fast.data.video import IMAGES, read_image

    check(kind, level)
    image = source.suffix.lower() in IMAGES
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


def train(
    data: Annotated[Path, tyro.conf.Positional],
    out: Path,
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(),
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = Execution(),
    preset: RunPreset = "paper",
    config: Path | None = None,
    timm: str = "",
    wandb: str = "",
    device: Device = "auto",
) -> None:
    """Train a detector from scratch with CE + Ct-c (generation 0); the same command resumes it.

    Example: dtn-fast train data/crops --out runs/first --preset ffpp-c23 --epochs 20

    On 8 GPUs: torchrun --nproc-per-node 8 -m dtn_fast train data/crops --out runs/first --preset ffpp-c23

    Args:
        data: Crops written by dtn-fast prepare, or a folder of face pictures: <split>/<real or a forgery's name>/.
        out: Folder of the run.
        recipe: What is learned.
        execution: How it is computed.
        preset: A model and the recipe that the options below change; --preset NAME --help shows its values.
        config: A JSON file of DTNConfig or TimmConfig fields instead of the preset's model.
        timm: A model of timm's registry instead of the preset's, such as legacy_xception.
        wandb: A Weights & Biases project to log to as well.
        device: Where to train.
    """
    from dtn_fast.config import DTNConfig
    from dtn_fast.detectors import TimmConfig, read_config
    from dtn_fast.train.distill import start_run, train_initial

    base = DTNConfig.preset(PRESETS[preset].model)
    model = read_config(config) if config else base
    if timm:
        if config:
            raise UsageError("--timm and --config both name a model; give one")
        model = TimmConfig(timm, base.image_size)
    if recipe.pretrained and not isinstance(model, TimmConfig):
        raise UsageError("--pretrained: only models of timm have published weights; name one with --timm")
    with connect(choose_device(device)) as where:
        start_run(out, recipe, model)
        _record(out)
        events = lambda shards, **how: train_initial(out, shards, **how)
        _run_training(events, data, out, recipe, model.image_size, execution, where, wandb)


def distill(
    data: Annotated[Path, tyro.conf.Positional],
    run: Path,
    restart: int | None = None,
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = Execution(),
    wandb: str = "",
    device: Device = "auto",
) -> None:
    """Distil a trained run generation by generation (DSD) until validation AUC stops improving; resumable.

    Example: dtn-fast distill data/crops --run runs/first

    On 8 GPUs: torchrun --nproc-per-node 8 -m dtn_fast distill data/crops --run runs/first

    Args:
        data: Crops written by dtn-fast prepare, or a folder of face pictures: <split>/<real or a forgery's name>/.
        run: A folder written by dtn-fast train; its recipe says how many generations at most.
        restart: Delete this generation and the later ones, and distil them again.
        execution: How it is computed.
        wandb: A Weights & Biases project to log to as well.
        device: Where to train.
    """
    from dtn_fast.train.distill import distill as chain
    from dtn_fast.train.distill import load_run, summarise

    recipe, model = load_run(run)
    with connect(choose_device(device)) as where:
        _record(run)
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun repeats the command after a crash
        events = lambda shards, **how: chain(run, shards, None if again else restart, **how)
        _run_training(events, data, run, recipe, model.image_size, execution, where, wandb)
        if ranks().main:
            print_generations(summarise(run))


def _record(folder: Path) -> None:
    from dtn_fast.provenance import record

    if ranks().main:
        record(folder)


def _run_training(
    start: Any, data: Path, run: Path, recipe: Recipe, size: int, execution: Execution, device: str, wandb: str
) -> None:
    """Drives a training generator to its end, shown, stoppable by signals, reported."""
    from dtn_fast.data.shards import open_data
    from dtn_fast.train.monitor import signals, watch
    from dtn_fast.train.report import write_run_report

    with signals() as stop:
        events = start(open_data(data, size), device=device, execution=execution, stop=stop)
        watch(events, run, recipe.epochs, execution.log_every, wandb)
    if ranks().main:
        print(f"best weights in {best_checkpoint(run)}; report: {write_run_report(run)}")


def print_generations(summary: dict[str, Any]) -> None:
    rows = [
        [
            ("teacher (initial)" if row["generation"] == 0 else f"student {row['generation']}"),
            str(row["epochs"]),
            f"{row['val_auc']:.4f}",
            "best" if row["generation"] == summary["best"] else "",
        ]
        for row in summary["generations"]
    ]
    print_table("Generations", ["generation", "epochs", "validation frame AUC", ""], rows)


def demo(out: Path = Path("runs/demo"), workers: int = 2) -> None:
    """Everything once, on real files, in minutes: make a set, train, distil, evaluate, export, detect.

    Example: dtn-fast demo --out runs/demo

    Args:
        out: Folder for everything; an interrupted demo goes on there.
        workers: Processes that render and crop.
    """
    from dtn_fast.demo import run

    run(out, workers)


def bench() -> None:
    """Measure this machine, print rooflines, compare results; dtn-fast bench --help shows its own options.

    Example: dtn-fast bench model train --budget 300
    """


# ------------------------------------------------------------------------------------------------- entry


_TRAINER = (demo, synthesize, prepare, train, distill)
_EXPERIMENTER = (
    experiments.evaluate,
    experiments.robustness,
    experiments.ablate,
    experiments.explain,
    experiments.report,
    corrupt,
    bench,
)
_DEPLOYER = (
    deploy.export,
    deploy.verify,
    deploy.inspect,
    deploy.detect,
    deploy.serve,
    deploy.repository,
    deploy.doctor,
)
VERBS = {verb.__name__: verb for verb in (*_TRAINER, *_EXPERIMENTER, *_DEPLOYER)}
DESCRIPTION = """DTN face-forgery detection: train, distil, evaluate, export, detect, serve.

Example: dtn-fast detect clip.mp4 --model runs/first

Exit codes: 0 done, 1 some inputs failed, 2 usage."""


def with_preset(verb: Callable[..., None], arguments: list[str]) -> Callable[..., None]:
    """``verb`` with the recipe of the --preset among ``arguments`` as its default, so that options change that one."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else ""
    if name not in PRESETS:
        return verb
    signature = inspect.signature(verb, eval_str=True)
    recipe = signature.parameters["recipe"].replace(default=PRESETS[name].recipe)
    changed = functools.wraps(verb)(lambda *args, **kwargs: verb(*args, **kwargs))
    changed.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[recipe if p.name == "recipe" else p for p in signature.parameters.values()]
    )
    return changed


def main() -> None:
    """Entry point of ``dtn-fast``."""
    try:
        if sys.argv[1:2] == ["bench"]:  # it runs where tyro is not installed, so it parses by itself
            from dtn_fast.bench.run import main as run

            raise SystemExit(run(sys.argv[2:]))
        verbs = {**VERBS, **{verb.__name__: with_preset(verb, sys.argv[1:]) for verb in (train, experiments.ablate)}}
        code = tyro.extras.subcommand_cli_from_dict(verbs, prog="dtn-fast", description=DESCRIPTION)
    except DtnError as error:
        raise SystemExit(_fail(str(error), error.exit_code)) from None
    except OSError as error:  # a full disk, a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise SystemExit(_fail(f"{where}{error.strerror or error}{remedy}", 1)) from None
    except KeyboardInterrupt:
        raise SystemExit(
            _fail("interrupted; the same command goes on where training or rendering stopped", 130)
        ) from None
    raise SystemExit(code or 0)


def _fail(message: str, code: int) -> int:
    print(f"dtn-fast: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
