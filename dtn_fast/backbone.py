"""The convolutional backbone: five groups of 3x3 conv + BN + ReLU, a 2x2 max-pool after each (paper Eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtn_fast.config import DTNConfig
from dtn_fast.kernels.ops import bn_relu, fuses_bn


class Backbone(nn.Sequential):
    """Convolutions, BN, ReLU and pools in order; in training on a GPU, all that follows a convolution is one pass."""

    norm_kernels = True

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C, H / 32, W / 32]
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if (
                self.training and self.norm_kernels and type(layer) is nn.BatchNorm2d
            ):  # not one whose statistics are shared by processes
                pool = len(layers) > 1 and isinstance(layers[1], nn.MaxPool2d)
                if fuses_bn(x, pool):
                    x = _normalised(layer, x, pool)
                    del layers[: 1 + pool]
                    continue
            x = layer(x)
        return x


def _normalised(norm: nn.BatchNorm2d, x: Tensor, pool: bool) -> Tensor:
    """relu(norm(x)), pooled if asked, with the running statistics brought up to date as BatchNorm2d does."""
    y, mean, var = bn_relu(x, norm.weight, norm.bias, norm.eps, pool)
    update_statistics(norm, mean, var, x.numel() // x.shape[1])
    return y


def update_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves a BN's running statistics by those of a batch of ``count`` values a channel, as it does in training."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / max(count - 1, 1)), norm.momentum)


def build_backbone(config: DTNConfig) -> Backbone:
    """The layers of a configuration.  The convolutions carry a bias, as CViT's do."""
    layers: list[nn.Module] = []
    width_in = 3
    for width, convs in zip(config.channels, config.convs, strict=True):
        for _ in range(convs):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            width_in = width
        layers.append(nn.MaxPool2d(2))
    return Backbone(*layers)
