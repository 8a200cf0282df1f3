"""The training loop: one generation, from shards to its best checkpoint by validation AUC."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dtn_fast.data.augment import PRESETS, Augment, DeviceAugment
from dtn_fast.data.blend import self_blended
from dtn_fast.data.loader import Loader
from dtn_fast.data.shards import Shards
from dtn_fast.data.synthetic import STAMP
from dtn_fast.dtn import DTN, check_state
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.losses import dsd_loss, initial_centers, initial_loss
from dtn_fast.metrics import evaluate_scores
from dtn_fast.runtime import TorchScorer, normalise, place
from dtn_fast.train.checkpoint import load_state, save_state
from dtn_fast.train.recipe import Recipe, choose_precision

STATE, METRICS = "last.pt", "metrics.jsonl"


class Step(NamedTuple):
    """What the loop reports after each batch."""

    generation: int
    epoch: int
    step: int
    steps: int
    """Batches in this epoch."""
    losses: dict[str, float]
    images_per_second: float


class Epoch(NamedTuple):
    """What the loop reports after each epoch, a line of metrics.jsonl."""

    generation: int
    epoch: int
    lr: float
    losses: dict[str, float]
    """Means over the epoch."""
    val_auc: float
    val_acc: float
    best_auc: float
    images_per_second: float


def fit(
    model: DTN,
    shards: Shards,
    recipe: Recipe,
    out: Path,
    teacher: DTN | None = None,
    generation: int = 0,
    device: str | torch.device = "cpu",
) -> Generator[Step | Epoch, None, None]:
    """Trains ``model`` into ``out``, yielding progress; with a ``teacher`` by DSD, else by CE + Ct-c.

    ``out`` receives the best epoch's weights by validation AUC, metrics.jsonl and the state to go on from: a call on
    a folder with an unfinished run resumes it after its last whole epoch, with the same result as without the pause.
    Raises UsageError on an unfitting image size or splits without both classes, DtnError when the loss is not finite.
    """
    device = torch.device(device)
    if recipe.self_blend:
        shards = self_blended(shards, recipe.seed)
    methods = () if recipe.self_blend else recipe.methods
    train_rows, val_rows = shards.select("train", methods), shards.select("val", methods)
    for name, rows in (("train", train_rows), ("val", val_rows)):
        if set(shards.labels[rows]) != {0, 1}:
            raise UsageError(f"the {name} split needs reals and fakes; it has {len(rows)} crops of labels "
                             f"{sorted(set(shards.labels[rows].tolist()))}; "
                             "--self-blend makes fakes of reals")  # fmt: skip
    if shards.size != model.config.image_size:
        raise UsageError(
            f"the crops are {shards.size} pixels, the model takes {model.config.image_size}; prepare again"
        )

    model.notice = STAMP if shards.synthetic else ""
    dtype = choose_precision(recipe.precision, device)
    model = place(model, device)
    if teacher is not None:
        teacher = place(teacher, device).eval().requires_grad_(False)
    centers = nn.Parameter(initial_centers(model.num_classes).to(device))
    optimizer = torch.optim.Adam(
        [*model.parameters(), centers], lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.lr_step, gamma=0.1)
    preset = PRESETS.get(recipe.augment)
    where = recipe.augment_on if recipe.augment_on != "auto" else "device" if device.type == "cuda" else "cpu"
    on_cpu = Augment(preset) if preset and where == "cpu" else None
    on_device = DeviceAugment(preset) if preset and where == "device" else None
    loader = Loader(shards, train_rows, recipe.batch_size, (recipe.seed, generation), recipe.real_repeat,
                    device=device, resident=recipe.resident, transform=on_cpu)  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    best, first, stale = -1.0, 0, 0
    if (out / STATE).is_file():
        state = load_state(out / STATE)
        check_state(model, state["model"], str(out / STATE))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        centers.data.copy_(state["centers"])
        best, first, stale = state["best"], state["epoch"] + 1, state["stale"]

    for epoch in range(first, recipe.epochs):
        if recipe.patience and stale >= recipe.patience:
            break
        # everything random in an epoch comes from (seed, generation, epoch), so a resumed run repeats it
        torch.manual_seed(int(np.random.SeedSequence((recipe.seed, generation, epoch)).generate_state(1)[0]))
        steps = len(loader)
        totals: dict[str, float] = {}
        model.train()
        start = time.perf_counter()
        for step, batch in enumerate(loader.epoch(epoch)):
            crops, labels = batch.crops, batch.labels
            images = normalise(on_device(crops, batch.seeds) if on_device else crops, model.config, device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
                if teacher is not None:
                    with torch.no_grad():
                        soft = teacher(images)
            if teacher is None:
                losses = initial_loss(logits.float(), labels, centers, recipe.delta)
            else:
                losses = dsd_loss(
                    logits.float(), labels, soft.float(), centers, recipe.weights, recipe.temperature, recipe.delta
                )
            values = {name: float(value.detach()) for name, value in losses.items()}
            if not np.isfinite(values["loss"]):
                raise DtnError(f"the loss became {values['loss']} at epoch {epoch}, step {step}; lower --lr or use "
                               f"--precision fp32, then run again: {out} goes on from epoch {epoch}")  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(losses["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value / steps
            rate = (step + 1) * len(labels) / (time.perf_counter() - start)
            yield Step(generation, epoch, step, steps, values, rate)
        lr = float(schedule.get_last_lr()[0])
        schedule.step()
        metrics = evaluate_scores(shards.labels[val_rows], TorchScorer(model).score_rows(shards, val_rows))
        assert metrics.auc is not None, "both classes are in the validation split, checked above"
        assert metrics.acc is not None
        stale += 1
        if metrics.auc > best:
            best, stale = metrics.auc, 0
            model.save_pretrained(out)
        report = Epoch(generation, epoch, lr, totals, metrics.auc, metrics.acc, best, rate)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict(),
            "centers": centers.detach(),
            "best": best,
            "epoch": epoch,
            "stale": stale,
        }
        append_metrics(out / METRICS, report)
        save_state(out / STATE, state)
        yield report


def append_metrics(path: Path, report: Epoch) -> None:
    """Adds a line, replacing those of this and later epochs: an epoch repeated after a crash appears once."""
    lines = [row for row in read_metrics(path) if row["epoch"] < report.epoch]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in [*lines, report._asdict()]), encoding="utf-8")
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs recorded so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def clone(model: DTN) -> DTN:
    """A student that starts from its teacher: the same weights, gradients on."""
    return copy.deepcopy(model).requires_grad_(True)
