"""The written repository in NVIDIA's Triton Inference Server itself, asked by NVIDIA's client and by ours."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from skimage import data
from small import SMALL
from triton_server import START, TritonServer, needed

from dtn_fast import DTN
from dtn_fast.bench.run import main as bench
from dtn_fast.cli import main as cli
from dtn_fast.data.faces import resize_square
from dtn_fast.data.video_writer import write_video
from dtn_fast.detect import batch, pipeline
from dtn_fast.errors import DtnError, DtnWarning, UsageError
from dtn_fast.export.config import RepositoryConfig
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.export.triton_repository import write_repository
from dtn_fast.export.verify import verify
from dtn_fast.runtime import Runtime, load_scorer
from dtn_fast.runtime.export_manifest import ExportManifest, file_hash
from dtn_fast.runtime.triton_server import TritonScorer

pytestmark = needed
SIDE = SMALL.image_size
CLOSE = 1e-5
"""Largest difference of a logit between batches of different sizes."""


def with_other_weights(source: Path, path: Path) -> None:
    """A copy of a model whose last bias and hash of the weights are others."""
    model = onnx.load(source)
    (bias,) = [one for one in model.graph.initializer if one.name.endswith("head.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1), bias.name))
    (weights,) = [one for one in model.metadata_props if one.key == "weights"]
    weights.value = "other"
    onnx.save(model, path)


def logarithm(path: Path) -> Path:
    """A file like those of dtn-fast export, with a third output, whose logits of a white crop are infinite."""
    nodes = [
        helper.make_node("Cast", ["crops"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["white", "mean"], ["dark"]),
        helper.make_node("Log", ["dark"], ["score"]),
        helper.make_node("Identity", ["mean"], ["novelty"]),
        helper.make_node("Unsqueeze", ["score", "one"], ["column"]),
        helper.make_node("Concat", ["column", "column"], ["logits"], axis=1),
    ]
    given = helper.make_tensor_value_info("crops", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *dims])
               for name, dims in (("logits", [2]), ("score", []), ("novelty", []))]  # fmt: skip
    constants = [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
                 helper.make_tensor("one", TensorProto.INT64, [1], [1]),
                 helper.make_tensor("white", TensorProto.FLOAT, [], [255.0])]  # fmt: skip
    graph = helper.make_graph(nodes, "logarithm", [given], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    facts = {"dtn_config": SMALL.to_json(), "input": "crops", "precision": "fp32", "notice": "no model", "weights": "0"}
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    export_onnx(DTN(SMALL).eval(), folder / "first.onnx")
    with_other_weights(folder / "first.onnx", folder / "second.onnx")
    logarithm(folder / "log.onnx")
    engine = folder / "dtn.engine"
    engine.write_bytes(b"engine")
    config = json.loads(SMALL.to_json())
    ExportManifest("tensorrt", "10.16", file_hash(engine), "w", "fp16", "crops", config, "", (1, 8, 16)).write(engine)
    return folder


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that has loaded dtn_encoded, with its decoder and dtn, and log; others are in its repository."""
    folder = tmp_path_factory.mktemp("server")
    for name, file, backend in (("dtn", "first.onnx", "python"), ("log", "log.onnx", "python"),
                                ("ort", "first.onnx", "auto"), ("plan", "dtn.engine", "auto")):  # fmt: skip
        config = RepositoryConfig(name, 8, 20_000, backend=backend, cpu_threads=1 if backend == "python" else 0)
        write_repository(files / file, folder / "repository", config)
    load = [f"--load-model={name}" for name in ("dtn_encoded", "log")]
    options = ("--model-control-mode=explicit", "--disable-auto-complete-config", *load)
    with TritonServer(folder / "repository", folder / "log.txt", *options) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: TritonServer) -> Any:
    if request.param == "http":
        import tritonclient.http as api
    else:
        import tritonclient.grpc as api
    return api, api.InferenceServerClient(f"127.0.0.1:{getattr(server, request.param)}")


