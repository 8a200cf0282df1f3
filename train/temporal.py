"""Training of a temporal head on the features of a trained model, which stays as it is.

The features of every track are computed once and kept in the run's folder while it trains; an epoch then takes seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.data.augment import Augment, DeviceAugment
from dtn_fast.data.clips import ClipBatch, ClipLoader, clips_of, tracks_of
from dtn_fast.data.config import AUGMENTATIONS, trained_corruptions
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.loader import Transform
from dtn_fast.data.synthetic_marker import STAMP
from dtn_fast.dataclass_json import differences
from dtn_fast.errors import DtnError, UsageError, tell
from dtn_fast.evaluation.calibration import card_of_training
from dtn_fast.evaluation.card_page import write_card_page
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.evaluate import forgeries_of
from dtn_fast.evaluation.metrics import by_video, evaluate_scores
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.config import TrainedOn
from dtn_fast.model.detector import device_of, weights_checksum, write_card
from dtn_fast.model.temporal import TemporalHead
from dtn_fast.producer_thread import produced
from dtn_fast.runtime.load import load_model
from dtn_fast.runtime.scorer import BATCH, probability
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import distributed
from dtn_fast.train.checkpoint import load_state, save_state
from dtn_fast.train.config import TemporalRecipe
from dtn_fast.train.log_lines import append_line, cut_lines, read_lines
from dtn_fast.train.loop import Clock, Epoch, Position, Step, Stopped
from dtn_fast.train.run_folder import METRICS, STATE, STEPS
from dtn_fast.train.run_lock import LOCK

FACTS = "temporal.json"
"""File that holds the recipe, the crops and the weights that the head is trained with."""
FEATURES = {"train": "features-train.npy", "val": "features-val.npy"}
"""Files of the features while the head trains."""


class Progress(NamedTuple):
    """Progress of the features."""

    done: int
    """Number of crops whose features are there, views counted."""
    total: int


class TemporalRun:
    """A model that gets a temporal head: its crops, and the folder ``out`` of the checkpoint to be.

    source: a run, whose best generation is taken, or a checkpoint folder.  Raises UsageError when the data holds no
    videos, a split lacks a class, the crops do not fit the model, or ``out`` holds a head of another recipe, model or
    data.
    """

    def __init__(
        self, source: Path, dataset: CropDataset, out: Path, recipe: TemporalRecipe, device: str | torch.device
    ) -> None:
        if distributed.ranks().world > 1:
            raise UsageError("dtn-fast temporal: runs in one process; leave torchrun out")
        self.dataset, self.out, self.recipe = dataset, out, recipe
        self.model = model = load_model(source)
        dataset.check_fits(model.config, str(source))
        dataset.tell_differences(model.config, str(source))
        forgeries = forgeries_of(dataset, [model.config.trained_on])[0]
        self.rows = {split: dataset.select(split, forgeries) for split in FEATURES}
        for split, rows in self.rows.items():
            if set(dataset.labels[rows].tolist()) != {0, 1}:
                raise UsageError(f"{dataset.folder}: the {split} split needs reals and fakes that the model was "
                                 "trained on; prepare it with --splits train val")  # fmt: skip
        self.tracks = {split: tracks_of(dataset, rows) for split, rows in self.rows.items()}
        if max(map(len, self.tracks["train"])) < 2:
            raise UsageError(
                f"{dataset.folder}: holds single pictures; a temporal head needs videos, of several frames"
            )
        self.loader = ClipLoader(dataset, self.rows["train"], recipe.clip, recipe.batch_size, (recipe.seed,),
                                 self._views, recipe.real_repeat)  # fmt: skip
        self._claim(weights_checksum(model))
        config = dataclasses.replace(model.config, clip=recipe.clip, card=None, trained_on=self._trained_on())
        model.config, model.novelty, model.temporal = config, None, None
        torch.manual_seed(recipe.seed)
        model.add_temporal()
        assert model.temporal is not None
        model.notice = STAMP if dataset.synthetic else model.notice
        model.to(device)

    @property
    def _views(self) -> int:
        return self.recipe.versions if self.recipe.augment in AUGMENTATIONS else 1

    def _claim(self, weights: str) -> None:
        """Records what the head is trained with."""
        crops = "+".join(self.dataset.fingerprint(rows) for rows in self.rows.values())
        now = {"recipe": dataclasses.asdict(self.recipe), "weights": weights, "crops": crops}
        path = self.out / FACTS
        if path.is_file():
            try:
                known = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UsageError(f"{path}: damaged ({error}); delete {self.out}, or choose another --out") from error
            if differ := differences(known, now):
                raise UsageError(
                    f"{self.out}: holds a temporal head with {differ}; repeat these, or choose another --out"
                )
        elif self.out.is_dir() and any(file.name != LOCK for file in self.out.iterdir()):
            raise UsageError(f"{self.out}: holds other files; choose another --out")
        write_whole(path, json_text(now, indent=2))

    def _trained_on(self) -> TrainedOn:
        known = self.model.config.trained_on or TrainedOn((), ())
        kinds = {*known.corruptions, *trained_corruptions(self.recipe.augment if self._views > 1 else "none", False)}
        head = f"temporal head on clips of {self.recipe.clip} frames by CE, augmentation "
        head += self.recipe.augment if self._views > 1 else "none"
        recipe = f"{known.recipe or 'a recipe that is not recorded'}; {head}"
        return TrainedOn(known.forgeries, tuple(sorted(kinds)), recipe)

    # ----------------------------------------------------------------------------------------------- features

    def features(self) -> Generator[Progress, None, None]:
        """Computes the logits and features of every track in every view that are not there yet; yields progress.

        Raises OSError when the disk does not hold them.
        """
        if self._finished():
            return
        stores = {split: self._store(split) for split in FEATURES}
        total = sum(store.shape[0] * store.shape[1] for store in stores.values())
        missing, done = [], 0
        for split, store in stores.items():
            for view in range(len(store)):
                for group, begin, end in _groups(self.tracks[split]):
                    if np.isfinite(store[view, begin:end]).all():
                        done += end - begin
                    else:
                        missing.append((split, view, group, begin, end))
        yield Progress(done, total)
        if not missing:
            return
        scorer, transform = TorchScorer(self.model), self._transform()

        def read(check: Callable[[], None]) -> Iterator[NDArray[np.uint8]]:
            for split, view, group, _, _ in missing:
                crops = []
                for track in group:
                    check()
                    crops.append(self.loader.crops(self.tracks[split][track], track, view, transform))
                yield np.concatenate(crops)

        for (split, view, _, begin, end), crops in zip(missing, produced(read, 2, "loading"), strict=True):
            stores[split][view, begin:end] = scorer.outputs(crops)
            done += end - begin
            yield Progress(done, total)
        for store in stores.values():
            store.flush()

    def _transform(self) -> Transform | None:
        preset = AUGMENTATIONS.get(self.recipe.augment)
        device = device_of(self.model)
        if preset is None or device.type == "cpu":
            return Augment(preset) if preset else None
        batched = DeviceAugment(preset)
        return lambda crops, seeds, _: batched(torch.from_numpy(crops).to(device), seeds).cpu().numpy()

    def _store(self, split: str) -> np.memmap[Any, np.dtype[np.float32]]:
        """[views, n, classes + C] in the order of the tracks, in a file; NaN where it is not computed."""
        assert self.model.temporal is not None
        views = self._views if split == "train" else 1
        columns = self.model.config.num_classes + self.model.temporal.features
        shape, path = (views, len(self.rows[split]), columns), self.out / FEATURES[split]
        if path.is_file():
            try:
                store = np.load(path, mmap_mode="r+", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                store = None
            if store is not None and (store.shape, store.dtype) == (shape, np.dtype(np.float32)):
                return store

        def blank(file: Any) -> None:  # in full, so that a disk that is too small is an error here
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            row = np.full(shape[2], np.nan, np.float32).tobytes()
            for _ in range(shape[0] * shape[1]):
                file.write(row)

        write_whole(path, blank)
        return np.load(path, mmap_mode="r+", allow_pickle=False)

    def lines(self) -> list[str]:
        """The validation AUC of videos by the best head and by the mean over frames, in words."""
        rows = read_lines(self.out / METRICS)
        if not rows:
            return []
        (name, mean), best = next(iter(rows[-1]["val_aucs"].items())), rows[-1]["best_auc"]
        none = (
            ""
            if any(row["val_auc"] >= mean for row in rows)
            else "; no epoch was better, so the head is left at the mean of the frames' logits"
        )
        return [f"validation AUC of videos {best:.4f}, by the {name} {mean:.4f}{none}"]

    # ----------------------------------------------------------------------------------------------- training

    def _finished(self) -> bool:
        path = self.out / STATE
        return path.is_file() and load_state(path)["place"]["epoch"] >= self.recipe.epochs

    def fit(self, stop: Callable[[], int] = lambda: 0) -> Generator[Step | Epoch, None, None]:
        """Trains the head by CE on the features, and yields progress; a call on an unfinished run resumes it.

        ``out`` receives the model with the head of the epoch with the best AUC of the validation videos, or with an
        untrained one, which is mean pooling, until an epoch is as good.  ``stop``: as in
        :func:`~dtn_fast.train.loop.fit`.  Raises Stopped, and DtnError when the loss is not finite.
        """
        if self._finished():
            return
        yield from _Fit(self, stop).run()
        for name in FEATURES.values():
            (self.out / name).unlink(missing_ok=True)


def _groups(tracks: list[NDArray[np.int64]]) -> Iterator[tuple[range, int, int]]:
    """Numbers of tracks that are scored together, and the first and last place of their crops."""
    first = begin = end = 0
    for number, track in enumerate(tracks):
        end += len(track)
        if end - begin >= BATCH or number + 1 == len(tracks):
            yield range(first, number + 1), begin, end
            first, begin = number + 1, end


class _Fit:
    def __init__(self, run: TemporalRun, stop: Callable[[], int]) -> None:
        self.run_, self.stop, self.recipe, self.loader, self.out = run, stop, run.recipe, run.loader, run.out
        assert run.model.temporal is not None
        self.head: TemporalHead = run.model.temporal
        self.device, self.classes = device_of(run.model), run.model.config.num_classes
        self.train, self.val = (run._store(split) for split in FEATURES)
        self.place = np.zeros(len(run.dataset.video), np.int64)
        for tracks in run.tracks.values():
            rows = np.concatenate(tracks)
            self.place[rows] = np.arange(len(rows))
        self.head.standardise(torch.from_numpy(self.train[0, :, self.classes :].copy()).to(self.device))
        steps = [np.diff(run.dataset.frame[track]) for track in run.tracks["train"]]
        self.head.step.fill_(float(np.median(np.concatenate(steps))))
        self.optimiser = torch.optim.AdamW(self.head.parameters(), run.recipe.lr, weight_decay=run.recipe.weight_decay)
        self.position = Position()
        self._lay_out_validation()

    def _lay_out_validation(self) -> None:
        dataset, rows = self.run_.dataset, np.concatenate(self.run_.tracks["val"])
        self.val_clips, self.val_of = [], []
        begin = made = 0
        for track in self.run_.tracks["val"]:
            clips = clips_of(len(track), self.recipe.clip)
            self.val_clips.append(begin + clips.frames)
            self.val_of.append(made + clips.of)
            begin, made = begin + len(track), made + len(clips.frames)
        self.val_labels, self.val_videos = dataset.labels[rows], dataset.video[rows].astype(str).tolist()

    def run(self) -> Generator[Step | Epoch, None, None]:
        if (self.out / STATE).is_file():
            self._resume()
        else:
            auc, _ = self._validate()
            self._keep(auc)
        for name in (METRICS, STEPS):
            cut_lines(self.out / name, self.position.epoch, self.position.step)
        while self.position.epoch < self.recipe.epochs:
            yield from self._epoch()

    def _epoch(self) -> Generator[Step | Epoch, None, None]:
        position, epoch, steps = self.position, self.position.epoch, len(self.loader)
        clock, first = Clock(self.loader, self.recipe.batch_size * self.recipe.clip, self.device), position.step
        lr = self._set_lr(epoch * steps + first)
        self.head.train()
        for number, batch in enumerate(self.loader.epoch(epoch, first), first):
            lr = self._set_lr(epoch * steps + number)
            losses, norm = self._step(batch)
            position.counted += 1
            for name, value in losses.items():
                position.sums[name] = position.sums.get(name, 0.0) + value
            clock.steps += 1
            yield Step(0, epoch, number, steps, losses, norm, lr, *clock.read(), 0)
            if signalled := self.stop():
                position.step = number + 1
                self._save()
                raise Stopped(signalled, f"epoch {epoch + 1}, step {number + 1}")
        yield self._close(lr, clock)

    def _set_lr(self, step: int) -> float:
        total = self.recipe.epochs * len(self.loader)
        lr = self.recipe.lr * (1 + math.cos(math.pi * step / total)) / 2
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        return lr

    def _step(self, batch: ClipBatch) -> tuple[dict[str, float], float]:
        logits = self._logits(self.train[batch.views[:, None], self.place[batch.rows]])
        loss = F.cross_entropy(logits, torch.from_numpy(batch.labels).to(self.device))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0))
        if not math.isfinite(loss.item() + norm):
            raise DtnError(f"{self.out}: the temporal head's loss is not finite; lower --lr in a new --out")
        self.optimiser.step()
        return {"loss": loss.item()}, norm

    def _logits(self, frames: NDArray[np.float32]) -> Tensor:
        """Logits of clips from the outputs [B, T, classes + C] of their frames."""
        outputs = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)
        return self.head(outputs[..., self.classes :], outputs[..., : self.classes])

    def _validate(self) -> tuple[float, float]:
        """AUC and accuracy of the validation videos, scored by the head."""
        self.head.eval()
        with torch.inference_mode():
            logits = [self._logits(self.val[0][clips]).double().cpu().numpy() for clips in self.val_clips]
        self.val_scores = probability(np.concatenate(logits))[np.concatenate(self.val_of)]
        found = evaluate_scores(*by_video(self.val_videos, self.val_labels, self.val_scores), EvaluateConfig.threshold)
        assert found.auc is not None, "both classes are in the validation split, checked at the start"
        assert found.acc is not None
        return found.auc, found.acc

    def _mean_pooling(self) -> float:
        """AUC of the validation videos, scored by the mean over frames."""
        scores = probability(self.val[0, :, : self.classes].astype(np.float64))
        auc = evaluate_scores(*by_video(self.val_videos, self.val_labels, scores), EvaluateConfig.threshold).auc
        assert auc is not None
        return auc

    def _close(self, lr: float, clock: Clock) -> Epoch:
        position, rate = self.position, clock.read()
        auc, acc = self._validate()
        position.stale += 1
        if auc >= position.best:  # of equals the last, whose rate is the lowest
            self._keep(auc)
        means = {name: value / position.counted for name, value in position.sums.items()}
        report = Epoch(0, position.epoch, lr, means, auc, acc, position.best, *rate, 0,
                       {"mean over frames": self._mean_pooling()})  # fmt: skip
        append_line(self.out / METRICS, report._asdict())
        append_line(self.out / STEPS, {"epoch": position.epoch, "step": len(self.loader) - 1, "lr": lr, **means})
        self.position = Position(position.epoch + 1, 0, position.best, position.stale)
        self._save()
        return report

    def _keep(self, auc: float) -> None:
        """Writes the model as the best so far, with its card."""
        self.position.best, self.position.stale = auc, 0
        run, model = self.run_, self.run_.model
        model.save_pretrained(self.out)
        y, scores = by_video(self.val_videos, self.val_labels, self.val_scores)
        names = [str(number) for number in range(len(y))]
        crops = json.loads((self.out / FACTS).read_text(encoding="utf-8"))["crops"]
        card = card_of_training(model, run.dataset, run.rows, crops, (y, scores, names))
        card = dataclasses.replace(card, val_unit="videos that the temporal head scores")
        write_card(self.out, card)
        try:
            write_card_page(self.out, card, model.notice)
        except UsageError as error:  # the packages of pages need not be there
            tell(f"{self.out}: no card.html ({error})")

    def _save(self) -> None:
        state = {"head": self.head.state_dict(), "optimiser": self.optimiser.state_dict()}
        save_state(self.out / STATE, {**state, "place": dataclasses.asdict(self.position)})

    def _resume(self) -> None:
        state, where = load_state(self.out / STATE), str(self.out / STATE)
        try:
            self.head.load_state_dict(state["head"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.position = Position(**state["place"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{where}: made by another version ({error!r}); delete {self.out}") from error
