"""Folding of a trained DTN's constants into the weights beside them, for inference and for a frozen teacher.

BN is folded into the neighbouring convolution or product, 1/sqrt(d) into W_q, sigmoid(head_scale) into the columns of
W_O, so that MAS costs nothing, and the MLP's two BNs into its first product.  Two constants are not folded because that
would not be exact: W_O's bias before the depthwise convolution, which pads with zeros, and the experts' scales, which
lie between a sigmoid and a maximum (E multiplications per position).
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.kernels.ops import mas_attention_packed
from dtn_fast.model.adapt import merged
from dtn_fast.model.backbone import Backbone
from dtn_fast.model.detector import Detector, device_of, move_to
from dtn_fast.model.dtn import DTN
from dtn_fast.model.levt import LEVTBlock
from dtn_fast.model.mas import reattend
from dtn_fast.model.moe_gate import OPEN
from dtn_fast.model.state_space import StateSpace

AttentionPath = Literal["native", "kernel"]


class FoldedDTN(DTN):
    """A DTN for inference alone: same inputs, same logits up to rounding, no BN and no head scales."""

    def __init__(self, model: DTN, attention: AttentionPath) -> None:
        nn.Module.__init__(self)  # not DTN's: the layers come from ``model``
        self.config, self.notice, self.novelty = model.config, model.notice, model.novelty
        self.temporal = None  # it takes the outputs of the others
        self.num_classes, self.num_features, self.global_pool = model.num_classes, model.num_features, model.global_pool
        self.in_chans = model.in_chans
        vgg = isinstance(model.backbone, Backbone)
        self.backbone: nn.Sequential = _fold_backbone(model.backbone) if vgg else copy.deepcopy(model.backbone)
        self.gate = copy.deepcopy(model.gate)
        self.pos_embed = copy.deepcopy(model.pos_embed)
        self.blocks = nn.Sequential(*(FoldedBlock(block, attention) for block in model.blocks))  # type: ignore[arg-type]
        self.head = copy.deepcopy(model.head)
        self.mask_head = copy.deepcopy(model.mask_head)

    def save_pretrained(self, folder: object) -> None:
        raise TypeError("a folded model is not a checkpoint; save the model that it was folded from")


class FoldedBlock(nn.Module):
    """An LEVT block as two products around attention, or a state space, a depthwise convolution and two products."""

    open_heads: Tensor

    def __init__(self, block: LEVTBlock, attention: AttentionPath) -> None:
        super().__init__()
        source = block.attention
        self.local: nn.Module = nn.Identity()
        if isinstance(block.local, nn.Sequential):
            self.local = fold_conv(*block.local)
        expand, norm, shrink = block.mlp[0], block.mlp[1], block.mlp[3]
        weight, bias = _after_norm(*_pointwise(expand), block.norm2)
        self.expand = _linear(*_before_norm(weight, bias, norm), like=expand.weight)  # type: ignore[arg-type]
        self.shrink = _linear(*_pointwise(shrink), like=shrink.weight)  # type: ignore[arg-type]
        if isinstance(source, StateSpace):
            weight, bias = _after_norm(source.inputs.weight.double(), None, block.norm1)
            self.path: str = "mixer"
            self.mixer = copy.deepcopy(source)
            self.mixer.inputs = _linear(weight, bias, like=source.inputs.weight)
            return
        self.num_heads = source.num_heads
        self.mix: nn.Module | None = None if source.mix is None else fold_conv(*source.mix)
        self.path = attention if self.mix is None else "native"
        width = source.out.out_features
        size = width // self.num_heads
        weight, bias = _after_norm(source.qkv.weight.double(), None, block.norm1)
        if self.path == "native":  # the kernel applies this scale to the scores itself
            weight[:width] *= size**-0.5
            bias[:width] *= size**-0.5
        self.qkv = _linear(weight, bias, like=source.qkv.weight)
        gates = source.head_scale.double().sigmoid().repeat_interleave(size)
        self.out = _linear(source.out.weight.double() * gates, source.out.bias.double(), like=source.out.weight)
        self.register_buffer("open_heads", torch.full_like(source.head_scale, OPEN), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W], channels_last
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, C]
        mixed = self.mixer(tokens) if self.path == "mixer" else self.out(self._attended(tokens))
        x = x + self.local(mixed.transpose(1, 2).unflatten(2, (height, width)))
        tokens = self.shrink(F.gelu(self.expand(x.flatten(2).transpose(1, 2))))
        return x + tokens.transpose(1, 2).unflatten(2, (height, width))

    def _attended(self, tokens: Tensor) -> Tensor:  # [B, N, C], before the projection
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # [B, N, 3, heads, D]
        if self.path == "kernel":
            return mas_attention_packed(qkv, self.open_heads).flatten(2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (
            F.scaled_dot_product_attention(q, k, v, scale=1.0) if self.mix is None else reattend(q, k, v, self.mix, 1.0)
        )
        return mixed.transpose(1, 2).flatten(2)


def fold(model: DTN, attention: AttentionPath | None = None) -> FoldedDTN:
    """A folded copy of ``model`` in eval mode, without gradients, on its device and in its dtype.

    attention: ``native`` (torch's scaled_dot_product_attention) or ``kernel`` (this package's); default: ``kernel`` on
    a GPU, ``native`` elsewhere.  All weights are folded in float64 and rounded once.
    """
    device = device_of(model)
    path = attention or ("kernel" if device.type == "cuda" else "native")
    with torch.no_grad():
        return FoldedDTN(model, path).to(device).eval().requires_grad_(False)


def fold_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Folds BN into the convolution before it, with any number of groups; exact because BN comes second."""
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(norm.running_mean).double()  # type: ignore[arg-type]
    weight, bias = _before_norm(conv.weight.double().flatten(1), bias, norm)
    folded = copy.deepcopy(conv)
    folded.weight.copy_(weight.view_as(conv.weight))
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return folded


def _fold_backbone(layers: nn.Sequential) -> nn.Sequential:
    folded: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
            folded[-1] = fold_conv(folded[-1], layer)  # type: ignore[arg-type]
        else:
            folded.append(copy.deepcopy(layer))
    return nn.Sequential(*folded)


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BN in eval mode as x * scale + shift, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _before_norm(weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """norm(weight x + bias) as one product; weight [out, in], bias [out], float64."""
    scale, shift = _scale_shift(norm)
    return weight * scale[:, None], bias * scale + shift


def _after_norm(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """weight norm(x) + bias as one product."""
    scale, shift = _scale_shift(norm)
    moved = weight @ shift
    return weight * scale, moved if bias is None else moved + bias


def _pointwise(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution as the weight [out, in] and bias of a product, float64."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    return conv.weight.double().flatten(1), conv.bias.double()


def _linear(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=like.device, dtype=like.dtype)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


def frozen(model: Detector) -> Detector:
    """A copy of ``model`` for inference on its device, without gradients: a DTN is folded, another's adapted layers are
    merged."""
    copied: Detector = fold(model) if isinstance(model, DTN) else merged(model).eval().requires_grad_(False)
    return move_to(copied, device_of(model))
