"""Runs that are killed, stopped, restarted and shared by processes: what comes out is what one whole run gives."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small import RECIPE, SMALL, changed

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.loader import Batch, Loader
from dtn_fast.errors import UsageError
from dtn_fast.model.build import build_detector
from dtn_fast.model.config import TimmConfig
from dtn_fast.train import loop
from dtn_fast.train.checkpoint import load_state
from dtn_fast.train.config import Execution
from dtn_fast.train.distributed import interleave, synchronise_bn
from dtn_fast.train.log_lines import read_lines
from dtn_fast.train.loop import Epoch, SoftLabels, Step, Stopped, fit
from dtn_fast.train.step import batch_of_rank

FLAGS = ["--batch-size", "8", "--lr", "1e-3", "--precision", "fp32", "--augment", "light"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps({**json.loads(SMALL.to_json()), "noise_std": 0.0}))
    return path


def command(crops: Path, out: Path, config: Path, *flags: str, torchrun: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, *(("-m", "torch.distributed.run", *torchrun) if torchrun else ()), "-m", "dtn_fast"]
    return [*start, "train", str(crops), "--out", str(out), "--config", str(config), *FLAGS, *flags]


def start(*arguments, **kwargs) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments, **kwargs), cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen) -> None:
    """Until a run has recorded that many steps, or has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and len(read_lines(out / "generation-0" / loop.STEPS)) < steps:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)


def same_run(a: Path, b: Path) -> None:
    """Weights, state, curves and validation scores, to the bit."""
    one, two = (load_state(run / "generation-0" / loop.STATE) for run in (a, b))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    weights = [(run / "generation-0" / "model.safetensors").read_bytes() for run in (a, b)]
    assert weights[0] == weights[1]
    assert read_lines(a / "generation-0" / loop.STEPS) == read_lines(b / "generation-0" / loop.STEPS)
    kept = ("epoch", "lr", "losses", "val_auc", "val_acc", "best_auc", "skipped")
    rows = [[{k: r[k] for k in kept} for r in read_lines(run / "generation-0" / loop.METRICS)] for run in (a, b)]
    assert rows[0] == rows[1]
    assert rows[0]
    scores = [np.load(run / "generation-0" / loop.VALIDATION)["scores"] for run in (a, b)]
    assert np.array_equal(*scores)


def test_synchronised_bn_keeps_the_activation_that_timm_puts_into_it() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = build_detector(TimmConfig("test_efficientnet", image_size=64)).train()
        images = torch.randn(4, 3, 64, 64)
        synchronised = synchronise_bn(copy.deepcopy(plain), torch.device("cpu"))
        for mode in (True, False):
            torch.testing.assert_close(
                synchronised.train(mode)(images), plain.train(mode)(images), rtol=1e-4, atol=1e-5
            )
    finally:
        dist.destroy_process_group()
    on_gpu = synchronise_bn(plain, torch.device("cuda"))  # the conversion itself needs no GPU
    assert any(isinstance(m, torch.nn.SyncBatchNorm) and hasattr(m, "act") for m in on_gpu.modules())


def test_killed_at_random_steps_and_resumed_to_the_bit(crops: Path, tmp_path: Path, small_json: Path) -> None:
    flags = ("--epochs", "3", "--save-every", "3", "--log-every", "1", "--cache-teacher", "0", "--ema", "0.9")
    code, _, err = finish(start(crops, tmp_path / "whole", small_json, *flags))
    assert code == 0, err
    steps = len(read_lines(tmp_path / "whole" / "generation-0" / loop.STEPS))
    assert steps == 36
    draw = random.Random(7)
    for kill in range(3):
        process = start(crops, tmp_path / "killed", small_json, *flags)
        already = len(read_lines(tmp_path / "killed" / "generation-0" / loop.STEPS))
        wait_for_steps(tmp_path / "killed", min(already + draw.randrange(1, 12), steps - 1), process)
        if kill == 0:  # the same run started twice, and not read before the lock is tried
            process.send_signal(signal.SIGSTOP)
            code, _, err = finish(start(crops, tmp_path / "killed", small_json, *flags, "--lr", "0.5"))
            assert (code, err.count("\n")) == (2, 1)
            assert f"killed: another process ({process.pid} on " in err
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
    code, out, err = finish(start(crops, tmp_path / "killed", small_json, *flags))
    assert code == 0, err
    assert "best weights in" in out
    same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_saves_and_exits(crops: Path, tmp_path: Path, small_json: Path) -> None:
    flags = ("--epochs", "2", "--save-every", "0", "--log-every", "1")
    process = start(crops, tmp_path / "stopped", small_json, *flags)
    wait_for_steps(tmp_path / "stopped", 4, process)
    process.terminate()
    code, _, err = finish(process)
    assert code == 143
    assert len(err.strip().splitlines()) == 1
    assert "SIGTERM: saved at generation 0, epoch 1, step" in err
    place = load_state(tmp_path / "stopped" / "generation-0" / loop.STATE)["place"]
    assert place["step"] >= 4
    for run in ("stopped", "whole"):
        code, _, err = finish(start(crops, tmp_path / run, small_json, *flags))
        assert code == 0, err
    same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("flags", [(), ("--accumulate", "2")], ids=["whole", "in parts"])
