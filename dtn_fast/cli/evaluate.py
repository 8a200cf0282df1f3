"""The command line's verbs of whoever measures: evaluate, robustness, ablate, explain, report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dtn_fast.cli.terminal import print_table, progress
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.open import open_data
from dtn_fast.device import Device, choose_device
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.tables import LEVELS, ResultTable
from dtn_fast.files import write_whole
from dtn_fast.model.detector import place
from dtn_fast.provenance import made_by, record
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_model, load_scorer
from dtn_fast.runtime.scorer import Scorer

if TYPE_CHECKING:
    pass
from dtn_fast.cli.terminal import print_paper_table


def evaluate(
    data: Annotated[list[Path], tyro.conf.Positional],
    model: list[Path],
    protocol: Literal["auto", "within", "cross-dataset", "cross-manipulation"] = "auto",
    split: Literal["train", "val", "test"] = "test",
    out: Path | None = None,
    data_names: tuple[str, ...] = (),
    model_names: tuple[str, ...] = (),
    trained_on: tuple[str, ...] = (),
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
        out: Also write OUT.json, OUT.md and OUT.tex and, of several models or datasets, OUT.svg.
        data_names: Of the datasets in the table; the paper's are FF++, Celeb-DF, DFDC, DF-1.0, DFD.
        model_names: Of the models in the table.
        trained_on: For cross-manipulation the forgery each model was trained on; none: as its run says.
        self_blend: Measure against self-blended copies of the reals instead of the data's fakes.
        runtime: How the models run.
    """
    from dtn_fast.data.blend import self_blended
    from dtn_fast.evaluation.paper_numbers import FF_NAMES
    from dtn_fast.evaluation.protocols import Entry, cross_dataset, cross_manipulation, names_of

    if not data or not model:
        raise UsageError("name at least one dataset and one model; see dtn-fast evaluate --help")
    if out is not None and out.name in ("", ".."):
        raise UsageError(f"--out {out}: a folder; name the files in it, such as {out / 'table1'}")
    several = len(data) > 1 or len(model) > 1
    if protocol == "auto":
        protocol = "cross-dataset" if several else "within"
    if several and protocol == "within":
        raise UsageError("--protocol within: takes one dataset and one model; use cross-dataset")
    manipulation = protocol == "cross-manipulation"
    if manipulation and len(data) > 1:
        raise UsageError("--protocol cross-manipulation: takes one dataset")
    if trained_on and not manipulation:
        raise UsageError("--trained-on: only for --protocol cross-manipulation")
    names = names_of(model, model_names, "model-names", once=not manipulation)
    said = tuple(FF_NAMES.get(name, name) for name in trained_on)
    forgeries = said or (tuple(map(_trained_on, model)) if manipulation else ("",) * len(model))
    if len(forgeries) != len(model):
        raise UsageError(f"--trained-on: {len(forgeries)} forgeries for {len(model)} models; give one each")
    if len(set(zip(names, forgeries, strict=True))) < len(model):
        raise UsageError("--model-names: two models have the same name and were trained on the same forgery")
    columns = names_of(data, data_names, "data-names")
    scorers = [load_scorer(path, runtime) for path in model]
    sets = [open_data(folder, scorers[0].config.image_size) for folder in data]
    for path, scorer in zip(model, scorers, strict=True):
        for folder, dataset in zip(data, sets, strict=True):
            if scorer.config.image_size != dataset.size:
                raise UsageError(f"{path}: takes {scorer.config.image_size} pixels, the crops of {folder} have "
                                 f"{dataset.size}; models of one table take crops of one size")  # fmt: skip
    if self_blend:  # not the paper's test sets any more
        sets, columns = [self_blended(dataset) for dataset in sets], [f"{name}, self-blended" for name in columns]
    if protocol == "within":
        _within(scorers[0], sets[0], split, names[0], columns[0], out)
        return
    entries = [Entry(*entry) for entry in zip(names, scorers, forgeries, strict=True)]
    labelled = dict(zip(columns, sets, strict=True))
    steps = cross_manipulation(entries, sets[0], split) if manipulation else cross_dataset(entries, labelled, split)
    with progress() as bar:
        task = bar.add_task("scoring", total=len(model) * len(data), note="")
        for number, step in enumerate(steps):
            if isinstance(step, ResultTable):
                table = step
            else:
                bar.update(task, completed=number, note=step)
    table = dataclasses.replace(table, notes=(*table.notes, made_by()))
    print_paper_table(table)
    if out is not None:
        print("\n".join(str(path) for path in table.write(out)))
        record(out.parent)


