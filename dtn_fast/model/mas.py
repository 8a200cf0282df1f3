"""MAS for other transformers (a learnable scale on every head of any timm ViT), and Re-attention for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtn_fast.model.config import DTNConfig


class HeadScale(nn.Module):
    """Multiplies each head's channels by sigmoid(head_scale) (MAS, Eq. 20): [..., H D] -> [..., H D]."""

    def __init__(self, heads: int, mas_init: float) -> None:
        super().__init__()
        self.head_scale = nn.Parameter(torch.full((heads,), mas_init))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.head_scale.sigmoid().to(x.dtype)
        return (x.unflatten(-1, (len(gates), -1)) * gates[:, None]).flatten(-2)


def with_mas(model: nn.Module, mas_init: float = DTNConfig.mas_init) -> nn.Module:
    """Adds a learnable scale to every attention head of a timm transformer, in place, and returns the transformer.

    The scales start at sigmoid(``mas_init``) and the projection after them is divided by it, so that the outputs are
    unchanged up to rounding, and exactly at the default.  Raises ValueError when no module has heads and a linear
    projection of them (timm's ``num_heads`` and ``proj``), or the model has head scales already.
    """
    if any(isinstance(module, HeadScale) for module in model.modules()):
        raise ValueError(f"{type(model).__name__}: has head scales already")
    found = 0
    for module in list(model.modules()):
        heads, proj = getattr(module, "num_heads", None), getattr(module, "proj", None)
        if isinstance(heads, int) and isinstance(proj, nn.Linear) and proj.in_features % heads == 0:
            scale = HeadScale(heads, mas_init).to(proj.weight)
            with torch.no_grad():
                proj.weight /= scale.head_scale.sigmoid()[0]
            module.proj = nn.Sequential(scale, proj)
            found += 1
    if not found:
        raise ValueError(f"{type(model).__name__}: no attention with heads and a linear projection of them")
    return model


def head_mixer(heads: int) -> nn.Sequential:
    """Re-attention's mixture of attention maps [B, H, N, N] across heads: a 1x1 convolution, then BN (DeepViT, Zhou et
    al., 2021)."""
    return nn.Sequential(nn.Conv2d(heads, heads, 1), nn.BatchNorm2d(heads))


def reattend(q: Tensor, k: Tensor, v: Tensor, mix: nn.Module, scale: float) -> Tensor:
    """Attention with maps mixed across heads by ``mix``: q, k, v [B, H, N, D] -> [B, H, N, D]."""
    return mix((q @ k.transpose(2, 3) * scale).softmax(3)) @ v
