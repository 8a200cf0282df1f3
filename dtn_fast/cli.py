"""The command line: one verb per task, options from dataclasses, progress bars, one-line errors."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dtn_fast import deploy
from dtn_fast.data.prepare import PrepareConfig
from dtn_fast.data.readers import Source
from dtn_fast.data.synthetic import STAMP, SyntheticConfig, make_synthetic
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.runtime import Device, Runtime, best_checkpoint, choose_device
from dtn_fast.terminal import print_table, progress
from dtn_fast.train.distributed import connect, ranks
from dtn_fast.train.recipe import PRESETS, Execution, Recipe

PresetName = Literal["paper", "tiny"]
RunPreset = Literal["paper", "tiny", "ffpp-c23", "cross-manipulation", "demo"]


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
    from dtn_fast.detectors import TimmConfig, parse_config
    from dtn_fast.train.distill import start_run, train_initial

    base = DTNConfig.preset(PRESETS[preset].model)
    try:
        model = parse_config(config.read_text("utf-8"), str(config)) if config else base
    except OSError as error:
        raise UsageError(f"{config}: {error.strerror}") from error
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


def ablate(
    name: Annotated[str, tyro.conf.Positional],
    data: Path,
    tests: tuple[Path, ...] = (),
    test_names: tuple[str, ...] = (),
    out: Path = Path("runs/ablations"),
    only: tuple[str, ...] = (),
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(),
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = Execution(),
    preset: RunPreset = "paper",
    device: Device = "auto",
) -> None:
    """Train one of the paper's ablations and tabulate it beside the paper's figures; the same command resumes it.

    Example: dtn-fast ablate losses --data ffpp --tests ffpp celebdf dfdc df1 --test-names FF++ Celeb-DF DFDC DF-1.0
    --preset ffpp-c23

    In minutes, on crops of the demo: dtn-fast ablate depth --data runs/demo/crops --preset demo --epochs 1

    Args:
        name: components, soft-labels, losses, local-connection, moe, mas, depth, generations, noise, center-dimension,
            backbones or experts.
        data: Crops to train on, written by dtn-fast prepare.
        tests: Crops whose test split is measured; none: that of the data.
        test_names: Their names in the table; the paper's are FF++, Celeb-DF, DFDC, DF-1.0, DFD.
        out: Folder of NAME/ with the variants' runs, NAME.json and NAME.md.
        only: Variants by name; none: all.
        recipe: What the variants' own changes are made to.
        execution: How it is computed.
        preset: A model and the recipe that the options below change.
        device: Where to train.
    """
    from dtn_fast.config import DTNConfig
    from dtn_fast.data.shards import open_data
    from dtn_fast.protocols import names_of
    from dtn_fast.train.ablations import ablate as run
    from dtn_fast.train.ablations import table
    from dtn_fast.train.monitor import signals

    model = DTNConfig.preset(PRESETS[preset].model)
    shards = open_data(data, model.image_size)
    folders = tests or (data,)
    names = names_of(folders, test_names, "test-names")
    sets = {n: shards if f == data else open_data(f, model.image_size) for n, f in zip(names, folders, strict=True)}
    with signals() as stop, progress() as bar:
        task = bar.add_task(name, total=None, note="")
        steps = run(name, shards, sets, out, model, recipe, only, device=choose_device(device), execution=execution,
                    stop=stop)  # fmt: skip
        said = ""
        while True:
            try:
                state = next(steps)
            except StopIteration as done:
                rows = done.value
                break
            event = state.event
            where = f", generation {event.generation}, epoch {event.epoch + 1}" if event is not None else ", measuring"
            bar.update(task, completed=state.number, total=state.total, note=state.variant + where)
            if bar.disable and said != state.variant + where:
                said = state.variant + where
                print(f"{state.number + 1} of {state.total}: {said}", flush=True)
    _record(out)
    print_table(f"{name}, frame level, percent; in brackets the paper", *table(rows))
    print(f"{out / (name + '.md')}")


def explain(
    data: Annotated[Path, tyro.conf.Positional],
    models: list[Path],
    out: Path = Path("pictures"),
    kinds: tuple[str, ...] = (),
    split: Literal["train", "val", "test"] = "test",
    count: int = 400,
    model_names: tuple[str, ...] = (),
    device: Device = "auto",
) -> None:
    """Draw what checkpoints see: Grad-CAM, attention maps, head scales, attention collapse, features, soft labels.

    Example: dtn-fast explain data/crops --models runs/baseline runs/levt runs/moe runs/dtn --out pictures

    Args:
        data: Crops written by dtn-fast prepare, or a folder of face pictures: <split>/<real or a forgery's name>/.
        models: Runs or checkpoint folders.
        out: Folder for the pictures and figures.json.
        kinds: grad-cam, attention, scales, collapse, feature-maps, t-sne, soft-labels; none: all.
        split: Which videos.
        count: Crops in the t-SNE.
        model_names: Of the models in the pictures.
        device: Where the models run.
    """
    from dtn_fast.data.shards import open_data
    from dtn_fast.pictures import KINDS, choose, draw
    from dtn_fast.protocols import names_of
    from dtn_fast.runtime import load_model, place

    if not models or count < 1:
        raise UsageError("--models and --count: at least one")
    where = choose_device(device)
    loaded = {name: place(load_model(path), where)
              for name, path in zip(names_of(models, model_names, "model-names"), models, strict=True)}  # fmt: skip
    sizes = {model.config.image_size for model in loaded.values()}
    if len(sizes) > 1:
        raise UsageError(
            f"--models: they take crops of {' and '.join(map(str, sorted(sizes)))} pixels; draw them apart"
        )
    faces = choose(open_data(data, sizes.pop()), split, count)
    with progress() as bar:
        task = bar.add_task("drawing", total=len(kinds or KINDS), note="")
        for kind in draw(loaded, faces, out, kinds or KINDS):
            bar.update(task, note=kind)
            bar.advance(task)
    _record(out)
    print("\n".join(str(path) for path in sorted(out.iterdir())))


def report(paths: Annotated[list[Path], tyro.conf.Positional], out: Path = Path("report.html")) -> None:
    """Gather runs and results on one page: curves, tables beside the paper's, pictures, the command of each.

    Example: dtn-fast report runs/first tables robustness pictures --out report.html

    Args:
        paths: Runs, and folders that evaluate, robustness, ablate or explain wrote.
        out: The page, complete in itself.
    """
    from dtn_fast.train.gather import write_report

    if not paths:
        raise UsageError("name at least one run or folder of results")
    write_report(paths, out)
    print(out)


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


def evaluate(
    data: Annotated[list[Path], tyro.conf.Positional],
    model: list[Path],
    protocol: Literal["auto", "within", "cross-dataset", "cross-manipulation"] = "auto",
    split: Literal["train", "val", "test"] = "test",
    out: Path | None = None,
    data_names: tuple[str, ...] = (),
    model_names: tuple[str, ...] = (),
    self_blend: bool = False,
    runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes] = Runtime(),
) -> None:
    """Measure models on prepared crops, at frame and video level, by one of the paper's protocols.

    Example: dtn-fast evaluate data/crops --model runs/first --out runs/first/test

    Table 1: dtn-fast evaluate ffpp celebdf dfdc df1 dfd --model runs/dtn runs/cvit --out table1
    --data-names FF++ Celeb-DF DFDC DF-1.0 DFD

    Table 2: dtn-fast evaluate ffpp --model runs/df runs/f2f runs/fs runs/nt --protocol cross-manipulation --out table2

    Args:
        data: Crops written by dtn-fast prepare, or folders of face pictures: <split>/<real or a forgery's name>/.
        model: Runs, checkpoint folders, .onnx, .mnn, .engine or .rtx files.
        protocol: within: one model, each forgery of one dataset; cross-dataset: models by datasets (Table 1);
            cross-manipulation: models trained on one forgery each, by forgeries (Table 2); auto: one of the first two.
        split: Which videos.
        out: Also write OUT.json and OUT.md and, of several models or datasets, OUT.tex.
        data_names: Of the datasets in the table; the paper's are FF++, Celeb-DF, DFDC, DF-1.0, DFD.
        model_names: Of the models; for cross-manipulation the forgery each was trained on, by default as its run says.
        self_blend: Measure against self-blended copies of the reals instead of the data's fakes.
        runtime: How the models run.
    """
    from dtn_fast.data.blend import self_blended
    from dtn_fast.data.shards import open_data
    from dtn_fast.evaluate import evaluate as run
    from dtn_fast.files import write_whole
    from dtn_fast.protocols import Protocol, cross_dataset, cross_manipulation, names_of
    from dtn_fast.runtime import load_scorer

    if not data or not model:
        raise UsageError("name at least one dataset and one model; see dtn-fast evaluate --help")
    several = len(data) > 1 or len(model) > 1
    if protocol == "auto":
        protocol = "cross-dataset" if several else "within"
    if several and protocol == "within":
        raise UsageError("--protocol within: takes one dataset and one model; use cross-dataset")
    first = load_scorer(model[0], runtime)
    sets = [open_data(folder, first.config.image_size) for folder in data]
    sets = [self_blended(shards) for shards in sets] if self_blend else sets
    if protocol == "within":
        result = run(first, sets[0], split)
        header, rows = result.table()
        print_table(f"{model[0]} on {data[0]}", header, rows)
        print(result.policy() + (f"\n{result.notice}" if result.notice else ""))
        if out is not None:
            write_whole(out.with_name(out.name + ".json"), json.dumps(result.to_json(), indent=1))
            write_whole(out.with_name(out.name + ".md"), result.markdown())
            _record(out.parent)
        return
    if protocol == "cross-manipulation":
        if len(data) > 1:
            raise UsageError("--protocol cross-manipulation: takes one dataset")
        said = tuple(filter(None, map(_trained_on_one, model)))
        names = names_of(model, model_names or (said if len(said) == len(model) else ()), "model-names")
    else:
        names = names_of(model, model_names, "model-names")
    scorers = {name: functools.partial(load_scorer, path, runtime) for name, path in zip(names, model, strict=True)}
    labelled = dict(zip(names_of(data, data_names, "data-names"), sets, strict=True))
    steps = cross_manipulation(scorers, sets[0], split) if protocol == "cross-manipulation" else cross_dataset(
        scorers, labelled, split)  # fmt: skip
    with progress() as bar:
        task = bar.add_task("scoring", total=len(model) * (len(data) if protocol == "cross-dataset" else 1), note="")
        for step in steps:
            if isinstance(step, Protocol):
                measured = step
            else:
                bar.update(task, note=step)
                bar.advance(task)
    for level in ("frame", "video"):
        print_table(f"{measured.title}, {level} level, percent", *measured.table(level))
    print("\n".join([*(f"{c}: {p}" for c, p in measured.policies.items()), *measured.notices]))
    if out is not None:
        print("\n".join(str(path) for path in measured.write(out)))
        _record(out.parent)


def _trained_on_one(run: Path) -> str:
    """The one forgery that a run was trained on, as the paper shortens it; empty: it says no such thing."""
    from dtn_fast.paper import FF_NAMES
    from dtn_fast.train.distill import load_run

    try:
        methods = load_run(run)[0].methods
    except UsageError:
        return ""
    return FF_NAMES.get(methods[0], methods[0]) if len(methods) == 1 else ""


def robustness(
    data: Annotated[Path, tyro.conf.Positional],
    models: list[Path],
    out: Path = Path("robustness"),
    kinds: tuple[str, ...] = (),
    levels: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    split: Literal["train", "val", "test"] = "test",
    seed: int = 0,
    workers: int = 2,
    runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes] = Runtime(),
) -> None:
    """Measure models under every corruption and level, one plot for all; the same command goes on.

    Example: dtn-fast robustness data/crops --models runs/first runs/second --out robustness

    Args:
        data: Crops written by dtn-fast prepare, or a folder of face pictures: <split>/<real or a forgery's name>/.
        models: Runs, checkpoint folders, .onnx, .mnn, .engine or .rtx files.
        out: Folder for robustness.json, .md and .svg.
        kinds: Corruptions; none: the paper's seven (uniform in place of Gaussian noise).
        levels: 1 to 5, and 0 for the crops as they are.
        split: Which videos.
        seed: Of noise and blocks.
        workers: Threads that corrupt.
        runtime: How the models run.
    """
    from dtn_fast.data.shards import open_data
    from dtn_fast.robustness import KINDS
    from dtn_fast.robustness import robustness as run
    from dtn_fast.runtime import load_scorer

    if not models or workers < 1:
        raise UsageError("--models and --workers: at least one")
    scorers = {str(path): load_scorer(path, runtime) for path in models}
    shards = open_data(data, next(iter(scorers.values())).config.image_size)
    with progress() as bar:
        task = bar.add_task("corrupting and scoring", total=None, note="")
        for state in run(scorers, shards, out, kinds or KINDS, levels, split, seed, workers):
            bar.update(task, completed=state.done, total=state.total, note=state.name)
    _record(out)
    print((out / "robustness.md").read_text(encoding="utf-8") + f"plot: {out / 'robustness.svg'}")


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


_TRAINER = (demo, synthesize, prepare, train, distill, evaluate, robustness, ablate, explain, report, corrupt,
            bench)  # fmt: skip
_DEPLOYER = (
    deploy.export,
    deploy.verify,
    deploy.inspect,
    deploy.detect,
    deploy.serve,
    deploy.repository,
    deploy.doctor,
)
VERBS = {verb.__name__: verb for verb in (*_TRAINER, *_DEPLOYER)}
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
        verbs = {**VERBS, **{verb.__name__: with_preset(verb, sys.argv[1:]) for verb in (train, ablate)}}
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
