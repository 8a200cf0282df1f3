"""Compares two model files on the same crops: logits, scores, verdicts, AUC and, on request, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dtn_fast.data.open import open_data
from dtn_fast.errors import UsageError, tell
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import evaluate_scores
from dtn_fast.export.config import VerifyConfig
from dtn_fast.export.to_onnx import example_inputs, module_of, require_onnx, runnable
from dtn_fast.kernels.onnx_nodes import DOMAIN
from dtn_fast.model.dtn import DTN
from dtn_fast.model.fold import fold
from dtn_fast.model.hooks import hooked
from dtn_fast.model.preprocess import normalise
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_scorer
from dtn_fast.runtime.onnx import OnnxScorer
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.runtime.torch_scorer import TorchScorer

LayerOutputs = Callable[[NDArray[np.uint8]], dict[str, NDArray[np.float32]]]


class Agreement(NamedTuple):
    crops: int
    worst_logit: float
    """Largest difference of a logit."""
    mean_logit: float
    worst_score: float
    """Largest difference of P(fake)."""
    verdicts: int
    """Number of crops on which the two verdicts (threshold 0.5) agree."""
    auc: tuple[float | None, float | None]
    """Frame AUC of each model; None without labels of both classes."""
    worst_mask: float | None = None
    """Largest difference of P(forged) of a pixel; None: not both have a mask head."""


class LayerError(NamedTuple):
    layer: str
    relative: float
    """Root mean square difference divided by the reference's root mean square."""
    worst: float
    """Largest absolute difference."""


class Verified(NamedTuple):
    """Result of comparing two model files."""

    names: tuple[str, str]
    """Names of the two runtimes."""
    agreement: Agreement
    layers: list[LayerError]
    """Differences by layer; empty unless requested."""
    same_weights: bool
    """False if the files record hashes of different weights."""


def verify(
    first: Path,
    second: Path,
    data: Path | None = None,
    config: VerifyConfig = VerifyConfig(),
    runtime: Runtime = Runtime(),
) -> Verified:
    """Compares the file ``second`` with ``first`` on crops of ``data``, or on noise if it is None.

    ``runtime.runtime`` is of the second file alone: a reference that is an ONNX file runs through onnxruntime.

    Raises UsageError when the split holds no crop, or the two take crops of different sizes.
    """
    reference = dataclasses.replace(runtime, runtime=Runtime.runtime)
    a, b = load_scorer(first, reference), load_scorer(second, runtime)
    if a.config.crop != b.config.crop:
        tell(f"{first} takes crops by {a.config.crop or 'an unknown policy'}, {second} by "
             f"{b.config.crop or 'an unknown policy'}")  # fmt: skip
    labels = None
    if data is None:
        crops = example_inputs(a.config, "crops", config.images, seed=0).numpy()
    else:
        dataset = open_data(data, a.config.image_size)
        dataset.check_fits(a.config, str(first))
        dataset.tell_differences(a.config, str(first))
        rows = dataset.evenly_spaced(config.split, config.images)
        if not len(rows):
            raise UsageError(f"--data {data}: no crop in its {config.split} split")
        crops, labels = dataset.get(rows), dataset.labels[rows]
    agreement, layers = compare(a, b, crops, labels), []
    if config.layers:
        layers = compare_layers(layer_outputs(a, first, second), layer_outputs(b, second, first), crops[:8])
    weights = {getattr(s, "weights", "") for s in (a, b)} - {""}
    return Verified((a.name, b.name), agreement, layers, len(weights) < 2)


