"""The training loop of one generation: from shard files to the checkpoint with the best validation AUC."""

from __future__ import annotations

import collections
import dataclasses
import resource
import signal
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.data.augment import Augment, DeviceAugment
from dtn_fast.data.blend import partly_blended, self_blended
from dtn_fast.data.clips import ClipLoader
from dtn_fast.data.config import AUGMENTATIONS, NO_AUGMENTATION, turned_more
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.loader import Batch, Loader
from dtn_fast.data.replay import parts_of
from dtn_fast.data.synthetic_marker import STAMP
from dtn_fast.data.video_table import REAL
from dtn_fast.device import to_device
from dtn_fast.errors import DtnError, UsageError, tell
from dtn_fast.evaluation.calibration import card_of_training
from dtn_fast.evaluation.card_page import write_card_page
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import Metrics, evaluate_scores
from dtn_fast.files import write_whole
from dtn_fast.model.build import TimmDetector
from dtn_fast.model.card import CARD
from dtn_fast.model.config import TrainedOn, mask_side
from dtn_fast.model.detector import Detector, check_state, write_card
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import distributed
from dtn_fast.train.checkpoint import load_state, save_centers, save_state
from dtn_fast.train.config import Execution, Recipe
from dtn_fast.train.hard_samples import emphasis_of
from dtn_fast.train.log_lines import append_line, cut_lines
from dtn_fast.train.rehearsal import ENOUGH, rehearse
from dtn_fast.train.run_folder import (
    CENTERS,
    METRICS,
    NONFINITE,
    STATE,
    STEPS,
    VALIDATION,
    fingerprint_of,
    generation_folder,
    rows_of,
    trained_on,
)
from dtn_fast.train.step import TrainStep, batch_of_rank

LAG = 4
"""Number of steps after which a step's values are read from the GPU; the host runs that far ahead and never waits."""


class Step(NamedTuple):
    """Progress report of one step."""

    generation: int
    epoch: int
    step: int
    steps: int
    """Number of updates in this epoch."""
    losses: dict[str, float]
    grad_norm: float | None
    lr: float
    images_per_second: float
    """Speed of all processes together, since this process began the epoch."""
    data_wait: float
    """Share of that time spent waiting for data."""
    memory: float
    """Peak memory in GB, of the GPU or, without one, of the process."""
    skipped: int
    """Steps of this generation that were skipped because the loss or gradient was not finite."""


class Epoch(NamedTuple):
    """Progress report of one epoch, a line of metrics.jsonl."""

    generation: int
    epoch: int
    lr: float
    losses: dict[str, float]
    """Mean of each loss term over the epoch."""
    val_auc: float
    val_acc: float
    best_auc: float
    images_per_second: float
    data_wait: float
    memory: float
    skipped: int
    val_aucs: dict[str, float] = {}  # noqa: RUF012 (never changed)
    """Validation AUC of the new and of the old data, in fine-tuning with old data; ``val_auc`` is their mean.  Of a
    temporal head, that of the mean over frames beside its own."""


class Stopped(DtnError):
    """Raised when a signal has stopped the run and its state is saved."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: saved at {where}; run the same command to resume")
        self.exit_code = 128 + number


@dataclass
class Position:
    """Position within a generation: everything besides the weights that a resumed run needs."""

    epoch: int = 0
    step: int = 0
    """Number of updates done in this epoch."""
    best: float = -1.0
    stale: int = 0
    """Epochs since the best one."""
    skipped: int = 0
    counted: int = 0
    """Number of finite steps in this epoch."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of those steps' values, by name."""
    recent: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of steps.jsonl."""


class SoftLabels:
    """Cache of the teacher's logits for each of ``views`` views of each row."""

    def __init__(self, rows: NDArray[np.int64], views: int, classes: int, device: torch.device) -> None:
        self._rows = np.unique(rows)
        self.table = torch.full((len(self._rows), views, classes), torch.nan, device=device)
        self.known = np.zeros((len(self._rows), views), bool)

    def get(self, batch: Batch) -> Tensor | None:
        """Cached logits of the batch [B, classes]; None unless all of them are known."""
        places = np.searchsorted(self._rows, batch.rows)
        if not self.known[places, batch.views].all():
            return None
        return self.table[self._at(places), self._at(batch.views)]

    def put(self, batch: Batch, soft: Tensor) -> None:
        places = np.searchsorted(self._rows, batch.rows)
        self.table[self._at(places), self._at(batch.views)] = soft
        self.known[places, batch.views] = True

    def _at(self, places: NDArray[np.int64]) -> Tensor:
        return to_device(places, self.table.device)

    def load(self, table: Tensor) -> None:
        self.table.copy_(table)
        self.known = ~table.isnan().any(2).cpu().numpy()


