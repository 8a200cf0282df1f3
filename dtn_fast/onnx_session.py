"""Opening of ONNX files with onnxruntime, on its CPU, CUDA or TensorRT provider."""

from __future__ import annotations

from typing import Any, Literal

from dtn_fast.device import choose_threads
from dtn_fast.errors import UsageError
from dtn_fast.packages import require

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
CPU: Provider = "cpu"
GPU_PACKAGE = "onnxruntime-gpu"


def session_of(
    model: str | bytes,
    name: str,
    provider: Provider = CPU,
    optimise: bool = True,
    threads: int = 0,
    option: str = "--provider",
) -> Any:
    """Opens an onnxruntime session of a file or of serialised bytes.

    optimise: rewrite the graph, which also changes the rounding of quantised values.  threads: number of threads that a
    run on a CPU takes, within what :func:`choose_threads` allows.  Raises UsageError naming ``name``, or the command
    line's ``option`` that chose the provider.
    """
    onnxruntime = require("onnxruntime", "" if provider == CPU else GPU_PACKAGE)
    wanted = PROVIDERS[provider]
    if wanted[0] not in onnxruntime.get_available_providers():
        raise UsageError(
            f"{option} {provider}: this onnxruntime has no {wanted[0]}; run: pip install {GPU_PACKAGE}, "
            f"or use {option} cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of half-precision constants that it cannot fold on a CPU
    options.intra_op_num_threads = choose_threads(threads)
    # its threads would go on spinning for milliseconds after a run, on cores where others decode and find faces
    options.add_session_config_entry("session.force_spinning_stop", "1")
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
