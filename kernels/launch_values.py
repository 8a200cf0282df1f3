"""Launch values (block sizes, warps, stages) per GPU, from tuned/<gpu>.json, then sm<arch>.json, then default.json."""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "tuned"
OPTIONS = ("num_warps", "num_stages")
SIZES = {"T", "POOL"}
"""Bounds of rows by which values differ within one model: its number of positions, and whether a map is pooled."""
SMALL = 128
"""Largest N (tokens) that one attention program holds whole; up to it the backward needs no saved forward values."""

override: dict[str, dict[str, int]] = {}
"""Launch values by kernel, set by the tuner and by tests; they take precedence over every file."""

used: dict[str, dict[str, int]] = {}
"""The values that each kernel was launched with last, for the tuner."""

target: int | None = None
"""Compute capability x 10 (90 for 9.0) whose values are read when compiling without a GPU."""


def settings(kernel: str, like: Tensor, **shape: int) -> tuple[dict[str, int], dict[str, int]]:
    """Options (num_warps, num_stages) and constants (block sizes) of ``kernel`` on the device of ``like``."""
    values = override.get(kernel) or _lookup(kernel, _gpu(like.device), like.element_size(), *sorted(shape.items()))
    used[kernel] = values
    return {k: values[k] for k in OPTIONS}, {k: v for k, v in values.items() if k not in OPTIONS}


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, gpu: tuple[str, int], width: int, *shape: tuple[str, int]) -> dict[str, int]:
    """Values of the first row that fits, in file order; a row's "when" gives upper bounds of shape values and bytes.

    A row measured on this GPU without a bound of ``SIZES`` was measured at other sizes than a family's row that has one
    and fits: a search that its budget ended has found values for large batches alone, or for pooled maps.
    """
    name, capability = gpu
    given = {**dict(shape), "bytes": width}
    found: list[dict[str, Any]] = []
    for file in (f"{name}.json", f"sm{capability}.json", "default.json"):
        fits = (r for r in _read(file).get(kernel, ()) if all(given.get(k, 0) <= b for k, b in _when(r).items()))
        found += itertools.islice(fits, 1)
    if not found:
        raise KeyError(f"{kernel}: no launch values for {given} in {FOLDER / 'default.json'}; add a row there")
    sizes = (SIZES & given.keys()) - _when(found[0]).keys()
    row = next((r for r in found[1:] if sizes & _when(r).keys()), found[0])
    return {k: v for k, v in row.items() if k != "when"}


def _when(row: dict[str, Any]) -> dict[str, int]:
    return row.get("when", {})


@functools.cache
def _read(file: str) -> dict[str, list[dict[str, Any]]]:
    path = FOLDER / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _gpu(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "none", target or 90  # only compiled, or interpreted
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _properties(index: int) -> tuple[str, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return slug(torch.cuda.get_device_name(index)), 10 * major + minor


def slug(name: str) -> str:
    """A GPU's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
