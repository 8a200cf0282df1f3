"""The files of a training run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.blend import METHOD
from dtn_fast.data.config import trained_corruptions
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.dataclass_json import differences, from_fields, from_json
from dtn_fast.errors import UsageError, tell
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import auc_gain_interval
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.build import timm_config
from dtn_fast.model.config import ModelConfig, TimmConfig, TrainedOn, crop_policy, parse_config
from dtn_fast.model.detector import WEIGHTS
from dtn_fast.runtime.load import RECIPE, STUDENT, SUMMARY
from dtn_fast.train import distributed
from dtn_fast.train.config import CHAIN, INITIAL, GainRule, Recipe
from dtn_fast.train.log_lines import read_lines

STATE, METRICS, STEPS = "last.pt", "metrics.jsonl", "steps.jsonl"
NONFINITE, VALIDATION = "nonfinite.jsonl", "validation.npz"
CENTERS = "centers.safetensors"
CROPS = "crops.json"
TEACHER = "teacher"
"""Folder of the model that a fine-tuned run began with, which taught it; other runs have none."""
COMPARISON = "finetune"
"""Name of the files, .json and .md, that compare a fine-tuned run with its teacher."""

OLD_NAMES = {"patience": "epoch_patience"}
"""Fields of Recipe that had another name in version 0.1: old name -> new name."""
OLD_VALUES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "center_weight_decay": lambda fields: fields["weight_decay"],
    "gain": lambda fields: "any",
    "student_centers": lambda fields: "new",
    "student_warmup": lambda fields: 0.0,
}
"""Fields that earlier versions lacked and whose default is not what they did then: name -> value, from the others."""


def generation_folder(run: Path, generation: int) -> Path:
    return run / f"generation-{generation}"


def best_auc(run: Path, generation: int) -> float:
    """The best validation AUC of a generation so far, -1 before its first epoch."""
    rows = read_lines(generation_folder(run, generation) / METRICS)
    return max((row["val_auc"] for row in rows), default=-1.0)


class Gain(NamedTuple):
    """A student's validation AUC less that of the best generation before it."""

    value: float
    low: float | None
    """Lower end of its 95 % interval; None if one of them has no scores by video, as in runs of earlier versions."""
    high: float | None

    def counts(self, rule: GainRule) -> bool:
        """Whether it is one by ``rule`` (Recipe.gain)."""
        return self.value > 0 and (rule == "any" or (self.low is not None and self.low > 0))


def gain(run: Path, before: int, after: int) -> Gain:
    """Gain of generation ``after`` over ``before``, on the same validation crops."""
    value = best_auc(run, after) - best_auc(run, before)
    try:
        old, new = (np.load(generation_folder(run, g) / VALIDATION, allow_pickle=False) for g in (before, after))
        with old, new:
            found = auc_gain_interval(
                new["labels"], old["scores"], new["scores"], new["video"].tolist(), EvaluateConfig.bootstrap_draws,
                EvaluateConfig.confidence, list(new.get("parts", ())),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        found = None
    return Gain(value, *(found or (None, None)))


def start_run(run: Path, recipe: Recipe, config: ModelConfig, tuned: bool = False) -> None:
    """Writes recipe.json: the recipe and model of the run, which the caller has locked.

    tuned: whether it fine-tunes another run's model.  Raises UsageError when ``run`` already holds a run of another
    recipe, model or kind, or the recipe needs published weights that the model does not have.
    """
    held = "finetune" if (run / TEACHER).is_dir() else "train" if _begun(run) else ""
    if held and tuned != (held == "finetune"):
        raise UsageError(f"{run}: holds a run of dtn-fast {held}; choose another --out")
    if recipe.pretrained and not isinstance(config, TimmConfig):
        raise UsageError("--pretrained: only models of timm have published weights; name one with --timm")
    if _begun(run) and (run / RECIPE).is_file():
        known, model = load_run(run)
        config = _with_former_constants(config, model, run)
        own = lambda of: dataclasses.asdict(dataclasses.replace(of, crop=crop_policy(of), trained_on=None))
        if type(model) is not type(config):
            own = lambda of: {"timm": getattr(of, "timm", "")}
        before, now = dataclasses.asdict(known) | own(model), dataclasses.asdict(recipe) | own(config)
        if differ := differences(before, now):
            raise UsageError(f"{run}: holds a run with {differ}; repeat these, or choose another --out")
    distributed.barrier()
    if distributed.ranks().main:
        settings = {"recipe": dataclasses.asdict(recipe), "model": dataclasses.asdict(config)}
        write_whole(run / RECIPE, json_text(settings, indent=2))
    distributed.barrier()


def _with_former_constants(config: ModelConfig, before: ModelConfig, run: Path) -> ModelConfig:
    """``config`` with ImageNet's mean and standard deviation, if it has those of a timm model that an earlier version
    began to train with ImageNet's."""
    if not isinstance(config, TimmConfig) or not isinstance(before, TimmConfig) or config.timm != before.timm:
        return config
    constants = lambda of: (of.mean, of.std)
    own, former = timm_config(config.timm, config.image_size), TimmConfig(config.timm, config.image_size)
    if constants(before) != constants(former) or constants(config) != constants(own) or own == former:
        return config
    tell(f"{run}: begun by an earlier version with ImageNet's mean and standard deviation, not with those of "
         f"{config.timm}; it goes on with them")  # fmt: skip
    return dataclasses.replace(config, mean=before.mean, std=before.std)


def _begun(run: Path) -> bool:
    return any(generation_folder(run, 0).glob("*"))


@dataclass(frozen=True)
class RunCrops:
    """The crops that a run is trained on, compared without their folder."""

    folder: str = field(compare=False)
    train: int
    """Number of crops trained on."""
    val: int
    """Number of crops validated on."""
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.folder} ({self.train} crops to train on, {self.val} to validate on, {self.fingerprint})"


