"""The small run as an ONNX file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.runtime.load import load_model


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(load_model(trained), path)
    return path
