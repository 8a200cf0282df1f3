"""Timing on a GPU, with stand-ins for it: replays, rotation, backward passes, what torch.compile did, the clocks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtn_fast.bench import bench_kernels, bench_train, machine, measure, results
from dtn_fast.bench import run as runner
from dtn_fast.bench.machine import Clocks, Machine
from dtn_fast.bench.measure import Case, Compiled, Timed, backward_passes, compilations, forward_passes, rotation
from dtn_fast.errors import DtnError

H200 = Machine("H200", 790e12, 4.3e12, "bfloat16")


class Event:
    """Every measured interval takes 12 ms."""

    def __init__(self, enable_timing: bool) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Event) -> float:
        return 12.0


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A stand-in GPU; what is captured and replayed, in order, with the captures' pools."""
    seen: list[tuple[str, Any]] = []

    def capture(call: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
        number = sum(kind == "capture" for kind, _ in seen)
        seen.append(("capture", pool))
        result = call()
        return lambda: seen.append(("replay", number)), result

    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "warm_up", lambda call: call())
    nothing = lambda *_: None
    stand_ins: dict[str, Any] = dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache"), nothing)
    stand_ins |= {"is_available": lambda: True, "memory_allocated": lambda: 0, "max_memory_allocated": lambda: 100}
    stand_ins |= {"graph_pool_handle": lambda: "pool", "Event": Event}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def inputs(count: int) -> list[list[Tensor]]:
    return [[torch.full((2,), float(n), requires_grad=True), torch.ones(2)] for n in range(count)]


def test_inputs_rotate_over_more_than_the_cache(captures: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROTATED", 1000.0)
    sets = rotation(lambda: [torch.zeros(10), torch.zeros(15)])  # 100 bytes
    assert len(sets) == 11
    assert len({t.data_ptr() for tensors in sets for t in tensors}) == 22
    assert len(rotation(lambda: [torch.zeros(1000)])) == 1, "fills the cache by itself"


def test_ten_calls_and_more_are_one_replay_and_take_turns(captures: list) -> None:
    order: list[float] = []
    call = lambda x, y: order.append(float(x[0])) or x * y
    timed = forward_passes(call, inputs(3))
    assert captures == [("capture", None)]
    assert order == [0, *[0, 1, 2] * 4], "a warm-up, then every set in turn"
    assert timed.calls == 12
    order.clear()
    case = Case("kernels", "case", {"ours": timed, "single": Timed(lambda: None, 1)}, "ours", "single")
    ours, single = measure.measure(case, 3)
    assert not order, "replays launch nothing"
    assert (ours.median, single.median, ours.ratio) == (0.001, 0.012, 12)


def test_backward_passes_run_on_what_their_forward_passes_left(captures: list, monkeypatch: pytest.MonkeyPatch) -> None:
    grads: list[Tensor] = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: grads.append(real(*a, **k)[0]))
    timed = backward_passes(lambda x, y: (x * x * y).sum(), inputs(2))
    assert captures == [("capture", "pool"), ("capture", "pool")], "forward and backward, in one pool of memory"
    assert timed.calls == measure.CALLS
    assert len(grads) == 1 + measure.CALLS
    slopes = [float(g[0]) for g in grads[1:]]
    assert slopes[0::2] == [0.0] * 5, "the sets take turns"
    assert len({value for value in slopes[1::2] if value}) == 1
    measure.measure(Case("kernels", "case", {"ours": timed}, "ours", "ours"), 2)
    assert captures[2:] == [("replay", 0), ("replay", 1)] * 3, "each with its forward passes before it"


def test_backward_passes_that_do_not_fit_in_memory_are_fewer(captures: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for held, passes in ((1000.0, 10), (350.0, 3), (50.0, 1)):  # a pass holds 100
        monkeypatch.setattr(measure, "HELD", held)
        assert backward_passes(lambda x, y: x * y, inputs(1)).calls == passes


def test_what_cannot_be_captured_says_so_in_its_row(captures: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Callable[[], Any], pool: Any = None) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "capture", refuse)
    for make in (forward_passes, backward_passes):
        order: list[int] = []
        timed = make(lambda x, y, order=order: order.append(1) or x * y, inputs(1))
        assert timed.how == ", launched one by one"
        order.clear()
        timed()
        assert len(order) == timed.calls == measure.CALLS


