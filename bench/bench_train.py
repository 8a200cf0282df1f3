"""Benchmark of the training step: techniques are switched on one after another, and the loss is compared at each.

Run: dtn-fast bench train
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dtn_fast import DTN, DTNConfig
from dtn_fast.bench.bench_model import half
from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import Case, Compiled, compilations
from dtn_fast.bench.roofline import PASSES, inference, training_lower_bound
from dtn_fast.device import PRECISIONS
from dtn_fast.model.levt import ScaledAttention
from dtn_fast.train.config import Execution, Recipe
from dtn_fast.train.step import WARM_UP, Outcome, TrainStep

SUITE = "train"
STEPS = 20
"""Steps over which a technique's losses are compared with the baseline's."""
PLAIN = Execution(
    channels_last=False,
    compile="off",
    cuda_graph="off",
    norm_kernels=False,
    fused_adam=False,
    fold_teacher=False,
    teacher_stream=False,
)
"""Execution with every technique off.  TF32 and cuDNN's search stay on: they are settings of the process, which all
rows share."""


class Technique(NamedTuple):
    """One row of the waterfall; each adds to the one before."""

    name: str
    execution: Execution
    autocast: bool = False
    packed: bool = False
    """Whether to use one QKV product and the fused attention operator, not three products and materialised scores."""
    cached: bool = False
    """Whether the teacher's logits are cached, as ``--cache-teacher`` does from the second use of a view on."""