def claim_crops(run: Path, recipe: Recipe, dataset: CropDataset) -> None:
    """Records in crops.json the crops that the run, which the caller has locked, begins on.

    A run of an earlier version, without that file, adopts these.  Raises UsageError when the run was begun on others.
    """
    train, val = rows_of(recipe, dataset)
    these = RunCrops(dataset.folder, len(train), len(val), fingerprint_of(recipe, dataset))
    path, begun = run / CROPS, _begun(run)
    if distributed.ranks().main and not (begun and path.is_file()):
        if begun:
            tell(f"{run}: an earlier version did not record the crops of this run; taken as {these}")
        write_whole(path, json_text(dataclasses.asdict(these), indent=2))
    distributed.barrier()
    stored = path.read_text(encoding="utf-8", errors="replace")
    known = from_json(RunCrops, stored, str(path), f"; delete it if the run was trained on {these}")
    if known != these:
        raise UsageError(f"{run}: trained on {known}, these are {these}; name the same crops, or a new --out to train "
                         "anew")  # fmt: skip


def rows_of(recipe: Recipe, dataset: CropDataset) -> list[NDArray[np.int64]]:
    """The crops of ``dataset`` that a recipe trains on and validates on; without its fakes, if it makes its own."""
    rows = [dataset.select(split, recipe.methods) for split in ("train", "val")]
    if recipe.self_blend and recipe.blend_share == 1:
        rows = [own[dataset.labels[own] == 0] for own in rows]
    return rows


def fingerprint_of(recipe: Recipe, dataset: CropDataset) -> str:
    """Hash of the crops that a recipe trains on and validates on; with old data, a plus and theirs follow that of the
    new."""
    rows = np.concatenate(rows_of(recipe, dataset))
    old = dataset.is_old(rows)
    return "+".join(dataset.fingerprint(rows[own]) for own in (~old, old)[: 1 + old.any()])


def for_crops(config: ModelConfig, dataset: CropDataset) -> ModelConfig:
    """``config`` with the crop policy of the dataset's crops, so that detection cuts faces alike."""
    return config if dataset.crop is None else dataclasses.replace(config, crop=dataset.crop)


