"""Progress of a training run: a live display or log lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dtn_fast.packages import require
from dtn_fast.train.distributed import ranks
from dtn_fast.train.loop import Epoch, Step

QUIET = 60
"""Seconds between progress lines without a terminal, as in the log file of a scheduler's job."""


def watch(events: Iterable[Step | Epoch], run: Path, epochs: int, every: int, wandb: str) -> None:
    """Runs a training generator to its end and shows progress; only the first process of several prints and logs.

    run: folder for TensorBoard's events, if tensorboard is installed.  every: steps between logged points.  wandb: a
    Weights & Biases project, empty for none.  Raises UsageError when ``wandb`` is given and not installed.
    """
    if not ranks().main:
        for _ in events:
            pass
        return
    loggers: list[Any] = [_TensorBoard(run, every)] if importlib.util.find_spec("tensorboard") else []
    if wandb:
        loggers.append(_Wandb(wandb, run, every))
    terminal = Console(stderr=True)
    display = _Live(terminal, epochs) if terminal.is_terminal else _Lines(epochs)
    try:
        for event in events:
            for logger in loggers:
                logger(event)
            display(event)
    finally:
        for closing in (display, *loggers):
            closing.close()


def title(event: Step | Epoch, epochs: int) -> str:
    return f"generation {event.generation}, epoch {event.epoch + 1}/{epochs}"


def line(report: Epoch, epochs: int) -> str:
    """Report of an epoch as one line."""
    skipped = f", {report.skipped} steps not finite" if report.skipped else ""
    parts = "".join(f"{name} {auc:.4f}, " for name, auc in report.val_aucs.items())
    return (
        f"{title(report, epochs)}: loss {report.losses.get('loss', math.nan):.4f}, validation AUC {report.val_auc:.4f} "
        f"({parts}best {report.best_auc:.4f}), {report.images_per_second:.0f} images/s, "
        f"{report.data_wait:.0%} of the time waiting for data, {report.memory:.1f} GB{skipped}"
    )


class _Lines:
    """Progress for a log file: a line per epoch, and one per minute in between."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._printed = epochs, time.monotonic()

    def __call__(self, event: Step | Epoch) -> None:
        if isinstance(event, Epoch):
            print(line(event, self._epochs), flush=True)
            self._printed = time.monotonic()
        elif time.monotonic() - self._printed > QUIET:
            losses = ", ".join(f"{name} {value:.4f}" for name, value in event.losses.items())
            print(f"{title(event, self._epochs)}, step {event.step + 1} of {event.steps}: {losses}, "
                  f"{event.images_per_second:.0f} images/s", flush=True)  # fmt: skip
            self._printed = time.monotonic()

    def close(self) -> None:
        pass


class _Live:
    """Progress for a terminal: bars for the epoch and the generation, and the latest values."""

    def __init__(self, terminal: Console, epochs: int) -> None:
        self._epochs, self._generation = epochs, -1
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False), console=terminal,
        )  # fmt: skip
        self._epoch = self._bars.add_task("epoch", total=None)
        self._whole = self._bars.add_task("generation", total=None)
        above = sys.stdout.isatty()  # lines on the same terminal go above the display
        self._live = Live(self._bars, console=terminal, refresh_per_second=4, transient=True, redirect_stdout=above)
        self._live.start()

    def __call__(self, event: Step | Epoch) -> None:
        if isinstance(event, Epoch):
            print(line(event, self._epochs), flush=True)
            return
        done = event.epoch * event.steps + event.step + 1
        if event.generation != self._generation:  # count the speed of a resumed generation from here
            self._generation = event.generation
            self._bars.reset(self._whole, total=self._epochs * event.steps, completed=done - 1)
        if event.step == 0 or self._bars.tasks[0].total is None:
            self._bars.reset(self._epoch, total=event.steps, completed=event.step)
        self._bars.update(self._epoch, completed=event.step + 1, description=f"epoch {event.epoch + 1}/{self._epochs}")
        self._bars.update(self._whole, completed=done, description=f"generation {event.generation}")
        self._live.update(Group(self._bars, _values(event)))

    def close(self) -> None:
        self._live.stop()


def _values(event: Step) -> Table:
    cells = {name: f"{value:.4f}" for name, value in event.losses.items()}
    if event.grad_norm is not None:
        cells["gradient"] = f"{event.grad_norm:.3g}"
    cells |= {
        "lr": f"{event.lr:.3g}",
        "images/s": f"{event.images_per_second:.0f}",
        "data wait": f"{event.data_wait:.0%}",
        "memory": f"{event.memory:.1f} GB",
    }
    if event.skipped:
        cells["not finite"] = str(event.skipped)
    table = Table(*cells, box=None, pad_edge=False, header_style="dim")
    table.add_row(*cells.values())
    return table


def _scalars(event: Step | Epoch) -> dict[str, float]:
    """Values of an event to plot, by name."""
    if isinstance(event, Epoch):
        values = {f"epoch/{name}": value for name, value in event.losses.items()}
        values |= {f"val/auc_{name}": auc for name, auc in event.val_aucs.items()}
        return values | {"val/auc": event.val_auc, "val/acc": event.val_acc, "val/best_auc": event.best_auc}
    values = {f"step/{name}": value for name, value in event.losses.items()}
    if event.grad_norm is not None:
        values["step/grad_norm"] = event.grad_norm
    return values | {
        "step/lr": event.lr,
        "speed/images_per_second": event.images_per_second,
        "speed/data_wait": event.data_wait,
        "speed/memory_gb": event.memory,
        "step/skipped": event.skipped,
    }


class _TensorBoard:
    """TensorBoard writers, one per generation; steps repeated by a resumed run replace the earlier ones."""

    def __init__(self, run: Path, every: int) -> None:
        self._run, self._every, self._writer, self._generation, self._steps = run, every, None, -1, 0

    def __call__(self, event: Step | Epoch) -> None:
        if isinstance(event, Step):
            self._steps = (at := event.epoch * event.steps + event.step) + 1
            if event.generation != self._generation:
                self.close()
                folder = self._run / "tensorboard" / f"generation-{event.generation}"
                module = importlib.import_module("torch.utils.tensorboard")
                self._writer, self._generation = module.SummaryWriter(str(folder), purge_step=at), event.generation
            if (event.step + 1) % self._every and event.step + 1 != event.steps:
                return
        if self._writer is not None:
            for name, value in _scalars(event).items():
                self._writer.add_scalar(name, value, self._steps)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """Weights & Biases logger; a run is resumed by the name of its folder."""

    def __init__(self, project: str, run: Path, every: int) -> None:
        self._wandb = require("wandb", "wandb")
        self._every = every
        self._run = self._wandb.init(project=project, name=run.name, id=run.name, resume="allow", dir=str(run))

    def __call__(self, event: Step | Epoch) -> None:
        if isinstance(event, Epoch) or (event.step + 1) % self._every == 0:
            self._run.log({f"generation-{event.generation}/{name}": value for name, value in _scalars(event).items()})

    def close(self) -> None:
        self._run.finish()