def compare(
    first: Scorer, second: Scorer, crops: NDArray[np.uint8], labels: NDArray[np.int64] | None = None
) -> Agreement:
    """Compares ``second`` with ``first`` on crops [N, S, S, 3] uint8; with labels [N], 0 real, 1 fake, also their AUCs.

    Raises UsageError when the two take crops of different sizes, or there is no crop.
    """
    if first.config.image_size != second.config.image_size:
        raise UsageError(f"{first.name} takes {first.config.image_size} pixels, {second.name} "
                         f"{second.config.image_size}: they cannot be compared on the same crops")  # fmt: skip
    if not len(crops):
        raise UsageError("no crop to compare the models on")
    outputs = first.outputs(crops), second.outputs(crops)
    scores = first.scored(outputs[0]).score, second.scored(outputs[1]).score
    logits = [out[:, : first.config.num_classes] for out in outputs]
    worst_mask = None
    if first.config.mask_head and second.config.mask_head:
        masks = first.judge(crops).mask, second.judge(crops).mask
        worst_mask = float(np.abs(masks[0] - masks[1]).max())  # type: ignore[operator]
    change = np.abs(logits[0] - logits[1])
    areas = (
        (None, None)
        if labels is None
        else tuple(evaluate_scores(labels, s, EvaluateConfig.threshold).auc for s in scores)
    )
    return Agreement(
        len(crops), float(change.max()), float(change.mean()), float(np.abs(scores[0] - scores[1]).max()),
        int(((scores[0] >= EvaluateConfig.threshold) == (scores[1] >= EvaluateConfig.threshold)).sum()), areas,  # type: ignore[arg-type]
        worst_mask,
    )  # fmt: skip


def compare_layers(first: LayerOutputs, second: LayerOutputs, crops: NDArray[np.uint8]) -> list[LayerError]:
    """Differences of every layer that both models expose, in network order.  Raises UsageError if there is none."""
    expected, got = first(crops), second(crops)
    common = [name for name in expected if name in got and expected[name].shape == got[name].shape]
    if not common:
        raise UsageError("the two models share no layer; compare a checkpoint and its ONNX files")
    rows = []
    for name in common:
        gap = got[name] - expected[name]
        size = float(np.sqrt(np.square(expected[name]).mean())) or 1.0
        rows.append(LayerError(name, float(np.sqrt(np.square(gap).mean())) / size, float(np.abs(gap).max())))
    return rows


def layer_outputs(scorer: Scorer, path: Path, other: Path) -> LayerOutputs:
    """Function that returns the layer outputs of ``scorer``, loaded from ``path``, by module, such as blocks.0.qkv.

    A checkpoint is folded like the file ``other`` that it is compared with: 1/sqrt(d) is in W_q or in the attention
    node.  Raises UsageError for engines and MNN files, which expose no layers.
    """
    if isinstance(scorer, TorchScorer):
        return lambda crops: _torch_layers(scorer, _has_nodes(other), crops)
    if isinstance(scorer, OnnxScorer):
        proto, names = _probe(path)
        session = OnnxScorer(proto.SerializeToString(), optimise=False)

        def layers(crops: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
            values = session.session.run(list(names.values()), session.feed(crops))
            return {module: value.astype(np.float32) for module, value in zip(names, values, strict=True)}

        return layers
    raise UsageError(
        f"{path}: {scorer.name} shows no layers; --layers takes checkpoints, and ONNX files in onnxruntime"
    )


def _has_nodes(path: Path) -> bool:
    onnx = require_onnx()
    return path.suffix == ".onnx" and any(node.domain == DOMAIN for node in onnx.load(path).graph.node)


def _torch_layers(scorer: TorchScorer, nodes: bool, crops: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    net = fold(scorer.model, "kernel" if nodes else "native") if isinstance(scorer.model, DTN) else scorer.folded
    found: dict[str, NDArray[np.float32]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _given: Any, output: Any) -> None:
            found[name] = output.detach().float().cpu().clone().numpy()  # a following ReLU may overwrite it in place

        return hook

    kinds = (nn.Conv2d, nn.Linear)
    layers = [(m, keep(n)) for n, m in net.named_modules() if isinstance(m, kinds)]
    with hooked(net, layers), torch.inference_mode():
        weight = next(net.parameters())
        net(normalise(crops, scorer.config, weight.device).to(weight.dtype))
    return found


def _probe(path: Path) -> tuple[Any, dict[str, str]]:
    """ONNX model with the last value of every convolution or matrix product module as an extra output, and the names of
    these outputs by module."""
    onnx = require_onnx()
    proto = runnable(onnx.load(path))
    last: dict[str, Any] = {}
    inside = {module_of(n) for n in proto.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")}
    for node in proto.graph.node:
        if module_of(node) in inside and node.op_type in ("Conv", "MatMul", "Gemm", "Add"):
            last[module_of(node)] = node
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    shown = {output.name for output in proto.graph.output}
    names = {module: node.output[0] for module, node in last.items() if module and node.output[0] in {*types, *shown}}
    for name in set(names.values()) - shown:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, types[name], None))
    return proto, names
