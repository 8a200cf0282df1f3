"""Engines: TensorRT-RTX's are really built here for every arch; the lines that TensorRT takes run on its module."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from small import SMALL

from dtn_fast import DTN, DTNConfig
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export import to_tensorrt
from dtn_fast.export.config import EngineConfig, OnnxConfig
from dtn_fast.export.to_onnx import to_proto, weights_hash
from dtn_fast.export.to_tensorrt import RTX_ARCHS, build, commands, export_engine, without_bodies
from dtn_fast.runtime.describe import describe
from dtn_fast.runtime.export_manifest import ExportManifest, file_hash, read_export_manifest
from dtn_fast.runtime.load import load_scorer
from dtn_fast.runtime.onnx import metadata
from dtn_fast.runtime.tensorrt import check_loadable, load_backend


@pytest.fixture(scope="module")
def tiny() -> bytes:
    torch.manual_seed(0)
    return to_proto(DTN(DTNConfig.preset("tiny")).eval(), OnnxConfig("fp16")).SerializeToString()


@pytest.fixture(scope="module")
def engine(tiny: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rtx") / "tiny.rtx"
    built = export_engine(tiny, path)
    assert built.archs == RTX_ARCHS  # one file for all
    assert built.size == path.stat().st_size
    return path


@pytest.mark.parametrize("arch", RTX_ARCHS)
def test_the_tiny_model_builds_for_every_arch(arch: int, tiny: bytes, tmp_path: Path) -> None:
    built = export_engine(tiny, tmp_path / "t.rtx", EngineConfig(archs=(arch,), batches=(1, 2, 4)))
    assert built.size > 10**6
    assert read_export_manifest(tmp_path / "t.rtx", "tensorrt_rtx").archs == (arch,)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_build_for_all_but_turing(precision: Any, tmp_path: Path) -> None:
    data = to_proto(DTN(SMALL).eval(), OnnxConfig(precision, "images")).SerializeToString()
    assert export_engine(data, tmp_path / "t.rtx").archs == (80, 86, 89, 120)
    with pytest.raises(UsageError, match=f"--archs 75: not for a model of {precision}; use --precision fp16"):
        export_engine(data, tmp_path / "n.rtx", EngineConfig(archs=(75,)))
    assert not (tmp_path / "n.rtx").exists()


def test_the_papers_model_builds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = to_proto(DTN(DTNConfig.preset("paper")).eval(), OnnxConfig("fp16")).SerializeToString()
    built = export_engine(data, tmp_path / "paper.rtx", EngineConfig(archs=(89,), batches=(1, 32, 256)))
    assert 50 < built.size / 2**20 < 100


def test_the_manifest_says_what_it_is_and_guards_the_file(engine: Path, tmp_path: Path) -> None:
    manifest = read_export_manifest(engine, "tensorrt_rtx")
    torch.manual_seed(0)
    assert manifest.weights == weights_hash(DTN(DTNConfig.preset("tiny")).eval())
    assert (manifest.precision, manifest.input, manifest.batches) == ("fp16", "crops", (1, 8, 64))
    assert manifest.detector_config() == DTNConfig.preset("tiny")
    assert describe(engine)["config.image_size"] == "128"
    copy = tmp_path / "copy.rtx"
    copy.write_bytes(engine.read_bytes())
    with pytest.raises(UsageError, match=r"copy\.rtx\.json: missing"):
        load_scorer(copy)
    beside = copy.with_name("copy.rtx.json")
    beside.write_bytes(engine.with_name("tiny.rtx.json").read_bytes())
    copy.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"not the file that copy\.rtx\.json describes"):
        load_scorer(copy)
    for text in ("{", "[]", '{"kind": 1}', json.dumps({**json.loads(beside.read_text()), "config": {"model": "x"}})):
        beside.write_text(text)
        with pytest.raises(UsageError, match=r"copy\.rtx\.json.*: not a valid (ExportManifest|DTNConfig)"):
            load_scorer(copy)
    with pytest.raises(UsageError, match="no such file"):
        describe(tmp_path / "none.rtx")


def test_an_engine_that_does_not_fit_this_machine_is_named(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_export_manifest(engine, "tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs an NVIDIA GPU and torch sees none"):
        load_scorer(engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(UsageError, match=r"built for compute capability 7\.5, 8\.0, .*\(NVIDIA H200\) has 9\.0"):
        check_loadable(manifest, manifest.version, "e")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    check_loadable(manifest, manifest.version, "e")
    with pytest.raises(UsageError, match=f"built by tensorrt_rtx {manifest.version}, installed is 9.9"):
        check_loadable(manifest, "9.9", "e")
    check_loadable(replace(manifest, options={"version_compatible": True}), "9.9", "e")
    with pytest.raises(UsageError, match="built for NVIDIA L4, this is NVIDIA H200"):
        check_loadable(replace(manifest, options={"gpu": "NVIDIA L4", "hardware": "this"}), manifest.version, "e")
    check_loadable(replace(manifest, options={"gpu": "NVIDIA L4", "hardware": "same"}), manifest.version, "e")


def test_what_cannot_be_asked_is_refused(tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "t.rtx"
    for config, words in (
        (EngineConfig(archs=(90,)), "--archs 90: TensorRT-RTX compiles for 75, 80"),
        (EngineConfig(attention="plugin"), "--attention: not for a .rtx file; TensorRT-RTX has no such option"),
        (EngineConfig(refit=True), "--refit: not for a .rtx file"),
        (EngineConfig(hardware="same"), "--hardware: not for a .rtx file"),
    ):
        with pytest.raises(UsageError, match=words):
            export_engine(tiny, out, config)
    for words, fields in ((r"--batches 4 2 8", {"batches": (4, 2, 8)}), ("--effort 9", {"effort": 9})):
        with pytest.raises(UsageError, match=words):
            EngineConfig(**fields)
    with pytest.raises(UsageError, match="not an ONNX file"):
        export_engine(b"nonsense", out)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UsageError, match=r"tensorrt is not installed; run: pip install 'dtn-fast\[tensorrt\]'"):
        export_engine(tiny, tmp_path / "t.engine")
    assert not list(tmp_path.iterdir())


def test_the_librarys_own_words_reach_the_user(tiny: bytes, tmp_path: Path) -> None:
    broken = onnx.load_model_from_string(tiny)
    broken.graph.node[4].op_type = "NoSuchOperator"
    with pytest.raises(DtnError, match=r"cannot read this model: NoSuchOperator .*: .*Plugin not found"):
        export_engine(broken.SerializeToString(), tmp_path / "t.rtx")


def test_plugins_leave_the_parser_one_way(tiny: bytes, tmp_path: Path) -> None:
    """Without their bodies the nodes are unknown to a parser that has no plugins: none is replaced in silence."""
    bare = onnx.load_model_from_string(without_bodies(tiny))
    assert {node.op_type for node in bare.graph.node if node.domain == "dtn"} == {"MASAttention", "MoEGate"}
    assert not bare.functions
    with pytest.raises(DtnError, match=r"cannot read this model: .*MoEGate.*(Plugin not found|imports IPluginV3)"):
        export_engine(bare.SerializeToString(), tmp_path / "t.rtx")
    plain = to_proto(DTN(SMALL).eval(), OnnxConfig("fp16", nodes=False)).SerializeToString()
    with pytest.raises(UsageError, match="has no dtn:: nodes"):
        without_bodies(plain)


@pytest.mark.parametrize("hardware", ["this", "same", "ampere+"])
def test_tensorrts_own_lines_run(hardware: Any, tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, profiles and the timing cache of a .engine, on the module of TensorRT-RTX, whose interface is the same."""
    monkeypatch.setattr(to_tensorrt, "_gpu_slug", lambda: "some-gpu")
    monkeypatch.setattr(to_tensorrt, "CACHE", tmp_path)
    data, layers = build(load_backend("tensorrt_rtx"), tiny, "crops", EngineConfig(hardware=hardware), rtx=False)
    assert len(data) > 10**6
    assert layers > 50
    (cache,) = tmp_path.iterdir()
    assert cache.name.startswith("some-gpu-tensorrt-")
    assert cache.suffix == ".timing"
    again, _ = build(load_backend("tensorrt_rtx"), tiny, "crops", EngineConfig(hardware=hardware), rtx=False)
    assert len(again) == len(data)  # with the cache that the first build left


