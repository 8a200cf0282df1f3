"""The mask as an output of exported files: equal to torch's, in INT8, beside novelty, in a server's repository."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small import SMALL

from dtn_fast import DTN
from dtn_fast.errors import DtnError
from dtn_fast.export.config import OnnxConfig, QuantizeConfig, RepositoryConfig
from dtn_fast.export.quantize import layers, quantize
from dtn_fast.export.to_mnn import export_mnn
from dtn_fast.export.to_onnx import check, export_onnx, to_proto
from dtn_fast.export.triton_repository import write_repository
from dtn_fast.export.verify import verify
from dtn_fast.model.card import Calibration, Card, Level, OperatingPoint
from dtn_fast.model.novelty import Novelty
from dtn_fast.runtime.load import load_scorer
from dtn_fast.runtime.onnx import OnnxScorer
from dtn_fast.runtime.torch_scorer import TorchScorer

CROPS = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def masked() -> DTN:
    """A model whose logits and masks differ from crop to crop."""
    torch.manual_seed(0)
    model = DTN(dataclasses.replace(SMALL, mask_head=True)).train()
    for _ in range(3):
        model(torch.randn(8, 3, 64, 64))
    assert model.mask_head is not None
    with torch.no_grad():
        model.head.weight.mul_(30)
        model.mask_head.out.weight.mul_(100)
    return model.eval()


@pytest.mark.parametrize("nodes", [False, True])
def test_an_onnx_file_gives_torch_s_masks(masked: DTN, tmp_path: Path, nodes: bool) -> None:
    export_onnx(masked, tmp_path / "m.onnx", OnnxConfig(nodes=nodes))
    scorer, wanted = load_scorer(tmp_path / "m.onnx"), TorchScorer(masked).judge(CROPS)
    found = scorer.judge(CROPS)
    assert wanted.mask is not None
    assert wanted.mask.std() > 0.05
    np.testing.assert_allclose(found.mask, wanted.mask, atol=1e-4)
    np.testing.assert_allclose(found.score, wanted.score, atol=1e-5)
    assert scorer.outputs(CROPS).shape == (9, 2)
    masked.save_pretrained(tmp_path / "checkpoint")
    agreement = verify(tmp_path / "checkpoint", tmp_path / "m.onnx").agreement
    assert agreement.worst_mask is not None
    assert agreement.worst_mask < 1e-4


def test_a_file_whose_masks_differ_is_not_written(masked: DTN) -> None:
    proto = to_proto(masked, OnnxConfig())
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith("mask_head.out.bias"))
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + 1).tobytes()
    with pytest.raises(DtnError, match="onnxruntime differs from torch"):
        check(masked, proto, OnnxConfig(), "m.onnx")


def test_novelty_and_mask_travel_together(masked: DTN, tmp_path: Path) -> None:
    level = Level(1, 20, 20, 0.8, 0.2, 0.05, 0.1, 0.1, 0.01, 0.02, 0.1, 0.1, (), (), (OperatingPoint(0.01, None),),
                  ((0.1, 1.0, 1.0),), 2.0)  # fmt: skip
    card = Card("c", "f", False, (), (), "dlib", "", (), 0.9, (0.85, 0.95), "1", "c",
                Calibration("c", "f", "", (), 2.0, level, level))  # fmt: skip
    model = DTN(dataclasses.replace(masked.config, card=card)).eval()
    model.load_state_dict(masked.state_dict())
    model.novelty = Novelty(torch.zeros(64), torch.eye(64))
    export_onnx(model, tmp_path / "m.onnx")
    wanted, found = TorchScorer(model).judge(CROPS), load_scorer(tmp_path / "m.onnx").judge(CROPS)
    for name in ("score", "novelty", "mask"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-4)
    write_repository(tmp_path / "m.onnx", tmp_path / "models", RepositoryConfig("m"))
    text = (tmp_path / "models/m/config.pbtxt").read_text()
    assert 'name: "mask" data_type: TYPE_FP32 dims: [ 8, 8 ]' in text
    assert 'name: "novelty"' in text


def test_int8_leaves_the_head_as_it_is_and_gives_near_masks(masked: DTN) -> None:
    proto = to_proto(masked, OnnxConfig())
    assert not [layer.name for layer in layers(proto) if "mask_head" in layer.name]
    made = quantize(proto, CROPS, QuantizeConfig("int8", "int8"))
    wanted, found = TorchScorer(masked).judge(CROPS).mask, OnnxScorer(made.SerializeToString()).judge(CROPS).mask
    assert wanted is not None
    assert found is not None
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.95


def test_an_mnn_file_gives_torch_s_masks(masked: DTN, tmp_path: Path) -> None:
    pytest.importorskip("MNN")
    export_mnn(masked, tmp_path / "m.mnn")
    found = load_scorer(tmp_path / "m.mnn").judge(CROPS).mask
    np.testing.assert_allclose(found, TorchScorer(masked).judge(CROPS).mask, atol=1e-4)


def test_a_file_without_the_mask_that_it_states_is_named(masked: DTN) -> None:
    proto = to_proto(masked, OnnxConfig())
    (place,) = (n for n, output in enumerate(proto.graph.output) if output.name == "mask")
    del proto.graph.output[place]
    with pytest.raises(DtnError, match="gives 2 values for a crop, its configuration states 2 logits, a mask of 8x8"):
        OnnxScorer(proto.SerializeToString()).judge(CROPS)
