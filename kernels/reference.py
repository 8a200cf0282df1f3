"""The operators in plain torch: the definition that tests and benchmarks compare with, and the path on CPUs.

Comments count the elements that a line reads and writes, which shows how much a fused kernel saves.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

PHILOX_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and key increments of Philox-4x32 (Salmon et al., 2011)
_K0, _K1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def mas_attention(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, *, return_maps: bool = False):
    """Multi-attention scaling (paper Eq. 17-21): O_h = sigmoid(s_h) * softmax(Q_h K_h^T / sqrt(D)) V_h.

    q, k, v: [B, N, H, D], any strides, one floating dtype.  head_scale: [H], before the sigmoid.
    Returns [B, N, H, D]; with ``return_maps`` also the gated maps sigmoid(s_h) * softmax(.), [B, H, N, N].
    FLOPs 4 B H N^2 D.  Softmax runs in float32 for 16-bit inputs, as the kernels do.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, N, D] views
    scores = (qh @ kh.transpose(-1, -2)).to(acc) * q.shape[-1] ** -0.5  # reads 2 BHND, writes BHN^2
    maps = scores.softmax(-1)  # reads and writes BHN^2
    gate = head_scale.to(acc).sigmoid()[:, None, None]  # [H, 1, 1]
    out = (maps.to(v.dtype) @ vh).to(acc) * gate  # reads BHN^2 + BHND, writes BHND
    out = out.to(q.dtype).transpose(1, 2)  # [B, N, H, D] view
    return (out, maps * gate) if return_maps else out


def mas_attention_forward(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Output of :func:`mas_attention`, and log2 of each query's softmax denominator, [B, H, N] float32."""
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).to(torch.promote_types(q.dtype, torch.float32))
    log_sum = (scores * q.shape[-1] ** -0.5).logsumexp(-1) / math.log(2.0)
    return mas_attention(q, k, v, head_scale).contiguous(), log_sum.float()


def mas_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`mas_attention` for q, k, v [B, N, H, D] and head_scale [H], by formula.

    With P the softmax, g the gate and dP = dO V^T: dV = g P^T dO, delta = rowsum(P dP), dS = g P (dP - delta),
    dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D), ds = g (1 - g) sum delta.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    qh, kh, vh, do = (t.transpose(1, 2).to(acc) for t in (q, k, v, grad))
    gate = head_scale.to(acc).sigmoid()
    p = (qh @ kh.transpose(-1, -2) * scale).softmax(-1)  # reads 2 BHND, writes BHN^2
    dp = do @ vh.transpose(-1, -2)  # reads 2 BHND, writes BHN^2
    delta = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - delta) * (gate * scale)[:, None, None]
    grads = (ds @ kh, ds.transpose(-1, -2) @ qh, p.transpose(-1, -2) @ do * gate[:, None, None])
    dq, dk, dv = (g.transpose(1, 2).to(q.dtype).contiguous() for g in grads)
    return dq, dk, dv, (gate * (1 - gate) * delta.sum((0, 2, 3))).to(head_scale.dtype)


