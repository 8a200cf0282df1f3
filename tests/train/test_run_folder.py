"""A run folder: the crops, recipe and model that belong to it, and the one process that may train it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from small import RECIPE, SMALL, changed

from dtn_fast.data.crop_dataset import CropDataset, ShardFiles, open_crop_dataset
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.model.config import CropPolicy, TimmConfig
from dtn_fast.train import distributed
from dtn_fast.train.ablate import ablate
from dtn_fast.train.config import Execution
from dtn_fast.train.distill import distill, train_initial
from dtn_fast.train.run_folder import CROPS, claim_crops, start_run
from dtn_fast.train.run_lock import LOCK, locked


def relabelled(crops: CropDataset) -> CropDataset:
    number = next(n for n, v in enumerate(crops.videos) if v.split == "val" and v.label)
    videos = [v._replace(label=1 - v.label) if n == number else v for n, v in enumerate(crops.videos)]
    return dataclasses.replace(crops, videos=videos)


def repainted(crops: CropDataset) -> CropDataset:
    pixels = crops.get(np.arange(len(crops.video)))
    pixels[crops.select("train")] ^= 1
    return dataclasses.replace(crops, crops=ShardFiles([pixels], crops.size))


OTHERS: dict[str, Callable[[CropDataset], CropDataset]] = {
    "label": relabelled,
    "pixels": repainted,
    "frames": lambda crops: dataclasses.replace(crops, frame=crops.frame + 1),
    "videos": lambda crops: dataclasses.replace(crops, videos=[v._replace(path=f"x{v.path}") for v in crops.videos]),
    "split": lambda crops: dataclasses.replace(
        crops, videos=[v._replace(split="train") if v.split == "test" else v for v in crops.videos]
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_goes_on_with_its_own_crops_alone(
    trained: Path, crops: Path, dataset: CropDataset, tmp_path: Path, kind: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    known = json.loads((run / CROPS).read_text())
    assert (known["folder"], known["train"], known["val"]) == (str(crops), 60, 30)
    other = dataclasses.replace(OTHERS[kind](dataset), folder="/other")
    for train in (train_initial, distill):
        with pytest.raises(UsageError, match=r"these are /other .* name the same crops, or a new --out") as error:
            next(train(run, other))
        assert str(error.value).startswith(f"{run}: trained on {crops} (60 crops to train on, 30 to validate on, ")
    assert not (run / "generation-1").exists()
    shutil.copytree(crops, tmp_path / "moved")
    moved = open_crop_dataset(tmp_path / "moved")
    assert not list(train_initial(run, moved)), "it is trained"
    next(distill(run, moved))


BLEND = changed(RECIPE, epochs=1, self_blend=True)
RECIPES = {
    "blends alone": (BLEND, False), "blends too": (changed(BLEND, blend_share=0.5), True),
    "one forgery": (changed(RECIPE, epochs=1, methods=("SynthSwap",)), False),
}  # fmt: skip
"""Recipes, and whether they use the fakes of SynthBlend."""


@pytest.mark.parametrize("name", RECIPES)
def test_crops_that_are_not_used_and_what_is_made_of_the_others_do_not_matter(
    dataset: CropDataset, tmp_path: Path, name: str
) -> None:
    recipe, used = RECIPES[name]
    start_run(tmp_path, recipe, SMALL)
    for resident in (False, True):
        list(train_initial(tmp_path, dataset, execution=Execution(resident=resident)))
    videos = [v._replace(path=f"x{v.path}") if v.method == "SynthBlend" else v for v in dataset.videos]
    assert videos != dataset.videos
    with pytest.raises(UsageError, match="trained on") if used else contextlib.nullcontext():
        claim_crops(tmp_path, recipe, dataclasses.replace(dataset, videos=videos))


def test_crops_before_and_after_the_run_has_begun(trained: Path, dataset: CropDataset, tmp_path: Path) -> None:
    start_run(tmp_path / "new", RECIPE, SMALL)
    for crops in (relabelled(dataset), dataset):
        claim_crops(tmp_path / "new", RECIPE, crops)  # nothing is trained yet
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / CROPS).unlink()  # a run of an earlier version
    with pytest.warns(DtnWarning, match="an earlier version did not record the crops of this run; taken as /"):
        claim_crops(run, RECIPE, dataset)
    with pytest.raises(UsageError, match="trained on"):
        claim_crops(run, RECIPE, relabelled(dataset))
    for content in (b"", b"{", b"[]", b"\xff", b'{"folder": "x"}'):
        (run / CROPS).write_bytes(content)
        with pytest.raises(UsageError, match=r"crops\.json: not a valid RunCrops .*; delete it if the run was"):
            claim_crops(run, RECIPE, dataset)


def test_an_ablation_is_not_mixed(dataset: CropDataset, tmp_path: Path) -> None:
    recipe = changed(RECIPE, epochs=1, batch_size=32)
    steps = lambda crops, only: ablate("soft-labels", crops, {"a": dataset}, tmp_path, SMALL, recipe, (only,))
    list(steps(dataset, "DTN w/o STG"))
    for only in ("DTN w/o STG", "DTN w/ STG"):  # the other one would stand in the same table
        with pytest.raises(UsageError, match=r"DTN_w_o_STG: trained on"):
            next(steps(relabelled(dataset), only))


def test_other_options_are_named(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    policy = CropPolicy("yunet", 1.7)
    for recipe, config, named in (
        (changed(RECIPE, lr=1e-4, epochs=5), SMALL, "lr 0.001 (now 0.0001)|epochs 2 (now 5)"),
        (changed(RECIPE, methods=("A", "B")), SMALL, "methods none (now A B)"),
        (changed(RECIPE, weights=(4.0, 0.0, 1.0)), SMALL, "weights 4.0 0.4 0.6 (now 4.0 0.0 1.0)"),
        (RECIPE, dataclasses.replace(SMALL, depth=2), "depth 1 (now 2)"),
        (RECIPE, dataclasses.replace(SMALL, crop=policy), "crop.finder dlib (now yunet)|crop.margin 1.3 (now 1.7)"),
        (RECIPE, TimmConfig("resnet10t", 64), "timm none (now resnet10t)"),
    ):
        with pytest.raises(UsageError) as error:
            start_run(run, recipe, config)
        begin, end = f"{run}: holds a run with ", "; repeat these, or choose another --out"
        told = str(error.value).removeprefix(begin).removesuffix(end)
        assert sorted(told.split(", ")) == sorted(named.split("|"))
    start_run(run, RECIPE, dataclasses.replace(SMALL, crop=CropPolicy()))  # unknown is the default


# ---------------------------------------------------------------------------------------------- the lock

HOLD = "import sys, time; from pathlib import Path; from dtn_fast.train.run_lock import locked\n" \
       "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"  # fmt: skip


@contextlib.contextmanager
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_one_process_trains_a_run(trained: Path, dataset: CropDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    steps = lambda: ablate("soft-labels", dataset, {"a": dataset}, tmp_path, SMALL, RECIPE, ("DTN w/o STG",))
    for folder, start in (
        (run, lambda: next(train_initial(run, dataset))),
        (run, lambda: next(distill(run, dataset, restart=1))),
        (tmp_path / "soft-labels" / "DTN_w_o_STG", lambda: next(steps())),
    ):
        with holder(folder) as process:
            said = rf"{folder}: another process \({process.pid} on {socket.gethostname()}\) trains this run; wait"
            for _ in range(2):  # a refused start leaves the name of the holder
                with pytest.raises(UsageError, match=said):
                    start()
            process.send_signal(signal.SIGKILL)
            process.wait()
            with locked(folder), locked(folder):
                assert (folder / LOCK).read_text() == f"{os.getpid()} on {socket.gethostname()}"
        with holder(folder):  # free again
            pass


def test_only_the_first_process_of_a_group_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path):
        monkeypatch.setattr(distributed, "ranks", lambda: distributed.Ranks(1, 2))
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(DtnWarning, match=f"its file system has no locks .{os.strerror(number)}"), locked(tmp_path):
        pass
