"""Settings for running a model file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtn_fast.device import Device
from dtn_fast.ranges import Natural, NotNegative, check_ranges


@dataclass(frozen=True)
class Runtime:
    """Settings for running a model file.  An engine's device and precision are fixed when it is built."""

    device: Device = "auto"
    """Device for a checkpoint or an ONNX file; auto: the GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of a checkpoint's weights and arithmetic.  bf16 changes a score by about 1e-3 and needs a processor
    with bf16 instructions."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """Execution of a checkpoint: eager, torch.compile, or one CUDA graph per batch size; auto: graph on a GPU, else
    eager."""
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """Execution provider of onnxruntime; auto: chosen by device."""
    runtime: Literal["onnxruntime", "openvino", "auto"] = "onnxruntime"
    """Runtime of an ONNX file; openvino: on a CPU alone.  auto: the faster of those installed that gives onnxruntime's
    answers, by a race of a few seconds that is remembered for this machine and file."""
    threads: Natural = 0
    """Number of CPU threads that the model runs with; for a checkpoint, of the whole process.  0: one per core, within
    the container's CPU quota and OMP_NUM_THREADS."""
    patience: NotNegative = 30.0
    """Seconds to try again when a server (http:// or grpc://) cannot be reached."""

    def __post_init__(self) -> None:
        check_ranges(self)