def test_rows_name_what_was_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = forward_passes
    monkeypatch.setattr(bench_kernels, "forward_passes",
                        lambda call, sets: Timed(real(call, sets).run, 1, how=", launched one by one"))  # fmt: skip
    forward, backward = list(bench_kernels.gate_cases(1, torch.float32, H200))[:2]
    assert list(forward.contenders) == ["dtn_fast, launched one by one", "eager reference, launched one by one"]
    assert {forward.ours, forward.baseline, *forward.errors} <= set(forward.contenders)
    assert list(backward.contenders) == ["dtn_fast", "eager reference"]


def test_own_kernels_are_timed_and_never_what_they_fall_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_kernels._own(measure.measure).keywords["path"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench_kernels._own(measure.measure).keywords["path"] == "triton"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert bench_kernels._name(torch.float32) == "float32 (TF32)"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert bench_kernels._name(torch.float32) == "float32"


def test_the_models_shapes_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every operator, in bfloat16, before any other shape or dtype: the budget may end."""
    seen: list[tuple] = []
    for name in ("attention_cases", "gate_cases", "connection_cases", "bn_cases"):
        monkeypatch.setattr(bench_kernels, name, lambda *a, name=name: seen.append((name, *a[:-1])) or iter(()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(bench_kernels.cases()) == []
    first = {name: next(entry for entry in seen if entry[0] == name)[1] for name, *_ in seen}
    assert set(first.values()) == {256}
    assert {entry[0] for entry in seen[:4]} == set(first)
    dtypes = [entry[-1] for entry in seen]
    assert dtypes == sorted(dtypes, key=[torch.bfloat16, torch.float16, torch.float32].index)


def test_an_operator_that_fails_leaves_the_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[Case]:
        raise RuntimeError("CUDA error: misaligned address\nand more")
        yield

    monkeypatch.setattr(bench_kernels, "gate_cases", fails)
    seen: list[str] = []
    with pytest.raises(DtnError, match=r"misaligned address; CUDA error: misaligned address$"):
        seen.extend(case.title for case in bench_kernels.cases(None, quick=True))
    assert any(title.startswith("MAS attention") for title in seen)
    assert any(title.startswith("BN + ReLU") for title in seen)


PAST_THE_LIMIT = """
import torch
from dtn_fast.bench.measure import compilations
compiled = torch.compile(torch.sin, backend="eager", dynamic=False)
with compilations({}, "it"):
    for size in range(20):
        compiled(torch.ones(size))
"""


def test_a_rival_past_torchs_limit_of_recompilations_is_an_error() -> None:
    """Where it would go on eagerly.  In a process of its own, since torch keeps what it will not compile again."""
    run = subprocess.run([sys.executable, "-c", PAST_THE_LIMIT], capture_output=True, text=True)
    assert run.returncode != 0
    assert "RuntimeError: compiled again and again, past torch.compile's limit" in run.stderr


def test_breaks_and_recompilations_of_a_rival_are_counted() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    def count(call: Callable[..., Any], *arguments: Any) -> Compiled:
        made: dict[str, Compiled] = {}
        torch.compiler.reset()
        compiled = torch.compile(call, backend="eager", dynamic=False)
        with compilations(made, "it"):
            for argument in arguments:
                compiled(argument)
        return made["it"]

    assert count(torch.sin, torch.ones(2), torch.ones(2)) == (0, 0)
    assert count(broken, torch.ones(2)) == (1, 0)
    assert count(torch.sin, torch.ones(2), torch.ones(3), torch.ones(4)) == (0, 2)
    made: dict[str, Compiled] = {}
    with compilations(made, "it"):
        torch.ones(2)
    assert not made, "nothing was compiled"
    torch.compiler.reset()
    case = Case("kernels", "case", {"a": lambda: 1, "b": lambda: 2}, "a", "b", compiled={"b": Compiled(3, 2)})
    ours, rival = measure.measure(case, 1)
    assert (ours.breaks, rival.breaks, rival.recompiled) == (None, 3, 2)
    assert "3 graph breaks, 2 recompilations" in next(measure.lines([rival]))


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: str) -> None:
    """A stand-in for nvidia-smi that prints samples."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows) + f"touch {folder}/done; exec sleep 60")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_clocks_and_power_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Clocks() as clocks:
        assert str(clocks) == "", "no GPU"
    for reason, text in (("0x0000000000000001", ""), ("0x0000000000000004", ", slowed down (event reasons 0x4)")):
        busy = f"97, 1755, 651.20, 61, {reason}"
        smi(tmp_path, monkeypatch, "0, 345, 75.10, 30, 0x1", "99, 1980, 480.00, 55, 0x0", busy)
        (tmp_path / "done").unlink(missing_ok=True)
        with Clocks() as clocks:
            while not (tmp_path / "done").exists():
                pass
            assert str(clocks) == "SM 1755 to 1980 MHz, at most 651 W and 61 C" + text
        assert clocks.process.returncode is not None, "ended with the suite"
    smi(tmp_path, monkeypatch, "99, [N/A], [N/A], 61, 0x0")
    (tmp_path / "done").unlink()
    with Clocks() as clocks:
        while not (tmp_path / "done").exists():
            pass
        assert str(clocks) == "unreadable"


def test_reading_the_clocks_disturbs_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample may come at any moment; nvidia-smi writes through the same open file."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nwhile :; do i=$((i+1)); echo "97, 1755, $i, 61, 0x1"; done')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with Clocks() as clocks:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            str(clocks)
        clocks.process.kill()
        clocks.process.wait()
        text = os.pread(clocks.file.fileno(), 2**30, 0).decode()
    numbers = [line.split(", ")[2] for line in text.splitlines()[:-1]]
    assert len(numbers) > 10
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]


