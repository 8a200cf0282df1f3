"""Report of this machine's packages, runtimes and device."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dtn_fast.cli.terminal import print_table
from dtn_fast.device import choose_precision, choose_threads
from dtn_fast.packages import installed_by
from dtn_fast.runtime.race import choices, folder

NEEDS = {
    "torch": "",
    "triton": "GPU kernels",
    "dlib-bin": "face detection",
    "av": "video",
    "albumentations": "augmentation in training",
    "timm": "dtn_paper in timm's registry, other detectors",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export, ONNX inference",
    "openvino": "ONNX inference on a CPU (--runtime openvino)",
    "MNN": ".mnn files, the fastest float32 on a CPU",
    "tensorrt": ".engine files, on an NVIDIA GPU",
    "tensorrt_rtx": ".rtx files; builds them anywhere",
    "starlette": "dtn-fast serve",
    "uvicorn": "dtn-fast serve",
    "prometheus_client": "dtn-fast serve",
}


class Section(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


def examine() -> Iterator[Section]:
    """Sections of the report: packages, runtimes, device."""
    rows = [["python", platform.python_version(), ""]]
    for package, use in NEEDS.items():
        try:
            rows.append([package, importlib.metadata.version(package), use])
        except importlib.metadata.PackageNotFoundError:
            rows.append([package, "not installed", use])
    yield Section("Packages", ["package", "version", "needed for"], rows)
    yield Section("Runtimes", ["model file", "runtime", "available"], [
        [file, through, probe() or "yes"] for file, through, probe in RUNTIMES
    ])  # fmt: skip
    if raced := [[one.file, one.runtime, one.times(), one.machine] for one in choices()]:
        yield Section(f"Choices of --runtime auto, in {folder()}", ["model file", "runtime", "times", "machine"], raced)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{choose_threads(0)} threads, no GPU"
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    yield Section(
        "Device",
        ["property", "value"],
        [["device", f"{device.type}: {name}"], ["training precision (--precision auto)", precision]],
    )


def _gpu() -> str:
    return "" if torch.cuda.is_available() else "no: torch sees no GPU"


def _imports(module: str, gpu: bool = False) -> Callable[[], str]:
    def probe() -> str:
        if importlib.util.find_spec(module) is None:
            return f"no: not installed; pip install {installed_by(module)}"
        if module.startswith("tensorrt"):  # the package may be installed without its libraries
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"no: {str(error).splitlines()[0][:80]}; pip install {installed_by(module)}"
        return _gpu() if gpu else ""

    return probe


def _provider(name: str) -> Callable[[], str]:
    def probe() -> str:
        try:
            import onnxruntime
        except ImportError:
            return "no: pip install onnxruntime-gpu"
        if name not in onnxruntime.get_available_providers():
            return f"no: this onnxruntime has no {name}; pip install onnxruntime-gpu"
        return _gpu()

    return probe


def _rtx_gpu() -> str:
    major, minor = torch.cuda.get_device_capability()
    known = 10 * major + minor in (75, 80, 86, 89, 120, 121)
    return "" if known else f"no: TensorRT-RTX does not support compute capability {major}.{minor}"


def _compile() -> str:
    if torch.cuda.is_available():
        return _imports("triton")()
    import shutil

    return "" if shutil.which("g++") or shutil.which("clang++") else "no: torch.compile needs a C++ compiler here"


RUNTIMES: list[tuple[str, str, Callable[[], str]]] = [
    ("checkpoint", "torch, eager", lambda: ""),
    ("checkpoint", "torch.compile (--mode compile)", _compile),
    ("checkpoint", "CUDA graph (--mode graph)", _gpu),
    (".onnx", "onnxruntime, CPU", _imports("onnxruntime")),
    (".onnx", "onnxruntime, CUDA (--provider cuda)", _provider("CUDAExecutionProvider")),
    (".onnx", "onnxruntime, TensorRT (--provider tensorrt)", _provider("TensorrtExecutionProvider")),
    (".onnx", "OpenVINO, CPU (--runtime openvino)", _imports("openvino")),
    (".mnn", "MNN, CPU", _imports("MNN")),
    (".engine", "TensorRT", _imports("tensorrt", gpu=True)),
    (".rtx", "TensorRT-RTX, run", lambda: _imports("tensorrt_rtx", gpu=True)() or _rtx_gpu()),
    (".rtx", "TensorRT-RTX, build", _imports("tensorrt_rtx")),
]


def doctor() -> None:
    """Show what this machine can run and, where it cannot, why.

    Example: dtn-fast doctor
    """

    for title, header, rows in examine():
        print_table(title, header, rows)
