"""A checkpoint to ONNX, checked against torch through onnxruntime."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dtn_fast.errors import DtnError, UsageError
from dtn_fast.kernels.ops import plain_torch
from dtn_fast.pretrained import Detector

OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of a logit that export accepts, relative to the largest logit (at least 1)."""


class Parity(NamedTuple):
    batch: int
    error: float
    """Largest absolute difference between torch's and onnxruntime's logits."""
    scale: float
    """Largest absolute logit, at least 1."""


def export_onnx(model: Detector, path: Path, batches: tuple[int, ...] = (1, 2, 7)) -> list[Parity]:
    """Writes ``model`` (float32, eval) to ``path`` and compares it with torch at each batch size.

    Input ``images`` [batch, 3, S, S] normalised float32, output ``logits`` [batch, 2], batch dynamic, opset 20.  The
    configuration travels as metadata, so the file alone is enough to run.  The file appears only when every
    comparison passed.  Raises UsageError without the onnx packages, DtnError when the answers differ.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed; run: pip install onnx onnxscript onnxruntime") from error
    model = model.cpu().eval()
    images = _noise(model.config, 2, seed=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), plain_torch():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"dtn_config": model.config.to_json(), "notice": model.notice})
    onnx.checker.check_model(proto, full_check=True)
    try:
        onnx.save(proto, partial)
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        report = []
        for batch in batches:
            images = _noise(model.config, batch, seed=batch)
            with torch.inference_mode():
                expected = model(images).numpy()
            gap = float(np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max())
            report.append(Parity(batch, gap, max(1.0, float(np.abs(expected).max()))))
        worst = max(report, key=lambda p: p.error / p.scale)
        if not worst.error <= TOLERANCE * worst.scale:
            raise DtnError(f"{path}: onnxruntime differs from torch by {worst.error:.2e} at batch {worst.batch}, over "
                           f"the limit of {TOLERANCE:.0e}; the file was not kept")  # fmt: skip
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _noise(config: Any, batch: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
