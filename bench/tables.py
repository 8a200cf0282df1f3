"""BENCHMARKS.md, its plots and README's table, made of the results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import Measurement, seconds
from dtn_fast.bench.results import FOLDER, STRUCTURE, SUITES, load
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.plotting import drawing, svg_text
from dtn_fast.files import write_whole

REPOSITORY = FOLDER.resolve().parent.parent
NOT_RUN = "not run"


# ------------------------------------------------------------------------------------------------ tables


def markdown(rows: Iterable[Measurement]) -> str:
    """The figures of one case as a table; this project's own row is in bold."""
    rows = list(rows)
    columns = {
        "p99": [seconds(r.p99) if r.p99 else "" for r in rows],
        "images/s": [f"{r.images_per_second:,.0f}" if r.images_per_second else "" for r in rows],
        "TFLOP/s": [f"{r.tflops:.2f}" if r.tflops else "" for r in rows],
        "GB/s": [f"{r.gbytes:,.0f}" if r.gbytes else "" for r in rows],
        "of the lower bound": [f"{r.share:.0%}" if r.share else "" for r in rows],
        "error": [f"{r.error:.1e}" if r.error is not None else "" for r in rows],
        "peak MiB": [f"{r.peak_mib:,.0f}" if r.peak_mib else "" for r in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    out = ["| | time | quartiles | ratio | " + " | ".join(columns) + " |", "|---" * (4 + len(columns)) + "|"]
    for place, r in enumerate(rows):
        name = f"**{r.contender}**" if r.ours else r.contender
        cells = [name, seconds(r.median), f"{seconds(r.low)} - {seconds(r.high)}", f"{r.ratio:.2f}x"]
        out.append("| " + " | ".join([*cells, *(cells_of[place] for cells_of in columns.values())]) + " |")
    return "\n".join(out)


def by_case(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    cases: dict[str, list[Measurement]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


INTRODUCTION = """Made by `dtn-fast bench tables` from `bench/results/`; do not edit.  The contenders of a table ran in
turns in one process; times are medians, ratios are to the row at 1.00x, bold is this project's own way.  "Of the
lower bound" is the least possible time by the roofline over the measured one."""
STRUCTURE_NOTE = """Compiled ahead of time with Triton {triton}; no GPU needed.  Every shipped configuration is in
`bench/results/structure.json`; these are the paper model's.  Occupancy is the share of a multiprocessor's warps that
registers and shared memory leave room for."""


def benchmarks_page(folder: Path = FOLDER) -> str:
    """BENCHMARKS.md: every committed figure, and what was not run."""
    files = {path: load(path) for path in sorted(folder.glob("*.json")) if path.name != STRUCTURE}
    out = ["# Benchmarks", "", INTRODUCTION]
    if not any(data["machine"]["name"].startswith("NVIDIA") for data in files.values()):
        out += ["", f"**GPU: {NOT_RUN}.** `make gpu` on a machine with one fills this page."]
    drawn = plots(folder)
    for path, data in files.items():
        machine = Machine(**data["machine"])
        out += ["", f"## {machine.name}", "", f"Measured ceilings: {machine.ceilings().partition(': ')[2]}."]
        if (picture := path.with_suffix(".svg")) in drawn:
            out += ["", f"![images/s of the model and of training](bench/results/{picture.name})"]
        for name in [*SUITES, *sorted(set(data["suites"]) - set(SUITES))]:
            suite = data["suites"].get(name)
            out += ["", f"### {name}"]
            if suite is None:
                out += ["", NOT_RUN]
                continue
            env = suite["environment"]
            parts = [f"torch {env['torch']}", f"triton {env['triton']}"]
            parts += [f"CUDA {env['cuda']}"] if env["cuda"] else []
            out += ["", f"{', '.join(parts)}, commit {env['commit']}, {env['date']}."]
            for case, rows in by_case(suite["rows"]).items():
                out += ["", f"**{case}**", "", markdown(rows)]
                out += ["", *(f"{note}." for note in suite.get("notes", {}).get(case, []))]
    out += ["", "## Structure of the kernels", "", *structure_table(folder)]
    return "\n".join(out).rstrip().replace("\n\n\n", "\n\n") + "\n"


def structure_table(folder: Path) -> list[str]:
    """The committed ahead-of-time report, the model's own shapes."""
    path = folder / STRUCTURE
    if not path.is_file():
        return [NOT_RUN]
    data = json.loads(path.read_text(encoding="utf-8"))
    names = ["arch", "kernel", "shape", "warps", "registers", "spilled bytes", "shared KiB", "tensor-core instructions"]
    out = [STRUCTURE_NOTE.format(triton=data["triton"]), "", f"| {' | '.join(names)} | occupancy |", "|---" * 9 + "|"]
    for r in data["rows"]:
        if r["shape"] in ("N=64 D=64", "E=2 M=128 C=512") and r["dtype"] == "bfloat16":
            cells = [r["arch"], r["kernel"], r["shape"], r["warps"], r["registers"], r["spill"]]
            cells += [f"{r['shared'] / 1024:.1f}", r["tensor_core"], f"{r['occupancy']:.0%}"]
            out.append(f"| {' | '.join(map(str, cells))} |")
    return out


BEGIN, END = "<!-- made by dtn-fast bench tables -->", "<!-- end -->"


def readme_table(folder: Path = FOLDER) -> str:
    """README's figures: the best of each kind, by machine."""
    out = ["| measured | what | images/s | against | ratio |", "|---|---|---|---|---|"]
    gpu = False
    for path in sorted(folder.glob("*.json")):
        if path.name == STRUCTURE:
            continue
        data = load(path)
        gpu |= data["machine"]["name"].startswith("NVIDIA")
        for name in ("model", "train", "data"):
            rows = data["suites"].get(name, {}).get("rows", [])
            for case, group in by_case(rows).items():
                # of a model, whichever of this project's files is fastest
                mine = max(group, key=lambda r: r.ratio) if name == "model" else next(r for r in group if r.ours)
                base = next(r for r in group if r.ratio == 1.0)
                if mine.images_per_second and mine is not base and not case.startswith("timm"):
                    cells = [data["machine"]["name"], f"{case}: {mine.contender}", f"{mine.images_per_second:,.0f}"]
                    out.append(f"| {' | '.join([*cells, base.contender, f'{mine.ratio:.2f}x'])} |")
    if not gpu:
        out.append(f"| one NVIDIA GPU | everything | {NOT_RUN} | | |")
    return "\n".join(out)


def plot(data: dict[str, Any], path: Path) -> None:
    """Bars of a machine's model and training figures, the baseline of each case at 1; the same bytes each time."""
    suites = (data["suites"].get(name, {}).get("rows", []) for name in ("model", "train"))
    cases = {case: rows for rows in suites for case, rows in by_case(rows).items() if not case.startswith("timm")}
    heights = [len(rows) + 1.2 for rows in cases.values()]
    with drawing({"font.size": 8, "svg.fonttype": "path"}) as Figure:
        figure = Figure(figsize=(8, 0.28 * sum(heights)))
        axes = figure.subplots(len(cases), 1, height_ratios=heights, squeeze=False)
        for axis, (case, rows) in zip(axes[:, 0], cases.items(), strict=True):
            colors = ["tab:green" if row.ours else "0.75" for row in rows]
            bars = axis.barh([row.contender for row in rows], [row.ratio for row in rows], color=colors)
            axis.bar_label(bars, [f"{row.ratio:.2f}x, {row.images_per_second:,.0f}/s" for row in rows], padding=3)
            axis.set_title(case, loc="left", fontsize=8)
            axis.set_xlim(0, 1.35 * max(row.ratio for row in rows))
            axis.invert_yaxis()
            axis.xaxis.set_visible(False)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
        figure.tight_layout()
        write_whole(path, svg_text(figure))


def plots(folder: Path = FOLDER) -> dict[Path, dict[str, Any]]:
    """The plot of each machine with figures to draw, and its data."""
    files = {path: load(path) for path in sorted(folder.glob("*.json")) if path.name != STRUCTURE}
    drawn = {path.with_suffix(".svg"): data for path, data in files.items()}
    return {path: data for path, data in drawn.items() if {"model", "train"} & set(data["suites"])}


def write_tables(repository: Path = REPOSITORY, folder: Path = FOLDER) -> None:
    """Makes BENCHMARKS.md, its plots and README's table again.  Raises UsageError when README has lost its markers."""
    readme = repository / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UsageError(f"{readme}: the markers {BEGIN} and {END} are missing")
    head, rest = text.split(BEGIN, 1)
    readme.write_text(f"{head}{BEGIN}\n{readme_table(folder)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    for path, data in plots(folder).items():
        plot(data, path)
    (repository / "BENCHMARKS.md").write_text(benchmarks_page(folder), encoding="utf-8")
