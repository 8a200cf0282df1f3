"""ONNX files written by ``dtn-fast export`` through onnxruntime: on the CPU, on CUDA, or through its TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.detectors import parse_config
from dtn_fast.errors import UsageError
from dtn_fast.runtime import Runtime, Scorer, choose_device, normalise

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
NEEDED = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu"}


def session_of(
    model: str | bytes, name: str, provider: str = "cpu", optimise: bool = True, outputs: bool = False
) -> Any:
    """An onnxruntime session of a file or of serialized bytes.  ``optimise``: rewrite the graph, which also changes how
    quantised values round.  Raises UsageError naming ``name``."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"onnxruntime is not installed; run: pip install {NEEDED[provider]}") from error
    wanted = PROVIDERS[provider]
    if wanted[0] not in onnxruntime.get_available_providers():
        raise UsageError(
            f"--provider {provider}: this onnxruntime has no {wanted[0]}; run: pip install {NEEDED[provider]}, "
            "or use --provider cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of half-precision constants that it cannot fold on a CPU
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model, options, providers=wanted)
    except Exception as error:  # onnxruntime raises its own classes, one per status
        raise UsageError(f"{name}: onnxruntime cannot run it here ({str(error).splitlines()[0][:300]})") from error
    if session.get_providers()[0] != wanted[0]:
        raise UsageError(f"{name}: onnxruntime fell back from {wanted[0]} to {session.get_providers()[0]}; "
                         "its CUDA or TensorRT libraries are missing")  # fmt: skip
    return session


class OnnxScorer(Scorer):
    """An ONNX file; sessions may be run from any thread."""

    def __init__(self, path: Path, provider: str = "cpu", batch_size: int = 64, optimise: bool = True) -> None:
        self.session = session_of(str(path), str(path), provider, optimise)
        meta = self.session.get_modelmeta().custom_metadata_map
        if "dtn_config" not in meta:
            raise UsageError(f"{path}: an ONNX file, but not one written by dtn-fast export")
        name = "onnxruntime" + ("" if provider == "cpu" else f" {provider}")
        super().__init__(parse_config(meta["dtn_config"], str(path)), meta.get("notice", ""), name, batch_size)
        self.input = self.session.get_inputs()[0].name
        self.weights = meta.get("weights", "")

    def _logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        x = crops if self.input == "crops" else normalise(crops, self.config).numpy()
        return self.session.run(["logits"], {self.input: np.ascontiguousarray(x)})[0].astype(np.float64)


def load(path: Path, runtime: Runtime) -> OnnxScorer:
    provider = runtime.provider
    if provider == "auto":
        import onnxruntime

        gpu = choose_device(runtime.device) == "cuda"
        has = PROVIDERS["cuda"][0] in onnxruntime.get_available_providers()
        provider = "cuda" if gpu and (has or runtime.device == "cuda") else "cpu"
    return OnnxScorer(path, provider)
