"""INT8 and FP8: explicit Q/DQ nodes in an ONNX model of to_onnx, calibrated on real crops, judged against fp32.

Weights per output channel and symmetric; activations per tensor: symmetric for GPUs (TensorRT takes no other),
unsigned with a zero point for CPUs (onnxruntime's fast kernels take no other).  The first convolution, depthwise
convolutions and the head stay in the model's own precision.  A scale is the one that loses least of a sample of the
values (mean squared error), not their maximum.

onnxruntime's quantize_static is no substitute: it fails on bfloat16 or silently skips it, its FP8 scales move logits by
whole units (4.2 on average, here 0.1), its default bias stops TensorRT-RTX, and it empties the caller's model.  Its
INT8 is as accurate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import evaluate_scores
from dtn_fast.export.config import QuantizeConfig, Width
from dtn_fast.export.to_onnx import NOVELTY, module_of, require_onnx, runnable
from dtn_fast.runtime.onnx import OnnxScorer
from dtn_fast.runtime.scorer import Scorer, probability

RANGE = {"int8": (-127.0, 127.0), "uint8": (0.0, 255.0), "fp8": (-448.0, 448.0)}
"""Smallest and largest stored value of each number format."""
SMALLEST = 2.0**-14
"""Smallest scale of a weight channel: fp16's smallest normal number.  Weights that need less are almost zero."""
SAMPLE = 1 << 16
"""Number of sampled values of a tensor from which its scale is chosen."""


class Layer(NamedTuple):
    """A convolution or matrix product that can be quantised."""

    name: str
    node: str
    """Name of the ONNX node."""
    x: str
    """Name of its activation."""
    weight: str
    """Name of its weight."""
    axis: int
    """Axis of the weight's output channels."""
    linear: bool


class Grid(NamedTuple):
    """Quantisation grid of an activation: value = (stored - zero) * scale."""

    kind: Literal["int8", "uint8", "fp8"]
    scale: float
    zero: int = 0


class Sensitivity(NamedTuple):
    layer: str
    width: Width
    worst: float
    """Largest change of a logit when this layer alone is quantised."""
    mean: float


class AccuracyCheck(NamedTuple):
    """Effect of quantisation on the validation split."""

    images: int
    auc: float | None
    """Frame AUC of the fp32 model; None if the split holds one class only."""
    auc_quantized: float | None
    """Frame AUC of the quantised model; None if the split holds one class only."""
    worst: float
    """Largest difference of a logit."""
    mean: float

    @property
    def drop(self) -> float:
        return 0.0 if self.auc is None or self.auc_quantized is None else self.auc - self.auc_quantized


