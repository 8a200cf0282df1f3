"""Fine-tuning: a trained model learns from new crops by DSD, taught by itself as it was, while old crops recur."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.open import open_data
from dtn_fast.data.replay import NEW, joined, only, part, parts_of
from dtn_fast.errors import UsageError, tell
from dtn_fast.evaluation.before_after import Comparison, compare
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.build import load_detector, with_mask_head
from dtn_fast.model.detector import Detector, move_to
from dtn_fast.runtime.load import RECIPE, best_checkpoint, load_model
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import distributed
from dtn_fast.train.config import Recipe, for_finetuning
from dtn_fast.train.distill import centers_of
from dtn_fast.train.loop import Epoch, Step, fit
from dtn_fast.train.run_folder import (
    CENTERS,
    COMPARISON,
    TEACHER,
    claim_crops,
    generation_folder,
    load_run,
    start_run,
    student_recipe,
    summarise,
    trained_further,
)
from dtn_fast.train.run_lock import locked

UNMEASURED = "forgetting is not measured: no old data were named by --replay"


def recipe_from(source: Path) -> Recipe:
    """The recipe that the model ``source``, a run or a generation's folder, is fine-tuned by unless it is changed.

    That of a checkpoint without a run is made from the paper's.
    """
    folder = best_checkpoint(source)
    name = folder.name.removeprefix("generation-")
    if not (folder.parent / RECIPE).is_file() or not name.isdecimal():
        return for_finetuning(Recipe())
    return for_finetuning(student_recipe(folder.parent, int(name)))


def folder_for(source: Path, out: Path | None = None, ending: str = "finetuned") -> Path:
    """The folder ``out`` of a fine-tuned run; default: beside the run that it begins with, with ``ending`` in its name.

    Raises UsageError when that is ``source``, a run or a checkpoint folder, or in it.
    """
    place = source.resolve().parent if source.is_file() else source.resolve()
    home = place.parent if (place.parent / RECIPE).is_file() else place
    out = out or home.with_name(f"{home.name}-{ending}")
    if out.resolve().is_relative_to(home):
        raise UsageError(f"--out {out}: is the model to begin with, or in its folder; choose another")
    return out


def begin(run: Path, source: Path, recipe: Recipe) -> None:
    """Starts a fine-tuned run, which the caller has locked, from the best weights of ``source``, a run or a checkpoint
    folder, and keeps a copy of these as its teacher, with a new mask head if ``recipe`` trains one that it lacks.

    Raises UsageError when ``source`` is no checkpoint, or ``run`` holds a run of another model or recipe.
    """
    model = load_model(source)
    if recipe.self_blend:
        raise UsageError("--self-blend: not in fine-tuning, which learns from the new data's own fakes; drop it")
    own = model.state_dict()
    if recipe.mask_weight:
        torch.manual_seed(recipe.seed)
        model = with_mask_head(model)
    kept = run / TEACHER
    if kept.is_dir():
        known, now = load_detector(kept).state_dict(), model.state_dict()
        if known.keys() != now.keys() or not all(torch.equal(known[name], own[name]) for name in own):
            raise UsageError(f"{run}: began with other weights than {source} has now; choose another --out")
    start_run(run, recipe, dataclasses.replace(model.config, card=None), tuned=True)
    if distributed.ranks().main and not kept.is_dir():
        partial = kept.with_name(f".{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        folder = source.parent if source.is_file() else best_checkpoint(source)
        if (centers := folder / CENTERS).is_file():
            write_whole(partial / CENTERS, centers.read_bytes())
        partial.rename(kept)
    distributed.barrier()


def open_both(run: Path, teacher: Detector, data: Path, replay: Sequence[Path], recipe: Recipe) -> CropDataset:
    """The crops of ``data``, joined with those of the folders ``replay``, which ``teacher`` was trained on.

    Says so when there are none of the latter.  Raises UsageError when crops do not fit the model, a class is missing,
    or both hold the same.
    """
    size, facts = teacher.config.image_size, teacher.config.trained_on
    new, *old = (open_data(folder, size) for folder in (data, *replay))
    for folder, dataset in zip((data, *replay), (new, *old), strict=True):
        dataset.check_fits(teacher.config, f"{run} on {folder}")
        dataset.tell_differences(teacher.config, f"{run} on {folder}")
    if old:
        return joined(new, old, recipe.methods, facts.forgeries if facts else (), recipe.seed)
    tell(UNMEASURED)
    new = only(new, recipe.methods) if recipe.methods else new
    for split in ("train", "val"):
        labels = new.labels[new.select(split, recipe.methods)]
        if len(labels) and len(set(labels.tolist())) == 1:
            lacks = "reals" if labels[0] else "fakes"
            raise UsageError(f"{data}: its {split} split has no {lacks}; name the model's training data by --replay, "
                             "whose own are then used")  # fmt: skip
    return new


def open_training_crops(run: Path, data: Path, replay: Sequence[Path], recipe: Recipe) -> CropDataset:
    """The crops that a run, fine-tuned or not, goes on with.  Raises UsageError when there is no run, or it was not
    fine-tuned and takes no ``replay``."""
    if (run / TEACHER).is_dir():
        return open_both(run, load_detector(run / TEACHER), data, replay, recipe)
    if replay:
        raise UsageError(f"--replay: only of a run of dtn-fast finetune, which {run} is not; drop it")
    return open_data(data, load_run(run)[1].image_size)


def finetune(run: Path, dataset: CropDataset, **how: Any) -> Generator[Step | Epoch, None, None]:
    """Trains generation 0 of a run that :func:`begin` has started, by DSD (Eq. 7) with the teacher's copy.

    dataset: of :func:`open_both`.  ``how``: device, execution and stop of ``fit``.  Raises UsageError when the run was
    begun on other crops, or another process trains it.
    """
    recipe, _ = load_run(run)
    with locked(run):
        claim_crops(run, recipe, dataset)
        teacher = load_detector(run / TEACHER)
        student = copy.deepcopy(teacher)  # trains what its teacher trained
        teacher.requires_grad_(False)
        facts = trained_further(teacher.config.trained_on, dataset, recipe, "fine-tuned")
        how |= {"centers": centers_of(run / TEACHER, recipe), "facts": facts}
        yield from fit(student, dataset, recipe, generation_folder(run, 0), teacher, **how)
        summarise(run)


def measure(run: Path, dataset: CropDataset, device: str) -> Iterator[str | Comparison]:
    """Compares a fine-tuned run's best generation with its teacher on the test splits of the new and the old data:
    yields the name of what is measured, then the result, which is also in ``run``/finetune.json and .md."""
    before, after = (TorchScorer(move_to(load_model(path), device)) for path in (run / TEACHER, run))
    sets = {name: part(dataset, videos) for name, videos in parts_of(dataset).items()} or {NEW: dataset}
    for step in compare(before, after, sets):
        if isinstance(step, Comparison):
            notes = [UNMEASURED] if dataset.first_old is None else []
            if (card := before.config.card) is not None and card.calibration is not None:
                notes.append("the limits of the model before are not those of this one: run dtn-fast calibrate again")
            step = step._replace(notes=[*step.notes, *notes])
            write_whole(run / f"{COMPARISON}.json", json_text(step.to_json(), indent=1))
            write_whole(run / f"{COMPARISON}.md", step.markdown())
        yield step
