"""``make gpu``: everything that needs a GPU, from a bare checkout with Python, torch and Triton, in calls that fit.

    python -m dtn_fast.bench.gpu --stage sweep kernels --budget 540
    python -m dtn_fast.bench.gpu --plan 30

Each stage is a process group with a share of the call's budget.  All that a stage prints is in --out/gpu-run.log, and
every row that it measures is in --out as soon as it is measured, so a stage that is cut off keeps what it has;
--out/gpu-run.json says how each stage ended and what was kept.  Results are merged into bench/results/, tuned launch
values go to kernels/tuned/ and are copied to --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import torch

from dtn_fast.bench import results, roofline
from dtn_fast.bench.measure import Measurement, seconds
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.model.config import DTNConfig
from dtn_fast.ranges import positive

LIMIT = 540.0
"""Most seconds of one planned call: ten minutes, after which some lenders of machines end a command, and a margin."""
STARTING, BETWEEN = 120.0, 15.0
"""Seconds that a plan leaves for the machine's start, and for each stage's share of copying to and fro."""
ENDING = 20.0
"""Seconds before a stage's time is up at which its own budget ends, so that it stops between two measurements."""
GRACE = 5.0
"""Seconds between the interrupt that asks a stage to end and the kill: time for pytest's summary."""


class Stage(NamedTuple):
    """What a stage does, and its seconds, on a machine with 16 cores and no compiled kernel in any cache."""

    least: float
    """Below this it is not begun."""
    enough: float
    """More goes to the other stages first."""
    does: str


STAGES = {
    # seconds that an H200 took: environment 4, tests 61, sweep 200 for its 22 rows, kernels 187 for the model's shapes
    # in bfloat16, train 182 for two batch sizes, model 112 for all; the others are estimated
    "environment": Stage(10, 20, "versions and the measured ceilings of arithmetic and memory"),
    "tests": Stage(80, 120, "every test that needs a GPU, in eight processes; failures at once, earlier ones first"),
    "sweep": Stage(120, 240, "launch values, the kernels furthest from their lower bounds first"),
    "kernels": Stage(180, 400, "every operator and its rivals, bfloat16 and the model's shapes first"),
    "train": Stage(150, 300, "training steps with each technique, batch 256 first"),
    "model": Stage(120, 200, "inference at each batch size, eager, compiled and captured"),
    "convolutions": Stage(30, 60, "the backbone's convolutions alone, each direction"),
    "data": Stage(40, 60, "the data path, augmentation on the GPU"),
    "sanitizer": Stage(60, 180, "compute-sanitizer on every kernel at small and odd shapes"),
}
"""Stages in order: correctness, then tuning, which the others profit from, then by what they tell."""
TESTS = ["tests/kernels/test_gpu.py", "tests/train/test_step.py", "tests/export/test_tensorrt_plugin.py",
         "tests/bench/test_measure.py"]  # fmt: skip
"""Test files by name, because collecting the others needs packages that a GPU machine may lack."""
THIS = [sys.executable, "-m", "dtn_fast.bench.gpu"]


def allot(stages: list[str], budget: float, between: float = 0.0) -> dict[str, float]:
    """Seconds of each stage that fits: the least for each in order, then up to enough, the rest for the last one."""
    got: dict[str, float] = {}
    for name in stages:
        if STAGES[name].least + between <= budget:
            got[name] = STAGES[name].least
            budget -= STAGES[name].least + between
    for name in got:
        more = min(STAGES[name].enough - got[name], budget)
        got[name], budget = got[name] + more, budget - more
    if got:
        got[name] += budget
    return got


def plan(stages: list[str], minutes: float, commit: str) -> Iterator[str]:
    """Commands for a machine that is lent for ``minutes``, in order, each at most ``LIMIT`` seconds long."""
    yield f"# {minutes:g} minutes with a GPU, the first {STARTING / 60:g} for its start; no call is over {LIMIT:.0f} s"
    shares = allot(stages, minutes * 60 - STARTING, BETWEEN)
    calls: list[dict[str, float]] = []
    for name, share in shares.items():
        share = min(share, LIMIT)
        if not calls or sum(calls[-1].values()) + share > LIMIT:
            calls.append({})
        calls[-1][name] = share
    for call in calls:
        for name, share in call.items():
            yield f"#   {share:3.0f} s  {name}: {STAGES[name].does}"
        yield f'make gpu STAGE="{" ".join(call)}" BUDGET={sum(call.values()):.0f} COMMIT={commit}'
    yield "# after each call, where its results were brought: make gpu-collect FROM=gpu-results"
    for name in stages:
        if name not in shares:
            yield f"# no time for {name}, which needs {STAGES[name].least:.0f} s"


