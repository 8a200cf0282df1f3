"""The transformers that the paper compares with, in timm's registry, each plain, with MAS and with Re-attention.

ViT-B/16, CViT (Wodajo and Atnafu, 2021), EfficientViT and CrossEfficientViT (Coccomini et al., 2022).  The published
code of the last three indexes position embeddings by an image's place in the batch, so that the same image gets
different logits; here each token has its own.  ``table8`` of evaluation/mac_count.py counts the models as the paper
does.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtn_fast.model.backbone import build_backbone
from dtn_fast.model.config import DTNConfig
from dtn_fast.model.detector import Depth
from dtn_fast.model.mas import HeadScale, head_mixer, reattend
from dtn_fast.model.pretrained import EFFICIENTNET, Files, create_model, weights_of
from dtn_fast.model.timm_compat import import_timm

timm = import_timm()

HEAD_WIDTH = 64
Variant = Literal["standard", "mas", "reattention"]
VARIANTS: tuple[Variant, ...] = ("standard", "mas", "reattention")


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, C], projections of Q, K and V without bias.

    Variant mas multiplies each head by a learnable sigmoid, variant reattention mixes attention maps across heads.
    scale: factor of Q K^T, default 1 / sqrt(head_width).
    """

    def __init__(
        self, width: int, heads: int, head_width: int, variant: Variant = "standard", scale: float | None = None
    ) -> None:
        super().__init__()
        self.factor = head_width**-0.5 if scale is None else scale
        inner = heads * head_width
        self.heads, self.head_width = heads, head_width
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.scale: nn.Module = HeadScale(heads, 0.0) if variant == "mas" else nn.Identity()
        self.mix = head_mixer(heads) if variant == "reattention" else None
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        if self.mix is None:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.factor)
        else:
            mixed = reattend(q, k, v, self.mix, self.factor)
        return self.out(self.scale(mixed.transpose(1, 2).flatten(2)))

    def _project(self, x: Tensor) -> Tensor:  # [B, N, C] -> [3, B, H, N, D]
        return self.qkv(x).unflatten(2, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)

    def maps(self, x: Tensor) -> Tensor:
        """The attention maps that weight the values, head scales included: [B, N, C] -> [B, H, N, N]."""
        q, k, _ = self._project(x)
        found = (q @ k.transpose(2, 3) * self.factor).softmax(3)
        if isinstance(self.scale, HeadScale):
            return found * self.scale.head_scale.sigmoid()[:, None, None]
        return found if self.mix is None else self.mix(found)


class CrossAttention(nn.Module):
    """Attention of one query [B, 1, C] to itself and the other branch's tokens [B, N, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.kv = nn.Linear(width, 2 * heads * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(heads * HEAD_WIDTH, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, HEAD_WIDTH)).transpose(1, 2)
        k, v = self.kv(torch.cat((x, context), 1)).unflatten(2, (2, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, variant: Variant, head_width: int = HEAD_WIDTH,
        scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, head_width, variant, scale)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Prepends a class token to the patches and adds position embeddings: [B, N, C] -> [B, N + 1, C]."""

    def __init__(self, patches: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width) * 0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, patches: Tensor) -> Tensor:
        return self.dropout(torch.cat((self.token.expand(len(patches), -1, -1), patches), 1) + self.positions)


