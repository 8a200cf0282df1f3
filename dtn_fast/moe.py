"""The mixture-of-experts gate as a module: parameters here, arithmetic in kernels (paper Eq. 10-12)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dtn_fast.config import DTNConfig
from dtn_fast.kernels.ops import moe_gate


class MoEGate(nn.Module):
    """Scales a map [B, C, H, W] by one attention value per position, the strongest of E noisy experts.

    The experts' weights are stacked (w1 [E, M, C(, K, K)], w2 [E, M(, K, K)]), as the fused kernel reads them.
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
        self.noise_std = config.noise_std
        self.w1 = nn.Parameter(torch.empty(experts, hidden, width, *window))
        self.b1 = nn.Parameter(torch.empty(experts, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, *window))
        self.b2 = nn.Parameter(torch.empty(experts))
        self.expert_scale = nn.Parameter(torch.full((experts,), config.mas_init))
        for weight, bias, fan_in in ((self.w1, self.b1, width * kernel**2), (self.w2, self.b2, hidden * kernel**2)):
            bound = 1 / math.sqrt(fan_in)  # torch's own initialisation of a convolution
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        std = self.noise_std if self.training else 0.0
        return moe_gate(x, self.w1, self.b1, self.w2, self.b2, self.expert_scale, noise_std=std)