def for_masks(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """``config``, with a mask head if ``recipe`` trains one."""
    return dataclasses.replace(config, mask_head=True) if recipe.mask_weight else config


def trained_on(initial: Recipe, dataset: CropDataset, student: Recipe | None = None) -> TrainedOn:
    """Facts of a training by ``initial`` on ``dataset``, the data as prepared, and of a distillation by ``student``,
    which begins with the weights of that training."""
    used = [video for video in dataset.videos if video.split == "train"]
    forgeries, kinds = set[str](), {kind for video in used for kind, _ in video.corruptions}
    for recipe in (initial, student or initial):
        if not recipe.self_blend or recipe.blend_share < 1:
            forgeries |= {v.method for v in dataset.videos_of("train", recipe.methods) if v.label}
        forgeries |= {METHOD} if recipe.self_blend else set()
        kinds |= trained_corruptions(recipe.augment, recipe.self_blend)
    return TrainedOn(tuple(sorted(forgeries)), tuple(sorted(kinds)), initial.described(student))


def trained_further(before: TrainedOn | None, dataset: CropDataset, recipe: Recipe, verb: str) -> TrainedOn:
    """Facts ``before`` of a model's training (None: unknown), and of its further training by DSD, ``verb``, on
    ``dataset`` by ``recipe``."""
    own, known = trained_on(recipe, dataset), before or TrainedOn((), ())
    both = lambda name: tuple(sorted({*getattr(known, name), *getattr(own, name)}))
    forgeries = both("forgeries") if known.forgeries else ()  # a part of them would say that the others are unseen
    return TrainedOn(forgeries, both("corruptions"), recipe.described_after(known.recipe, verb))


def load_run(run: Path) -> tuple[Recipe, ModelConfig]:
    """Recipe and model of a run, also of an older version.  Raises UsageError when there is no run."""
    path = run / RECIPE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        fields = {OLD_NAMES.get(name, name): value for name, value in stored["recipe"].items()}
        fields = {name: value(fields) for name, value in OLD_VALUES.items()} | fields
        return from_fields(Recipe, fields, str(path)), parse_config(json_text(stored["model"]), str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run}: no training run there ({error}); run dtn-fast train first") from error


def student_recipe(run: Path, generation: int) -> Recipe:
    """The recipe that a student was distilled by: its own, or the run's, as always in earlier versions."""
    path = generation_folder(run, generation) / STUDENT
    if not path.is_file():
        return load_run(run)[0]
    try:
        return from_fields(Recipe, json.loads(path.read_text(encoding="utf-8"))["recipe"], str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged ({error}); distil generation {generation} again with --restart") from error


def claim_students(run: Path, recipe: Recipe, restart: int | None = None) -> None:
    """Records ``recipe`` as the one that the students begun so far, below generation ``restart``, go on by.

    Raises UsageError when one of them was begun by another, except for the fields that only end the chain, or when it
    changes fields of the initial training, or judges by intervals that the finished generations cannot give.
    """
    differ = differences(*({name: getattr(of, name) for name in INITIAL} for of in (load_run(run)[0], recipe)))
    if differ:
        raise UsageError(f"{run}: generation 0 was trained with {differ}; leave these to dtn-fast train")
    generation = 1
    begun = []
    while generation != restart and any(f.name != STUDENT for f in generation_folder(run, generation).glob("*")):
        known = student_recipe(run, generation)
        chain = {name: getattr(recipe, name) for name in CHAIN}
        if differ := differences(dataclasses.asdict(dataclasses.replace(known, **chain)), dataclasses.asdict(recipe)):
            raise UsageError(
                f"{generation_folder(run, generation)}: distilled with {differ}; repeat these, or add --restart "
                f"{generation}"
            )
        begun.append(generation)
        generation += 1
    for folder in (generation_folder(run, g) for g in range(generation)) if recipe.gain == "interval" else ():
        if (folder / WEIGHTS).is_file() and not (folder / VALIDATION).is_file():
            raise _no_interval(folder)
    distributed.barrier()
    for generation in begun:
        record_student(run, generation, recipe)


def record_student(run: Path, generation: int, recipe: Recipe) -> None:
    """Writes the recipe that a student is distilled by."""
    if distributed.ranks().main:
        text = json_text({"recipe": dataclasses.asdict(recipe)}, indent=2)
        write_whole(generation_folder(run, generation) / STUDENT, text)


def _no_interval(*folders: Path) -> UsageError:
    where = " or ".join(map(str, folders))
    return UsageError(f"{where}: no validation scores by video, damaged or of an earlier version; use --gain any")


def check_restart(run: Path, generation: int) -> None:
    """Raises UsageError unless the teacher of a generation is trained."""
    if generation < 1:
        raise UsageError(
            f"--restart {generation}: students are numbered from 1; delete {run} to train the teacher anew"
        )
    if not (generation_folder(run, generation - 1) / WEIGHTS).is_file():
        raise UsageError(f"--restart {generation}: {run} has no generation {generation - 1} to teach it")


def forget(run: Path, generation: int) -> None:
    """Deletes a generation and the later ones."""
    distributed.barrier()
    if distributed.ranks().main:
        for folder in run.glob("generation-*"):
            number = folder.name.removeprefix("generation-")
            if number.isdecimal() and int(number) >= generation:
                shutil.rmtree(folder)
    distributed.barrier()


def _rule(run: Path) -> GainRule:
    """The rule of gains that the run was last distilled by."""
    count = 0
    while (generation_folder(run, count + 1) / METRICS).is_file():
        count += 1
    return student_recipe(run, count).gain


def judge(run: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """The best generation of a run, the last with a gain by the recipe's rule, and a row for each; None: none trained.

    A gain without the interval that the rule asks for does not count.
    """
    rule = _rule(run)
    rows: list[dict[str, Any]] = []
    best = generation = 0
    while (generation_folder(run, generation) / METRICS).is_file():
        epochs = read_lines(generation_folder(run, generation) / METRICS)
        row: dict[str, Any] = {"generation": generation, "epochs": len(epochs), "val_auc": best_auc(run, generation)}
        if generation and epochs:
            found = gain(run, best, generation)
            row |= {"over": best, "gain": found}
            best = generation if found.counts(rule) else best
        rows.append(row)
        generation += 1
    return best if rows else None, rows


def summarise(run: Path) -> dict[str, Any]:
    """Writes and returns summary.json: all generations, and the best one, as :func:`judge` finds them.

    Raises UsageError when the run has no metrics, or a gain cannot be judged.
    """
    best, rows = judge(run)
    if best is None:
        raise UsageError(f"{generation_folder(run, 0) / METRICS}: missing; delete {run} and train it again")
    for row in rows:
        if "gain" in row and row["gain"].low is None and _rule(run) == "interval":
            raise _no_interval(*(generation_folder(run, g) for g in (row["over"], row["generation"])))
    summary = {"best": best, "generations": rows}
    if distributed.ranks().main:
        write_whole(run / SUMMARY, json_text(summary, indent=2))
    return summary
