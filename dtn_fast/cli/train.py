"""Verbs that train: train, distill, finetune, ablate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dtn_fast.cli.terminal import print_table, progress
from dtn_fast.data.open import open_data
from dtn_fast.device import Device, choose_device
from dtn_fast.evaluation.before_after import Comparison
from dtn_fast.evaluation.tables import ResultTable
from dtn_fast.model.card import CARD_PAGE
from dtn_fast.model.config import Adaptation, TimmConfig
from dtn_fast.provenance import record
from dtn_fast.ranges import Natural
from dtn_fast.runtime.load import best_checkpoint, load_model
from dtn_fast.train.config import (
    DEFAULT_PRESET,
    BaselineConfig,
    Execution,
    Recipe,
    RunPreset,
    TemporalRecipe,
    for_finetuning,
)
from dtn_fast.train.distributed import connect, ranks

if TYPE_CHECKING:
    from dtn_fast.train.ablate import Working
from dtn_fast.cli.terminal import print_result_table
from dtn_fast.runtime.config import Runtime


def train(
    data: Annotated[Path, tyro.conf.Positional],
    out: Path,
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(),
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = Execution(),
    adaptation: Annotated[Adaptation, tyro.conf.OmitArgPrefixes] = Adaptation(),
    preset: RunPreset = DEFAULT_PRESET,
    config: Path | None = None,
    timm: str = "",
    wandb: str = "",
    device: Device = Runtime.device,
) -> None:
    """Train a detector from scratch with CE + Ct-c (generation 0); the same command resumes it.

    Example: dtn-fast train data/crops --out runs/first --preset ffpp-c23 --epochs 20

    With a map of the forged pixels: dtn-fast train data/crops --out runs/maps --mask-weight 1

    On 8 GPUs: torchrun --nproc-per-node 8 -m dtn_fast train data/crops --out runs/first --preset ffpp-c23

    A pretrained ViT-L of which 0.07 % is trained: dtn-fast train data/crops --out runs/clip --preset clip

    Args:
        data: Crops written by dtn-fast prepare, or a folder of face pictures: <split>/<real or a forgery's name>/.
        out: Folder of the run.
        recipe: Training recipe; *choice* marks values that the paper leaves open.
        execution: Options of speed and safety.
        adaptation: Changes to a timm model, and the parameters of it that are trained.
        preset: Model, and default values of the other options; --preset NAME --help shows them.
        config: A JSON file of DTNConfig or TimmConfig fields instead of the preset's model.
        timm: A model of timm's registry instead of the preset's, such as legacy_xception, for crops of any size.
        wandb: A Weights & Biases project to log to as well.
        device: Device to train on.
    """
    from dtn_fast.train.config import choose_model
    from dtn_fast.train.distill import train_initial
    from dtn_fast.train.run_folder import for_crops, for_masks, start_run
    from dtn_fast.train.run_lock import locked

    model = for_masks(choose_model(preset, config, timm, adaptation), recipe)
    with connect(choose_device(device)) as where:
        dataset = open_data(data, model.image_size)
        if isinstance(model, TimmConfig) and not config:
            model = replace(model, image_size=dataset.size)
        with locked(out):
            start_run(out, recipe, for_crops(model, dataset))
            _record(out)
            events = lambda **how: train_initial(out, dataset, **how)
            _run_training(events, out, recipe, execution, where, wandb)


def distill(
    data: Annotated[Path, tyro.conf.Positional],
    run: Path,
    restart: Natural | None = None,
    replay: tuple[Path, ...] = (),
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(),
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = Execution(),
    wandb: str = "",
    device: Device = Runtime.device,
) -> None:
    """Distil a run by generations (DSD) until validation AUC stops improving; the same command resumes it.

    Example: dtn-fast distill data/crops --run runs/first

    With another recipe, without training generation 0 again: dtn-fast distill data/crops --run runs/first --restart 1
    --temperature 4 --weights 2 1 0.6 --epochs 10 --generations 3 --min-generations 3

    On 8 GPUs: torchrun --nproc-per-node 8 -m -- dtn_fast distill data/crops --run runs/first

    Args:
        data: Crops written by dtn-fast prepare, or a folder of face pictures: <split>/<real or a forgery's name>/.
        run: A folder written by dtn-fast train.
        restart: Delete this generation and the later ones, and distil them again.
        replay: Of a run of dtn-fast finetune, the old crops that it was given.
        recipe: The students' recipe.  Default: the run's.
        execution: Options of speed and safety.
        wandb: A Weights & Biases project to log to as well.
        device: Device to train on.
    """
    from dtn_fast.train.distill import distill as chain
    from dtn_fast.train.finetune import open_training_crops
    from dtn_fast.train.run_folder import load_run, summarise
    from dtn_fast.train.run_lock import locked

    load_run(run)
    with connect(choose_device(device)) as where, locked(run):
        _record(run)
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun repeats the command after a crash
        dataset = open_training_crops(run, data, replay, recipe)
        events = lambda **how: chain(run, dataset, None if again else restart, recipe, **how)
        _run_training(events, run, recipe, execution, where, wandb)
        if ranks().main:
            print_generations(summarise(run))


def finetune(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[Path, tyro.conf.Positional],
    replay: tuple[Path, ...] = (),
    out: Path | None = None,
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = for_finetuning(Recipe()),
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = Execution(),
    wandb: str = "",
    device: Device = Runtime.device,
) -> None:
    """Fine-tune a model on new crops, taught by itself as it was while old crops recur; the same command resumes it.

    Prints the AUC on the test splits of the new and the old crops, before and after. The epoch that is kept has the
    best mean of both validation AUCs.

    Example: dtn-fast finetune runs/first new/crops --replay data/crops --out runs/second

    On the forgery that the demo holds out: dtn-fast finetune runs/demo/run runs/demo/crops --methods SynthWarp
    --replay runs/demo/crops --out runs/demo/finetuned

    On 8 GPUs: torchrun --nproc-per-node 8 -m dtn_fast finetune runs/first new/crops --replay data/crops

    Args:
        run: A run, whose best generation is fine-tuned, or a checkpoint folder; nothing is written there.
        data: New crops written by dtn-fast prepare, or a folder of face pictures. Reals or fakes that it lacks are the
            old crops'.
        replay: The crops that the model was trained on, in one or several folders.  Default: none, and how much it
            forgets is not known.
        out: Folder of the new run.  Default: beside the run, with -finetuned at the end of its name.
        recipe: Recipe of fine-tuning.  Default: the run's, with fewer epochs, a lower rate and soft labels only where
            the teacher is right.
        execution: Options of speed and safety.
        wandb: A Weights & Biases project to log to as well.
        device: Device to train on.
    """
    from dtn_fast.train import finetune as tuning
    from dtn_fast.train.run_lock import locked

    with connect(choose_device(device)) as where:
        dataset = tuning.open_both(run, load_model(run), data, replay, recipe)
        with locked(folder := tuning.folder_for(run, out)):
            tuning.begin(folder, run, recipe)
            _record(folder)
            events = lambda **how: tuning.finetune(folder, dataset, **how)
            _watch_training(events, folder, recipe, execution, where, wandb)
            if ranks().main:
                _print_changes(tuning.measure(folder, dataset, where))
                _print_end(folder)


def temporal(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    recipe: Annotated[TemporalRecipe, tyro.conf.OmitArgPrefixes] = TemporalRecipe(),
    wandb: str = "",
    device: Device = Runtime.device,
) -> None:
    """Train a temporal head, which scores videos by clips of successive frames; the same command resumes it.

    The model stays as it is and scores frames as before.  The head takes the features that it has of a clip's frames,
    and begins as the mean over them.  Evaluate measures both, detect, serve and exported .onnx files use the head, and
    calibrate sets the limits for videos by it.

    Example: dtn-fast temporal runs/first data/crops --out runs/first-temporal

    Then: dtn-fast evaluate data/crops --model runs/first-temporal

    Clips are successive crops as prepared: analyse as many frames of a video as were prepared of each (--frames of
    prepare, detect and serve).

    Args:
        run: A run, whose best generation gets the head, or a checkpoint folder; nothing is written there.
        data: Crops of videos written by dtn-fast prepare, with a train and a val split.
        out: Folder of the checkpoint with the head.  Default: beside the run, with -temporal at the end of its name.
        recipe: Training recipe of the head.
        wandb: A Weights & Biases project to log to as well.
        device: Device to train on.
    """
    from dtn_fast.train.finetune import folder_for
    from dtn_fast.train.run_lock import locked
    from dtn_fast.train.temporal import TemporalRun

    model = load_model(run)
    with locked(folder := folder_for(run, out, "temporal")):
        job = TemporalRun(run, open_data(data, model.config.image_size), folder, recipe, choose_device(device))
        record(folder)
        with progress() as bar:
            task = bar.add_task("features", total=None, note="")
            for state in job.features():
                bar.update(task, completed=state.done, total=state.total, note="")
        _watch_training(lambda **how: job.fit(how["stop"]), folder, recipe, Execution(), device, wandb)
    print(f"model with its temporal head in {folder}; model card: {folder / CARD_PAGE}")
    print("\n".join(job.lines()))


def _print_changes(steps: Iterator[str | Comparison]) -> None:
    with progress() as bar:
        task = bar.add_task("scoring", total=None, note="")
        for step in steps:
            if isinstance(step, str):
                bar.update(task, note=f"{step} crops, before and after")
            else:
                made = step
    print_table("Before and after fine-tuning, test split", *made.table())
    print("\n".join(made.lines()))


def _record(folder: Path) -> None:
    from dtn_fast.provenance import record

    if ranks().main:
        record(folder)


def _run_training(start: Any, run: Path, recipe: Recipe, execution: Execution, device: str, wandb: str) -> None:
    """Runs a training generator to its end: shows progress, stops on signals, writes the run's report."""
    _watch_training(start, run, recipe, execution, device, wandb)
    if ranks().main:
        _print_end(run)


