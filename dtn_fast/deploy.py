"""The command line's verbs of whoever deploys: export, verify, inspect, detect, serve, repository, doctor."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export.quantize import QuantizeConfig
from dtn_fast.export.to_onnx import OnnxConfig
from dtn_fast.export.to_tensorrt import EngineConfig
from dtn_fast.runtime import Runtime
from dtn_fast.serving import ServeConfig
from dtn_fast.terminal import print_table, progress

SUFFIXES = (".onnx", ".mnn", ".engine", ".rtx")
Runtimed = Annotated[Runtime, tyro.conf.OmitArgPrefixes]


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
    from dtn_fast.runtime import load_model

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
    from dtn_fast.data.shards import open_data
    from dtn_fast.export.quantize import gate, quantize, sensitivity, widths
    from dtn_fast.runtime import TorchScorer

    assert config.calibrate is not None
    shards = open_data(config.calibrate, detector.config.image_size)
    crops = shards.get(shards.spread("train", config.images))
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
    result = gate(TorchScorer(detector), made, shards, config)
    area = "undefined (one class)" if result.auc is None else f"{result.auc:.4f} -> {result.auc_quantized:.4f}"
    print(f"validation split, {result.images} crops: frame AUC {area}; logits move by {result.mean:.4f} on average, "
          f"{result.worst:.4f} at worst")  # fmt: skip
    return made


def _engine(source: Path | bytes, out: Path, config: EngineConfig) -> None:
    from dtn_fast.export.to_tensorrt import commands, export_engine

    print(f"building {out} ...", flush=True)
    built = export_engine(source, out, config)
    if built.race:
        print("attention: " + ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in built.race.items()))
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
    from dtn_fast.data.shards import open_data
    from dtn_fast.export.to_onnx import example_inputs
    from dtn_fast.export.verify import compare, compare_layers, taps
    from dtn_fast.runtime import load_scorer

    a, b = load_scorer(first, runtime), load_scorer(second, runtime)
    labels = None
    if data is None:
        crops = example_inputs(a.config, "crops", images, seed=0).numpy()
    else:
        shards = open_data(data, a.config.image_size)
        rows = shards.spread(split, images)
        if not len(rows):
            raise UsageError(f"--data {data}: no crop in its {split} split")
        crops, labels = shards.get(rows), shards.labels[rows]
    found = compare(a, b, crops, labels)
    if layers:
        errors = compare_layers(taps(a, first, second), taps(b, second, first), crops[:8])
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

    from dtn_fast.built import describe

    print_table(str(engine), ["what", "value"], [[name, value] for name, value in describe(engine).items()])
    if engine.suffix in (".engine", ".rtx"):
        if not torch.cuda.is_available():
            print("its layers and their times: shown on the GPU that it was built for")
            return
        from dtn_fast.tensorrt_runtime import layers

        rows = layers(engine, batch)
        total = sum(ms or 0 for _, ms in rows)
        cells = [[name, *(("", "") if ms is None else (f"{ms:.4f}", f"{ms / total:.1%}"))] for name, ms in rows]
        print_table("Layers", ["layer", "ms", "share"], cells)


def detect(
    inputs: Annotated[list[str], tyro.conf.Positional],
    model: Path,
    out: Path = Path("detect"),
    frames: int = 32,
    rate: float = 0.0,
    threshold: float = 0.5,
    annotate: bool = False,
    runtime: Runtimed = Runtime(),
) -> int:
    """Say of images and videos whether their faces are forged, whose, when and where.

    Example: dtn-fast detect clip.mp4 photos/ "more/**/*.jpg" --model runs/first --out detect --annotate

    Prints a table and writes OUT/results.json and OUT/report.html.  Exit code 0: every input has a verdict; 1: some
    could not be read or show no face; 2: usage.

    Args:
        inputs: Images, videos, folders (searched recursively) and globs.
        model: A run, a checkpoint folder, or an .onnx, .mnn, .engine or .rtx file.
        out: Folder for the results.
        frames: Frames per video, spread evenly; 0: all.
        rate: Frames per second of video instead.
        threshold: P(fake) from which the verdict is fake.
        annotate: Also write each video with faces framed and forged spans marked.
        runtime: How the model runs.
    """
    from dtn_fast.annotate import annotate as write_annotated
    from dtn_fast.data.faces import FaceDetector
    from dtn_fast.data.video import VIDEOS
    from dtn_fast.detect import RULE, Result, Timing, find_inputs
    from dtn_fast.detect import detect as run
    from dtn_fast.report import write_report, write_results
    from dtn_fast.runtime import load_scorer

    if frames < 0 or not rate >= 0:
        raise UsageError(f"--frames {frames}, --rate {rate}: not below 0")
    if not inputs:
        raise UsageError("no inputs; example: dtn-fast detect clip.mp4 --model runs/first")
    scorer, detector = load_scorer(model, runtime), FaceDetector()
    paths, results, timing, written, unwritten = list(find_inputs(inputs)), [], Timing(), [], 0
    with progress() as bar:
        task = bar.add_task("detecting", total=len(paths), note="")
        for number, (path, error) in enumerate(paths):
            tell = lambda read, path=path: bar.update(task, note=f"{path.name}, {read} frames")
            result = Result(path, error=error) if error else run(path, scorer, detector, frames, threshold, rate, tell)
            results.append(result)
            timing.add(result.timing)
            if result.error:
                print(f"dtn-fast: {result.error}", file=sys.stderr)
            elif annotate and path.suffix.lower() in VIDEOS:
                target = out / f"{number + 1:03d}-{path.stem}.mp4"
                try:
                    for drawn in write_annotated(result, target, threshold):
                        bar.update(task, note=f"{target.name}, {drawn} frames drawn")
                    written.append(target)
                except (DtnError, OSError, ValueError) as failed:  # PyAV's errors are OSErrors and ValueErrors
                    unwritten += 1
                    print(f"dtn-fast: {target}: the annotated video was not written ({failed})", file=sys.stderr)
            bar.advance(task)
    rows = [
        [str(r.path), r.verdict, f"{r.score:.3f}" if r.score is not None else "", str(len(r.people) or ""),
         ", ".join(f"{s.start:.1f}-{s.end:.1f}" for s in r.spans[:4]) + (", ..." if len(r.spans) > 4 else "")
         if r.path.suffix.lower() in VIDEOS else "", f"{len(r.frames)} of {r.frames_read}"]
        for r in results
    ]  # fmt: skip
    header = ["input", "verdict", "P(fake)", "people", "forged, seconds", "frames with a face"]
    print_table("Verdicts", header, rows)
    print(f"{RULE}; fake from {threshold} up" + (f"\n{scorer.notice}" if scorer.notice else ""))
    read = sum(r.frames_read for r in results)
    if read:
        print(
            f"{read} frames in {timing.wall:.1f} s, {read / max(timing.wall, 1e-9):.1f} frames/s; "
            f"work: {timing.shares()}"
        )
    write_results(out / "results.json", results, scorer.notice, threshold)
    write_report(out / "report.html", "Face forgery report", [trained_on(scorer.notice)], None, results, threshold)
    print("\n".join([f"report: {out / 'report.html'}", *(f"annotated: {path}" for path in written[:8])]))
    if len(written) > 8:
        print(f"and {len(written) - 8} more annotated videos in {out}")
    return int(unwritten > 0 or not all(r.ok for r in results))


def trained_on(notice: str) -> str:
    return f"This model was trained on {notice}." if notice else ""


def serve(
    model: Annotated[Path, tyro.conf.Positional],
    config: Annotated[ServeConfig, tyro.conf.OmitArgPrefixes] = ServeConfig(),
    runtime: Runtimed = Runtime(),
) -> None:
    """Serve a model over HTTP: a page to drop an image or a video on, and the same for programs.

    Example: dtn-fast serve runs/first --port 8000

    For programs: curl -T clip.mp4 "http://127.0.0.1:8000/v1/detect?name=clip.mp4"; also /healthz, /readyz, /metrics.

    Args:
        model: A run, a checkpoint folder, or an .onnx, .mnn, .engine or .rtx file.
        config: Limits and address.
        runtime: How the model runs.
    """
    from dtn_fast.runtime import load_scorer
    from dtn_fast.serving import run

    run(load_scorer(model, runtime), config)


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
    from dtn_fast.export.serve import RepositoryConfig, write_repository

    made = write_repository(model, out, RepositoryConfig(name, max_batch, delay_us, instances))
    print("\n".join(str(path) for path in made))


def doctor() -> None:
    """Show what this machine can run and, where it cannot, why.

    Example: dtn-fast doctor
    """
    from dtn_fast.doctor import examine

    for title, header, rows in examine():
        print_table(title, header, rows)
