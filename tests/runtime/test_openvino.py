"""ONNX files through OpenVINO against onnxruntime, and the number of threads of every runtime."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dtn_fast import DTN, device
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.evaluate import evaluate
from dtn_fast.export.config import OnnxConfig, QuantizeConfig
from dtn_fast.export.quantize import quantize
from dtn_fast.export.to_mnn import export_mnn
from dtn_fast.export.to_onnx import export_onnx, to_proto
from dtn_fast.export.verify import verify
from dtn_fast.runtime import Runtime, load_scorer
from dtn_fast.runtime.load import load_model
from dtn_fast.runtime.mnn import package

OPENVINO = Runtime(runtime="openvino")


def test_answers_as_onnxruntime_from_many_threads(exported: Path, dataset: CropDataset) -> None:
    scorer = load_scorer(exported, OPENVINO)
    assert scorer.name == "OpenVINO"
    assert scorer.notice.startswith("synthetic faces")
    crops = dataset.get(np.arange(9))
    expected = load_scorer(exported).outputs(crops)
    assert np.abs(scorer.outputs(crops) - expected).max() < 1e-5
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: scorer.outputs(crops[i : i + 1 + i % 3]), range(9)))
    for i, part in enumerate(parts):
        assert np.abs(part - expected[i : i + 1 + i % 3]).max() < 1e-5
    whole = evaluate(scorer, dataset).rows[0].frame.auc
    assert whole == pytest.approx(evaluate(load_scorer(exported), dataset).rows[0].frame.auc, abs=1e-9)


@pytest.mark.parametrize(("kind", "nodes"), [("images", True), ("crops", False)])
def test_every_flavour_runs(kind: Any, nodes: bool, small: DTN, dataset: CropDataset, tmp_path: Path) -> None:
    export_onnx(small, tmp_path / "m.onnx", OnnxConfig("fp16", kind, nodes))
    crops = dataset.get(np.arange(4))
    gap = load_scorer(tmp_path / "m.onnx", OPENVINO).outputs(crops) - load_scorer(tmp_path / "m.onnx").outputs(crops)
    assert np.abs(gap).max() < 1e-3


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_int8_is_as_near_to_float32_as_in_onnxruntime(
    target: Literal["cpu", "gpu"], trained: Path, exported: Path, dataset: CropDataset, tmp_path: Path
) -> None:
    proto = to_proto(load_model(trained), OnnxConfig())
    train, crops = (dataset.get(dataset.select(split)) for split in ("train", "test"))
    made = quantize(proto, train, QuantizeConfig("int8", "int8", target))
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    scorer = load_scorer(tmp_path / "m.onnx", OPENVINO)
    assert precisions(scorer, "Convolution") & {"u8", "i8"}, "in INT8, not as rounded float32"
    exact, expected = load_scorer(exported).logits(crops), load_scorer(tmp_path / "m.onnx").logits(crops)
    got, worst = scorer.logits(crops), np.abs(expected - exact).max()
    assert np.abs(got - exact).max() < 2 * worst
    assert np.abs(got - expected).max() < worst


def precisions(scorer: Any, layer: str) -> set[str]:
    """Number formats that the compiled layers of a kind compute in."""
    nodes = scorer._request.get_compiled_model().get_runtime_model().get_ops()
    facts = [node.get_rt_info() for node in nodes]
    return {fact["runtimePrecision"].astype(str) for fact in facts if fact["layerType"].astype(str) == layer}


def test_bfloat16_is_never_used_by_itself(exported: Path) -> None:
    scorer = load_scorer(exported, OPENVINO)
    assert precisions(scorer, "Convolution") == precisions(scorer, "FullyConnected") == {"f32"}


def test_a_file_that_onnxruntime_cannot_run(small: DTN, dataset: CropDataset, tmp_path: Path) -> None:
    export_onnx(small, tmp_path / "m.onnx", OnnxConfig("bf16"))
    export_onnx(small, tmp_path / "exact.onnx")
    crops = dataset.get(np.arange(4))
    with pytest.raises(UsageError, match="onnxruntime cannot run it here"):
        load_scorer(tmp_path / "m.onnx")
    gap = load_scorer(tmp_path / "m.onnx", OPENVINO).logits(crops) - load_scorer(tmp_path / "exact.onnx").logits(crops)
    assert 0 < np.abs(gap).max() < 2e-2


def test_unusable_files_and_options_are_named(exported: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=r"bad\.onnx: not an ONNX file"):
        load_scorer(tmp_path / "bad.onnx", OPENVINO)
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(UsageError, match=r"other\.onnx: an ONNX file, but not one written by dtn-fast export"):
        load_scorer(tmp_path / "other.onnx", OPENVINO)
    proto = onnx.load(exported)
    proto.graph.node[-1].op_type, proto.graph.node[-1].domain = "Unheard", "nowhere"
    onnx.save(proto, tmp_path / "unheard.onnx")
    with pytest.raises(UsageError, match=r"unheard\.onnx: OpenVINO cannot run it here .*Unheard"):
        load_scorer(tmp_path / "unheard.onnx", OPENVINO)
    for path, fields, words in (
        (exported, {"runtime": "openvino", "device": "cuda"}, "--device cuda: OpenVINO runs on a CPU"),
        (exported, {"runtime": "openvino", "provider": "cuda"}, "--provider cuda: OpenVINO runs on a CPU"),
        (trained, {"runtime": "openvino"}, "--runtime openvino: not for .*, a checkpoint"),
        (tmp_path / "m.mnn", {"runtime": "openvino"}, r"--runtime openvino: not for .*, a \.mnn file"),
        (tmp_path / "m.engine", {"threads": 1}, r"--threads 1: not for .*, a \.engine file"),
    ):
        with pytest.raises(UsageError, match=words):
            load_scorer(path, Runtime(**fields))


def test_a_missing_package_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match="openvino is not installed; run: pip install 'dtn-fast\\[openvino\\]'"):
        load_scorer(exported, OPENVINO)


def test_nothing_is_reported(exported: Path) -> None:
    """OpenVINO by itself writes a number for this user into the home folder, and reports over the network."""
    load_scorer(exported, OPENVINO)
    assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]


def test_verify_compares_onnxruntime_with_openvino(exported: Path, trained: Path, crops: Path) -> None:
    for reference, name in ((exported, "onnxruntime"), (trained, "torch")):
        found = verify(reference, exported, crops, runtime=OPENVINO)
        assert found.names == (name, "OpenVINO")
        assert found.agreement.worst_logit < 1e-5
        assert found.same_weights


def test_every_runtime_keeps_to_the_threads(
    exported: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_mnn(load_model(trained), tmp_path / "m.mnn")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(6)))
    monkeypatch.setattr(device, "_cores", lambda cpus, _root: len(cpus) // 2)
    monkeypatch.setattr(device, "_cpu_quota", lambda _root: None)
    given: dict[str, int] = {}
    session, manager = onnxruntime.InferenceSession, package().nn.create_runtime_manager

    def open_session(model: Any, options: Any, **rest: Any) -> Any:
        given["onnxruntime"] = options.intra_op_num_threads
        return session(model, options, **rest)

    def make_manager(settings: Any) -> Any:
        given["MNN"] = settings[0]["numThread"]
        return manager(settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(package().nn, "create_runtime_manager", make_manager)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: given.update(torch=threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for asked, used in ((0, 3), (2, 2), (6, 6)):
        given.clear()
        runtime = Runtime(threads=asked)
        for path in (exported, trained, tmp_path / "m.mnn"):
            load_scorer(path, runtime)
        scorer: Any = load_scorer(exported, dataclasses.replace(runtime, runtime="openvino"))
        given["OpenVINO"] = scorer._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS")
        limit = os.cpu_count() or 1  # OpenVINO's own
        assert given == {"onnxruntime": used, "MNN": used, "torch": used, "OpenVINO": min(used, limit)}
    given.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    load_scorer(trained)
    assert not given, "what a program set for itself is not raised"
    for path in (exported, trained, tmp_path / "m.mnn"):
        with pytest.raises(UsageError, match="--threads 7: the CPU set of this process allows 6"):
            load_scorer(path, Runtime(threads=7))
    with pytest.raises(UsageError, match="--threads -1: must be at least 0"):
        Runtime(threads=-1)
