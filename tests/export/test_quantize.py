"""INT8 and FP8: the Q/DQ model against ONNX's own reference, the scales, the gate, engines of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export.config import OnnxConfig, QuantizeConfig
from dtn_fast.export.quantize import Grid, check_accuracy, fake_quantize, grid_of, layers, quantize, sensitivity
from dtn_fast.export.to_onnx import runnable, to_proto
from dtn_fast.export.to_tensorrt import export_engine
from dtn_fast.runtime.load import load_model
from dtn_fast.runtime.onnx import OnnxScorer
from dtn_fast.runtime.torch_scorer import TorchScorer

BOTH = QuantizeConfig("int8", "int8")


@pytest.fixture(scope="module")
def lively() -> DTN:
    """A model whose logits differ from crop to crop."""
    torch.manual_seed(0)
    model = DTN(SMALL).train()
    for _ in range(3):
        model(torch.randn(8, 3, 64, 64))
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model.eval()


@pytest.fixture(scope="module")
def faces(dataset: CropDataset) -> np.ndarray:
    return dataset.get(dataset.evenly_spaced("train", 12))


def scorer(proto: Any, optimise: bool = False) -> OnnxScorer:
    return OnnxScorer(runnable(proto).SerializeToString(), optimise=optimise)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("convs", "linears"), [("int8", "int8"), ("int8", "fp8"), ("fp8", "fp8"), ("none", "int8")])
def test_every_mix_stays_near_its_model(
    precision: Any, convs: Any, linears: Any, lively: DTN, faces: np.ndarray, tmp_path: Path
) -> None:
    proto = to_proto(lively, OnnxConfig(precision))
    made = quantize(proto, faces, QuantizeConfig(convs, linears))
    exact, got = scorer(proto).logits(faces), scorer(made).logits(faces)
    error, size = np.abs(got - exact).max(), np.abs(exact).max()
    assert 0 < error < 0.05 * size
    assert scorer(made, optimise=True).logits(faces) == pytest.approx(
        got, abs=0.05 * size
    )  # switched off where it lies
    kinds = [t.data_type for t in made.graph.initializer]
    assert (onnx.TensorProto.INT8 in kinds) == ("int8" in (convs, linears))
    assert (onnx.TensorProto.FLOAT8E4M3FN in kinds) == ("fp8" in (convs, linears))
    assert len(made.SerializeToString()) < len(proto.SerializeToString())
    archs = export_engine(made.SerializeToString(), tmp_path / "q.rtx").archs
    every = (75, 80, 86, 89, 120) if precision == "fp16" else (80, 86, 89, 120)
    assert archs == (every if "fp8" not in (convs, linears) else (89, 120))


def test_onnxruntime_does_what_the_standard_says(lively: DTN, faces: np.ndarray) -> None:
    made = quantize(to_proto(lively, OnnxConfig("fp32")), faces, BOTH)
    expected = ReferenceEvaluator(made).run(["logits"], {"crops": faces[:2]})[0]
    assert scorer(made).logits(faces[:2]) == pytest.approx(expected, abs=2e-3)


def test_what_is_quantised_and_what_is_kept(lively: DTN, faces: np.ndarray) -> None:
    proto = to_proto(lively, OnnxConfig("fp32"))
    names = [layer.name for layer in layers(proto)]
    assert names[0] == "backbone.3"  # the first convolution, backbone.0, is not there
    assert names[-4:] == [f"blocks.0.{part}" for part in ("qkv", "out", "expand", "shrink")]
    assert not {"head", "blocks.0.local"} & set(names)
    kept = quantize(proto, faces, replace(BOTH, keep=("backbone.3", "blocks.0.out")))
    quantised = {node.name.split(".int8")[0] for node in kept.graph.node if node.op_type == "DequantizeLinear"}
    whole = {node.name.split(".int8")[0] for node in quantize(proto, faces, BOTH).graph.node if "DQ" in node.name}
    assert len(whole) - len(quantised) == 4  # weight and activation of two layers
    props = {p.key: p.value for p in kept.metadata_props}
    assert props["quantized"] == "convs int8, linears int8, without backbone.3 blocks.0.out"
    with pytest.raises(UsageError, match=r"--keep nothing: no such layer; there are backbone\.3"):
        quantize(proto, faces, replace(BOTH, keep=("nothing",)))
    with pytest.raises(UsageError, match="nothing to quantise"):
        quantize(proto, faces, QuantizeConfig())
    with pytest.raises(UsageError, match="no crop"):
        quantize(proto, faces[:0], BOTH)


def test_the_grid_loses_least() -> None:
    values = np.random.default_rng(0).laplace(size=100_000).astype(np.float32)
    largest = float(np.abs(values).max())
    loss = lambda grid: np.square(fake_quantize(values, grid) - values).mean()
    chosen = grid_of(values, "int8")
    assert loss(chosen) < 0.9 * loss(Grid("int8", largest / 127))  # the rare large values may be cut
    assert loss(chosen) < 1.05 * min(loss(Grid("int8", top / 127)) for top in np.linspace(0.2, 1, 81) * largest)
    positive = np.maximum(values, 0)
    assert grid_of(positive, "uint8").zero == 0  # after a ReLU the whole range is used
    assert grid_of(values + 3, "uint8").zero > 0
    assert loss(grid_of(values, "uint8")) < 1.1 * loss(chosen)
    assert grid_of(np.zeros(4, np.float32), "int8") == Grid("int8", 1.0)
    with pytest.raises(DtnError, match="not finite"):
        grid_of(np.array([np.nan], np.float32), "int8")
    assert fake_quantize(np.array([1.0, 500.0], np.float32), Grid("fp8", 1.0)).tolist() == [1, 448]
    assert fake_quantize(np.array([-300.0, 0.4], np.float32), Grid("int8", 1.0)).tolist() == [-127, 0]
    assert fake_quantize(np.array([-3.0, 300.0], np.float32), Grid("uint8", 1.0, 2)).tolist() == [-2, 253]


def test_int8_for_a_cpu_runs_in_integers_and_stays_near(lively: DTN, faces: np.ndarray, tmp_path: Path) -> None:
    proto = to_proto(lively, OnnxConfig("fp32"))
    made = quantize(proto, faces, replace(BOTH, target="cpu"))
    exact, size = scorer(proto).logits(faces), float(np.abs(scorer(proto).logits(faces)).max())
    for optimise in (False, True):
        assert scorer(made, optimise).logits(faces) == pytest.approx(exact, abs=0.05 * size)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3  # of four between the first and the last
    assert "MatMulIntegerToFloat" in kinds
    props = {p.key: p.value for p in made.metadata_props}
    assert props["quantized"] == "convs int8, linears int8, for CPUs"
    with pytest.raises(UsageError, match="quantised for CPUs; quantise it with --target gpu"):
        export_engine(made.SerializeToString(), tmp_path / "q.rtx")


def test_sensitivity_is_of_each_layer_alone(lively: DTN, faces: np.ndarray) -> None:
    proto = to_proto(lively, OnnxConfig("fp32"))
    rows = list(sensitivity(proto, faces[:4], BOTH))
    assert [row.layer for row in rows] == [layer.name for layer in layers(proto)]
    assert all(0 < row.mean <= row.worst < 1 for row in rows)
    alone = quantize(proto, faces[:4], replace(BOTH, keep=tuple(r.layer for r in rows[1:])))
    change = np.abs(scorer(alone).logits(faces[:4]) - scorer(proto).logits(faces[:4]))
    assert rows[0].worst == pytest.approx(change.max(), rel=0.2)


def test_the_gate_measures_and_fails_past_its_limits(trained: Path, dataset: CropDataset, faces: np.ndarray) -> None:
    model = load_model(trained)
    reference, proto = TorchScorer(model), to_proto(model, OnnxConfig("fp32"))
    loose = replace(BOTH, max_auc_drop=1.0, max_logit_change=10.0)
    made = quantize(proto, faces, BOTH)
    result = check_accuracy(reference, made, dataset, loose)
    rows = dataset.select("val")
    change = np.abs(scorer(made).logits_rows(dataset, rows) - reference.logits_rows(dataset, rows))
    assert result.images == len(rows)
    assert result.worst == pytest.approx(change.max())
    assert result.auc is not None
    with pytest.raises(DtnError, match="moves a logit by"):
        check_accuracy(reference, made, dataset, replace(loose, max_logit_change=result.worst / 2))
    assert result.auc > 0.5
    reverse = load_model(trained)
    with torch.no_grad():
        reverse.head.weight.neg_()  # another AUC, and a lower one
    unlike = to_proto(reverse, OnnxConfig("fp32"))
    drop = result.auc - (check_accuracy(reference, unlike, dataset, loose).auc_quantized or 0)
    with pytest.raises(DtnError, match="AUC, over the limit"):
        check_accuracy(reference, unlike, dataset, replace(loose, max_auc_drop=drop - 1e-6))
    with pytest.raises(UsageError, match="no crop in its val split"):
        check_accuracy(reference, made, replace(dataset, videos=[]), loose)
