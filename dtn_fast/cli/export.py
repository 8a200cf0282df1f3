"""The command line's verbs of whoever deploys: export, verify, inspect, detect, serve, repository, doctor."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dtn_fast.cli.options import Runtimed
from dtn_fast.cli.terminal import print_table, progress
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export.config import EngineConfig, OnnxConfig, QuantizeConfig
from dtn_fast.runtime.config import Runtime

SUFFIXES = (".onnx", ".mnn", ".engine", ".rtx")


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

    The answers are compared with torch through onnxruntime (or MNN) before the file appears; a quantised model must
    also keep its validation AUC and logits within limits.  Engines get a manifest beside them, checked when loaded.

    Args:
        model: A run, a checkpoint folder, or for an engine also an .onnx file written by this command.
        out: The file to write; its suffix says what it is.
        onnx: What the ONNX file (and what is built from it) is to be.
        quantize: INT8 and FP8.
        engine: How an engine is built.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: the file's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if quantize.on and out.suffix == ".mnn":
        raise UsageError("--convs, --linears: MNN files are float32; quantise an .onnx or an engine")
    if quantize.on and quantize.calibrate is None:
        raise UsageError("--convs, --linears: name real crops to calibrate with by --calibrate")
    if out.suffix not in (".engine", ".rtx"):
        _only_default(engine, EngineConfig(), out)
    if out.suffix == ".mnn" and onnx.precision not in ("auto", "fp32"):
        raise UsageError(f"--precision {onnx.precision}: MNN files are float32")
    if model.suffix == ".onnx":
        _only_default(onnx, OnnxConfig(), model)
        if out.suffix not in (".engine", ".rtx"):
            raise UsageError(
                f"--out {out}: an .onnx file becomes an engine only; give the checkpoint for anything else"
            )
        if quantize.on:
            raise UsageError(f"{model}: quantise when the .onnx file is written, not when the engine is")
        if not model.is_file():
            raise UsageError(f"{model}: no such file")
        return _engine(model, out, engine)
    from dtn_fast.export.to_tensorrt import check_target
    from dtn_fast.files import write_whole
    from dtn_fast.runtime.load import load_model

    if out.suffix in (".engine", ".rtx"):
        check_target(out, engine)
    detector = load_model(model)
    if out.suffix == ".mnn":
        from dtn_fast.export.to_mnn import export_mnn

        return _parity(f"{out}: MNN against torch", export_mnn(detector, out), out)
    from dtn_fast.export.to_onnx import check, to_proto

    if out.suffix == ".engine" and engine.attention != "native" and not onnx.nodes:
        raise UsageError("--no-nodes: the plugins take the place of the dtn:: nodes; leave them in")
    if out.suffix != ".onnx" and onnx.precision == "auto":
        onnx = replace(onnx, precision="fp16")
    proto = to_proto(detector, onnx)
    rows = check(detector, proto, onnx, str(out))
    if quantize.on:
        proto = _quantized(detector, proto, quantize)
    if out.suffix == ".onnx":
        write_whole(out, proto.SerializeToString())
        return _parity(f"{out}: onnxruntime against torch, before quantisation" if quantize.on else
                       f"{out}: onnxruntime against torch", rows, out)  # fmt: skip
    _engine(proto.SerializeToString(), out, engine)


def _only_default(config: Any, default: Any, path: Path) -> None:
    """Raises UsageError naming an option that says something of ``path`` which it does not have."""
    for field in fields(config):
        if getattr(config, field.name) != getattr(default, field.name):
            raise UsageError(f"--{field.name.replace('_', '-')}: not for {path}; leave it out")


def _parity(title: str, rows: list[Any], out: Path) -> None:
    print_table(title, ["batch", "largest logit error", "largest logit"],
                [[str(r.batch), f"{r.error:.2e}", f"{r.scale:.2f}"] for r in rows])  # fmt: skip
    print(f"largest error {max(r.error for r in rows):.2e}, file {out.stat().st_size / 1e6:.1f} MB")


def _quantized(detector: Any, proto: Any, config: QuantizeConfig) -> Any:
    """Calibrates, prints what was asked, passes the gate."""
    from dtn_fast.data.open import open_data
    from dtn_fast.export.quantize import check_accuracy, quantize, sensitivity, widths
    from dtn_fast.runtime.torch_scorer import TorchScorer

    assert config.calibrate is not None
    dataset = open_data(config.calibrate, detector.config.image_size)
    crops = dataset.get(dataset.evenly_spaced("train", config.images))
    if config.sensitivity:
        total, table = len(widths(proto, config)), []
        with progress() as bar:
            task = bar.add_task("each layer alone", total=total, note="")
            for row in sensitivity(proto, crops[:16], config):
                bar.advance(task)
                table.append(row)
        table.sort(key=lambda row: -row.worst)
        header = ["layer", "to", "worst logit change", "mean"]
        print_table("Each layer quantised alone, most sensitive first", header,
                    [[row.layer, row.width, f"{row.worst:.4f}", f"{row.mean:.4f}"] for row in table])  # fmt: skip
    made = quantize(proto, crops, config)
    result = check_accuracy(TorchScorer(detector), made, dataset, config)
    area = "undefined (one class)" if result.auc is None else f"{result.auc:.4f} -> {result.auc_quantized:.4f}"
    print(f"validation split, {result.images} crops: frame AUC {area}; logits move by {result.mean:.4f} on average, "
          f"{result.worst:.4f} at worst")  # fmt: skip
    return made


def _engine(source: Path | bytes, out: Path, config: EngineConfig) -> None:
    from dtn_fast.export.to_tensorrt import commands, export_engine

    print(f"building {out} ...", flush=True)
    built = export_engine(source, out, config)
    if built.times:
        print("attention: " + ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in built.times.items()))
    archs = ", ".join(f"{arch // 10}.{arch % 10}" for arch in built.archs) or "from 8.0 up"
    print(f"{out}: {built.size / 2**20:.1f} MiB, batches {'/'.join(map(str, config.batches))}, compute capability "
          f"{archs}, attention {built.attention}; manifest {out.name}.json")  # fmt: skip
    if isinstance(source, Path) and out.suffix == ".engine":
        print("The same by NVIDIA's own tools:", *commands(source, config), sep="\n  ")


def verify(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    data: Path | None = None,
    split: Literal["train", "val", "test"] = "val",
    images: int = 64,
    layers: bool = False,
    tolerance: float = 0.01,
    runtime: Runtimed = Runtime(),
) -> None:
    """Compare two model files on the same crops: logits, verdicts, AUC and, layer by layer, where they part.

    Example: dtn-fast verify runs/first dtn.onnx --data crops --layers

    Exit code 1 when a logit differs by more than the tolerance.

    Args:
        first: The reference: a run, a checkpoint, .onnx, .mnn, .engine or .rtx.
        second: What is compared with it.
        data: Crops written by dtn-fast prepare, or a folder of face pictures; without it, noise.
        split: Which videos of the data.
        images: How many crops, spread evenly.
        layers: Also compare every convolution and product; checkpoints and ONNX files show them.
        tolerance: Largest difference of a logit that passes.
        runtime: How the models run.
    """
    from dtn_fast.data.open import open_data
    from dtn_fast.export.to_onnx import example_inputs
    from dtn_fast.export.verify import compare, compare_layers, layer_outputs
    from dtn_fast.runtime.load import load_scorer

    a, b = load_scorer(first, runtime), load_scorer(second, runtime)
    labels = None
    if data is None:
        crops = example_inputs(a.config, "crops", images, seed=0).numpy()
    else:
        dataset = open_data(data, a.config.image_size)
        rows = dataset.evenly_spaced(split, images)
        if not len(rows):
            raise UsageError(f"--data {data}: no crop in its {split} split")
        crops, labels = dataset.get(rows), dataset.labels[rows]
    found = compare(a, b, crops, labels)
    if layers:
        errors = compare_layers(layer_outputs(a, first, second), layer_outputs(b, second, first), crops[:8])
        print_table("Layer by layer", ["layer", "relative error", "largest difference"],
                    [[row.layer, f"{row.relative:.2e}", f"{row.worst:.2e}"] for row in errors])  # fmt: skip
    weights = {getattr(s, "weights", "") for s in (a, b)} - {""}
    if len(weights) > 1:
        print("the two were made of different weights")
    area = "" if None in found.auc else f", AUC {found.auc[0]:.4f} and {found.auc[1]:.4f}"
    print(f"{first} ({a.name}) and {second} ({b.name}) on {found.crops} {'crops' if data else 'crops of noise'}: "
          f"logits differ by {found.worst_logit:.2e} at worst, {found.mean_logit:.2e} on average, P(fake) by "
          f"{found.worst_score:.2e}; the same verdict on {found.verdicts} of {found.crops}{area}")  # fmt: skip
    if not found.worst_logit <= tolerance:
        raise DtnError(f"{second}: a logit differs by {found.worst_logit:.2e}, over --tolerance {tolerance:g}")


def inspect(engine: Annotated[Path, tyro.conf.Positional], batch: int | None = None) -> None:
    """Show what an engine, ONNX or MNN file is; of an engine on its GPU also its layers and their times.

    Example: dtn-fast inspect dtn.engine --batch 8

    Args:
        engine: An .engine, .rtx, .mnn or .onnx file.
        batch: Time each layer at this batch size.
    """
    import torch

    from dtn_fast.runtime.describe import describe

    print_table(str(engine), ["what", "value"], [[name, value] for name, value in describe(engine).items()])
    if engine.suffix in (".engine", ".rtx"):
        if not torch.cuda.is_available():
            print("its layers and their times: shown on the GPU that it was built for")
            return
        from dtn_fast.runtime.tensorrt import layers

        rows = layers(engine, batch)
        total = sum(ms or 0 for _, ms in rows)
        cells = [[name, *(("", "") if ms is None else (f"{ms:.4f}", f"{ms / total:.1%}"))] for name, ms in rows]
        print_table("Layers", ["layer", "ms", "share"], cells)


def repository(
    model: Annotated[Path, tyro.conf.Positional],
    out: Path,
    name: str = "dtn",
    max_batch: int = 64,
    delay_us: int = 2000,
    instances: int = 1,
) -> None:
    """Write a model repository of NVIDIA Triton Inference Server: dynamic batching, warm-up, encoded crop to score.

    Example: dtn-fast repository dtn.onnx --out models

    Then: docker run --gpus all -v $PWD/models:/models nvcr.io/nvidia/tritonserver:<release>-py3 tritonserver
    --model-repository=/models

    Args:
        model: An .onnx or .engine file written by dtn-fast export with --input crops (the default).
        out: Folder of the repository; models of other names in it stay.
        name: Of the model that takes crops; the ensemble that takes encoded pictures is called NAME_encoded.
        max_batch: Largest batch that requests are joined to.
        delay_us: Microseconds that a request waits for others.
        instances: Copies of the model per GPU (or per machine without one).
    """
    from dtn_fast.export.config import RepositoryConfig
    from dtn_fast.export.triton_repository import write_repository

    made = write_repository(model, out, RepositoryConfig(name, max_batch, delay_us, instances))
    print("\n".join(str(path) for path in made))
