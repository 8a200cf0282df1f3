"""Deepfake self-distillation (Algorithm 1): a chain of generations, each student the next one's teacher."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from dtn_fast.config import DTNConfig
from dtn_fast.data.shards import Shards
from dtn_fast.dtn import DTN, WEIGHTS
from dtn_fast.errors import UsageError
from dtn_fast.runtime import SUMMARY
from dtn_fast.train.engine import METRICS, Epoch, Step, clone, fit, read_metrics
from dtn_fast.train.recipe import Recipe

RECIPE = "recipe.json"


def generation_folder(run: Path, generation: int) -> Path:
    return run / f"generation-{generation}"


def best_auc(run: Path, generation: int) -> float:
    """The best validation AUC of a generation so far, -1 before its first epoch."""
    rows = read_metrics(generation_folder(run, generation) / METRICS)
    return max((row["val_auc"] for row in rows), default=-1.0)


def start_run(run: Path, recipe: Recipe, config: DTNConfig) -> None:
    """Records how a run was asked for.  Raises UsageError when ``run`` holds one that was asked for otherwise."""
    asked = {"recipe": dataclasses.asdict(recipe), "model": dataclasses.asdict(config)}
    text = json.dumps(asked, indent=2)
    path = run / RECIPE
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise UsageError(f"{run}: holds a run of another recipe or model; choose another --out or delete it")
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def load_run(run: Path) -> tuple[Recipe, DTNConfig]:
    """The recipe and model of a run.  Raises UsageError when there is none."""
    path = run / RECIPE
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
        recipe: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked["recipe"].items()}
        return Recipe(**recipe), DTNConfig.from_json(json.dumps(asked["model"]), str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run}: no training run there ({error}); run dtn-fast train first") from error


def train_initial(run: Path, shards: Shards, device: str | torch.device = "cpu") -> Generator[Step | Epoch, None, None]:
    """Generation 0: CE + Ct-c from scratch."""
    recipe, config = load_run(run)
    torch.manual_seed(recipe.seed)
    yield from fit(DTN(config), shards, recipe, generation_folder(run, 0), device=device)
    summarise(run)


def distill(run: Path, shards: Shards, device: str | torch.device = "cpu") -> Generator[Step | Epoch, None, None]:
    """Generations 1, 2, ...: each starts from its frozen teacher and learns by DSD, until AUC stops improving.

    Finished generations are kept, an unfinished one goes on.  Raises UsageError before generation 0 is trained.
    """
    recipe, _ = load_run(run)
    if not (generation_folder(run, 0) / WEIGHTS).is_file():
        raise UsageError(f"{run}: generation 0 is not trained; run dtn-fast train first")
    for generation in range(1, recipe.generations + 1):
        teacher = DTN.from_pretrained(generation_folder(run, generation - 1))
        student = clone(teacher)
        yield from fit(student, shards, recipe, generation_folder(run, generation), teacher, generation, device)
        summarise(run)
        better = best_auc(run, generation) > best_auc(run, generation - 1)
        if not better and generation >= recipe.min_generations:
            break


def summarise(run: Path) -> dict[str, Any]:
    """Writes and returns the table of generations and which is best (the earliest among equals)."""
    rows = []
    generation = 0
    while (generation_folder(run, generation) / METRICS).is_file():
        epochs = read_metrics(generation_folder(run, generation) / METRICS)
        rows.append({"generation": generation, "epochs": len(epochs), "val_auc": best_auc(run, generation)})
        generation += 1
    best = max(rows, key=lambda row: row["val_auc"])["generation"]
    summary = {"best": best, "generations": rows}
    partial = run / f".{SUMMARY}.partial"
    partial.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    partial.replace(run / SUMMARY)
    return summary
