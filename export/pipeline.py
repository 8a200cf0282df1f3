"""A model to a file of another runtime: traced, quantised, checked, built and written, as one library call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dtn_fast.data.open import open_data
from dtn_fast.errors import UsageError
from dtn_fast.export.config import EngineConfig, OnnxConfig, QuantizeConfig
from dtn_fast.export.quantize import AccuracyCheck, Sensitivity, check_accuracy, quantize, sensitivity, widths
from dtn_fast.export.to_mnn import export_mnn
from dtn_fast.export.to_onnx import Parity, check, to_proto
from dtn_fast.export.to_tensorrt import Built, check_target, export_engine
from dtn_fast.files import write_whole
from dtn_fast.model.detector import Detector
from dtn_fast.runtime.load import load_model
from dtn_fast.runtime.torch_scorer import TorchScorer

ENGINES = (".engine", ".rtx")
SUFFIXES = (".onnx", ".mnn", *ENGINES)


@dataclass
class Exported:
    """What an export measured on its way to the file."""

    path: Path
    parity: list[Parity] = field(default_factory=list)
    """Differences from torch before quantisation, by batch size; empty for an engine built of an .onnx file."""
    sensitivity: list[Sensitivity] = field(default_factory=list)
    """Each layer quantised alone, most sensitive first; empty unless asked for."""
    accuracy: AccuracyCheck | None = None
    """What quantisation costs on the validation split."""
    built: Built | None = None
    """The engine."""


def export(
    model: Path,
    out: Path,
    onnx: OnnxConfig = OnnxConfig(),
    quantization: QuantizeConfig = QuantizeConfig(),
    engine: EngineConfig = EngineConfig(),
    watch: Callable[[str, int, int], object] = lambda _step, _done, _total: None,
) -> Exported:
    """Writes a run, a checkpoint folder or, for an engine, an .onnx file to ``out``, whose suffix says what it becomes.

    The answers are compared with torch before the file appears; a quantised model must keep its validation AUC and
    logits within limits.  Engines and MNN files get a manifest beside them.  watch: called with the step at work, how
    much of it is done, and out of how much (0: unknown).  Raises UsageError on options that do not fit ``out`` or
    ``model``, DtnError when an answer differs too much; nothing is left at ``out`` then.
    """
    _check_options(model, out, onnx, quantization, engine)
    made = Exported(out)
    if model.suffix == ".onnx":
        watch(f"building {out}", 0, 0)
        made.built = export_engine(model, out, engine)
        return made
    if out.suffix in ENGINES:
        check_target(out, engine)
    detector = load_model(model)
    if out.suffix == ".mnn":
        watch(f"converting to {out}", 0, 0)
        made.parity = export_mnn(detector, out)
        return made
    if out.suffix in ENGINES and onnx.precision == "auto":
        onnx = replace(onnx, precision="fp16")
    watch("tracing and comparing with torch", 0, 0)
    proto = to_proto(detector, onnx)
    made.parity = check(detector, proto, onnx, str(out))
    if quantization.on:
        proto = _quantize(detector, proto, quantization, made, watch)
    if out.suffix == ".onnx":
        write_whole(out, proto.SerializeToString())
    else:
        watch(f"building {out}", 0, 0)
        made.built = export_engine(proto.SerializeToString(), out, engine)
    return made


def _check_options(
    model: Path, out: Path, onnx: OnnxConfig, quantization: QuantizeConfig, engine: EngineConfig
) -> None:
    """Raises UsageError when an option does not apply to ``out`` or ``model``."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: the file's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if quantization.on and out.suffix == ".mnn":
        raise UsageError("--convs, --linears: MNN files are float32; quantise an .onnx or an engine")
    if quantization.on and quantization.calibrate is None:
        raise UsageError("--convs, --linears: name real crops to calibrate with by --calibrate")
    if out.suffix not in ENGINES:
        _refuse_changed(engine, EngineConfig(), out)
    if out.suffix == ".mnn" and onnx.precision not in ("auto", "fp32"):
        raise UsageError(f"--precision {onnx.precision}: MNN files are float32")
    if out.suffix == ".engine" and engine.attention != "native" and not onnx.nodes:
        raise UsageError("--no-nodes: the plugins take the place of the dtn:: nodes; leave them in")
    if model.suffix != ".onnx":
        return
    _refuse_changed(onnx, OnnxConfig(), model)
    if out.suffix not in ENGINES:
        raise UsageError(f"--out {out}: an .onnx file becomes an engine only; give the checkpoint for anything else")
    if quantization.on:
        raise UsageError(f"{model}: quantise when the .onnx file is written, not when the engine is")
    if not model.is_file():
        raise UsageError(f"{model}: no such file")


def _refuse_changed(config: Any, default: Any, path: Path) -> None:
    """Raises UsageError if an option that does not apply to ``path`` was changed from its default."""
    for option in fields(config):
        if getattr(config, option.name) != getattr(default, option.name):
            raise UsageError(f"--{option.name.replace('_', '-')}: not for {path}; leave it out")


def _quantize(
    detector: Detector,
    proto: Any,
    config: QuantizeConfig,
    made: Exported,
    watch: Callable[[str, int, int], object],
) -> Any:
    """The quantised model, within the limits of ``config``; fills in what was measured."""
    assert config.calibrate is not None
    dataset = open_data(config.calibrate, detector.config.image_size)
    dataset.check_fits(detector.config, "the model")
    crops = dataset.get(dataset.evenly_spaced("train", config.images))
    if config.sensitivity:
        total = len(widths(proto, config))
        for done, row in enumerate(sensitivity(proto, crops[:16], config), 1):
            watch("quantising each layer alone", done, total)
            made.sensitivity.append(row)
        made.sensitivity.sort(key=lambda row: -row.worst)
    watch("quantising", 0, 0)
    quantized = quantize(proto, crops, config)
    made.accuracy = check_accuracy(TorchScorer(detector), quantized, dataset, config)
    return quantized
