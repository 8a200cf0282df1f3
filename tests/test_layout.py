"""The package's shape: imports fall one way, importing is light, the wheel is whole and lands nowhere else."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "train", "export", "bench")
ROOF = {"cli", "deploy", "experiments", "demo", "__main__"}  # may import everything
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


def floor(module: str) -> int:
    """Height of a dotted module: kernels 0, dtn_fast 1, train, export and bench 2, the command line 3."""
    parts = module.split(".")
    if parts[0] != "dtn_fast":
        return -1
    second = parts[1] if len(parts) > 1 else ""
    return 3 if second in ROOF else {"kernels": 0, "train": 2, "export": 2, "bench": 2}.get(second, 1)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                continue  # relative imports stay inside their folder
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("dtn_fast.")}


def test_imports_fall_one_way() -> None:
    wrong = []
    for path in sorted(ROOT.glob("dtn_fast/**/*.py")) + [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py"))]:
        relative = path.relative_to(ROOT)
        own = ".".join(("dtn_fast", *relative.with_suffix("").parts)).replace("dtn_fast.dtn_fast", "dtn_fast")
        for name in imports(path):
            if floor(name) > floor(own):
                wrong.append(f"{relative} imports {name}")
    assert not wrong
    assert (
        floor("dtn_fast.kernels.ops") < floor("dtn_fast.dtn") < floor("dtn_fast.train.engine") < floor("dtn_fast.cli")
    )


def test_the_four_folders_are_symlinks_of_one_package() -> None:
    for folder in FOLDERS:
        link = ROOT / "dtn_fast" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder
        assert not (ROOT / folder / "__init__.py").exists()


def test_import_is_light() -> None:
    code = f"import dtn_fast, sys; print([m for m in {HEAVY!r} if m in sys.modules], dtn_fast.__version__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] ")


@pytest.mark.parametrize("module", ["kernels.ops", "dtn", "losses", "metrics", "runtime", "train.engine", "evaluate"])
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
    for member in ("kernels/ops.py", "train/engine.py", "export/to_onnx.py", "data/shards.py", "report.html"):
        assert f"dtn_fast/{member}" in names
    assert any(name.startswith("dtn_fast/bench/") for name in names)