def _watch_training(
    start: Any, run: Path, recipe: Recipe | TemporalRecipe, execution: Execution, device: str, wandb: str
) -> None:
    from dtn_fast.train.display import watch
    from dtn_fast.train.signals import signals

    with signals() as stop:
        watch(start(device=device, execution=execution, stop=stop), run, recipe.epochs, execution.log_every, wandb)


def _print_end(run: Path) -> None:
    from dtn_fast.train.run_report import write_run_report

    best = best_checkpoint(run)
    print(f"best weights in {best}; report: {write_run_report(run)}; model card: {best / CARD_PAGE}")


def print_generations(summary: dict[str, Any]) -> None:
    rows = [
        [
            ("teacher (initial)" if row["generation"] == 0 else f"student {row['generation']}"),
            str(row["epochs"]),
            f"{row['val_auc']:.4f}",
            _gain_text(row),
            "best" if row["generation"] == summary["best"] else "",
        ]
        for row in summary["generations"]
    ]
    print_table("Generations", ["generation", "epochs", "validation frame AUC", "gain (95 % interval)", ""], rows)


def _gain_text(row: dict[str, Any]) -> str:
    if "gain" not in row:
        return ""
    value, low, high = row["gain"]
    return f"{value:+.4f}" + ("" if low is None else f" ({low:+.4f} to {high:+.4f})") + f" over {row['over']}"


