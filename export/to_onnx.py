"""Exports a model to ONNX, folded, with the operators as nodes with standard bodies, and compares it with torch.

The file is self-contained: configuration, notice, kind of input, precision and a hash of the weights are its metadata.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dtn_fast.device import PRECISIONS
from dtn_fast.errors import DtnError
from dtn_fast.export.config import Input, OnnxConfig
from dtn_fast.files import write_whole
from dtn_fast.kernels import onnx_nodes
from dtn_fast.kernels.ops import tracing
from dtn_fast.model.adapt import merged
from dtn_fast.model.card import temperature_of
from dtn_fast.model.detector import Detector, state_bytes
from dtn_fast.model.dtn import DTN
from dtn_fast.model.fold import fold
from dtn_fast.model.mask_head import Tap, WithMask
from dtn_fast.model.novelty import WithNovelty
from dtn_fast.model.temporal import TemporalHead, WithFeatures
from dtn_fast.onnx_session import session_of
from dtn_fast.packages import require
from dtn_fast.runtime.clips import clip_file
from dtn_fast.runtime.scorer import outputs_of
from dtn_fast.version import __version__

OPSET = {"fp32": 20, "fp16": 20, "bf16": 22}  # lowest opset, from 20, whose convolutions take the dtype
BATCHES = (1, 2, 7)
"""Batch sizes at which a file is compared with torch."""
TOLERANCE = {
    "fp32": 1e-4,  # sums in another order
    "fp16": 2e-2,  # weights and maps rounded to 2^-11, some 40 layers deep
    "bf16": 1e-1,  # rounded to 2^-8
}
"""Largest difference of a logit that export accepts, relative to the largest logit (at least 1)."""


NOVELTY = "net"
"""Name, by :func:`module_of`, of the module that measures novelty, whose product is not a layer of the network."""


class Parity(NamedTuple):
    batch: int
    error: float
    """Largest absolute difference between torch's and onnxruntime's logits, or pixels of a mask."""
    scale: float
    """Largest absolute logit, at least 1."""


class Traced(nn.Module):
    """Module that the exporter traces: input as in OnnxConfig -> logits [B, classes], P(fake) [B] and, if the model
    gives them, novelty [B], features [B, C] for its temporal head and mask [B, m, m], all float32."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Detector, config: OnnxConfig) -> None:
        super().__init__()
        self.dtype, self.raw = PRECISIONS[config.dtype], config.input == "crops"
        if isinstance(model, DTN):  # folds the head scales into W_O; a dtn:: node gets a constant gate of one
            self.net: nn.Module = fold(model, "kernel" if config.nodes else "native")
        else:
            self.net = merged(model).eval().requires_grad_(False)
            for module in self.net.modules():
                if hasattr(module, "fused_attn"):  # timm's: torch translates fused attention of four dimensions alone
                    module.fused_attn = False  # type: ignore[assignment]
        self.net.to(self.dtype)
        detector: Any = self.net
        self.classes, self.temperature = model.config.num_classes, temperature_of(model.config.card)
        self.tap = Tap(self.net) if model.config.mask_head else None
        layer = self.net.novelty_layer()
        if model.novelty is not None and layer is not None:
            self.net = WithNovelty(self.net, layer, model.novelty)
        self.columns = self.classes + isinstance(self.net, WithNovelty)
        if model.temporal is not None:
            self.net = WithFeatures(self.net, detector.classifiers())
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (model.config.mean, model.config.std)
        )
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.raw:
            x = x.float().permute(0, 3, 1, 2) * self.scale + self.shift  # TensorRT wants the cast first
        x, mask = x.to(self.dtype), tuple[Tensor, ...]()
        if self.tap is None:
            outputs = self.net(x).float()
        else:
            outputs, found = self.tap(self.net, x)
            outputs, mask = outputs.float(), (found.float().sigmoid(),)
        further = isinstance(self.net, WithNovelty | WithFeatures)
        logits = outputs[:, : self.classes] if further else outputs
        score = (logits if self.temperature == 1 else logits / self.temperature).softmax(1)[:, 1]
        novelty = (outputs[:, self.classes],) if self.columns > self.classes else ()
        features = (outputs[:, self.columns :],) if isinstance(self.net, WithFeatures) else ()
        return (logits, score, *novelty, *features, *mask)


