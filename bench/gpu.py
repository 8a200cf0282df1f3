"""``make gpu``: everything that needs a GPU, from a bare checkout with Python, torch and Triton, within a budget.

    python -m dtn_fast.bench.gpu --stage kernels model --budget 540

Each stage runs in its own process with a share of the remaining budget; measurements made before its time is up are
kept.  Results go to --out, with a summary of the stages, and are copied into bench/results/; tuned launch values go to
kernels/tuned/ and are copied to --out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from dtn_fast.bench import results, roofline
from dtn_fast.bench.measure import Measurement, seconds
from dtn_fast.model.config import DTNConfig
from dtn_fast.ranges import positive

SHARES = {
    "environment": 0.05,
    "tests": 0.3,
    "convolutions": 0.08,
    "sweep": 0.30,
    "kernels": 0.30,
    "model": 0.35,
    "train": 0.60,
    "data": 1.0,
}
"""Stages in order, and each one's share of the remaining time.  Tuning precedes the stages that it speeds up."""
LEAST = 5.0
"""Seconds below which a stage is not begun."""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/kernels/test_gpu.py",
          "tests/train/test_step.py", "tests/export/test_tensorrt_plugin.py"]  # fmt: skip
"""Test command with files by name, because collecting the others needs packages that a GPU machine may lack."""


def commands(stage: str, seconds: float, out: Path, quick: bool) -> list[list[str]]:
    """Commands of a stage, in order."""
    this = [sys.executable, "-m", "dtn_fast.bench.gpu"]
    if stage == "environment":
        return [[*this, "--only-environment"]]
    if stage == "convolutions":
        return [[*this, "--only-convolutions", "--out", str(out), *(["--dry-run"] if quick else [])]]
    if stage == "tests":
        checker = shutil.which("compute-sanitizer")
        sanitized = [[checker, "--error-exitcode", "9", *this, "--only-small-shapes"]] if checker else []
        return [PYTEST, *sanitized]
    if stage == "sweep":
        return [[sys.executable, "-m", "dtn_fast.kernels.tune", "--budget", str(max(int(seconds) - 20, 5))]]
    small = ["--quick"] if quick else []
    return [[sys.executable, "-m", "dtn_fast.bench.run", stage, "--budget", str(max(int(seconds) - 20, 5)), "--out",
             str(out), *small]]  # fmt: skip


def run(stages: list[str], budget: float, out: Path, quick: bool) -> list[dict[str, object]]:
    """Runs the stages, writing ``out``/gpu-run.json after each; returns the stages' states."""
    deadline = time.monotonic() + budget
    out.mkdir(parents=True, exist_ok=True)
    summary: list[dict[str, object]] = []
    for stage in stages:
        left = deadline - time.monotonic()
        share = left * (SHARES[stage] if len(stages) > 1 else 1.0)
        state = "not run: the budget is spent" if share < LEAST else "done"
        start = time.monotonic()
        print(f"\n== {stage}, at most {share:.0f} s", flush=True)
        if share >= LEAST and quick and stage in ("tests", "sweep"):
            state = "not run: needs a GPU"
        elif share >= LEAST:
            for command in commands(stage, share, out, quick):
                try:
                    code = subprocess.run(command, timeout=max(start + share - time.monotonic(), 1)).returncode
                    state = state if code == 0 else f"failed with {code}: {' '.join(command[1:])}"
                except subprocess.TimeoutExpired:
                    state = "cut off by the budget; its measurements are kept"
        print(f"== {stage}: {state}", flush=True)
        summary.append({"stage": stage, "state": state, "seconds": round(time.monotonic() - start, 1)})
        results.write_json(out / "gpu-run.json", {"environment": results.environment(), "stages": summary})
        if not quick:
            _copy(out)
    return summary


