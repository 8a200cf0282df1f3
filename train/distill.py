"""Deepfake self-distillation (Algorithm 1): a chain of generations, each student the next one's teacher."""

from __future__ import annotations

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError, tell
from dtn_fast.model.build import build_detector, load_detector
from dtn_fast.model.detector import WEIGHTS
from dtn_fast.model.pretrained import files_of
from dtn_fast.train.checkpoint import load_centers
from dtn_fast.train.config import Recipe
from dtn_fast.train.distributed import ranks
from dtn_fast.train.loop import Epoch, Step, fit
from dtn_fast.train.run_folder import (
    CENTERS,
    STATE,
    TEACHER,
    check_restart,
    claim_crops,
    claim_students,
    forget,
    generation_folder,
    load_run,
    record_student,
    summarise,
    trained_further,
)
from dtn_fast.train.run_lock import locked
from dtn_fast.train.step import check_centers


def train_initial(run: Path, dataset: CropDataset, **how: Any) -> Generator[Step | Epoch, None, None]:
    """Trains generation 0 with CE + Ct-c.  ``how``: device, execution and stop of ``fit``.

    Raises UsageError when it was begun on other crops, or another process trains the run.
    """
    recipe, config = load_run(run)
    with locked(run):
        claim_crops(run, recipe, dataset)
        torch.manual_seed(recipe.seed)
        begun = (generation_folder(run, 0) / STATE).is_file()  # its weights are in the state
        model = build_detector(config, recipe.pretrained and not begun, files_of(recipe.pretrained_from))
        sizes = [sum(p.numel() for p in model.parameters() if not only or p.requires_grad) for only in (True, False)]
        if sizes[0] < sizes[1] and ranks().main:
            tell(f"{run}: trains {sizes[0] / 1e6:.3f} of {sizes[1] / 1e6:.3f} M parameters "
                 f"({sizes[0] / sizes[1]:.2%})")  # fmt: skip
        yield from fit(model, dataset, recipe, generation_folder(run, 0), **how)
        summarise(run)


def distill(
    run: Path, dataset: CropDataset, restart: int | None = None, recipe: Recipe | None = None, **how: Any
) -> Generator[Step | Epoch, None, None]:
    """Trains generations 1, 2, ... by DSD, each started from its frozen teacher, until ``generation_patience``
    generations in a row have shown no gain in validation AUC.

    Finished generations are kept, an unfinished one is resumed; ``restart`` first deletes that generation and the later
    ones.  recipe: the students' recipe, which is stored with them; default: the run's.  ``how`` as in
    :func:`train_initial`.  Raises UsageError when generation 0 is not trained, or was on other crops, or the students
    were begun by another recipe, or another process trains the run.
    """
    initial = load_run(run)[0]
    recipe = recipe or initial
    if not (generation_folder(run, 0) / WEIGHTS).is_file():
        raise UsageError(f"{run}: generation 0 is not trained; run dtn-fast train first")
    with locked(run):
        claim_crops(run, recipe, dataset)
        if restart is not None:
            check_restart(run, restart)
        claim_students(run, recipe, restart)
        if restart is not None:
            centers_of(generation_folder(run, restart - 1), recipe)  # refused before anything is deleted
            forget(run, restart)
        how |= {"initial": initial}
        if (run / TEACHER).is_dir():  # fine-tuned: its training began in another run
            before = load_detector(generation_folder(run, 0)).config.trained_on
            how |= {"facts": trained_further(before, dataset, recipe, "distilled")}
        for generation in range(1, recipe.generations + 1):
            teacher = load_detector(generation_folder(run, generation - 1))
            student = copy.deepcopy(teacher)  # trains what its teacher trained
            teacher.requires_grad_(False)
            record_student(run, generation, recipe)
            own = {**how, "centers": centers_of(generation_folder(run, generation - 1), recipe)}
            yield from fit(student, dataset, recipe, generation_folder(run, generation), teacher, generation, **own)
            without_gain = generation - summarise(run)["best"]
            if without_gain >= recipe.generation_patience and generation >= recipe.min_generations:
                break


def centers_of(teacher: Path, recipe: Recipe) -> Tensor | None:
    """The Ct-c centres that a student starts with; None: new ones.  Raises UsageError when they do not fit."""
    if recipe.student_centers == "new":
        return None
    centers = load_centers(teacher / CENTERS)
    check_centers(centers, load_detector(teacher), recipe)
    return centers
