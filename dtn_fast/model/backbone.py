"""The convolutional backbone: five groups of 3x3 conv + BN + ReLU, a 2x2 max-pool after each (paper Eq. 9)."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.errors import UsageError
from dtn_fast.kernels.ops import bn_relu, fuses_bn
from dtn_fast.model.config import STRIDE, DTNConfig
from dtn_fast.model.norm import recomputed, trains, update_statistics
from dtn_fast.model.timm_compat import import_timm

INPUT_CHANNELS = 8
"""Channels to which ``Backbone.pad_input`` widens an image's three: tensor cores read eight 16-bit values at once."""


class Backbone(nn.Sequential):
    """Convolutions, BN, ReLU and pools in order; in training on a GPU, BN, ReLU and pool are one fused operator.

    In training the convolutions leave their bias out, since BN subtracts it with the mean: neither is it added to the
    map, nor its gradient, which is zero, summed over the map.  The running means contain it, so that inference is the
    same.
    """

    norm_kernels = True
    pad_input = False
    grad_checkpointing = False
    read = -1
    """Number of the pool whose output is read by another part of the model, and so is not fused; -1: none."""

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C, H / 32, W / 32]
        if not (self.grad_checkpointing and self.training):
            return self.run(list(self), x)
        for group in self.groups():
            x = recomputed(functools.partial(self.run, group), group, x)
        return x

    def groups(self) -> list[list[nn.Module]]:
        """The layers of each group, which its pool ends."""
        ends = [place + 1 for place, layer in enumerate(self) if isinstance(layer, nn.MaxPool2d)]
        return [list(self)[begin:end] for begin, end in itertools.pairwise([0, *ends])]

    def run(self, layers: list[nn.Module], x: Tensor) -> Tensor:
        """The output of consecutive layers, which begin with a convolution."""
        layers = list(layers)
        while layers:
            layer = layers.pop(0)
            # (torch 2.11 cannot trace bool of a list)
            follows = self.training and len(layers) > 0 and trains(layers[0])
            padded = self.pad_input and isinstance(layer, nn.Conv2d) and x.shape[1] < INPUT_CHANNELS
            if not isinstance(layer, nn.Conv2d) or layer.bias is None or not (follows or padded):
                x = layer(x)
                continue
            weight = layer.weight
            if padded:
                widen = (0, 0, 0, 0, 0, INPUT_CHANNELS - x.shape[1])
                x, weight = F.pad(x, widen), F.pad(weight, widen)
            x = F.conv2d(x, weight, None if follows else layer.bias, padding=1)
            if follows:
                norm = layers.pop(0)
                pool = len(layers) > 1 and isinstance(layers[1], nn.MaxPool2d)
                pool = pool and (self.read < 0 or layers[1] is not self[self.read])
                x, done = self._normalised(x, layer.bias, norm, pool)
                del layers[:done]
        return x

    def _normalised(self, x: Tensor, bias: Tensor, norm: Any, pool: bool) -> tuple[Tensor, int]:
        """norm(x + bias) and 0 or, where the kernels do it, with the ReLU and pool behind it and their number."""
        x = _Cancelled.apply(x, bias)
        if self.norm_kernels and type(norm) is nn.BatchNorm2d and fuses_bn(x, pool):  # not SyncBatchNorm
            y, mean, var = bn_relu(x, norm.weight, norm.bias, norm.eps, pool)
            update_statistics(norm, mean + bias.detach(), var, x.numel() // x.shape[1])
            return y, 1 + pool
        with torch.no_grad():  # beforehand, since autograd keeps the running mean: (1 - m) share = m
            norm.running_mean.add_(bias, alpha=norm.momentum / (1 - norm.momentum))
        return norm(x), 0


class _Cancelled(torch.autograd.Function):
    """x, as a function of a bias that BN will cancel: its gradient is zero, not missing, so that optimisers and
    gradient averaging treat it as they treat every parameter."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def build_backbone(config: DTNConfig) -> nn.Sequential:
    """Builds the backbone of a configuration.  The convolutions have a bias, as in CViT.

    Raises UsageError when timm is missing, does not know the model, or the model's last map is not 1/32 of the input.
    """
    if config.backbone != "vgg":
        return _timm_backbone(config)
    layers: list[nn.Module] = []
    width_in = 3
    for width, convs in zip(config.channels, config.convs, strict=True):
        for _ in range(convs):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            width_in = width
        layers.append(nn.MaxPool2d(2))
    return Backbone(*layers)


def _timm_backbone(config: DTNConfig) -> nn.Sequential:
    """A timm model's last map, projected to C channels: [B, 3, H, W] -> [B, C, H / 32, W / 32]."""
    timm = import_timm()
    try:
        body = timm.create_model(config.backbone, pretrained=False, features_only=True, out_indices=(-1,))
    except Exception as error:  # timm raises RuntimeError, ValueError, AttributeError ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"DTNConfig.backbone {config.backbone}: timm cannot make its feature maps ({reason})"
        ) from error
    stride = body.feature_info.reduction()[-1]
    if stride != STRIDE:
        raise UsageError(
            f"DTNConfig.backbone {config.backbone}: its last map is 1/{stride} of the input; a DTN needs 1/{STRIDE}"
        )
    width, side = body.feature_info.channels()[-1], config.image_size // STRIDE
    last = _Last(body)
    try:
        with torch.no_grad():  # despite 1/32, some models need another size, or give channels last
            device = next(body.parameters()).device
            shape = tuple(last.eval()(torch.zeros(1, 3, config.image_size, config.image_size, device=device)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"DTNConfig.backbone {config.backbone}: does not take {config.image_size} pixels ({error})"
        ) from error
    if shape != (1, width, side, side):
        raise UsageError(
            f"DTNConfig.backbone {config.backbone}: its last map is {shape}; a DTN needs {(1, width, side, side)}"
        )
    return TimmBackbone(last.train(), nn.Conv2d(width, config.channels[-1], 1))


class TimmBackbone(nn.Sequential):
    """A timm model's last map, and its projection to C channels."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C, H / 32, W / 32]
        return (
            recomputed(super().forward, [self], x) if self.grad_checkpointing and self.training else super().forward(x)
        )


class _Last(nn.Module):
    """Returns the last map of a model that returns a list of maps."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[-1]
