"""The kernels on a real GPU: against float64, captured in a CUDA graph, the same bits every run."""

from __future__ import annotations

import concurrent.futures
from typing import Literal

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from dtn_fast import DTN, DTNConfig
from dtn_fast.kernels import ops, reference
from dtn_fast.model.detector import move_to
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.torch_scorer import TorchScorer

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]


def attention(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(4, n, 3, 8, dim, device="cuda").to(dtype).requires_grad_()
    return qkv, torch.randn(8, device="cuda", requires_grad=True), torch.randn(4, n, 8, dim, device="cuda").to(dtype)


def run(path: str, qkv: Tensor, scale: Tensor, grad: Tensor) -> list[Tensor]:
    out = ops.mas_attention_packed(qkv, scale, path=path)
    return [out.detach(), *torch.autograd.grad(out, (qkv, scale), grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("n", [1, 49, 64, 128, 197, 577, 1024])
def test_attention(n: int, dim: int, dtype: torch.dtype) -> None:
    qkv, scale, grad = attention(n, dim, dtype)
    got, again = run("triton", qkv, scale, grad), run("triton", qkv, scale, grad)
    leaves = qkv.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    out = reference.mas_attention(*leaves[0].unbind(2), leaves[1])
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    for name, a, b, c in zip(("out", "d qkv", "d scale"), got, expected, again, strict=True):
        assert_close(name, a, b, dtype, summed=name == "d scale")
        assert torch.equal(a, c), name


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype, std: float) -> None:
    torch.manual_seed(0)
    shapes = ((2, 128, 512), (2, 128), (2, 128), (2,), (2,))
    x = torch.randn(8, 512, 8, 8, device="cuda").to(dtype)
    weights = [(torch.randn(s, device="cuda") * 0.05) for s in shapes]
    leaves = [t.requires_grad_() for t in (x, weights[0].to(dtype), *weights[1:])]

    def once(path: str, tensors: list[Tensor]) -> list[Tensor]:
        out = ops.moe_gate(*tensors, noise_std=std, seed=3, path=path)
        return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    got, again = once("triton", leaves), once("triton", leaves)
    wide = [t.detach().float().requires_grad_() for t in leaves]
    for name, a, b, c in zip(["y", "x", "w1", "b1", "w2", "b2", "s"], got, once("reference", wide), again, strict=True):
        assert_close(name, a, b.double(), dtype, summed=name not in "yx")
        assert torch.equal(a, c), name


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("shape", [(8, 32, 64, 64), (3, 48, 6, 10), (16, 512, 16, 16)])
def test_bn(shape: tuple[int, ...], dtype: torch.dtype, pool: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, device="cuda") * 1.5 + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), *(torch.randn(shape[1], device="cuda").requires_grad_() for _ in range(2))]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def once(path: str, tensors: list[Tensor]) -> list[Tensor]:
        out = ops.bn_relu(*tensors, pool=pool, path=path)[0]
        torch.manual_seed(1)
        grad = torch.randn(out.shape, device="cuda").to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    got, again = once("triton", leaves), once("triton", leaves)
    for name, a, b, c in zip(["y", "dx", "dw", "db"], got, once("reference", wide), again, strict=True):
        assert_close(name, a, b, dtype, summed=name != "y")
        assert torch.equal(a, c), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("shape", [(16, 512, 8, 8), (3, 48, 5, 7)])
def test_local_connection(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    maps = [torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last) for _ in "mx"]
    columns = [torch.randn(shape[1], device="cuda") for _ in range(3)]
    leaves = [t.requires_grad_() for t in (*maps, torch.randn(shape[1], 1, 3, 3, device="cuda") * 0.4, *columns)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    grad = torch.randn(shape, device="cuda").to(dtype)

    def once(path: str, tensors: list[Tensor]) -> list[Tensor]:
        out = ops.local_connection(*tensors, path=path)[0]
        return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    got, again = once("triton", leaves), once("triton", leaves)
    names = ["y", "dm", "dx", "dw", "db", "d norm weight", "d norm bias"]
    for name, a, b, c in zip(names, got, once("reference", wide), again, strict=True):
        if name != "db":  # nothing but rounding
            assert_close(name, a, b, dtype, summed=name not in ("y", "dx"))
        assert torch.equal(a, c), name


def test_model_trains_under_autocast_and_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    model = DTN(DTNConfig.preset("tiny")).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 128, 128, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        model(images).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        expected = model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(images)
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scoring_replays_a_graph_per_batch_size_from_any_thread(precision: Literal["fp32", "bf16"]) -> None:
    torch.manual_seed(0)
    model = DTN(DTNConfig.preset("tiny")).eval()
    crops = torch.randint(256, (21, 128, 128, 3), dtype=torch.uint8).numpy()
    exact = TorchScorer(model, runtime=Runtime("cpu")).logits(crops)
    scorer = TorchScorer(move_to(model, "cuda"), batch_size=8, runtime=Runtime("cuda", precision))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sizes = [1, 2, 3, 5, 8, 13, 21] * 3
        for size, got in zip(sizes, pool.map(lambda n: scorer.logits(crops[:n]), sizes), strict=True):
            assert got == pytest.approx(exact[:size], abs=2e-3 if precision == "fp32" else 2e-2)
    assert scorer._graphs is not None
    assert set(scorer._graphs._captured) <= {1, 2, 4, 8}
