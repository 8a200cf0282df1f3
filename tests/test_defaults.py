"""Each setting has one default, in the dataclass that declares it; functions take it without one."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("dtn_fast", "kernels", "train", "export", "bench")
OTHER_THINGS = {
    "clip": "frames of a clip: of a model's temporal head or none, of one to train",
    "compression": "of a dataset's videos, in augmentation",
    "convs": "of a model, to quantise",
    "device": "of a model file, of a function that computes on one",
    "frames": "of a video that is prepared, judged or rendered",
    "images": "to calibrate with, to compare two files on",
    "lr": "of a detector, of a temporal head",
    "name": "a served model's",
    "precision": "of a running model, of a file, of training",
    "seed": "of training, of the rendered set, of corruptions",
    "size": "of a rendered frame",
    "split": "to measure on, to compare two files on; of a folder, in percent",
    "std": "of pixels in the model, of noise in augmentation",
    "workers": "processes, threads, uploads at a time",
    "noise": "before the gate, in augmentation",
    "target": "of INT8",
}
"""Fields of one name that several dataclasses declare, because they are different things."""
OWN_SHAPES = ("dtn_fast/model/baselines.py",)
"""Published architectures: their constructors' defaults are the published sizes."""
OWN_CONSTANTS = ("export/to_mnn.py", "dtn_fast/cli/prepare.py", "dtn_fast/data/open.py")
"""Their TOLERANCE, LOG_EVERY and THREADS are of the exporter's own check, of a log file and of reading pictures: nobody
may set them."""
COMPUTES_ANYWHERE = ("device", "scale", "name", "threads", "rank")
"""Parameters of inner functions that are no settings: where tensors are, a score's factor, a name for an error, threads
of a video's decoder, a process's number."""
OPERATORS = ("kernels/mas_attention.py", "kernels/moe_gate.py", "kernels/reference.py")
"""The public operators: their defaults mean "none", whatever the model's are."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.startswith(FOLDERS) and (ROOT / name).is_file():
            yield name, ast.parse((ROOT / name).read_text(encoding="utf-8"))


def is_value(node: ast.expr | None) -> bool:
    """Whether a default is a value of its own: a number, a text or a filled tuple, not another setting's default."""
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, bool) and node.value not in (None, "")
    if isinstance(node, ast.UnaryOp):
        return is_value(node.operand)
    return isinstance(node, ast.Tuple) and any(map(is_value, node.elts))


def settings() -> dict[str, list[str]]:
    """The fields of every dataclass in a config.py that declare a value: name -> where."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, tree in sources():
        if Path(name).name != "config.py":
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and is_value(line.value):
                        found[line.target.id].append(f"{name}: {node.name}.{line.target.id}")
    return found


def defaults(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, ast.expr]]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    yield from zip((a.arg for a in named[len(named) - len(arguments.defaults) :]), arguments.defaults, strict=True)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            yield argument.arg, default


def test_a_setting_is_declared_once() -> None:
    declared = settings()
    assert {"threshold", "margin", "temperature", "frames", "epoch_patience"} <= set(declared)
    again = {name: places for name, places in declared.items() if len(places) > 1 and name not in OTHER_THINGS}
    assert not again


def test_no_function_has_a_default_of_its_own() -> None:
    known = settings()
    second = []
    for name, tree in sources():
        if name in (*OWN_SHAPES, *OPERATORS):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for argument, default in defaults(node):
                    if argument in known and argument not in COMPUTES_ANYWHERE and is_value(default):
                        second.append(f"{name}:{node.lineno} {node.name}({argument}={ast.unparse(default)})")
    assert not second


def test_no_constant_repeats_a_setting() -> None:
    known = settings()
    second = []
    for name, tree in sources():
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]
                second += [
                    f"{name}: {n}"
                    for n in names
                    if n.lower() in known and is_value(node.value) and name not in OWN_CONSTANTS
                ]
    assert not second


SILENT = {
    "train/config.py": (
        "epochs weights initial_weights center_on center_init center_lr center_weight_decay temperature delta "
        "generations generation_patience gain epoch_patience student_centers student_lr student_warmup augment "
        "self_blend kd_on error_weights error_factor focal_gamma ambiguous ambiguous_draws"
    ),
    "dtn_fast/model/config.py": (
        "margin channels convs expert_hidden expert_activation expert_kernel gate noise noise_std noise_strength "
        "partition mlp_ratio mas_init mean std drop_rate drop_path_rate state_size"
    ),
}
"""Fields about which the paper is silent or leaves a choice."""


def test_choices_are_marked() -> None:
    """ARCHITECTURE.md: where the paper is silent, our choice is a field marked *choice*."""
    for name, fields in SILENT.items():
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        marked = set()
        for node in (n for n in tree.body if isinstance(n, ast.ClassDef)):
            for line, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, ast.Expr):
                    marked |= {line.target.id} if "*choice*" in ast.unparse(text) else set()
        assert marked == set(fields.split()), name


def test_a_second_default_would_be_seen() -> None:
    tree = ast.parse(
        "def judge(score, threshold=0.5, *, frames=-1, config=DetectConfig(), rate=DetectConfig.rate): ..."
    )
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    assert [name for name, default in defaults(function) if is_value(default)] == ["threshold", "frames"]
