"""Training state on disk: written whole or not at all, read back without executing anything."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch

from dtn_fast.errors import UsageError
from dtn_fast.files import write_whole


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers and strings to ``path`` atomically (write, fsync, rename)."""
    write_whole(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote.  Raises UsageError on any other file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: not a training state ({text}); delete it to start over") from error


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Adds a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines written so far; one that was cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_lines(path: Path, epoch: int, step: int = 0) -> None:
    """Leaves the lines before ``step`` of ``epoch``, so that what is done again is recorded once."""
    rows = read_lines(path)
    kept = [row for row in rows if (row["epoch"], row.get("step", math.inf)) < (epoch, step)]
    if path.is_file():
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
