"""The local connection's kernels against float64: outputs, statistics, every gradient, odd maps, borders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from dtn_fast import DTN, DTNConfig
from dtn_fast.kernels import launch_values, ops
from dtn_fast.kernels import local_connection_kernel as kernels

EPS = 1e-5
SHAPES = [(2, 16, 8, 8), (3, 48, 5, 7), (4, 5, 1, 3), (2, 130, 4, 4), (7, 32, 2, 2)]
NAMES = ("y", "dm", "dx", "dw", "d norm weight", "d norm bias")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, shift: float = 0.3) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(shape[1])

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    maps = [(draw(*shape) + shift).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    channels = shape[1]
    columns = [draw(channels, 1, 3, 3) * 0.4, draw(channels), draw(channels), draw(channels)]
    return [*maps, *columns], draw(*shape).to(dtype)


def exact(m: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    z = F.conv2d(m, weight, bias, padding=1, groups=m.shape[1])
    return x + F.batch_norm(z, None, None, norm_weight, norm_bias, True, 0.0, EPS)


def gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(tensors[i].grad for i in (0, 1, 2, 4, 5))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, grad = inputs(shape, dtype)
    call = lambda *t: ops.local_connection(*t, EPS, path="triton")[0]
    got, again = gradients(call, tensors, grad), gradients(call, tensors, grad)
    expected = gradients(exact, [t.double() for t in tensors], grad.double())
    for name, a, b, c in zip(NAMES, got, expected, again, strict=True):
        assert_close(name, a, b, dtype, summed=name not in ("y", "dx"))  # dm sums what BN's sums take out
        assert torch.equal(a, c), name
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("positions", [1, 16, 32, 64])  # a line of 1, 2, 4 and 8 of three maps
def test_at_any_split(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, grad = inputs((3, 24, 5, 6), torch.float32)
    tiles = {"BLOCK_T": positions, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setitem(launch_values.override, "lc_forward", tiles)
    monkeypatch.setitem(launch_values.override, "lc_backward", tiles)
    got = gradients(lambda *t: ops.local_connection(*t, EPS, path="triton")[0], tensors, grad)
    expected = gradients(exact, [t.double() for t in tensors], grad.double())
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert_close(name, a, b, torch.float32, summed=True)
    _, mean, var = ops.local_connection(*tensors, EPS, path="triton")
    z = F.conv2d(tensors[0].double(), tensors[2].double(), tensors[3].double(), padding=1, groups=24)
    torch.testing.assert_close(mean.double(), z.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), z.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)


def test_the_convolutions_bias_has_no_gradient() -> None:
    tensors, grad = inputs((2, 16, 4, 4), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    ops.local_connection(*leaves, EPS, path="triton")[0].backward(grad)
    assert torch.equal(leaves[3].grad, torch.zeros(16))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact(*wide).backward(grad.double())
    assert wide[3].grad.abs().max() < 1e-12


def test_a_nan_shows_in_its_channel_alone() -> None:
    tensors, _ = inputs((2, 16, 4, 4), torch.float32)
    tensors[0][1, 3, 2, 2] = torch.nan
    y, _, var = ops.local_connection(*tensors, EPS, path="triton")
    assert y[:, 3].isnan().all()
    assert var[3].isnan()
    assert y[:, :3].isfinite().all()
    assert y[:, 4:].isfinite().all()


def test_a_block_trains_as_its_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config, results = DTNConfig.preset("tiny", image_size=64, noise_std=0.0), []
    maps = torch.randn(3, 128, 2, 2).contiguous(memory_format=torch.channels_last)
    monkeypatch.setenv("DTN_FAST_KERNELS", "triton")
    for on in (False, True):
        torch.manual_seed(0)
        block = DTN(config).blocks[0].train()
        block.norm_kernels = on  # type: ignore[assignment]
        x, forward = maps.clone().requires_grad_(), kernels.forward
        calls: list[str] = []
        monkeypatch.setattr(kernels, "forward", lambda *a, calls=calls, f=forward: calls.append("lc") or f(*a))
        y = block(x)
        y.square().sum().backward()
        monkeypatch.setattr(kernels, "forward", forward)
        results.append((y.detach(), x.grad, block.local[0].weight.grad, dict(block.local.named_buffers())))
        assert len(calls) == on
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-3)


def test_a_frozen_bn_is_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTN_FAST_KERNELS", "triton")
    block = DTN(DTNConfig.preset("tiny", image_size=64)).blocks[0].train()
    block.local[1].eval()
    x, mixed = torch.randn(2, 2, 128, 2, 2)
    assert torch.equal(block._connected(x, mixed), x + block.local(mixed))
    assert not block.local[1].running_mean.any()


def test_the_operator_is_registered_as_torch_expects() -> None:
    tensors, _ = inputs((2, 16, 3, 4), torch.float32)
    torch.library.opcheck(torch.ops.dtn_fast.lc_forward.default, (*tensors, EPS))
    y, z, mean, var = torch.ops.dtn_fast.lc_forward(*tensors, EPS)
    m, _, weight, _, *norm = tensors
    torch.library.opcheck(torch.ops.dtn_fast.lc_backward.default, (y, m, weight, z, *norm, mean, var, EPS))


def test_wrong_inputs_are_named() -> None:
    tensors, _ = inputs((2, 16, 3, 4), torch.float32)
    for at, name in ((1, "m, x"), (2, "weight"), (3, "bias"), (4, "norm_weight"), (5, "norm_bias")):
        wrong = [t[1:] if i == at else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=f"^{name}: "):
            ops.local_connection(*wrong)
