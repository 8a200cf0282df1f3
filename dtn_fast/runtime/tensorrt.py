"""Running of TensorRT (.engine) and TensorRT-RTX (.rtx) engines, after a check against their export manifest."""

from __future__ import annotations

import functools
import statistics
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.errors import DtnError, UsageError
from dtn_fast.model.preprocess import normalise
from dtn_fast.packages import require
from dtn_fast.runtime.batch_graphs import BatchGraphs
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.export_manifest import ExportManifest, read_export_manifest
from dtn_fast.runtime.scorer import COLUMNS, FEATURES, Scorer
from dtn_fast.timing import in_turns

KINDS = {".engine": "tensorrt", ".rtx": "tensorrt_rtx"}


def load_backend(kind: str) -> Any:
    """Imports ``tensorrt`` or ``tensorrt_rtx``.  Raises UsageError with the install command."""
    return require(kind)


def check_loadable(manifest: ExportManifest, version: str, name: str) -> None:
    """Raises UsageError when the engine was built for another GPU or library version than this machine has."""
    if not torch.cuda.is_available():
        raise UsageError(f"{name}: an engine needs an NVIDIA GPU and torch sees none; use a checkpoint or .onnx")
    major, minor = torch.cuda.get_device_capability()
    here = 10 * major + minor
    if manifest.archs and here not in manifest.archs:
        raise UsageError(
            f"{name}: built for compute capability {', '.join(f'{a // 10}.{a % 10}' for a in manifest.archs)}; this "
            f"GPU ({torch.cuda.get_device_name()}) has {major}.{minor}; export it again for this one"
        )
    options = manifest.options
    if options.get("hardware") == "ampere+" and here < 80:
        raise UsageError(f"{name}: built for compute capability 8.0 and up; this GPU has {major}.{minor}")
    gpu = options.get("gpu")
    if gpu and options.get("hardware") == "this" and gpu != torch.cuda.get_device_name():
        raise UsageError(f"{name}: built for {gpu}, this is {torch.cuda.get_device_name()}; export it again here, or "
                         "with --hardware same")  # fmt: skip
    if version != manifest.version and not options.get("version_compatible"):
        raise UsageError(f"{name}: built by {manifest.kind} {manifest.version}, installed is {version}; "
                         f"export it again, or: pip install {manifest.kind}=={manifest.version}")  # fmt: skip