def commands(stage: str, seconds: float, out: Path, dry: bool) -> list[list[str]]:
    """Commands of a stage, in order."""
    only = [*THIS, "--only", stage, "--out", str(out), "--budget", f"{seconds:.0f}", *(["--dry-run"] if dry else [])]
    if stage in ("environment", "convolutions", "sweep"):
        return [only]
    if stage == "tests":
        return [pytest_command(dry)]
    if stage == "sanitizer":
        checker = shutil.which("compute-sanitizer")
        return [[checker, "--error-exitcode", "9", *only]] if checker and not dry else []
    small = ["--quick"] if dry else []
    return [[sys.executable, "-m", "dtn_fast.bench.run", stage, "--budget", f"{seconds:.0f}", "--out", str(out),
             *small]]  # fmt: skip


def pytest_command(dry: bool) -> list[str]:
    """The tests marked gpu, a line each as they end; in a dry run some that need no GPU."""
    workers = min(8, os.cpu_count() or 1)
    parallel = ["--numprocesses", str(workers)] if importlib.util.find_spec("xdist") and not dry else []
    chosen = ["tests/kernels/test_reference.py"] if dry else ["-m", "gpu", *TESTS]
    return [sys.executable, "-m", "pytest", "-vv", "-p", "tests.failures_at_once", "--failed-first", *parallel, *chosen]


def run(stages: list[str], budget: float, out: Path, dry: bool, dice: random.Random | None = None) -> list[dict]:
    """Runs the stages, with --out/gpu-run.json up to date before and after each; returns the stages' states.

    dice: rehearse, that is, kill each stage at a random moment.
    """
    deadline = time.monotonic() + budget
    out.mkdir(parents=True, exist_ok=True)
    env, summary = results.environment(), list[dict[str, object]]()
    for place, stage in enumerate(stages):
        share = allot(stages[place:], deadline - time.monotonic()).get(stage, 0.0)
        share = dice.uniform(5, 30) if dice else share
        print(f"\n== {stage}, at most {share:.0f} s: {STAGES[stage].does}", flush=True)
        summary.append({"stage": stage, "state": "begun", "seconds": 0.0, "kept": ""})
        _write(out, env, summary)
        start = time.monotonic()
        with (out / "gpu-run.log").open("a", encoding="utf-8") as log:
            log.write(f"== {stage}\n")
            begin = log.tell()
            state = _stage(stage, share, out, dry, dice is not None, log)
        taken = time.monotonic() - start
        kept = _kept(stage, out, (out / "gpu-run.log").read_text(encoding="utf-8")[begin:], dry)
        summary[-1] = {"stage": stage, "state": state, "seconds": round(taken, 1), "kept": kept}
        print(f"== {stage}: {state} after {taken:.0f} s; kept: {kept or 'nothing'}", flush=True)
        _write(out, env, summary)
        if not dry:
            collect(out)
    return summary


def _write(out: Path, env: dict, summary: list[dict]) -> None:
    results.write_json(out / "gpu-run.json", {"environment": env, "stages": summary})


def _stage(stage: str, share: float, out: Path, dry: bool, rehearsal: bool, log: IO[str]) -> str:
    """Runs one stage; returns its state."""
    if share <= 0:
        return f'not run: it needs {STAGES[stage].least:.0f} s; make gpu STAGE="{stage}"'
    end = time.monotonic() + share
    todo = commands(stage, LIMIT if rehearsal else max(share - ENDING, 5), out, dry)
    if not todo:
        return "not run: no GPU or no compute-sanitizer here"
    for command in todo:
        code = _run_command(command, end - time.monotonic(), log)
        if code is None:
            return "killed at random" if rehearsal else "cut off by the budget"
        if code:
            return f"failed with {code}: {' '.join(command[1:])}"
    return "done"


