"""The attention kernels against float64 autograd: every size, dtype, layout, and the values that break softmaxes."""

from __future__ import annotations

import pytest
import torch
import triton
from tolerances import assert_close
from torch import Tensor

from dtn_fast.kernels import launch_values, ops, reference
from dtn_fast.kernels import mas_attention_kernel as kernels

HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not write stays NaN and fails the comparison."""
    empty = Tensor.new_empty

    def filled(self: Tensor, *args, **kwargs) -> Tensor:
        out = empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(Tensor, "new_empty", filled)
    for kernel in ("mas_small_forward", "mas_small_backward"):  # registers are no matter here: always one pass
        monkeypatch.setitem(launch_values.override, kernel, {"num_warps": 4, "num_stages": 1})


def inputs(n: int, heads: int, dim: int, dtype: torch.dtype, batch: int = 1, gain: float = 1.0):
    generator = torch.Generator().manual_seed(n * 1000 + heads * 10 + dim)
    qkv = (torch.randn(batch, n, 3, heads, dim, generator=generator) * gain).to(dtype)
    return (
        qkv,
        torch.randn(heads, generator=generator),
        torch.randn(batch, n, heads, dim, generator=generator).to(dtype),
    )


def gradients(function, qkv: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    qkv, scale = qkv.detach().requires_grad_(), scale.detach().requires_grad_()
    out = function(qkv, scale)
    out.backward(grad.to(out.dtype))
    return out.detach(), qkv.grad, scale.grad


def reference_of(qkv: Tensor, scale: Tensor) -> Tensor:
    return reference.mas_attention(*qkv.unbind(2), scale)


def check(qkv: Tensor, scale: Tensor, grad: Tensor) -> None:
    dtype = qkv.dtype
    got = gradients(lambda x, s: ops.mas_attention_packed(x, s, path="triton"), qkv, scale, grad)
    expected = gradients(reference_of, qkv.double(), scale.double(), grad.double())
    peer = gradients(reference_of, qkv, scale, grad)
    for name, a, b, c in zip(("out", "d qkv", "d scale"), got, expected, peer, strict=True):
        assert_close(name, a, b, dtype, c if name == "out" else None, summed=name == "d scale")


@pytest.mark.parametrize("n", [1, 16, 49, 63, 64, 65, 100, 128, 129, 197])
def test_every_length(n: int) -> None:
    check(*inputs(n, 1, 32, FULL))


@pytest.mark.parametrize("dtype", [torch.float16, HALF, FULL])
@pytest.mark.parametrize(("n", "heads", "dim"), [(64, 3, 64), (49, 8, 32), (130, 2, 64), (16, 1, 128), (129, 1, 128)])
def test_every_dtype_and_width(dtype: torch.dtype, n: int, heads: int, dim: int) -> None:
    check(*inputs(n, heads, dim, dtype))


@pytest.mark.parametrize("n", [64, 129])
def test_several_batches(n: int) -> None:
    check(*inputs(n, 2, 32, FULL, batch=3))


@pytest.mark.parametrize("n", [33, 150])
def test_streaming_where_a_whole_problem_does_not_fit(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values that an architecture without room for the one-pass kernels gets."""
    stream = {"STREAM": 1, "num_warps": 4, "num_stages": 1}
    for kernel in ("mas_small_forward", "mas_small_backward"):
        monkeypatch.setitem(launch_values.override, kernel, stream)
    check(*inputs(n, 2, 32, FULL))


