"""The operators as torch sees them: gradcheck, opcheck, compile, export, autocast, DDP, paths, errors."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import SMALL
from torch import Tensor, nn

from dtn_fast import DTN
from dtn_fast.kernels import dispatch, mas_attention, ops, reference

ROOT = Path(__file__).parents[2]


def attention(n: int = 5, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, n, 2, 4, dtype=dtype, requires_grad=grad) for _ in range(3)] + [
        torch.randn(2, dtype=dtype, requires_grad=grad)
    ]


def gate(dtype: torch.dtype = torch.float64, window: tuple[int, ...] = (), grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, 16, 2, 3), (2, 16, 16, *window), (2, 16), (2, 16, *window), (2,), (2,)]
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


# ------------------------------------------------------------------------------------------------ gradients


def test_gradcheck_attention() -> None:
    assert torch.autograd.gradcheck(ops.mas_attention, attention())
    qkv = torch.randn(1, 4, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.mas_attention_packed, (qkv, attention()[3]))


@pytest.mark.parametrize("window", [(), (3, 3)])
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_gradcheck_gate(std: float, window: tuple[int, ...], full: bool) -> None:
    call = lambda *t: ops.moe_gate(*t, noise_std=std, seed=5)
    # with windows along random directions: one by one, the 9,216 elements of w1 take 15 s
    assert torch.autograd.gradcheck(call, gate(window=window), fast_mode=bool(window) and not full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_backward_is_autograds(dtype: torch.dtype) -> None:
    """The written-out gradients against autograd through the forward."""
    leaves = attention(n=6, dtype=dtype)
    grad = torch.randn(2, 6, 2, 4).to(dtype)
    reference.mas_attention(*leaves).backward(grad)
    got = reference.mas_attention_backward(grad, *(t.detach() for t in leaves))
    for a, b in zip(got, leaves, strict=True):
        assert torch.allclose(a.float(), b.grad.float(), atol=0.05 if dtype == torch.bfloat16 else 1e-5)


# ------------------------------------------------------------------------------------------------ torch.library


def test_attention_has_no_limit_of_pairs() -> None:
    assert mas_attention.unsupported(torch.empty(8192, 197, 9, 64, dtype=torch.bfloat16, device="meta")) is None


@pytest.mark.parametrize("n", [5, 130])
def test_opcheck_attention(n: int) -> None:
    q, k, v, scale = attention(n, torch.float32, grad=False)
    out, log_sum = torch.ops.dtn_fast.mas_forward(q, k, v, scale, "auto")
    assert log_sum.shape == ((0,) if n <= 128 else (2, 2, n))
    packed = torch.stack((q, k, v), 2)
    cases = {
        "mas_forward": (q, k, v, scale, "auto"),
        "mas_backward": (out, q, k, v, scale, out, log_sum, "auto"),
        "mas_packed_forward": (packed, scale, "auto"),
        "mas_packed_backward": (out, packed, scale, out, log_sum, "auto"),
    }
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(torch.ops.dtn_fast, name).default, arguments)


def test_opcheck_gate() -> None:
    tensors = gate(torch.float32, grad=False)
    for seed, std in ((None, 0.0), (torch.tensor(3), 0.5)):
        for keep in (False, True):
            arguments = (*tensors, seed, std, keep, "auto")
            torch.library.opcheck(torch.ops.dtn_fast.moe_forward.default, arguments)
        out, *kept = torch.ops.dtn_fast.moe_forward(*arguments)
        arguments = (out, *tensors, seed, std, *kept, "auto")
        torch.library.opcheck(torch.ops.dtn_fast.moe_backward.default, arguments)


def test_compile_whole_model_with_dynamic_batch_and_one_graph() -> None:
    torch.manual_seed(0)
    model = DTN(SMALL).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        images = torch.randn(batch, 3, 64, 64)
        expected, got = model(images), compiled(images)
        assert torch.allclose(expected, got, atol=1e-5)
        wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
        for a, b in zip(torch.autograd.grad(got.sum(), list(model.parameters())), wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    model.train()
    assert torch._dynamo.explain(model)(images).graph_break_count == 0


def test_export_save_and_load() -> None:
    torch.manual_seed(0)
    model = DTN(SMALL).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    assert {"dtn_fast.mas_packed_forward.default", "dtn_fast.moe_forward.default"} <= {
        str(node.target) for node in program.graph.nodes
    }
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    images = torch.randn(5, 3, 64, 64)
    assert torch.allclose(torch.export.load(file).module()(images), model(images), atol=1e-5)


def test_autocast() -> None:
    q, k, v, scale = attention(dtype=torch.float32)
    tensors = gate(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, gated = ops.mas_attention(q, k, v, scale), ops.moe_gate(*tensors)
        packed = ops.mas_attention_packed(torch.stack((q, k, v), 2), scale)
    assert out.dtype == gated.dtype == packed.dtype == torch.bfloat16
    (out.float().sum() + gated.float().sum()).backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (q, k, v, scale, *tensors))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(out.float(), reference.mas_attention(q, k, v, scale), atol=0.05)


def test_vmap_says_that_it_is_not_supported() -> None:
    q, k, v, scale = attention(grad=False)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda s: ops.mas_attention(q, k, v, s))(scale.expand(3, -1))


def _ddp_step(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(DTN(SMALL).eval())  # eval: no batch statistics, no noise
    images = torch.load(f"{folder}/images.pt", weights_only=True)
    model(images[rank::2]).square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{folder}/grads.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that outlive the interpreter would abort the process, rarely


def test_ddp_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    mp.start_processes(_ddp_step, (str(tmp_path),), nprocs=2, start_method="spawn")
    torch.manual_seed(0)
    model = DTN(SMALL).eval()
    model(images).square().mean().backward()
    got = torch.load(tmp_path / "grads.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        assert torch.allclose(got[name], parameter.grad, atol=1e-6), name


# ------------------------------------------------------------------------------------------------ paths


def test_paths_are_forced_by_argument_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, scale = attention(dtype=torch.float32, grad=False)
    tensors = gate(torch.float32, grad=False)
    assert torch.equal(ops.mas_attention(q, k, v, scale), ops.mas_attention(q, k, v, scale, path="reference"))
    for call in (
        lambda path: ops.mas_attention(q, k, v, scale, path=path),
        lambda path: ops.mas_attention_packed(torch.stack((q, k, v), 2), scale, path=path),
        lambda path: ops.moe_gate(*tensors, path=path),
    ):
        with pytest.raises(ValueError, match="'triton' was forced"):
            call("triton")
        monkeypatch.setenv("DTN_FAST_KERNELS", "triton")
        with pytest.raises(ValueError, match="'triton' was forced"):
            call(None)
        monkeypatch.setenv("DTN_FAST_KERNELS", "fast")
        with pytest.raises(ValueError, match="allowed are auto, triton, reference"):
            call(None)
        monkeypatch.delenv("DTN_FAST_KERNELS")


class Elsewhere:
    """What the choice of path looks at, of a tensor on a GPU that this machine does not have."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype = torch.bfloat16, kind: str = "cuda") -> None:
        self.dtype, self.device = dtype, torch.device(kind)


