"""Normalisation of uint8 crops to the network's input."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def normalise(crops: NDArray[np.uint8] | Tensor, config: Any, device: str | torch.device = "cpu") -> Tensor:
    """Normalises uint8 crops [B, S, S, 3] to the network's input: float32 [B, 3, S, S], channels_last."""
    if isinstance(crops, np.ndarray):
        crops = torch.from_numpy(np.require(crops, np.uint8, ["C", "W"]))  # torch refuses read-only memory maps
    x = crops.to(device, non_blocking=True).permute(0, 3, 1, 2)  # a channels_last view
    shift, scale = _constants(config.mean, config.std, x.device)
    return (x.float() - shift) / scale


@functools.lru_cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation times 255 on the device, cached: a copy to the device is not allowed in the capture
    of a CUDA graph, and elsewhere it makes the host wait."""
    with torch.inference_mode(False):
        shift, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (mean, std))
        return shift, scale
