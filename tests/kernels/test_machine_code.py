"""Counts from machine code, against the operators' own arithmetic and the committed predictions."""

from __future__ import annotations

import json

import pytest
import torch
import triton

from dtn_fast.bench import results
from dtn_fast.bench.roofline import attention_work, gate_work
from dtn_fast.kernels import compile_check, machine_code
from dtn_fast.kernels.launch import INTERPRET

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels cannot be compiled")


@pytest.fixture(scope="module", params=[80, 90, 100])
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


def test_products_are_the_operators(arch: int) -> None:
    """Floating-point operations of all products: attention's 4 and 10 B H N^2 D; the gate's forward, and in the
    backward one product with all experts' weights for dx and one for dW1."""
    with compile_check.target(arch):
        launches = compile_check.mas_launches(64, 64, HALF, 256)
        for launch, backward in zip(launches, (False, True), strict=True):
            flops = machine_code.count(launch.compile(), launch).flops * launch.grid[0]
            assert flops == pytest.approx(attention_work(256, 64, 8, 64, 2, backward)[0], rel=1e-6)
        forward = gate_work(256 * 64, 2, 128, 512, 2, False)[0]
        for launch in compile_check.moe_launches(2, 128, 512, 0.1, HALF, 256):
            programs = launch.grid[0] * (launch.grid[1] * launch.grid[2] if len(launch.grid) > 1 else 1)
            flops = machine_code.count(launch.compile(), launch).flops * programs
            assert flops == pytest.approx(forward, rel=0.02), launch.name


def test_a_loop_counts_by_its_trips(arch: int) -> None:
    """bn_stats of twice the rows in as many programs executes twice its loop."""
    counts = []
    for batch in (64, 128, 256):
        with compile_check.target(arch):
            launch = compile_check.bn_launches(512, 16, False, HALF, batch)[0]
            counts.append((launch.constants["STEPS"], machine_code.count(launch.compile(), launch)))
    (_, a), (_, b), (_, c) = counts
    assert [steps for steps, _ in counts] == [4 * counts[0][0] // 4 * k for k in (1, 2, 4)]
    assert c.instructions - b.instructions == pytest.approx(2 * (b.instructions - a.instructions), rel=0.1)
    assert c.loaded == pytest.approx(2 * b.loaded, rel=0.1)


def test_nothing_is_faster_than_memory_and_the_limit_is_the_slowest(arch: int) -> None:
    found = machine_code.predictions((arch,))
    assert {operator for operator, _ in found} >= {"MAS attention", "expert gate", "local connection"}
    for operator, one in found:
        assert one.seconds >= one.floor > 0, operator
        assert (one.limit == "memory") == (one.seconds == one.floor)
    gate = {one.kernel: one for operator, one in found if operator == "expert gate"}
    assert gate["moe_forward"].limit != "memory"  # its noise and its weights from the cache take longer


def test_the_committed_predictions_are_of_this_code(arch: int) -> None:
    stored = json.loads((results.FOLDER / results.STRUCTURE).read_text(encoding="utf-8"))
    if stored["triton"] != triton.__version__:
        pytest.skip(f"the committed report is of Triton {stored['triton']}")
    now = [{"operator": operator, **one._asdict()} for operator, one in machine_code.predictions((arch,))]
    assert now == [row for row in stored["predicted"] if row["arch"] == arch], "run dtn-fast bench structure tables"


def test_loops_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with compile_check.target(90):
        launch = compile_check.moe_launches(2, 128, 512, 0.1, HALF, 256)[0]
        compiled = launch.compile()
        monkeypatch.setattr(machine_code, "_trips", lambda ttir, launch: ([], 0.0))
        with pytest.raises(ValueError, match=r"moe_forward: . loops in the machine code, 0 in Triton's"):
            machine_code.count(compiled, launch)
