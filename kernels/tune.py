"""Searches for the fastest launch values on this machine's GPU.

python -m dtn_fast.kernels.tune --budget 120
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtn_fast.cuda_graph import capture, warm_up
from dtn_fast.files import write_whole
from dtn_fast.kernels import ops
from dtn_fast.kernels.launch_values import FOLDER, override, slug, used
from dtn_fast.timing import in_turns

# ------------------------------------------------------------------------------------------------ the search


def _grid(**axes: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launch values that the search tries, by kernel."""
    small = _grid(num_warps=(4, 8), num_stages=(1, 2))
    blocks = _grid(BLOCK_M=(32, 64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3))
    rows = _grid(BLOCK_T=(32, 64, 128), BLOCK_C=(32, 64), BLOCK_OUT=(64,), num_warps=(8, 16), num_stages=(1, 2))
    streams = _grid(BLOCK_T=(16, 32, 64, 128), BLOCK_C=(32, 64, 128), num_warps=(4, 8), num_stages=(1,))
    sums = [{**row, "PROGRAMS": programs} for row in streams for programs in (512, 1024, 2048)]
    lines = _grid(BLOCK_T=(8, 16, 32), BLOCK_C=(32, 64, 128), num_warps=(4, 8), num_stages=(1,))
    return {
        "bn_stats": [{**row, "UNROLL": unroll} for row in sums for unroll in (1, 4)],
        "bn_apply": streams,
        "bn_backward_stats": sums,
        "bn_backward_apply": streams,
        "lc_forward": lines,
        "lc_backward": lines,
        # two stages overlap nothing: the next pair's loads would wait for this one's store
        "mas_small_forward": small + _grid(PERSISTENT=(2, 4), STAGES=(3, 4), num_warps=(4, 8), num_stages=(2,)),
        "mas_small_backward": small + _grid(PERSISTENT=(1, 2), STAGES=(3,), num_warps=(4, 8), num_stages=(2,)),
        "mas_flash_forward": blocks,
        "mas_flash_backward_dq": blocks,
        "mas_flash_backward_dkdv": blocks,
        "moe_forward": rows,
        "moe_backward_rows": rows,
        "moe_backward_weight": _grid(
            BLOCK_T=(32, 64), BLOCK_C=(64, 128), PROGRAMS=(128, 256), num_warps=(8, 16), num_stages=(1, 2)
        ),
    }


Call = Callable[[], list[Tensor]]
"""Function that runs forward and backward once; its result must not depend on the launch values."""


class Case(NamedTuple):
    """A shape for which kernels are tuned, and the bounds under which the values found are stored."""

    kernels: tuple[str, ...]
    when: dict[str, int]
    make: Callable[[], Call]
    """Returns a call on fresh inputs."""