TRTEXEC = {
    "--onnx", "--saveEngine", "--minShapes", "--optShapes", "--maxShapes", "--builderOptimizationLevel",
    "--hardwareCompatibilityLevel", "--versionCompatible", "--refit", "--stronglyTyped", "--useCudaGraph",
}  # fmt: skip
"""Flags in the help of trtexec (samples/common/sampleOptions.cpp of NVIDIA/TensorRT, as of version 11)."""
TENSORRT_RTX = {*TRTEXEC, "--computeCapabilities", "--skipInference"}
"""Flags of the same tool for TensorRT-RTX, as its documentation names them."""


@pytest.mark.parametrize("suffix", [".engine", ".rtx"])
def test_nvidias_own_commands_have_known_flags(suffix: str, tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a model.onnx"
    path.write_bytes(tiny)
    config = EngineConfig((2, 4, 8), hardware="ampere+", version_compatible=True, refit=True, effort=5, archs=(80, 120))
    words, others = map(shlex.split, commands(path, path.with_suffix(suffix), metadata(path), config))
    given = dict(word.partition("=")[::2] for word in words[1:])
    assert given.keys() <= (TENSORRT_RTX if suffix == ".rtx" else TRTEXEC)
    assert [given[f"--{kind}Shapes"] for kind in ("min", "opt", "max")] == [f"crops:{n}x128x128x3" for n in (2, 4, 8)]
    assert (given["--onnx"], given["--builderOptimizationLevel"]) == (str(path), "5")
    assert "crops:[4,128,128,3]" in others
    if suffix == ".rtx":
        assert given["--computeCapabilities"] == "80,120"
        assert others[-5:-2] == ["--compute-capabilities", "8.0", "12.0"]
    else:
        assert given["--hardwareCompatibilityLevel"] == "ampere+"
        assert {"--versionCompatible", "--refit", "--stronglyTyped"} <= given.keys()


@pytest.mark.parametrize("suffix", [".engine", ".rtx"])
def test_polygraphy_takes_its_command(suffix: str, tiny: bytes, tmp_path: Path) -> None:
    """For TensorRT-RTX it builds the engine; for TensorRT, which is not here, it writes the script that would."""
    pytest.importorskip("polygraphy")
    path = tmp_path / "t.onnx"
    path.write_bytes(tiny)
    config = EngineConfig(hardware="ampere+", version_compatible=True, refit=True, archs=(89,))
    command = commands(path, path.with_suffix(suffix), metadata(path), config)[1] + " --gen-script -" * (
        suffix != ".rtx"
    )
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if suffix == ".rtx":
        assert (tmp_path / "t.rtx").stat().st_size > 10**6
        return
    for words in ("min=[1, 128, 128, 3], opt=[8, 128, 128, 3], max=[64, 128, 128, 3]", "strongly_typed=True",
                  "AMPERE_PLUS", "version_compatible=True", "refittable=True", "OnnxrtRunner"):  # fmt: skip
        assert words in done.stdout


def test_hash_and_manifest_are_of_the_file(engine: Path) -> None:
    manifest = read_export_manifest(engine, "tensorrt_rtx")
    assert isinstance(manifest, ExportManifest)
    assert manifest.sha256 == file_hash(engine)
    with pytest.raises(UsageError, match="built by tensorrt_rtx, not tensorrt"):
        read_export_manifest(engine, "tensorrt")


@pytest.mark.gpu
def test_an_rtx_engine_runs_where_its_arch_is(engine: Path) -> None:
    """Whether it runs on Hopper is not known: there the error must name the capability."""
    from dtn_fast.export.verify import compare
    from dtn_fast.runtime.config import Runtime
    from dtn_fast.runtime.torch_scorer import TorchScorer

    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in RTX_ARCHS:
        with pytest.raises(UsageError, match="built for compute capability"):
            load_scorer(engine)
        return
    torch.manual_seed(0)
    model = DTN(DTNConfig.preset("tiny")).eval()
    crops = torch.randint(256, (9, 128, 128, 3), dtype=torch.uint8).numpy()
    assert compare(TorchScorer(model, runtime=Runtime("cpu")), load_scorer(engine), crops).worst_logit < 2e-2
