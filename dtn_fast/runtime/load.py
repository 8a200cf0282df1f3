"""Loading of a scorer or a detector from a model file of any kind."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch

from dtn_fast.data.config import trained_corruptions
from dtn_fast.device import choose_device, choose_threads
from dtn_fast.errors import UsageError, tell
from dtn_fast.model.build import load_detector
from dtn_fast.model.config import TrainedOn
from dtn_fast.model.detector import CONFIG, WEIGHTS, Detector, move_to
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.runtime.torch_scorer import TorchScorer

SUMMARY = "summary.json"
"""File of a training run that lists its generations and names the best."""
RECIPE = "recipe.json"
"""File of a training run that holds its recipe and model configuration, as requested."""

STUDENT = "student.json"
"""File of a student's folder that holds the recipe it was distilled by."""

SERVER = "server"
"""Kind of a model that is an address and no file."""


def load_scorer(path: str | Path, runtime: Runtime = Runtime()) -> Scorer:
    """A scorer for ``path``: .onnx, .mnn, .engine, .rtx, a checkpoint folder, a training run (its best generation), or
    the address of a Triton Inference Server, such as http://host:8000/dtn.

    Raises UsageError when ``path`` is not a model, this machine cannot run it, or a changed option of ``runtime`` does
    not apply to it, or it was calibrated without its temporal head; DtnError when a server cannot be reached.  Says so
    when the runtime leaves the temporal head out.
    """
    scorer = _opened(path, runtime)
    made = scorer.config.card.calibration if scorer.config.card is not None else None
    if scorer.clips is not None and made is not None and made.clip is None:
        raise UsageError(f"{path}: calibrated without the temporal head that scores its videos; run dtn-fast "
                         "calibrate, and export it again")  # fmt: skip
    if scorer.config.clip and scorer.clips is None:
        tell(
            f"{path}: its temporal head does not run through {scorer.name}; a video's score is the mean of its frames'"
        )
    return scorer


def _opened(path: str | Path, runtime: Runtime) -> Scorer:
    onnx = {"onnxruntime": "onnx", "openvino": "openvino", "auto": "race"}[runtime.runtime]
    kinds = {".onnx": onnx, ".mnn": "mnn", ".engine": "tensorrt", ".rtx": "tensorrt"}
    takes = {
        ".onnx": ("device", "provider", "runtime", "threads"), ".mnn": ("threads",), ".engine": (), ".rtx": (),
        SERVER: ("patience",),
    }  # fmt: skip
    kind = SERVER if re.match(r"(https?|grpcs?):/", str(path)) else Path(path).suffix
    for field in dataclasses.fields(runtime):
        value = getattr(runtime, field.name)
        if value != field.default and field.name not in takes.get(kind, ("device", "precision", "mode", "threads")):
            what = kind if kind == SERVER else f"{kind} file" if kind in kinds else "checkpoint"
            raise UsageError(f"--{field.name} {value}: not for {path}, a {what}; leave it out")
    if kind == SERVER:
        from dtn_fast.runtime import triton_server

        return triton_server.load(str(path), runtime)
    path = Path(path)
    if kind in kinds:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        from importlib import import_module

        scorer: Scorer = import_module(f"dtn_fast.runtime.{kinds[kind]}").load(path, runtime)
        return scorer
    threads = choose_threads(runtime.threads)
    if runtime.threads or threads < torch.get_num_threads():
        torch.set_num_threads(threads)
    return TorchScorer(move_to(load_model(path), choose_device(runtime.device)), runtime=runtime)


def load_model(path: Path) -> Detector:
    """The detector of a checkpoint folder or of a training run's best generation, in eval mode."""
    if path.is_file() and path.name in (WEIGHTS, CONFIG):
        path = path.parent
    if path.is_file():
        raise UsageError(f"{path}: a file, not a checkpoint folder; give a training run or a checkpoint folder")
    if not path.is_dir():
        raise UsageError(f"{path}: no such checkpoint; give a folder written by dtn-fast train, or an exported file")
    folder = best_checkpoint(path)
    model = load_detector(folder)
    if model.config.trained_on is None and (recipe := read_recipe(folder)):  # of an earlier version
        model.config = dataclasses.replace(model.config, trained_on=_trained_on(recipe))
    return model


def _trained_on(recipe: dict[str, Any]) -> TrainedOn:
    """Facts of a training from its recipe's fields, which name no forgery when all in the data were used."""
    blend, methods = bool(recipe.get("self_blend")), recipe.get("methods")
    named = methods if isinstance(methods, list) and not blend else []
    kinds = trained_corruptions(str(recipe.get("augment")), blend)
    return TrainedOn(tuple(map(str, named)), tuple(sorted(kinds)))


def best_checkpoint(run: Path) -> Path:
    """The folder of a run's best generation, or ``run`` itself when it is a checkpoint."""
    if not (run / SUMMARY).is_file():
        return run
    try:
        return run / f"generation-{int(json.loads((run / SUMMARY).read_text(encoding='utf-8'))['best'])}"
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run / SUMMARY}: damaged ({error}); name a generation's folder instead") from error


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe fields that the best generation of a run, or that of a generation's folder, was trained by; empty: no
    recipe.

    For callers that must not depend on training; ``dtn_fast.train.run_folder.load_run`` reads and checks it.
    """
    for file in (best_checkpoint(path) / STUDENT, path / RECIPE, path.parent / RECIPE):
        try:
            recipe = json.loads(file.read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(recipe, dict):
            return recipe
    return {}