class SeparateAttention(nn.Module):
    """The paper's attention as usually written: three products, scores in memory, then the head scales."""

    def __init__(self, source: ScaledAttention) -> None:
        super().__init__()
        self.num_heads, self.out, self.head_scale = source.num_heads, source.out, source.head_scale
        self.q, self.k, self.v = (nn.Linear(w.shape[1], w.shape[0], bias=False) for w in source.qkv.weight.chunk(3))
        for layer, weight in zip((self.q, self.k, self.v), source.qkv.weight.chunk(3), strict=True):
            layer.weight.data.copy_(weight.data)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (p(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v * self.head_scale.sigmoid()[:, None, None]
        return self.out(mixed.transpose(1, 2).flatten(2))


def techniques(device: torch.device, dsd: bool) -> list[Technique]:
    """Rows of the waterfall on ``device``, the baseline first."""
    cuda, dtype = device.type == "cuda", half(device)
    short = next((name for name, known in PRECISIONS.items() if known == dtype), "")
    rows = [Technique("eager NCHW, separate QKV, scores in memory", PLAIN)]
    for wanted, name, switch in (
        (dtype is not None, f"{short} autocast", {"autocast": True}),
        (True, "channels_last", {"channels_last": True}),
        (True, "packed QKV, fused attention", {"packed": True}),
        (cuda, "BN and local connection kernels", {"norm_kernels": True}),
        (True, "fused Adam", {"fused_adam": True}),
        (dsd, "folded teacher", {"fold_teacher": True}),
        (dsd and cuda, "teacher on its own stream", {"teacher_stream": True}),
        (cuda, "torch.compile", {"compile": "on"}),
        (cuda, "CUDA graph", {"cuda_graph": "on"}),
        (dsd, "cached soft labels", {"cached": True}),
    ):
        if wanted:
            row = rows[-1]._replace(name=f"+ {name}")
            own = switch.keys() <= set(Technique._fields)
            rows.append(row._replace(**(switch if own else {"execution": replace(row.execution, **switch)})))
    return rows


def stepper(
    model: DTN, teacher: DTN | None, technique: Technique, crops: Tensor, labels: Tensor, soft: Tensor | None = None
) -> Callable[[], Outcome]:
    """A function that runs one training step on copies of ``model`` and ``teacher`` without waiting for the device."""
    model, teacher = copy.deepcopy(model).train(), copy.deepcopy(teacher)
    for network in filter(None, (model, teacher)):
        for block in [] if technique.packed else network.blocks:
            block.attention = SeparateAttention(block.attention)
    recipe = Recipe(precision="auto" if technique.autocast else "fp32", augment="none")
    step = TrainStep(model, recipe, technique.execution, crops.device, teacher)
    return lambda: step(crops, labels, soft)


def train_cases(preset: str, batch: int, dsd: bool, machine: Machine | None, steps: int) -> Iterator[Case]:
    """The waterfall; ``errors``: largest difference of the loss from the baseline's over ``steps`` steps.

    On a CPU it is one case, measured in turns.  On a GPU each row is a case of its own under one title: the float32
    rows and the graphs' memory would not fit beside each other, and a run that is cut off has the rows before.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = torch.cuda.is_available()
    config = DTNConfig.preset(preset, noise_std=0.0)  # no noise, because each technique would draw its own
    torch.manual_seed(0)
    model, teacher = DTN(config), DTN(config).eval().requires_grad_(False) if dsd else None
    side = config.image_size
    crops = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8).to(device)
    labels = torch.arange(batch, device=device) % 2
    errors: dict[str, float] = {}
    calls: dict[str, Callable[[], Outcome]] = {}
    compiled: dict[str, Compiled] = {}
    rows = techniques(device, dsd)
    baseline, ours = rows[0].name, [row for row in rows if not row.cached][-1].name
    work = (3 + dsd) * sum(p.flops for p in inference(config, batch))
    bound = training_lower_bound(config, batch, machine, PASSES["everything fused"], dsd) if machine else 0.0
    title = f"DTN {preset} {side}x{side}, batch {batch}{', DSD' if dsd else ''}"
    notes: list[str] = []
    soft, expected = None, torch.empty(0)
    for row in rows:
        if cuda:
            torch.compiler.reset()  # otherwise a new batch size would be compiled with dynamic shapes
            torch.cuda.empty_cache()  # a capture cannot free what earlier rows left cached
        call = stepper(model, teacher, row, crops, labels, soft if row.cached else None)
        outcomes = []
        with compilations(compiled, row.name):
            for number in range(steps):
                if cuda and number == WARM_UP:  # after cuDNN's search, before the graph's allocation
                    torch.cuda.reset_peak_memory_stats()
                outcomes.append(call())
        losses, soft = torch.stack([o.values[0] for o in outcomes]), outcomes[-1].soft
        if row is rows[0]:
            expected = losses
            notes.append(
                f"error: largest difference of the loss over the first {steps} steps; the loss starts at "
                f"{losses[0]:.2f}"
            )
        if row.cached:
            notes.append(f"{row.name[2:]}: this row skips the teacher; its TFLOP/s and lower bound include the teacher")
        if cuda:
            peak = torch.cuda.max_memory_allocated() / 2**20
            notes.append(f"peak memory of {row.name.removeprefix('+ ')}: {peak:,.0f} MiB")
        errors[row.name], calls[row.name] = float((losses - expected).abs().max()), call
        del call, outcomes, losses
        if cuda or row is rows[-1]:
            first = row.name if cuda else baseline
            yield Case(SUITE, title, calls, ours, first, batch, work, 0.0, bound, errors, tuple(notes), compiled, 7)
            calls.clear()  # measured: free its memory even if the case is still held
            gc.collect()


def cases(machine: Machine | None = None, quick: bool = False) -> Iterator[Case]:
    """Cases: batches 256 and 32 on a GPU; on a CPU the tiny preset, and the paper preset at batch 2."""
    gpu = torch.cuda.is_available()
    shapes = [("paper", 256), ("paper", 32)] if gpu else [("tiny", 8)] if quick else [("tiny", 32), ("paper", 2)]
    for dsd in (False, True):
        for preset, batch in shapes:
            if dsd and (quick or (not gpu and preset == "paper")):
                continue
            # with two images, BN's statistics make later losses chaotic
            steps = WARM_UP + 2 if quick else STEPS if batch > 8 else 1
            yield from train_cases(preset, batch, dsd, machine, steps)


@pytest.mark.parametrize("dsd", [False, True])
def bench_step(compare, dsd: bool) -> None:
    for case in train_cases("tiny", 16, dsd, None, STEPS):
        compare(case)
