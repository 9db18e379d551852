"""Channels that stand apart: which they are, and that what a graph makes of them is the reference, in integers."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from test_place import Given, constant, copied, graph, linear, norm_and_layer, normal, run, run_plain, written

import optimize
from optimize.compile.records import Receipt
from optimize.compile.runners import OnnxRuntimeRunner
from optimize.quantize import receipt, sensitivity
from optimize.quantize.calibrate import Seen, calibrate
from optimize.quantize.outliers import ENOUGH, largest, outliers
from optimize.quantize.place import Placement
from optimize.quantize.running import NO_QDQ, GraphSession, session_options
from optimize.quantize.scales import Histogram, dequantize, grid_of, quantize, spread, weight_scale
from optimize.quantize.schemes import FORMATS, SCHEMES
from optimize.quantize.sites import planned, sites_of
from optimize.quantize.smooth import Smoothing, candidates, smoothings


def placement(model: ir.Model, scheme: str, feeds: dict[str, torch.Tensor], smooth: bool = False) -> Placement:
    """As `optimize quantize` makes it, by minmax."""
    rules = SCHEMES[scheme]
    p = Placement(rules, "onnxruntime", "minmax", planned(sites_of(model), rules, "onnxruntime"))
    reads = [s.activation for s in p.chosen()]
    first = calibrate(copied(model), Path(), reads, Given([feeds]), by_channel=frozenset(reads))
    channels = {n: s.channels for n, s in first.seen.items() if s.channels is not None}
    if smooth:
        p = dataclasses.replace(p, smoothing=smoothings(model, candidates(model, p.sites), channels))
    p = dataclasses.replace(p, outliers=outliers(p.sites, channels, p.smoothing))
    divided = p.divisors()
    again = calibrate(copied(model), Path(), list(divided), Given([feeds]), divided=divided).seen if divided else {}
    return dataclasses.replace(p, calibration=dataclasses.replace(first, seen={**first.seen, **again}))


def with_outliers(*shape: int, channels: tuple[int, ...] = (3, 41), size: float = 40.0) -> torch.Tensor:
    x = torch.from_numpy(normal(*shape))
    x[..., list(channels)] *= size
    return x


@pytest.mark.parametrize(
    ("magnitudes", "expected"),
    [
        ([1.0] * 64, []),
        ([1.0] * 63 + [50.0], [60, 61, 62, 63]),  # as many as cost nothing more: 64 / 16
        ([50.0] + [1.0] * 62 + [2.0], [0, 61, 62, 63]),
        ([50.0] * 8 + [1.0] * 56, []),  # more than may be: the range would stay
        ([1.0] * 15 + [50.0], [15]),
        ([50.0] + [1.0] * 14, []),  # too few channels
        (list(np.linspace(1, 1 / ENOUGH, 1024)), []),
        ([50.0] * 16 + [1.0] * 1008, list(range(16))),
        ([50.0] * 17 + [1.0] * 1007, []),
        ([0.0] * 64, []),
    ],
)
def test_outliers_are_few_and_large(magnitudes: list[float], expected: list[int]) -> None:
    assert list(np.flatnonzero(largest(np.array(magnitudes)))) == expected


def test_only_what_linear_layers_read_stands_apart() -> None:
    """A convolution's input has one scale for both, and a layer that stays high needs nothing."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="layer/MatMul"),
        helper.make_node("Conv", ["x", "c"], ["k"], name="conv/Conv"),
        helper.make_node("MatMul", ["m", "v"], ["n"], name="next/MatMul"),
        helper.make_node("Add", ["n", "k"], ["y"]),
    ]
    weights = {"w": normal(64, 64), "v": normal(64, 64), "c": normal(7, 7, 1, 1)}
    model = graph(nodes, {"x": [1, 7, 63, 64]}, weights)
    sites = planned(sites_of(model), SCHEMES["int8"], "onnxruntime")
    channels = {n: np.array([50.0] + [1.0] * 63) for n in "xm"}
    assert list(outliers(sites, channels, {})) == ["m"]
    assert list(outliers([dataclasses.replace(s, stays="so") for s in sites], channels, {})) == []
    even = {"m": Smoothing("m", channels["m"], ())}
    assert list(outliers(sites, channels, even)) == []  # nothing stands out of what was smoothed