@pytest.mark.skipif(triton.__version__ < "3.7", reason="Triton 3.6 interprets no loop whose bounds are run-time values")
@pytest.mark.parametrize(("n", "dtype"), [(64, FULL), (49, torch.float16), (7, FULL)])
def test_persistent_kernels_through_descriptors(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROCESSORS", 4)
    for kernel in ("mas_small_forward", "mas_small_backward"):
        values = {"PERSISTENT": 1, "STAGES": 3, "num_warps": 4, "num_stages": 2}
        monkeypatch.setitem(launch_values.override, kernel, values)
    qkv, scale, grad = inputs(n, 3, 32, dtype, batch=2)
    parts = qkv.unbind(2)
    out = torch.full_like(parts[0], float("nan"))
    (launch,) = kernels.forward(*parts, scale, out, kernels.rows_like(parts[0]))
    assert launch.kernel is kernels.mas_small_forward_persistent
    assert launch.grid[0] < 6, "each program takes several tiles"
    grads, partial = torch.empty_like(qkv).unbind(2), kernels.partial_like(parts[0])
    (launch,) = kernels.backward(grad, *parts, scale, out, kernels.rows_like(parts[0]), *grads, partial)
    assert launch.kernel is kernels.mas_small_backward_persistent
    check(qkv, scale, grad)


@pytest.mark.parametrize("n", [64, 129])
def test_strides(n: int) -> None:
    """Separate tensors, heads before tokens, a slice of something larger, an expanded batch: read where they lie."""
    torch.manual_seed(0)
    q = torch.randn(2, 2, n, 32).transpose(1, 2)  # [B, N, H, D], heads outermost
    k = torch.randn(2, n, 5, 64)[:, :, 1:3, 32:]
    v = torch.randn(1, n, 2, 32).expand(2, -1, -1, -1)
    scale, grad = torch.randn(2), torch.randn(2, 2, n, 32).transpose(1, 2)
    expected_in = [t.double().requires_grad_() for t in (q, k, v, scale)]
    got_in = [t.detach().requires_grad_() for t in (q, k, v, scale)]
    out = ops.mas_attention(*got_in, path="triton")
    out.backward(grad)
    expected = reference.mas_attention(*expected_in)
    expected.backward(grad.double())
    assert_close("out", out.detach(), expected.detach(), FULL)
    for name, a, b in zip("qkvs", got_in, expected_in, strict=True):
        assert_close(f"d{name}", a.grad, b.grad, FULL, summed=name == "s")


def test_the_packed_gradient_is_one_tensor_written_in_place() -> None:
    qkv, scale, grad = inputs(16, 2, 32, FULL)
    parts = qkv.unbind(2)
    packed = torch.full_like(qkv, float("nan"))
    thirds = packed.unbind(2)
    partial = kernels.partial_like(parts[0])
    launches = kernels.backward(grad, *parts, scale, parts[0], partial, *thirds, partial)
    assert len(launches) == 1, "N <= 128 is one kernel"
    launches[0].run()
    assert packed.isfinite().all()
    assert thirds[1].data_ptr() == packed.data_ptr() + thirds[0].stride(2) * 2 * 4


@pytest.mark.parametrize("n", [49, 64, 130])
@pytest.mark.parametrize("case", ["huge logits", "equal logits", "closed gate", "open gate", "zeros"])
def test_extreme_values(n: int, case: str) -> None:
    qkv, scale, grad = inputs(n, 2, 32, FULL)
    if case == "huge logits":
        qkv[:, :, :2] *= 40.0  # scores reach +-1e4
        scores = qkv[:, :, 0].transpose(1, 2) @ qkv[:, :, 1].permute(0, 2, 3, 1) * 32**-0.5
        assert scores.abs().max() > 5e3
    elif case == "equal logits":
        qkv[:, :, 0] = 0.0
    elif case == "closed gate":
        scale[:] = -1e4
    elif case == "open gate":
        scale[:] = 1e4
    else:
        qkv[:] = 0.0
    got = gradients(lambda x, s: ops.mas_attention_packed(x, s, path="triton"), qkv, scale, grad)
    expected = gradients(reference_of, qkv.double(), scale.double(), grad.double())
    for name, a, b in zip(("out", "d qkv", "d scale"), got, expected, strict=True):
        assert a.isfinite().all(), name
        size = max(float(b.abs().max()), 1e-6)
        assert float((a.double() - b).abs().max()) <= 2e-3 * size + 1e-6, name  # exp of +-1e4 amplifies one rounding


def test_runs_repeat_to_the_bit() -> None:
    for n in (64, 150):
        one, two = (
            gradients(lambda x, s: ops.mas_attention_packed(x, s, path="triton"), *inputs(n, 2, 32, FULL)) for _ in "ab"
        )
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_environment_chooses_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRITON_INTERPRET=1 'auto' runs the kernels on CPU tensors, and the reference only when asked."""
    ran = []
    monkeypatch.setattr(kernels, "forward", lambda *a: ran.append(1) or [])
    qkv, scale, _ = inputs(16, 1, 32, FULL)
    ops.mas_attention_packed(qkv, scale)
    assert ran
    ops.mas_attention_packed(qkv, scale, path="reference")
    monkeypatch.setenv("DTN_FAST_KERNELS", "reference")
    ops.mas_attention_packed(qkv, scale)
    assert len(ran) == 1