def test_two_processes_train_as_one(crops: Path, tmp_path: Path, small_json: Path, flags: tuple[str, ...]) -> None:
    """The same global batches in the same parts, BN statistics, losses, gradients and metrics, to float tolerance."""
    # a small step: Adam turns the rounding of a gradient near zero into a whole one
    flags = (*flags, "--epochs", "1", "--log-every", "1", "--lr", "1e-5")
    two = ("--standalone", "--nproc-per-node", "2")
    for run, how in (("one", ()), ("two", two)):
        code, out, err = finish(start(crops, tmp_path / run, small_json, *flags, torchrun=how))
        assert code == 0, err
        assert out.count("best weights in") == 1, "one process speaks"
        assert (tmp_path / run / "report.html").is_file()
    a, b = (read_lines(tmp_path / run / "generation-0" / loop.STEPS) for run in ("one", "two"))
    assert len(a) == len(b) == 12
    for name in ("loss", "ce", "center", "grad_norm"):
        near = 2e-3 if name == "grad_norm" else 1e-3  # a tie in a max-pool may fall the other way, in one step
        np.testing.assert_allclose([row[name] for row in b], [row[name] for row in a], rtol=near, err_msg=name)
    one, two_ = (np.load(tmp_path / run / "generation-0" / loop.VALIDATION) for run in ("one", "two"))
    assert np.array_equal(one["labels"], two_["labels"])
    np.testing.assert_allclose(two_["scores"], one["scores"], atol=1e-4)
    states = [load_state(tmp_path / run / "generation-0" / loop.STATE) for run in ("one", "two")]
    for name, tensor in states[0]["model"].items():  # weights by the path they took, statistics by value
        torch.testing.assert_close(states[1]["model"][name], tensor, rtol=1e-3, atol=2 * 12 * 1e-5)
    centers = [max(state["optimizer"]["state"].items())[1]["exp_avg"] for state in states]  # the mean gradient
    torch.testing.assert_close(*centers, rtol=1e-3, atol=1e-5)


