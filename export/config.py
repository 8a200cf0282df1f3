"""Settings of every exported file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtn_fast.data.config import Split
from dtn_fast.errors import UsageError


@dataclass(frozen=True)
class RepositoryConfig:
    """How NVIDIA Triton Inference Server runs a model."""

    name: str = "dtn"
    """Name of the model that takes crops; the ensemble that takes encoded pictures is called NAME_encoded."""
    max_batch: int = 64
    """Largest batch that requests are joined to."""
    delay_us: int = 2000
    """Microseconds that a request waits for others to share its batch."""
    instances: int = 1
    """Copies of the model per GPU (or per machine without one)."""

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"--name {self.name}: letters, digits, - and _ only; it becomes a folder")
        if min(self.max_batch, self.instances) < 1 or self.delay_us < 0:
            raise UsageError("--max-batch and --instances: at least 1; --delay-us: at least 0")


Precision = Literal["fp32", "fp16", "bf16"]
Input = Literal["crops", "images"]


@dataclass(frozen=True)
class OnnxConfig:
    """What the file is to be."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of weights and arithmetic; logits and scores are float32 always.  auto: fp16 in an engine, else fp32."""
    input: Input = "crops"
    """crops: uint8 RGB [B, S, S, 3] as cut from a picture, normalised inside; images: float32 [B, 3, S, S], normalised
    outside."""
    nodes: bool = True
    """MAS attention and the gate as dtn:: nodes with a body of standard operators; off: those operators in line."""

    @property
    def dtype(self) -> Precision:
        return "fp32" if self.precision == "auto" else self.precision


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built."""

    batches: tuple[int, int, int] = (1, 8, 64)
    """Least, best and greatest batch size."""
    attention: Literal["native", "plugin", "fastest"] = "native"
    """Of a .engine: TensorRT's own layers, this package's Triton kernels, or what is faster at the best batch size."""
    archs: tuple[int, ...] = ()
    """Of a .rtx file: compute capabilities x 10 that it is compiled for; none: all that compute in its precision."""
    hardware: Literal["this", "same", "ampere+"] = "this"
    """Of a .engine: runs on this GPU model, on any of its compute capability, or on all from Ampere on (slower)."""
    version_compatible: bool = False
    """Of a .engine: later versions of TensorRT may load it."""
    refit: bool = False
    """Of a .engine: its weights may be replaced (--refit-from) without building again."""
    refit_from: Path | None = None
    """An engine built with --refit: put this model's weights into a copy of it instead of building."""
    effort: int = 3
    """Builder optimisation level, 0 (fast build) to 5 (fast engine)."""
    timing_cache: Path | None = None
    """File of measured tactics; default: one per GPU and version in ~/.cache/dtn_fast."""

    def __post_init__(self) -> None:
        low, best, high = self.batches
        if not 1 <= low <= best <= high <= 4096:
            raise UsageError(f"--batches {low} {best} {high}: give least <= best <= greatest, from 1 to 4096")
        if not 0 <= self.effort <= 5:
            raise UsageError(f"--effort {self.effort}: 0 to 5")


Width = Literal["none", "int8", "fp8"]


@dataclass(frozen=True)
class QuantizeConfig:
    """How values are rounded, and how far answers may move."""

    convs: Width = "none"
    """Of the 3x3 convolutions."""
    linears: Width = "none"
    """Of the transformer's products."""
    target: Literal["gpu", "cpu"] = "gpu"
    """What runs INT8: TensorRT, or onnxruntime on a CPU (VNNI or AMX; without them its sums may overflow)."""
    calibrate: Path | None = None
    """Crops written by dtn-fast prepare, or a folder of face pictures: scales come from its train split, the accuracy
    gate from its val split."""
    images: int = 128
    """Crops to calibrate with."""
    keep: tuple[str, ...] = ()
    """Layers, as the sensitivity table names them, that stay as they are."""
    sensitivity: bool = False
    """Also quantise each layer alone and print how far it moves the logits."""
    max_auc_drop: float = 0.005
    """Largest loss of frame AUC on the validation split; more is an error."""
    max_logit_change: float = 1.0
    """Largest change of a logit there; more is an error."""

    @property
    def on(self) -> bool:
        return self.convs != "none" or self.linears != "none"


@dataclass(frozen=True)
class VerifyConfig:
    """How two model files are compared."""

    split: Split = "val"
    """Split of the crops."""
    images: int = 64
    """Number of crops, evenly spaced over the split."""
    layers: bool = False
    """Also compare every convolution and product; checkpoints and ONNX files show them."""
    tolerance: float = 0.01
    """Largest difference of a logit that passes."""