def layers(proto: Any) -> list[Layer]:
    """Layers that can be quantised, in order, named by their torch modules, such as backbone.3 or blocks.0.qkv; the
    mask head stays as it is."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    found: list[Layer] = []
    convs = 0
    for node in proto.graph.node:
        if module_of(node).startswith("mask_head."):
            continue
        if node.op_type == "Conv":
            convs += 1
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            if convs > 1 and groups == 1:
                found.append(Layer(module_of(node), node.name, node.input[0], node.input[1], 0, False))
        elif node.op_type == "MatMul" and node.input[1] in constants and module_of(node) != NOVELTY:
            found.append(Layer(module_of(node), node.name, node.input[0], node.input[1], 1, True))
    return found


def widths(proto: Any, config: QuantizeConfig) -> dict[str, tuple[Layer, Width]]:
    """Layers to quantise and their number formats, by layer name.  Raises UsageError when --keep names no layer."""
    found = {layer.name: layer for layer in layers(proto)}
    for name in config.keep:
        if name not in found:
            raise UsageError(f"--keep {name}: no such layer; there are {', '.join(found)}")
    chosen: dict[str, tuple[Layer, Width]] = {}
    for name, layer in found.items():
        width = config.linears if layer.linear else config.convs
        if width != "none" and name not in config.keep:
            chosen[name] = (layer, width)
    return chosen


def calibrate(
    proto: Any, crops: NDArray[np.uint8], tensors: set[str], batch: int = 8
) -> dict[str, NDArray[np.float32]]:
    """Sample of each tensor's values over ``crops`` [N, S, S, 3]: about SAMPLE values, with the extremes."""
    onnx = require_onnx()
    probe = copy.deepcopy(runnable(proto))
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(probe).graph.value_info}
    for name in sorted(tensors):
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, types.get(name, 1), None))
    scorer = OnnxScorer(probe.SerializeToString(), optimise=False)
    names = sorted(tensors)
    kept: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    random = np.random.default_rng(0)
    share = max(256, SAMPLE * batch // max(len(crops), 1))
    for start in range(0, len(crops), batch):
        values = scorer.session.run(names, scorer.feed(crops[start : start + batch]))
        for name, value in zip(names, values, strict=True):
            flat = value.astype(np.float32).ravel()
            some = flat[random.integers(0, flat.size, min(share, flat.size))]
            kept[name].append(np.append(some, [flat.max(), flat.min()]))
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def grid_of(values: NDArray[np.float32], kind: Literal["int8", "uint8", "fp8"]) -> Grid:
    """Grid that rounds ``values`` with the least squared error.  Raises DtnError when a value is not finite."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if not np.isfinite([low, high]).all():
        raise DtnError("calibration met values that are not finite; train the model again, or check the crops")
    if low == high:
        return Grid(kind, 1.0)
    least, most = RANGE[kind]
    if kind == "uint8":
        full = (high - low) / (most - least)
    else:
        full = max(-low, high) / most
    grids = [Grid(kind, full * part, round(-low / full) if kind == "uint8" else 0) for part in np.linspace(0.3, 1, 29)]
    return min(grids, key=lambda grid: float(np.square(fake_quantize(values, grid) - values).mean()))


def fake_quantize(values: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Quantises and dequantises ``values`` on ``grid``."""
    stored = np.clip(values / grid.scale + grid.zero, *RANGE[grid.kind])
    if grid.kind == "fp8":
        import ml_dtypes

        stored = stored.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        stored = np.rint(stored)
    return ((stored - grid.zero) * grid.scale).astype(np.float32)


def insert(proto: Any, chosen: dict[str, tuple[Layer, Width]], grids: dict[tuple[str, Width], Grid]) -> Any:
    """Copy of the model in which the chosen layers have Q/DQ nodes on their activations and quantised weights."""
    onnx = require_onnx()
    proto = copy.deepcopy(proto)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    place = {node.name: index for index, node in enumerate(proto.graph.node)}
    made: dict[tuple[str, Width], str] = {}
    before: dict[int, list[Any]] = {}
    for layer, width in chosen.values():
        node = proto.graph.node[place[layer.node]]
        at = before.setdefault(place[layer.node], [])
        if (layer.x, width) not in made:
            grid = grids[layer.x, width]
            names = [f"{layer.x}.{width}{end}" for end in ("", ".scale", ".zero", ".again")]
            proto.graph.initializer.extend([
                _tensor(onnx, names[1], np.float32(grid.scale), constants[layer.weight].data_type),
                _stored(onnx, names[2], np.full((), grid.zero, np.float32), grid.kind),
            ])  # fmt: skip
            at.append(onnx.helper.make_node("QuantizeLinear", [layer.x, *names[1:3]], names[:1], name=f"{names[0]}.Q"))
            at.append(onnx.helper.make_node("DequantizeLinear", names[:3], names[3:], name=f"{names[0]}.DQ"))
            made[layer.x, width] = names[3]
        node.input[0] = made[layer.x, width]
        node.input[1] = _weight(onnx, proto, layer, width, constants, at)
    kept = list(proto.graph.node)
    del proto.graph.node[:]
    for index, node in enumerate(kept):
        proto.graph.node.extend([*before.get(index, ()), node])
    used = {name for node in proto.graph.node for name in node.input}
    left = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(left)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _weight(onnx: Any, proto: Any, layer: Layer, width: Width, constants: Any, at: list[Any]) -> str:
    """Adds a layer's INT8 or FP8 weight with its DequantizeLinear node; returns the name of the node's output."""
    given = constants[layer.weight]
    weight = _values(onnx, given)
    rest = tuple(i for i in range(weight.ndim) if i != layer.axis)
    top = np.abs(weight).max(rest)
    names = [f"{layer.weight}.{width}{end}" for end in ("", ".scale", ".zero", ".again")]
    stored = _tensor(onnx, names[1], np.maximum(np.where(top > 0, top, 1) / RANGE[width][1], SMALLEST), given.data_type)
    scale = _values(onnx, stored)  # rounded to the model's dtype, as the runtime reads it
    shape = [1] * weight.ndim
    shape[layer.axis] = -1
    proto.graph.initializer.extend([
        _stored(onnx, names[0], weight / scale.reshape(shape), width),
        stored,
        _stored(onnx, names[2], np.zeros(scale.shape, np.float32), width),
    ])  # fmt: skip
    at.append(onnx.helper.make_node("DequantizeLinear", names[:3], [names[3]], axis=layer.axis, name=f"{names[0]}.DQ"))
    return names[3]


def _values(onnx: Any, tensor: Any) -> NDArray[np.float32]:
    return onnx.numpy_helper.to_array(tensor).astype(np.float32)


def _tensor(onnx: Any, name: str, values: Any, kind: int) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(values).astype(onnx.helper.tensor_dtype_to_np_dtype(kind)), name)


