"""Running of MNN files, the fastest way measured to run this network in float32 on a CPU (Winograd convolutions)."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.device import choose_threads
from dtn_fast.errors import UsageError
from dtn_fast.model.preprocess import normalise
from dtn_fast.packages import require
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.export_manifest import ExportManifest, read_export_manifest
from dtn_fast.runtime.scorer import COLUMNS, Scorer, outputs_of, side_by_side

BATCH = 8
"""Number of crops that are run at once."""


class MnnScorer(Scorer):
    """Scorer of an .mnn file; calls wait for one another, because each uses all cores."""

    def __init__(self, path: Path, manifest: ExportManifest, threads: int = Runtime.threads) -> None:
        super().__init__(manifest.detector_config(), manifest.notice, "MNN", BATCH)
        self.weights = manifest.weights
        self._net, self._lock = open_module(path, outputs_of(self.config), threads), threading.Lock()

    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        x = normalise(crops, self.config).contiguous().numpy()
        with self._lock:
            return side_by_side(forward(self._net, x))


def forward(net: Any, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Computes the module's outputs on images [B, 3, S, S]; only one call at a time is allowed."""
    expr = package().expr
    out = net.forward([expr.const(images, list(images.shape), expr.NCHW, expr.float)])
    return [part.read().copy() for part in out]  # MNN reuses the memory


def open_module(path: Path, outputs: Sequence[str] = COLUMNS[:1], threads: int = Runtime.threads) -> Any:
    """Loads a module images [B, 3, S, S] -> ``outputs``.  Raises UsageError when MNN is missing or rejects the file."""
    nn = package().nn
    settings = {"backend": "CPU", "precision": "normal", "numThread": choose_threads(threads)}
    manager = nn.create_runtime_manager((settings,))
    try:
        net = nn.load_module_from_file(
            str(path), ["images"], list(outputs), runtime_manager=manager, shape_mutable=True, rearrange=True
        )
    except Exception as error:  # MNN raises bare exceptions
        raise UsageError(f"{path}: MNN cannot read it ({error}); export it again") from error
    return net


@functools.cache
def package() -> Any:
    """Imports the MNN package without showing the line that its library prints."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        require("MNN.expr")
        require("MNN.nn")
        return require("MNN")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def load(path: Path, runtime: Runtime) -> MnnScorer:
    return MnnScorer(path, read_export_manifest(path, "mnn"), runtime.threads)
