"""Metadata of exported model files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtn_fast.errors import UsageError
from dtn_fast.runtime.export_manifest import read_export_manifest
from dtn_fast.runtime.load import best_checkpoint, load_model


def describe(path: Path) -> dict[str, str]:
    """Metadata of a model file, run or checkpoint folder as text, for a table.  Raises UsageError when dtn-fast did not
    write it."""
    if path.is_dir():
        model = load_model(path)
        sizes = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}", "notice": model.notice}
        return {"checkpoint": str(best_checkpoint(path)), **sizes, **_rows("config", dataclasses.asdict(model.config))}
    if path.suffix == ".onnx":
        from dtn_fast.runtime.onnx import metadata

        found = metadata(path)
        config = json.loads(found.pop("dtn_config"))
        return {**found, **_rows("config", config)}
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    kinds = {".mnn": "mnn", ".engine": "tensorrt", ".rtx": "tensorrt_rtx"}
    if path.suffix not in kinds:
        raise UsageError(f"{path}: not an .onnx, .mnn, .engine or .rtx file")
    fields = dataclasses.asdict(read_export_manifest(path, kinds[path.suffix]))
    nested = {name: value for key in ("config", "options") for name, value in _rows(key, fields.pop(key)).items()}
    return {**{name: str(value) for name, value in fields.items()}, **nested}


def _rows(title: str, values: Mapping[str, Any]) -> dict[str, str]:
    """A row for each value, those of nested objects too; lists of lists, such as curves, are left out."""
    rows: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows |= _rows(f"{title}.{name}", value)
        elif not (isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | dict)):
            rows[f"{title}.{name}"] = str(value)
    return rows
