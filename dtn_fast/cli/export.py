"""Verbs that write and examine model files: export, verify, inspect, repository."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dtn_fast.cli.terminal import print_table, progress, steps
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export.config import EngineConfig, OnnxConfig, QuantizeConfig, RepositoryConfig, VerifyConfig
from dtn_fast.ranges import Count
from dtn_fast.runtime.config import Runtime

if TYPE_CHECKING:
    from dtn_fast.export.pipeline import Exported
    from dtn_fast.export.to_tensorrt import Built


def export(
    model: Annotated[Path, tyro.conf.Positional],
    out: Path,
    onnx: Annotated[OnnxConfig, tyro.conf.OmitArgPrefixes] = OnnxConfig(),
    quantize: Annotated[QuantizeConfig, tyro.conf.OmitArgPrefixes] = QuantizeConfig(),
    engine: Annotated[EngineConfig, tyro.conf.OmitArgPrefixes] = EngineConfig(),
) -> None:
    """Write a model as .onnx, .mnn (CPU), .engine (TensorRT, this GPU) or .rtx (TensorRT-RTX, any GPU), and check it.

    Example: dtn-fast export runs/first --out dtn.onnx --precision fp16

    Quantised: dtn-fast export runs/first --out dtn-int8.onnx --convs int8 --linears int8 --calibrate crops

    An engine: dtn-fast export dtn-int8.onnx --out dtn.rtx --archs 89 120

    Before the file is written, its logits through onnxruntime (or MNN) are compared with those of torch; a quantised
    model must also keep its validation AUC and logits within limits.  An engine gets an export manifest, which is
    checked when the engine is loaded.

    Args:
        model: A run, a checkpoint folder, or for an engine also an .onnx file written by this command.
        out: The file to write; its suffix sets the format.
        onnx: Options of the ONNX file.
        quantize: Options of INT8 and FP8 quantisation.
        engine: Options of the engine.
    """
    from dtn_fast.export.pipeline import ExportRefused
    from dtn_fast.export.pipeline import export as run

    try:
        with progress() as bar:
            made = run(model, out, onnx, quantize, engine, steps(bar))
    except ExportRefused as error:
        _print_measurements(error.made, quantize.on)
        raise
    _print_measurements(made, quantize.on)
    if made.built is not None:
        _print_engine(model, out, engine, made.built)
    else:
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        if made.clips is not None:
            print(f"{made.clips}: its temporal head, which must travel with it")


def _print_measurements(made: Exported, quantized: bool) -> None:
    if made.parity:
        title = "MNN against torch" if made.path.suffix == ".mnn" else "The ONNX model in onnxruntime against torch"
        rows = [[str(r.batch), f"{r.error:.2e}", f"{r.scale:.2f}"] for r in made.parity]
        print_table(title + (", before quantisation" if quantized else ""),
                    ["batch", "largest logit error", "largest logit"], rows)  # fmt: skip
        print(f"largest error {max(r.error for r in made.parity):.2e}")
    if made.sensitivity:
        rows = [[row.layer, row.width, f"{row.worst:.4f}", f"{row.mean:.4f}"] for row in made.sensitivity]
        header = ["layer", "quantised to", "worst logit change", "mean"]
        print_table("Each layer quantised alone, most sensitive first", header, rows)
    if made.accuracy is not None:
        found = made.accuracy
        area = "undefined (one class)" if found.auc is None else f"{found.auc:.4f} -> {found.auc_quantized:.4f}"
        print(f"validation split, {found.images} crops: frame AUC {area}; logit change {found.mean:.4f} on average, "
              f"{found.worst:.4f} at worst")  # fmt: skip


def _print_engine(model: Path, out: Path, config: EngineConfig, built: Built) -> None:
    if built.times:
        print("attention: " + ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in built.times.items()))
    archs = ", ".join(f"{arch // 10}.{arch % 10}" for arch in built.archs) or "from 8.0 up"
    print(f"{out}: {built.size / 2**20:.1f} MiB, batches {'/'.join(map(str, config.batches))}, compute capability "
          f"{archs}, attention {built.attention}; manifest {out.name}.json")  # fmt: skip
    if config.refit_from is None:
        _print_commands(model, out, replace(config, archs=built.archs))


def _print_commands(model: Path, out: Path, config: EngineConfig) -> None:
    """Prints how NVIDIA's own tools build the engine ``out`` from an .onnx file, or from that of another model."""
    from dtn_fast.export.to_tensorrt import commands
    from dtn_fast.runtime.export_manifest import read_export_manifest
    from dtn_fast.runtime.tensorrt import KINDS

    manifest = read_export_manifest(out, KINDS[out.suffix])
    source = model if model.suffix == ".onnx" else out.with_suffix(".onnx")
    lines = commands(source, out, {"input": manifest.input, "dtn_config": json.dumps(manifest.config)}, config)
    if source != model:
        again = f"dtn-fast export {shlex.quote(str(model))} --out {shlex.quote(str(source))}"
        again += f" --precision {manifest.precision}" + " --input images" * (manifest.input == "images")
        lines.insert(0, again + "  # and the same --convs, --linears, --calibrate" * bool(manifest.quantized))
    plugin = "" if manifest.attention == "native" else ", with TensorRT's own layers in place of this package's plugins"
    print(f"The same engine by NVIDIA's own tools{plugin}:", *lines, sep="\n  ")


