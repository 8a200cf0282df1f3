"""The mask head: a map of the forged pixels beside the logits, which it leaves alone.

A feature pyramid of two levels, a deep map and a finer one (Lin et al., 2017), added at the mask's size as in its
segmentation branch (Kirillov et al., 2019), here without norms, so that nothing is left to fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.model.config import MASK_STRIDE
from dtn_fast.model.detector import Detector, as_map

WIDTH = 64
"""Channels of the mask head; 0.26 % of the paper's parameters."""


class MaskHead(nn.Module):
    """Maps [B, C, h, w] or tokens [B, N, C] of the widths C -> logits [B, H, W] of a pixel's being forged.

    Its initial weights are drawn without moving torch's generator, so that all others are those of the model without
    it.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(torch.initial_seed())
            self.project = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in widths)
            self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            self.out = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        found = [F.interpolate(project(as_map(x)), size, mode="bilinear", align_corners=False)
                 for project, x in zip(self.project, maps, strict=True)]  # fmt: skip
        return self.out(self.mix(torch.stack(found).sum(0).relu()).relu()).squeeze(1)


class Tap:
    """Runs a network and, on the maps of its detector's ``mask_layers``, the detector's mask head."""

    def __init__(self, detector: Detector) -> None:
        self._head, self._kept = detector.mask_head, list[Tensor]()
        self._on = [False]  # hooks of a copied layer must do nothing, and know neither network nor tap
        for layer in detector.mask_layers():
            layer.register_forward_hook(_keeper(self._kept, self._on))

    def __call__(self, net: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] -> the output of ``net``, and mask logits [B, S / 8, S / 8]."""
        assert self._head is not None
        self._kept.clear()
        self._on[0] = True
        output = net(images)
        self._on[0] = False
        height, width = (side // MASK_STRIDE for side in images.shape[-2:])
        mask = self._head(list(self._kept), (height, width))
        self._kept.clear()
        return output, mask


def _keeper(kept: list[Tensor], on: list[bool]) -> Callable[[nn.Module, object, Tensor], None]:
    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if on[0]:
            kept.append(output.clone())  # the next layer may overwrite it

    return keep


class WithMask(nn.Module):
    """A network around a detector with a mask head: images [B, 3, S, S] -> its output, and mask logits [B, h, w]."""

    def __init__(self, net: nn.Module, detector: Detector) -> None:
        super().__init__()
        self.net, self._tap = net, Tap(detector)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._tap(self.net, images)
