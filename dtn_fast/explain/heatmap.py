"""Heat maps on faces: Grad-CAM, feature maps, and their overlay."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.model.detector import Detector, device_of
from dtn_fast.model.dtn import DTN
from dtn_fast.model.hooks import hooked
from dtn_fast.model.preprocess import normalise

COLORS = cv2.COLORMAP_JET
"""Colours of a heat map, from 0 (blue) to 1 (red)."""
OPACITY = 0.5
"""Opacity of a heat map where it is 1."""


def grad_cam(model: Detector, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grad-CAM of the fake logit minus the real one (Selvaraju et al., 2017), [B, S, S] in [0, 1].

    crops: [B, S, S, 3] uint8.  The layer is the model's ``cam_layer``.  A crop without positive evidence gives zeros.
    Raises ValueError when the model has no such layer.
    """
    kept: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        kept.append(output)
        return output.clone()  # which the next layer may overwrite

    layer = model.cam_layer()
    if layer is None:
        raise ValueError(f"{type(model).__name__}: no map for Grad-CAM, its cam_layer() is None")
    with hooked(model, [(layer, keep)]), torch.enable_grad():
        logits = model(normalise(crops, model.config, device_of(model)))
        (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), kept[0])
    weights = gradient.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
    cam = (weights * kept[0].detach()).sum(1, keepdim=True).relu()  # [B, 1, h, w]
    cam = F.interpolate(cam, crops.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    peak = cam.amax((1, 2), keepdim=True)
    return (cam / peak.clamp_min(torch.finfo(cam.dtype).tiny)).cpu().numpy()


def overlay(crop: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Overlays a crop [S, S, 3] with its heat map [S, S] in [0, 1]; where the map is 0 the crop is unchanged."""
    colors = cv2.applyColorMap((heat * 255).astype(np.uint8), COLORS)[:, :, ::-1]
    weight = OPACITY * heat[..., None]
    return (crop * (1 - weight) + colors * weight).round().astype(np.uint8)


def feature_map(model: DTN, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean magnitude over channels of the last block's map, resized to the crops: [B, S, S] in [0, 1]."""
    with hooked(model), torch.inference_mode():
        maps = model.forward_features(normalise(crops, model.config, device_of(model)))
    strength = F.interpolate(maps.abs().mean(1, keepdim=True), crops.shape[1:3], mode="bilinear", align_corners=False)
    low, high = strength.amin((2, 3), keepdim=True), strength.amax((2, 3), keepdim=True)
    spread = (strength - low) / (high - low).clamp_min(torch.finfo(strength.dtype).tiny)
    return spread[:, 0].float().cpu().numpy()
