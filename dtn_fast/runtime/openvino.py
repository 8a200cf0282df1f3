"""Running of ONNX files from ``dtn-fast export`` with OpenVINO, on a CPU."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.device import choose_threads
from dtn_fast.errors import UsageError, reason
from dtn_fast.model.preprocess import normalise
from dtn_fast.packages import require
from dtn_fast.runtime.clips import OnnxClips
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.onnx import detector_config
from dtn_fast.runtime.scorer import BATCH, COLUMNS, Scorer, side_by_side


class OpenvinoScorer(Scorer):
    """Scorer of an ONNX file; calls wait for one another, because each uses all threads."""

    def __init__(self, path: Path, threads: int = Runtime.threads) -> None:
        proto = read(path.read_bytes(), str(path))
        meta = {entry.key: entry.value for entry in proto.metadata_props}
        super().__init__(detector_config(meta, str(path)), meta.get("notice", ""), "OpenVINO", BATCH)
        self.quantized = meta.get("quantized", "")
        self.weights = meta.get("weights", "")
        self._input, outputs = proto.graph.input[0].name, {output.name for output in proto.graph.output}
        self._names = [name for name in COLUMNS if name in outputs]
        if self.config.clip:
            self.clips = OnnxClips(path, self.weights, threads)
        self._request, self._lock = request_of(proto, str(path), threads), threading.Lock()

    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        x = crops if self._input == "crops" else normalise(crops, self.config).numpy()
        with self._lock:
            found = self._request.infer({self._input: np.ascontiguousarray(x)})
            return side_by_side(found[name] for name in self._names)


def read(model: bytes, name: str) -> Any:
    """The onnx.ModelProto of a serialised model, its dtn:: nodes replaced by their bodies, because OpenVINO reads no
    functions.  Raises UsageError naming ``name`` when the bytes are no ONNX model."""
    onnx, inliner = require("onnx"), require("onnx.inliner")
    try:
        return inliner.inline_local_functions(onnx.load_model_from_string(model))
    except Exception as error:  # of protobuf's implementations, each with its own classes
        raise UsageError(f"{name}: not an ONNX file ({reason(error)[:300]})") from error


def request_of(proto: Any, name: str, threads: int = Runtime.threads) -> Any:
    """Compiles a model of :func:`read` for the CPU: an infer request, for one thread at a time.  Raises UsageError.

    Arithmetic is float32, and INT8 in quantised layers: by itself OpenVINO computes in bfloat16 on processors that have
    it, which moves logits by hundredths.  Threads are not bound to cores, which they share with decoding, face finding
    and other processes.
    """
    openvino = package()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": choose_threads(threads), "ENABLE_CPU_PINNING": False}  # fmt: skip
    core = openvino.Core()
    try:
        return core.compile_model(core.read_model(proto.SerializeToString()), "CPU", settings).create_infer_request()
    except RuntimeError as error:
        raise UsageError(f"{name}: OpenVINO cannot run it here ({reason(error)[:300]})") from error


def package() -> Any:
    """Imports OpenVINO without its telemetry, which gives the user a number in ~/intel and reports each import over the
    network, unasked; OpenVINO does without it where its package cannot be imported."""
    telemetry = "openvino_telemetry"
    if "openvino" in sys.modules or telemetry in sys.modules:  # imported by another part of the program
        return require("openvino")
    sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        return require("openvino")
    finally:
        del sys.modules[telemetry]


def load(path: Path, runtime: Runtime) -> OpenvinoScorer:
    """Opens an ONNX file.  Raises UsageError when it cannot be used here, or a GPU is asked for."""
    for option in ("device", "provider"):
        if (value := getattr(runtime, option)) not in ("auto", "cpu"):
            raise UsageError(f"--{option} {value}: OpenVINO runs on a CPU here; use --runtime onnxruntime")
    return OpenvinoScorer(path, runtime.threads)
