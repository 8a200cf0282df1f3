"""Writes a model repository for NVIDIA Triton Inference Server: the model, a picture decoder, and their ensemble."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from dtn_fast.errors import UsageError
from dtn_fast.export.config import RepositoryConfig
from dtn_fast.files import write_whole
from dtn_fast.model.config import mask_side
from dtn_fast.runtime.export_manifest import read_export_manifest
from dtn_fast.runtime.onnx import OnnxScorer
from dtn_fast.runtime.scorer import outputs_of

MODEL = Template("""name: "$name"
$backend
max_batch_size: $batch
input [ { name: "crops" data_type: TYPE_UINT8 dims: [ $side, $side, 3 ] } ]
output [
$outputs
]
dynamic_batching { max_queue_delay_microseconds: $delay preferred_batch_size: [ $batch ] }
instance_group [ { count: $instances kind: KIND_AUTO } ]
model_warmup [$warmups
]
$optimization
parameters [
$parameters
]
version_policy: { latest: { num_versions: 1 } }
""")
PARAMETER = Template('  { key: "$key" value: { string_value: $value } }')
BACKENDS = {
    "onnxruntime": 'backend: "onnxruntime"',
    "tensorrt": 'platform: "tensorrt_plan"',
    "python": 'backend: "python"',
}
OPTIMIZATIONS = {
    "tensorrt": "optimization { cuda { graphs: true } }",
    "onnxruntime": "optimization { graph { level: 2 } }",
    "python": "",
    "": "",
}
"""Optimisations of an engine, and of an ONNX file whose graph onnxruntime must leave as it is (level 2)."""
CODE = "model.py"
WARMUP = Template("""
  { name: "batch $batch" batch_size: $batch
    inputs { key: "crops" value: { data_type: TYPE_UINT8 dims: [ $side, $side, 3 ] zero_data: true } } }""")
DECODER = Template("""name: "${name}_decode"
backend: "python"
max_batch_size: $batch
input [ { name: "encoded" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "crops" data_type: TYPE_UINT8 dims: [ $side, $side, 3 ] } ]
dynamic_batching { max_queue_delay_microseconds: $delay }
instance_group [ { count: 2 kind: KIND_CPU } ]
parameters [ { key: "side" value: { string_value: "$side" } } ]
""")
ENSEMBLE = Template("""name: "${name}_encoded"
platform: "ensemble"
max_batch_size: $batch
input [ { name: "encoded" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
$whole_outputs
]
ensemble_scheduling {
  step [
    { model_name: "${name}_decode" model_version: -1
      input_map { key: "encoded" value: "encoded" } output_map { key: "crops" value: "crops" } },
    { model_name: "$name" model_version: -1
      input_map { key: "crops" value: "crops" } $maps }
  ]
}
""")


def write_repository(model: Path, out: Path, config: RepositoryConfig = RepositoryConfig()) -> list[Path]:
    """Writes NAME (the model), NAME_decode and NAME_encoded (picture to score) into ``out``; returns the files.

    model: an .onnx or .engine file of ``dtn-fast export`` whose input is crops.  A server that has loaded an earlier
    repository of this name keeps answering with it until it is told to load this one, or polls.  Raises UsageError on
    any other file, or a backend that does not take it.
    """
    suffixes = {".onnx": ("onnxruntime", "python"), ".engine": ("tensorrt",)}
    if model.suffix not in suffixes:
        raise UsageError(f"{model}: the server takes .onnx and .engine files of dtn-fast export")
    backend = suffixes[model.suffix][0] if config.backend == "auto" else config.backend
    if backend not in suffixes[model.suffix]:
        raise UsageError(f"--backend {backend}: does not run {model}; it takes "
                         f"{'an .engine' if backend == 'tensorrt' else 'an .onnx'} file")  # fmt: skip
    found = _of_engine(model) if backend == "tensorrt" else _of_onnx(model)
    if found.input != "crops":
        raise UsageError(f"{model}: takes normalised images; export it with --input crops")
    if found.least > 1 or config.max_batch > (found.most or config.max_batch):
        raise UsageError(f"{model}: built for batches of {found.least} to {found.most}; the server wants 1 to "
                         f"{config.max_batch}; set --max-batch, or build it with --batches")  # fmt: skip
    name, side, batch = config.name, found.config["image_size"], config.max_batch
    parameters = {"dtn_config": json.dumps(found.config), "notice": found.notice, "weights": found.weights}
    if backend != "tensorrt":
        parameters["intra_op_thread_count"] = str(config.cpu_threads)
    if backend == "python":
        parameters |= {"provider": config.provider, "optimise": "yes" if found.optimise else "no"}
    values = {
        "name": name, "batch": batch, "side": side, "delay": config.delay_us, "instances": config.instances,
        "backend": BACKENDS[backend],
        "optimization": OPTIMIZATIONS["tensorrt" if backend == "tensorrt" else "" if found.optimise else backend],
        "outputs": _outputs(found.outputs, True), "whole_outputs": _outputs(found.outputs, False),
        "maps": " ".join(f'output_map {{ key: "{o.name}" value: "{o.name}" }}' for o in found.outputs),
        "parameters": ",\n".join(PARAMETER.substitute(key=k, value=json.dumps(v)) for k, v in parameters.items()),
        "warmups": ",".join(WARMUP.substitute(batch=size, side=side) for size in sorted({1, batch})),
    }  # fmt: skip
    code = Path(__file__).parent
    texts = {
        f"{name}_decode/1/{CODE}": (code / "triton_decoder.py").read_text(encoding="utf-8"),
        f"{name}_decode/config.pbtxt": DECODER.substitute(values),
        f"{name}_encoded/config.pbtxt": ENSEMBLE.substitute(values),
        f"{name}/config.pbtxt": MODEL.substitute(values),  # last: it is what a server that polls waits for
    }
    if backend == "python":
        texts = {f"{name}/1/{CODE}": (code / "triton_model.py").read_text(encoding="utf-8"), **texts}
    file = "model.plan" if backend == "tensorrt" else "model.onnx"
    made = [out / name / "1" / file]
    with model.open("rb") as source:
        write_whole(made[0], lambda target: shutil.copyfileobj(source, target))
    for path, text in texts.items():
        write_whole(out / path, text)
        made.append(out / path)
    (out / f"{name}_encoded" / "1").mkdir(exist_ok=True)  # the server needs a version folder, even an empty one
    for earlier in {"model.onnx", "model.plan", CODE} - {path.name for path in made if path.parent == made[0].parent}:
        (made[0].parent / earlier).unlink(missing_ok=True)  # of another backend
    return made


class _Output(NamedTuple):
    name: str
    dims: tuple[int, ...]
    """Sizes after the batch."""


class _Described(NamedTuple):
    """Facts of a model file that the server's configuration needs."""

    input: str
    config: dict[str, Any]
    notice: str
    weights: str
    outputs: list[_Output]
    least: int = 1
    """Smallest batch size."""
    most: int = 0
    """Largest batch size; 0: any."""
    optimise: bool = True
    """Whether onnxruntime may rewrite the graph."""


def _of_onnx(model: Path) -> _Described:
    if not model.is_file():
        raise UsageError(f"{model}: no such file")
    scorer = OnnxScorer(model)
    meta = scorer.session.get_modelmeta().custom_metadata_map
    outputs = [_Output(o.name, tuple(o.shape[1:])) for o in scorer.session.get_outputs()]
    config = json.loads(meta["dtn_config"])
    return _Described(meta["input"], config, scorer.notice, scorer.weights, outputs, optimise=scorer.optimise)


def _of_engine(model: Path) -> _Described:
    manifest = read_export_manifest(model, "tensorrt")
    least, _, most = manifest.batches
    config = manifest.detector_config()
    side = mask_side(config)
    shapes: dict[str, tuple[int, ...]] = {"novelty": (), "mask": (side, side)}
    further = [_Output(name, shapes[name]) for name in outputs_of(config)[1:]]
    outputs = [_Output("logits", (config.num_classes,)), _Output("score", ()), *further]
    return _Described(manifest.input, manifest.config, manifest.notice, manifest.weights, outputs, least, most)


def _outputs(outputs: list[_Output], of_model: bool) -> str:
    """The outputs in protobuf's text format.  The server knows no output without a dimension: one that has none but the
    batch is [ 1 ], and the model's own shape is written beside it."""
    lines = []
    for name, dims in outputs:
        sizes, reshape = ", ".join(map(str, dims or (1,))), "" if dims or not of_model else " reshape: { shape: [ ] }"
        lines.append(f'  {{ name: "{name}" data_type: TYPE_FP32 dims: [ {sizes} ]{reshape} }}')
    return ",\n".join(lines)
