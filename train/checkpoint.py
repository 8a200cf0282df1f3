"""Training state on disk: written atomically, loaded without executing code from the file."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dtn_fast.errors import UsageError
from dtn_fast.files import write_whole


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers and strings to ``path`` atomically (write, fsync, rename)."""
    write_whole(path, lambda file: torch.save(state, file))


def save_centers(path: Path, centers: Tensor) -> None:
    """Writes Ct-c centres [classes, D] to ``path`` as safetensors, atomically."""
    write_whole(path, save({"centers": centers.detach().cpu().contiguous()}))


def load_centers(path: Path) -> Tensor:
    """Reads centres written by :func:`save_centers`.  Raises UsageError on any other file."""
    try:
        return load(path.read_bytes())["centers"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: not Ct-c centres ({error}); --student-centers new starts from new ones") from error


def load_state(path: Path) -> dict[str, Any]:
    """Reads a state written by :func:`save_state`.  Raises UsageError on any other file."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not compare the checksums of its records
                raise ValueError(f"{damaged} has another checksum than when it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: not a training state ({text}); delete it to start over") from error
