"""Where a run's time goes: sums agree with the run, kernels find their modules, and what is heavy is found."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import optimize
from optimize import Axis, Component, TensorSpec
from optimize.compile.compiled import CompiledRunner
from optimize.compile.runners import EagerRunner, OnnxRuntimeRunner, Runner
from optimize.profiles import compiled_code, engine_profile, ort_profile
from optimize.profiles.operators import Piece, block_of, breakdown_of, by_module, table
from optimize.profiles.schema import Breakdown
from optimize.profiles.work import work_of

SIZES = {"batch": 1, "height": 56, "width": 40, "tokens": 63}
FEEDS = {
    "sample": torch.randn(1, 4, 14, 10, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([500.0]),
    "encoder_hidden_states": torch.randn(1, 63, 64, generator=torch.Generator().manual_seed(1)),
}


def check_sums(found: Breakdown) -> None:
    """All that the profiler saw, and the rest, are the run; nothing is counted twice."""
    seen = sum(o.ms for o in found.operators)
    assert seen + found.outside_ms == pytest.approx(found.run_ms, rel=0.01)
    assert 0 <= found.outside_ms < found.run_ms
    assert found.operators == sorted(found.operators, key=lambda o: -o.ms)
    assert "without a profiler" in found.how


def broken_down(runner: Runner, feeds: Any, folder: Path | None = None, **words: Any) -> Breakdown:
    return breakdown_of(
        runner, feeds, component="unet", shape="odd", backend=runner.name, precision="fp32", folder=folder, **words
    )


def unmapped(found: Breakdown) -> float:
    """Share of the kernels' time that has no module."""
    return sum(o.ms for o in found.operators if not o.module) / sum(o.ms for o in found.operators)


def torch_modules(bundle: Path) -> set[str]:
    with EagerRunner(component_in(bundle)) as runner:
        assert runner._module is not None
        return {name for name, _ in runner._module.named_modules()}


