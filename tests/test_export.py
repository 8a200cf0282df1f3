"""ONNX against torch, the runtimes behind one callable, evaluation on both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small import SMALL
from torch import nn

from dtn_fast import DTN
from dtn_fast.data.shards import Shards
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.evaluate import evaluate
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.onnx_runtime import OnnxScorer
from dtn_fast.runtime import TorchScorer, load_model, load_scorer


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    report = export_onnx(load_model(trained), path)
    assert [p.batch for p in report] == [1, 2, 7]
    assert all(p.error <= 1e-4 * p.scale for p in report)
    return path


def test_the_file_stands_alone(exported: Path, trained: Path, shards: Shards) -> None:
    model = onnx.load(exported)
    assert model.opset_import[0].version == 20
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [p.name for p in exported.parent.iterdir()] == ["model.onnx"]
    scorer = load_scorer(exported)
    assert isinstance(scorer, OnnxScorer)
    assert scorer.config == SMALL
    assert scorer.notice.startswith("synthetic")
    crops = shards.get(np.arange(5))
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


def test_scoring_leaves_the_model_as_it_was(small: DTN, shards: Shards) -> None:
    small.train()
    before = {k: v.clone() for k, v in small.state_dict().items()}
    first = TorchScorer(small, batch_size=2).score(shards.get(np.arange(5)))
    assert small.training
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert first == pytest.approx(TorchScorer(small, batch_size=5).score(shards.get(np.arange(5))), abs=1e-6)


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


def test_evaluation_counts_and_agrees(exported: Path, trained: Path, shards: Shards) -> None:
    torch_result, onnx_result = (evaluate(load_scorer(p), shards) for p in (trained, exported))
    assert [r.fakes for r in torch_result.rows] == ["all", *shards.methods]
    whole = torch_result.rows[0]
    assert (whole.frame.reals + whole.frame.fakes, whole.video.reals, whole.video.fakes) == (
        len(shards.select("test")),
        2,
        8,
    )
    for a, b in zip(torch_result.rows, onnx_result.rows, strict=True):
        assert a.frame.auc == pytest.approx(b.frame.auc, abs=1e-9)
    assert torch_result.videos == 10
    assert "10 videos" in torch_result.policy()
    text = torch_result.markdown()
    assert text.count("\n| ") == 2 + len(shards.methods)
    assert "**synthetic faces" in text
    with pytest.raises(UsageError, match="crops are 64 pixels"):
        evaluate(TorchScorer(DTN(SMALL.__class__(**{**SMALL.__dict__, "image_size": 96}))), shards)


def test_one_class_evaluation_says_undefined(trained: Path, shards: Shards) -> None:
    result = evaluate(load_scorer(trained), shards, groups={"nothing": ()})
    header, rows = result.table()
    assert rows[0][header.index("frame AUC")] == "undefined (one class)"
