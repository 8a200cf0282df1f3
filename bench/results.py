"""Results files: one JSON file per machine with measurements and their origin, and the comparison of two files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import Measurement
from dtn_fast.device import cpu_name
from dtn_fast.errors import UsageError
from dtn_fast.files import write_whole
from dtn_fast.provenance import commit

FOLDER = Path(__file__).parent / "results"
STRUCTURE, FACES, TIMM = "structure.json", "faces.json", "timm.json"
"""Files in FOLDER that are no machine's measurements: the compile report, what face finders find, which of timm's
families work."""
SUITES = ("model", "train", "data", "kernels")


def environment() -> dict[str, Any]:
    """Origin of a measurement: hardware, versions, commit and date."""
    gpu = torch.cuda.is_available()
    # a machine that is lent for minutes gets files without their history: make gpu-plan names their commit
    code = os.environ.get("DTN_COMMIT") or commit((".", ":!bench/results", ":!README.md", ":!BENCHMARKS.md"))
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "commit": code,
        "date": datetime.date.today().isoformat(),
    }
    if gpu and shutil.which("nvidia-smi"):
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_name(env: dict[str, Any]) -> str:
    """Name of a results file: <gpu>-<torch>-<cuda>.json, without a GPU <cpu>-<threads>t-<torch>-cpu.json."""
    processor = env["gpu"] or f"{env['cpu']} {env['threads']}t"
    text = f"{processor}-{env['torch'].split('+')[0]}-{env['cuda'] or 'cpu'}"
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") + ".json"


def machine_files(folder: Path) -> list[Path]:
    """The results files of machines in ``folder``."""
    return [path for path in sorted(folder.glob("*.json")) if path.name not in (STRUCTURE, FACES, TIMM)]


def load(path: Path) -> dict[str, Any]:
    """Contents of a results file.  Raises UsageError when ``path`` is not a results file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for suite in data["suites"].values():
            suite["rows"] = [Measurement(**row) for row in suite["rows"]]
        return data
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a results file ({error})") from error


def store(
    folder: Path,
    suite: str,
    rows: list[Measurement],
    machine: Machine,
    env: dict[str, Any],
    notes: dict[str, list[str]],
) -> Path:
    """Writes a suite's rows into the machine's results file atomically.  Other suites in it are kept, and so are the
    suite's other cases if the same commit measured them: one run may be cut off where another was not."""
    path = folder / file_name(env)
    data: dict[str, Any] = load(path) if path.is_file() else {"suites": {}}
    data["machine"] = machine._asdict()
    before = data["suites"].get(suite)
    if before and _origin(before["environment"]) == _origin(env) and _pure(env["commit"]):
        new = {row.case for row in rows}
        rows = [*(row for row in before["rows"] if row.case not in new), *rows]
        notes = {**before["notes"], **notes}
    data["suites"][suite] = {"environment": env, "notes": notes, "rows": rows}
    write_json(path, data)
    return path


def _origin(env: dict[str, Any]) -> dict[str, Any]:
    return {key: env.get(key) for key in ("gpu", "cpu", "threads", "torch", "triton", "cuda", "python", "commit")}


def _pure(commit: str) -> bool:
    """Whether ``commit`` names the code: neither unknown nor with changes beside it."""
    return commit != "unknown" and not commit.endswith("+")


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically, each innermost object or list on one line."""
    text = json.dumps(data, default=_rounded, indent=1)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    write_whole(path, text + "\n")


def _rounded(row: Measurement) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items() if v is not None}


# ------------------------------------------------------------------------------------------------ comparison


def moved(before: Path, after: Path) -> list[tuple[Measurement, Measurement]]:
    """Measurements of two results files whose quartiles do not overlap, largest change first."""
    rows = [
        {(name, row.case, row.contender): row for name, suite in load(path)["suites"].items() for row in suite["rows"]}
        for path in (before, after)
    ]
    pairs = [(row, rows[1][key]) for key, row in rows[0].items() if key in rows[1]]
    apart = [(a, b) for a, b in pairs if a.high < b.low or b.high < a.low]
    return sorted(apart, key=lambda pair: -abs(pair[0].median / pair[1].median - 1))