def philox(counter: Tensor, stream: int, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 words at counter (c, stream, 0, 0) under the 64-bit key ``seed``.

    counter: int64 of any shape, values in [0, 2**32).  seed: int64 scalar tensor.  Returns four int64 tensors of
    ``counter``'s shape holding 32-bit words.  The same words as Triton's ``tl.philox``.
    """
    c0, c1 = counter, torch.full_like(counter, stream)
    c2 = torch.zeros_like(counter)
    c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(PHILOX_ROUNDS):
        a, b = _M0 * c0, _M1 * c2  # 64-bit products; int64 overflow wraps and keeps every bit
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _K0) & _LOW, (k1 + _K1) & _LOW
    return c0, c1, c2, c3


def gate_noise(tokens: int, channels: int, expert: int, seed: Tensor) -> Tensor:
    """Standard normal noise of one expert, [tokens, channels] float32, equal to the noise of the Triton kernel.

    Element i = token * channels + channel takes Philox call i // 8 of stream ``expert``; each of its four 32-bit words
    gives two normals by Box-Muller from 16-bit halves, so |z| <= 4.86.  ``channels`` must be a multiple of 8.
    """
    calls = torch.arange(tokens * channels // 8, device=seed.device)
    pairs = []
    for word in philox(calls, expert, seed):
        u = (word & 0xFFFF).float() * 2.0**-16 + 2.0**-17  # in (0, 1)
        angle = (word >> 16).float() * (2.0 * math.pi / 65536.0)
        radius = (u.log2() * (-2.0 * math.log(2.0))).sqrt()
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, 1).reshape(tokens, channels)


def moe_gate(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_scale: Tensor,
    noise_std: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Noisy expert gate (paper Eq. 10-12): F' = F * sigmoid(max_e sigmoid(s_e) * E_e(F + n_e)).

    E_e is conv C->M, ReLU, conv M->1, sigmoid.  x: [B, C, H, W].  w1: [E, M, C] for 1x1 experts or [E, M, C, K, K];
    b1: [E, M].  w2: [E, M] or [E, M, K, K]; b2: [E].  expert_scale: [E], before the sigmoid.  noise_std: standard
    deviation of n_e in units of x; 0: no noise.  seed: int64 scalar tensor, needed when noise_std > 0.
    Returns [B, C, H, W] in x's dtype.  FLOPs per expert 2 B H W (C M + M), times K^2.
    """
    return moe_gate_forward(x, w1, b1, w2, b2, expert_scale, noise_std, seed)[0]


def moe_gate_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_scale: Tensor,
    noise_std: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of :func:`moe_gate`, attention map [B, H, W] and winning expert [B, H, W] int8 (the first of equals)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    attention, winner = None, torch.zeros(())
    for e in range(w1.shape[0]):
        score = _expert(e, x, w1, b1, w2, b2, noise_std, seed) * expert_scale[e].to(acc).sigmoid()
        if attention is None:
            attention, winner = score, torch.zeros_like(score, dtype=torch.int8)
        else:
            winner = torch.where(score > attention, e, winner)
            attention = torch.maximum(attention, score)
    assert attention is not None
    attention = attention.sigmoid()
    out = (x.to(acc) * attention[:, None]).to(x.dtype)  # reads BCHW + BHW, writes BCHW
    return out, attention, winner.to(torch.int8)


def moe_gate_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_scale: Tensor,
    noise_std: float,
    seed: Tensor | None,
    winner: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`moe_gate` for x, w1, b1, w2, b2 and expert_scale, by formula; only winning experts have one.

    With A the attention and p the winner's sigmoid: dm = (dy . x) A (1 - A), de = dm sigmoid(s) p (1 - p), then back
    through the two convolutions and the ReLU.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    gates = expert_scale.to(acc).sigmoid()
    kept = []
    best = torch.zeros((), dtype=acc, device=x.device)
    for e in range(w1.shape[0]):
        noisy = _noisy(x, noise_std, e, seed)
        hidden = _conv(noisy, w1[e], b1[e]).relu()
        p = _conv(hidden, w2[e][None], b2[e][None])[:, 0].to(acc).sigmoid()
        kept.append((noisy.to(acc), hidden.to(acc), p))
        best = torch.where(winner == e, gates[e] * p, best)
    attention = best.sigmoid()
    dm = (grad.to(acc) * x.to(acc)).sum(1) * attention * (1 - attention)  # [B, H, W]
    dx = grad.to(acc) * attention[:, None]
    rows: list[tuple[Tensor, ...]] = []
    for e, (noisy, hidden, p) in enumerate(kept):
        mine = torch.where(winner == e, dm, 0.0)
        de = (mine * gates[e] * p * (1 - p))[:, None]  # [B, 1, H, W]
        first, second = (w if w.dim() == 4 else w[..., None, None] for w in (w1[e].to(acc), w2[e][None].to(acc)))
        same = second.shape[-1] // 2
        dh = conv2d_input(hidden.shape, second, de, padding=same) * (hidden > 0)
        dw2 = conv2d_weight(hidden, second.shape, de, padding=same).reshape(w2[e].shape)
        dx = dx + conv2d_input(noisy.shape, first, dh, padding=same)
        dw1 = conv2d_weight(noisy, first.shape, dh, padding=same).reshape(w1[e].shape)
        rows.append((dw1, dh.sum((0, 2, 3)), dw2, de.sum(), gates[e] * (1 - gates[e]) * (mine * p).sum()))
    grads = (torch.stack(column) for column in zip(*rows, strict=True))
    small = zip(grads, (w1, b1, w2, b2, expert_scale), strict=True)
    return dx.to(x.dtype), *(g.to(parameter.dtype) for g, parameter in small)


def _noisy(x: Tensor, noise_std: float, expert: int, seed: Tensor | None) -> Tensor:
    """x + n_e, rounded to x's dtype."""
    if not noise_std:
        return x
    if seed is None:
        raise ValueError("seed: noise_std > 0 needs a seed, got None")
    acc = torch.promote_types(x.dtype, torch.float32)
    batch, channels, height, width = x.shape
    z = gate_noise(batch * height * width, channels, expert, seed).view(batch, height, width, channels)
    return (x.to(acc) + noise_std * z.permute(0, 3, 1, 2).to(acc)).to(x.dtype)  # reads 2 BCHW, writes BCHW


def _expert(
    e: int, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, noise_std: float, seed: Tensor | None
) -> Tensor:
    """sigmoid(conv(relu(conv(x + noise)))) of expert ``e``: [B, C, H, W] -> [B, H, W]."""
    acc = torch.promote_types(x.dtype, torch.float32)
    hidden = _conv(_noisy(x, noise_std, e, seed), w1[e], b1[e]).relu()  # reads BCHW, writes BMHW
    return _conv(hidden, w2[e][None], b2[e][None])[:, 0].to(acc).sigmoid()  # reads BMHW, writes BHW


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Same-padded convolution; 1x1 weights may lack the two kernel dimensions."""
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=weight.shape[-1] // 2)


def bn_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation by the batch's own statistics, ReLU and, with ``pool``, a 2x2 max-pool.

    x: [B, C, H, W] -> y of the same shape or [B, C, H / 2, W / 2], and the mean and biased variance [C].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)  # reads BCHW
    # BN reads 2 BCHW and writes BCHW; the ReLU reads and writes BCHW
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps).relu()
    return F.max_pool2d(y, 2) if pool else y, mean.detach(), var.detach()


def local_connection(
    m: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + BN(depthwise 3x3 convolution of m) by the batch's own statistics (paper Eq. 23).

    m, x: [B, C, H, W]; weight: [C, 1, 3, 3] -> y like x, and the mean and biased variance [C] of the convolution.
    """
    z = F.conv2d(m, weight, bias, padding=1, groups=m.shape[1])  # reads and writes BCHW
    var, mean = torch.var_mean(z.to(torch.promote_types(z.dtype, torch.float32)), (0, 2, 3), correction=0)
    y = F.batch_norm(z, None, None, norm_weight, norm_bias, True, 0.0, eps)  # reads 2 BCHW, writes BCHW
    return x + y, mean.detach(), var.detach()  # reads 2 BCHW, writes BCHW
