"""ONNX against torch, the runtimes behind one callable, evaluation on both."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from small import SMALL
from torch import nn

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.evaluation.evaluate import evaluate
from dtn_fast.export.config import OnnxConfig
from dtn_fast.export.to_mnn import export_mnn
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.export.verify import compare, compare_layers, layer_outputs
from dtn_fast.kernels import ops, reference
from dtn_fast.kernels.onnx_nodes import body
from dtn_fast.model.build import TimmDetector, build_detector
from dtn_fast.model.config import TimmConfig
from dtn_fast.onnx_session import session_of
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_model, load_scorer
from dtn_fast.runtime.onnx import OnnxScorer
from dtn_fast.runtime.torch_scorer import TorchScorer


@pytest.mark.parametrize("nodes", [True, False])
@pytest.mark.parametrize("kind", ["crops", "images"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_flavour_answers_as_torch(precision: Any, kind: Any, nodes: bool, small: DTN, tmp_path: Path) -> None:
    report = export_onnx(small, tmp_path / "m.onnx", OnnxConfig(precision, kind, nodes))
    limit = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}[precision]
    assert all(0 <= p.error < limit for p in report)
    model = onnx.load(tmp_path / "m.onnx")
    assert {f.name for f in model.functions} == ({"MASAttention", "MoEGate"} if nodes else set())
    given = model.graph.input[0]
    assert given.name == kind
    expected = onnx.TensorProto.UINT8 if kind == "crops" else onnx.TensorProto.FLOAT
    assert given.type.tensor_type.elem_type == expected
    assert [o.name for o in model.graph.output] == ["logits", "score"]
    half = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    convs = {n.input[1] for n in model.graph.node if n.op_type == "Conv"}
    assert {t.data_type for t in model.graph.initializer if t.name in convs} == {half[precision]}
    assert not any(n.op_type == "BatchNormalization" for n in model.graph.node)


def test_a_model_that_cannot_be_traced_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_detector(TimmConfig("test_resnet", image_size=64))
    monkeypatch.setattr(TimmDetector, "forward", lambda self, x: self.net(x) if x.sum() > 0 else self.net(-x))
    with pytest.raises(DtnError, match=r"test_resnet: torch cannot export it to ONNX \(.*data-dependent.*checkpoint"):
        export_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", ""), "one line is all that is said"


def test_the_bodies_mean_what_the_operators_mean() -> None:
    """dtn::MASAttention and dtn::MoEGate by onnxruntime, alone, with scales that are not open."""
    torch.manual_seed(0)
    qkv, scale = torch.randn(2, 49, 3, 2, 32), torch.randn(2)
    x, weights = torch.randn(2, 32, 5, 4), [torch.randn(s) for s in ((3, 16, 32), (3, 16), (3, 16), (3,), (3,))]

    class Both(nn.Module):
        def forward(self, qkv: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, *weights: torch.Tensor) -> Any:
            return ops.mas_attention_packed(qkv, scale), ops.moe_gate(x, *weights)

    with ops.tracing(nodes=True):
        program = torch.onnx.export(Both(), (qkv, scale, x, *weights), dynamo=True, opset_version=20, verbose=False)
    model = program.model_proto
    model.functions.extend(onnx.parser.parse_function(body(name, 20)) for name in ("MASAttention", "MoEGate"))
    session = session_of(model.SerializeToString(), "both")
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), (qkv, scale, x, *weights), strict=True)}
    attended, gated = session.run(None, feed)
    assert attended == pytest.approx(reference.mas_attention(*qkv.unbind(2), scale).numpy(), abs=1e-5)
    assert gated == pytest.approx(reference.moe_gate(x, *weights, 0.0, None).numpy(), abs=1e-5)


def test_mnn_answers_as_torch_and_is_checked(trained: Path, dataset: CropDataset, tmp_path: Path) -> None:
    model = load_model(trained)
    assert all(p.error < 1e-4 for p in export_mnn(model, tmp_path / "m.mnn"))
    scorer = load_scorer(tmp_path / "m.mnn")
    crops = dataset.get(np.arange(19))
    assert scorer.score(crops) == pytest.approx(TorchScorer(model).score(crops), abs=1e-4)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: scorer.score(crops), range(8)):
            assert got == pytest.approx(scorer.score(crops), abs=1e-6)
    (tmp_path / "m.mnn").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=r"m\.mnn: not the file that m\.mnn\.json describes"):
        load_scorer(tmp_path / "m.mnn")
    drifting = DTN(SMALL).eval()
    real = drifting.forward
    drifting.forward = lambda x: real(x) + (0.0 if torch.compiler.is_exporting() else 0.1)  # type: ignore[method-assign, assignment]
    with pytest.raises(DtnError, match="MNN differs from torch"):
        export_mnn(drifting, tmp_path / "bad.mnn")
    assert not (tmp_path / "bad.mnn").exists()


def test_two_models_are_compared_layer_by_layer(
    exported: Path, trained: Path, dataset: CropDataset, tmp_path: Path
) -> None:
    crops, labels = dataset.get(np.arange(12)), dataset.labels[:12]
    a, b = load_scorer(trained), load_scorer(exported)
    found = compare(a, b, crops, labels)
    assert found.worst_logit < 1e-5
    assert (found.crops, found.verdicts) == (12, 12)
    assert found.auc[0] == found.auc[1]
    rows = compare_layers(layer_outputs(a, trained, exported), layer_outputs(b, exported, trained), crops)
    assert [r.layer for r in rows][:2] == ["backbone.0", "backbone.3"]
    assert {"blocks.0.qkv", "blocks.0.local", "head"} <= {r.layer for r in rows}
    assert max(r.relative for r in rows) < 1e-4
    model = load_model(trained)
    model.blocks[0].mlp[0].weight.data.mul_(1.1)  # from here on they part
    export_onnx(model, tmp_path / "other.onnx")
    other = load_scorer(tmp_path / "other.onnx")
    outputs = layer_outputs(a, trained, exported), layer_outputs(other, tmp_path / "other.onnx", trained)
    apart = {r.layer: r.relative for r in compare_layers(*outputs, crops)}
    assert apart["blocks.0.out"] < 1e-4 < 1e-2 < apart["blocks.0.expand"]
    export_mnn(model, tmp_path / "m.mnn")
    with pytest.raises(UsageError, match="MNN shows no layers"):
        layer_outputs(load_scorer(tmp_path / "m.mnn"), tmp_path / "m.mnn", trained)
    with pytest.raises(UsageError, match="cannot be compared on the same crops"):
        compare(a, TorchScorer(DTN(SMALL.preset("tiny")).eval()), crops)


@pytest.mark.parametrize("fields", [{"precision": "bf16"}, {"mode": "compile"}, {"device": "cpu", "mode": "eager"}])
def test_a_checkpoint_runs_in_every_way(fields: dict, trained: Path, dataset: CropDataset) -> None:
    crops = dataset.get(np.arange(5))
    exact = load_scorer(trained).score(crops)
    close = 2e-2 if "precision" in fields else 1e-5
    assert load_scorer(trained, Runtime(**fields)).score(crops) == pytest.approx(exact, abs=close)


def test_what_this_machine_cannot_run_is_named(exported: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for path, fields, words in (
        (trained, {"device": "cuda"}, "--device cuda: torch sees no GPU"),
        (trained, {"mode": "graph"}, "--mode graph: CUDA graphs need a GPU"),
        (exported, {"provider": "cuda"}, "--provider cuda: this onnxruntime has no CUDAExecutionProvider"),
        (exported, {"provider": "tensorrt"}, "onnxruntime-gpu, or use --provider cpu"),
        (exported, {"device": "cuda"}, "--device cuda: torch sees no GPU"),
    ):
        with pytest.raises(UsageError, match=words):
            load_scorer(path, Runtime(**fields))


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    report = export_onnx(load_model(trained), path)
    assert [p.batch for p in report] == [1, 2, 7]
    assert all(p.error <= 1e-4 * p.scale for p in report)
    return path


def test_the_file_stands_alone(exported: Path, trained: Path, dataset: CropDataset) -> None:
    model = onnx.load(exported)
    assert model.opset_import[0].version == 20
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [p.name for p in exported.parent.iterdir()] == ["model.onnx"]
    scorer = load_scorer(exported)
    assert isinstance(scorer, OnnxScorer)
    assert dataclasses.replace(scorer.config, trained_on=None, card=None) == SMALL
    assert scorer.config == load_model(trained).config
    assert scorer.config.trained_on is not None
    assert scorer.config.card is not None
    assert scorer.notice.startswith("synthetic")
    crops = dataset.get(np.arange(5))
    assert scorer.score(crops) == pytest.approx(load_scorer(trained).score(crops), abs=1e-5)
    assert scorer.score(crops[:0]).shape == (0,)


def test_a_wrong_export_is_not_kept(tmp_path: Path, small: DTN, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is real: a model that answers differently after tracing fails it."""
    real, calls = DTN.forward, []

    def drifting(self: DTN, images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(self, images) + (0.0 if torch.compiler.is_exporting() else 0.01)

    monkeypatch.setattr(DTN, "forward", drifting)
    with pytest.raises(DtnError, match="differs from torch"):
        export_onnx(small, tmp_path / "bad.onnx")
    assert not list(tmp_path.iterdir())


def test_scoring_leaves_the_model_as_it_was(small: DTN, dataset: CropDataset) -> None:
    small.train()
    before = {k: v.clone() for k, v in small.state_dict().items()}
    first = TorchScorer(small, batch_size=2).score(dataset.get(np.arange(5)))
    assert small.training
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert first == pytest.approx(TorchScorer(small, batch_size=5).score(dataset.get(np.arange(5))), abs=1e-6)


def test_unusable_models_are_named(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_scorer(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=r"bad\.onnx: onnxruntime cannot run it here"):
        load_scorer(tmp_path / "bad.onnx")
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_scorer(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        load_scorer(tmp_path)
    torch.onnx.export(nn.Linear(2, 2), (torch.zeros(1, 2),), tmp_path / "other.onnx", dynamo=True, verbose=False)
    with pytest.raises(UsageError, match="not one written by dtn-fast export"):
        load_scorer(tmp_path / "other.onnx")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UsageError, match=r"summary\.json: damaged"):
        load_scorer(tmp_path)
    assert load_scorer(trained).name == "torch"


def test_evaluation_counts_and_agrees(exported: Path, trained: Path, dataset: CropDataset) -> None:
    torch_result, onnx_result = (evaluate(load_scorer(p), dataset) for p in (trained, exported))
    named = [r.fakes for r in torch_result.rows if not r.fakes.startswith("family ")]
    assert named == ["all", *dataset.methods]
    whole = torch_result.rows[0]
    assert (whole.frame.reals + whole.frame.fakes, whole.video.reals, whole.video.fakes) == (
        len(dataset.select("test")),
        2,
        8,
    )
    for a, b in zip(torch_result.rows, onnx_result.rows, strict=True):
        assert a.frame.auc == pytest.approx(b.frame.auc, abs=1e-9)
    assert torch_result.videos == 10
    assert "10 videos" in torch_result.note()
    text = torch_result.markdown()
    assert text.count("\n| ") == 1 + len(torch_result.rows)
    assert "**synthetic faces" in text
    with pytest.raises(UsageError, match="takes 96 pixels, the crops have 64"):
        evaluate(TorchScorer(DTN(SMALL.__class__(**{**SMALL.__dict__, "image_size": 96}))), dataset)


def test_one_class_evaluation_says_undefined(trained: Path, dataset: CropDataset) -> None:
    result = evaluate(load_scorer(trained), dataset, groups={"nothing": ()})
    header, rows = result.table()
    assert rows[0][header.index("frame AUC")] == "undefined (one class)"