def _stored(onnx: Any, name: str, values: NDArray[np.float32], kind: str) -> Any:
    values = np.clip(values, *RANGE[kind])
    if kind == "fp8":
        import ml_dtypes

        return onnx.numpy_helper.from_array(values.astype(ml_dtypes.float8_e4m3fn), name)
    return onnx.numpy_helper.from_array(np.rint(values).astype(kind), name)


def quantize(proto: Any, crops: NDArray[np.uint8], config: QuantizeConfig) -> Any:
    """Quantised model; ``crops`` [N, S, S, 3] uint8 are real crops to calibrate with.

    Raises UsageError when there is no crop, or no layer to quantise.
    """
    onnx = require_onnx()
    chosen = widths(proto, config)
    if not chosen:
        raise UsageError("nothing to quantise: give --convs int8 or --linears int8 or fp8, or --keep fewer layers")
    if not len(crops):
        raise UsageError(f"--calibrate {config.calibrate}: no crop in its train split")
    made = insert(proto, chosen, grids_of(proto, crops, chosen, config))
    kinds = sorted({f"{'linears' if layer.linear else 'convs'} {width}" for layer, width in chosen.values()})
    kinds += ["for CPUs"] if config.target == "cpu" else []
    props = {entry.key: entry.value for entry in made.metadata_props}
    props["quantized"] = ", ".join(kinds) + (f", without {' '.join(config.keep)}" if config.keep else "")
    onnx.helper.set_model_props(made, props)
    return made


def grids_of(
    proto: Any, crops: NDArray[np.uint8], chosen: dict[str, tuple[Layer, Width]], config: QuantizeConfig
) -> dict[tuple[str, Width], Grid]:
    """Grids of the chosen layers' activations, by activation and number format."""
    samples = calibrate(proto, crops, {layer.x for layer, _ in chosen.values()})
    kinds: dict[Width, Any] = {"fp8": "fp8", "int8": "uint8" if config.target == "cpu" else "int8"}
    return {(layer.x, width): grid_of(samples[layer.x], kinds[width]) for layer, width in chosen.values()}


def sensitivity(proto: Any, crops: NDArray[np.uint8], config: QuantizeConfig) -> Iterator[Sensitivity]:
    """Yields how much the logits on ``crops`` change when each layer alone is quantised, in the network's order."""
    chosen = widths(proto, config)
    if not len(crops):
        raise UsageError(f"--calibrate {config.calibrate}: no crop in its train split")
    grids = grids_of(proto, crops, chosen, config)
    exact = _logits(proto, crops)
    for name, (layer, width) in chosen.items():
        change = np.abs(_logits(insert(proto, {name: (layer, width)}, grids), crops) - exact)
        yield Sensitivity(name, width, float(change.max()), float(change.mean()))


def _logits(proto: Any, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
    return OnnxScorer(runnable(proto).SerializeToString(), batch_size=16, optimise=False).logits(crops)


def check_accuracy(reference: Scorer, proto: Any, dataset: CropDataset, config: QuantizeConfig) -> AccuracyCheck:
    """Compares AUC and logits of both models on the validation split.  Raises DtnError beyond ``config``'s limits."""
    rows = dataset.select("val")
    if not len(rows):
        raise UsageError(f"--calibrate {config.calibrate}: no crop in its val split for the accuracy check")
    scorer = OnnxScorer(runnable(proto).SerializeToString(), batch_size=16, optimise=False)
    exact, got = reference.logits_rows(dataset, rows), scorer.logits_rows(dataset, rows)
    labels = dataset.labels[rows]
    areas = [evaluate_scores(labels, probability(logits), EvaluateConfig.threshold).auc for logits in (exact, got)]
    change = np.abs(exact - got)
    result = AccuracyCheck(len(rows), areas[0], areas[1], float(change.max()), float(change.mean()))
    if not result.worst <= config.max_logit_change:
        raise DtnError(f"the quantised model moves a logit by {result.worst:.3g}, over the limit of "
                       f"{config.max_logit_change}; find the worst layers by --sensitivity and exempt them by "
                       "--keep")  # fmt: skip
    if not result.drop <= config.max_auc_drop:
        raise DtnError(f"the quantised model loses {result.drop:.4f} AUC, over the limit of {config.max_auc_drop}; "
                       "find the worst layers by --sensitivity and exempt them by --keep")  # fmt: skip
    return result
