"""Roofline: least possible time of each part of the model on a machine, by its FLOPs or its bytes.

    python -m dtn_fast.bench.roofline --batch 256

Conventions: a product of [m, k] and [k, n] is 2 m k n FLOPs; bytes are the inputs, weights and outputs, each read from
or written to memory once, when a part runs as one pass (convolution + BN + ReLU + pool; attention without its scores).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtn_fast.bench.machine import Machine, best_seconds, measure_machine
from dtn_fast.evaluation.plotting import drawing, save
from dtn_fast.files import write_whole
from dtn_fast.model.backbone import INPUT_CHANNELS
from dtn_fast.model.config import STRIDE, DTNConfig


class Part(NamedTuple):
    """A layer or operator, with the work of one call for a whole batch."""

    group: str
    name: str
    flops: float
    bytes: float


def inference(config: DTNConfig, batch: int, width: int = 2) -> list[Part]:
    """Every part of a folded model's forward pass; ``width``: bytes per element (the input is uint8)."""
    parts = []
    side, channels = config.image_size, 3
    for out, convs in zip(config.channels, config.convs, strict=True):
        for number in range(1, convs + 1):
            pooled = number == convs
            read = side * side * channels * (1 if channels == 3 else width)
            written = side * side * out * width // (4 if pooled else 1)
            flops = 2 * 9 * channels * out * side * side
            name = f"conv {channels}->{out} at {side}" + (", pool" if pooled else "")
            parts.append(
                Part(f"{out} channels", name, batch * flops, batch * (read + written) + 9 * channels * out * width)
            )
            channels = out
        side //= 2
    tokens, c = (config.image_size // STRIDE) ** 2, config.channels[-1]
    if config.num_experts:
        parts.append(
            Part("gate", "gate", *gate_work(batch * tokens, config.num_experts, config.expert_hidden, c, width))
        )
    hidden = c * config.mlp_ratio
    for block in range(config.depth):

        def product(name: str, rows: int, cols: int, extra: int = 0, block: int = block) -> Part:
            moved = batch * tokens * (rows + cols + extra) * width + rows * cols * width
            return Part("blocks", f"block {block} {name}", 2.0 * batch * tokens * rows * cols, moved)

        parts.append(product("qkv", c, 3 * c))
        parts.append(
            Part(
                "blocks",
                f"block {block} attention",
                *attention_work(batch, tokens, config.num_heads, c // config.num_heads, width),
            )
        )
        parts.append(product("out", c, c))
        if config.local_connection:
            moved = batch * tokens * 3 * c * width + 9 * c * width  # in, residual, out
            parts.append(Part("blocks", f"block {block} depthwise", 18.0 * batch * tokens * c, moved))
        parts += [product("expand", c, hidden), product("shrink", hidden, c, c)]
    parts.append(
        Part("head", "pool and head", batch * c * (tokens + 2 * config.num_classes), batch * tokens * c * width)
    )
    return parts


def attention_work(batch: int, n: int, heads: int, dim: int, width: int, backward: bool = False) -> tuple[float, float]:
    """(FLOPs, least bytes) of MAS attention: two products forward; five backward, which recomputes the scores."""
    elements = batch * n * heads * dim * width
    product = 2.0 * batch * heads * n * n * dim
    return (5 * product, 7.0 * elements) if backward else (2 * product, 4.0 * elements)


def gate_work(
    positions: int, experts: int, hidden: int, channels: int, width: int, backward: bool = False
) -> tuple[float, float]:
    """(FLOPs, least bytes) of the gate over ``positions``: x in, y out, experts' weights; backward x, dy in, dx out."""
    product = 2.0 * positions * experts * hidden * (channels + 1)
    weights = experts * hidden * (channels + 2) * width
    if backward:  # hidden again, d hidden -> dx and dw
        return 3 * product, 3.0 * positions * channels * width + 2 * weights
    return product, 2.0 * positions * channels * width + weights


def bn_work(elements: int, width: int, pool: bool, backward: bool = False) -> tuple[float, float]:
    """(FLOPs, least bytes) of BN + ReLU (+ pool) over a map of ``elements``: x twice in (statistics first), y out;
    backward x and dy twice in, dx out."""
    out = elements / 4 if pool else elements
    return (10.0 * elements, (3.0 * elements + 2 * out) * width) if backward else (
        8.0 * elements, (2.0 * elements + out) * width)  # fmt: skip


def connection_work(elements: int, width: int, backward: bool = False) -> tuple[float, float]:
    """(FLOPs, least bytes) of x + BN(depthwise 3x3 of m) over maps of ``elements``: m, the convolution's z out and in
    for its statistics, x in, y out; backward dy and z twice, m in, dm out."""
    return (54.0 * elements, 6.0 * elements * width) if backward else (26.0 * elements, 5.0 * elements * width)


PASSES = {
    "everything fused": 0.0,
    "BN in prologues, statistics in epilogues": 3.0,
    "statistics in epilogues": 6.0,
    "compiled passes": 8.0,
    "eager channels_last": 13.0,
    "eager NCHW": 25.0,
}
"""Passes over all convolution outputs besides the convolutions' own, forward and backward.  Eager: BN 3, ReLU 2, ReLU
backward 3, BN backward 5; NCHW adds 12 of layout changes.  Compiled: statistics 1, normalise + ReLU 2, backward 5."""


def seconds(part: Part, machine: Machine) -> float:
    """Least time of a part: the longer of its arithmetic and its memory traffic."""
    return max(part.flops / machine.flops, part.bytes / machine.bandwidth)


def lower_bound(parts: list[Part], machine: Machine) -> float:
    return sum(seconds(part, machine) for part in parts)


def training(config: DTNConfig, batch: int, passes: float, teacher: bool = False) -> list[Part]:
    """Every part of a training step: forward, both gradients (twice the forward's work), the BN and ReLU passes around
    each convolution (``passes`` over its output), and with ``teacher`` a frozen folded model's forward."""
    parts = []
    forward = inference(config, batch)
    convolutions = iter(_output_bytes(config, batch))
    for part in forward:
        parts += [part, Part(part.group, f"{part.name}, backward", 2 * part.flops, 2 * part.bytes)]
        if part.name.startswith("conv"):
            parts.append(Part(part.group, f"{part.name}, BN and ReLU passes", 0.0, passes * next(convolutions)))
    return parts + [Part("teacher", f"teacher {part.name}", part.flops, part.bytes) for part in forward if teacher]


def _output_bytes(config: DTNConfig, batch: int, width: int = 2) -> list[float]:
    """Bytes of each convolution's output."""
    sides = [config.image_size >> group for group in range(5)]
    return [
        float(batch * s * s * c * width)
        for s, c, n in zip(sides, config.channels, config.convs, strict=True)
        for _ in range(n)
    ]


def training_lower_bound(
    config: DTNConfig, batch: int, machine: Machine, passes: float, teacher: bool = False
) -> float:
    """Least seconds of a training step."""
    return lower_bound(training(config, batch, passes, teacher), machine)


class Conv(NamedTuple):
    """Measured seconds of one of the backbone's convolutions alone, and the lower bound of each direction."""

    name: str
    forward: float
    dgrad: float
    wgrad: float
    lower_bound: float

    def directions(self) -> list[tuple[str, float]]:
        """(name, seconds) of each measured direction; the first convolution needs no input gradient."""
        named = [("forward", self.forward), ("dgrad", self.dgrad), ("wgrad", self.wgrad)]
        return [(name, taken) for name, taken in named if taken]


def measure_convolutions(
    config: DTNConfig, batch: int, machine: Machine, device: torch.device, dtype: torch.dtype
) -> Iterator[Conv]:
    """Times each convolution in channels_last, forward and both gradients, without bias and activation; the first one
    also with its input padded to eight channels (``Execution.pad_input``), against the same lower bound."""
    side, channels = config.image_size, 3
    for out, convs in zip(config.channels, config.convs, strict=True):
        for _ in range(convs):
            for given in (3, INPUT_CHANNELS) if channels == 3 else (channels,):
                x, w, dy = (
                    torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
                    for size in ((batch, given, side, side), (out, given, 3, 3), (batch, out, side, side))
                )

                def gradient(mask: list[bool], x: Tensor = x, w: Tensor = w, dy: Tensor = dy) -> Callable[[], object]:
                    return lambda: torch.ops.aten.convolution_backward(
                        dy, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
                    )

                rounds = 12 if device.type == "cuda" else 3
                forward = best_seconds(lambda x=x, w=w: F.conv2d(x, w, padding=1), device, rounds)
                dgrad = best_seconds(gradient([True, False, False]), device, rounds) if channels > 3 else 0.0
                wgrad = best_seconds(gradient([False, True, False]), device, rounds)
                pixels = batch * side * side
                part = Part("", "", 18.0 * channels * out * pixels, float((channels + out) * pixels * x.element_size()))
                name = f"conv {channels}->{out} at {side}{', padded to 8 channels' if given > channels else ''}"
                yield Conv(name, forward, dgrad, wgrad, seconds(part, machine))
            channels = out
        side //= 2


def table(parts: list[Part], batch: int, machine: Machine, layers: bool = False) -> list[list[str]]:
    """Rows per group or layer: GFLOP, MB and least microseconds per image, and the limit (memory or arithmetic)."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.name if layers else part.group, []).append(part)
    rows = []
    for name, members in [*groups.items(), ("all", parts)]:
        flops, moved = sum(p.flops for p in members), sum(p.bytes for p in members)
        least_time = lower_bound(members, machine)
        memory = sum(seconds(p, machine) for p in members if p.bytes / machine.bandwidth > p.flops / machine.flops)
        share = memory / least_time if least_time else 0.0
        bound = "memory" if share > 0.9 else "arithmetic" if share < 0.1 else f"{share:.0%} memory"
        work = [f"{flops / batch / 1e9:.2f}", f"{moved / batch / 1e6:.2f}", f"{least_time / batch * 1e6:.2f}"]
        rows.append([name, *work, bound])
    return rows


def plot(path: Path, config: DTNConfig, batch: int, machine: Machine) -> None:
    """Draws the roofline with every part of the model on it."""
    with drawing() as Figure:
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot()
        ridge = machine.flops / machine.bandwidth
        xs = [0.5, ridge, 4096]
        axes.loglog(xs, [min(x * machine.bandwidth, machine.flops) / 1e12 for x in xs], "k-", label="measured ceilings")
        groups: dict[str, list[Part]] = {}
        for part in inference(config, batch):
            groups.setdefault(part.group, []).append(part)
        for name, parts in groups.items():
            x = [part.flops / part.bytes for part in parts]
            axes.loglog(x, [min(v * machine.bandwidth, machine.flops) / 1e12 for v in x], "o", label=name, alpha=0.7)
        axes.set(
            xlabel="FLOP per byte", ylabel="attainable TFLOP/s", title=f"{machine.name}, {machine.dtype}, batch {batch}"
        )
        axes.legend(fontsize=8)
        figure.tight_layout()
        write_whole(path, lambda file: save(figure, file, path.suffix[1:]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dtn-fast bench roofline", description="The least time of each part of the model on this machine.",
        epilog="Example: dtn-fast bench roofline --batch 256 --plot roofline.png",
    )  # fmt: skip
    parser.add_argument("--preset", default="paper", help="paper or tiny")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--plot", type=Path, default=Path("roofline.png"), help="picture to draw: .png, .svg or .pdf")
    parser.add_argument("--flops", type=float, help="FLOP/s to assume instead of measuring, with --bandwidth")
    parser.add_argument("--bandwidth", type=float, help="bytes/s to assume instead of measuring, with --flops")
    parser.add_argument("--layers", action="store_true", help="list every layer and operator instead of groups")
    parser.add_argument(
        "--training", action="store_true", help="a training step with compiled passes instead of inference"
    )
    parser.add_argument("--measure", action="store_true", help="also time each convolution beside its lower bound")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    config = DTNConfig.preset(options.preset)
    if bool(options.flops) != bool(options.bandwidth) or options.batch < 1:
        parser.error("give --flops and --bandwidth together, and a --batch of at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.flops:
        machine = Machine("assumed", options.flops, options.bandwidth, "bfloat16")
    else:
        machine = measure_machine(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    parts = (
        training(config, options.batch, PASSES["compiled passes"])
        if options.training
        else inference(config, options.batch)
    )
    rows = table(parts, options.batch, machine, options.layers)
    plot(options.plot, config, options.batch, machine)
    if options.json:
        print(json.dumps({"machine": machine._asdict(), "batch": options.batch, "rows": rows}, indent=1))
        return 0
    print(machine.ceilings())
    wide = max(len(row[0]) for row in rows)
    print(f"{'':{wide}s} {'GFLOP':>7s} {'MB':>7s} {'us/image':>9s}  bound by")
    for name, flops, moved, least_time, bound in rows:
        print(f"{name:{wide}s} {flops:>7s} {moved:>7s} {least_time:>9s}  {bound}")
    if options.measure:
        print("measured alone, share of the lower bound:")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for conv in measure_convolutions(config, options.batch, machine, device, dtype):
            print(
                f"{conv.name:24s}"
                + "".join(f" {name} {conv.lower_bound / taken:4.0%}" for name, taken in conv.directions())
            )
    print(f"plot: {options.plot}")
    whole = lower_bound(inference(config, options.batch), machine) / options.batch
    print(f"inference: at most {1 / whole:,.0f} images/s")
    for name, passes in PASSES.items():
        plain, dsd = (
            training_lower_bound(config, options.batch, machine, passes, t) / options.batch for t in (False, True)
        )
        print(f"training, {name}: at most {1 / plain:,.0f} images/s, DSD {1 / dsd:,.0f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
