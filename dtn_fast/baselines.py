"""Detectors to compare with, in timm's registry: EfficientViT (Coccomini et al., 2022)."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

HEAD_WIDTH = 64


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, C], 64 channels a head whatever C, projections of Q, K and V without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(heads * HEAD_WIDTH, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EfficientViT(nn.Module):
    """EfficientNet-B0's whole last map as one patch, a class token, six transformer blocks.

    The published code indexes its positions by the image's place in the batch, so that the same image gets different
    logits; here they belong to the tokens.
    """

    def __init__(
        self,
        img_size: int = 224,
        num_classes: int = 2,
        width: int = 1024,
        depth: int = 6,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.15,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        backbone: Any = timm.create_model("efficientnet_b0", pretrained=pretrained, num_classes=0, global_pool="")
        side = -(-img_size // 32)
        self.backbone = backbone
        self.patch = nn.Linear(backbone.num_features * side * side, width)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 2, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout) for _ in range(depth)))
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, num_classes]
        patch = self.patch(self.backbone(images).flatten(1))[:, None]  # [B, 1, C]
        tokens = torch.cat((self.token.expand(len(images), -1, -1), patch), 1) + self.positions
        return self.head(self.blocks(self.dropout(tokens))[:, 0])


default_cfgs = generate_default_cfgs(
    {"efficient_vit.untrained": {"url": "", "num_classes": 2, "input_size": (3, 224, 224), "fixed_input_size": True}}
)


@register_model
def efficient_vit(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """EfficientViT for face forgeries; ``pretrained`` loads its EfficientNet-B0 alone."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return EfficientViT(pretrained=pretrained, **kwargs)