def _copy(out: Path) -> None:
    """Copies this GPU's results into the checkout, and its launch values to ``out``."""
    from dtn_fast.kernels import launch_values

    env = results.environment()
    measured = out / results.file_name(env)
    if measured.is_file() and out.resolve() != results.FOLDER.resolve():
        shutil.copy(measured, results.FOLDER / measured.name)
    values = launch_values.FOLDER / f"{launch_values.slug(str(env['gpu']))}.json"
    if values.is_file():
        shutil.copy(values, out / f"tuned-{values.name}")


def convolutions(out: Path, quick: bool) -> None:
    """Times the backbone's convolutions (forward, dgrad, wgrad) and stores them as the suite ``convolutions``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cudnn.benchmark = True
    machine = roofline.measure_machine(device, dtype, quick)
    config, batch = DTNConfig.preset("tiny" if quick else "paper"), 1 if quick else 256
    print(machine.ceilings())
    rows, env = list[Measurement](), results.environment()
    for conv in roofline.measure_convolutions(config, batch, machine, device, dtype):
        for direction, taken in conv.directions():
            share = conv.lower_bound / taken
            print(f"{conv.name:24s} {direction:8s} {seconds(taken):>9s}  {share:4.0%} of the lower bound")
            case = f"The backbone's convolutions alone, batch {batch}, {machine.dtype}, channels_last: best of several"
            name = f"{conv.name} {direction}"
            rows.append(
                Measurement("convolutions", case, name, taken, taken, taken, 1.0, share=conv.lower_bound / taken)
            )
        results.store(out, "convolutions", rows, machine, env, {})  # whatever ends it, this stays


def small_shapes() -> None:
    """Runs each kernel once on small and odd shapes, for compute-sanitizer."""
    from dtn_fast.kernels import ops

    for n in (1, 49, 64, 197):
        qkv = torch.randn(2, n, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        scale = torch.randn(2, device="cuda", requires_grad=True)
        ops.mas_attention_packed(qkv, scale, path="triton").float().sum().backward()
    shapes = ((2, 32, 64), (2, 32), (2, 32), (2,), (2,))
    leaves = [torch.randn(2, 64, 5, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)]
    leaves += [torch.randn(s, device="cuda", requires_grad=True) for s in shapes]
    ops.moe_gate(*leaves, noise_std=0.1, seed=1, path="triton").float().sum().backward()
    for shape in ((2, 32, 6, 10), (1, 5, 2, 2), (3, 130, 4, 4)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        columns = [torch.randn(shape[1], device="cuda", requires_grad=True) for _ in range(3)]
        window = torch.randn(shape[1], 1, 3, 3, device="cuda", requires_grad=True)
        for pool in (False, True):
            ops.bn_relu(x, *columns[:2], pool=pool, path="triton")[0].float().sum().backward()
        ops.local_connection(x, x, window, *columns, path="triton")[0].float().sum().backward()
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Test, tune and measure on the GPU at hand, within a budget.",
        epilog="Example: make gpu STAGE=\"kernels model\" BUDGET=300",
    )  # fmt: skip
    parser.add_argument("--stage", nargs="+", choices=list(SHARES), default=list(SHARES), help="stages; default: all")
    parser.add_argument("--budget", type=positive, default=540.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the JSON files")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on this CPU, to check that stages work")
    parser.add_argument("--only-environment", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-convolutions", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-small-shapes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run and not options.only_environment:
        print("make gpu: torch sees no GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    if options.only_environment:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(results.environment(), indent=1))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        print(roofline.measure_machine(device, dtype, device.type == "cpu").ceilings())
    elif options.only_convolutions:
        convolutions(options.out, options.dry_run)
    elif options.only_small_shapes:
        small_shapes()
    else:
        summary = run([s for s in SHARES if s in options.stage], options.budget, options.out, options.dry_run)
        print(f"\nresults in {options.out}:", *sorted(p.name for p in options.out.glob("*.json")))
        return int(any(str(row["state"]).startswith("failed") for row in summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
