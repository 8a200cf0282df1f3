"""The convolutional backbone: five groups of 3x3 conv + BN + ReLU, a 2x2 max-pool after each (paper Eq. 9)."""

from __future__ import annotations

from torch import nn

from dtn_fast.config import DTNConfig


def build_backbone(config: DTNConfig) -> nn.Sequential:
    """[B, 3, H, W] -> [B, channels[-1], H / 32, W / 32].  The convolutions carry a bias, as CViT's do."""
    layers: list[nn.Module] = []
    width_in = 3
    for width, convs in zip(config.channels, config.convs, strict=True):
        for _ in range(convs):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            width_in = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
