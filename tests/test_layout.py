"""The package's shape: importing is light, the wheel is whole and lands nowhere else (import-linter holds the rest)."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from dtn_fast.packages import EXTRAS

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "train", "export", "bench")
HEAVY = (
    "triton",
    "tensorrt",
    "tensorrt_rtx",
    "dlib",
    "timm",
    "albumentations",
    "av",
    "tyro",
    "rich",
    "onnx",
    "skimage",
)


def test_the_four_folders_are_symlinks_of_one_package() -> None:
    for folder in FOLDERS:
        link = ROOT / "dtn_fast" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder


def test_import_is_light() -> None:
    code = f"import dtn_fast, sys; print([m for m in {HEAVY!r} if m in sys.modules], dtn_fast.__version__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] ")


@pytest.mark.parametrize(
    "module",
    [
        "kernels.ops",
        "model.dtn",
        "train.losses",
        "evaluation.metrics",
        "runtime.load",
        "train.loop",
        "evaluation.evaluate",
    ],
)
def test_core_imports_on_a_machine_with_torch_alone(module: str) -> None:
    """The model and the training step import without the command line's, the data's and the export's packages."""
    block = "import sys\nfor m in " + repr(HEAVY) + ": sys.modules[m] = None\n"
    subprocess.run([sys.executable, "-c", f"{block}import dtn_fast.{module}"], cwd=ROOT, check=True)


def test_wheel_holds_all_folders_and_nothing_generic(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(command, cwd=tmp_path / "tree", check=True)
    (wheel,) = tmp_path.glob("dtn_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dtn_fast"}
    for member in (
        "kernels/ops.py",
        "train/loop.py",
        "export/to_onnx.py",
        "data/crop_dataset.py",
        "detect/report.html",
    ):
        assert f"dtn_fast/{member}" in names
    assert any(name.startswith("dtn_fast/bench/") for name in names)


def test_each_optional_package_is_installed_by_the_extra_that_its_error_names() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = importlib.metadata.packages_distributions()
    plain = lambda name: re.split(r"[^\w.-]", name)[0].lower().replace("_", "-")
    for extra, modules in EXTRAS.items():
        installed = {plain(requirement) for requirement in listed[extra]}
        for module in modules:
            if module not in distributions and importlib.util.find_spec(module) is None:
                continue  # not installed here, so that nothing tells which distribution holds it
            names = {module, f"{module}-bin", *distributions.get(module, ())}
            assert {plain(name) for name in names} & installed, f"{module}: not in the extra {extra}"


def test_each_required_package_has_an_extra_or_a_command_of_its_own() -> None:
    known = {module for modules in EXTRAS.values() for module in modules}
    calls = 0
    for path in (path for folder in ("dtn_fast", *FOLDERS) for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                match node.args:
                    case [ast.Constant(value=str(module))]:
                        assert module.partition(".")[0] in known, f"{path}: {module} is in no extra of EXTRAS"
                        calls += 1
                    case [ast.Constant(value=str(module)), ast.Constant()]:
                        assert module.partition(".")[0] not in known, f"{path}: {module} has an extra; name no package"
    assert calls > 20
