"""Settings of every exported file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from dtn_fast.data.config import Split
from dtn_fast.errors import UsageError
from dtn_fast.ranges import Count, Natural, NotNegative, Range, check_ranges
from dtn_fast.runtime.config import Runtime


@dataclass(frozen=True)
class RepositoryConfig:
    """Settings of a model in NVIDIA Triton Inference Server."""

    name: str = "dtn"
    """Name of the model that takes crops; the ensemble that takes encoded pictures is called NAME_encoded."""
    max_batch: Annotated[int, Range(1, 4096)] = 64
    """Largest batch that the server forms from requests."""
    delay_us: Natural = 2000
    """Longest time that a request waits for others to fill its batch, in microseconds."""
    instances: Annotated[int, Range(1, 1024)] = 1
    """Number of copies of the model per GPU (or per machine without one)."""
    backend: Literal["auto", "onnxruntime", "tensorrt", "python"] = "auto"
    """Backend that runs the model; auto: onnxruntime for .onnx, tensorrt for .engine.  python: onnxruntime in the
    server's own Python, for .onnx files and servers without the onnxruntime backend."""
    cpu_threads: Natural = 0
    """Threads of each copy of an .onnx model on a CPU; 0: as many as there are cores."""
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Runtime.provider
    """Execution provider of onnxruntime in the python backend; auto: CUDA on a GPU, if this onnxruntime has it."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"--name {self.name}: use letters, digits, - and _ only; it names a folder")
        if self.provider != Runtime.provider and self.backend != "python":
            raise UsageError(f"--provider {self.provider}: for --backend python alone; leave it out")


Precision = Literal["fp32", "fp16", "bf16"]
Input = Literal["crops", "images"]


@dataclass(frozen=True)
class OnnxConfig:
    """Settings of the ONNX file."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Dtype of weights and arithmetic; logits and scores are always float32.  auto: fp16 for an engine, else fp32."""
    input: Input = "crops"
    """Model input.  crops: uint8 RGB [B, S, S, 3] as cut from a picture, normalised by the model; images: float32
    [B, 3, S, S], already normalised."""
    nodes: bool = True
    """Write MAS attention and the expert gate as dtn:: nodes with standard bodies; off: as plain standard operators."""

    @property
    def dtype(self) -> Precision:
        return "fp32" if self.precision == "auto" else self.precision


@dataclass(frozen=True)
class EngineConfig:
    """Settings for building an engine."""

    batches: Annotated[tuple[int, int, int], Range(1, 4096)] = (1, 8, 64)
    """Smallest, optimum and largest batch size of the engine, which is fastest at the optimum."""
    attention: Literal["native", "plugin", "fastest"] = "native"
    """Layers for MAS attention and the expert gate in a .engine: TensorRT's own (native), this package's Triton kernels
    (plugin), or the faster of the two at the optimum batch size (fastest)."""
    archs: Annotated[tuple[int, ...], Range(50, 999)] = ()
    """Compute capabilities x 10 to compile a .rtx file for, such as 89; default: all that support its precision."""
    hardware: Literal["this", "same", "ampere+"] = "this"
    """GPUs that a .engine runs on: this GPU model, all of its compute capability, or all from Ampere on (slower)."""
    version_compatible: bool = False
    """Let later versions of TensorRT load a .engine."""
    refit: bool = False
    """Make a .engine whose weights can be replaced later (--refit-from) without building again."""
    refit_from: Path | None = None
    """Engine built with --refit: copy it with this model's weights instead of building a new engine."""
    effort: Annotated[int, Range(0, 5)] = 3
    """Builder optimisation level, 0 (fast build) to 5 (fast engine)."""
    timing_cache: Path | None = None
    """File that stores TensorRT's tactic timings; default: one per GPU and TensorRT version in ~/.cache/dtn_fast."""

    def __post_init__(self) -> None:
        check_ranges(self)
        low, best, high = self.batches
        if not low <= best <= high:
            raise UsageError(f"--batches {low} {best} {high}: give smallest <= optimum <= largest")


Width = Literal["none", "int8", "fp8"]


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of quantisation: number formats, calibration and the accuracy check."""

    convs: Width = "none"
    """Number format of the 3x3 convolutions; none: not quantised."""
    linears: Width = "none"
    """Number format of the transformer's matrix products; none: not quantised."""
    target: Literal["gpu", "cpu"] = "gpu"
    """Hardware that runs INT8: gpu (TensorRT) or cpu (onnxruntime; without VNNI or AMX its sums may overflow)."""
    calibrate: Path | None = None
    """Crops written by dtn-fast prepare, or a folder of face pictures: the train split is used for calibration, the val
    split for the accuracy check."""
    images: Count = 128
    """Number of crops to calibrate with."""
    keep: tuple[str, ...] = ()
    """Names of layers, as in the sensitivity table, that are not quantised."""
    sensitivity: bool = False
    """Also quantise each layer alone and print how much the logits change."""
    max_auc_drop: NotNegative = 0.005
    """Largest accepted loss of frame AUC on the validation split; more is an error."""
    max_logit_change: NotNegative = 1.0
    """Largest accepted change of a logit on the validation split; more is an error."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def on(self) -> bool:
        return self.convs != "none" or self.linears != "none"


@dataclass(frozen=True)
class VerifyConfig:
    """Settings for comparing two model files."""

    split: Split = "val"
    """Split that the crops are taken from."""
    images: Count = 64
    """Number of crops, evenly spaced over the split."""
    layers: bool = False
    """Also compare the output of every convolution and matrix product; checkpoints and ONNX files only."""
    tolerance: NotNegative = 0.01
    """Largest accepted difference of a logit."""

    def __post_init__(self) -> None:
        check_ranges(self)
