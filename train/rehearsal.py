"""A rehearsal of a timm model, on a copy before the first step, so that what cannot train is refused in one line."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dtn_fast.errors import UsageError
from dtn_fast.model.build import build_detector, own_size
from dtn_fast.model.detector import Detector
from dtn_fast.model.preprocess import normalise
from dtn_fast.train.step import TrainStep

ENOUGH = 2
"""Number of images in a rehearsal of any larger part: only a single one is a case of its own, for BN."""


def rehearse(step: TrainStep, crops: NDArray[np.uint8]) -> None:
    """Raises UsageError, with cause and remedy, when a timm model cannot train on crops [B, S, S, 3] or score one.

    Weights, BN statistics and random numbers stay as they are.
    """
    model = step.model
    if not (reason := _obstacle(step, model, crops, step.channels_last)):
        return
    name, side, own = model.config.timm, model.config.image_size, own_size(model.config.timm)
    if len(crops) == 1 and not _obstacle(step, model, crops.repeat(2, 0), step.channels_last):
        remedy = "raise --batch-size or lower --accumulate"
    elif step.channels_last and not _obstacle(step, model, crops, False):
        remedy = "give --no-channels-last"
    elif own != side and not _obstacle_at(step, model, crops, own):
        remedy = f"prepare the crops with --size {own}"
    else:
        remedy = "choose another model"
    raise UsageError(f"{name}: cannot train on crops of {side} pixels, {len(crops)} at once ({reason}); {remedy}")


def _obstacle_at(step: TrainStep, model: Detector, crops: NDArray[np.uint8], side: int) -> str:
    """The obstacle for the same model made for crops of another side."""
    with torch.random.fork_rng([]):
        other = build_detector(dataclasses.replace(model.config, image_size=side)).to(step.device)
    return _obstacle(step, other, np.resize(crops, (len(crops), side, side, 3)), step.channels_last)


def _obstacle(step: TrainStep, model: Detector, crops: NDArray[np.uint8], channels_last: bool) -> str:
    """What a copy of ``model`` stumbles over in training and scoring; empty: nothing."""
    device, classes = step.device, model.config.num_classes
    images = normalise(crops, model.config, device)
    if not channels_last:
        images = images.contiguous()
    elif device.type == "cpu" and any(map(_destroys_memory, model.modules())):
        return "on a CPU, torch's backward of its strided 1x1 convolution of few channels writes past its memory"
    kind = torch.channels_last if channels_last else torch.contiguous_format
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            tried = copy.deepcopy(model).to(memory_format=kind)  # type: ignore[call-overload]
            with torch.autocast(device.type, step.dtype, enabled=step.dtype != torch.float32):
                logits = tried.train()(images)
            if found := _unlike(logits, len(crops), classes):
                return found
            F.cross_entropy(logits.float(), torch.zeros(len(crops), dtype=torch.long, device=device)).backward()
            with torch.inference_mode():
                return _unlike(tried.eval()(images[:1]), 1, classes)
    except Exception as error:  # a timm model may raise anything
        return str(error).strip().partition("\n")[0] or type(error).__name__


def _destroys_memory(layer: nn.Module) -> bool:
    """Whether a layer's backward in channels_last on a CPU ends the process, or gives wrong gradients (torch 2.13)."""
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.stride == (1, 1):
        return False
    return layer.groups == 1 and layer.in_channels < 16  # seen with 3, 4, 7 and 8 channels, not with 16


def _unlike(logits: object, batch: int, classes: int) -> str:
    """How the output differs from finite logits [batch, classes]; empty: it does not."""
    got = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if not isinstance(logits, Tensor) or logits.shape != (batch, classes):
        return f"it gives {got}, not logits [{batch}, {classes}]"
    return "" if logits.isfinite().all() else "its logits are not finite"