class Readback:
    """Queue of values copied from the device, read ``lag`` steps after their copy was started."""

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._waiting: collections.deque[tuple[Any, Tensor, torch.cuda.Event | None]] = collections.deque()

    def push(self, key: Any, values: Tensor) -> None:
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.current_stream(values.device).record_event()
            values = host
        self._waiting.append((key, values, event))

    def pop(self, everything: bool = False) -> Iterator[tuple[Any, list[float]]]:
        while len(self._waiting) > (0 if everything else self._lag):
            key, values, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            yield key, values.tolist()


def fit(
    model: Detector,
    dataset: CropDataset,
    recipe: Recipe,
    out: Path,
    teacher: Detector | None = None,
    generation: int = 0,
    device: str | torch.device = "cpu",
    execution: Execution = Execution(),
    stop: Callable[[], int] = lambda: 0,
    centers: Tensor | None = None,
    initial: Recipe | None = None,
    facts: TrainedOn | None = None,
) -> Generator[Step | Epoch, None, None]:
    """Trains ``model`` and yields progress; with a ``teacher`` by DSD, else by CE + Ct-c.

    ``out`` receives the weights of the epoch with the best validation AUC, its Ct-c centres and validation scores,
    metrics.jsonl, steps.jsonl and the training state: a call on a folder with an unfinished run resumes it, with the
    same result as without the pause.  ``stop`` is called after every step; when it returns the number of a signal, the
    state is saved and Stopped is raised.  centers: as in TrainStep.  initial: the recipe that the first teacher was
    trained by; default: ``recipe``.  facts: those of the training to store, if another came before; default: by
    ``initial`` and ``recipe``.  With old data in ``dataset``, the validation AUC is the mean of the new and the old
    data's.  In a process group every process makes the same call and the first one writes.  Raises UsageError when the
    image size does not fit or a split lacks a class, or the model has a temporal head, which is of the frames as they
    are; DtnError when too many steps were not finite.
    """
    if model.config.clip:
        raise UsageError("the model has a temporal head (clip in its configuration), which would not fit the trained "
                         "frames; train a model without one, then run dtn-fast temporal")  # fmt: skip
    if facts is None:
        facts = trained_on(initial or recipe, dataset, None if teacher is None else recipe)
        if adapted := str(getattr(model.config, "adaptation", "")):
            facts = dataclasses.replace(facts, recipe=f"{facts.recipe}; {adapted}")
    model.config, model.novelty = dataclasses.replace(model.config, trained_on=facts, card=None), None
    loop = _Loop(model, dataset, recipe, out, teacher, generation, torch.device(device), execution, stop, centers)
    yield from loop.run()
    if loop.ranks.main and not (out / CARD).is_file() and (out / VALIDATION).is_file():
        _write_card(model, dataset, recipe, out)
    distributed.barrier()