def ask(client: Any, model: str, name: str, values: np.ndarray, *outputs: str) -> list[np.ndarray]:
    """Outputs of a model of one request, through NVIDIA's client."""
    api, connection = client
    given = api.InferInput(name, list(values.shape), "BYTES" if values.dtype == object else "UINT8")
    given.set_data_from_numpy(values)
    answer = connection.infer(model, [given], outputs=[api.InferRequestedOutput(output) for output in outputs])
    return [answer.as_numpy(output) for output in outputs]


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def encoded(image: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def smooth(seed: int, side: int = SIDE) -> np.ndarray:
    """A picture that JPEG and WebP keep nearly as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def statistics(client: Any, model: str) -> dict[str, Any]:
    options = {"as_json": True} if "grpc" in client[0].__name__ else {}
    return client[1].get_inference_statistics(model, **options)["model_stats"][0]


# the first test: it counts what no request has asked for yet
def test_the_warm_up_ran(server: TritonServer) -> None:
    import tritonclient.http as api

    found = statistics((api, api.InferenceServerClient(f"127.0.0.1:{server.http}")), "dtn")
    assert [row["batch_size"] for row in found["batch_stats"]] == [1, 8]
    assert (found["inference_count"], found["execution_count"]) == (9, 2)


def test_numbers_and_pictures_give_the_local_answer(server: TritonServer, client: Any, files: Path) -> None:
    local = load_scorer(files / "first.onnx")
    crops = noise(5)
    logits, score = ask(client, "dtn", "crops", crops, "logits", "score")
    assert logits == pytest.approx(local.logits(crops), abs=CLOSE)
    assert score.shape == (5, 1)
    assert score[:, 0] == pytest.approx(local.score(crops), abs=CLOSE)
    large = noise(1, seed=1)[0].repeat(2, 0).repeat(2, 1)
    for kind, options, image, close in (
        ("png", {}, crops[0], CLOSE), ("png", {}, large, CLOSE), ("webp", {"lossless": True}, crops[1], CLOSE),
        ("jpeg", {"quality": 95}, smooth(2), 0.05), ("webp", {"quality": 95}, smooth(3), 0.05),
    ):  # fmt: skip
        data = encoded(image, kind, **options)
        (found,) = ask(client, "dtn_encoded", "encoded", np.array([[data]], object), "logits")
        seen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert found == pytest.approx(local.logits(resize_square(seen, SIDE)[None]), abs=close), kind
    batch = np.array([[encoded(crop, "png")] for crop in crops], object)
    (found,) = ask(client, "dtn_encoded", "encoded", batch, "logits")
    assert found == pytest.approx(logits, abs=CLOSE)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """A good picture; then nothing, no picture, half a picture, too many bytes, too many pixels."""
    good = encoded(noise(1)[0], "png")
    large = encoded(np.zeros((8100, 8000, 3), np.uint8), "png", compress_level=1)
    return [good, b"", b"no picture", good[: len(good) // 2], b"\xff\xd8" + bytes(33_000_000), large]


def test_junk_is_refused_alone_and_counted(
    server: TritonServer, client: Any, files: Path, pictures: list[bytes]
) -> None:
    """Forty pictures at a time, each fourth of them no picture."""
    from tritonclient.utils import InferenceServerException

    good, *junk = pictures
    expected = load_scorer(files / "first.onnx").logits(noise(1))
    counters = [("nv_inference_request_success", name) for name in ("dtn_encoded", "dtn", "dtn_decode")]
    before = {name: server.metric(*name) for name in counters}

    def one(place: int) -> bool:
        data = junk[place // 4 % len(junk)] if place % 4 == 0 else good
        own = client[0], client[0].InferenceServerClient(f"127.0.0.1:{port}")
        try:
            (logits,) = ask(own, "dtn_encoded", "encoded", np.array([[data]], object), "logits")
        except InferenceServerException as error:
            return "send an encoded face crop" not in str(error) and "over the limit" not in str(error)
        assert logits == pytest.approx(expected, abs=CLOSE)
        return True

    port = server.http if "http" in client[0].__name__ else server.grpc
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(40))) == [place % 4 != 0 for place in range(40)]
    after = {name: server.metric(*name) for name in before}
    assert [after[name] - before[name] for name in counters] == [30, 30, 40]
    assert server.metric("nv_inference_request_failure", "dtn_encoded") >= 10  # this version counts some twice
    with pytest.raises(InferenceServerException, match="unexpected shape for input 'crops'"):
        ask(client, "dtn", "crops", noise(1)[:, 1:], "logits")


def test_requests_of_many_share_a_batch(server: TritonServer, client: Any, files: Path) -> None:
    before, crops = statistics(client, "dtn"), noise(32, seed=4)
    counted = server.metric("nv_inference_count", "dtn")
    port = server.http if "http" in client[0].__name__ else server.grpc

    def one(place: int) -> np.ndarray:
        own = client[0], client[0].InferenceServerClient(f"127.0.0.1:{port}")
        return ask(own, "dtn", "crops", crops[place : place + 1], "logits")[0][0]

    with ThreadPoolExecutor(16) as pool:
        found = np.stack(list(pool.map(one, range(32))))
    assert found == pytest.approx(load_scorer(files / "first.onnx").logits(crops), abs=CLOSE)
    after = statistics(client, "dtn")
    inferences, executions = (int(after[f"{key}_count"]) - int(before[f"{key}_count"])
                              for key in ("inference", "execution"))  # fmt: skip
    assert inferences == 32
    assert executions < 32
    assert server.metric("nv_inference_count", "dtn") - counted == 32


def test_every_output_of_the_file_is_served(server: TritonServer, client: Any) -> None:
    from tritonclient.utils import InferenceServerException

    crops = np.stack([np.full((SIDE, SIDE, 3), value, np.uint8) for value in (1, 100)])
    logits, score, novelty = ask(client, "log", "crops", crops, "logits", "score", "novelty")
    assert novelty.tolist() == [[1.0], [100.0]]
    assert score[:, 0] == pytest.approx(np.log([254, 155]))
    assert logits == pytest.approx(score.repeat(2, 1))
    with pytest.raises(InferenceServerException, match="outputs of 1 of 2 crops are not finite"):
        ask(client, "log", "crops", crops + 155, "logits")


def test_a_request_without_an_answer_leaves_those_of_its_batch_alone(server: TritonServer) -> None:
    import tritonclient.grpc as api
    from tritonclient.utils import InferenceServerException

    connection = api, api.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    before = statistics(connection, "log")

    def one(value: int) -> float | str:
        try:
            crops = np.full((1, SIDE, SIDE, 3), value, np.uint8)
            return float(ask(connection, "log", "crops", crops, "novelty", "score")[0][0, 0])
        except InferenceServerException as error:
            return error.message()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(248, 256)))
    assert "outputs of 1 of 1 crops are not finite" in str(found[-1])
    assert found[:-1] == [float(value) for value in range(248, 255)]
    after = statistics(connection, "log")
    assert int(after["execution_count"]) - int(before["execution_count"]) < 8


def test_configs_for_other_backends_are_read_and_only_the_backend_is_missing(server: TritonServer) -> None:
    import tritonclient.http as api
    from tritonclient.utils import InferenceServerException

    client = api.InferenceServerClient(f"127.0.0.1:{server.http}")
    for name, backend in (("ort", "onnxruntime"), ("plan", "tensorrt")):
        with pytest.raises(InferenceServerException):
            client.load_model(name)
        (row,) = [row for row in client.get_model_repository_index() if row["name"] == name]
        assert row["state"] == "UNAVAILABLE"
        missing = f"unable to find backend library for backend '{backend}'"
        assert missing in row["reason"]
    config = server.repository / "ort" / "config.pbtxt"  # the check can fail
    config.write_text(config.read_text().replace("max_batch_size", "largest_batch"))
    with pytest.raises(InferenceServerException, match="failed to load 'ort', failed to poll"):
        client.load_model("ort")


@pytest.fixture(params=["http", "grpc"])
def address(request: pytest.FixtureRequest, server: TritonServer) -> str:
    return f"{request.param}://127.0.0.1:{getattr(server, request.param)}"


def test_our_client_gives_the_local_scores(address: str, files: Path) -> None:
    local, scorer = load_scorer(files / "first.onnx"), load_scorer(Path(f"{address}/dtn"))
    assert isinstance(scorer, TritonScorer)
    assert (scorer.config, scorer.notice, scorer.weights) == (local.config, local.notice, local.weights)
    assert scorer.batch_size == 8
    crops = noise(20, seed=5)
    expected = local.score(crops)
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: scorer.score(crops), range(6)):
            assert found == pytest.approx(expected, abs=1e-6)
    assert verify(files / "first.onnx", Path(address)).same_weights
    shades = np.stack([np.full((SIDE, SIDE, 3), value, np.uint8) for value in (1, 100)])
    assert load_scorer(f"{address}/log").judge(shades).novelty == pytest.approx([1, 100])
    with pytest.raises(DtnError, match="/log: outputs of 2 of 2 crops are not finite"):
        load_scorer(f"{address}/log").score(np.full((2, SIDE, SIDE, 3), 255, np.uint8))


def test_a_model_that_is_not_there_is_named_with_those_that_are(address: str) -> None:
    for name, text in (("none", "has no model 'none'"), ("dtn_decode", "not a model that dtn-fast repository wrote")):
        with pytest.raises(
            UsageError, match=f"{text}; it serves dtn, dtn_decode, dtn_encoded, log: name one, {address}"
        ):
            load_scorer(f"{address}/{name}")


def test_sweep(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep.json"
    words = ["server", address, "--concurrency", "1", "3", "--seconds", "0.3", "--max-ms", "9999", "--out", str(out)]
    assert bench([*words, "--batches", "1", "4"]) == 0
    stored = json.loads(out.read_text())
    assert stored["address"] == f"{address}/dtn"
    assert [(row["batch"], row["concurrency"]) for row in stored["rows"]] == [(1, 1), (1, 3), (4, 1), (4, 3)]
    for row in stored["rows"]:
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
        assert row["crops_per_second"] > 0
        assert 0 < row["compute"] < row["queue"] + row["compute"] <= 1.001
    assert stored["rows"][0]["crops_per_execution"] == 1
    assert stored["rows"][1]["crops_per_execution"] > 1  # joined by the server
    top = max(stored["rows"], key=lambda row: row["crops_per_second"])
    assert f"{top['crops_per_second']:.1f} crops/s at batch {top['batch']}" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--batches 9: .* takes at most 8 crops a request"):
        bench([*words, "--batches", "9"])


def test_new_weights_are_loaded_while_the_old_answer(server: TritonServer, files: Path) -> None:
    import tritonclient.http as api

    crops, gate = noise(2), server.repository / "gate"
    old, new = (load_scorer(files / name).logits(crops) for name in ("first.onnx", "second.onnx"))
    assert np.abs(old - new).min() > 100 * CLOSE
    config = RepositoryConfig("dtn", 8, 20_000, backend="python", cpu_threads=1)
    write_repository(files / "second.onnx", server.repository, config)
    code = server.repository / "dtn" / "1" / "model.py"  # a load that lasts until the test lets it go on
    wait = f"        import time\n        while not os.path.exists({str(gate)!r}):\n            time.sleep(0.01)\n"
    begin = "    def initialize(self, args):\n"
    code.write_text(code.read_text().replace(begin, begin + wait))
    client = api, api.InferenceServerClient(f"127.0.0.1:{server.http}")

    with ThreadPoolExecutor(1) as pool:
        try:
            own = lambda: api.InferenceServerClient(f"127.0.0.1:{server.http}", network_timeout=START)
            loading = pool.submit(lambda: own().load_model("dtn_encoded"))
            for _ in range(10):
                time.sleep(0.05)
                assert ask(client, "dtn", "crops", crops, "logits")[0] == pytest.approx(old, abs=CLOSE)
            assert not loading.done()
        finally:
            gate.touch()
        loading.result()
    assert ask(client, "dtn", "crops", crops, "logits")[0] == pytest.approx(new, abs=CLOSE)
    batch = np.array([[encoded(crop, "png")] for crop in crops], object)
    assert ask(client, "dtn_encoded", "encoded", batch, "logits")[0] == pytest.approx(new, abs=CLOSE)
    weights = client[1].get_model_config("dtn")["parameters"]["weights"]["string_value"]
    assert weights == "other"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    face = data.astronaut()[:256, 96:352].astype(np.float32)
    for name, lights in (("a.mp4", (0.9, 1.0)), ("b.mp4", np.linspace(0.7, 1, 6))):
        write_video(folder / name, [(face * light).astype(np.uint8) for light in lights], fps=2)
    return sorted(folder.iterdir())


def test_a_server_that_comes_back_finishes_the_video(
    server: TritonServer, address: str, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCH", 1)  # each frame is a request
    monkeypatch.setattr(server, "options", ("--model-control-mode=explicit", "--load-model=dtn"))
    scorer = load_scorer(address, Runtime(patience=START))
    restarts: list[Future[None]] = []

    def restart_once(frames: int) -> None:
        if frames == 3 and not restarts:
            server.kill()
            restarts.append(pool.submit(server.start))

    with ThreadPoolExecutor(1) as pool, pytest.warns(DtnWarning, match=f"{address}: cannot be reached"):
        found = pipeline.detect(videos[1], scorer, watch=restart_once)
    restarts[0].result()
    local = pipeline.detect(videos[1], load_scorer(server.repository / "dtn" / "1" / "model.onnx"))
    assert found.frames_read == 6
    assert [frame.score for frame in found.frames] == pytest.approx([frame.score for frame in local.frames], abs=1e-5)


def test_a_server_that_stays_away_is_named_and_what_was_done_is_kept(
    server: TritonServer, videos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    def detect_then_kill(path: Path, *args: Any, **how: Any) -> Any:
        if path == videos[1]:
            server.kill()
        return pipeline.detect(path, *args, **how)

    monkeypatch.setattr(batch, "detect", detect_then_kill)
    address, out = f"http://127.0.0.1:{server.http}", tmp_path / "out"
    words = ["detect", *map(str, videos), "--server", address, "--patience", "0.5", "--out", str(out), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["dtn-fast", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dtn-fast: error: {address}: no answer in 0.5 s of tries")
    assert line.endswith(f"1 of 2 inputs are done, in {out}")
    (kept,) = json.loads((out / "results.json").read_text())["results"]
    assert kept["path"] == str(videos[0])
    assert "1 of 2 inputs are done" in (out / "report.html").read_text()