def test_choice_of_path_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch._notice.cache_clear()
    choose = lambda x, refusal=None, path="auto": dispatch.use_triton(path, "op", x, refusal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(Elsewhere())
        assert choose(Elsewhere(torch.float16))
        assert not choose(Elsewhere(), path="reference")
    with pytest.warns(UserWarning, match="head dimension 48; using the torch reference"):
        assert not choose(Elsewhere(), "head dimension 48")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choose(Elsewhere(), "head dimension 48"), "said once"
    with pytest.warns(UserWarning, match="float32 without TF32"):
        assert not choose(Elsewhere(torch.float32))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert choose(Elsewhere(torch.float32))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    with pytest.warns(UserWarning, match="device xpu"):
        assert not choose(Elsewhere(kind="xpu"))
    capability = (7, 0)
    with pytest.warns(UserWarning, match="under 8.0"):
        assert not choose(Elsewhere())
    with pytest.raises(ValueError, match="was forced, but the kernels do not take a GPU of compute capability"):
        choose(Elsewhere(), path="triton")


def test_strict_float32_composite_is_the_same_function() -> None:
    q, k, v, scale = attention(dtype=torch.float64)
    assert torch.allclose(mas_attention._sdpa(q, k, v, scale), reference.mas_attention(q, k, v, scale), atol=1e-12)


def test_maps_come_from_the_reference_and_sum_to_the_gate() -> None:
    q, k, v, scale = attention(grad=False)
    out, maps = ops.mas_attention(q, k, v, scale, return_maps=True)
    assert torch.allclose(out, ops.mas_attention(q, k, v, scale))
    assert torch.allclose(maps.sum(-1), scale.sigmoid()[None, :, None].expand(2, -1, 5))


def test_importing_the_operators_loads_no_triton() -> None:
    code = "import sys, torch, dtn_fast.kernels.ops as o; o.mas_attention(*torch.randn(3, 1, 4, 2, 8), torch.zeros(2));"
    code += "assert 'triton' not in sys.modules"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=env)


