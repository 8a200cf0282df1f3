"""The operators in plain torch against formulas written independently of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dtn_fast.kernels import ops, reference


def test_mas_attention_against_loops() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 3, 4, dtype=torch.float64)
    scale = torch.randn(3, dtype=torch.float64)
    out, maps = reference.mas_attention(q, k, v, scale, return_maps=True)
    for b in range(2):
        for h in range(3):
            gate = 1 / (1 + math.exp(-float(scale[h])))
            for i in range(5):
                weights = [math.exp(float(q[b, i, h] @ k[b, j, h]) / 2) for j in range(5)]
                expected = sum(w * v[b, j, h] for j, w in enumerate(weights)) / sum(weights) * gate
                assert torch.allclose(out[b, i, h], expected, atol=1e-12)
                assert torch.allclose(maps[b, h, i], torch.tensor(weights, dtype=torch.float64) / sum(weights) * gate)


def test_moe_gate_against_modules() -> None:
    """The stacked experts are ordinary convolutions, combined as Eq. 10-12 say."""
    torch.manual_seed(0)
    experts = [
        nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 1, 1), nn.Sigmoid()).double() for _ in range(3)
    ]
    x, scale = torch.randn(2, 16, 3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    maps = torch.cat([torch.sigmoid(s) * expert(x) for s, expert in zip(scale, experts, strict=True)], 1)
    expected = torch.sigmoid(maps.max(1, keepdim=True).values) * x
    stacked = [
        torch.stack([e[0].weight[:, :, 0, 0] for e in experts]),
        torch.stack([e[0].bias for e in experts]),
        torch.stack([e[2].weight[0, :, 0, 0] for e in experts]),
        torch.cat([e[2].bias for e in experts]),
    ]
    assert torch.allclose(ops.moe_gate(x, *stacked, scale), expected, atol=1e-12)


def test_moe_gate_gradients() -> None:
    torch.manual_seed(0)
    shapes = [(1, 16, 2, 2), (2, 16, 16), (2, 16), (2, 16), (2,), (2,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *a: ops.moe_gate(*a, noise_std=0.3, seed=5), inputs)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # the known answers of the Random123 distribution for philox4x32-10, first two counter words zero
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_known_answer(counter: int, seed: int, words: tuple[int, ...]) -> None:
    out = reference.philox(torch.tensor([counter]), 0, torch.tensor(seed))
    assert tuple(int(w) for w in out) == words


def test_philox_words_are_32_bit_and_differ_by_every_input() -> None:
    base = reference.philox(torch.arange(1000), 0, torch.tensor(2**62 - 1))
    assert all(int(w.min()) >= 0 and int(w.max()) < 2**32 for w in base)
    for other in (
        reference.philox(torch.arange(1000), 1, torch.tensor(2**62 - 1)),
        reference.philox(torch.arange(1000), 0, torch.tensor(2**62 - 2)),
        reference.philox(torch.arange(1000) + 1000, 0, torch.tensor(2**62 - 1)),
    ):
        assert (base[0] != other[0]).float().mean() > 0.99


def test_gate_noise_is_standard_normal_and_independent() -> None:
    z = torch.stack([reference.gate_noise(4096, 64, e, torch.tensor(11)) for e in range(2)]).double()
    n = z[0].numel()
    for e in range(2):
        assert abs(float(z[e].mean())) < 4 / n**0.5
        assert abs(float(z[e].var()) - 1) < 4 * (2 / n) ** 0.5
        assert abs(float((z[e] ** 4).mean()) - 3) < 0.05
        assert z[e].abs().max() < 4.87
    flat = z.reshape(2, -1)
    pairs = {"experts": (flat[0], flat[1]), **{f"lag {k}": (flat[0, :-k], flat[0, k:]) for k in (1, 2, 4, 8, 64)}}
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 5 / n**0.5, name
        assert abs(float((a**2 * b**2).mean()) - 1) < 0.03, name  # uncorrelated squares too


def test_gate_noise_does_not_depend_on_how_many_tokens_are_drawn() -> None:
    seed = torch.tensor(3)
    assert torch.equal(reference.gate_noise(10, 32, 1, seed), reference.gate_noise(50, 32, 1, seed)[:10])


def test_noise_needs_a_seed_and_repeats_with_it() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(1, 16, 2, 2), [torch.randn(s) for s in ((2, 16, 16), (2, 16), (2, 16), (2,), (2,))]
    with pytest.raises(ValueError, match="seed"):
        reference.moe_gate(x, *weights, noise_std=0.5)
    a, b = (ops.moe_gate(x, *weights, noise_std=0.5, seed=s) for s in (7, torch.tensor(7)))
    assert torch.equal(a, b)
    assert not torch.equal(a, ops.moe_gate(x, *weights, noise_std=0.5, seed=8))