def cases(device: str = "cuda", batch: int = 256) -> list[Case]:
    """The model's shapes at ``batch`` images, and attention at other lengths."""
    attention = lambda n, images: functools.partial(_attention, device, n, 64, max(images, 1))
    norm = lambda channels, side, pool=True: functools.partial(_norm, device, channels, side, max(batch // 4, 1), pool)
    norms = ("bn_stats", "bn_apply", "bn_backward_stats", "bn_backward_apply")
    small = ("mas_small_forward", "mas_small_backward")
    flash = ("mas_flash_forward", "mas_flash_backward_dq", "mas_flash_backward_dkdv")
    gate = ("moe_forward", "moe_backward_rows", "moe_backward_weight")
    return [  # the furthest from their lower bounds first, because the budget may end
        Case(gate, {"M": 128, "bytes": 2}, functools.partial(_gate, device, batch)),
        Case(norms, {"C": 32, "bytes": 2}, norm(32, 256)),
        Case(("lc_forward", "lc_backward"), {"C": 512, "bytes": 2}, functools.partial(_connection, device, batch)),
        Case(small, {"N": 64, "bytes": 2, "D": 64}, attention(64, batch)),
        Case(norms, {"C": 128, "bytes": 2}, norm(128, 64)),
        Case(norms, {"C": 512, "bytes": 2}, norm(512, 16)),
        Case(gate, {"M": 128, "bytes": 2, "T": 2048}, functools.partial(_gate, device, max(batch // 8, 1))),
        Case(small, {"N": 128, "bytes": 2, "D": 64}, attention(128, batch // 2)),
        Case(norms, {"POOL": 0, "bytes": 2}, norm(128, 64, False)),
        Case(flash, {"bytes": 2, "D": 64}, attention(1024, batch // 16)),
    ]


def _attention(device: str, n: int, dim: int, images: int) -> Call:
    """MAS attention of ``images`` packed projections of n tokens and 8 heads."""
    qkv = torch.randn(images, n, 3, 8, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.randn(8, device=device, requires_grad=True)
    return _both_ways(lambda: ops.mas_attention_packed(qkv, scale, path="triton"), [qkv, scale])


def _gate(device: str, batch: int) -> Call:
    """The expert gate of the paper's model, with noise."""
    shapes = ((2, 128, 512), (2, 128), (2, 128), (2,), (2,))
    weights = [torch.randn(s, device=device) * 0.05 for s in shapes]
    leaves = [_map(device, batch, 512, 8), *(t.requires_grad_() for t in weights)]
    seed = torch.tensor(1, device=device)
    return _both_ways(lambda: ops.moe_gate(*leaves, noise_std=0.1, seed=seed, path="triton"), leaves)


def _norm(device: str, channels: int, side: int, batch: int, pool: bool) -> Call:
    """BN, ReLU and, with ``pool``, max-pool of a map [batch, channels, side, side]."""
    leaves = [_map(device, batch, channels, side)]
    leaves += [torch.randn(channels, device=device).requires_grad_() for _ in range(2)]
    return _both_ways(lambda: ops.bn_relu(*leaves, pool=pool, path="triton")[0], leaves)


def _connection(device: str, batch: int) -> Call:
    """The local connection of the paper's model."""
    leaves = [_map(device, batch, 512, 8) for _ in range(2)]
    leaves += [torch.randn(512, 1, 3, 3, device=device).requires_grad_()]
    leaves += [torch.randn(512, device=device).requires_grad_() for _ in range(3)]
    return _both_ways(lambda: ops.local_connection(*leaves, path="triton")[0], leaves)


def _map(device: str, batch: int, channels: int, side: int) -> Tensor:
    x = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def _both_ways(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    """A call that returns the output and the gradients of ``leaves`` for a gradient drawn once."""
    grad = torch.randn_like(forward().detach())

    def call() -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return call


def measure(make: Callable[[], Call], replays: int = 20) -> float:
    """Median seconds of one call, timed in a CUDA graph over enough inputs to overflow the L2 cache."""
    calls = [make()]
    size = sum(t.numel() * t.element_size() for t in calls[0]())
    calls += [make() for _ in range(min(32, int(180e6 // max(size, 1))))]
    every = lambda: [call() for call in calls]
    warm_up(every, 1)
    replay, _ = capture(every)
    return statistics.median(in_turns({"": replay}, replays, 0)[""]) / len(calls)


def search(
    todo: list[Case],
    budget: float,
    timer: Callable = measure,
    keep: Callable[[dict[str, list[dict[str, Any]]]], object] = lambda _: None,
) -> dict[str, list[dict[str, Any]]]:
    """Fastest values of each kernel that give the same results as the default, searched within ``budget`` seconds.

    Where the default is the fastest it gets a row too, as the row of another shape would serve this one otherwise.
    Kernels that the budget does not reach are left out and keep the values of their architecture family.  ``keep`` is
    called with what is found so far after every kernel.
    """
    deadline = time.monotonic() + budget
    found: dict[str, list[dict[str, Any]]] = {}
    for case in todo:
        torch.manual_seed(0)
        expected = case.make()()
        default = {kernel: used[kernel] for kernel in case.kernels}
        for kernel in case.kernels:
            if time.monotonic() > deadline:
                return found
            best, best_time = default[kernel], timer(case.make)
            for values in candidates()[kernel]:
                if time.monotonic() > deadline:
                    break
                override[kernel] = values
                try:
                    torch.manual_seed(0)
                    got = case.make()()
                    same = all(_alike(a, b) for a, b in zip(got, expected, strict=True))
                    seconds = timer(case.make) if same else float("inf")
                except Exception as error:  # does not compile or does not fit: not a candidate on this GPU
                    print(f"  {kernel} {values}: {type(error).__name__}", file=sys.stderr)
                    seconds = float("inf")
                finally:
                    del override[kernel]
                if seconds < best_time * 0.99:
                    best, best_time = values, seconds
            found.setdefault(kernel, []).append({"when": case.when, **best})
            print(f"{kernel} {case.when}: {best}, {best_time * 1e6:.1f} us forward and backward", flush=True)
            keep(found)
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).norm() <= 2e-2 * b.float().norm() + 1e-6)


def _bounds(row: dict[str, Any]) -> list[float]:
    return [row.get("when", {}).get(key, math.inf) for key in ("POOL", "T", "N", "C", "M", "D", "bytes")]


def write(name: str, found: dict[str, list[dict[str, Any]]], folder: Path = FOLDER) -> Path:
    """Stores a search's result for the GPU ``name``; kernels and shapes not in ``found`` keep their rows.

    Rows of smaller bounds come first, because the first row that fits is taken.
    """
    path = folder / f"{slug(name)}.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for kernel, new in found.items():
        kept = [row for row in rows.get(kernel, ()) if row.get("when") not in [row.get("when") for row in new]]
        rows[kernel] = sorted([*kept, *new], key=_bounds)
    parts = [
        f"  {json.dumps(k)}: [\n" + ",\n".join(f"    {json.dumps(r)}" for r in v) + "\n  ]" for k, v in rows.items()
    ]
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtn_fast.kernels.tune",
        description="Search for the fastest launch values on this machine's GPU and write kernels/tuned/<gpu>.json.",
        epilog="Example: python -m dtn_fast.kernels.tune --budget 120",
    )
    parser.add_argument("--budget", type=float, default=120.0, help="longest search time in seconds")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: torch sees no GPU on this machine; run it where there is one", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    found = search(cases(), options.budget, keep=lambda so_far: write(name, so_far))
    print(f"wrote {write(name, found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