def component_in(bundle: Path) -> Component:
    from optimize.loading import component_of

    return component_of(optimize.Bundle.read(bundle), "unet", False)


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its U-Net in int8 beside."""
    bundle = tmp_path_factory.mktemp("int8") / "demo"
    shutil.copytree(demo_bundle, bundle)
    optimize.quantize(bundle, components=["unet"], samples=4)
    return bundle


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnx_runtimes_kernels_find_their_modules(quantized: Path, precision: str, tmp_path: Path) -> None:
    path = quantized / "unet" / f"unet.{precision}.onnx"
    found = broken_down(OnnxRuntimeRunner(path, threads=1), FEEDS, tmp_path, work=work_of(path, SIZES))
    check_sums(found)
    assert unmapped(found) < 0.05
    assert {o.module for o in found.operators} - {""} <= torch_modules(quantized)
    kinds: dict[str, set[str]] = defaultdict(set)
    for o in found.operators:
        kinds[o.module].add(o.operator)
        assert o.provider == "CPUExecutionProvider" and o.calls >= 1
    for module, kind in {"conv_in": "convolution", "conv_out": "convolution", "conv_norm_out": "norm"}.items():
        assert kind in kinds[module], module
    assert any(o.operator == "attention" and o.module.endswith("attn2") for o in found.operators)
    integer = {o.kernel for o in found.operators} & {"QLinearConv", "MatMulIntegerToFloat"}
    assert bool(integer) == (precision == "int8")
    counted = [o for o in found.operators if o.operator in ("convolution", "matmul", "attention") and o.flops]
    assert len(counted) > 60 and all(o.bytes for o in counted)
    assert found.trace is not None
    events = json.loads((tmp_path / found.trace).read_text())
    assert {"ph", "ts", "dur", "name"} <= events[0].keys()


def test_a_session_that_is_not_optimized_is_profiled_as_it_is(demo_bundle: Path) -> None:
    path = demo_bundle / "unet" / "unet.fp32.onnx"
    found = broken_down(OnnxRuntimeRunner(path, threads=1, optimize=False), FEEDS)
    check_sums(found)
    assert unmapped(found) < 0.05 and found.trace is None
    assert not any("Reorder" in o.kernel or o.kernel == "QuickGelu" for o in found.operators)


def test_events_in_another_order_find_their_nodes_by_name() -> None:
    node = onnx.helper.make_node
    nodes = [node("MatMul", ["x", "w"], ["a/MatMul"], name="a/MatMul"), node("Relu", ["a/MatMul"], ["y"], name="")]
    where = ort_profile.modules_of(nodes, {"w"}, {"a/MatMul": "a", "y": "b"})
    assert where == [("a", "matmul"), ("b", "elementwise")]
    events = [
        {"name": "Relu_1_kernel_time", "dur": 3, "args": {"op_name": "Relu"}},
        {"name": "a/MatMul_kernel_time", "dur": 5, "args": {"op_name": "MatMul"}},
    ]
    told = [(p.module, p.ms) for p in ort_profile.pieces_of(events, nodes, where)]
    assert told == [("", 0.003), ("a", 0.005)]
    assert [p.module for p in ort_profile.pieces_of(events[::-1], nodes, where)] == ["a", "b"]


# --- torch -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Heavy(nn.Module):
    """Three blocks, of which the middle one has twenty times the work."""

    def __init__(self, middle: int = 2560) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(64, 128), Block(64, middle), Block(64, 128)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


def heavy(middle: int = 2560) -> Component:
    torch.manual_seed(0)
    return Component.from_module(
        Heavy(middle).eval(), [TensorSpec("x", ("batch", 77, 64))], ["y"], [Axis("batch", 1, 7, 8)]
    )


X = {"x": torch.randn(7, 77, 64, generator=torch.Generator().manual_seed(0))}


def test_eager_finds_the_heavy_module(tmp_path: Path) -> None:
    found = broken_down(EagerRunner(heavy()), X, tmp_path)
    check_sums(found)
    blocks = dict(by_module(found, 1))
    assert blocks["blocks.1"] > 0.75 * sum(blocks.values())
    assert found.operators[0].module in ("blocks.1", "blocks.1.fc1", "blocks.1.fc2")
    assert {o.operator for o in found.operators if o.module == "blocks.1.fc1"} == {"matmul"}
    assert {o.operator for o in found.operators if o.module == "blocks.0.norm"} == {"norm"}
    assert found.trace is not None and "traceEvents" in json.loads((tmp_path / found.trace).read_text())


def test_eager_leaves_no_hook_behind() -> None:
    runner = EagerRunner(heavy())
    with runner:
        module = runner._module
        assert module is not None
        from optimize.profiles.torch_profile import marked

        with marked(module):
            assert module.blocks[0]._forward_pre_hooks  # type: ignore[index, union-attr]
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


def test_eager_and_onnx_runtime_tell_the_same_modules(demo_bundle: Path) -> None:
    """One table: the same paths and kinds from both, for every convolution, product and attention."""
    path = demo_bundle / "unet" / "unet.fp32.onnx"
    kinds = ("convolution", "matmul", "attention")
    eager, ort = (
        {(o.module, o.operator) for o in broken_down(r, FEEDS).operators if o.operator in kinds}
        for r in (EagerRunner(component_in(demo_bundle)), OnnxRuntimeRunner(path, threads=1))
    )
    assert len(eager) > 60 and eager == ort


@pytest.mark.parametrize("style", ["torch.compile", "torch.compile-regional"])
def test_compiled_kernels_find_their_modules(style: str) -> None:
    found = broken_down(CompiledRunner(heavy(), "fp32", style), X)
    check_sums(found)
    assert unmapped(found) < 0.05
    assert dict(by_module(found, 1))["blocks.1"] > 0.6 * found.run_ms
    products = {o.module for o in found.operators if o.operator == "matmul"}
    assert products == {f"blocks.{i}.fc{j}" for i in range(3) for j in (1, 2)}
    assert any("fused" in o.kernel and o.operator == "norm" for o in found.operators)


def test_a_package_shows_its_kernels(tmp_path: Path) -> None:
    """AOTInductor calls products past torch's dispatcher: only a package that is compiled with its kernels' names shows
    them, and one without says so."""
    from torch._inductor import config

    from optimize.compile.aoti import AotiRunner, package_from_component
    from optimize.profiles.torch_profile import told

    with config.patch({"cpp.enable_kernel_profile": True}):
        package_from_component(heavy(), "fp32", tmp_path / "heavy.pt2")
    found = broken_down(AotiRunner(tmp_path / "heavy.pt2", heavy()), X)
    check_sums(found)
    assert found.outside_ms < 0.3 * found.run_ms
    assert sum(o.ms for o in found.operators if o.operator == "matmul") > 0.5 * found.run_ms
    assert "without its kernels' names" in told([], marked=False, cuda=False)


def test_paths_of_compiled_modules() -> None:
    path = compiled_code.path_of
    assert path("L['self']._modules['module']._modules['blocks']._modules['0']") == "blocks.0"
    assert path("L['self'].blocks[0].fc1") == "blocks.0.fc1"
    assert path("L['s'].module_list[3]") == "module_list.3"
    assert path("L['self']") == ""


# --- TensorRT --------------------------------------------------------------------------------------------------------


def test_layers_of_a_real_engine_find_their_modules(demo_bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX builds without a GPU and lists its layers; times are made up, their mapping is not."""
    pytest.importorskip("tensorrt_rtx", reason="skipped: needs tensorrt-rtx")
    from optimize.compile.tensorrt import EngineSpec, engine_from_onnx

    path = demo_bundle / "text_encoder" / "text_encoder.fp16.onnx"
    shapes = {"input_ids": ((1, 1), (1, 16), (8, 16))}
    built = engine_from_onnx(path, tmp_path / "e.engine", spec=EngineSpec(sm=89), shapes=shapes)
    times = [(layer.name, 0.5) for layer in built.layers]
    pieces = list(engine_profile.pieces_of(times, built.layers))
    assert len(pieces) == len(built.layers) > 10
    modules = set(ort_profile.modules_in(path).values())
    assert {p.module for p in pieces} <= modules | {""}
    named = [p for p, layer in zip(pieces, built.layers, strict=True) if layer.onnx]
    assert len(named) > 0.5 * len(pieces) and sum(not p.module for p in named) < 0.2 * len(named)
    assert {"matmul", "attention"} <= {p.operator for p in pieces}
    attention = [p for p in pieces if p.operator == "attention"]
    assert all(p.module.endswith("self_attn") for p in attention)