def verify(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    data: Path | None = None,
    config: Annotated[VerifyConfig, tyro.conf.OmitArgPrefixes] = VerifyConfig(),
    runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes] = Runtime(),
) -> None:
    """Compare two model files on the same crops: logits, verdicts, AUC and, with --layers, each layer's output.

    Example: dtn-fast verify runs/first dtn.onnx --data crops --layers

    Another runtime: dtn-fast verify dtn.onnx dtn.onnx --runtime openvino --data crops

    Exit code 1 when a logit differs by more than the tolerance.

    Args:
        first: The reference: a run, a checkpoint, .onnx (through onnxruntime), .mnn, .engine or .rtx.
        second: The file to compare with the reference.
        data: Crops written by dtn-fast prepare, or a folder of face pictures.  Default: noise.
        config: Options of the comparison.
        runtime: Device and precision that the models run with.
    """
    from dtn_fast.export.verify import verify as run

    found = run(first, second, data, config, runtime)
    if found.layers:
        print_table("Layer by layer", ["layer", "relative error", "largest difference"],
                    [[row.layer, f"{row.relative:.2e}", f"{row.worst:.2e}"] for row in found.layers])  # fmt: skip
    if not found.same_weights:
        print("the two files were made from different weights")
    gap, (a, b) = found.agreement, found.names
    area = "" if None in gap.auc else f", AUC {gap.auc[0]:.4f} and {gap.auc[1]:.4f}"
    print(f"{first} ({a}) and {second} ({b}) on {gap.crops} {'crops' if data else 'crops of noise'}: "
          f"logits differ by {gap.worst_logit:.2e} at worst, {gap.mean_logit:.2e} on average, P(fake) by "
          f"{gap.worst_score:.2e}; the same verdict on {gap.verdicts} of {gap.crops}{area}"
          + ("" if gap.worst_mask is None else f"; masks differ by {gap.worst_mask:.2e}"))  # fmt: skip
    if not gap.worst_logit <= config.tolerance:
        raise DtnError(f"{second}: a logit differs by {gap.worst_logit:.2e}, over --tolerance {config.tolerance:g}")


def inspect(engine: Annotated[Path, tyro.conf.Positional], batch: Count | None = None) -> None:
    """Show the metadata of a model file or a run; for an engine on its GPU also its layers and their times.

    For an ONNX file also the commands by which the tools trtexec, tensorrt_rtx and polygraphy make engines of it.

    Example: dtn-fast inspect dtn.engine --batch 8

    Args:
        engine: An .engine, .rtx, .mnn or .onnx file, a run or a checkpoint folder.
        batch: Time each layer of an engine at this batch size.
    """
    import torch

    if batch and engine.suffix not in (".engine", ".rtx"):
        raise UsageError(f"--batch: times the layers of an engine, and {engine} is none; leave it out")
    from dtn_fast.runtime.describe import describe

    print_table(str(engine), ["field", "value"], [[name, value] for name, value in describe(engine).items()])
    if engine.suffix == ".onnx":
        from dtn_fast.export.to_tensorrt import commands
        from dtn_fast.runtime.onnx import metadata

        meta = metadata(engine)
        lines = [line for kind in (".engine", ".rtx") for line in commands(engine, engine.with_suffix(kind), meta)]
        print("Engines of it by NVIDIA's own tools:", *lines, sep="\n  ")
    if engine.suffix in (".engine", ".rtx"):
        if not torch.cuda.is_available():
            print("layers and their times: shown only on the GPU that the engine was built for")
            return
        from dtn_fast.runtime.tensorrt import layers

        rows = layers(engine, batch)
        total = sum(ms or 0 for _, ms in rows)
        cells = [[name, *(("", "") if ms is None else (f"{ms:.4f}", f"{ms / total:.1%}"))] for name, ms in rows]
        print_table("Layers", ["layer", "ms", "share"], cells)


def repository(
    model: Annotated[Path, tyro.conf.Positional],
    out: Path,
    config: Annotated[RepositoryConfig, tyro.conf.OmitArgPrefixes] = RepositoryConfig(),
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server: encoded crops to scores, dynamic batching, warm-up.

    Example: dtn-fast repository dtn.onnx --out models

    For a server without the onnxruntime backend: dtn-fast repository dtn.onnx --out models --backend python

    The Python of the server needs opencv-python-headless to decode pictures, onnxruntime for --backend python, and in
    server 2.51 numpy<2.

    Then: docker run --gpus all -v $PWD/models:/models nvcr.io/nvidia/tritonserver:<release>-py3 tritonserver
    --model-repository=/models

    Then: dtn-fast detect clip.mp4 --server http://localhost:8000/dtn, and dtn-fast bench server
    http://localhost:8000/dtn for its crops per second and latency.

    Args:
        model: An .onnx or .engine file written by dtn-fast export with --input crops (the default).
        out: Folder of the repository; other models in it are kept.
        config: Options of the server.
    """
    from dtn_fast.export.triton_repository import write_repository

    print("\n".join(str(path) for path in write_repository(model, out, config)))
