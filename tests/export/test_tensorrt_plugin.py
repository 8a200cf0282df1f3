"""The TensorRT plugins without TensorRT: what its own Python package makes of them, on a stand-in for its library.

``tensorrt.plugin`` is pure Python; the bindings' wheel carries it, and TensorRT-RTX's classes stand in for the rest.
Launch parameters become expressions of the batch size, evaluated here as TensorRT would.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch

from dtn_fast.export import tensorrt_plugin
from dtn_fast.kernels import compile_check, launch_values

ARCHS = sorted(compile_check.SHARED_LIMIT)


class Expression:
    """A dimension as a function of the batch size."""

    def __init__(self, of: Callable[[int], int], constant: bool) -> None:
        self.of, self.constant = of, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.of(0)

    def is_size_tensor(self) -> bool:
        return False


class Shape(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Slots(dict):
    """What a plugin sets in the builder: launch parameters as attributes, extra arguments by number."""

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


@pytest.fixture(scope="module")
def trt() -> Iterator[Any]:
    """``tensorrt`` with the real ``tensorrt.plugin`` in it, our plugins registered."""
    rtx = importlib.import_module("tensorrt_rtx")
    stand_in = types.ModuleType("tensorrt")
    stand_in.__dict__.update({k: v for k, v in vars(rtx).items() if not k.startswith("__")})
    stand_in.__path__ = []
    plain = lambda name: type(name, (), {"__init__": lambda self: None})
    request = IntEnum("QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT", start=0)
    for name in ("ISymExpr", "IPluginV3QuickAOTBuild"):
        setattr(stand_in, name, plain(name))
    stand_in.QuickPluginCreationRequest = request
    stand_in.IDimensionExpr, stand_in.DimsExprs = Expression, Shape
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None:
        pytest.skip("tensorrt-cu13-bindings has no wheel for this Python or machine")
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0], "plugin")
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "tensorrt"}
    sys.modules |= {"tensorrt": stand_in, "tensorrt.plugin": package}
    try:
        spec.loader.exec_module(package)
        tensorrt_plugin._registered.clear()
        tensorrt_plugin.register(stand_in)
        tensorrt_plugin.register(stand_in)  # again is nothing
        yield stand_in
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules |= before
        tensorrt_plugin._registered.clear()


def build(
    trt: Any, operator: str, shapes: list[tuple], dtype: Any, attributes: dict[str, Any], batch: int
) -> list[dict]:
    """Every tactic as TensorRT's builder asks for it; a None in a shape is the batch."""
    lib = importlib.import_module("tensorrt.plugin._lib")
    template = importlib.import_module("tensorrt.plugin._plugin_class")
    d = lib.QDP_REGISTRY[f"dtn::{operator}"]
    plugin = template._TemplateAOTPlugin(operator, "dtn", d.num_outputs)
    plugin.init(d.register_func, attributes, d.aot_impl_attr_names, d.aot_impl_func, d.autotune_attr_names,
                d.autotune_func)  # fmt: skip
    operations = {
        "SUM": lambda a, b: a + b, "PROD": lambda a, b: a * b, "SUB": lambda a, b: a - b,
        "FLOOR_DIV": lambda a, b: a // b, "CEIL_DIV": lambda a, b: -(-a // b), "MAX": max, "MIN": min,
    }  # fmt: skip

    class Builder:
        def constant(self, value: int) -> Expression:
            return Expression(lambda _: value, True)

        def operation(self, kind: Any, a: Expression, b: Expression) -> Expression:
            f = operations[kind.name]
            return Expression(lambda n: f(a.of(n), b.of(n)), a.constant and b.constant)

    builder = Builder()
    dims = [[Expression(lambda n: n, False) if s is None else builder.constant(s) for s in shape] for shape in shapes]
    assert plugin.get_output_data_types([dtype] * len(shapes), [len(s) for s in shapes]) == [dtype]
    (output,) = [[e.of(batch) for e in out] for out in plugin.get_output_shapes(dims, [], builder)]

    def described(shape: tuple) -> Any:
        made = trt.DynamicPluginTensorDesc()
        made.desc.dims = trt.Dims([-1 if s is None else s for s in shape])
        made.desc.type, made.desc.format = dtype, trt.TensorFormat.LINEAR
        made.min = made.opt = made.max = trt.Dims([batch if s is None else s for s in shape])
        return made

    both = [described(s) for s in shapes] + [described((None, *output[1:]))]
    formats = plugin.get_supported_format_combinations(both, len(shapes))
    assert {(f.type, f.format) for f in formats} == {(dtype, trt.TensorFormat.LINEAR)}
    plugin.configure_plugin(both[:-1], both[-1:])
    built = []
    for tactic in plugin.get_valid_tactics():
        plugin.set_tactic(tactic)
        launch, extra = Slots(), Slots()
        plugin.get_launch_params(dims, both, len(shapes), launch, extra, builder)
        name, ptx = plugin.get_kernel([b.desc for b in both[:-1]], [both[-1].desc])
        count = extra.pop("nbSymExprs")
        built.append({
            "output": output, "kernel": name, "ptx": ptx.decode(),
            **{k: v.expr.of(batch) for k, v in launch.items()},
            "extra": [extra[i].expr.of(batch) for i in range(count)],
        })  # fmt: skip
    return built


