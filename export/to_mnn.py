"""Exports a model to MNN and compares it with torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dtn_fast.errors import DtnError
from dtn_fast.export.config import OnnxConfig
from dtn_fast.export.to_onnx import BATCHES, Parity, example_inputs, to_proto, weights_hash
from dtn_fast.files import write_whole
from dtn_fast.model.detector import Detector
from dtn_fast.model.preprocess import normalise
from dtn_fast.runtime import mnn
from dtn_fast.runtime.export_manifest import ExportManifest, file_hash
from dtn_fast.runtime.mnn import MnnScorer

TOLERANCE = 2e-3
"""Largest accepted difference of a logit, relative to the largest logit (at least 1).  It comes from Winograd's
transforms and MNN's erf."""
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"
"""Python code that runs MNN's compiled converter.  MNN's own wrapper would install a package and report each conversion
over the network."""


def export_mnn(model: Detector, path: Path, batches: tuple[int, ...] = BATCHES) -> list[Parity]:
    """Writes ``model`` (float32) to ``path`` and its manifest beside it, both only if the logits agree.

    Raises UsageError when MNN is not installed, DtnError when MNN cannot convert the model or its logits differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "model.mnn")
        made.write_bytes(convert(model, str(path)))
        manifest = ExportManifest(
            "mnn",
            importlib.metadata.version("MNN"),
            file_hash(made),
            weights_hash(model),
            "fp32",
            "images",
            json.loads(model.config.to_json()),
            model.notice,
        )
        report = _compare(model, MnnScorer(made, manifest), batches)
        worst = max(report, key=lambda p: p.error / p.scale)
        if not worst.error <= TOLERANCE * worst.scale:
            raise DtnError(f"{path}: MNN differs from torch by {worst.error:.2e} at batch {worst.batch}, over "
                           f"the limit of {TOLERANCE:.0e}; no file was written")  # fmt: skip
        write_whole(path, made.read_bytes())
        manifest.write(path)
    return report


def convert(model: Detector, name: str) -> bytes:
    """MNN file of ``model`` as bytes, input ``images`` float32 [B, 3, S, S], output ``logits``; not yet compared."""
    mnn.package()
    proto = to_proto(model, OnnxConfig("fp32", "images", nodes=False))  # MNN has neither functions nor custom domains
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "model.onnx"), Path(folder, "model.mnn")
        source.write_bytes(proto.SerializeToString())
        command = [sys.executable, "-c", CONVERT, "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(made)]
        done = subprocess.run([*command, "--bizCode", "dtn_fast"], capture_output=True, text=True)
        if done.returncode or not made.is_file():
            tail = " ".join((done.stdout + done.stderr).split())[-300:]
            raise DtnError(f"{name}: MNN cannot convert this model ({tail})")
        return made.read_bytes()


def _compare(model: Detector, scorer: MnnScorer, batches: tuple[int, ...]) -> list[Parity]:
    report = []
    for batch in batches:
        crops = example_inputs(model.config, "crops", batch, seed=batch)
        with torch.inference_mode():
            expected = model(normalise(crops, model.config)).double().numpy()
        gap = float(np.abs(scorer.logits(crops.numpy()) - expected).max())
        report.append(Parity(batch, gap, max(1.0, float(np.abs(expected).max()))))
    return report
