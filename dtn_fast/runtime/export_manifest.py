"""The export manifest, a JSON file beside an exported file (.mnn, .engine, .rtx): its origin and what may load it."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtn_fast.dataclass_json import from_json
from dtn_fast.errors import UsageError
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.config import ModelConfig, parse_config


@dataclass(frozen=True)
class ExportManifest:
    """Manifest of an exported file, beside ``dtn.engine`` as ``dtn.engine.json``; checked when the file is loaded."""

    kind: str
    """mnn, tensorrt or tensorrt_rtx."""
    version: str
    """Version of the library that built the file."""
    sha256: str
    """SHA-256 of the file."""
    weights: str
    """Hash of the checkpoint's weights, as in the ONNX file's metadata."""
    precision: str
    """fp32, fp16 or bf16."""
    input: str
    """crops (uint8 [B, S, S, 3]) or images (float32 [B, 3, S, S], normalised)."""
    config: dict[str, Any]
    """The detector's configuration."""
    notice: str = ""
    batches: tuple[int, int, int] = (1, 1, 1)
    """Smallest, optimal and largest batch size; MNN takes any."""
    archs: tuple[int, ...] = ()
    """Compute capabilities x 10 of the GPUs that may load the file; empty: any."""
    attention: str = "native"
    """native, or plugin (this package's kernels as dtn::MASAttention and dtn::MoEGate)."""
    quantized: str = ""
    """Layers quantised to INT8 or FP8; empty: none."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options that the file was built with."""

    def write(self, path: Path) -> None:
        write_whole(beside(path), json_text(dataclasses.asdict(self), indent=1))

    def detector_config(self, where: str = "export manifest") -> ModelConfig:
        """The detector's configuration.  Raises UsageError naming ``where`` when it is not valid."""
        return parse_config(json_text(self.config), where)


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_export_manifest(path: Path, kind: str) -> ExportManifest:
    """Reads the manifest of the file ``path``.  Raises UsageError if it is missing, damaged or for another file."""
    where = beside(path)
    again = f"; export {path.name} again"
    try:
        text = where.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{where}: missing; it is written with {path.name} and must travel with it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read ({error}){again}") from error
    manifest = from_json(ExportManifest, text, str(where), again)
    manifest.detector_config(f"{where}, config")
    if manifest.kind != kind:
        raise UsageError(f"{path}: built by {manifest.kind}, not {kind}; its suffix and manifest do not match")
    if manifest.sha256 != file_hash(path):
        raise UsageError(f"{path}: not the file that {where.name} describes; copy both, or export again")
    return manifest


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