def ablate(
    name: Annotated[str, tyro.conf.Positional],
    data: Path,
    tests: tuple[Path, ...] = (),
    test_names: tuple[str, ...] = (),
    out: Path = Path("runs/ablations"),
    only: tuple[str, ...] = (),
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(),
    baselines: Annotated[BaselineConfig, tyro.conf.OmitArgPrefixes] = BaselineConfig(),
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = Execution(),
    preset: RunPreset = DEFAULT_PRESET,
    config: Path | None = None,
    device: Device = Runtime.device,
) -> None:
    """Train every model of one of the paper's tables and compare it with the paper; the same command resumes it.

    Example: dtn-fast ablate losses --data ffpp --tests ffpp celebdf dfdc df1 --test-names FF++ Celeb-DF DFDC DF-1.0
    --preset ffpp-c23

    On 8 GPUs: torchrun --nproc-per-node 8 -m dtn_fast ablate losses --data ffpp --preset ffpp-c23

    One row by its own recipe: dtn-fast ablate cross-dataset --data ffpp --preset ffpp-c23 --only Xception --pretrained
    --lr 2e-4

    In minutes, on crops of the demo: dtn-fast ablate depth --data runs/demo/crops --preset demo --epochs 1

    Args:
        name: cross-dataset and cross-manipulation (Tables 1 and 2); components, soft-labels, losses, local-connection,
            moe, mas, depth, generations (3 to 10); noise, center-dimension, backbones or experts (Figure 6);
            limitations and mixers (section 6 and its outlook).
        data: Crops to train on, written by dtn-fast prepare.
        tests: Crops whose test split is measured.  Default: the crops of --data.
        test_names: Names of the tests in the table; the paper's are FF++, Celeb-DF, DFDC, DF-1.0, DFD.
        out: Folder for NAME/ with the variants' runs, NAME.json, NAME.md, NAME.tex and NAME.svg.
        only: Variants to train; the others stay in the table if they are measured already, whatever their recipe; a
            column names each row's.  Default: all.
        recipe: Recipe that the variants change.
        baselines: Training of the detectors that the DTN is compared with.
        execution: Options of speed and safety.
        preset: Model, and default values of the recipe's options; --preset NAME --help shows them.
        config: A JSON file of DTNConfig fields instead of the preset's model.
        device: Device to train on.
    """
    from dtn_fast.train.ablate import ablate_folders
    from dtn_fast.train.config import choose_model
    from dtn_fast.train.signals import signals

    model = choose_model(preset, config, "")
    with connect(choose_device(device)) as where, signals() as stop:
        if ranks().main:
            record(out)
        how = {"device": where, "execution": execution, "stop": stop}
        steps = ablate_folders(name, data, out, model, recipe, tests, test_names, only, baselines, **how)
        if not ranks().main:
            for _ in steps:
                pass
            return
        print_result_table(_watch(name, steps))
        print(out / f"{name}.md")


def _watch(name: str, steps: Iterator[Working | ResultTable]) -> ResultTable:
    """Runs the training of a table to its end, shows progress and returns the table."""
    printed = ""
    with progress() as bar:
        task = bar.add_task(name, total=None, note="")
        for step in steps:
            if isinstance(step, ResultTable):
                return step
            event = step.event
            note = step.variant + (f", generation {event.generation}, epoch {event.epoch + 1}" if event else ", tests")
            bar.update(task, completed=step.number, total=step.total, note=note)
            if bar.disable and printed != note:
                printed = note
                print(f"{step.number + 1} of {step.total}: {note}", flush=True)
    raise AssertionError("the steps end with the table")
