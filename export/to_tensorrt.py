"""Builds a TensorRT (.engine) or TensorRT-RTX (.rtx) engine from an exported ONNX model, with its export manifest.

The modules ``tensorrt`` and ``tensorrt_rtx`` have the same interface, so one code path takes either as ``trt``.
TensorRT-RTX builds for any GPU and needs none; TensorRT builds for this machine's GPU.  Networks are strongly typed:
the ONNX file sets the precision.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export.config import EngineConfig
from dtn_fast.export.to_onnx import require_onnx
from dtn_fast.files import write_whole
from dtn_fast.kernels.onnx_nodes import DOMAIN
from dtn_fast.model.config import parse_config
from dtn_fast.runtime.export_manifest import ExportManifest, read_export_manifest
from dtn_fast.runtime.tensorrt import KINDS, check_loadable, load_backend, open_engine

RTX_ARCHS = (75, 80, 86, 89, 120)
TURING = 75
"""Compute capability x 10 of Turing, which takes fp16 only: TensorRT-RTX has no float32 products for it, and Turing no
bfloat16."""
FP8 = 89
"""First compute capability x 10 with FP8."""
CACHE = Path.home() / ".cache" / "dtn_fast"


class Built(NamedTuple):
    size: int
    """Size of the engine in bytes."""
    layers: int
    """Number of network layers before the builder fuses them; 0 for a refitted engine."""
    attention: str
    archs: tuple[int, ...]
    times: dict[str, float]
    """Seconds per batch of each kind of attention, if both were timed."""


def check_target(path: Path, config: EngineConfig) -> None:
    """Raises UsageError when ``path`` cannot be built here, or an option does not apply to it.  Builds nothing."""
    rtx = path.suffix == ".rtx"
    default = EngineConfig()
    others = (
        ("attention", "hardware", "version_compatible", "refit", "refit_from", "timing_cache") if rtx else ("archs",)
    )
    for name in others:
        if getattr(config, name) != getattr(default, name):
            raise UsageError(f"--{name.replace('_', '-')}: not for a {path.suffix} file; "
                             + ("TensorRT-RTX has no such option at build time" if rtx else
                                "TensorRT builds for this machine's GPU"))  # fmt: skip
    if config.attention != "native" and config.hardware == "ampere+":
        raise UsageError(f"--attention {config.attention}: its kernels are compiled for one compute capability; use "
                         "--hardware this or same")  # fmt: skip
    load_backend(KINDS[path.suffix])
    if not rtx and not torch.cuda.is_available():
        raise UsageError(f"{path}: TensorRT builds on the GPU that will run the engine, and there is none here; "
                         "build a .rtx file instead, which needs no GPU")  # fmt: skip


def export_engine(model: bytes | Path, path: Path, config: EngineConfig = EngineConfig()) -> Built:
    """Builds ``path`` (.engine or .rtx) from an ONNX model of to_onnx or quantize; writes its manifest beside it.

    Raises UsageError when the library or a GPU that it needs is missing, DtnError with the library's messages when the
    build fails; ``path`` is not written then.
    """
    data = model.read_bytes() if isinstance(model, Path) else model
    check_target(path, config)
    kind = KINDS[path.suffix]
    trt = load_backend(kind)
    rtx = kind == "tensorrt_rtx"
    meta = _metadata(data, str(model) if isinstance(model, Path) else "the model")
    if "for CPUs" in meta.get("quantized", ""):
        raise UsageError("this model is quantised for CPUs; quantise it with --target gpu")
    if rtx:
        config = replace(config, archs=_archs(config.archs, meta["precision"], "fp8" in meta.get("quantized", "")))
    times: dict[str, float] = {}
    if config.refit_from is not None:
        return _refitted(trt, data, meta, config.refit_from, path)
    if config.attention == "fastest":
        engine, layers, times = _fastest(trt, data, meta, config)
        attention = min(times, key=lambda name: times[name])
    else:
        engine, layers = build(trt, data, meta["input"], config, rtx)
        attention = config.attention
    archs = config.archs if rtx else _engine_archs(config)
    manifest = _manifest(trt, kind, engine, meta, config, attention, archs)
    write_whole(path, engine)
    manifest.write(path)
    return Built(len(engine), layers, attention, archs, times)


def build(trt: Any, data: bytes, kind_of_input: str, config: EngineConfig, rtx: bool) -> tuple[bytes, int]:
    """Serialised engine and the layer count of its network; ``trt`` is tensorrt or tensorrt_rtx."""
    logger = Log(trt)
    plugin = config.attention == "plugin"
    if plugin:
        from dtn_fast.export import tensorrt_plugin

        tensorrt_plugin.register(trt)
        data = without_bodies(data)
    elif config.refit:
        data = inlined(data)
    builder = trt.Builder(logger.logger)
    flags = 0
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if strong is not None:  # TensorRT 11 is always strongly typed and may drop the flag
        flags |= 1 << int(strong)
    if plugin and (aot := getattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS", None)) is not None:
        flags |= 1 << int(aot)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger.logger)
    if not parser.parse(data):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = "; ".join(dict.fromkeys(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in found))
        raise DtnError(f"{trt.__name__} {trt.__version__} cannot read this model: {errors[:500]}")
    options = builder.create_builder_config()
    options.builder_optimization_level = config.effort
    options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _profile(builder, options, network, kind_of_input, config)
    file = _gpu_options(trt, options, config, rtx)
    engine = builder.build_serialized_network(network, options)
    if engine is None:
        raise DtnError(f"{trt.__name__} {trt.__version__} built no engine: {logger.text()}")
    cache = options.get_timing_cache() if file is not None else None
    if file is not None and cache is not None:
        try:
            write_whole(file, bytes(cache.serialize()), shared=True)
        except OSError as error:  # the engine is built, so only warn
            warnings.warn(f"{file}: the timing cache cannot be written ({error.strerror})", stacklevel=2)
    return bytes(engine), network.num_layers


def _profile(builder: Any, options: Any, network: Any, kind_of_input: str, config: EngineConfig) -> None:
    given = network.get_input(0)
    rest = tuple(given.shape)[1:]
    assert given.name == kind_of_input
    profile = builder.create_optimization_profile()
    profile.set_shape(given.name, *((batch, *rest) for batch in config.batches))
    if options.add_optimization_profile(profile) < 0:
        raise DtnError(f"--batches {config.batches}: the builder refuses this range for input {given.name} {rest}")


def _gpu_options(trt: Any, options: Any, config: EngineConfig, rtx: bool) -> Path | None:
    """Sets TensorRT-RTX's target GPUs, or TensorRT's flags and timing cache; returns the cache's file (RTX: None)."""
    if rtx:
        options.num_compute_capabilities = len(config.archs)
        for place, arch in enumerate(config.archs):
            options.set_compute_capability(getattr(trt.ComputeCapability, f"SM{arch}"), place)
        return None
    levels = trt.HardwareCompatibilityLevel
    wanted = {"this": levels.NONE, "ampere+": levels.AMPERE_PLUS}
    if config.hardware == "same":
        wanted["same"] = levels.SAME_COMPUTE_CAPABILITY
    options.hardware_compatibility_level = wanted[config.hardware]
    for name, on in (("VERSION_COMPATIBLE", config.version_compatible), ("REFIT", config.refit)):
        if on:
            options.set_flag(getattr(trt.BuilderFlag, name))
    file = config.timing_cache or CACHE / f"{_gpu_slug()}-tensorrt-{trt.__version__}.timing"
    known = file.read_bytes() if file.is_file() else b""
    cache = options.create_timing_cache(known)
    if cache is None or not options.set_timing_cache(cache, ignore_mismatch=False):
        raise UsageError(f"{file}: not a timing cache of this GPU and version; delete it, or name another file by "
                         "--timing-cache")  # fmt: skip
    return file