def reference(x: Any, w: Any, p: Placement, dynamic: bool) -> Any:
    """The paper's sum: eight bits without the outliers, floating point for them."""
    apart = np.flatnonzero(p.outliers["x"])
    few, rest, fmt = x.copy(), w.copy(), FORMATS["int8"]
    few[..., apart], rest[apart] = 0, 0
    if dynamic:
        seen = sensitivity.dynamic(torch.from_numpy(few)).numpy()
    else:
        scale, zero = p.grid("x")
        seen = dequantize(quantize(few, scale, p.activations, zero), scale, zero)
    rounded = dequantize(quantize(rest, s := spread(weight_scale(rest, fmt, 1), w.shape, 1), fmt), s)
    return seen @ rounded + x[..., apart] @ w[apart]


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 64, 32), (7, 63, 77), (77, 128, 40), (63, 520, 96)])
def test_the_graph_is_the_reference_in_integers(tmp_path: Path, scheme: str, rows: int, k: int, n: int) -> None:
    model = linear(rows, k, n)
    w, b = (constant(model, name) for name in "wb")
    feeds = {"x": with_outliers(2, rows, k)}
    p = placement(model, scheme, feeds)
    assert p.outliers and p.outliers["x"][[3, 41]].all()
    path = written(model, p, tmp_path)
    exact, expected = run_plain(model, feeds), reference(feeds["x"].numpy(), w, p, scheme == "int8-dynamic") + b
    assert np.allclose(run(path, feeds), expected, atol=2e-4 * np.abs(expected).max())
    assert receipt.exported(path, p) == receipt.kernels(path, p, tmp_path) == {"layer/MatMul"}
    whole = dataclasses.replace(placement(model, scheme, feeds), outliers={})
    if scheme == "int8":  # its grid is that of all channels
        again = calibrate(copied(model), Path(), ["x"], Given([feeds]))
        whole = dataclasses.replace(whole, calibration=again)
    (tmp_path / "whole").mkdir()
    apart, together = (
        np.linalg.norm(run(file, feeds) - exact) for file in (path, written(model, whole, tmp_path / "whole"))
    )
    assert apart < 0.3 * together  # 40 times larger channels, a few of them


