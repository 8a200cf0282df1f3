"""``dtn-fast bench``: runs suites into bench/results, generates tables from them and compares results files.

Also ``python -m dtn_fast.bench.run``, which needs only torch and numpy.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from pathlib import Path

import torch

from dtn_fast.bench import results, roofline
from dtn_fast.bench.machine import Clocks
from dtn_fast.bench.measure import Measurement, lines, measure, seconds
from dtn_fast.bench.tables import write_tables
from dtn_fast.device import choose_precision
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.ranges import positive
from dtn_fast.train.config import Execution
from dtn_fast.train.step import set_backends

WORDS = (*results.SUITES, "faces", "timm", "serve", "server", "roofline", "structure", "tables", "compare")


def run_suite(name: str, folder: Path, machine: roofline.Machine, quick: bool, budget: float) -> Path | None:
    """Measures a suite case by case, storing after each, until ``budget`` seconds are spent.  Ratios are relative to
    the first row of a title, which several cases may have."""
    module = importlib.import_module(f"dtn_fast.bench.bench_{name}")
    env, deadline = results.environment(), time.monotonic() + budget
    rows, bases = list[Measurement](), dict[str, float]()
    notes: dict[str, list[str]] = {}
    path = None
    with Clocks() as clocks:
        for case in module.cases(machine, quick):
            measured = measure(case, 2 if quick else None, bases.get(case.title))
            bases.setdefault(case.title, next(row.median for row in measured if row.contender == case.baseline))
            rows += measured
            notes[case.title] = list(case.notes)
            print(f"\n{case.title}", *lines(measured), *case.notes, sep="\n  ", flush=True)
            if seen := str(clocks):
                env["clocks"] = seen
            path = results.store(folder, name, rows, machine, env, notes)
            del case, measured  # with the memory that its CUDA graphs hold
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            torch.compiler.reset()  # past its limit of recompilations a compiled rival would run eagerly
            if time.monotonic() > deadline:
                print(f"{name}: the budget of {budget:.0f} s is spent; the other cases are not run")
                break
    return path


def structure(folder: Path) -> int:
    """Compiles every shipped kernel for every architecture and stores the report, with the least times that follow from
    machine code; returns the number of problems."""
    import triton

    from dtn_fast.kernels import compile_check, machine_code

    rows = compile_check.check_all(sorted(compile_check.SHARED_LIMIT))
    table = [{**row._asdict(), "occupancy": round(row.occupancy(), 3)} for row in rows]
    least = [{"operator": operator, **one._asdict()} for operator, one in machine_code.predictions()]
    stored = {"triton": triton.__version__, "batch": machine_code.BATCH, "rows": table, "predicted": least}
    results.write_json(folder / results.STRUCTURE, stored)
    problems = [f"sm_{row.arch} {row.kernel} {row.shape}: {p}" for row in rows for p in row.problems()]
    print(f"{len(rows)} configurations, {len(problems)} problems", *problems, sep="\n")
    return len(problems)


def compare(before: Path, after: Path) -> None:
    """Prints the measurements whose quartiles do not overlap."""
    changes = results.moved(before, after)
    for a, b in changes:
        change = f"{seconds(a.median)} -> {seconds(b.median)}"
        print(f"{a.median / b.median:6.2f}x  {a.suite}: {a.case}: {a.contender}  {change}")
    print(f"{len(changes)} measurements changed beyond their quartiles; above 1 is faster in {after}")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["server"]:
        from dtn_fast.bench import server

        return server.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="dtn-fast bench",
        description="Run benchmarks into bench/results, or process the results in it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: dtn-fast bench model train --budget 300\n"
        "Others:  dtn-fast bench roofline --batch 256\n"
        "         dtn-fast bench faces --photos photos\n"
        "         dtn-fast bench serve --model runs/first --requests 10000\n"
        "         dtn-fast bench server http://localhost:8000/dtn\n"
        "         dtn-fast bench compare before.json after.json",
    )
    parser.add_argument("what", nargs="*", help=f"{', '.join(WORDS)}; default: {' '.join(results.SUITES)}")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results (bench/results)")
    parser.add_argument("--budget", type=positive, default=600.0, help="seconds for all suites together")
    parser.add_argument("--face-model", type=Path, help="faces: YuNet's model file; default: fetched once")
    parser.add_argument("--photos", type=Path, help="faces: folder of photographs with truth.json, to measure recall")
    parser.add_argument("--families", nargs="+", default=(), help="timm: families to try again; default: those missing")
    parser.add_argument("--model", type=Path, help="serve: the model to serve")
    parser.add_argument("--requests", type=int, default=10_000, help="serve: requests to send; a tenth are hostile")
    parser.add_argument("--clients", type=int, default=8, help="serve: clients that send at the same time")
    parser.add_argument("--quick", action="store_true", help="few small cases, to check that everything works")
    options, rest = parser.parse_known_args(arguments)
    what = options.what or list(results.SUITES)
    if what[0] == "roofline":
        return roofline.main([*what[1:], *rest])
    if rest:
        parser.error(f"unknown option {rest[0]}")
    if what[0] == "compare":
        if len(what) != 3:
            raise UsageError("compare takes two results files: dtn-fast bench compare before.json after.json")
        compare(Path(what[1]), Path(what[2]))
        return 0
    if "server" in what:
        raise UsageError("server stands alone: dtn-fast bench server http://localhost:8000/dtn")
    if unknown := [word for word in what if word not in WORDS]:
        raise UsageError(f"unknown suite {unknown[0]!r}; known are {', '.join(WORDS)}")
    if "tables" in what and options.out.resolve() != results.FOLDER.resolve():
        raise UsageError(f"--out {options.out}: tables are made of {results.FOLDER} alone; leave tables or --out out")
    if "serve" in what and (options.model is None or min(options.requests, options.clients) < 1):
        raise UsageError("serve needs --model, such as runs/first, and --requests and --clients of at least 1")
    deadline = time.monotonic() + options.budget
    bad = structure(options.out) if "structure" in what else 0
    suites = [name for name in results.SUITES if name in what]
    if suites:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        set_backends(Execution())  # TF32 and cuDNN's search, as in training
        machine = roofline.measure_machine(device, choose_precision("auto", device), options.quick)
        print(machine.ceilings())
        for place, name in enumerate(suites):
            left = max(deadline - time.monotonic(), 1.0) / (len(suites) - place)
            run_suite(name, options.out, machine, options.quick, left)
    if "faces" in what:
        from dtn_fast.bench.faces import write_faces

        print(write_faces(options.out, options.face_model, options.photos, options.quick))
    if "timm" in what:
        from dtn_fast.bench.timm_sweep import sweep

        for row in sweep(options.families, options.out):
            print(*row.values(), sep="  ", flush=True)
    if "serve" in what:
        from dtn_fast.bench.serve import measure_serve

        bad += measure_serve(options.model, options.requests, options.clients, deadline - time.monotonic())
    if "tables" in what:
        write_tables()
    return int(bad > 0)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except DtnError as error:
        raise SystemExit(f"dtn-fast bench: error: {error}") from None