def _gpu_slug() -> str:
    from dtn_fast.kernels.launch_values import slug

    return slug(torch.cuda.get_device_name())


def _fastest(trt: Any, data: bytes, meta: dict[str, str], config: EngineConfig) -> tuple[bytes, int, dict[str, float]]:
    """Builds both kinds of attention and times them in turns at the optimum batch size.

    Returns the faster engine, its layer count and the seconds per batch of each.
    """
    from dtn_fast.runtime.tensorrt import time_engines

    made = {
        name: build(trt, data, meta["input"], replace(config, attention=name), False) for name in ("native", "plugin")
    }
    times = time_engines(trt, {name: engine for name, (engine, _) in made.items()}, config.batches[1], meta["input"])
    return *made[min(times, key=lambda name: times[name])], times


def _refitted(trt: Any, data: bytes, meta: dict[str, str], source: Path, path: Path) -> Built:
    """Writes the engine ``source`` with the weights of the ONNX model ``data``, and its manifest, to ``path``.

    Raises UsageError when the two differ in configuration, precision, input or quantisation.
    """
    old = read_export_manifest(source, "tensorrt")
    check_loadable(old, trt.__version__, str(source))
    network = lambda config: replace(config, crop=None)  # crops of any policy pass through the same layers
    mine = network(parse_config(meta["dtn_config"], "the ONNX model")), meta["precision"], meta["input"]
    theirs = network(old.detector_config()), old.precision, old.input
    if (*mine, meta.get("quantized", "")) != (*theirs, old.quantized):
        raise UsageError(
            f"--refit-from {source}: its configuration, precision or input is not this model's; build a new engine"
        )
    engine = _refit(trt, data, source, old.attention == "plugin")
    sha = hashlib.sha256(engine).hexdigest()
    write_whole(path, engine)
    replace(old, sha256=sha, weights=meta["weights"], notice=meta.get("notice", "")).write(path)
    return Built(len(engine), 0, old.attention, old.archs, {})


