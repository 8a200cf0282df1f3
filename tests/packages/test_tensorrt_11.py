"""Our TensorRT code against the bindings of TensorRT 11, which cannot be installed beside those of 10 that CI has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from packages.fresh import ROOT, clean_environment, succeed, uv

NEWEST = "tensorrt-cu13-bindings==11.4.0.106"


def test_names_arguments_and_plugins_fit_tensorrt_11(tmp_path: Path) -> None:
    succeed(uv("pip", "install", "--python", sys.executable, "--no-deps", "--target", tmp_path / "eleven", NEWEST))
    env = clean_environment(PYTHONPATH=os.pathsep.join([str(tmp_path / "eleven"), str(ROOT)]))
    tests = ("tests/export/test_tensorrt_api.py", "tests/export/test_tensorrt_plugin.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "bindings or builder_asks", *tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
