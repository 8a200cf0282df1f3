"""One job per extra, run by test_extras in an environment that has this extra alone: ``python extra_jobs.py NAME``.

The working folder has ``crops``, ``run`` and ``model.onnx``, made by the tests' own environment.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

BIN = Path(sys.executable).parent
CHECKPOINT = Path("run/generation-0")


def command(*arguments: str) -> str:
    """Output of ``dtn-fast``, which must succeed."""
    done = subprocess.run([BIN / "dtn-fast", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stdout[-500:], done.stderr[-1500:])
    return done.stdout


def core() -> None:
    from dtn_fast import DTN, DTNConfig
    from dtn_fast.runtime.load import load_scorer

    model = DTN(DTNConfig.preset("tiny")).eval()
    model.save_pretrained("saved")
    images = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        assert torch.equal(DTN.from_pretrained("saved")(images), model(images))
    assert load_scorer(Path("saved")).score(np.zeros((3, 128, 128, 3), np.uint8)).shape == (3,)


def cli() -> None:
    assert "serve" in command("--help")
    assert "torch" in command("doctor")
    config = str(CHECKPOINT / "config.json")
    command("train", "crops", "--out", "new", "--config", config, "--augment", "none", "--epochs", "1")
    assert Path("new/report.html").is_file()
    assert "AUC" in command("evaluate", "crops", "--model", "new")


def data() -> None:
    from dtn_fast.data.config import PrepareConfig, SyntheticConfig, WorkConfig
    from dtn_fast.data.crop_dataset import open_crop_dataset
    from dtn_fast.data.datasets.ffpp import read_ffpp
    from dtn_fast.data.prepare import prepare
    from dtn_fast.data.synthetic_faces import make_synthetic

    for _ in make_synthetic(Path("set"), SyntheticConfig(train=2, val=2, test=2, frames=2, seed=5), workers=1):
        pass
    for _ in prepare(read_ffpp(Path("set")), Path("own"), 64, PrepareConfig(frames=2), WorkConfig()):
        pass
    assert len(open_crop_dataset(Path("own")).labels) > 4


def export() -> None:
    from dtn_fast.export.pipeline import export as write

    assert write(CHECKPOINT, Path("model.onnx")).parity[0].error < 1e-4
    scored(Path("model.onnx"))


def mnn() -> None:
    from dtn_fast.export.pipeline import export as write

    write(CHECKPOINT, Path("model.mnn"))
    scored(Path("model.mnn"))


def scored(path: Path) -> None:
    from dtn_fast.runtime.load import load_scorer

    side = json.loads((CHECKPOINT / "config.json").read_text())["image_size"]
    assert load_scorer(path).score(np.zeros((2, side, side, 3), np.uint8)).shape == (2,)


def openvino() -> None:
    import openvino as library

    assert "CPU" in library.Core().available_devices


def serve() -> None:
    """A video gets its verdict, from a checkpoint and from an .onnx file."""
    from dtn_fast.data.video_writer import write_video

    write_video(Path("clip.mp4"), list(np.random.default_rng(0).integers(0, 255, (8, 96, 96, 3), np.uint8)))
    for model in (str(CHECKPOINT), "model.onnx"):
        with server("serve", model, "--port", "0") as address:
            assert ask(address, "clip.mp4")["frames_read"] == 8


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[str]:
    """Address of ``dtn-fast serve``."""
    with subprocess.Popen([BIN / "dtn-fast", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if " on http://" in line:
                    yield line.split(" on ")[1].split()[0]
                    break
            else:
                raise AssertionError("the server ended without an address")
        finally:
            process.terminate()


def ask(address: str, file: str) -> dict:
    """Verdict on a file."""
    request = urllib.request.Request(f"{address}/v1/detect?name={file}", Path(file).read_bytes(), method="PUT")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def timm() -> None:
    from dtn_fast.model import timm_registry
    from dtn_fast.model.timm_compat import import_timm

    assert timm_registry
    assert import_timm().create_model("dtn_tiny")(torch.rand(1, 3, 128, 128)).shape == (1, 2)


def heic() -> None:
    import pillow_heif
    from PIL import Image

    from dtn_fast.data.pictures import read_image

    pillow_heif.register_heif_opener()
    Image.fromarray(np.full((64, 48, 3), (200, 30, 30), np.uint8)).save("face.heic")
    pixels = read_image(Path("face.heic"))
    assert pixels.shape == (64, 48, 3)
    assert np.abs(pixels.mean((0, 1)) - (200, 30, 30)).max() < 5


def gpu() -> None:
    import triton

    assert triton.__version__


def tensorrt_rtx() -> None:
    from dtn_fast.export.config import EngineConfig
    from dtn_fast.export.pipeline import export as write

    made = write(CHECKPOINT, Path("model.rtx"), engine=EngineConfig(archs=(89,)))
    assert made.built is not None
    assert made.built.size == Path("model.rtx").stat().st_size


def triton_client() -> None:
    import tritonclient.grpc
    import tritonclient.http

    assert tritonclient.grpc.InferenceServerClient
    client = tritonclient.http.InferenceServerClient("127.0.0.1:1")  # nothing listens there
    started = time.monotonic()
    try:
        client.is_server_ready()
    except OSError:
        assert time.monotonic() - started < 10
    else:
        raise AssertionError("a server that is not there was ready")


def demo() -> None:
    """The demo's first steps: rendered videos, crops, a short training, an exported file, a verdict with a report."""
    command("synthesize", "set", "--seed", "5", "--train", "2", "--val", "2", "--test", "2", "--frames", "3")
    command("prepare", "set", "--out", "own", "--size", "64", "--frames", "3")
    command("export", str(CHECKPOINT), "--out", "model.onnx")
    import skimage.data

    assert skimage.data.astronaut().shape == (512, 512, 3)
    video = str(sorted(Path("set").rglob("*.mp4"))[0])
    command("detect", video, "--model", "model.onnx", "--out", "verdicts", "--frames", "4")
    assert Path("verdicts/report.html").is_file()


if __name__ == "__main__":
    globals()[sys.argv[1].replace("-", "_")]()
