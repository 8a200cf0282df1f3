"""Metadata of exported model files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dtn_fast.errors import UsageError
from dtn_fast.runtime.export_manifest import read_export_manifest


def describe(path: Path) -> dict[str, str]:
    """Metadata of a model file as text, for a table.  Raises UsageError when dtn-fast export did not write it."""
    if path.suffix == ".onnx":
        from dtn_fast.runtime.onnx import metadata

        found = metadata(path)
        config = json.loads(found.pop("dtn_config"))
        return {**found, **{f"config.{k}": str(v) for k, v in config.items()}}
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    kinds = {".mnn": "mnn", ".engine": "tensorrt", ".rtx": "tensorrt_rtx"}
    if path.suffix not in kinds:
        raise UsageError(f"{path}: not an .onnx, .mnn, .engine or .rtx file")
    fields = dataclasses.asdict(read_export_manifest(path, kinds[path.suffix]))
    nested = {f"{k}.{name}": v for k in ("config", "options") for name, v in fields.pop(k).items()}
    return {k: str(v) for k, v in {**fields, **nested}.items()}