INSPECTED = {
    "Layers": [
        {
            "Name": "fused_one", "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Format/Datatype": "Half"}], "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: a.b.fc/MatMul]\x1f[ONNX Layer: a.b.fc/Add]\x1f[ONNX Layer: a.b.act/Gelu_1]",
        },
        {"Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "Reformat", "Inputs": [], "Outputs": []},
        "a.norm/LayerNormalization",
    ]
}  # fmt: skip


def test_the_inspectors_description_is_read() -> None:
    layers = engine_profile.layers_from_json(json.dumps(INSPECTED))
    times = [(layer.name, 1.0) for layer in layers] + [("nobody", 1.0)]
    told = [(p.module, p.operator) for p in engine_profile.pieces_of(times, layers)]
    assert told == [("a.b.fc", "matmul"), ("", "layout"), ("a.norm", "norm"), ("", "other")]
    assert layers[0].reads == ("Half",)


def test_layers_make_a_trace() -> None:
    from optimize.profiles.operators import Run

    runs = [Run(3.0, [Piece("a", "matmul", "k1", 1.0), Piece("b", "norm", "k2", 0.5)])] * 2
    events = engine_profile.chrome_trace(runs)
    layers = [e for e in events if e["cat"] == "layer"]
    assert [e["ts"] for e in layers] == [0.0, 1000.0, 3000.0, 4000.0] and layers[1]["dur"] == 500.0


# --- the table -------------------------------------------------------------------------------------------------------


def test_pieces_of_several_runs_become_rows_of_one() -> None:
    first = [Piece("a", "matmul", "k", 2.0), Piece("a", "matmul", "k", 2.0), Piece("b", "norm", "n", 1.0)]
    rows = table([first, [Piece("a", "matmul", "k", 6.0)]])
    assert [(r.module, r.ms, r.calls) for r in rows] == [("a", 5.0, 1.5), ("b", 0.5, 0.5)]


def test_blocks() -> None:
    assert block_of("down_blocks.0.resnets.1.conv1", 1) == "down_blocks.0"
    assert block_of("down_blocks.0.resnets.1.conv1", 2) == "down_blocks.0.resnets.1"
    assert block_of("conv_in", 2) == "conv_in" and block_of("", 2) == ""
