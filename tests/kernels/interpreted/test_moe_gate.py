"""The gate kernels against float64: the same noise as the reference, gradients of everything, odd shapes, ties."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from tolerances import assert_close, relative
from torch import Tensor

from dtn_fast.kernels import launch_values, ops, reference
from dtn_fast.kernels import moe_gate_kernel as kernels
from dtn_fast.kernels.launch import rows_of

HALF, FULL = torch.bfloat16, torch.float32
NAMES = ("out", "dx", "dw1", "db1", "dw2", "db2", "d scale")


@triton.jit
def draw(OUT, SEED, EXPERT: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLS
    calls = (rows[:, None] * (C // 8) + start // 8).to(tl.uint32) + tl.arange(0, COLS // 8)[None, :]
    radius, turn = kernels._noise(tl.load(SEED), EXPERT, calls, 1.0, ROWS, COLS, False)
    tl.store(OUT + rows[:, None] * C + start + tl.arange(0, COLS)[None, :], radius * turn)


@pytest.mark.parametrize("seed", [0, 7, 2**62 - 1, -5])
@pytest.mark.parametrize("expert", [0, 3])
def test_the_kernel_draws_the_references_numbers_at_any_block_size(seed: int, expert: int) -> None:
    rows, channels = 32, 64
    expected = reference.gate_noise(rows, channels, expert, torch.tensor(seed))
    for block in ((32, 64), (16, 32), (8, 8)):
        out = torch.full((rows, channels), float("nan"))
        draw[(rows // block[0], channels // block[1])](out, torch.tensor(seed), expert, channels, *block)
        assert (out - expected).abs().max() < 2e-6


def inputs(experts: int, hidden: int, channels: int, shape: tuple[int, int, int], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(experts * 100 + channels)

    def draw_(*size: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * gain

    batch, height, width = shape
    x = draw_(batch, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = [draw_(experts, hidden, channels, gain=channels**-0.5).to(dtype)]
    weights += [
        draw_(experts, hidden, gain=0.5),
        draw_(experts, hidden, gain=hidden**-0.5),
        draw_(experts),
        draw_(experts),
    ]
    return [x, *weights], draw_(batch, channels, height, width).to(dtype)


def gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in tensors)]


def exact(*tensors: Tensor, std: float, seed: int, dtype: torch.dtype) -> Tensor:
    """Eq. 10-12 in float64 by autograd, the noisy input rounded to ``dtype`` as every implementation rounds it."""
    x, w1, b1, w2, b2, scale = tensors
    rows, maps = x.permute(0, 2, 3, 1), []
    for e in range(w1.shape[0]):
        z = reference.gate_noise(rows[..., 0].numel(), x.shape[1], e, torch.tensor(seed)).view(rows.shape)
        noisy = rows.detach().float() + std * z if std else rows.detach().float()
        noisy = rows + (noisy.to(dtype).double() - rows.detach())  # the rounding has no gradient
        hidden = (noisy @ w1[e].T + b1[e]).relu()
        maps.append(scale[e].sigmoid() * (hidden @ w2[e] + b2[e]).sigmoid())
    return (rows * torch.stack(maps).amax(0).sigmoid()[..., None]).permute(0, 3, 1, 2)


SHAPES = [
    (2, 16, 32, (1, 4, 4)),
    (1, 16, 16, (2, 3, 5)),
    (3, 48, 48, (1, 5, 7)),
    (8, 16, 32, (1, 3, 3)),
    (2, 128, 64, (1, 9, 8)),
]


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, HALF, FULL])
@pytest.mark.parametrize(("experts", "hidden", "channels", "shape"), SHAPES)
def test_against_float64(experts: int, hidden: int, channels: int, shape, dtype: torch.dtype, std: float) -> None:
    tensors, grad = inputs(experts, hidden, channels, shape, dtype)
    got = gradients(lambda *t: ops.moe_gate(*t, noise_std=std, seed=11, path="triton"), tensors, grad)
    expected = gradients(
        lambda *t: exact(*t, std=std, seed=11, dtype=dtype), [t.double() for t in tensors], grad.double()
    )
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert_close(name, a, b, dtype, summed=name not in ("out", "dx"))


def test_block_sizes_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, grad = inputs(2, 32, 64, (1, 6, 6), FULL)
    run = lambda: gradients(lambda *t: ops.moe_gate(*t, noise_std=0.5, seed=3, path="triton"), tensors, grad)
    first = run()
    small = {"BLOCK_T": 16, "BLOCK_C": 16, "BLOCK_OUT": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setitem(launch_values.override, "moe_forward", small)
    monkeypatch.setitem(launch_values.override, "moe_backward_rows", small)
    monkeypatch.setitem(
        launch_values.override,
        "moe_backward_weight",
        {k: v for k, v in small.items() if k != "BLOCK_OUT"} | {"PROGRAMS": 24},
    )
    for name, a, b in zip(NAMES, run(), first, strict=True):
        assert relative(a, b.double()) < 1e-5, name


def test_ties_go_to_the_first_expert_and_runs_repeat() -> None:
    tensors, grad = inputs(2, 16, 32, (1, 4, 4), FULL)
    tensors = [tensors[0], *(torch.stack([t[0], t[0]]) for t in tensors[1:])]  # twins
    run = lambda: gradients(lambda *t: ops.moe_gate(*t, path="triton"), tensors, grad)
    one, two = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for name, gradient in zip(NAMES[2:], one[2:], strict=True):
        assert gradient[0].abs().max() > 0, name
        assert not gradient[1].any(), name


def test_no_noise_draws_nothing_and_noise_differs_between_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = inputs(2, 16, 32, (1, 4, 4), FULL)
    quiet = ops.moe_gate(*tensors, noise_std=0.0, path="triton")
    assert torch.equal(quiet, ops.moe_gate(*tensors, noise_std=0.0, seed=9, path="triton"))
    rows, args = rows_of(tensors[0]), tensors[1:]
    for std, noise in ((0.0, False), (0.1, True)):
        maps = torch.empty(16), torch.empty(16, dtype=torch.int8)
        (launch,) = kernels.forward(rows, *args, torch.tensor(0), std, torch.empty_like(rows), *maps, None)
        assert launch.constants["NOISE"] is noise


@pytest.mark.parametrize("experts", [1, 2])
def test_the_operator_is_registered_as_torch_expects(experts: int) -> None:
    """Among others, outputs that share no memory: with one expert all small gradients are slices of one row."""
    tensors, grad = inputs(experts, 16, 16, (1, 2, 2), FULL)
    grad = grad.contiguous(memory_format=torch.channels_last)
    _, *kept = torch.ops.dtn_fast.moe_forward(*tensors, None, 0.0, True, "triton")
    torch.library.opcheck(torch.ops.dtn_fast.moe_backward.default, (grad, *tensors, None, 0.0, *kept, "triton"))


def test_any_layout_gives_the_same() -> None:
    tensors, _ = inputs(2, 16, 32, (2, 3, 4), FULL)
    x = tensors[0]
    out = ops.moe_gate(*tensors, path="triton")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, ops.moe_gate(x.contiguous(), *tensors[1:], path="triton"))


def test_3x3_experts_are_refused_by_name_when_forced() -> None:
    x, w1, w2 = torch.randn(1, 16, 4, 4), torch.randn(2, 16, 16, 3, 3), torch.randn(2, 16, 3, 3)
    rest = torch.randn(2, 16), w2, torch.randn(2), torch.randn(2)
    with pytest.raises(ValueError, match="3x3 experts"):
        ops.moe_gate(x, w1, *rest, path="triton")
    assert ops.moe_gate(x, w1, *rest).shape == x.shape