def _refit(trt: Any, data: bytes, source: Path, plugin: bool) -> bytes:
    logger, engine = Log(trt), open_engine(trt, source)
    if not engine.refittable:
        raise UsageError(f"--refit-from {source}: not built with --refit; build it again with that option")
    refitter = trt.Refitter(engine, logger.logger)
    parser = trt.OnnxParserRefitter(refitter, logger.logger)
    if (
        not parser.refit_from_bytes(without_bodies(data) if plugin else inlined(data))
        or not refitter.refit_cuda_engine()
    ):
        raise DtnError(f"--refit-from {source}: the weights do not fit this engine ({logger.text()})")
    return bytes(engine.serialize())


def inlined(data: bytes) -> bytes:
    """ONNX model whose dtn:: nodes are replaced by their bodies, because a refitter does not look into functions."""
    onnx = require_onnx()
    from onnx import inliner

    return inliner.inline_local_functions(onnx.load_model_from_string(data)).SerializeToString()


def without_bodies(data: bytes) -> bytes:
    """ONNX model without the bodies of dtn:: nodes, which leaves the parser only the plugins: newer parsers prefer a
    body to a plugin."""
    onnx = require_onnx()
    proto = onnx.load_model_from_string(data)
    if not any(node.domain == DOMAIN for node in proto.graph.node):
        raise UsageError("--attention plugin: this ONNX file has no dtn:: nodes; export it with --nodes")
    del proto.functions[:]
    return proto.SerializeToString()


def _metadata(data: bytes, name: str) -> dict[str, str]:
    """Metadata that to_onnx wrote into the file.  Raises UsageError on any other file."""
    onnx = require_onnx()
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's exception class differs between versions
        raise UsageError(f"{name}: not an ONNX file ({error})") from error
    meta = {entry.key: entry.value for entry in proto.metadata_props}
    if not {"dtn_config", "input", "precision", "weights"} <= meta.keys():
        raise UsageError(
            f"{name}: an ONNX file, but not one written by this version of dtn-fast export; export it again"
        )
    return meta


def _archs(requested: tuple[int, ...], precision: str, fp8: bool) -> tuple[int, ...]:
    """``requested`` or, if empty, all that support the model's precisions.  Raises UsageError on one that does not."""
    fits = [arch for arch in (*RTX_ARCHS, 121) if (arch != TURING or precision == "fp16") and (arch >= FP8 or not fp8)]
    if not requested:
        return tuple(arch for arch in fits if arch in RTX_ARCHS)
    for arch in requested:
        if arch not in (*RTX_ARCHS, 121):
            raise UsageError(f"--archs {arch}: TensorRT-RTX compiles for {', '.join(map(str, RTX_ARCHS))} and 121")
        if arch not in fits:
            remedy = "build it without FP8" if fp8 and arch < FP8 else "use --precision fp16"
            raise UsageError(f"--archs {arch}: not for a model of {precision}{' and FP8' * fp8}; {remedy}")
    return requested


