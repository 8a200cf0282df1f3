"""Each name, method and argument of TensorRT that our code uses, looked up in TensorRT's published bindings.

The bindings' wheel needs libraries that the package index does not have.  Its module only registers classes when it is
imported, so empty functions stand in for theirs, and nothing of TensorRT is called.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("export/to_tensorrt.py", "export/tensorrt_plugin.py", "dtn_fast/runtime/tensorrt.py")
PARAMETERS = {
    "builder": "Builder", "network": "INetworkDefinition", "options": "IBuilderConfig", "engine": "ICudaEngine",
    "e": "ParserError",
}  # fmt: skip
"""Classes of the parameters and loop variables that are annotated Any, or not at all."""
FIELDS = {"_engine": "ICudaEngine", "engine": "ICudaEngine", "logger": "ILogger"}
RTX_ALONE = {"ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
NOT_RUN = {
    "EngineInspector.get_engine_information", "ICudaEngine.create_engine_inspector",
    "ICudaEngine.create_execution_context", "ICudaEngine.get_tensor_name", "ICudaEngine.get_tensor_shape",
    "ICudaEngine.num_io_tensors", "ICudaEngine.refittable",
    "ICudaEngine.serialize", "IExecutionContext.execute_async_v3", "IExecutionContext.get_tensor_shape",
    "IExecutionContext.profiler", "IExecutionContext.set_input_shape", "IExecutionContext.set_tensor_address",
    "IProfiler", "IProfiler.__init__", "LayerInformationFormat", "LayerInformationFormat.JSON", "Logger",
    "Logger.ERROR",
    "OnnxParserRefitter", "OnnxParserRefitter.refit_from_bytes", "Refitter", "Refitter.refit_cuda_engine", "Runtime",
    "Runtime.deserialize_cuda_engine", "Runtime.engine_host_code_allowed",
    "BuilderFlag", "IBuilderConfig.set_flag", "NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS",
}  # fmt: skip
"""What no test runs without a GPU: README names it, with the command that runs it on one."""
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
"""Functions that the module takes from TensorRT's libraries."""
DUMP = """
import inspect, json, sys, types
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
import tensorrt_bindings.plugin as plugin
members = lambda owner: {n: str(getattr(getattr(owner, n), "__doc__", "") or "") for n in dir(owner)}
arguments = lambda f: list(inspect.signature(f).parameters) if callable(f) else []
print(json.dumps({
    "version": trt.__version__,
    "module": {n: members(getattr(trt, n)) if isinstance(getattr(trt, n), type) else {} for n in dir(trt)},
    "plugin": {n: arguments(getattr(plugin, n)) for n in dir(plugin) if not n.startswith("_")},
}))
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names of TensorRT's modules: classes with their members' docstrings, functions of its plugin package."""
    found = importlib.util.find_spec("tensorrt_bindings")
    compiler = shutil.which("cc")
    if found is None or compiler is None:
        pytest.skip("needs tensorrt-cu13-bindings, which has no wheel for this Python or machine, and a C compiler")
    assert found.origin
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "empty.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    empty = folder / "empty.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", empty, folder / "empty.c"], check=True)
    for name in set(re.findall(rb"libnv\w+\.so\.\d+", Path(found.origin).with_name("tensorrt.so").read_bytes())):
        (folder / name.decode()).symlink_to(empty)
    paths = [str(Path(found.origin).parents[1]), *sys.path]
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", DUMP], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


