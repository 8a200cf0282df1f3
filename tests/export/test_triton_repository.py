"""The model repository of Triton Inference Server: against the published schema, and its decoder really run."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import pytest
from google.protobuf import text_format
from PIL import Image
from small import SMALL
from tritonclient.grpc import model_config_pb2

from dtn_fast import DTN
from dtn_fast.data.faces import resize_square
from dtn_fast.errors import UsageError
from dtn_fast.export.config import OnnxConfig, RepositoryConfig
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.export.triton_repository import write_repository
from dtn_fast.runtime import load_scorer
from dtn_fast.runtime.export_manifest import ExportManifest, file_hash


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "dtn.onnx"
    export_onnx(DTN(SMALL).eval(), path)
    return path


def config_of(folder: Path) -> Any:
    """Parsed by the schema: unknown fields, wrong types and enums raise."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_every_config_is_of_the_published_schema(onnx: Path, tmp_path: Path) -> None:
    made = write_repository(onnx, tmp_path, RepositoryConfig("faces", 32, 500, 2))
    assert (tmp_path / "faces" / "1" / "model.onnx").read_bytes() == onnx.read_bytes()
    assert all(path.is_file() for path in made)
    model, decoder, ensemble = (config_of(tmp_path / name) for name in ("faces", "faces_decode", "faces_encoded"))
    assert (model.name, model.backend, model.max_batch_size) == ("faces", "onnxruntime", 32)
    (crops,) = model.input
    assert (crops.name, list(crops.dims), crops.data_type) == ("crops", [64, 64, 3], model_config_pb2.TYPE_UINT8)
    assert {o.name: list(o.dims) for o in model.output} == {"logits": [2], "score": [1]}
    assert model.output[1].HasField("reshape")
    assert list(model.output[1].reshape.shape) == []  # the file's score has no dimension but the batch
    assert model.dynamic_batching.max_queue_delay_microseconds == 500
    assert model.instance_group[0].count == 2
    assert [w.batch_size for w in model.model_warmup] == [1, 32]
    assert all(w.inputs["crops"].zero_data for w in model.model_warmup)
    assert json.loads(model.parameters["dtn_config"].string_value)["image_size"] == 64
    assert decoder.backend == "python"
    first, second = ensemble.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == ("faces_decode", "faces")
    assert second.input_map["crops"] == first.output_map["crops"]
    assert {decoder.max_batch_size, ensemble.max_batch_size} == {32}
    assert [o.name for o in ensemble.output] == ["logits", "score"]
    with pytest.raises(text_format.ParseError):  # the check can fail
        text_format.Parse("max_batch: 3", model_config_pb2.ModelConfig())


def test_an_engine_is_served_as_a_plan(tmp_path: Path) -> None:
    engine = tmp_path / "dtn.engine"
    engine.write_bytes(b"engine")
    config = json.loads(SMALL.to_json())
    ExportManifest("tensorrt", "10.16", file_hash(engine), "w" * 64, "fp16", "crops", config, "a \"notice\"",
             (1, 8, 16)).write(engine)  # fmt: skip
    write_repository(engine, tmp_path / "out", RepositoryConfig(max_batch=16))
    model = config_of(tmp_path / "out" / "dtn")
    assert (model.platform, model.optimization.cuda.graphs) == ("tensorrt_plan", True)
    assert model.parameters["notice"].string_value == 'a "notice"'
    assert (tmp_path / "out" / "dtn" / "1" / "model.plan").read_bytes() == b"engine"
    with pytest.raises(UsageError, match="built for batches of 1 to 16; the server wants 1 to 64"):
        write_repository(engine, tmp_path / "out")


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    export_onnx(DTN(SMALL).eval(), tmp_path / "n.onnx", OnnxConfig(input="images"))
    with pytest.raises(UsageError, match="takes normalised images; export it with --input crops"):
        write_repository(tmp_path / "n.onnx", tmp_path / "out")
    with pytest.raises(UsageError, match=r"the server takes \.onnx and \.engine"):
        write_repository(tmp_path / "n.mnn", tmp_path / "out")
    with pytest.raises(UsageError, match="no such file"):
        write_repository(tmp_path / "none.onnx", tmp_path / "out")
    for file, backend, takes in (("n.onnx", "tensorrt", "an .engine"), ("n.engine", "python", "an .onnx")):
        with pytest.raises(UsageError, match=f"--backend {backend}: does not run .*{file}; it takes {takes} file"):
            write_repository(tmp_path / file, tmp_path / "out", RepositoryConfig(backend=backend))
    with pytest.raises(UsageError, match="--provider cuda: for --backend python alone"):
        RepositoryConfig(provider="cuda")
    for fields in ({"name": "../x"}, {"max_batch": 0}, {"delay_us": -1}):
        with pytest.raises(UsageError, match="--"):
            RepositoryConfig(**fields)
    assert not (tmp_path / "out").exists()