def test_two_processes_train_a_table(crops: Path, tmp_path: Path, small_json: Path) -> None:
    """Both train each variant, one measures and speaks."""
    words = ["ablate", "moe", "--data", crops, "--out", tmp_path, "--config", small_json, "--epochs", "1", *FLAGS]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dtn_fast"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(w) for w in (*two, *words)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("frame level, percent") == 1
    rows = json.loads((tmp_path / "moe.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["Vanilla MoE", "Ours"]


def test_an_elastic_restart_goes_on(crops: Path, tmp_path: Path, small_json: Path) -> None:
    flags = ("--epochs", "2", "--save-every", "2", "--log-every", "1")
    run = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    process = start(crops, tmp_path / "run", small_json, *flags, torchrun=run)
    wait_for_steps(tmp_path / "run", 5, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    victim = int(children.stdout.split()[-1])
    os.kill(victim, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert [row["epoch"] for row in read_lines(tmp_path / "run" / "generation-0" / loop.METRICS)] == [0, 1]
    steps = [(row["epoch"], row["step"]) for row in read_lines(tmp_path / "run" / "generation-0" / loop.STEPS)]
    assert steps == sorted(set(steps)), "what was done again is recorded once"


def test_a_signal_to_one_process_stops_all(crops: Path, tmp_path: Path, small_json: Path) -> None:
    two = ("--standalone", "--nproc-per-node", "2")
    process = start(crops, tmp_path / "run", small_json, "--epochs", "2", "--log-every", "1", torchrun=two)
    wait_for_steps(tmp_path / "run", 3, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGTERM)
    code, _, err = finish(process)
    assert code != 0
    assert "SIGTERM: saved at generation 0, epoch 1, step" in err
    assert load_state(tmp_path / "run" / "generation-0" / loop.STATE)["place"]["step"] >= 3


# ------------------------------------------------------------------------------------------ in one process


def drive(out: Path, dataset: CropDataset, stop: Callable[[], int] = lambda: 0, recipe=RECIPE, **kwargs) -> list:
    torch.manual_seed(1)
    return list(fit(DTN(SMALL), dataset, recipe, out, stop=stop, **kwargs))


@pytest.mark.parametrize("lag", [0, 3])
def test_stopping_at_every_kind_of_step(
    dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """Also when values are read some steps late, as on a GPU."""
    readback = loop.Readback
    monkeypatch.setattr(loop, "Readback", lambda _lag: readback(lag))
    recipe = changed(RECIPE, epochs=2)
    whole = [e for e in drive(tmp_path / "whole", dataset, recipe=recipe) if isinstance(e, Step)]
    pauses = 0
    while True:
        # from the eighth step on, sometimes an epoch's last
        countdown = itertools.chain([0] * 7, itertools.repeat(signal.SIGTERM))
        try:
            last = drive(tmp_path / "often", dataset, countdown.__next__, recipe)[-1]
            break
        except Stopped as stopped:
            pauses += stopped.exit_code == 143
    assert pauses == (3 if not lag else 2)
    assert isinstance(last, Epoch)
    one, two = (load_state(tmp_path / run / loop.STATE) for run in ("whole", "often"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert [e.step for e in whole] == [*range(12)] * 2
    assert read_lines(tmp_path / "whole" / loop.STEPS) == read_lines(tmp_path / "often" / loop.STEPS)


def test_soft_labels_are_computed_once_and_survive_a_pause(dataset: CropDataset, tmp_path: Path) -> None:
    teacher = DTN(SMALL).eval()
    recipe = changed(RECIPE, epochs=3, cache_teacher=1, augment="light")
    asked: list[int] = []
    real = loop.TrainStep._answers

    def answers(self, images):
        asked.append(len(images))
        return real(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainStep, "_answers", answers)
        drive(tmp_path / "whole", dataset, recipe=recipe, teacher=teacher)
        once = len(asked)
        assert 12 <= once < 24, "an epoch's crops, and those that the first epoch left out"
        stops = iter([0] * 15 + [15])
        with pytest.raises(Stopped):
            drive(tmp_path / "paused", dataset, lambda: next(stops), recipe, teacher=teacher)
        drive(tmp_path / "paused", dataset, recipe=recipe, teacher=teacher)
    assert len(asked) == 2 * once
    new = [Loader(dataset, dataset.select("train"), 4, (0,), 0, views=v).epoch(e) for v in (0, 2) for e in (0, 1, 2)]
    seen = [{(row, seed) for b in epoch for row, seed in zip(b.rows, b.seeds, strict=True)} for epoch in new]
    assert not seen[0] & seen[1], "without a cache every view is new"
    assert len(seen[3] | seen[4] | seen[5]) <= 2 * len(dataset.select("train"))
    known = seen[3] | seen[4] | seen[5]
    assert len(known) > len(dataset.select("train"))
    assert len({seed for _, seed in known}) == len(known), "every view of every crop has a seed of its own"
    other = Loader(dataset, dataset.select("train"), 4, (1,), 0, views=2).epoch(0)
    assert not known & {(row, seed) for b in other for row, seed in zip(b.rows, b.seeds, strict=True)}
    one, two = (load_state(tmp_path / run / loop.STATE) for run in ("whole", "paused"))
    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(UsageError, match="blends are new in every epoch"):
        changed(RECIPE, cache_teacher=2, self_blend=True)


def test_soft_labels_belong_to_row_and_view() -> None:
    soft = SoftLabels(np.array([7, 3, 9]), 2, 2, torch.device("cpu"))
    batch = lambda rows, views: Batch(None, None, np.array(rows), None, np.array(views))
    assert soft.get(batch([3, 9], [0, 1])) is None
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    soft.put(batch([3, 9], [0, 1]), values)
    assert torch.equal(soft.get(batch([9, 3], [1, 0])), values.flip(0))
    assert soft.get(batch([3, 9], [1, 1])) is None
    other = SoftLabels(np.array([3, 7, 9]), 2, 2, torch.device("cpu"))
    other.load(soft.table)
    assert torch.equal(other.get(batch([9], [1])), values[1:])
    assert other.get(batch([9], [0])) is None


def test_a_full_disk_leaves_the_last_state(
    dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(RECIPE, epochs=3)
    events = fit(DTN(SMALL), dataset, recipe, tmp_path, execution=Execution(save_every=5))
    for event in events:
        if isinstance(event, Epoch):
            break
    before = (tmp_path / loop.STATE).read_bytes()

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        list(events)
    assert caught.value.filename == str(tmp_path / loop.STATE)
    assert (tmp_path / loop.STATE).read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    assert drive(tmp_path, dataset, recipe=recipe)[-1].epoch == 2


def test_states_of_other_runs_are_refused(dataset: CropDataset, tmp_path: Path) -> None:
    drive(tmp_path, dataset, recipe=changed(RECIPE, epochs=1))
    with pytest.raises(UsageError, match="made by another version or kind of run"):
        drive(tmp_path, dataset, recipe=changed(RECIPE, epochs=2, ema=0.5))
    state = load_state(tmp_path / loop.STATE)
    damages: list[dict] = [{"place": {"nonsense": 1}}, {"model": {}}, {"optimizer": {}}]
    for damage in damages:
        torch.save({**state, **damage}, tmp_path / loop.STATE)
        with pytest.raises(UsageError, match=r"last\.pt"):
            drive(tmp_path, dataset, recipe=changed(RECIPE, epochs=2))


def test_batches_are_shared_out_evenly() -> None:
    assert batch_of_rank(changed(RECIPE, batch_size=24, accumulate=3), 2) == 12
    with pytest.raises(UsageError, match="by 1 processes times --accumulate 3; make it a multiple of 3"):
        batch_of_rank(changed(RECIPE, accumulate=3), 1)
    with pytest.raises(UsageError, match="--batch-size 8 cannot be shared by 3 processes times --accumulate 1"):
        batch_of_rank(RECIPE, 3)
    whole = np.arange(11)
    assert np.array_equal(interleave([whole[rank::4] for rank in range(4)]), whole)