def _write_card(model: Detector, dataset: CropDataset, recipe: Recipe, out: Path) -> None:
    """Writes the model card of a trained generation, not calibrated yet, and its page."""
    try:
        with np.load(out / VALIDATION, allow_pickle=False) as stored:
            validation = stored["labels"], stored["scores"], stored["video"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        validation = None  # damaged, or of an earlier version
    used = dict(zip(("train", "val"), rows_of(recipe, dataset), strict=True))
    card = card_of_training(model, dataset, used, fingerprint_of(recipe, dataset), validation)
    write_card(out, card)
    try:
        write_card_page(out, card, model.notice)
    except UsageError as error:  # the packages of pages need not be there
        tell(f"{out}: no card.html ({error})")


class _Loop:
    def __init__(
        self,
        model: Detector,
        dataset: CropDataset,
        recipe: Recipe,
        out: Path,
        teacher: Detector | None,
        generation: int,
        device: torch.device,
        execution: Execution,
        stop: Callable[[], int],
        centers: Tensor | None,
    ) -> None:
        self.recipe, self.execution, self.out, self.stop = recipe, execution, out, stop
        self.generation, self.device, self.ranks = generation, device, distributed.ranks()
        if recipe.self_blend and recipe.blend_share < 1:
            dataset = partly_blended(dataset, recipe.blend_share, recipe.seed)
        elif recipe.self_blend:
            dataset = self_blended(dataset, recipe.seed)
        self.dataset = dataset
        train_rows, self.val_rows = splits(dataset, recipe, model)
        self.parts = {name: videos[dataset.video[self.val_rows]] for name, videos in parts_of(dataset).items()}
        model.notice = STAMP if dataset.synthetic else ""
        self.step = TrainStep(model, recipe, execution, device, teacher, centers)
        preset = AUGMENTATIONS.get(recipe.augment)
        where = recipe.augment_on if recipe.augment_on != "auto" else "device" if device.type == "cuda" else "cpu"
        emphasis = None
        if teacher is not None:
            folders = generation_folder(out.parent, generation - 1), out
            emphasis = emphasis_of(teacher, dataset, train_rows, recipe, folders, device)
        strong = None
        if emphasis is not None and emphasis.strongly.any():
            preset, strong = preset or NO_AUGMENTATION, turned_more(preset)
        on_cpu = Augment(preset, strong) if preset and where == "cpu" else None
        self.augment = DeviceAugment(preset, strong) if preset and where == "device" else None
        batch = batch_of_rank(recipe, self.ranks.world)
        self.loader = Loader(
            dataset, train_rows, batch, (recipe.seed, generation), recipe.real_repeat, *self.ranks, device=device,
            resident=execution.resident, transform=on_cpu, views=recipe.cache_teacher if teacher is not None else 0,
            emphasis=emphasis, replay=recipe.replay_share,
            mask_side=mask_side(model.config) if recipe.mask_weight else 0,
        )  # fmt: skip
        if self.loader.total < recipe.batch_size and recipe.batch_size > batch // recipe.accumulate:
            raise UsageError(
                f"an epoch has {self.loader.total} crops, fewer than --batch-size {recipe.batch_size}; lower "
                "--batch-size"
            )
        if isinstance(model, TimmDetector):
            part = min(self.loader.total, batch // recipe.accumulate)
            rehearse(self.step, dataset.get(train_rows[: min(part, ENOUGH)]))
        self.soft = None
        if teacher is not None and recipe.cache_teacher:
            self.soft = SoftLabels(train_rows, recipe.cache_teacher, model.config.num_classes, device)
        self.position = Position()

    def run(self) -> Generator[Step | Epoch, None, None]:
        self._resume()
        while self.position.epoch < self.recipe.epochs:
            if self.recipe.epoch_patience and self.position.stale >= self.recipe.epoch_patience:
                break
            yield from self._epoch()
        distributed.barrier()  # no process reads the weights before they are complete

    def _resume(self) -> None:
        if (self.out / STATE).is_file():
            state = load_state(self.out / STATE)
            where = str(self.out / STATE)
            try:
                check_state(self.step.model, state["model"], where)
                self.step.load(state)
                self.position = Position(**state["place"])
                if self.soft is not None:
                    self.soft.load(state["soft"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UsageError(f"{where}: made by another version or kind of run ({error!r}); delete it") from error
        distributed.barrier()
        if self.ranks.main:
            for name in (METRICS, STEPS, NONFINITE):
                cut_lines(self.out / name, self.position.epoch, self.position.step)

    def _epoch(self) -> Generator[Step | Epoch, None, None]:
        position, epoch = self.position, self.position.epoch
        steps = len(self.loader)
        lr = self.step.set_time(epoch, steps - 1, steps)  # of a run that was stopped after the epoch's last step
        self.step.model.train()
        readback = Readback(LAG if self.device.type == "cuda" else 0)
        clock = Clock(self.loader, self.recipe.batch_size, self.device)
        first = position.step
        for number, batch in enumerate(self.loader.epoch(epoch, first), first):
            # the seed depends on the step's position alone, so a resumed run draws the same random numbers
            torch.manual_seed(seed_of(self.recipe.seed, self.generation, epoch, number, self.ranks.rank))
            lr = self.step.set_time(epoch, number, steps)
            crops = batch.crops
            if self.augment:
                masks = [] if batch.masks is None else [batch.masks]
                crops = self.augment(crops, batch.seeds, batch.strongly, *masks)
            soft = self.soft.get(batch) if self.soft else None
            outcome = self.step(crops, batch.labels, soft, batch.weights, batch.masks)
            if self.soft is not None and outcome.soft is not None:
                self.soft.put(batch, outcome.soft)
            self.loader.release(batch)
            stop_signal = torch.full((1,), float(self.stop()), device=self.device)
            readback.push((number, batch.rows, lr), torch.cat((outcome.values, distributed.largest(stop_signal))))
            save = self.execution.save_every and (number + 1) % self.execution.save_every == 0 and number + 1 < steps
            signalled = 0
            for (done, rows, rate), (*values, flag) in readback.pop(everything=bool(save)):
                yield self._account(done, steps, rows, values, rate, clock)
                signalled = signalled or int(flag)
            if signalled:
                for (done, rows, rate), (*values, _) in readback.pop(everything=True):
                    yield self._account(done, steps, rows, values, rate, clock)
            if save or signalled:
                position.step = number + 1
                self._save()
            if signalled:
                raise Stopped(signalled, f"generation {self.generation}, epoch {epoch + 1}, step {number + 1}")
        for (done, rows, rate), (*values, _) in readback.pop(everything=True):
            yield self._account(done, steps, rows, values, rate, clock)
        yield self._close(lr, clock)

    def _account(
        self, number: int, steps: int, rows: NDArray[np.int64], values: list[float], lr: float, clock: Clock
    ) -> Step:
        """Adds a step's values to the sums, or records that they are not finite."""
        position, named = self.position, dict(zip(self.step.names, values, strict=True))
        clock.steps += 1
        if np.isfinite(values).all():
            position.counted += 1
            for sums in (position.sums, position.recent):
                for name, value in named.items():
                    sums[name] = sums.get(name, 0.0) + value
            position.recent["steps"] = position.recent.get("steps", 0) + 1
        else:
            self._skip(number, rows, named)
        if (number + 1) % self.execution.log_every == 0 or number + 1 == steps:
            if self.ranks.main and (counted := position.recent.pop("steps", 0)):
                means = {name: value / counted for name, value in position.recent.items()}
                append_line(self.out / STEPS, {"epoch": position.epoch, "step": number, "lr": lr, **means})
            position.recent = {}
        losses = {name: value for name, value in named.items() if name != "grad_norm"}
        return Step(self.generation, position.epoch, number, steps, losses, named.get("grad_norm"), lr, *clock.read(),
                    position.skipped)  # fmt: skip

    def _skip(self, number: int, rows: NDArray[np.int64], values: dict[str, float]) -> None:
        self.position.skipped += 1
        rows = np.concatenate(distributed.gather(rows))
        if self.ranks.main:
            videos = [self.dataset.videos[v].path for v in self.dataset.video[rows]]
            row = {
                "epoch": self.position.epoch,
                "step": number,
                "rows": rows.tolist(),
                "videos": [str(v) for v in videos],
            }
            append_line(self.out / NONFINITE, {**row, "values": {k: str(v) for k, v in values.items()}})
        if self.position.skipped > self.recipe.max_nonfinite:
            raise DtnError(
                f"{self.position.skipped} steps were not finite, the last at epoch {self.position.epoch + 1}, step "
                f"{number + 1} ({', '.join(f'{k} {v:.4g}' for k, v in values.items())}); their crops are in "
                f"{self.out / NONFINITE}; lower --lr or use --precision fp32 in a new --out, or raise --max-nonfinite"
            )

    def _close(self, lr: float, clock: Clock) -> Epoch:
        """Validates, keeps the weights if they are the best so far, moves to the next epoch and saves the state."""
        position, rate = self.position, clock.read()
        metrics, scores = self._validate()
        labels = self.dataset.labels[self.val_rows]
        aucs = {name: evaluate_scores(labels[part], scores[part], EvaluateConfig.threshold).auc
                for name, part in self.parts.items()}  # fmt: skip
        auc = metrics.auc if not aucs else float(np.mean([value for value in aucs.values() if value is not None]))
        assert auc is not None, "both classes are in the validation split, checked at the start"
        assert metrics.acc is not None
        position.stale += 1
        if auc > position.best:
            position.best, position.stale = auc, 0
            if self.ranks.main:
                self.step.eval_model().save_pretrained(self.out)
                save_centers(self.out / CENTERS, self.step.centers)
                arrays: dict[str, Any] = {
                    "labels": labels,
                    "scores": scores,
                    "video": self.dataset.video[self.val_rows],
                }
                if self.parts:
                    arrays["parts"] = np.array(list(self.parts.values()))
                write_whole(self.out / VALIDATION, lambda file: np.savez(file, **arrays))
        means = {name: value / max(position.counted, 1) for name, value in position.sums.items() if name != "grad_norm"}
        report = Epoch(
            self.generation, position.epoch, lr, means, auc, metrics.acc, position.best, *rate, position.skipped,
            {name: value for name, value in aucs.items() if value is not None},
        )  # fmt: skip
        if self.ranks.main:
            append_line(self.out / METRICS, report._asdict())
        position.epoch, position.step, position.counted, position.sums, position.recent = (
            position.epoch + 1,
            0,
            0,
            {},
            {},
        )
        self._save()
        return report

    def _validate(self) -> tuple[Metrics, NDArray[np.float64]]:
        """Frame-level metrics and scores of the validation split, computed by all processes; equal to one process's."""
        share = self.val_rows[self.ranks.rank :: self.ranks.world]
        mine = TorchScorer(self.step.eval_model(), runtime=Runtime(mode="eager")).score_rows(self.dataset, share)
        scores = distributed.interleave(distributed.gather(mine))
        return evaluate_scores(self.dataset.labels[self.val_rows], scores, EvaluateConfig.threshold), scores

    def _save(self) -> None:
        if self.ranks.main:
            state = {**self.step.state(), "place": dataclasses.asdict(self.position)}
            if self.soft is not None:
                state["soft"] = self.soft.table
            save_state(self.out / STATE, state)


class Clock:
    """Speed since the epoch began in this process."""

    def __init__(self, loader: Loader | ClipLoader, batch: int, device: torch.device) -> None:
        self._loader, self._batch, self._device = loader, batch, device
        self._start, self._waited, self.steps = time.perf_counter(), loader.waited, 0

    def read(self) -> tuple[float, float, float]:
        """Images per second, share of the time spent waiting for data, peak memory in GB."""
        passed = time.perf_counter() - self._start
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device) / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        return self.steps * self._batch / passed, (self._loader.waited - self._waited) / passed, memory


def splits(dataset: CropDataset, recipe: Recipe, model: Detector) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and to validate on.

    Raises UsageError when the data holds none of the recipe's forgeries, a split lacks a class, or the crops do not fit
    the model.
    """
    methods = () if recipe.self_blend and recipe.blend_share == 1 else recipe.methods
    held = dataset.methods
    if absent := [method for method in methods if method not in held] if held else []:
        text = f"--methods (the preset's, if not given) names {', '.join(absent)}, and the data holds {', '.join(held)}"
        if len(absent) == len(methods):
            raise UsageError(f"{text}; name some of these by --methods, or leave it empty for all")
        tell(f"{text}; training goes on without {', '.join(absent)}")
    train_rows, val_rows = dataset.select("train", methods), dataset.select("val", methods)
    for name, rows in (("train", train_rows), ("val", val_rows)):
        if set(dataset.labels[rows].tolist()) != {0, 1}:
            raise UsageError(_lack(dataset, name, rows, not recipe.self_blend))
    if recipe.mask_weight and not (dataset.masked & (dataset.labels == 1))[train_rows].any():
        raise UsageError(f"--mask-weight: no fake of the train split has a known mask ({dataset.folder}); prepare a "
                         "dataset that has masks, with --masks, or add --self-blend")  # fmt: skip
    dataset.check_fits(model.config, "the model")
    return train_rows, val_rows


def _lack(dataset: CropDataset, name: str, rows: NDArray[np.int64], may_blend: bool) -> str:
    """What the split ``name`` lacks, what the data holds, and how to get the rest."""
    fakes = int(dataset.labels[rows].sum())
    counts = collections.Counter((dataset.videos[v].split, dataset.videos[v].method) for v in dataset.video)
    held = ", ".join(f"{split}/{method} {count}" for (split, method), count in sorted(counts.items()) if split)
    again = "prepare again with --splits train val (a folder of your own needs both, or is divided by prepare --split)"
    remedies = [f"add {'reals' if fakes else 'fakes'} to {name}" if len(rows) else again]
    if may_blend and not fakes and counts["train", REAL] and counts["val", REAL]:
        remedies.append("--self-blend makes fakes from reals")
    why = "".join(f"; {note}" for note in dataset.notes if "left out" in note)
    return (f"the {name} split needs reals and fakes; it has {len(rows) - fakes} crops of reals and {fakes} of fakes; "
            f"the data holds {held or 'no crops'}{why}; {', or '.join(remedies)}")  # fmt: skip


def seed_of(*numbers: int) -> int:
    """A seed derived from ``numbers``, practically unique to them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
