"""The one face of the operators: what the model imports."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def mas_attention(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor) -> Tensor:
    """O_h = sigmoid(s_h) * softmax(Q_h K_h^T / sqrt(D)) V_h; see :func:`reference.mas_attention`.

    q, k, v: [B, N, H, D] with any strides, head_scale: [H] before the sigmoid.  Returns [B, N, H, D].
    """
    return reference.mas_attention(q, k, v, head_scale)


def moe_gate(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_scale: Tensor,
    noise_std: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """F' = F * sigmoid(max_e sigmoid(s_e) * E_e(F + n_e)); see :func:`reference.moe_gate` for shapes.

    seed: int or int64 scalar tensor; None draws one from torch's default generator.  Returns [B, C, H, W].
    """
    if noise_std > 0:
        if seed is None:
            seed = torch.randint(2**62, (), device=x.device)
        elif isinstance(seed, int):
            seed = torch.tensor(seed, device=x.device)
        return reference.moe_gate(x, w1, b1, w2, b2, expert_scale, noise_std, seed)
    return reference.moe_gate(x, w1, b1, w2, b2, expert_scale)
