"""Choice of an ONNX file's runtime on a CPU by a race: the fastest that keeps the answers, remembered."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.dataclass_json import from_json
from dtn_fast.device import choose_threads, cpu_name
from dtn_fast.errors import DtnError, UsageError, tell
from dtn_fast.files import json_text, write_whole
from dtn_fast.runtime import onnx, openvino
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.export_manifest import file_hash
from dtn_fast.runtime.onnx import OnnxScorer
from dtn_fast.runtime.openvino import OpenvinoScorer
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.timing import in_turns
from dtn_fast.version import __version__

RUNTIMES: dict[str, Callable[[Path, Runtime], OnnxScorer | OpenvinoScorer]] = {
    "onnxruntime": onnx.load,
    "openvino": openvino.load,
}
"""Runtimes in a race, each named as its package; answers are compared with the first one's."""
CLOSE = {"exact": 1e-3, "quantised": 5e-2}
"""Largest difference of an output, relative to the larger of 1 and the largest output, that keeps the answers.
Runtimes round a quantised model differently, none nearer to the float32 model than another."""
CROPS, BATCH = 16, 8
"""Number of crops whose answers are compared, and of crops in a call that is timed."""
SECONDS, ROUNDS = 2.0, (3, 30)
"""Time for the timed calls, and the least and largest number of calls of each runtime."""


@dataclass(frozen=True)
class Choice:
    """Result of a race, as stored in the cache folder."""

    file: str
    machine: str
    versions: dict[str, str]
    """Versions of dtn_fast and the runtimes; empty: not installed."""
    runtime: str
    """The runtime that was chosen."""
    milliseconds: dict[str, float]
    """Median time of BATCH crops by each runtime that kept the answers; empty: there was only one."""
    left_out: dict[str, str]
    """Reasons why other runtimes could not be chosen."""

    def __post_init__(self) -> None:
        if self.runtime not in list(RUNTIMES) or not isinstance(self.milliseconds, dict):
            raise ValueError(f"no choice among {', '.join(RUNTIMES)}")

    def times(self) -> str:
        return ", ".join(f"{name} {value} ms" for name, value in self.milliseconds.items())


def load(path: Path, runtime: Runtime) -> Scorer:
    """Opens an ONNX file in the fastest runtime of this machine, onnxruntime where it runs on a GPU.  Raises UsageError
    when none can run the file."""
    if onnx.provider_of(runtime) != "cpu":
        return onnx.load(path, runtime)
    versions = {"dtn_fast": __version__, **{name: _version(name) for name in RUNTIMES}}
    machine = f"{cpu_name()}, {choose_threads(runtime.threads)} threads"
    key = hashlib.sha256(json.dumps([file_hash(path), machine, versions]).encode()).hexdigest()
    where = folder() / f"{key[:32]}.json"
    known = _read(where)
    if known is not None:
        return RUNTIMES[known.runtime](path, runtime)
    scorers, left_out = dict[str, OnnxScorer | OpenvinoScorer](), dict[str, str]()
    for name, open_file in RUNTIMES.items():
        try:
            scorers[name] = open_file(path, runtime)
        except UsageError as error:
            left_out[name] = str(error)
    if not scorers:
        raise UsageError(next(iter(left_out.values())))
    for name, why in other_answers(scorers).items():
        left_out[name] = why
        del scorers[name]
    times = median_milliseconds(scorers) if len(scorers) > 1 else {}
    chosen = min(scorers, key=lambda name: times.get(name, 0.0))
    choice = Choice(path.name, machine, versions, chosen, times, left_out)
    notes = [f"{BATCH} crops take {choice.times()}"] if times else []
    notes += [f"{name} is left out: {why}" for name, why in left_out.items()]
    try:
        write_whole(where, json_text(asdict(choice), indent=1), shared=True)
        notes.append(f"remembered in {where}")
    except OSError as error:
        notes.append(f"not remembered ({error})")
    tell(f"{path}: runs through {chosen}; {'; '.join(notes)}")
    return scorers[chosen]


def other_answers(scorers: Mapping[str, OnnxScorer | OpenvinoScorer]) -> dict[str, str]:
    """Runtimes whose outputs on drawn crops differ from the first one's by more than CLOSE, with the reason."""
    (_, reference), *others = scorers.items()
    crops = drawn_crops(CROPS, reference.config.image_size)
    expected = reference.outputs(crops)
    limit = CLOSE["quantised" if reference.quantized else "exact"]
    found = {}
    for name, scorer in others:
        try:
            gap = np.abs(scorer.outputs(crops) - expected).max(0) / np.maximum(np.abs(expected).max(0), 1)
        except DtnError as error:  # outputs that are not finite
            found[name] = str(error)
            continue
        if not gap.max() <= limit:
            found[name] = f"its outputs differ by {gap.max():.1e}, over {limit:.0e}"
    return found


def median_milliseconds(scorers: Mapping[str, Scorer]) -> dict[str, float]:
    """Median time of BATCH crops by each of the scorers, in turns."""
    crops = drawn_crops(BATCH, next(iter(scorers.values())).config.image_size)
    calls = {name: functools.partial(scorer.outputs, crops) for name, scorer in scorers.items()}
    once = in_turns(calls, 1, 1)
    rounds = int(np.clip(SECONDS / sum(times[0] for times in once.values()), *ROUNDS))
    return {name: round(1e3 * statistics.median(times), 3) for name, times in in_turns(calls, rounds, 0).items()}


def drawn_crops(number: int, side: int) -> NDArray[np.uint8]:
    """Seeded crops [number, side, side, 3] of soft blobs in all colours; on noise a model's P(fake) is often exactly 0
    or 1, in every runtime."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (number, 6, 6, 3), dtype=np.uint8)
    return np.stack([cv2.resize(one, (side, side), interpolation=cv2.INTER_CUBIC) for one in small])


def folder() -> Path:
    """Folder of the remembered choices."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtn_fast" / "runtimes"


def choices() -> list[Choice]:
    """The remembered choices, in the order of their files' names; damaged ones are left out."""
    found = [choice for file in folder().glob("*.json") if (choice := _read(file)) is not None]
    return sorted(found, key=lambda choice: choice.file)


def _read(where: Path) -> Choice | None:
    """A remembered choice; None when there is none, or it is damaged."""
    try:
        return from_json(Choice, where.read_text(encoding="utf-8"), str(where), "")
    except (OSError, UnicodeDecodeError, UsageError):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