def entry_parameters(ptx: str) -> list[str]:
    body = re.search(r"\.visible \.entry \w+\((.*?)\n\)", ptx, re.DOTALL)
    assert body
    return re.findall(r"\.param \.(\w+)", body[1])


def test_attention_as_the_builder_asks(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_values, "target", 89)
    made = build(trt, "MASAttention", [(None, 64, 3, 8, 64), (8,)], trt.DataType.HALF, {"scale": 0.125}, batch=5)
    assert len(made) > 1
    offered = tensorrt_plugin.images_of("MASAttention", 89, "float16", (64, 8, 64), 0.125)
    for one, image in zip(made, offered, strict=True):
        assert one["output"] == [5, 64, 8, 64]
        assert (one["kernel"], one["block_x"], one["shared_mem"]) == (image.kernel, image.threads, image.shared)
        programs = 5 * 8 * (-(-64 // image.rows) if image.rows else 1)
        assert (one["grid_x"], one["grid_y"], one["grid_z"]) == (programs, 1, 1)
        assert one["extra"] == []
        assert entry_parameters(one["ptx"]) == ["u64"] * 3
    long = build(trt, "MASAttention", [(None, 197, 3, 4, 32), (4,)], trt.DataType.BF16, {"scale": 0.2}, batch=3)
    assert {one["kernel"] for one in long} == {"mas_attention_flash"}
    assert all(one["grid_x"] % 12 == 0 and one["grid_x"] > 12 for one in long)


def test_gate_as_the_builder_asks(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_values, "target", 90)
    shapes = [(None, 64, 512), (2, 128, 512), (2, 128), (2, 128), (2,), (2,)]
    made = build(trt, "MoEGate", shapes, trt.DataType.BF16, {}, batch=3)
    assert len(made) > 1
    for one, image in zip(made, tensorrt_plugin.images_of("MoEGate", 90, "bfloat16", (2, 128, 512)), strict=True):
        assert one["output"] == [3, 64, 512]
        assert one["extra"] == [3 * 64]
        assert one["grid_x"] == -(-3 * 64 // image.rows)
        assert entry_parameters(one["ptx"]) == ["u64"] * 6 + ["u32", "u64"]  # inputs, integers, outputs


def test_shapes_without_a_kernel_are_refused(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_values, "target", 89)
    with pytest.raises(ValueError, match=r"head dimension 48 .kernels take 32, 64, 128.; use --attention native"):
        build(trt, "MASAttention", [(None, 64, 3, 8, 48), (8,)], trt.DataType.HALF, {"scale": 0.1}, batch=1)
    assert "not fixed" in (tensorrt_plugin.unsupported("MASAttention", (-1, 8, 64)) or "")
    assert "E=9" in (tensorrt_plugin.unsupported("MoEGate", (9, 16, 64)) or "")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch_gets_ptx_that_assembles_within_the_limits(arch: int, archs: list[int], tmp_path: Path) -> None:
    if arch not in archs:
        pytest.skip("compiled with --full")
    for operator, shape in (("MASAttention", (64, 8, 64)), ("MoEGate", (2, 128, 512))):
        images = tensorrt_plugin.images_of(operator, arch, "float16", shape, 0.125)
        assert 2 <= len(images) <= tensorrt_plugin.TACTICS
        for image in images:
            assert image.shared <= 48 * 1024
            assert f".version {tensorrt_plugin.PTX_VERSION // 10}.{tensorrt_plugin.PTX_VERSION % 10}" in image.ptx
            target = re.search(r"\.target (sm_\w+)", image.ptx)
            assert target
            assert target[1] == f"sm_{arch}{'a' if arch >= 90 else ''}"
            assert compile_check.TENSOR_CORE.search(image.ptx)
            (tmp_path / "k.ptx").write_text(image.ptx)
        command = [compile_check._ptxas(arch), "-v", f"--gpu-name={target[1]}", str(tmp_path / "k.ptx")]
        command += ["-o", str(tmp_path / "k.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_scratch_is_stripped_and_never_when_it_is_read() -> None:
    ptx = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ ld.param.u64 %r, [k_param_0]; }"
    assert entry_parameters(tensorrt_plugin.strip_scratch(ptx, 1)) == ["u64"]
    assert tensorrt_plugin.strip_scratch(ptx, 1).endswith("{ ld.param.u64 %r, [k_param_0]; }")
    with pytest.raises(ValueError, match="reads k_param_1"):
        tensorrt_plugin.strip_scratch(ptx.replace("[k_param_0]", "[k_param_1]"), 1)
    with pytest.raises(ValueError, match="takes 2 parameters, 3"):
        tensorrt_plugin.strip_scratch(ptx, 3)
    meta = types.SimpleNamespace(shared=0, num_ctas=1, global_scratch_size=0, profile_scratch_size=0,
                                 launch_cooperative_grid=False, tensordesc_meta=())  # fmt: skip
    assert tensorrt_plugin.refusal(types.SimpleNamespace(metadata=meta)) is None
    for name, value, word in (
        ("shared", 49153, "shared memory"), ("num_ctas", 2, "cluster"), ("global_scratch_size", 8, "scratch"),
        ("launch_cooperative_grid", True, "cooperative"), ("tensordesc_meta", (1,), "descriptors"),
    ):  # fmt: skip
        other = types.SimpleNamespace(**{**vars(meta), name: value})
        assert word in (tensorrt_plugin.refusal(types.SimpleNamespace(metadata=other)) or "")


def test_the_command_lists_tactics(capsys: pytest.CaptureFixture[str]) -> None:
    assert tensorrt_plugin.main(["MoEGate", "--arch", "86", "--shape", "2", "32", "64"]) == 0
    assert capsys.readouterr().out.count("tactic ") >= 2
    assert tensorrt_plugin.main(["MASAttention", "--shape", "64", "8", "48"]) == 2


# ------------------------------------------------------------------------------------------------ on a GPU


def launch_ptx(image: tensorrt_plugin.Image, grid: tuple[int, ...], args: list[torch.Tensor | int]) -> None:
    """Launches exactly the engine's PTX through the CUDA driver, arguments in TensorRT's order."""
    import ctypes

    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *words: Any) -> None:
        code = getattr(cuda, name)(*words)
        assert code == 0, f"{name} returned {code}"

    torch.cuda.synchronize()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), image.ptx.encode() + b"\0")
    call("cuModuleGetFunction", ctypes.byref(function), module, image.kernel.encode())
    values = [ctypes.c_int32(a) if isinstance(a, int) else ctypes.c_uint64(a.data_ptr()) for a in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    sizes = [*grid, *[1] * (3 - len(grid)), image.threads, 1, 1]
    call("cuLaunchKernel", function, *sizes, image.shared, None, pointers, None)
    torch.cuda.synchronize()
    call("cuModuleUnload", module)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_engines_own_ptx_computes_the_operators(dtype: torch.dtype) -> None:
    from tolerances import assert_close

    from dtn_fast.kernels import reference

    torch.manual_seed(0)
    name, limit = str(dtype).removeprefix("torch."), torch.bfloat16 if dtype == torch.float32 else dtype  # TF32
    for n, heads, dim in ((64, 8, 64), (197, 4, 32)):
        qkv, scale = (
            torch.randn(3, n, 3, heads, dim, device="cuda").to(dtype),
            torch.randn(heads, device="cuda").to(dtype),
        )
        expected = reference.mas_attention(*qkv.double().unbind(2), scale.double())
        for image in tensorrt_plugin.images_of(
            "MASAttention", tensorrt_plugin.target_arch(), name, (n, heads, dim), dim**-0.5
        ):
            out = torch.full((3, n, heads, dim), torch.nan, device="cuda", dtype=dtype)
            programs = 3 * heads * (-(-n // image.rows) if image.rows else 1)
            launch_ptx(image, (programs,), [qkv, scale, out])
            assert_close(str(image.values), out, expected, limit)
    x = torch.randn(100, 512, device="cuda").to(dtype)
    shapes = ((2, 128, 512), (2, 128), (2, 128), (2,), (2,))
    weights = [(torch.randn(s, device="cuda") * 0.05).to(dtype) for s in shapes]
    image_of = x.T.reshape(1, 512, 100, 1).double()
    expected = reference.moe_gate(image_of, *(w.double() for w in weights), 0.0, None).flatten(2)[0].T
    for image in tensorrt_plugin.images_of("MoEGate", tensorrt_plugin.target_arch(), name, (2, 128, 512)):
        y = torch.full((100, 512), torch.nan, device="cuda", dtype=dtype)
        launch_ptx(image, (-(-100 // image.rows),), [x, *weights, 100, y])
        assert_close(str(image.values), y, expected, limit)
