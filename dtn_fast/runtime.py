"""A checkpoint or an ONNX file to one callable: face crops in, P(fake) out."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.data.shards import Shards
from dtn_fast.detectors import load_detector, parse_config
from dtn_fast.dtn import DTN
from dtn_fast.errors import UsageError
from dtn_fast.fold import fold
from dtn_fast.pretrained import CONFIG, WEIGHTS, Detector, device_of

SUMMARY = "summary.json"
"""In a training run: its generations, and which is best."""


class Scorer(Protocol):
    """Scores face crops; what every runtime offers."""

    config: Any
    """The detector's: image_size, mean, std, num_classes."""
    notice: str
    """What a report of this model must say; empty for nothing."""
    name: str

    def score(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """P(fake) of RGB crops [B, S, S, 3], S = config.image_size: [B]."""
        ...


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


def _batches(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


class TorchScorer:
    """A detector, folded, in float32, on the device where its weights are; a copy: training changes nothing here."""

    def __init__(self, model: Detector, batch_size: int = 64) -> None:
        self.model, self.config, self.notice, self.name = model, model.config, model.notice, "torch"
        self.folded = frozen(model)
        self.batch_size = batch_size

    def score(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        return self._run([crops[part] for part in _batches(len(crops), self.batch_size)])

    def score_rows(self, shards: Shards, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """P(fake) of the crops ``rows`` without reading them all into memory."""
        return self._run(shards.get(rows[part]) for part in _batches(len(rows), self.batch_size))

    def _run(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float64]:
        device = device_of(self.folded)
        with torch.inference_mode():
            parts = [
                self.folded(normalise(crops, self.config, device)).double().softmax(1)[:, 1].cpu() for crops in batches
            ]
        return torch.cat(parts).numpy() if parts else np.zeros(0)


class OnnxScorer:
    """An ONNX file written by ``dtn-fast export``, through onnxruntime on the CPU."""

    def __init__(self, path: Path, batch_size: int = 64) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UsageError("onnxruntime is not installed; run: pip install onnxruntime") from error
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own classes, one per status
            raise UsageError(f"{path}: onnxruntime cannot read it ({str(error).splitlines()[0]})") from error
        meta = self.session.get_modelmeta().custom_metadata_map
        if "dtn_config" not in meta:
            raise UsageError(f"{path}: an ONNX file, but not one written by dtn-fast export")
        self.config = parse_config(meta["dtn_config"], str(path))
        self.notice, self.name, self.batch_size = meta.get("notice", ""), "onnxruntime", batch_size

    def score(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        parts = []
        for part in _batches(len(crops), self.batch_size):
            logits = torch.from_numpy(
                self.session.run(None, {"images": normalise(crops[part], self.config).numpy()})[0]
            )
            parts.append(logits.double().softmax(1)[:, 1].numpy())
        return np.concatenate(parts) if parts else np.zeros(0)


def load_scorer(path: Path, device: str = "cpu") -> Scorer:
    """A scorer for ``path``: an .onnx file, a checkpoint folder, or a training run (its best generation).

    Raises UsageError when there is nothing usable.
    """
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        return OnnxScorer(path)
    return TorchScorer(place(load_model(path), device))


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
    if not path.is_dir():
        raise UsageError(f"{path}: no such checkpoint; give a folder written by dtn-fast train, or an .onnx file")
    return load_detector(best_checkpoint(path))


def best_checkpoint(run: Path) -> Path:
    """The folder of a run's best generation, or ``run`` itself when it is a checkpoint."""
    if not (run / SUMMARY).is_file():
        return run
    try:
        return run / f"generation-{int(json.loads((run / SUMMARY).read_text(encoding='utf-8'))['best'])}"
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run / SUMMARY}: damaged ({error}); name a generation's folder instead") from error