def open_engine(trt: Any, source: Path | bytes, host_code: bool = False) -> Any:
    """Deserialises an engine.  ``host_code``: allow the lean runtime that a version-compatible engine contains.

    Raises DtnError when the library cannot load it.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(source if isinstance(source, bytes) else source.read_bytes())
    if engine is None:
        name = "the engine" if isinstance(source, bytes) else source
        raise DtnError(f"{name}: {trt.__name__} {trt.__version__} cannot load it; export it again on this machine")
    return engine


class EngineScorer(Scorer):
    """Scorer of an engine, with one execution context per batch size; TensorRT's are replayed as CUDA graphs.

    TensorRT-RTX runs without CUDA graphs: it compiles better kernels while it runs, which a graph would not use.
    """

    def __init__(self, trt: Any, path: Path, manifest: ExportManifest) -> None:
        low, _, high = manifest.batches
        super().__init__(manifest.detector_config(), manifest.notice, trt.__name__, high)
        self.manifest, self.weights = manifest, manifest.weights
        self.engine = open_engine(trt, path, bool(manifest.options.get("version_compatible")))
        contexts, raw, config = Contexts(self.engine, manifest.input), manifest.input == "crops", self.config
        self._run = lambda crops: contexts(crops if raw else normalise(crops, config, crops.device))
        self._graphs = BatchGraphs(self._run, high, low) if manifest.kind == "tensorrt" else None
        self._least, self._lock = low, threading.Lock()

    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        batch = torch.from_numpy(np.require(crops, np.uint8, ["C", "W"]))
        with torch.inference_mode():
            if self._graphs is not None:
                return self._graphs(batch).double().cpu().numpy()
            padded = torch.cat([batch, batch.new_zeros(max(self._least - len(batch), 0), *batch.shape[1:])])
            with self._lock:
                return self._run(padded.cuda())[: len(batch)].double().cpu().numpy()


class Contexts:
    """Runs an engine: input on the GPU -> those of COLUMNS that it gives side by side, float32, on the current stream,
    without features, as no temporal head runs here; one context per batch size (shape changes leak the modules of
    ahead-of-time plugins: NVIDIA/TensorRT issue 4849)."""

    def __init__(self, engine: Any, name: str, profiler: Any = None) -> None:
        self._engine, self._name, self._profiler = engine, name, profiler
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self._outputs = [given for given in names if given != name]
        self._made: dict[int, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        context = self._made.get(len(x))
        if context is None:
            context = self._engine.create_execution_context()
            if self._profiler is not None:
                context.profiler = self._profiler
            if not context.set_input_shape(self._name, tuple(x.shape)):
                raise UsageError(f"batch {len(x)}: outside the engine's range; export it with wider --batches")
            self._made[len(x)] = context
        outputs = {name: torch.empty(tuple(context.get_tensor_shape(name)), device=x.device) for name in self._outputs}
        for name, tensor in ((self._name, x), *outputs.items()):
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise DtnError("the engine failed to run; see the messages above, and export it again on this machine")
        return torch.column_stack([outputs[name].flatten(1) if outputs[name].dim() > 1 else outputs[name]
                                   for name in COLUMNS if name in outputs and name != FEATURES])  # fmt: skip


def time_engines(
    trt: Any, engines: Mapping[str, bytes], batch: int, kind_of_input: str, rounds: int = 50
) -> dict[str, float]:
    """Median seconds of each engine at one batch size, replayed in turns."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, data in engines.items():
        engine = open_engine(trt, data)
        rest = tuple(engine.get_tensor_shape(kind_of_input))[1:]
        dtype = torch.uint8 if kind_of_input == "crops" else torch.float32
        graphs = BatchGraphs(Contexts(engine, kind_of_input), batch, batch)
        given = torch.zeros(batch, *rest, dtype=dtype)
        calls[name] = functools.partial(graphs, given)
    times = in_turns(calls, rounds, 3)
    return {name: statistics.median(values) for name, values in times.items()}


def layers(path: Path, batch: int | None = None, rounds: int = 20) -> list[tuple[str, float | None]]:
    """The engine's layers in order, each with its median milliseconds at ``batch`` when one is given."""
    import json

    manifest = read_export_manifest(path, KINDS[path.suffix])
    trt = load_backend(manifest.kind)
    check_loadable(manifest, trt.__version__, str(path))
    engine = open_engine(trt, path, bool(manifest.options.get("version_compatible")))
    inspector = engine.create_engine_inspector()
    found = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    names = [entry if isinstance(entry, str) else entry["Name"] for entry in found]
    if batch is None:
        return [(name, None) for name in names]
    times: dict[str, list[float]] = {}

    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            times.setdefault(name, []).append(milliseconds)

    run = Contexts(engine, manifest.input, Profiler())
    rest = tuple(engine.get_tensor_shape(manifest.input))[1:]
    x = torch.zeros(batch, *rest, dtype=torch.uint8 if manifest.input == "crops" else torch.float32, device="cuda")
    for _ in range(rounds):
        run(x)
        torch.cuda.synchronize()
    return [(name, statistics.median(values)) for name, values in times.items()]


def load(path: Path, runtime: Runtime) -> EngineScorer:
    """Opens an engine.  Raises UsageError when it was not built for this machine."""
    manifest = read_export_manifest(path, KINDS[path.suffix])
    if not torch.cuda.is_available():
        check_loadable(manifest, manifest.version, str(path))
    trt = load_backend(manifest.kind)
    check_loadable(manifest, trt.__version__, str(path))
    return EngineScorer(trt, path, manifest)