def _run_command(command: list[str], limit: float, log: IO[str]) -> int | None:
    """Runs ``command`` as a process group that ends with it; its output goes on, line by line, to the screen and to
    ``log``.  Returns the exit code, None where ``limit`` seconds were not enough."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if "pytest" in command:  # eight processes share the cores
        env |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    if {"--only", "sweep", "--dry-run"} <= set(command):
        env["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=env, text=True, errors="replace", process_group=0)  # fmt: skip
    assert process.stdout is not None
    copier = threading.Thread(target=_copy_lines, args=(process.stdout, log), daemon=True)
    copier.start()
    try:
        return process.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        with suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGINT)
            process.wait(GRACE)
        return None
    finally:
        with suppress(ProcessLookupError):  # with those that it started, however it ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        copier.join(GRACE)  # a process that left the group may hold the pipe open


def _copy_lines(lines: IO[str], log: IO[str]) -> None:
    with suppress(ValueError):  # the log is closed: the stage is over
        for line in lines:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()


def _kept(stage: str, out: Path, text: str, dry: bool) -> str:
    """Description of what a stage left, however it ended."""
    if stage == "tests":
        ends = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b.* tests/|tests/\S+ (PASSED|FAILED|ERROR|SKIPPED)\b", text)
        words = [a or b for a, b in ends]
        return ", ".join(f"{words.count(word)} {word.lower()}" for word in dict.fromkeys(words))
    if stage == "sweep":
        path = out / "rehearsal.json" if dry else _tuned()
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return f"{sum(map(len, rows.values()))} launch values in {path.name}" if rows else ""
    path = out / results.file_name(results.environment())
    suite = results.load(path)["suites"].get(stage) if path.is_file() else None
    if suite is None:
        return "its output in gpu-run.log" if text else ""
    return f"{len(suite['rows'])} rows of {len({row.case for row in suite['rows']})} cases in {path.name}"


def _tuned() -> Path:
    from dtn_fast.kernels import launch_values

    return launch_values.FOLDER / f"{launch_values.slug(torch.cuda.get_device_name())}.json"


def collect(folder: Path) -> list[Path]:
    """Merges the results in ``folder``, of this machine or brought from another, into the checkout; returns the files
    changed.  Launch values tuned on this machine are copied to ``folder``, those from another into the checkout."""
    from dtn_fast.kernels import launch_values

    changed = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("tuned-"):
            changed.append(launch_values.FOLDER / path.name.removeprefix("tuned-"))
            if not (torch.cuda.is_available() and changed[-1] == _tuned()):
                shutil.copy(path, changed[-1])
        elif path.name != "gpu-run.json" and folder.resolve() != results.FOLDER.resolve():
            data = results.load(path)
            machine = results.Machine(**data["machine"])
            for name, suite in data["suites"].items():
                how = name, suite["rows"], machine, suite["environment"], suite["notes"]
                changed.append(results.store(results.FOLDER, *how))
    if torch.cuda.is_available() and (values := _tuned()).is_file():
        shutil.copy(values, folder / f"tuned-{values.name}")
    return list(dict.fromkeys(changed))


# ------------------------------------------------------------------------------------------------ one stage alone


def environment(dry: bool) -> None:
    """Prints versions and measured ceilings."""
    device = torch.device("cpu" if dry else "cuda")
    print(json.dumps(results.environment(), indent=1))
    print(roofline.measure_machine(device, torch.float32 if dry else torch.bfloat16, dry).ceilings())


def convolutions(out: Path, dry: bool) -> None:
    """Times the backbone's convolutions (forward, dgrad, wgrad) and stores them as the suite ``convolutions``."""
    device = torch.device("cpu" if dry else "cuda")
    dtype = torch.float32 if dry else torch.bfloat16
    torch.backends.cudnn.benchmark = True
    machine = roofline.measure_machine(device, dtype, dry)
    config, batch = DTNConfig.preset("tiny" if dry else "paper"), 1 if dry else 256
    print(machine.ceilings())
    rows, env = list[Measurement](), results.environment()
    for conv in roofline.measure_convolutions(config, batch, machine, device, dtype):
        for direction, taken in conv.directions():
            share = conv.lower_bound / taken
            print(f"{conv.name:24s} {direction:8s} {seconds(taken):>9s}  {share:4.0%} of the lower bound")
            case = f"The backbone's convolutions alone, batch {batch}, {machine.dtype}, channels_last: best of several"
            name = f"{conv.name} {direction}"
            rows.append(Measurement("convolutions", case, name, taken, taken, taken, 1.0, share=share))
        results.store(out, "convolutions", rows, machine, env, {})  # whatever ends it, this stays