def _engine_archs(config: EngineConfig) -> tuple[int, ...]:
    major, minor = torch.cuda.get_device_capability()
    return () if config.hardware == "ampere+" else (10 * major + minor,)


def _manifest(
    trt: Any,
    kind: str,
    engine: bytes,
    meta: dict[str, str],
    config: EngineConfig,
    attention: str,
    archs: tuple[int, ...],
) -> ExportManifest:
    options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    if kind == "tensorrt":
        options["gpu"] = torch.cuda.get_device_name()
    return ExportManifest(
        kind, trt.__version__, hashlib.sha256(engine).hexdigest(), meta["weights"], meta["precision"], meta["input"],
        json.loads(meta["dtn_config"]), meta.get("notice", ""), config.batches, archs, attention,
        meta.get("quantized", ""), options,
    )  # fmt: skip


class Log:
    """Logger for the library: keeps error messages for exceptions and prints nothing."""

    def __init__(self, trt: Any) -> None:
        messages: list[str] = []

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    messages.append(message)

        self.logger, self.messages = Logger(), messages

    def text(self) -> str:
        return " ".join("; ".join(self.messages[:3]).split())[:500] or "the library gave no reason"


def commands(onnx: Path, out: Path, meta: Mapping[str, str], config: EngineConfig = EngineConfig()) -> list[str]:
    """Shell commands of NVIDIA's tools that build ``out`` (.engine or .rtx) from the same ONNX file.

    trtexec and tensorrt_rtx build and time an engine.  polygraphy builds an .engine and compares it with onnxruntime,
    or builds an .rtx, which needs no GPU.  All build --attention native, because this package's plugins are Python at
    build time, which these tools do not load.  meta: metadata of the ONNX file.
    """
    name, side = meta["input"], json.loads(meta["dtn_config"])["image_size"]
    rest = (side, side, 3) if name == "crops" else (3, side, side)
    sizes = {kind: (batch, *rest) for kind, batch in zip(("min", "opt", "max"), config.batches, strict=True)}
    listed = {kind: f"'{name}:[{','.join(map(str, size))}]'" for kind, size in sizes.items()}
    shapes = [f"--{kind}Shapes={name}:{'x'.join(map(str, size))}" for kind, size in sizes.items()]
    profile = [f"--trt-{kind}-shapes {size}" for kind, size in listed.items()]
    source, engine = shlex.quote(str(onnx)), shlex.quote(str(out))
    first = [f"--onnx={source}", f"--saveEngine={engine}", *shapes, f"--builderOptimizationLevel={config.effort}"]
    second = [*profile, f"--builder-optimization-level {config.effort}"]
    if out.suffix == ".rtx":
        archs = config.archs or _archs((), meta["precision"], "fp8" in meta.get("quantized", ""))
        capabilities = " ".join(f"{arch // 10}.{arch % 10}" for arch in archs)
        first += [f"--computeCapabilities={','.join(map(str, archs))}", "--skipInference"]
        second += [f"--compute-capabilities {capabilities}", f"--output {engine}"]
        convert = f"POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert {source} --convert-to trt"
        return [" ".join(["tensorrt_rtx", *first]), " ".join([convert, *second])]
    level = {"same": ("sameComputeCapability", "same_compute_capability"), "ampere+": ("ampere+", "ampere_plus")}
    if config.hardware in level:
        first.append(f"--hardwareCompatibilityLevel={level[config.hardware][0]}")
        second.append(f"--hardware-compatibility-level {level[config.hardware][1]}")
    first += ["--versionCompatible"] * config.version_compatible + ["--refit"] * config.refit
    second += ["--version-compatible"] * config.version_compatible + ["--refittable"] * config.refit
    typed = "--stronglyTyped", "--strongly-typed"  # required by TensorRT 10, without effect in 11
    second += [f"--save-engine {engine}", f"--input-shapes {listed['opt']}"]
    run = f"polygraphy run {source} --trt --onnxrt"
    return [" ".join(["trtexec", *first, typed[0], "--useCudaGraph"]), " ".join([run, *second, typed[1]])]
