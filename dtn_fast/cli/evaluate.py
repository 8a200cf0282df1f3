"""Verbs that measure: evaluate, calibrate, robustness, explain, report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from dtn_fast.cli.terminal import print_result_table, print_table, progress
from dtn_fast.data.crop_dataset import open_crop_dataset
from dtn_fast.data.open import open_data
from dtn_fast.device import Device
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import (
    HEAT_SCORES,
    CalibrateConfig,
    EvaluateConfig,
    FigureConfig,
    RobustnessConfig,
)
from dtn_fast.evaluation.evaluate import BY_CLIPS
from dtn_fast.evaluation.localisation import mask_table
from dtn_fast.evaluation.protocols import Protocol, Within, evaluate_models
from dtn_fast.evaluation.tables import ResultTable
from dtn_fast.provenance import COMMANDS, made_by, record
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_scorer


def evaluate(
    data: Annotated[list[Path], tyro.conf.Positional],
    model: list[Path],
    protocol: Protocol = "auto",
    config: Annotated[EvaluateConfig, tyro.conf.OmitArgPrefixes] = EvaluateConfig(),
    out: Path | None = None,
    data_names: tuple[str, ...] = (),
    model_names: tuple[str, ...] = (),
    trained_on: tuple[str, ...] = (),
    self_blend: bool = False,
    by_family: bool = False,
    runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes] = Runtime(),
) -> None:
    """Measure models on prepared crops, at frame and video level, by one of the paper's protocols.

    Example: dtn-fast evaluate data/crops --model runs/first --out runs/first/test

    By groups of people: dtn-fast evaluate data/crops --model runs/first --groups attributes.csv --out groups

    Table 1: dtn-fast evaluate ffpp celebdf dfdc df1 dfd --model runs/dtn runs/cvit --out table1
    --data-names FF++ Celeb-DF DFDC DF-1.0 DFD

    Table 2: dtn-fast evaluate ffpp --model runs/df runs/f2f runs/fs runs/nt --protocol cross-manipulation --out table2

    Args:
        data: Crops written by dtn-fast prepare, or folders of face pictures: <split>/<real or a forgery's name>/, or
            without <split>/, divided 80/10/10.
        model: Runs, checkpoint folders, .onnx, .mnn, .engine or .rtx files.
        protocol: within: one model, each forgery of one dataset; cross-dataset: models by datasets (Table 1);
            cross-manipulation: models trained on one forgery each, by forgeries (Table 2); auto: within for one model
            and one dataset, else cross-dataset.
        config: Split, threshold and intervals.
        out: Also write OUT.json, OUT.md and OUT.tex and, with several models or datasets or groups, OUT.svg.
        data_names: Names of the datasets in the table; the paper's are FF++, Celeb-DF, DFDC, DF-1.0, DFD.
        model_names: Names of the models in the table.
        trained_on: For cross-manipulation, the forgery that each model was trained on.  Default: as it records.
        self_blend: Measure against self-blended copies of the reals instead of the data's fakes.
        by_family: Add columns of each family of forgeries to the table of several models or datasets; the table of one
            model has them.
        runtime: Device and precision that the models run with.
    """
    if out is not None and out.name in ("", ".."):
        raise UsageError(f"--out {out}: a folder; name the files in it, such as {out / 'table1'}")
    steps = evaluate_models(
        model, data, config, protocol, model_names, data_names, trained_on, self_blend, runtime, by_family
    )
    made: Within | ResultTable | None = None
    with progress() as bar:
        task = bar.add_task("scoring", total=len(model) * len(data), note="")
        for number, step in enumerate(steps):
            if isinstance(step, str):
                bar.update(task, completed=number, note=step)
            else:
                made = step
    assert made is not None, "the last step is the result"
    if isinstance(made, Within):
        print_table(f"{made.name} on {made.dataset}", *made.result.table())
        if made.result.masks:
            print_table("Masks against the data's, percent (intervals over videos)", *mask_table(made.result.masks))
        if (clips := made.result.clip_table())[1]:
            print_table(BY_CLIPS, *clips)
        print(made.result.note() + (f"\n{made.result.notice}" if made.result.notice else ""))
        if made.result.groups:
            print_table("By group; rates in percent", *made.result.groups.text())
            print("\n".join(made.result.groups.sentences()))
    else:
        made = dataclasses.replace(made, notes=(*made.notes, made_by()))
        print_result_table(made)
    if out is not None:
        made_files = made.write(out)
        record(out.parent)
        print(f"written: {' '.join(str(path) for path in [*made_files, out.parent / COMMANDS])}")


def calibrate(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[Path, tyro.conf.Positional],
    config: Annotated[CalibrateConfig, tyro.conf.OmitArgPrefixes] = CalibrateConfig(),
    device: Device = Runtime.device,
) -> None:
    """Calibrate a model: P(fake) that means what it says, and limits that keep a false-alarm rate.

    Example: dtn-fast calibrate runs/first data/crops --false-alarms 0.01 --misses 0.1

    Fits a temperature on the validation split and sets the limits from which an input is called fake, and up to which
    it is called real; between them, and for inputs unlike the training data, detect and serve say uncertain.  Writes
    card.json and card.html beside the weights, which stay as they are.  Files exported afterwards carry the
    calibration; export earlier ones again.

    Args:
        run: A run (its best generation) or a checkpoint folder.
        data: Crops written by dtn-fast prepare, with a val split; what it promises is tried on a test split.
        config: Rates that the limits keep.
        device: Device that the model runs on.
    """
    from dtn_fast.evaluation.calibration import Calibrated
    from dtn_fast.evaluation.calibration import calibrate as steps
    from dtn_fast.evaluation.card_page import calibration_table, measured_table

    with progress() as bar:
        task = bar.add_task("calibrating", total=None, note="")
        for step in steps(run, data, config, Runtime(device=device)):
            if isinstance(step, str):
                bar.update(task, note=step)
            else:
                made = step
    assert isinstance(made, Calibrated), "the last step is the result"
    assert made.card.calibration is not None
    print_table(f"Calibration of {made.folder}", *calibration_table(made.card.calibration))
    if made.card.calibration.measured:
        print_table("Tried on the test split (95 % intervals)", *measured_table(made.card.calibration))
    for note in made.notes:
        print(note)
    record(made.folder)
    print(f"card: {made.page}")


def robustness(
    data: Annotated[Path, tyro.conf.Positional],
    models: list[Path],
    videos: Path | None = None,
    out: Path = Path("robustness"),
    config: Annotated[RobustnessConfig, tyro.conf.OmitArgPrefixes] = RobustnessConfig(),
    runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes] = Runtime(),
) -> None:
    """Measure models under every corruption and level, and plot them together; the same command resumes it.

    The table says for each corruption whether the model was trained on it; train --preset robustness holds none.

    Example: dtn-fast robustness data/crops --models runs/first runs/second --out robustness

    With H.264 over whole videos: dtn-fast prepare /data/FF++ --out h264 --splits test --corrupt video, then
    dtn-fast robustness data/crops --models runs/first --videos h264

    Args:
        data: Crops written by dtn-fast prepare, or a folder of face pictures: <split>/<real or a forgery's name>/.
        models: Runs, checkpoint folders, .onnx, .mnn, .engine or .rtx files.
        videos: Crops of the same videos, corrupted before their faces were found: dtn-fast prepare --corrupt.  Default:
            none; every corruption is applied to the crops of data.
        out: Folder for robustness.json, .md and .svg.
        config: Corruptions and levels to measure.
        runtime: Device and precision that the models run with.
    """
    from dtn_fast.evaluation.robustness import robustness as run

    if not models:
        raise UsageError("--models: name at least one model")
    scorers = {str(path): load_scorer(path, runtime) for path in models}
    dataset = open_data(data, next(iter(scorers.values())).config.image_size)
    with progress() as bar:
        task = bar.add_task("corrupting and scoring", total=None, note="")
        for state in run(scorers, dataset, out, config, None if videos is None else open_crop_dataset(videos)):
            bar.update(task, completed=state.done, total=state.total, note=state.name)
    record(out)
    print((out / "robustness.md").read_text(encoding="utf-8") + f"plot: {out / 'robustness.svg'}")


def explain(
    data: Annotated[list[Path], tyro.conf.Positional],
    models: list[Path],
    out: Path = Path("pictures"),
    config: Annotated[FigureConfig, tyro.conf.OmitArgPrefixes] = FigureConfig(),
    data_names: tuple[str, ...] = (),
    model_names: tuple[str, ...] = (),
    device: Device = Runtime.device,
) -> None:
    """Draw figures of checkpoints: Grad-CAM, attention maps, head scales, attention collapse, features, soft labels.

    With --kinds heat-scores: the scores of Grad-CAM at each depth against the masks of the fakes, beside chance.

    Example: dtn-fast explain data/crops --models runs/baseline runs/levt runs/moe runs/dtn --out pictures

    Figure 1: dtn-fast explain ffpp --models runs/baseline runs/vit runs/cvit runs/dtn --model-names VGG ViT CViT DTN
    --kinds collapse collapse-maps

    Scores of heat maps: dtn-fast prepare /data/FaceForensics++ --out ffpp --masks --reuse-boxes, then
    dtn-fast explain ffpp --models runs/dtn --kinds heat-scores

    Figure 9: dtn-fast explain ffpp celebdf dfdc df1 dfd --models runs/moe runs/dtn --kinds feature-maps

    Args:
        data: Crops written by dtn-fast prepare, or folders of face pictures: <split>/<real or a forgery's name>/.
        models: Runs or checkpoint folders.
        out: Folder for the pictures and figures.json.
        config: Figures to draw, and the crops to draw them on.
        data_names: Names of the datasets in the pictures.
        model_names: Names of the models in the pictures.
        device: Device that the models run on.
    """
    from dtn_fast.evaluation.figures import VALUES, draw_models
    from dtn_fast.evaluation.heat_scores import HeatScore, heat_notes, heat_tables
    from dtn_fast.train.config import Recipe

    with progress() as bar:
        task = bar.add_task("drawing", total=len(config.kinds), note="")
        for kind in draw_models(models, data, out, Recipe.temperature, config, model_names, data_names, device):
            bar.update(task, note=kind, advance=kind in config.kinds)
    record(out)
    values = json.loads((out / VALUES).read_text(encoding="utf-8"))
    for kind in config.kinds:
        if values["left out"][kind]:
            print(f"{kind}: not available for {', '.join(values['left out'][kind])}")
    if "grad-cam" in config.kinds and (blank := values.get("grad-cam", {}).get("blank")):
        print(f"grad-cam: {len(blank)} maps are blank, marked in the picture and listed in {VALUES}")
    if scores := [HeatScore(**score) for score in values.get(HEAT_SCORES, ()) if HEAT_SCORES in config.kinds]:
        for table in heat_tables(scores):
            print_table(*table)
        print("\n".join([*heat_notes(scores, config.split), values["notice"]]).rstrip())
    print("\n".join(str(path) for path in sorted(out.iterdir())))


def report(paths: Annotated[list[Path], tyro.conf.Positional], out: Path = Path("report.html")) -> None:
    """Write one results page of runs and results: curves, tables, pictures, and the command of each.

    Example: dtn-fast report runs/first tables robustness pictures --out report.html

    Args:
        paths: Runs, and folders written by evaluate, robustness, ablate or explain.
        out: The HTML file to write, self-contained.
    """
    from dtn_fast.train.results_page import write_results_page

    if not paths:
        raise UsageError("name at least one run or folder of results")
    write_results_page(paths, out)
    print(out)
