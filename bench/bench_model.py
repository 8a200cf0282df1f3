"""Benchmark of the whole model's inference in every runtime, and of timm models.  Run: dtn-fast bench model"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from dtn_fast import DTN, DTNConfig
from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import Case, Compiled, captured, compilations
from dtn_fast.bench.roofline import inference, lower_bound
from dtn_fast.device import choose_precision
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.model.fold import fold
from dtn_fast.model.timm_compat import import_timm

SUITE = "model"
YARDSTICKS = ("vgg16_bn", "resnet50", "vit_base_patch16_224")


BATCHES = {1: 21, 8: 9, 32: 5, 256: 2}
"""Batch size -> number of calls of each contender on a CPU (ten times as many on a GPU)."""


CPU_PART = 32
"""Maximum number of images per call on a CPU."""


def cases(machine: Machine | None = None, quick: bool = False) -> Iterator[Case]:
    """Cases: DTN at every batch size in every installed runtime, and timm's models at one batch size."""
    gpu = torch.cuda.is_available()
    *some, largest = list(BATCHES)
    for batch in some[: 1 if quick else None]:
        yield dtn_case("paper", batch, machine)
    if not gpu:
        yield dtn_case("tiny", 8, machine)
    if not quick:
        yield from yardsticks(256 if gpu else 4)
        yield dtn_case("paper", largest, machine)


def half(device: torch.device) -> torch.dtype | None:
    """The 16-bit dtype that the hardware supports, or None."""
    dtype = choose_precision("auto", device)
    return None if dtype == torch.float32 else dtype


