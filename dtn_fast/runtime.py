"""Any model file to one callable, ``score``: uint8 face crops in, P(fake) out, from any thread.

A checkpoint runs in torch here; .onnx, .mnn, .engine (TensorRT) and .rtx (TensorRT-RTX) in the file named after them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.data.shards import Shards
from dtn_fast.detectors import load_detector
from dtn_fast.dtn import DTN
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.fold import fold
from dtn_fast.precision import PRECISIONS, computes_in
from dtn_fast.pretrained import CONFIG, WEIGHTS, Detector, device_of

SUMMARY = "summary.json"
"""In a training run: its generations, and which is best."""
Device = Literal["auto", "cpu", "cuda"]


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


class Scorer(ABC):
    """Scores face crops; what every runtime offers.  Any number of threads may call one."""

    def __init__(self, config: Any, notice: str, name: str, batch_size: int = 64) -> None:
        self.config = config
        """The detector's: image_size, mean, std, num_classes."""
        self.notice = notice
        """What a report of this model must say; empty for nothing."""
        self.name = name
        self.batch_size = batch_size
        """Crops that are run at once."""

    @abstractmethod
    def _logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Logits [B, classes] of 1 to ``batch_size`` crops."""

    def logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Logits of RGB crops [B, S, S, 3] uint8, S = config.image_size: [B, classes].

        Raises UsageError on others, DtnError when a logit is not finite (half-precision overflow).
        """
        side = self.config.image_size
        if crops.dtype != np.uint8 or crops.shape[1:] != (side, side, 3):
            raise UsageError(
                f"{self.name}: got {crops.dtype} {list(crops.shape)}; it takes uint8 [B, {side}, {side}, 3]"
            )
        return self._gather(crops[part] for part in _parts(len(crops), self.batch_size))

    def score(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """P(fake) of the crops: [B]."""
        return probability(self.logits(crops))

    def score_rows(self, shards: Shards, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """P(fake) of the crops ``rows`` without reading them all into memory."""
        return probability(self.logits_rows(shards, rows))

    def logits_rows(self, shards: Shards, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits [n, classes] of the crops ``rows``."""
        return self._gather(shards.get(rows[part]) for part in _parts(len(rows), self.batch_size))

    def _gather(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float64]:
        parts = [self._logits(batch) for batch in batches]
        logits = np.concatenate(parts) if parts else np.zeros((0, self.config.num_classes))
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits)).any(1).sum())
            raise DtnError(
                f"{self.name}: logits of {bad} of {len(logits)} crops are not finite; use a model of higher precision"
            )
        return logits


def probability(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(fake) [B] of logits [B, 2]: softmax(logits)[:, 1]."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers[:, 1] / powers.sum(1)


def _parts(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def normalise(crops: NDArray[np.uint8] | Tensor, config: Any, device: str | torch.device = "cpu") -> Tensor:
    """uint8 crops [B, S, S, 3] to the network's input: float32 [B, 3, S, S], channels_last."""
    if isinstance(crops, np.ndarray):
        crops = torch.from_numpy(np.require(crops, np.uint8, ["C", "W"]))  # torch refuses read-only memory maps
    x = crops.to(device, non_blocking=True).permute(0, 3, 1, 2)  # a channels_last view
    shift, scale = _constants(config.mean, config.std, x.device)
    return (x.float() - shift) / scale


@functools.lru_cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once: a copy to the device inside a CUDA graph's capture is not allowed, and outside one it waits."""
    with torch.inference_mode(False):
        shift, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (mean, std))
        return shift, scale


class TorchScorer(Scorer):
    """A detector, folded, on the device where its weights are; a copy: training changes nothing here."""

    def __init__(self, model: Detector, batch_size: int = 64, runtime: Runtime = Runtime()) -> None:
        super().__init__(model.config, model.notice, "torch", batch_size)
        self.model, self._dtype = model, PRECISIONS[runtime.precision]
        self.folded = frozen(model).to(self._dtype)
        self.device = device_of(self.folded)
        if self.device.type == "cpu" and not computes_in(runtime.precision):
            raise UsageError(f"--precision {runtime.precision}: this processor has no instructions for it and takes "
                             "ten times as long as fp32; leave it out")  # fmt: skip
        mode = runtime.mode
        if mode == "auto":
            mode = "graph" if self.device.type == "cuda" else "eager"
        if mode == "graph" and self.device.type != "cuda":
            raise UsageError("--mode graph: CUDA graphs need a GPU; use --mode eager or compile")
        net, config, device, dtype = self.folded, self.config, self.device, self._dtype
        compiled = torch.compile(net) if mode == "compile" else net
        # a function of its own: one that held this scorer would keep its graphs' memory until a garbage collection
        self._run = lambda crops: compiled(normalise(crops, config, device).to(dtype)).double()
        self._graphs = BatchGraphs(self._run, batch_size) if mode == "graph" else None

    def _logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        batch = torch.from_numpy(np.require(crops, np.uint8, ["C", "W"]))
        with torch.inference_mode():
            return (self._graphs or self._run)(batch).cpu().numpy()


class BatchGraphs:
    """``function`` on a GPU as one CUDA graph per batch size, captured at its first use; one call at a time, all on the
    same stream.

    Sizes are powers of two up to ``largest``: a batch is padded with what lay there before, and its rows cut off.
    """

    def __init__(self, function: Any, largest: int, smallest: int = 1) -> None:
        self._function, self._largest, self._smallest = function, largest, smallest
        self._lock = threading.Lock()
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, batch: Tensor) -> Tensor:
        """``function`` of a host batch [B, ...]; the result is the caller's own."""
        size = min(max(1 << (len(batch) - 1).bit_length(), self._smallest), self._largest)
        with self._lock:
            if size not in self._captured:
                self._captured[size] = self._capture(batch, size)
            graph, given, result = self._captured[size]
            given[: len(batch)].copy_(batch, non_blocking=True)
            graph.replay()
            return result[: len(batch)].clone()

    def _capture(self, batch: Tensor, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = torch.zeros(size, *batch.shape[1:], dtype=batch.dtype, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose and allocate
                self._function(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            result = self._function(given)
        return graph, given, result


def load_scorer(path: Path, runtime: Runtime = Runtime()) -> Scorer:
    """A scorer for ``path``: .onnx, .mnn, .engine, .rtx, a checkpoint folder, or a training run (its best generation).

    Raises UsageError when there is nothing usable, or this machine cannot run it.
    """
    kinds = {".onnx": "onnx_runtime", ".mnn": "mnn_runtime", ".engine": "tensorrt_runtime", ".rtx": "tensorrt_runtime"}
    takes = {".onnx": ("device", "provider"), ".mnn": (), ".engine": (), ".rtx": ()}
    for field in dataclasses.fields(runtime):
        value = getattr(runtime, field.name)
        if value != field.default and field.name not in takes.get(path.suffix, ("device", "precision", "mode")):
            what = f"{path.suffix} file, whose way of running is fixed" if path.suffix in kinds else "checkpoint"
            raise UsageError(f"--{field.name} {value}: not for {path}, a {what}; leave it out")
    if path.suffix in kinds:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        from importlib import import_module

        scorer: Scorer = import_module(f"dtn_fast.{kinds[path.suffix]}").load(path, runtime)
        return scorer
    return TorchScorer(place(load_model(path), choose_device(runtime.device)), runtime=runtime)


def choose_device(device: Device) -> str:
    """cpu or cuda.  Raises UsageError when a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no GPU; use --device cpu")
    return "cuda" if device == "cuda" or (device == "auto" and available) else "cpu"


Model = TypeVar("Model", bound=Detector)


def place(model: Model, device: str | torch.device) -> Model:
    """``model`` moved to ``device``, its convolutions in channels_last."""
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def frozen(model: Detector) -> Detector:
    """A copy for inference alone, where ``model`` is: a DTN folded, any other in eval mode; without gradients."""
    copied: Detector = fold(model) if isinstance(model, DTN) else copy.deepcopy(model).eval().requires_grad_(False)
    return place(copied, device_of(model))


def load_model(path: Path) -> Detector:
    """The detector of a checkpoint folder or of a training run's best generation, in eval mode."""
    if path.is_file() and path.name in (WEIGHTS, CONFIG):
        path = path.parent
    if path.is_file():
        raise UsageError(f"{path}: a file, which does not show its insides; give a run or a checkpoint folder")
    if not path.is_dir():
        raise UsageError(f"{path}: no such checkpoint; give a folder written by dtn-fast train, or a file of export")
    return load_detector(best_checkpoint(path))


def best_checkpoint(run: Path) -> Path:
    """The folder of a run's best generation, or ``run`` itself when it is a checkpoint."""
    if not (run / SUMMARY).is_file():
        return run
    try:
        return run / f"generation-{int(json.loads((run / SUMMARY).read_text(encoding='utf-8'))['best'])}"
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run / SUMMARY}: damaged ({error}); name a generation's folder instead") from error