# ------------------------------------------------------------------------------------------------ errors


def broken_attention():
    q, k, v, scale = attention(dtype=torch.float32, grad=False)
    yield "q", "B, N, H, D", (q[0], k[0], v[0], scale)
    yield "k", r"shape is \(2, 4, 2, 4\), q's is \(2, 5, 2, 4\)", (q, k[:, :4], v, scale)
    yield "v", "dtype is torch.float64", (q, k, v.double(), scale)
    yield "v", "device is meta", (q, k, v.to("meta"), scale)
    yield "q", "int64", (q.long(), k.long(), v.long(), scale)
    yield "head_scale", r"\(3,\); it must be \[2\]", (q, k, v, torch.zeros(3))
    yield "head_scale", "on meta", (q, k, v, scale.to("meta"))
    yield "head_scale", "floating", (q, k, v, scale.long())
    yield "q", "last dimension must be contiguous", (torch.randn(2, 4, 2, 5).permute(0, 3, 2, 1), k, v, scale)
    yield "q", "no dimension may be empty", (q[:, :0], k[:, :0], v[:, :0], scale)


def test_attention_errors_name_the_argument() -> None:
    for name, word, arguments in broken_attention():
        with pytest.raises(ValueError, match=f"(?s)^{name}: .*{word}"):
            ops.mas_attention(*arguments)
    with pytest.raises(ValueError, match=r"qkv: shape is \(1, 2, 3\)"):
        ops.mas_attention_packed(torch.zeros(1, 2, 3), torch.zeros(1))


def test_gate_errors_name_the_argument() -> None:
    x, w1, b1, w2, b2, scale = gate(torch.float32, grad=False)
    for name, word, arguments in (
        ("x", "floating", (x[0], w1, b1, w2, b2, scale)),
        ("x", "floating", (x.long(), w1, b1, w2, b2, scale)),
        ("w1", r"\[E, M, 16\]", (x, w1[:, :, :8], b1, w2, b2, scale)),
        ("w1", "5, 5", (x, torch.zeros(2, 16, 16, 5, 5), b1, w2, b2, scale)),
        ("b1", r"\(2, 8\)", (x, w1, b1[:, :8], w2, b2, scale)),
        ("w2", r"\[2, 16\]", (x, w1, b1, w2[:1], b2, scale)),
        ("expert_scale", r"\[2\]", (x, w1, b1, w2, b2, scale[:1])),
        ("b2", "on meta", (x, w1, b1, w2, b2.to("meta"), scale)),
        ("x", "24 channels", (x[:, :8].repeat(1, 3, 1, 1), w1.repeat(1, 1, 2)[:, :, :24], b1, w2, b2, scale)),
        ("w1", "8 hidden units", (x, w1[:, :8], b1[:, :8], w2[:, :8], b2, scale)),
    ):
        with pytest.raises(ValueError, match=f"(?s)^{name}: .*{word}"):
            ops.moe_gate(*arguments)
    with pytest.raises(ValueError, match="noise_std"):
        ops.moe_gate(x, w1, b1, w2, b2, scale, noise_std=-1.0)