def dtn_case(preset: str, batch: int, machine: Machine | None) -> Case:
    """Case of DTN: eager, channels_last, folded, 16 bit, and each installed runtime; errors: logits against float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = DTN(DTNConfig.preset(preset)).eval().requires_grad_(False)
    side = model.config.image_size
    part = batch if device.type == "cuda" else min(batch, CPU_PART)
    images = torch.randn(part, 3, side, side)
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
    if part < batch:
        notes.append(f"{batch // part} calls of {part} images each: all runtimes at once would not fit in memory")
    for title, make in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        try:
            runs[title] = make(model, images)
        except (ImportError, DtnError) as error:
            notes.append(f"{title}: not run ({error})")
    with torch.inference_mode():
        errors, made = dict[str, float](), dict[str, Compiled]()
        for name, run in runs.items():
            with compilations(made, name):
                errors[name] = float((run()[:4].double().cpu() - exact).abs().max())
        if device.type == "cuda":
            runs[ours + ", CUDA graph"] = captured(runs[ours])
            errors[ours + ", CUDA graph"], ours = errors[ours], ours + ", CUDA graph"
            notes.append("float32 products and convolutions run in TF32, as in training")
    parts = inference(model.config, batch, 2 if dtype is not None else 4)
    work = sum(p.flops for p in parts), sum(p.bytes for p in parts)
    bound = lower_bound(parts, machine) if machine else 0.0
    calls = {name: _without_gradients(run, batch // part) for name, run in runs.items()}
    rounds = BATCHES.get(batch, 9) * (10 if device.type == "cuda" else 1)
    return Case(SUITE, f"DTN {preset} {side}x{side}, batch {batch}", calls, ours, "eager float32 NCHW", batch, *work,
                bound, errors, tuple(notes), made, rounds, tail=True)  # fmt: skip


@functools.lru_cache(maxsize=1)  # two runtimes in a row run the same file
def _onnx(model: DTN, quantized: bool, precision: Literal["fp32", "fp16"], target: Literal["cpu", "gpu"]) -> bytes:
    """The model as ONNX; INT8 is calibrated on noise, because the speed does not depend on the crops."""
    from dtn_fast.export.config import OnnxConfig, QuantizeConfig
    from dtn_fast.export.quantize import quantize
    from dtn_fast.export.to_onnx import example_inputs, to_proto

    proto = to_proto(copy.deepcopy(model), OnnxConfig(precision, "images"))
    if quantized:
        proto = quantize(
            proto, example_inputs(model.config, "crops", 8, 0).numpy(), QuantizeConfig("int8", "int8", target)
        )
    return proto.SerializeToString()


def _onnxruntime(quantized: bool, model: DTN, images: Tensor) -> Callable[[], Tensor]:
    from dtn_fast.onnx_session import session_of

    session = session_of(_onnx(model, quantized, "fp32", "cpu"), "the model")
    array = images.numpy()
    return lambda: torch.from_numpy(session.run(["logits"], {"images": array})[0])


def _openvino(quantized: bool, model: DTN, images: Tensor) -> Callable[[], Tensor]:
    from dtn_fast.runtime.openvino import read, request_of

    request = request_of(read(_onnx(model, quantized, "fp32", "cpu"), "the model"), "the model")
    array = images.numpy()
    return lambda: torch.from_numpy(request.infer({"images": array})["logits"])


def _mnn(model: DTN, images: Tensor) -> Callable[[], Tensor]:
    from dtn_fast.export.to_mnn import convert
    from dtn_fast.runtime.mnn import forward, open_module

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.mnn")
        path.write_bytes(convert(copy.deepcopy(model), "the model"))
        net = open_module(path)
    array = images.numpy()
    return lambda: torch.from_numpy(forward(net, array))


def _engine(kind: str, quantized: bool, model: DTN, images: Tensor) -> Callable[[], Tensor]:
    """An engine of this batch size alone, replayed as a CUDA graph."""
    from dtn_fast.export.config import EngineConfig
    from dtn_fast.export.to_tensorrt import RTX_ARCHS, build
    from dtn_fast.runtime.batch_graphs import BatchGraphs
    from dtn_fast.runtime.tensorrt import Contexts, load_backend, open_engine

    trt, batch = load_backend(kind), len(images)
    major, minor = torch.cuda.get_device_capability()
    if kind == "tensorrt_rtx" and 10 * major + minor not in RTX_ARCHS:
        raise UsageError(f"TensorRT-RTX compiles for no compute capability {major}.{minor}")
    config = EngineConfig((batch, batch, batch), archs=(10 * major + minor,))
    data, _ = build(trt, _onnx(model, quantized, "fp16", "gpu"), "images", config, rtx=kind == "tensorrt_rtx")
    graphs = BatchGraphs(Contexts(open_engine(trt, data), "images"), batch, batch)
    return lambda: graphs(images)


ON_CPU: dict[str, Callable[[DTN, Tensor], Callable[[], Tensor]]] = {
    "onnxruntime float32": functools.partial(_onnxruntime, False),
    "OpenVINO float32": functools.partial(_openvino, False),
    "onnxruntime INT8": functools.partial(_onnxruntime, True),
    "OpenVINO INT8": functools.partial(_openvino, True),
    "MNN float32": _mnn,
}
ON_GPU: dict[str, Callable[[DTN, Tensor], Callable[[], Tensor]]] = {
    "TensorRT float16": functools.partial(_engine, "tensorrt", False),
    "TensorRT INT8 and float16": functools.partial(_engine, "tensorrt", True),
    "TensorRT-RTX float16": functools.partial(_engine, "tensorrt_rtx", False),
}


def _without_gradients(run: Callable[[], Any], times: int = 1) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            for _ in range(times):
                run()

    return call


def yardsticks(batch: int) -> Iterator[Case]:
    """Cases of timm's vgg16_bn, resnet50 and ViT-B/16 at 224x224, with DTN's variants: NCHW, channels_last, 16 bit."""
    try:
        timm = import_timm()
    except UsageError:
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
            runs.pop("+ channels_last")  # ``last`` now has the 16-bit weights
            runs[ours] = lambda narrow=narrow, xn=xn: narrow(xn)
            if device.type == "cuda":
                compiled = torch.compile(narrow)
                runs["+ torch.compile"] = lambda compiled=compiled, xn=xn: compiled(xn)
        calls = {title: _without_gradients(run) for title, run in runs.items()}
        yield Case(SUITE, f"timm {name} 224x224, batch {batch}", calls, ours, "eager float32 NCHW", batch, rounds=5)


@pytest.mark.parametrize(("preset", "batch"), [("tiny", 8), ("paper", 1)])
def bench_dtn(compare, preset: str, batch: int) -> None:
    compare(dtn_case(preset, batch, None))