def export_onnx(model: Detector, path: Path, config: OnnxConfig = OnnxConfig()) -> list[Parity]:
    """Exports ``model`` to ``path`` after comparing it with torch (float32, not folded) at three batch sizes.

    Input ``crops`` uint8 [batch, S, S, 3] or ``images`` float32 [batch, 3, S, S]; outputs ``logits`` [batch, 2],
    ``score`` [batch], P(fake) by the model's temperature, of a calibrated model ``novelty`` [batch], and of one with a
    mask head ``mask`` [batch, m, m], P(forged); dynamic batch, opset 20 (bf16: 22).  The file is written only if every
    comparison passes.  onnxruntime cannot compute bfloat16 on a CPU: such a model is compared with its values in
    float32.  Raises UsageError when an onnx package is missing, DtnError when the logits differ.
    """
    proto = to_proto(model, config)
    report = check(model, proto, config, str(path))
    write_onnx(model, proto, path)
    return report


def write_onnx(model: Detector, proto: Any, path: Path) -> Path | None:
    """Writes a model of :func:`to_proto` and, beside it, its temporal head; returns the head's file, None without."""
    clips = None if model.temporal is None else clip_file(path)
    if clips is not None:
        write_whole(clips, clip_proto(model).SerializeToString())
    write_whole(path, proto.SerializeToString())
    return clips


def check(
    model: Detector, proto: Any, config: OnnxConfig, name: str, batches: tuple[int, ...] = BATCHES
) -> list[Parity]:
    """Runs :func:`compare`; raises DtnError, naming ``name``, when a difference exceeds TOLERANCE."""
    report = compare(model, proto, config, batches)
    worst = max(report, key=lambda p: p.error / p.scale)
    limit = TOLERANCE[config.dtype]
    if not worst.error <= limit * worst.scale:
        raise DtnError(f"{name}: onnxruntime differs from torch by {worst.error:.2e} at batch {worst.batch}, over "
                       f"the limit of {limit:.0e}; no file was written")  # fmt: skip
    return report


def to_proto(model: Detector, config: OnnxConfig) -> Any:
    """Checked onnx.ModelProto of ``model``, with metadata and the operators' bodies.  Raises DtnError when torch cannot
    trace it."""
    onnx = require_onnx()
    model = model.cpu().eval()
    example, traced = example_inputs(model.config, config.input, 2, seed=0), Traced(model, config)
    names = ["logits", "score", *outputs_of(model.config, clips=True)[1:]]
    try:
        with _quiet(), tracing(config.nodes):
            program = torch.onnx.export(
                traced,
                (example,),
                dynamo=True,
                opset_version=OPSET[config.dtype],
                input_names=[config.input],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
                verbose=False,
            )
    except Exception as error:  # of torch.export, of torch.onnx or of the model
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        name, reason = getattr(model.config, "timm", "the model"), str(cause).strip().partition("\n")[0]
        raise DtnError(f"{name}: torch cannot export it to ONNX ({reason}); use the checkpoint itself") from error
    assert program is not None
    proto = program.model_proto
    opset = OPSET[config.dtype]
    used = {node.op_type for node in proto.graph.node if node.domain == onnx_nodes.DOMAIN}
    proto.functions.extend(onnx.parser.parse_function(onnx_nodes.body(name, opset)) for name in sorted(used))
    if used and onnx_nodes.DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(onnx.helper.make_opsetid(onnx_nodes.DOMAIN, 1))
    onnx.helper.set_model_props(
        proto,
        {
            "dtn_config": model.config.to_json(),
            "notice": model.notice,
            "input": config.input,
            "precision": config.dtype,
            "weights": weights_hash(model),
            "dtn_fast": __version__,
        },
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def clip_proto(model: Detector) -> Any:
    """Checked onnx.ModelProto of the temporal head: ``features`` [B, T, C] and ``logits`` [B, T, classes] of a clip's
    frames -> ``clip_logits`` [B, classes], float32.  Raises DtnError when they differ from torch's."""
    onnx, head = require_onnx(), model.temporal
    assert head is not None
    head = copy.deepcopy(head).cpu().float().eval().requires_grad_(False)
    sizes = {0: torch.export.Dim("batch", min=1, max=4096)}
    with _quiet(), tracing(False):
        program = torch.onnx.export(
            head, clip_inputs(head, 2, seed=0), dynamo=True, opset_version=OPSET["fp32"],
            input_names=["features", "logits"], output_names=["clip_logits"], dynamic_shapes=(sizes, sizes),
            verbose=False,
        )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"weights": weights_hash(model), "step": str(float(head.step)),
                                         "dtn_fast": __version__})  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    session = session_of(proto.SerializeToString(), "the temporal head")
    for batch in BATCHES:
        inputs = clip_inputs(head, batch, seed=batch)
        with torch.inference_mode():
            expected = head(*inputs).numpy()
        given = dict(zip(("features", "logits"), (x.numpy() for x in inputs), strict=True))
        error = float(np.abs(session.run(None, given)[0] - expected).max())
        if not error <= TOLERANCE["fp32"] * max(1.0, float(np.abs(expected).max())):
            raise DtnError(f"the temporal head: onnxruntime differs from torch by {error:.2e}; no file was written")
    return proto


