"""Writes a model repository for NVIDIA Triton Inference Server: the model, a picture decoder, and their ensemble."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from string import Template

from dtn_fast.errors import UsageError
from dtn_fast.export.config import RepositoryConfig
from dtn_fast.files import write_whole
from dtn_fast.runtime.export_manifest import read_export_manifest
from dtn_fast.runtime.onnx import metadata

MODEL = Template("""name: "$name"
$backend
max_batch_size: $batch
input [ { name: "crops" data_type: TYPE_UINT8 dims: [ $side, $side, 3 ] } ]
output [
  { name: "logits" data_type: TYPE_FP32 dims: [ $classes ] },
  { name: "score" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } }
]
dynamic_batching { max_queue_delay_microseconds: $delay preferred_batch_size: [ $preferred ] }
instance_group [ { count: $instances kind: KIND_AUTO } ]
model_warmup [$warmups
]
$optimization
parameters [
  { key: "dtn_config" value: { string_value: $config } },
  { key: "notice" value: { string_value: $notice } },
  { key: "weights" value: { string_value: $weights } }
]
version_policy: { latest: { num_versions: 1 } }
""")
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
  { name: "logits" data_type: TYPE_FP32 dims: [ $classes ] },
  { name: "score" data_type: TYPE_FP32 dims: [ 1 ] }
]
ensemble_scheduling {
  step [
    { model_name: "${name}_decode" model_version: -1
      input_map { key: "encoded" value: "encoded" } output_map { key: "crops" value: "crops" } },
    { model_name: "$name" model_version: -1
      input_map { key: "crops" value: "crops" }
      output_map { key: "logits" value: "logits" } output_map { key: "score" value: "score" } }
  ]
}
""")
CODE = '''"""Decodes face crops (JPEG, PNG, WebP) to RGB uint8 [S, S, 3].  The server needs opencv-python-headless."""

import json
import os

MAX_BYTES, MAX_PIXELS = 32_000_000, 64_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))  # read when cv2 is imported

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.side = int(json.loads(args["model_config"])["parameters"]["side"]["string_value"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        encoded = pb_utils.get_input_tensor_by_name(request, "encoded").as_numpy()
        try:
            crops = np.stack([self.decode(row) for row in encoded.reshape(-1)])
        except ValueError as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("crops", crops)])

    def decode(self, data):
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes: over the limit of {MAX_BYTES}")
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            image = None
        if image is None or image.shape[0] * image.shape[1] > MAX_PIXELS:
            raise ValueError("not a JPEG, PNG or WebP picture, or too large; send an encoded face crop")
        size = (self.side, self.side)
        if image.shape[:2] != size:
            shrinks = min(image.shape[:2]) > self.side
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return np.ascontiguousarray(image[:, :, ::-1])
'''


def write_repository(model: Path, out: Path, config: RepositoryConfig = RepositoryConfig()) -> list[Path]:
    """Writes NAME (the model), NAME_decode and NAME_encoded (picture to score) into ``out``; returns the files.

    model: an .onnx or .engine file of ``dtn-fast export`` whose input is crops.  Raises UsageError on any other file.
    """
    if model.suffix == ".onnx":
        meta = metadata(model)
        takes, side_of, file, backend = (
            meta["input"],
            json.loads(meta["dtn_config"]),
            "model.onnx",
            'backend: "onnxruntime"',
        )
        least, most, optimization = 1, config.max_batch, ""
    elif model.suffix == ".engine":
        manifest = read_export_manifest(model, "tensorrt")
        meta = {"notice": manifest.notice, "weights": manifest.weights}
        takes, side_of, file, backend = manifest.input, manifest.config, "model.plan", 'platform: "tensorrt_plan"'
        least, _, most = manifest.batches
        optimization = "optimization { cuda { graphs: true } }"
    else:
        raise UsageError(f"{model}: the server takes .onnx and .engine files of dtn-fast export")
    if takes != "crops":
        raise UsageError(f"{model}: takes normalised images; export it with --input crops")
    if least > 1 or config.max_batch > most:
        raise UsageError(f"{model}: built for batches of {least} to {most}; the server wants 1 to {config.max_batch}; "
                         "set --max-batch, or build it with --batches")  # fmt: skip
    side, batch = side_of["image_size"], config.max_batch
    sizes = sorted({1, batch})
    values = {
        "name": config.name, "batch": batch, "side": side, "classes": side_of.get("num_classes", 2),
        "delay": config.delay_us, "preferred": batch, "instances": config.instances, "backend": backend,
        "optimization": optimization, "config": _quoted(json.dumps(side_of)), "notice": _quoted(meta.get("notice", "")),
        "weights": _quoted(meta.get("weights", "")),
        "warmups": ",".join(WARMUP.substitute(batch=size, side=side) for size in sizes),
    }  # fmt: skip
    name = config.name
    texts = {
        f"{name}/config.pbtxt": MODEL.substitute(values),
        f"{name}_decode/config.pbtxt": DECODER.substitute(values),
        f"{name}_decode/1/model.py": CODE,
        f"{name}_encoded/config.pbtxt": ENSEMBLE.substitute(values),
    }
    made = [out / name / "1" / file]
    made[0].parent.mkdir(parents=True, exist_ok=True)
    with model.open("rb") as source:
        write_whole(made[0], lambda target: shutil.copyfileobj(source, target))
    for path, text in texts.items():
        write_whole(out / path, text)
        made.append(out / path)
    (out / f"{name}_encoded" / "1").mkdir(exist_ok=True)  # the server needs a version folder, even an empty one
    return made


def _quoted(text: str) -> str:
    """String literal of protobuf's text format."""
    return json.dumps(text)