def sweep(out: Path, budget: float, dry: bool) -> None:
    """Searches launch values kernel by kernel, each with a quarter of the time that is left, and stores each: those
    furthest from their lower bounds come first and may take long, but not everything.  A dry run tries one small
    interpreted kernel again and again."""
    from dtn_fast.kernels import launch_values, ops, tune
    from dtn_fast.timing import seconds_of

    def tiny() -> tune.Call:
        qkv, scale = torch.randn(1, 16, 3, 1, 32), torch.zeros(1)
        return lambda: [ops.mas_attention_packed(qkv, scale, path="triton")]

    if dry:
        todo = [tune.Case(("mas_small_forward",), {"N": n, "bytes": 4}, tiny) for n in range(16, 1040, 16)]
        timer, name, folder = (lambda make: seconds_of(make())), "rehearsal", out
    else:
        todo = [case._replace(kernels=(kernel,)) for case in tune.cases() for kernel in case.kernels]
        timer, name, folder = tune.measure, torch.cuda.get_device_name(), launch_values.FOLDER
    end = time.monotonic() + budget
    for case in todo:
        share = (end - time.monotonic()) / 4
        if share < 1:
            break
        tune.write(name, tune.search([case], share, timer), folder)


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
        prog="make gpu", description="Test, tune and measure on the GPU at hand, in calls that fit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: make gpu STAGE=\"sweep kernels\" BUDGET=300\n         make gpu-plan MINUTES=15\n\nstages:\n"
        + "\n".join(f"  {name:13s} {s.least:3.0f} to {s.enough:.0f} s  {s.does}" for name, s in STAGES.items()),
    )  # fmt: skip
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="stages; default: all")
    parser.add_argument("--budget", type=positive, default=LIMIT, help=f"seconds for this call ({LIMIT:.0f})")
    parser.add_argument("--out", type=Path, help="folder for results and the log (gpu-results; without a real run "
                        "gpu-results/rehearsal, as its figures are none)")  # fmt: skip
    parser.add_argument("--plan", type=positive, metavar="MINUTES", help="print the commands that fit, and run nothing")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="merge results made elsewhere into the checkout")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on this CPU, to check that stages work")
    parser.add_argument("--rehearse", type=int, metavar="SEED", help="a dry run that kills stages at random moments")
    parser.add_argument("--only", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stages = [name for name in STAGES if name in options.stage]
    dry = options.dry_run or options.rehearse is not None
    options.out = options.out or Path("gpu-results", *(["rehearsal"] if dry else []))
    if options.plan:
        print(*plan(stages, options.plan, results.environment()["commit"]), sep="\n")
        return 0
    if options.collect:
        if not options.collect.is_dir():
            raise UsageError(f"--collect {options.collect}: no such folder; name the one with the results")
        print(*(f"merged into {path}" for path in collect(options.collect)), sep="\n")
        return 0
    if not torch.cuda.is_available() and not dry:
        print("make gpu: torch sees no GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    if options.only:
        alone = {"environment": lambda: environment(dry), "convolutions": lambda: convolutions(options.out, dry),
                 "sweep": lambda: sweep(options.out, options.budget, dry), "sanitizer": small_shapes}  # fmt: skip
        alone[options.only]()
        return 0
    signal.signal(signal.SIGTERM, _terminated)
    print(f"make gpu: {options.budget:.0f} s for {', '.join(allot(stages, options.budget)) or 'no stage'}", flush=True)
    dice = random.Random(options.rehearse) if options.rehearse is not None else None
    summary = run(stages, options.budget, options.out, dry, dice)
    print(f"\nresults in {options.out}:", *sorted(path.name for path in options.out.iterdir()))
    for row in summary:
        print(f"  {row['stage']:13s} {row['seconds']:6.1f} s  {row['state']}; kept: {row['kept'] or 'nothing'}")
    return int(any(str(row["state"]).startswith("failed") for row in summary))


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)  # so that the stage's processes are ended too


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except DtnError as error:
        raise SystemExit(f"make gpu: error: {error}") from None