def clip_inputs(head: TemporalHead, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random features and logits of clips, with the shape that the head takes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(batch, head.frames, *shape, generator=generator)
    return draw(head.features) / head.scale + head.mean, draw(head.classes)


def compare(model: Detector, proto: Any, config: OnnxConfig, batches: tuple[int, ...]) -> list[Parity]:
    """Compares onnxruntime's logits, and masks, with those of ``model`` at each batch size."""
    session = session_of(runnable(proto).SerializeToString(), "the model")
    reference: nn.Module = model
    if model.mask_head is not None:
        reference = WithMask(copied := copy.deepcopy(model), copied)
    report = []
    for batch in batches:
        x = example_inputs(model.config, config.input, batch, seed=batch)
        with torch.inference_mode():
            expected = reference(_images(x, model.config))
        logits, *masks = expected if isinstance(expected, tuple) else (expected,)
        wanted = [logits.numpy(), *(mask.sigmoid().numpy() for mask in masks)]
        got = session.run(["logits", "mask"][: len(wanted)], {config.input: x.numpy()})
        error = max(float(np.abs(a - b).max()) for a, b in zip(got, wanted, strict=True))
        report.append(Parity(batch, error, max(1.0, float(logits.abs().max()))))
    return report


def runnable(proto: Any) -> Any:
    """Model that onnxruntime can run on a CPU: ``proto`` itself, or if it is bfloat16 a copy with float32 values."""
    import onnx

    half, full = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    if not any(tensor.data_type == half for tensor in proto.graph.initializer):
        return proto
    proto = copy.deepcopy(proto)

    def widen(tensor: Any) -> None:
        if tensor.data_type == half:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    for tensor in proto.graph.initializer:
        widen(tensor)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = full
    del proto.graph.value_info[:]
    return proto


def module_of(node: Any) -> str:
    """Torch module that a node was traced from, such as blocks.0.qkv, from the exporter's metadata; empty: none."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            parts = ast.literal_eval(entry.value)[-2:][0].split(".")
            while parts[0] in (NOVELTY, "detector"):  # the modules around the network
                del parts[0]
                if not parts:
                    return NOVELTY
            return ".".join(parts)
    return ""


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of the weights; independent of where the checkpoint is stored."""
    digest = hashlib.sha256()
    for part in state_bytes(model.state_dict()):
        digest.update(part)
    return digest.hexdigest()


def example_inputs(config: Any, kind: Input, batch: int, seed: int) -> Tensor:
    """Random input of ``kind`` with the shape and dtype that the model takes."""
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    if kind == "crops":
        return torch.randint(256, (batch, side, side, 3), generator=generator, dtype=torch.uint8)
    return torch.randn(batch, 3, side, side, generator=generator)


def _images(x: Tensor, config: Any) -> Tensor:
    from dtn_fast.model.preprocess import normalise

    return normalise(x, config) if x.dtype == torch.uint8 else x


def require_onnx() -> Any:
    """The onnx package.  Raises UsageError naming a missing package."""
    for name in ("onnxruntime", "onnxscript"):
        require(name)
    return require("onnx")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context that hides the exporter's deprecation warnings, progress messages and graphs that it could not trace."""
    for name in ("torch.onnx", "torch.fx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
