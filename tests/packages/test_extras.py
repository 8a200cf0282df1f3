"""The wheel, the source distribution, and each extra alone in a fresh environment, used for its own job."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packages.fresh import CONSTRAINTS, ROOT, clean_environment, succeed, uv

from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.runtime.load import load_model

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NOT_RUN = {
    "dev": "this suite's own environment",
    "tensorrt": "its libraries come from the vendor's host, not the index",
}


def test_both_distributions_hold_the_same_package(built: dict[str, Path]) -> None:
    contents = []
    for wheel in (built["tree"], built["wheel"]):
        with zipfile.ZipFile(wheel) as file:
            contents.append({n: hashlib.sha256(file.read(n)).hexdigest() for n in file.namelist() if "RECORD" not in n})
    assert contents[0] == contents[1]
    for folder in ("bench", "export", "kernels", "train", "serve"):
        assert any(name.startswith(f"dtn_fast/{folder}/") for name in contents[0])
    with tarfile.open(built["sdist"]) as file:
        assert not [name for name in file.getnames() if "/tests" in name]


@pytest.fixture(scope="module")
def material(crops: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops, a run and an .onnx file of it."""
    folder = tmp_path_factory.mktemp("material")
    shutil.copytree(crops, folder / "crops")
    shutil.copytree(trained, folder / "run")
    export_onnx(load_model(trained), folder / "model.onnx")
    return folder


def beside(python: Path) -> dict[str, str]:
    """Environment variables that keep bytecode out of the environment's packages."""
    return clean_environment(PYTHONPYCACHEPREFIX=str(python.parents[2] / "bytecode"))


@pytest.mark.parametrize("extra", ["core", *sorted(EXTRAS.keys() - NOT_RUN.keys())])
def test_each_extra_alone_does_its_job(
    extra: str, environment: Callable[[str], Path], material: Path, tmp_path: Path
) -> None:
    python = environment(extra)
    work = shutil.copytree(material, tmp_path / "work")
    jobs = Path(__file__).with_name("extra_jobs.py")
    done = subprocess.run(
        [python, jobs, extra], cwd=work, env=beside(python), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


MISSING = {
    "cli": "dtn_fast.__main__.main()",
    "data": "list(dtn_fast.data.video.read_frames(pathlib.Path('clip.mp4'), 1))",
    "export": "dtn_fast.runtime.load.load_scorer(pathlib.Path('model.onnx'))",
    "mnn": "dtn_fast.runtime.mnn.package()",
    "serve": "dtn_fast.serve.app.Service(None, None)",
    "tensorrt": "dtn_fast.runtime.tensorrt.load_backend('tensorrt')",
    "tensorrt-rtx": "dtn_fast.runtime.tensorrt.load_backend('tensorrt_rtx')",
    "timm": "dtn_fast.model.timm_compat.import_timm()",
}
"""Calls that fail without an extra, each with a text that names it."""


def test_without_any_extra_each_call_names_the_extra_that_it_needs(
    environment: Callable[[str], Path], material: Path
) -> None:
    python = environment("core")
    for extra, call in MISSING.items():
        module = call.removeprefix("list(").split("(")[0].rpartition(".")[0]
        code = f"import pathlib, {module}\n{call}"
        done = subprocess.run([python, "-c", code], cwd=material, env=beside(python), capture_output=True, text=True)
        assert done.returncode, call
        assert done.stderr.splitlines()[-1].endswith(f"is not installed; run: pip install 'dtn-fast[{extra}]'"), call


PLATFORMS = {"linux": "x86_64-manylinux_2_28", "macos": "aarch64-apple-darwin", "windows": "x86_64-pc-windows-msvc"}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LEFT_OUT = {"linux": set(), "macos": {"triton", "tensorrt-rtx"}, "windows": {"triton"}}
"""Packages that a marker leaves out because they have no wheels for the platform."""
NO_WHEEL = {("macos", "3.11"): "triton-client"}
"""Extras that need a compiler: gevent, which tritonclient's HTTP client uses, has no wheel for this Python."""


def resolved(extras: set[str], platform: str, python: str) -> subprocess.CompletedProcess[str]:
    """The pinned packages of these extras on another system, wheels only; tensorrt-rtx itself is an empty shell."""
    shells = [word for name in ("tensorrt-rtx", "tensorrt-rtx-cu13") for word in ("--no-binary", name)]
    return uv(
        "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:", *shells,
        *(f"--extra={extra}" for extra in sorted(extras)), "--python-version", python,
        "--python-platform", PLATFORMS[platform], "--constraint", CONSTRAINTS, "pyproject.toml",
        MACOSX_DEPLOYMENT_TARGET="14.0", UV_FIND_LINKS="",
    )  # fmt: skip


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_wheels_exist_for_every_python_and_platform(platform: str, python: str) -> None:
    """The pinned versions of every extra resolve to wheels, without running them: README's table."""
    without = {"tensorrt", NO_WHEEL.get((platform, python), ""), "" if platform == "linux" else "dev"}
    lines = succeed(resolved(EXTRAS.keys() - without, platform, python)).splitlines()
    found = {line.split("==")[0] for line in lines}
    assert {"torch", "openvino", "mnn", "dlib-bin", "timm", "pillow-heif"} <= found
    assert {"triton", "tensorrt-rtx"} - found == LEFT_OUT[platform]
    if (platform, python) in NO_WHEEL:
        failed = resolved({NO_WHEEL[platform, python]}, platform, python)
        assert "no usable wheels" in failed.stderr, "has wheels now: README's table and NO_WHEEL are out of date"
