"""Heat maps on faces: Grad-CAM, feature maps, and their overlay."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.model.detector import Depth, Detector, as_map, device_of
from dtn_fast.model.dtn import DTN
from dtn_fast.model.hooks import hooked
from dtn_fast.model.preprocess import normalise

COLORS = cv2.COLORMAP_JET
"""Colours of a heat map, from 0 (blue) to 1 (red)."""
OPACITY = 0.5
"""Opacity of a heat map where it is 1."""
NO_EVIDENCE = "no region raises P(fake)"
"""Text on a face whose Grad-CAM is zero everywhere, and reason why a face has no heat map."""
UNEXPLAINED = "no region explains this score"
"""Reason why a face that is not called real, or whose maps lie nearly everywhere, has no heat map."""
NO_MAP = "the model has no feature map for a heat map"
EVEN = 0.9
"""Share of its maximum above which a map lies everywhere, and so shows no region."""
SAME_EVERYWHERE = "the same everywhere"
"""Text on a face whose feature map is constant."""


class Heat(NamedTuple):
    """The heat map of a face, or why it has none."""

    map: NDArray[np.float32] | None
    """[S, S] in [0, 1]; 0 where nothing raises P(fake)."""
    depth: Depth | None
    """Place in the model that the map is from; None without a map."""
    reason: str = ""
    """Why there is no map; empty with one."""


def heat_maps(model: Detector, crops: NDArray[np.uint8]) -> list[Heat]:
    """The Grad-CAM of each crop [B, S, S, 3] at the deepest place of the model where it shows a region.

    The deepest map comes first because it follows the forgery: at the head, where only a mean and a linear layer come
    after it, no map was blank of the fakes that the demo's model calls fake; at the backbone 91 % were (``explain
    --kinds heat-scores``).  The map is that of the class fake, also for a face that is called real.
    """
    maps = list(reversed(grad_cams(model, crops).items())) if model.cam_layers() else []
    found = []
    for row in range(len(crops)):
        own = [(depth, heats[row]) for depth, heats in maps if heats[row].any()]
        reason = NO_MAP if not maps else UNEXPLAINED if own else NO_EVIDENCE
        shown = (Heat(heat, depth) for depth, heat in own if heat.min() < EVEN)
        found.append(next(shown, Heat(None, None, reason)))
    return found


def grad_cam(model: Detector, crops: NDArray[np.uint8], depth: Depth | None = None) -> NDArray[np.float32]:
    """Grad-CAM of the fake logit minus the real one (Selvaraju et al., 2017), [B, S, S] in [0, 1].

    crops: [B, S, S, 3] uint8.  depth: which of the model's ``cam_layers``; None: the first, whose map is the finest.  A
    crop without positive evidence there gives zeros.  Raises ValueError when the model has no such layer.
    """
    depths = (depth,) if depth else tuple(model.cam_layers())[:1]
    return next(iter(grad_cams(model, crops, depths).values()))


def grad_cams(
    model: Detector, crops: NDArray[np.uint8], depths: Sequence[Depth] | None = None
) -> dict[Depth, NDArray[np.float32]]:
    """The maps of :func:`grad_cam` at several depths, from one pass; ``depths`` None: all that the model has."""
    kept: dict[Depth, Tensor] = {}

    def keep(depth: Depth) -> Callable[[object, object, Tensor], Tensor]:
        def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
            kept[depth] = output if kept else output.detach().requires_grad_()  # no gradient goes beyond the first
            return kept[depth].clone()  # which the next layer may overwrite

        return hook

    layers = model.cam_layers()
    depths = tuple(layers) if depths is None else depths
    if not depths or (missing := [depth for depth in depths if depth not in layers]):
        known = ", ".join(layers) or "none"
        raise ValueError(
            f"{type(model).__name__}: no map for Grad-CAM at {missing[0] if depths else 'any depth'}; it has {known}"
        )
    with hooked(model, [(layers[depth], keep(depth)) for depth in depths]), torch.enable_grad():
        logits = model(normalise(crops, model.config, device_of(model)))
        gradients = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), [kept[depth] for depth in depths])
    return {
        depth: _cam(kept[depth].detach(), gradient, crops.shape[1:3])
        for depth, gradient in zip(depths, gradients, strict=True)
    }


def _cam(output: Tensor, gradient: Tensor, size: tuple[int, ...]) -> NDArray[np.float32]:
    gradient, maps = as_map(gradient), as_map(output)
    weights = gradient.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
    cam = (weights * maps).sum(1, keepdim=True).relu()  # [B, 1, h, w]
    cam = F.interpolate(cam, size, mode="bilinear", align_corners=False)[:, 0]
    peak = cam.amax((1, 2), keepdim=True)
    return (cam / peak.clamp_min(torch.finfo(cam.dtype).tiny)).cpu().numpy()


def overlay(crop: NDArray[np.uint8], heat: NDArray[np.float32], blank: str = NO_EVIDENCE) -> NDArray[np.uint8]:
    """Overlays a crop [S, S, 3] with its heat map [S, S] in [0, 1]; where the map is 0 the crop is unchanged.

    blank: text written on the crop when the map is 0 everywhere, so that no reader takes it for a map.
    """
    if not heat.any():
        return _with_text(crop, blank)
    colors = cv2.applyColorMap((heat * 255).astype(np.uint8), COLORS)[:, :, ::-1]
    weight = OPACITY * heat[..., None]
    return (crop * (1 - weight) + colors * weight).round().astype(np.uint8)


def _with_text(crop: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """A crop with ``text`` in white on a dark band at its bottom, in as many lines as it needs."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, max(0.3, crop.shape[1] / 512)
    (width, height), below = cv2.getTextSize(text, font, scale, 1)
    lines = textwrap.wrap(text, int(len(text) * crop.shape[1] / (1.15 * width)))  # 1.15: of wide letters
    step = height + below
    picture = crop.copy()
    band = picture[-(step * len(lines) + below) :]
    band //= 4
    for line, words in enumerate(lines):
        cv2.putText(band, words, (2, step * line + height + below // 2), font, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return picture


def feature_map(model: DTN, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean magnitude over channels of the last block's map, resized to the crops: [B, S, S] in [0, 1]."""
    with hooked(model), torch.inference_mode():
        maps = model.forward_features(normalise(crops, model.config, device_of(model)))
    strength = F.interpolate(maps.abs().mean(1, keepdim=True), crops.shape[1:3], mode="bilinear", align_corners=False)
    low, high = strength.amin((2, 3), keepdim=True), strength.amax((2, 3), keepdim=True)
    spread = (strength - low) / (high - low).clamp_min(torch.finfo(strength.dtype).tiny)
    return spread[:, 0].float().cpu().numpy()
