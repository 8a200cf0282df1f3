"""The whole model, inference: every runtime on this machine, timm's yardsticks beside it.  Run: dtn-fast bench model"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtn_fast import DTN, DTNConfig
from dtn_fast.bench.measure import Case, captured
from dtn_fast.bench.roofline import Machine, floor, inference
from dtn_fast.fold import fold
from dtn_fast.train.recipe import choose_precision

SUITE = "model"
YARDSTICKS = ("vgg16_bn", "resnet50", "vit_base_patch16_224")


def cases(machine: Machine | None = None, quick: bool = False) -> Iterator[Case]:
    """DTN at several batch sizes, and timm's models at one."""
    gpu = torch.cuda.is_available()
    for batch in ([1, 32, 256] if gpu else [1, 8])[: 1 if quick else None]:
        yield dtn_case("paper", batch, machine)
    if not gpu:
        yield dtn_case("tiny", 8, machine)
    if not quick:
        yield from yardsticks(256 if gpu else 4)


def half(device: torch.device) -> torch.dtype | None:
    """The 16-bit dtype that the hardware computes in, if any."""
    dtype = choose_precision("auto", device)
    return None if dtype == torch.float32 else dtype


def dtn_case(preset: str, batch: int, machine: Machine | None) -> Case:
    """Eager, channels_last, folded, 16 bit, and what else is installed; errors are of the logits against float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = DTN(DTNConfig.preset(preset)).eval().requires_grad_(False)
    side = model.config.image_size
    images = torch.randn(batch, 3, side, side)
    exact = fold(model.double())(images[:4].double())
    model = model.float().to(device)
    last = DTN(model.config).eval().requires_grad_(False).to(device)
    last.load_state_dict(model.state_dict())
    last = last.to(memory_format=torch.channels_last)
    folded = fold(last).to(memory_format=torch.channels_last)
    x = images.to(device)
    xl = x.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Tensor]] = {
        "eager float32 NCHW": lambda: model(x),
        "+ channels_last": lambda: last(xl),
        "+ folded": lambda: folded(xl),
    }
    ours = "+ folded"
    dtype = half(device)
    if dtype is not None:
        narrow = fold(last).to(dtype).to(memory_format=torch.channels_last)
        xn = xl.to(dtype)
        runs[f"+ {str(dtype).removeprefix('torch.')} weights"] = lambda: narrow(xn)
        ours = f"+ {str(dtype).removeprefix('torch.')} weights"
        if device.type == "cuda":
            compiled = torch.compile(narrow)
            runs["+ torch.compile"] = lambda: compiled(xn)
            ours = "+ torch.compile"
    notes: list[str] = []
    if device.type == "cpu":
        try:
            runs["onnxruntime float32"] = _onnxruntime(model, images)
        except ImportError as error:
            notes.append(f"onnxruntime: not run ({error})")
    with torch.inference_mode():
        errors = {name: float((run()[:4].double().cpu() - exact).abs().max()) for name, run in runs.items()}
        if device.type == "cuda":
            runs[ours + ", CUDA graph"] = captured(runs[ours])
            errors[ours + ", CUDA graph"], ours = errors[ours], ours + ", CUDA graph"
    parts = inference(model.config, batch, 2 if dtype is not None else 4)
    work = sum(p.flops for p in parts), sum(p.bytes for p in parts)
    least = floor(parts, machine) if machine else 0.0
    calls = {name: _without_gradients(run) for name, run in runs.items()}
    return Case(SUITE, f"DTN {preset} {side}x{side}, batch {batch}", calls, ours, "eager float32 NCHW", batch, *work,
                least, errors, tuple(notes), rounds=7)  # fmt: skip


def _without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return run()

    return call


def _onnxruntime(model: DTN, images: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    from dtn_fast.export.to_onnx import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_onnx(model, path)
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    array = images.numpy()
    return lambda: torch.from_numpy(session.run(None, {"images": array})[0])


def yardsticks(batch: int) -> Iterator[Case]:
    """timm's vgg16_bn, resnet50 and ViT-B/16 at 224x224, as in the same run's DTN: NCHW, channels_last, 16 bit."""
    try:
        importlib.import_module("dtn_fast.timm_models")  # lets timm import beside a CPU torch, so it comes first
        timm = importlib.import_module("timm")
    except ImportError:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in YARDSTICKS:
        model: nn.Module = timm.create_model(name, pretrained=False).eval().requires_grad_(False).to(device)
        x = torch.randn(batch, 3, 224, 224, device=device)
        last = (
            timm.create_model(name, pretrained=False)
            .eval()
            .requires_grad_(False)
            .to(device, memory_format=torch.channels_last)
        )
        xl = x.contiguous(memory_format=torch.channels_last)
        runs = {
            "eager float32 NCHW": lambda model=model, x=x: model(x),
            "+ channels_last": lambda last=last, xl=xl: last(xl),
        }
        ours = "+ channels_last"
        if (dtype := half(device)) is not None:
            narrow = last.to(dtype)
            xn = xl.to(dtype)
            ours = f"+ {str(dtype).removeprefix('torch.')} weights"
            runs.pop("+ channels_last")  # its weights are the narrow ones now
            runs[ours] = lambda narrow=narrow, xn=xn: narrow(xn)
            if device.type == "cuda":
                compiled = torch.compile(narrow)
                runs["+ torch.compile"] = lambda compiled=compiled, xn=xn: compiled(xn)
        calls = {title: _without_gradients(run) for title, run in runs.items()}
        yield Case(SUITE, f"timm {name} 224x224, batch {batch}", calls, ours, "eager float32 NCHW", batch, rounds=5)


@pytest.mark.parametrize(("preset", "batch"), [("tiny", 8), ("paper", 1)])
def bench_dtn(compare, preset: str, batch: int) -> None:
    compare(dtn_case(preset, batch, None))
