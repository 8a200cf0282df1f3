"""Copies of the checkout, and commands in environments that inherit nothing from this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


def tracked(root: Path = ROOT) -> list[Path]:
    """The checkout's files, relative to it, without those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(name) for name in names if (root / name).exists()]


def copy_tree(names: list[Path], out: Path) -> None:
    """Copies files of the checkout into ``out``; symbolic links stay links."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name, follow_symlinks=False)


def clean_environment(**more: str) -> dict[str, str]:
    """Environment variables without those of Python and of this project, with pip's own index for uv."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "DTN_", "COV_"))}
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    links = kept.get("PIP_FIND_LINKS") or subprocess.run(asked, capture_output=True, text=True).stdout
    return {**kept, "UV_FIND_LINKS": ",".join(links.split()), "OMP_NUM_THREADS": "1", **more}


def uv(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs uv; a failure is the caller's to judge."""
    found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, "uv is not installed; pip install -c constraints.txt -e '.[dev]'"
    return subprocess.run(
        [found, *map(str, arguments)], env=clean_environment(**more), capture_output=True, text=True, cwd=ROOT
    )


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a command that must have succeeded."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