def _within(scorer: Scorer, dataset: CropDataset, split: str, name: str, title: str, out: Path | None) -> None:
    from dtn_fast.evaluation.evaluate import evaluate as run
    from dtn_fast.evaluation.protocols import within

    result = run(scorer, dataset, split)
    print_table(f"{name} on {dataset}", *result.table())
    print(result.note() + (f"\n{result.notice}" if result.notice else ""))
    if out is not None:
        table = within(name, title, result)
        texts = {".json": json.dumps(result.to_json(), indent=1), ".md": result.markdown(),
                 ".tex": "\n".join(map(table.latex, LEVELS))}  # fmt: skip
        for suffix, text in texts.items():
            write_whole(out.with_name(out.name + suffix), text)
        record(out.parent)


def _trained_on(run: Path) -> str:
    """The one forgery that a run was trained on, as the paper shortens it.

    Raises UsageError where it does not say so.
    """
    from dtn_fast.evaluation.paper_numbers import FF_NAMES
    from dtn_fast.train.run_folder import load_run

    try:
        recipe = load_run(run)[0]
        methods = () if recipe.self_blend else recipe.methods
    except UsageError:
        methods = ()
    if len(methods) != 1:
        raise UsageError(f"{run}: does not say which one forgery it was trained on; name one a model by --trained-on")
    return FF_NAMES.get(methods[0], methods[0])


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
    from dtn_fast.evaluation.robustness import KINDS
    from dtn_fast.evaluation.robustness import robustness as run

    if not models or workers < 1:
        raise UsageError("--models and --workers: at least one")
    scorers = {str(path): load_scorer(path, runtime) for path in models}
    dataset = open_data(data, next(iter(scorers.values())).config.image_size)
    with progress() as bar:
        task = bar.add_task("corrupting and scoring", total=None, note="")
        for state in run(scorers, dataset, out, kinds or KINDS, levels, split, seed, workers):
            bar.update(task, completed=state.done, total=state.total, note=state.name)
    record(out)
    print((out / "robustness.md").read_text(encoding="utf-8") + f"plot: {out / 'robustness.svg'}")


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
    from dtn_fast.evaluation.figures import FIGURES, KINDS, choose, draw
    from dtn_fast.evaluation.protocols import names_of

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
    temperatures = {name: told for name, path in zip(loaded, models, strict=True) if (told := _temperature(path))}
    faces = choose(open_data(data, sizes.pop()), split, count)
    with progress() as bar:
        task = bar.add_task("drawing", total=len(kinds or KINDS), note="")
        for kind in draw(loaded, faces, out, kinds or KINDS, temperatures):
            bar.update(task, note=kind)
            bar.advance(task)
    record(out)
    missing = json.loads((out / FIGURES).read_text(encoding="utf-8"))["left out"]
    for kind in kinds or KINDS:
        if missing[kind]:
            print(f"{kind}: none of {', '.join(missing[kind])}")
    print("\n".join(str(path) for path in sorted(out.iterdir())))


def _temperature(path: Path) -> float:
    """Of a run's, or its generation's, soft labels; 0 where no recipe tells it."""
    from dtn_fast.train.run_folder import load_run

    for run in (path, path.parent):
        try:
            return load_run(run)[0].temperature
        except UsageError:
            continue
    return 0.0


def report(paths: Annotated[list[Path], tyro.conf.Positional], out: Path = Path("report.html")) -> None:
    """Gather runs and results on one page: curves, tables beside the paper's, pictures, the command of each.

    Example: dtn-fast report runs/first tables robustness pictures --out report.html

    Args:
        paths: Runs, and folders that evaluate, robustness, ablate or explain wrote.
        out: The page, complete in itself.
    """
    from dtn_fast.train.results_page import write_report

    if not paths:
        raise UsageError("name at least one run or folder of results")
    write_report(paths, out)
    print(out)
