"""A state space in place of attention (the paper's outlook, "Mamba"): Mamba-2's mixer, scanned in both directions.

By state-space duality (Dao and Gu, 2024) the scan h_t = exp(a_t) h_t-1 + d_t B_t x_t, y_t = C_t h_t over N tokens is
the product of a masked matrix, M[t, s] = C_t B_s exp(a_s+1 + ... + a_t) d_s for s <= t, with the values x.  A DTN has
64 tokens, as many as Mamba-2's own kernels take at once in this form, so that all is products of matrices, and there
is nothing to scan.  A kernel would save the passes over M, of as many bytes as the values at 64 tokens of 8 heads: at
batch 256 about 10 passes of 17 MB forward and backward, 0.05 ms of a block at 3.4 TB/s, and is not written.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.model.mas import HeadScale


class StateSpace(nn.Module):
    """[B, N, C] -> [B, N, C]: each head's decays and steps for either direction, inputs B and outputs C of the state
    shared by the heads, a gate, and with ``mas`` a learnable scale on every head.

    Mamba's short convolution is left to the block's local connection (*choice*).
    """

    def __init__(self, width: int, num_heads: int, state_size: int, mas: bool, mas_init: float) -> None:
        super().__init__()
        self.num_heads, self.state_size = num_heads, state_size
        self.parts = (width, width, state_size, state_size, 2 * num_heads)
        self.inputs = nn.Linear(width, sum(self.parts), bias=False)
        self.decay = nn.Parameter(torch.empty(2, num_heads).uniform_(1, 16).log())  # as Mamba-2 begins
        step = torch.empty(2, num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus gives ``step``
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.scale: nn.Module = HeadScale(num_heads, mas_init) if mas else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, x, begin, end, step = self.inputs(tokens).split(self.parts, 2)
        heads = x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, D]
        mixed = (self.matrix(begin, end, step).to(heads.dtype) @ heads) + self.skip.to(x.dtype)[:, None, None] * heads
        mixed = mixed.transpose(1, 2).flatten(2) * F.silu(gate)
        return self.out(self.scale(self.norm(mixed)))

    def matrix(self, begin: Tensor, end: Tensor, step: Tensor) -> Tensor:
        """The sum of both directions' matrices M, float32 [B, H, N, N]; under autocast the products of B and C are
        rounded to its dtype, as Mamba-2's kernels do.

        begin, end: B and C [B, N, S].  step: [B, N, 2 H], before the softplus.
        """
        steps = F.softplus(step.float().unflatten(2, (2, -1)) + self.step.float()).permute(2, 0, 3, 1)  # [2, B, H, N]
        logs = -self.decay.float().exp()[:, None, :, None] * steps
        products = (end.float() @ begin.float().mT)[:, None]  # [B, 1, N, N]
        forward = logs[0].cumsum(2)
        backward = logs[1].flip(2).cumsum(2).flip(2)
        # what lies on the other side of the diagonal would grow without bound: it is cut before the exponential
        kept = lambda sums: (sums[..., :, None] - sums[..., None, :]).clamp_max(0).exp()
        return products * (
            (kept(forward) * steps[0, :, :, None]).tril() + (kept(backward) * steps[1, :, :, None]).triu()
        )
