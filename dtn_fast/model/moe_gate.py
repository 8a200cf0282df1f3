"""The mixture-of-experts gate as a module: parameters here, arithmetic in kernels (paper Eq. 10-12)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.kernels.ops import moe_gate
from dtn_fast.model.config import DTNConfig

OPEN = 40.0
"""Scale whose sigmoid is exactly 1 in every dtype; inference engines accept it, unlike infinity."""


class MoEGate(nn.Module):
    """Scales a map [B, C, H, W] by one attention value per position, the largest of E noisy experts.

    The experts' weights are stacked (w1 [E, M, C(, K, K)], w2 [E, M(, K, K)]), as the fused kernel reads them.
    Disturbances other than Gaussian noise, activations other than ReLU and the vanilla gate are for ablations, in plain
    torch.
    """

    def __init__(self, config: DTNConfig) -> None:
        super().__init__()
        experts, hidden, width, kernel = (
            config.num_experts,
            config.expert_hidden,
            config.channels[-1],
            config.expert_kernel,
        )
        window = () if kernel == 1 else (kernel, kernel)
        self.noise, self.activation = config.noise, config.expert_activation
        self.noise_std = config.noise_std if config.noise == "gaussian" else config.noise_strength
        self.w1 = nn.Parameter(torch.empty(experts, hidden, width, *window))
        self.b1 = nn.Parameter(torch.empty(experts, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, *window))
        self.b2 = nn.Parameter(torch.empty(experts))
        if config.expert_scales:
            self.expert_scale = nn.Parameter(torch.full((experts,), config.mas_init))
        else:
            self.register_buffer("expert_scale", torch.full((experts,), OPEN), persistent=False)
        self.router = nn.Linear(width, experts) if config.gate == "vanilla" else None
        for weight, bias, fan_in in ((self.w1, self.b1, width * kernel**2), (self.w2, self.b2, hidden * kernel**2)):
            bound = 1 / math.sqrt(fan_in)  # torch's own initialisation of a convolution
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        disturbed = self.training and self.noise != "none" and self.noise_std > 0
        fused = self.activation == "relu" and not (disturbed and self.noise != "gaussian")
        if self.router is None and fused:
            std = self.noise_std if disturbed else 0.0
            return moe_gate(x, self.w1, self.b1, self.w2, self.b2, self.expert_scale, noise_std=std)
        maps = torch.stack(
            [self._expert(e, disturb(x, self.noise, self.noise_std) if disturbed else x) for e in range(len(self.b2))]
        )  # [E, B, H, W]
        maps = maps * self.expert_scale.sigmoid().to(maps.dtype)[:, None, None, None]
        if self.router is None:
            return x * maps.amax(0).sigmoid()[:, None]
        weights = self.router(x.mean((2, 3))).softmax(1)  # [B, E]
        return x * torch.einsum("be,ebhw->bhw", weights.to(maps.dtype), maps).sigmoid()[:, None]

    def _expert(self, e: int, x: Tensor) -> Tensor:  # -> [B, H, W]
        hidden = F.conv2d(x, self.w1[e, :, :, None, None].to(x.dtype), self.b1[e].to(x.dtype))
        hidden = hidden.relu() if self.activation == "relu" else F.gelu(hidden) if self.activation == "gelu" else hidden
        weight, bias = self.w2[e, None, :, None, None], self.b2[e, None]
        return F.conv2d(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype)).sigmoid()[:, 0]


def disturb(x: Tensor, kind: str, strength: float) -> Tensor:
    """Disturbs a map [B, C, H, W] by random noise, blur, contrast or rounding; ``strength`` 0 changes nothing.

    blur: mixes the map with its 3x3 Gaussian mean, which gets a random weight of at most 10 * strength.  contrast:
    multiplies distances from each channel's mean by a random factor of mean 1 and standard deviation 5 * strength.
    compression: rounds values to a grid of random step, at most strength times each image's largest value, and passes
    gradients through.
    """
    if kind == "gaussian":
        return x + strength * torch.randn_like(x)
    if kind == "compression":  # in float32: the quotient may overflow half precision
        wide = x.float()
        share = torch.rand(len(x), 1, 1, 1, device=x.device)
        step = (strength * share * wide.detach().abs().amax((1, 2, 3), keepdim=True)).clamp_min(1e-6)
        return (wide + ((wide / step).round() * step - wide).detach()).to(x.dtype)
    share = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
    if kind == "blur":
        row = torch.tensor([0.25, 0.5, 0.25], device=x.device, dtype=x.dtype)
        window = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
        soft = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), window, groups=x.shape[1])
        return x + min(10 * strength, 1.0) * share * (soft - x)
    mean = x.mean((2, 3), keepdim=True)
    return mean + (x - mean) * (1 + 5 * strength * torch.randn_like(share))