def test_the_python_backend_and_back_again(onnx: Path, tmp_path: Path) -> None:
    """A repository written over another of the same name leaves none of the other's files."""
    write_repository(onnx, tmp_path, RepositoryConfig(backend="python", cpu_threads=3, provider="tensorrt"))
    model = config_of(tmp_path / "dtn")
    assert (model.backend, model.optimization.cuda.graphs) == ("python", False)
    given = {key: model.parameters[key].string_value for key in ("intra_op_thread_count", "provider", "optimise")}
    assert given == {"intra_op_thread_count": "3", "provider": "tensorrt", "optimise": "yes"}
    assert {path.name for path in (tmp_path / "dtn" / "1").iterdir()} == {"model.onnx", "model.py"}
    write_repository(onnx, tmp_path, RepositoryConfig(cpu_threads=2))
    assert config_of(tmp_path / "dtn").parameters["intra_op_thread_count"].string_value == "2"
    assert {path.name for path in (tmp_path / "dtn" / "1").iterdir()} == {"model.onnx"}


def test_a_graph_that_must_not_be_rewritten_is_not(onnx: Path, tmp_path: Path) -> None:
    """onnxruntime's rewriting changes the logits of FP8, and of INT8 with fp16, by tenths."""
    model = onnx_package.load(onnx)
    model.metadata_props.add(key="quantized", value="fp8")
    onnx_package.save(model, tmp_path / "fp8.onnx")
    for backend in ("onnxruntime", "python"):
        for file, left_alone in ((onnx, False), (tmp_path / "fp8.onnx", True)):
            write_repository(file, tmp_path, RepositoryConfig(backend=backend))
            config = config_of(tmp_path / "dtn")
            if backend == "python":
                assert config.parameters["optimise"].string_value == ("no" if left_alone else "yes")
            else:
                assert config.optimization.graph.level == (2 if left_alone else 0)


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values

    def as_numpy(self) -> np.ndarray:
        return self.values


def code_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model in a file for the Python backend, with a stand-in for the backend's own module."""
    stand_in = types.ModuleType("triton_python_backend_utils")
    stand_in.Tensor = Tensor
    stand_in.TritonError = str
    stand_in.InferenceResponse = lambda output_tensors, error=None: (output_tensors, error)
    stand_in.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    spec = importlib.util.spec_from_file_location("model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()


def started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model of the Python backend in a repository, initialised from its configuration."""
    config = config_of(folder)
    parameters = {key: {"string_value": value.string_value} for key, value in config.parameters.items()}
    args = {"model_config": json.dumps({"parameters": parameters, "output": [{"name": o.name} for o in config.output]}),
            "model_repository": str(folder), "model_version": "1", "model_instance_kind": "CPU",
            "model_instance_device_id": "0"}  # fmt: skip
    model = code_of(folder / "1" / "model.py", monkeypatch)
    model.initialize(args)
    return model


def test_the_python_model_answers_each_request_by_itself(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(onnx, tmp_path, RepositoryConfig(backend="python"))
    model, local = started(tmp_path / "dtn", monkeypatch), load_scorer(onnx)
    parts = np.split(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8), [1, 4])
    answers = model.execute([{"crops": Tensor("crops", part)} for part in parts])
    for part, ((logits, score), error) in zip(parts, answers, strict=True):
        assert error is None
        assert [logits.name, score.name] == ["logits", "score"]
        assert logits.values == pytest.approx(local.logits(part), abs=1e-5)
        assert score.values == pytest.approx(local.score(part), abs=1e-6)
    found = [np.ones((6, 2), np.float32), np.ones(6, np.float32)]
    found[0][2, 1] = np.inf
    monkeypatch.setattr(model, "session", types.SimpleNamespace(run=lambda names, feed: found))
    answers = model.execute([{"crops": Tensor("crops", part)} for part in parts])
    assert [error is None for _, error in answers] == [True, False, True]
    assert "outputs of 1 of 3 crops are not finite" in answers[1][1]


def test_the_decoder_decodes(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(onnx, tmp_path)
    model = started(tmp_path / "dtn_decode", monkeypatch)
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)

    def encoded(*images: np.ndarray) -> dict[str, Tensor]:
        files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            files.append([file.getvalue()])
        return {"encoded": Tensor("encoded", np.array(files, object))}

    bad = {"encoded": Tensor("encoded", np.array([[b"no picture"]], object))}
    good, broken, large = model.execute(
        [encoded(picture, picture[:64, :64]), bad, encoded(np.zeros((8100, 8000, 3), np.uint8))]
    )
    (crops,), error = good
    assert error is None
    assert crops.values.dtype == np.uint8
    assert np.array_equal(crops.values, np.stack([resize_square(picture, 64), picture[:64, :64]]))
    for answer in (broken, large):
        assert answer[0] == []
        assert "send an encoded face crop" in answer[1]
