"""Exports a model to a file of another runtime in one library call: trace, check, quantise, build, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dtn_fast.data.open import open_data
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export.config import EngineConfig, OnnxConfig, QuantizeConfig
from dtn_fast.export.quantize import AccuracyCheck, Sensitivity, check_accuracy, quantize, sensitivity, widths
from dtn_fast.export.to_mnn import export_mnn
from dtn_fast.export.to_onnx import Parity, check, to_proto, write_onnx
from dtn_fast.export.to_tensorrt import Built, check_target, export_engine
from dtn_fast.files import check_writable
from dtn_fast.model.detector import Detector
from dtn_fast.runtime.load import load_model
from dtn_fast.runtime.torch_scorer import TorchScorer

ENGINES = (".engine", ".rtx")
SUFFIXES = (".onnx", ".mnn", *ENGINES)


@dataclass
class Exported:
    """Result of an export: the file and the measurements made on the way."""

    path: Path
    parity: list[Parity] = field(default_factory=list)
    """Differences from torch before quantisation, by batch size; empty for an engine built from an .onnx file."""
    sensitivity: list[Sensitivity] = field(default_factory=list)
    """Logit changes when each layer alone is quantised, most sensitive first; empty unless requested."""
    accuracy: AccuracyCheck | None = None
    """Effect of quantisation on the validation split; None without quantisation."""
    built: Built | None = None
    """Size, layers and timings of the engine; None for other files."""
    clips: Path | None = None
    """File of the temporal head beside an .onnx file; None: the model has none."""


class ExportRefused(DtnError):
    """The quantised model is beyond the limits of the accuracy check; ``made`` holds the measurements so far."""

    def __init__(self, error: DtnError, made: Exported) -> None:
        super().__init__(str(error))
        self.made = made


def export(
    model: Path,
    out: Path,
    onnx: OnnxConfig = OnnxConfig(),
    quantization: QuantizeConfig = QuantizeConfig(),
    engine: EngineConfig = EngineConfig(),
    watch: Callable[[str, int, int], object] = lambda _step, _done, _total: None,
) -> Exported:
    """Exports a run, a checkpoint folder or, for an engine, an .onnx file to ``out``, whose suffix sets the format.

    The logits are compared with torch before the file is written; a quantised model must keep its validation AUC and
    logits within limits.  Engines and MNN files get an export manifest beside them.  watch: called with the name of the
    current step, the amount done and the total (0: unknown).  Raises UsageError when options do not fit ``out`` or
    ``model``, DtnError when logits differ too much (ExportRefused for a quantised model's); ``out`` is then not
    written.
    """
    _check_options(model, out, onnx, quantization, engine)
    check_writable(out.parent)  # before the work, which would be lost
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
        made.clips = write_onnx(detector, proto, out)
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
        raise UsageError(f"--precision {onnx.precision}: MNN files are float32; leave it out")
    if out.suffix == ".engine" and engine.attention != "native" and not onnx.nodes:
        raise UsageError(f"--no-nodes: --attention {engine.attention} needs the dtn:: nodes; leave --no-nodes out")
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
            raise UsageError(f"--{option.name.replace('_', '-')}: does not apply to {path}; leave it out")


def _quantize(
    detector: Detector,
    proto: Any,
    config: QuantizeConfig,
    made: Exported,
    watch: Callable[[str, int, int], object],
) -> Any:
    """Quantised model, checked against the limits of ``config``; stores the measurements in ``made``."""
    assert config.calibrate is not None
    dataset = open_data(config.calibrate, detector.config.image_size)
    dataset.check_fits(detector.config, "the model")
    dataset.tell_differences(detector.config, "the model")
    crops = dataset.get(dataset.evenly_spaced("train", config.images))
    if config.sensitivity:
        total = len(widths(proto, config))
        for done, row in enumerate(sensitivity(proto, crops[:16], config), 1):
            watch("quantising each layer alone", done, total)
            made.sensitivity.append(row)
        made.sensitivity.sort(key=lambda row: -row.worst)
    watch("quantising", 0, 0)
    quantized = quantize(proto, crops, config)
    try:
        made.accuracy = check_accuracy(TorchScorer(detector), quantized, dataset, config)
    except UsageError:
        raise
    except DtnError as error:
        raise ExportRefused(error, made) from error
    return quantized