@pytest.mark.parametrize("batch", [1, "batch"])
def test_a_gemm_with_outliers_and_a_bias(tmp_path: Path, batch: int | str) -> None:
    """Where all sizes are known ONNX Runtime would make a Gemm of a product and any sum of its shape."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer/Gemm", transB=1)]
    model = graph(nodes, {"x": [batch, 64]}, {"w": normal(77, 64) * 0.1, "b": normal(77)})
    feeds = {"x": with_outliers(1, 64)}
    p = placement(model, "int8", feeds)
    path = written(model, p, tmp_path)
    w, b = (constant(model, name) for name in "wb")
    expected = reference(feeds["x"].numpy(), w.T, p, False) + b
    assert np.allclose(run(path, feeds), expected, atol=2e-4 * np.abs(expected).max())
    assert receipt.kernels(path, p, tmp_path) == {"layer/Gemm"}


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_layers_that_read_the_same_gather_once(tmp_path: Path, scheme: str) -> None:
    nodes = [helper.make_node("MatMul", ["x", n], [f"{n}x"], name=f"{n}/MatMul") for n in "qkv"]
    nodes += [helper.make_node("Add", ["qx", "kx"], ["s"]), helper.make_node("Add", ["s", "vx"], ["y"])]
    model = graph(nodes, {"x": ["batch", 7, 64]}, {n: normal(64, 64) * 0.1 for n in "qkv"})
    feeds = {"x": with_outliers(1, 7, 64)}
    path = written(model, placement(model, scheme, feeds), tmp_path)
    kinds = Counter(n.op_type for n in onnx.load(path, load_external_data=False).graph.node)
    assert kinds["Gather"] == 1 and kinds["Sub"] == 3
    exact = run_plain(model, feeds)
    assert np.linalg.norm(run(path, feeds) - exact) / np.linalg.norm(exact) < 0.02


def test_a_smoothed_input_can_have_outliers_too(tmp_path: Path) -> None:
    """What stands apart is read from the norm that was divided, and by weights that were multiplied."""
    model, feeds = norm_and_layer(5000)
    p = placement(model, "int8", feeds, smooth=True)
    assert p.smoothing and p.outliers and p.outliers["n"][7]
    path, exact = written(model, p, tmp_path), run_plain(model, feeds)
    assert np.linalg.norm(run(path, feeds) - exact) / np.linalg.norm(exact) < 1e-3  # nearly all of it is channel 7
    assert receipt.kernels(path, p, tmp_path) == {"layer/MatMul"}


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_the_effect_that_is_measured_is_the_graphs(tmp_path: Path, scheme: str) -> None:
    model = linear(7, 64, 32)
    feeds = {"x": with_outliers(1, 7, 64)}
    p = placement(model, scheme, feeds)
    exact, got = run_plain(model, feeds), run(written(model, p, tmp_path), feeds, **{NO_QDQ: "1"})
    (effect,) = sensitivity.effects(copied(model), Path(), p, [feeds])
    assert effect.error == pytest.approx(np.linalg.norm(got - exact) / np.linalg.norm(exact), rel=0.02)


# --- sums before norms -----------------------------------------------------------------------------------------------


def test_a_sum_is_not_fused_into_a_norm(tmp_path: Path) -> None:
    """ONNX Runtime's kernel for both is slower than the two: neither an int8 graph nor a runner of ours has it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="layer/MatMul"),
        helper.make_node("Add", ["m", "x"], ["s"], name="block/Add"),
        helper.make_node("LayerNormalization", ["s", "g", "h"], ["y"], name="norm/LayerNormalization"),
    ]
    weights = {"w": normal(64, 64), "g": normal(64), "h": normal(64)}
    model = graph(nodes, {"x": ["batch", 7, 64]}, weights, TensorProto.FLOAT)
    feeds = {"x": torch.from_numpy(normal(3, 7, 64))}

    ir.save(copied(model), tmp_path / "plain.onnx")
    assert "SkipLayerNormalization" in optimized(tmp_path / "plain.onnx")  # else the rewrite can go
    path = written(model, placement(model, "int8", feeds), tmp_path)
    assert {"Sum", "LayerNormalization"} <= set(kinds := optimized(path)) and "SkipLayerNormalization" not in kinds
    GraphSession(copied(model), tmp_path, options=session_options(tmp_path / "ours.onnx"))  # receipts are timed in it
    assert "LayerNormalization" in {n.op_type for n in onnx.load(tmp_path / "ours.onnx").graph.node}
    exact = run_plain(model, feeds)
    assert np.linalg.norm(run(path, feeds) - exact) / np.linalg.norm(exact) < 0.03
    with OnnxRuntimeRunner(tmp_path / "plain.onnx", trace=tmp_path / "trace") as runner:
        assert np.allclose(runner.infer(feeds)["y"].numpy(), exact, atol=1e-5)
        trace = Path(runner._session.end_profiling()).read_text()
    assert "SkipLayerNormalization" not in trace and "LayerNormalization" in trace


def optimized(path: Path) -> Counter[str]:
    """The kinds of nodes that ONNX Runtime makes of a file by itself."""
    options = session_options(path.parent / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path.parent / "optimized.onnx", load_external_data=False).graph
    return Counter(n.op_type for n in graph.node)


