"""Running of ONNX files from ``dtn-fast export`` with onnxruntime, on its CPU, CUDA or TensorRT provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.device import choose_device
from dtn_fast.errors import UsageError
from dtn_fast.model.config import ModelConfig, parse_config
from dtn_fast.model.preprocess import normalise
from dtn_fast.onnx_session import CPU, PROVIDERS, Provider, session_of
from dtn_fast.runtime.clips import OnnxClips
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.scorer import BATCH, COLUMNS, FEATURES, Scorer, side_by_side


class OnnxScorer(Scorer):
    """Scorer of an ONNX file or of its bytes; any thread may run the session.

    ``optimise``: let onnxruntime rewrite the graph.  Of the quantised models only INT8 with float32 is rewritten, whose
    logits stay the same; rewriting INT8 with fp16, or FP8, changes logits by tenths.
    """

    def __init__(
        self,
        source: Path | bytes,
        provider: Provider = CPU,
        batch_size: int = BATCH,
        optimise: bool = True,
        threads: int = Runtime.threads,
    ) -> None:
        name = str(source) if isinstance(source, Path) else "the model"
        model = source if isinstance(source, bytes) else name
        self.session = session_of(model, name, provider, optimise, threads)
        meta = self.session.get_modelmeta().custom_metadata_map
        config = detector_config(meta, name)
        self.quantized = meta.get("quantized", "")
        self.optimise = optimise and not (self.quantized and (meta["precision"] != "fp32" or "fp8" in self.quantized))
        """Whether onnxruntime rewrites the graph."""
        if optimise > self.optimise:
            self.session = session_of(model, name, provider, False, threads)
        title = "onnxruntime" + ("" if provider == "cpu" else f" {provider}")
        super().__init__(config, meta.get("notice", ""), title, batch_size)
        self.input = self.session.get_inputs()[0].name
        outputs = {output.name for output in self.session.get_outputs()}
        if config.clip and isinstance(source, Path):
            self.clips = OnnxClips(source, meta.get("weights", ""), threads)
        else:
            outputs.discard(FEATURES)
        self._names = [name for name in COLUMNS if name in outputs]
        self.precision = meta.get("quantized", meta.get("precision", "fp32"))
        self.weights = meta.get("weights", "")

    def feed(self, crops: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Converts crops [B, S, S, 3] to the session's input."""
        x = crops if self.input == "crops" else normalise(crops, self.config).numpy()
        return {self.input: np.ascontiguousarray(x)}

    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        return side_by_side(self.session.run(self._names, self.feed(crops)))


def detector_config(meta: Mapping[str, str], name: str) -> ModelConfig:
    """The detector's configuration in an ONNX file's metadata.  Raises UsageError naming the file ``name``."""
    if "dtn_config" not in meta:
        raise UsageError(f"{name}: an ONNX file, but not one written by dtn-fast export")
    return parse_config(meta["dtn_config"], name)


def metadata(path: Path) -> dict[str, str]:
    """The metadata that ``dtn-fast export`` wrote into the file.  Raises UsageError for other files."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    return OnnxScorer(path, optimise=False).session.get_modelmeta().custom_metadata_map


def load(path: Path, runtime: Runtime) -> OnnxScorer:
    """Opens an ONNX file.  Raises UsageError when the file or the provider cannot be used here."""
    return OnnxScorer(path, provider_of(runtime), threads=runtime.threads)


def provider_of(runtime: Runtime) -> Provider:
    """The execution provider that ``runtime`` asks for.  Raises UsageError when it asks for a GPU and there is none."""
    if runtime.provider != "auto":
        return runtime.provider
    wanted = choose_device(runtime.device) == "cuda" and (runtime.device == "cuda" or _has_cuda())
    return "cuda" if wanted else "cpu"


def _has_cuda() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    return PROVIDERS["cuda"][0] in onnxruntime.get_available_providers()
