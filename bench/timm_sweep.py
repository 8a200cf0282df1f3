"""Which of timm's families train, distil and export, by their smallest members: ``dtn-fast bench timm``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtn_fast.bench.results import FOLDER, TIMM, environment, write_json
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.video_table import Video
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.export.pipeline import export
from dtn_fast.model.build import own_size, timm_config
from dtn_fast.model.config import TimmConfig
from dtn_fast.model.timm_compat import import_timm
from dtn_fast.train.config import Execution, Recipe
from dtn_fast.train.distill import distill, train_initial
from dtn_fast.train.run_folder import generation_folder, start_run

LIMIT = 240.0
"""Seconds that a model may take for everything."""
LARGEST = 130e6
"""Number of parameters above which a model is not run."""
RECIPE = Recipe(epochs=1, batch_size=2, generations=1, augment="none", precision="fp32")
STAGES = ("train", "distil", "export")


def sweep(families: Collection[str] = (), folder: Path = FOLDER, limit: float = LIMIT) -> Iterator[dict[str, Any]]:
    """Tries every family that timm.json in ``folder`` lacks, or ``families`` again; stores and yields a row for each.

    Rows of other versions of torch or timm are dropped.  Raises UsageError on a family that timm does not have.
    """
    timm = import_timm()
    known = [name for name in timm.list_modules() if find_spec(f"timm.models.{name}")]  # not this package's own
    if unknown := set(families) - set(known):
        raise UsageError(f"--families {' '.join(sorted(unknown))}: unknown; see timm.list_modules()")
    path, origin, rows = folder / TIMM, {**environment(), "timm": timm.__version__}, dict[str, dict[str, Any]]()
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if all(stored["environment"][name] == origin[name] for name in ("torch", "timm")):
            rows = {row["family"]: row for row in stored["rows"] if row["family"] not in families}
    for family in families or known:
        if family not in rows:
            name, parameters = _smallest(timm, family)
            rows[family] = {
                "family": family,
                "model": name,
                "parameters": parameters,
                **_tried(name, parameters, limit),
            }
            write_json(path, {"environment": origin, "rows": [rows[name] for name in sorted(rows)]})
            yield rows[family]


def _smallest(timm: Any, family: str) -> tuple[str, int]:
    """The member with the fewest parameters, and their number."""
    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=2).parameters())
    return min(sizes.items(), key=lambda item: item[1])


def _tried(name: str, parameters: int, limit: float) -> dict[str, str]:
    """What :func:`stages` says of a model, in a process of its own, which may crash or hang."""
    if parameters > LARGEST:
        return {"pixels": "", **dict.fromkeys(STAGES, "not run: too large for this sweep")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, name, folder]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit, check=False
            )
            text, missing = done.stdout, f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            text, missing = error.stdout or b"", f"not done within {limit:.0f} s"
    found = dict(json.loads(line) for line in text.decode().splitlines() if line.startswith("["))
    return {"pixels": "", **dict.fromkeys(STAGES, missing), **found}


def stages(name: str, run: Path) -> Iterator[tuple[str, str]]:
    """Yields the side of the crops, and for training, distillation and export of a model yes or the reason why not.

    The side is the default one, or else the model's own.
    """
    said, plain = "", TimmConfig.image_size
    for side, option in dict.fromkeys(((plain, ""), (own_size(name), ""), (plain, " with --no-channels-last"))):
        crops, how = noise(side), {"execution": Execution(channels_last=not option)}
        start_run(run, RECIPE, timm_config(name, side))
        answer = _answer(name, lambda crops=crops, how=how: list(train_initial(run, crops, **how)))
        said = said or answer
        if answer == "yes":
            break
    yield "pixels", str(side)
    if answer != "yes":
        yield "train", said
        yield from dict.fromkeys(STAGES[1:], "").items()
        return
    yield "train", "yes" + option
    yield "distil", _answer(name, lambda: list(distill(run, crops, **how)))
    yield "export", _answer(name, lambda: export(generation_folder(run, 0), run / "model.onnx"))


def _answer(name: str, call: Callable[[], object]) -> str:
    try:
        call()
    except DtnError as error:
        return str(error).removeprefix(f"{name}: ")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "yes"


def noise(side: int) -> CropDataset:
    """Six crops of noise, a real and a fake in turns: four to train on, two to validate on."""
    crops = np.random.default_rng(0).integers(0, 256, (6, side, side, 3), np.uint8)
    videos = [Video(str(n), n % 2, ("real", "noise")[n % 2], "train" if n < 4 else "val") for n in range(6)]
    zeros = np.zeros(6, np.int64)
    return CropDataset(ShardFiles([crops], side), np.arange(6), zeros, zeros, videos, [{"boxes": ""}] * 6, False)


if __name__ == "__main__":
    for line in stages(sys.argv[1], Path(sys.argv[2])):
        print(json.dumps(line), flush=True)