class Reader(ast.NodeVisitor):
    """Follows TensorRT's objects through a file, with the return types that the bindings' docstrings name."""

    def __init__(self, api: dict[str, Any]) -> None:
        self.classes, self.plugin = api["module"], api["plugin"]
        self.used: set[str] = set()
        self.wrong: list[str] = []
        self._types: dict[str, str] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        kept = self._types
        given = [a.arg for a in node.args.args if a.annotation is None or getattr(a.annotation, "id", "") == "Any"]
        self._types = {**kept, "e": "ParserError", **{a: PARAMETERS[a] for a in given if a in PARAMETERS}}
        self.generic_visit(node)
        self._types = kept

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        pairs = [(node.targets[0], node.value)]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        for target, value in pairs:
            if isinstance(target, ast.Name):
                self._types[target.id] = self.type_of(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.type_of(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if getattr(node.func, "id", "") == "getattr" and isinstance(node.args[1], ast.Constant):
            self.type_of(ast.Attribute(node.args[0], node.args[1].value))
        self._arguments(node)

    def type_of(self, node: ast.AST) -> str:
        """``trt`` or ``trtp`` for the modules, a class for its instance, ``type CLASS`` for itself, or nothing."""
        if isinstance(node, ast.Name):
            return {"trt": "trt", "trtp": "trtp"}.get(node.id) or self._types.get(node.id, "")
        if isinstance(node, ast.Attribute):
            if node.attr == "trtp":
                return "trtp"
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return FIELDS.get(node.attr, "")
            return self._member(self.type_of(node.value), node.attr)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body)
        if isinstance(node, ast.Call):
            if getattr(node.func, "id", "") == "open_engine":
                return "ICudaEngine"
            kind = self.type_of(node.func)
            return kind.partition(" ")[2] if kind.startswith(("type ", "call ")) else ""
        return ""

    def _member(self, owner: str, name: str) -> str:
        if owner == "trtp":
            self._check(name in self.plugin, f"plugin.{name}")
            return f"plugin {name}"
        if owner == "trt":
            if name not in ("__name__", "__version__"):
                self._check(name in self.classes, name)
            return f"type {name}"
        cls = owner.removeprefix("type ")
        if cls in self.classes:
            self._check(name in self.classes[cls], f"{cls}.{name}")
            made = re.search(rf"\b{name}\(.*\) -> [\w.]*?(\w+)$", self.classes[cls].get(name, ""), re.M)
            return f"call {made[1]}" if made else ""
        return ""

    def _check(self, known: bool, name: str) -> None:
        self.used.add(name)
        if not known and name not in RTX_ALONE:
            self.wrong.append(name)

    def _arguments(self, node: ast.Call) -> None:
        """Number and names of a call's arguments, against its docstring's or its own signature."""
        if not isinstance(node.func, ast.Attribute):
            return
        owner, name, keywords = self.type_of(node.func.value), node.func.attr, [k.arg for k in node.keywords]
        if any(isinstance(a, ast.Starred) for a in node.args):
            return
        if owner == "trtp" and self.plugin.get(name):
            known = self.plugin[name]
            if len(node.args) > len(known) or not set(keywords) <= set(known):
                self.wrong.append(f"plugin.{name}: {known}")
        doc = self.classes.get(owner, {}).get(name, "") if owner != "trt" else self.classes[name].get("__init__", "")
        called = "__init__" if owner == "trt" else name
        signatures = re.findall(rf"\b{called}\(self: [^,)]*(?:, (.*))?\) ->", doc)
        fits = [self._fits(signature, len(node.args), keywords) for signature in signatures]
        if fits and not any(fits):
            self.wrong.append(f"{owner}.{name}: {signatures}")

    @staticmethod
    def _fits(signature: str, count: int, keywords: list[str | None]) -> bool:
        names = re.findall(r"(\w+): [^,=]+(= )?", re.sub("<.*?>", "value", signature))
        required = [name for name, default in names[count:] if not default]
        return count <= len(names) and set(required) <= set(keywords) <= {name for name, _ in names}


def read(api: dict[str, Any], texts: Iterator[str]) -> Reader:
    reader = Reader(api)
    for text in texts:
        reader.visit(ast.parse(text))
    return reader


def test_every_name_and_argument_is_in_the_published_bindings(api: dict[str, Any]) -> None:
    reader = read(api, ((ROOT / file).read_text() for file in FILES))
    assert not reader.wrong, f"TensorRT {api['version']}"
    assert len(reader.used) > 60
    assert reader.used >= RTX_ALONE, "an exception that is no longer needed"
    assert reader.used >= NOT_RUN, f"no longer used: {NOT_RUN - reader.used}"


def test_what_the_bindings_lack_is_found(api: dict[str, Any]) -> None:
    for line, wrong in (
        ("builder = trt.Builder(logger); builder.build_engine(network, config)", "Builder.build_engine"),
        ("trt.BuilderFlag.FP32", "BuilderFlag.FP32"),
        (
            "c = trt.Builder(logger).create_builder_config(); c.set_timing_cache(cache)",
            "IBuilderConfig.set_timing_cache",
        ),
        (
            "c = trt.Builder(logger).create_builder_config(); c.max_workspace_size = 1",
            "IBuilderConfig.max_workspace_size",
        ),
        ("getattr(trt.NetworkDefinitionCreationFlag, 'IMPLICIT')", "NetworkDefinitionCreationFlag.IMPLICIT"),
        ("trtp.KernelLaunchParams(grid_w=1)", "plugin.KernelLaunchParams"),
    ):
        reader = read(api, iter([line]))
        assert [text.partition(":")[0] for text in reader.wrong] == [wrong], line


def test_calls_that_need_a_gpu_are_listed(api: dict[str, Any]) -> None:
    """All of a class that only a GPU gives is in NOT_RUN."""
    reader = read(api, ((ROOT / file).read_text() for file in FILES))
    gpu = (
        "Runtime",
        "ICudaEngine",
        "IExecutionContext",
        "EngineInspector",
        "Refitter",
        "OnnxParserRefitter",
        "IProfiler",
    )
    needs = {name for name in reader.used if name.split(".")[0] in gpu}
    assert needs <= NOT_RUN, f"not listed: {needs - NOT_RUN}"