def test_other_sums_stay_as_they_are(tmp_path: Path) -> None:
    """A residual that is read on, as in pre-norm networks, and a bias: ONNX Runtime fuses neither into a norm."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="layer/MatMul"),
        helper.make_node("Add", ["m", "b"], ["a"], name="layer/Add"),
        helper.make_node("LayerNormalization", ["a", "g", "b"], ["n"], name="norm/LayerNormalization"),
        helper.make_node("Add", ["n", "x"], ["s"], name="block/Add"),
        helper.make_node("LayerNormalization", ["s", "g", "b"], ["o"], name="last/LayerNormalization"),
        helper.make_node("Mul", ["o", "s"], ["y"], name="last/Mul"),
    ]
    model = graph(nodes, {"x": ["batch", 7, 64]}, {"w": normal(64, 64), "g": normal(64), "b": normal(64)})
    path = written(model, placement(model, "int8-dynamic", {"x": torch.from_numpy(normal(1, 7, 64))}), tmp_path)
    assert "Sum" not in {n.op_type for n in onnx.load(path, load_external_data=False).graph.node}


def test_a_bias_stays_in_the_dynamic_kernel(tmp_path: Path) -> None:
    model, feeds = linear(7, 64, 32), {"x": with_outliers(1, 7, 64)}
    kinds = optimized(written(model, placement(model, "int8-dynamic", feeds), tmp_path))
    assert kinds == {"DynamicQuantizeMatMul": 1, "Mul": 1, "Gather": 1, "MatMul": 1, "Sub": 1}


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_a_grid_is_that_of_the_other_channels(method: str) -> None:
    """What is multiplied apart is not counted, not as zeros either; a sample of no rows counts as none."""
    model, feeds = linear(77, 64, 32), {"x": with_outliers(1, 77, 64)}
    p = placement(model, "int8", feeds)
    seen = calibrate(copied(model), Path(), ["x"], Given([feeds, feeds]), divided=p.divisors()).seen["x"].histogram
    assert seen.counts.sum() == 2 * 77 * 60 and seen.zeros == 0
    few = feeds["x"][..., torch.from_numpy(~p.outliers["x"])]
    alone = Histogram()
    alone.add(few)
    alone.add(few)
    assert grid_of(seen, method, p.activations) == grid_of(alone, method, p.activations)
    empty = Seen()
    empty.add(torch.zeros(1, 0, 64), True)
    assert empty.channels is None and not empty.histogram.counts.any()


# --- as a user -------------------------------------------------------------------------------------------------------


class Hot(torch.nn.Module):
    """A post-norm block: its norm's output, with one channel far above the rest, is read by a residual too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(64), torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
        with torch.no_grad():
            self.norm.weight[5] = 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return torch.nn.functional.layer_norm(h + self.down(torch.nn.functional.gelu(self.up(h))), (64,))


class Even(torch.nn.Module):
    """A norm that only a linear layer reads, one channel twice as large: SmoothQuant evens it out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = torch.nn.LayerNorm(64), torch.nn.Linear(64, 128)
        with torch.no_grad():
            self.norm.weight[5] = 2
            self.up.weight.copy_(0.1 * self.up.weight.sign())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.up(self.norm(x)))


def exported_block(block: torch.nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    spec = optimize.TensorSpec("x", ("batch", "tokens", 64))
    axes = [optimize.Axis("batch", 1, 2, 4), optimize.Axis("tokens", 1, 63, 77)]
    module = types.ModuleType("hot_block")
    vars(module)["block"] = lambda: optimize.Component.from_module(block, [spec], ["y"], axes)
    monkeypatch.setitem(sys.modules, "hot_block", module)
    optimize.export("python:hot_block:block", folder)
    return folder


def receipts(folder: Path, scheme: str, word: str) -> list[Receipt]:
    """With and without what the word stands for."""
    words: dict[str, Any] = {"scheme": scheme, "samples": 8, "budgets": ["cosine>=0.9"], "trust_remote_code": True}
    found = []
    for value in (True, False):
        optimize.quantize(folder, **words, **{word: value})
        (made,) = (a for a in optimize.Bundle.read(folder).manifest.artifacts.values() if a.receipt)
        assert made.receipt is not None
        found.append(made.receipt)
    return found


def test_what_smoothing_evens_out_stays_in_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    smooth, plain = receipts(exported_block(Even(), tmp_path / "b", monkeypatch), "int8", "smooth")
    assert (smooth.smoothed, smooth.split) == (1, 0)
    assert (plain.smoothed, plain.split) == (0, 1)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_layers_with_outliers_are_quantized_and_the_manifest_says_how(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    apart, together = receipts(exported_block(Hot(), tmp_path / "b", monkeypatch), scheme, "outliers")
    assert (apart.split, together.split) == (1, 0)
    assert apart.chosen == apart.exported == apart.kernels == 2
    whys = {x.module: x.why for x in apart.layers}
    assert whys == {"up": "4 outlier channels of its input stay in the base precision", "down": ""}
    assert apart.quality[0].snr > together.quality[0].snr + 6
