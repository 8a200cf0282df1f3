"""BN + ReLU + pool kernels against float64: outputs, statistics, gradients, ties, far means, NaN, odd shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor, nn

from dtn_fast import DTN, DTNConfig
from dtn_fast.kernels import batch_norm_kernel as kernels
from dtn_fast.kernels import launch_values, ops

EPS = 1e-5
SHAPES = [(2, 16, 8, 8), (3, 48, 6, 10), (1, 5, 2, 2), (2, 130, 4, 4), (5, 32, 14, 12)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, shift: float = 0.5) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(shape[1])
    x = (torch.randn(shape, generator=generator) * 1.5 + shift).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], generator=generator)  # of both signs: a falling scale turns the maximum around
    bias = torch.randn(shape[1], generator=generator) * 0.5
    return [x, weight, bias], torch.randn(shape, generator=generator).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS).relu()
    return F.max_pool2d(y, 2) if pool else y


def gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    out.backward(grad.to(out.dtype)[:, :, : out.shape[2], : out.shape[3]])
    return [out.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape: tuple[int, ...], pool: bool, dtype: torch.dtype) -> None:
    tensors, grad = inputs(shape, dtype)
    got = gradients(lambda *t: ops.bn_relu(*t, EPS, pool, path="triton")[0], tensors, grad)
    expected = gradients(lambda *t: exact(*t, pool), [t.double() for t in tensors], grad.double())
    peer = gradients(lambda *t: ops.bn_relu(*t, EPS, pool, path="reference")[0], tensors, grad)
    for name, a, b, c in zip(("y", "dx", "dw", "db"), got, expected, peer, strict=True):
        assert a.dtype == c.dtype
        # torch pools what it has rounded, and the interpreter truncates to bfloat16: neither compares there
        comparable = not pool and dtype != torch.bfloat16
        assert_close(name, a, b, dtype, c if comparable else None, summed=name != "y")
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    again = gradients(lambda *t: ops.bn_relu(*t, EPS, pool, path="triton")[0], tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("programs", [1, 7, 4096])
def test_statistics_at_any_split(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weight, bias), _ = inputs((3, 24, 10, 14), torch.float32, shift=300.0)
    values = {"BLOCK_T": 16, "BLOCK_C": 16, "PROGRAMS": programs, "num_warps": 4, "num_stages": 1}
    monkeypatch.setitem(launch_values.override, "bn_stats", {**values, "UNROLL": 2})
    monkeypatch.setitem(launch_values.override, "bn_backward_stats", values)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y, mean, var = ops.bn_relu(*leaves, EPS, True, path="triton")
    wide = x.detach().double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert not mean.requires_grad
    y.square().sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact(*doubles, True).square().sum().backward()
    torch.testing.assert_close(weight.grad.double(), doubles[1].grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias.grad.double(), doubles[2].grad, rtol=1e-3, atol=1e-3)


def test_the_first_of_equal_maxima_gets_the_gradient() -> None:
    x = torch.tensor([[1.0, 1.0, -3.0, -3.0], [1.0, 0.0, -3.0, -3.0]]).repeat(2, 8, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    for weight, bias in ((1.0, 0.25), (-1.0, 0.25), (0.0, 0.25), (0.0, 0.0)):  # the last: ReLU at zero passes nothing
        columns = [torch.full((8,), weight).requires_grad_(), torch.full((8,), bias).requires_grad_()]
        leaves = [x.clone().requires_grad_(), *columns]
        other = [t.detach().double().requires_grad_() for t in leaves]
        ops.bn_relu(*leaves, EPS, True, path="triton")[0].sum().backward()
        exact(*other, True).sum().backward()
        for a, b in zip(leaves, other, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pool", [False, True])
def test_what_is_not_finite_shows(bad: float, pool: bool) -> None:
    (x, weight, bias), _ = inputs((2, 16, 4, 4), torch.float32)
    x[0, 3, 1, 2] = bad
    leaves = [t.requires_grad_() for t in (x.detach(), weight, bias)]
    y, mean, var = ops.bn_relu(*leaves, EPS, pool, path="triton")
    y.sum().backward()
    assert y[:, 3].isnan().all()
    assert var[3].isnan()
    assert leaves[0].grad[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    assert y[:, 4:].isfinite().all()
    assert mean[4:].isfinite().all()


def test_the_backbone_trains_as_its_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DTNConfig.preset("tiny", image_size=32, noise_std=0.0)
    images, results = torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last), []
    monkeypatch.setenv("DTN_FAST_KERNELS", "triton")
    for on in (False, True):
        torch.manual_seed(0)
        model = DTN(config).to(memory_format=torch.channels_last).train()
        model.backbone.norm_kernels = on
        calls: list[str] = []
        forward = kernels.forward
        monkeypatch.setattr(kernels, "forward", lambda *a, calls=calls, f=forward: calls.append("bn") or f(*a))
        x = model.backbone(images)
        x.square().sum().backward()
        monkeypatch.setattr(kernels, "forward", forward)
        results.append((x.detach(), dict(model.backbone.named_buffers()), model.backbone[0].weight.grad))
        assert len(calls) == (9 if on else 0)
    (x, buffers, grad), (y, others, grad_) = results
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4)
    for name, buffer in buffers.items():
        torch.testing.assert_close(others[name], buffer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_, grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()))
    assert isinstance(model.backbone[1], nn.BatchNorm2d)


def test_the_operator_is_registered_as_torch_expects() -> None:
    (x, weight, bias), _ = inputs((2, 16, 4, 6), torch.float32)
    for pool in (False, True):
        torch.library.opcheck(torch.ops.dtn_fast.bn_forward, (x, weight, bias, EPS, pool))
        y, mean, var = torch.ops.dtn_fast.bn_forward(x, weight, bias, EPS, pool)
        inputs_ = (torch.ones_like(y), x, weight, bias, mean, var, EPS, pool)
        torch.library.opcheck(torch.ops.dtn_fast.bn_backward, inputs_)


def test_wrong_inputs_are_named() -> None:
    (x, weight, bias), _ = inputs((2, 16, 3, 4), torch.float32)
    for wrong, message in (
        ((x[0], weight, bias), "x: got"),
        ((x, weight[1:], bias), "weight: shape"),
        ((x, weight, bias[1:]), "bias: shape"),
        ((x.int(), weight, bias), "x: got"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.bn_relu(*wrong)
    with pytest.raises(ValueError, match="a pool of 3x4"):
        ops.bn_relu(x, weight, bias, EPS, True, path="triton")
