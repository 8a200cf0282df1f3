"""How a model file runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtn_fast.device import Device


@dataclass(frozen=True)
class Runtime:
    """How a model file runs.  An engine's device and precision are fixed when it is built."""

    device: Device = "auto"
    """Of a checkpoint or an ONNX file; auto: the GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of a checkpoint's weights and arithmetic.  bf16 moves a score by some 1e-3 and needs a processor that has it."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """Of a checkpoint: eager, torch.compile, or one CUDA graph per batch size; auto: graph on a GPU, else eager."""
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """onnxruntime's execution provider; auto: by device."""