class ViT(nn.Module):
    """ViT-B/16 (Dosovitskiy et al., 2021); the last norm is applied to the class token alone."""

    def __init__(
        self, img_size: int = 224, num_classes: int = 2, variant: Variant = "standard", width: int = 768,
        depth: int = 12, heads: int = 12, hidden: int = 3072, patch: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.tokens = Tokens((img_size // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, 0.0, variant, width // heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, num_classes]
        tokens = self.tokens(self.patch(images).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


class CViT(nn.Module):
    """The DTN's convolutions, their whole last map as one patch, six transformer blocks of 8 heads, whose scores are
    divided by the square root of the whole width, as in the published code."""

    def __init__(
        self, img_size: int = 224, num_classes: int = 2, variant: Variant = "standard", width: int = 1024,
        depth: int = 6, heads: int = 8, hidden: int = 2048, config: DTNConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config = config or DTNConfig()
        self.num_classes = num_classes
        self.backbone = build_backbone(config)
        self.patch = nn.Linear(config.channels[-1] * (img_size // 32) ** 2, width)
        self.tokens = Tokens(1, width)
        block = lambda: Block(width, heads, hidden, 0.0, variant, width // heads, width**-0.5)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, num_classes]
        patch = self.patch(self.backbone(images).flatten(1))[:, None]
        return self.head(self.blocks(self.tokens(patch))[:, 0])

    def cam_layers(self) -> dict[Depth, nn.Module]:
        """As a DTN's: the tokens are one patch, which has no map."""
        return {"backbone": self.backbone[-2]}


class EfficientViT(nn.Module):
    """EfficientNet-B0's whole last map as one patch, six transformer blocks."""

    def __init__(
        self, img_size: int = 224, num_classes: int = 2, variant: Variant = "standard", width: int = 1024,
        depth: int = 6, heads: int = 8, hidden: int = 2048, dropout: float = 0.15, pretrained: bool = False,
        weights: Files = MappingProxyType({}),
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        self.backbone = _efficientnet(pretrained, weights)
        side = -(-img_size // 32)
        self.patch = nn.Linear(1280 * side * side, width)
        self.tokens = Tokens(1, width, dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout, variant) for _ in range(depth)))
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, num_classes]
        patch = self.patch(self.backbone(images).flatten(1))[:, None]  # [B, 1, C]
        return self.head(self.blocks(self.tokens(patch))[:, 0])

    def cam_layers(self) -> dict[Depth, nn.Module]:
        """The last map, which is one patch to the blocks."""
        return {"backbone": self.backbone}


class Branch(nn.Module):
    """One branch of a cross transformer: blocks, then a norm."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, dropout: float, variant: Variant) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout, variant) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


class Cross(nn.Module):
    """Cross attention of a branch's class token to the other branch's patches, computed in the other's width."""

    def __init__(self, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(width, other), nn.Linear(other, width)
        self.norm, self.attention = nn.LayerNorm(other), CrossAttention(other, heads)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        return token + self.back(self.attention(self.norm(self.into(token)), patches))


class CrossStage(nn.Module):
    """The blocks of both branches, then two rounds of cross attention of each class token to the other branch."""

    def __init__(self, small: int, large: int, heads: int, hidden: int, dropout: float, variant: Variant) -> None:
        super().__init__()
        self.small = Branch(small, 2, heads, hidden, dropout, variant)
        self.large = Branch(large, 3, heads, hidden, dropout, variant)
        self.to_large = nn.ModuleList(Cross(small, large, heads) for _ in range(2))
        self.to_small = nn.ModuleList(Cross(large, small, heads) for _ in range(2))

    def forward(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        small, large = self.small(small), self.large(large)
        one, many = small[:, :1], large[:, :1]
        for to_large, to_small in zip(self.to_large, self.to_small, strict=True):
            one, many = to_large(one, large[:, 1:]), to_small(many, small[:, 1:])
        return torch.cat((one, small[:, 1:]), 1), torch.cat((many, large[:, 1:]), 1)


class CrossEfficientViT(nn.Module):
    """Two EfficientNet-B0: the last map (1280 channels, 1/32) in a small branch and an early one (24 channels, 1/4) in
    a large branch, each as one patch, joined by cross attention; the two heads' logits are added."""

    def __init__(
        self, img_size: int = 224, num_classes: int = 2, variant: Variant = "standard", small: int = 192,
        large: int = 384, depth: int = 4, heads: int = 8, hidden: int = 2048, dropout: float = 0.15,
        pretrained: bool = False, weights: Files = MappingProxyType({}),
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        self.backbone, self.early = _efficientnet(pretrained, weights), Early(_efficientnet(pretrained, weights))
        side, wide = -(-img_size // 32), -(-img_size // 4)
        self.patch, self.early_patch = nn.Linear(1280 * side**2, small), nn.Linear(24 * wide**2, large)
        self.tokens, self.early_tokens = Tokens(1, small, dropout), Tokens(1, large, dropout)
        self.stages = nn.ModuleList(CrossStage(small, large, heads, hidden, dropout, variant) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(small), nn.Linear(small, num_classes))
        self.early_head = nn.Sequential(nn.LayerNorm(large), nn.Linear(large, num_classes))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, num_classes]
        x = self.tokens(self.patch(self.backbone(images).flatten(1))[:, None])
        y = self.early_tokens(self.early_patch(self.early(images).flatten(1))[:, None])
        for stage in self.stages:
            x, y = stage(x, y)
        return self.head(x[:, 0]) + self.early_head(y[:, 0])

    def cam_layers(self) -> dict[Depth, nn.Module]:
        """The small branch's map, the last one of its network."""
        return {"backbone": self.backbone}

    def classifiers(self) -> list[nn.Module]:
        """Both branches' last layers."""
        return [self.head[-1], self.early_head[-1]]


class Early(nn.Sequential):
    """EfficientNet-B0 up to the blocks of 24 channels, a quarter of the resolution."""

    def __init__(self, whole: Any) -> None:
        super().__init__(whole.conv_stem, whole.bn1, *whole.blocks[:2])


def _efficientnet(pretrained: bool, weights: Files) -> Any:
    return create_model(timm, EFFICIENTNET, pretrained, weights, num_classes=0, global_pool="")


# ------------------------------------------------------------------------------------------------ the registry

FAMILIES: dict[str, type[nn.Module]] = {
    "vit_b16": ViT,
    "cvit": CViT,
    "efficient_vit": EfficientViT,
    "cross_efficient_vit": CrossEfficientViT,
}


def registered(family: str, variant: Variant) -> str:
    """The model's name in timm's registry: ``cvit``, ``cvit_mas``, ``cvit_reattention``."""
    return family if variant == "standard" else f"{family}_{variant}"


default_cfgs = timm.models.generate_default_cfgs({
    f"{registered(family, variant)}.untrained": {
        "url": "", "num_classes": 2, "input_size": (3, 224, 224), "fixed_input_size": True,
    }
    for family in FAMILIES for variant in VARIANTS
})  # fmt: skip


def _entry(family: str, variant: Variant) -> Any:
    kind = FAMILIES[family]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(name, None)
        weights = kwargs.pop("weights", {})
        if pretrained and weights_of(family) == family:
            raise ValueError(f"{registered(family, variant)}: no published weights; leave --pretrained out")
        if pretrained:  # for its EfficientNet alone
            kwargs |= {"pretrained": True, "weights": weights}
        return kind(variant=variant, **kwargs)

    create.__name__ = create.__qualname__ = registered(family, variant)
    create.__doc__ = f"{kind.__doc__} Attention: {variant}."
    return create


for _family in FAMILIES:
    for _variant in VARIANTS:
        timm.models.register_model(_entry(_family, _variant))