def test_rows_of_one_title_share_a_baseline_and_each_is_freed_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Work:
        def __init__(self, loops: int) -> None:
            self.loops, self.itself = loops, self  # a circle, as modules have

        def __call__(self) -> int:
            return sum(range(self.loops))

    def cases(*_: object) -> Iterator[Case]:
        for name, loops in (("base", 300_000), ("fast", 30_000), ("slow", 3_000_000)):
            work = Work(loops)
            gone = weakref.ref(work)
            contenders: dict[str, Any] = {name: work}
            yield Case("train", "title", contenders, "fast", name, rounds=3)
            del work
            contenders.clear()
            gc.collect()
            assert gone() is None, f"{name} is held while the next is made"

    monkeypatch.setattr(bench_train, "cases", cases)
    path = runner.run_suite("train", tmp_path, H200, quick=False, budget=60)
    assert path is not None
    base, fast, slow = results.load(path)["suites"]["train"]["rows"]
    assert base.ratio == 1
    assert fast.ratio == pytest.approx(base.median / fast.median, rel=1e-3)
    assert slow.ratio == pytest.approx(base.median / slow.median, rel=1e-3)


def test_on_a_gpu_each_technique_is_a_case_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = types.SimpleNamespace(is_available=lambda: True, empty_cache=lambda: None,
                                 max_memory_allocated=lambda: 2**30, reset_peak_memory_stats=lambda: None)  # fmt: skip
    stand_in = types.SimpleNamespace(**{**vars(torch), "cuda": cuda, "device": lambda name: torch.device("cpu")})
    monkeypatch.setattr(bench_train, "torch", stand_in)
    seen = []
    for case in bench_train.train_cases("tiny", 2, False, None, 4):
        (name,) = case.contenders
        assert case.baseline == name
        assert case.errors[name] < 0.1
        seen.append(name)
    names = [row.name for row in bench_train.techniques(torch.device("cpu"), dsd=False)]
    assert seen == names
    assert case.ours == names[-1]
    assert "peak memory of fused Adam: 1,024 MiB" in case.notes
    assert not case.contenders, "freed"


def test_ceilings_on_a_gpu_are_of_ten_calls(captures: list) -> None:
    made: list[int] = []
    assert machine.best_seconds(lambda: made.append(1), torch.device("cuda"), rounds=2) == pytest.approx(0.0012)
    assert len(made) == 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_contender_is_captured_on_a_real_gpu(dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    shapes = (bench_kernels.gate_cases(2, dtype, H200), bench_kernels.attention_cases(2, 64, dtype, H200),
              bench_kernels.bn_cases(2, 32, 16, True, dtype, H200))  # fmt: skip
    for operator in shapes:
        titles = []
        for case in operator:
            titles.append(case.title)
            assert not [name for name in case.contenders if "one by one" in name], case.title
            # Inductor of torch 2.11 writes the noise's 32-bit multipliers as int32, and Triton refuses them
            noisy = "noise" in case.title and "noise 0.0" not in case.title
            assert not [note for note in case.notes if "compile" in note and not noisy], case.notes
            rows = {row.contender: row for row in measure.measure(case, 3)}
            for name, timed in case.contenders.items():
                assert timed.calls >= measure.CALLS
                assert 0 < rows[name].median < 0.1
                assert rows[name].breaks in (None, 0)
        assert any("cold L2" in title for title in titles)
        assert any("backward" in title for title in titles)
