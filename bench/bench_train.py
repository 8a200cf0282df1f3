"""A training step with one technique added after another, the loss compared over several steps.

Run: dtn-fast bench train
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dtn_fast import DTN, DTNConfig
from dtn_fast.bench.bench_model import half
from dtn_fast.bench.measure import Case
from dtn_fast.bench.roofline import PASSES, Machine, inference, training_floor
from dtn_fast.fold import fold
from dtn_fast.levt import ScaledAttention
from dtn_fast.losses import dsd_loss, initial_centers, initial_loss

SUITE = "train"
STEPS = 20
"""Steps over which a technique's losses are compared with the baseline's."""


class Technique(NamedTuple):
    """One row of the waterfall; each adds to the one before."""

    name: str
    autocast: bool = False
    channels_last: bool = False
    packed: bool = False
    """One QKV product and the fused attention operator, instead of three and materialised scores."""
    fused_adam: bool = False
    compiled: bool = False
    folded_teacher: bool = False


class SeparateAttention(nn.Module):
    """The paper's recipe as usually written: three products, scores in memory, then the gate."""

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
    """The rows for a machine, the baseline first."""
    rows = [Technique("eager NCHW, separate QKV, scores in memory")]
    flags: dict[str, Any] = {}
    steps = [("autocast", f"+ {half(device)} autocast".replace("torch.", ""))] if half(device) is not None else []
    steps += [
        ("channels_last", "+ channels_last"),
        ("packed", "+ packed QKV, fused attention"),
        ("fused_adam", "+ fused Adam"),
    ]
    steps += [("folded_teacher", "+ folded teacher")] if dsd else []
    steps += [("compiled", "+ torch.compile")] if device.type == "cuda" else []
    for flag, name in steps:
        flags[flag] = True
        rows.append(Technique(name, **flags))
    return rows


def stepper(
    model: DTN, teacher: DTN | None, technique: Technique, images: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """A call that does one training step on ``images`` and returns the loss, not waited for."""
    device = images.device
    model, dtype = copy.deepcopy(model).to(device).train(), half(device)
    if not technique.packed:
        for block in model.blocks:
            block.attention = SeparateAttention(block.attention).to(device)
    if teacher is not None:
        teacher = fold(teacher.to(device)) if technique.folded_teacher else copy.deepcopy(teacher).to(device).eval()
    if technique.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
        teacher = teacher.to(memory_format=torch.channels_last) if teacher is not None else None
    centers = nn.Parameter(initial_centers().to(device))
    how: dict[str, Any] = {"fused": True} if technique.fused_adam else {"foreach": False}
    optimizer = torch.optim.Adam([*model.parameters(), centers], lr=1e-4, weight_decay=1e-4, **how)
    run: Any = torch.compile(model) if technique.compiled else model

    def step() -> Tensor:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=technique.autocast and dtype is not None):
            logits = run(images).float()
            if teacher is None:
                loss = initial_loss(logits, labels, centers)["loss"]
            else:
                with torch.no_grad():
                    soft = teacher(images).float()
                loss = dsd_loss(logits, labels, soft, centers)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def train_case(preset: str, batch: int, dsd: bool, machine: Machine | None, steps: int = STEPS) -> Case:
    """The waterfall; ``errors`` are the largest difference of the loss from the baseline's over ``steps`` steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = DTNConfig.preset(preset, noise_std=0.0)  # noise would be drawn anew by each technique
    torch.manual_seed(0)
    model, teacher = DTN(config), DTN(config).eval().requires_grad_(False) if dsd else None
    side = config.image_size
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.arange(batch, device=device) % 2
    losses, calls = {}, {}
    for technique in techniques(device, dsd):
        call = stepper(model, teacher, technique, images, labels)
        losses[technique.name] = torch.stack([call() for _ in range(steps)])
        calls[technique.name] = call
    baseline, *_, ours = losses
    errors = {name: float((values - losses[baseline]).abs().max()) for name, values in losses.items()}
    parts = inference(config, batch)
    work = (3 + dsd) * sum(p.flops for p in parts)
    least = training_floor(config, batch, machine, PASSES["everything fused"], dsd) if machine else 0.0
    notes = (
        f"error: largest difference of the loss over the first {steps} steps; it starts at {losses[baseline][0]:.2f}",
    )
    title = f"DTN {preset} {side}x{side}, batch {batch}{', DSD' if dsd else ''}"
    return Case(SUITE, title, calls, ours, baseline, batch, work, 0.0, least, errors, notes, rounds=7)


def cases(machine: Machine | None = None, quick: bool = False) -> Iterator[Case]:
    """Batch 32 and 256 on a GPU; on a CPU the small preset, and the paper's at batch 2."""
    gpu = torch.cuda.is_available()
    shapes = [("paper", 32), ("paper", 256)] if gpu else [("tiny", 8)] if quick else [("tiny", 32), ("paper", 2)]
    for preset, batch in shapes:
        for dsd in (False,) if quick or (not gpu and preset == "paper") else (False, True):
            steps = 3 if quick else STEPS if batch > 8 else 1  # the statistics of two images make later losses chaotic
            yield train_case(preset, batch, dsd, machine, steps)


@pytest.mark.parametrize("dsd", [False, True])
def bench_step(compare, dsd: bool) -> None:
    compare(train_case("tiny", 16, dsd, None))
