"""Placement: each kind of layer, quantized for each runtime, computes what the NumPy reference says, in int8."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from optimize.compile import external
from optimize.errors import InputError
from optimize.quantize import receipt
from optimize.quantize.calibrate import Calibration, Seen
from optimize.quantize.place import Placement, placed
from optimize.quantize.running import NO_QDQ, GraphSession, session_options
from optimize.quantize.scales import dequantize, quantize, scale_of, spread, weight_scale
from optimize.quantize.schemes import FORMATS, SCHEMES, scheme_for
from optimize.quantize.sites import planned, sites_of
from optimize.quantize.smooth import candidates, smoothings

RNG = np.random.default_rng(0)
RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not RTX, reason="skipped: needs tensorrt-rtx")


def graph(
    nodes: list[Any], inputs: dict[str, list[Any]], weights: dict[str, Any], kind: int = TensorProto.FLOAT
) -> ir.Model:
    values = [helper.make_tensor_value_info(n, kind, shape) for n, shape in inputs.items()]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    made = helper.make_graph(
        nodes,
        "g",
        values,
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(w.astype(dtype) if w.dtype == np.float32 else w, n) for n, w in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def constant(model: ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def norm_and_layer(gain: float) -> tuple[ir.Model, dict[str, torch.Tensor]]:
    """A norm whose channel 7 is so much larger, and a layer that alone reads it; feeds for them."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "h"], ["n"], name="norm/LayerNormalization"),
        helper.make_node("MatMul", ["n", "w"], ["y"], name="layer/MatMul"),
    ]
    gains = np.ones(64, np.float32)
    gains[7] = gain
    model = graph(nodes, {"x": [1, 77, 64]}, {"g": gains, "h": np.zeros(64, np.float32), "w": normal(64, 32)})
    return model, {"x": torch.from_numpy(normal(1, 77, 64))}


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def linear(rows: int, k: int, n: int, kind: int = TensorProto.FLOAT, batch: int | str = "batch") -> ir.Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="layer/MatMul"),
        helper.make_node("Add", ["m", "b"], ["y"], name="layer/Add"),
    ]
    return graph(nodes, {"x": [batch, rows, k]}, {"w": normal(k, n) * 0.1, "b": normal(n)}, kind)


def conv(channels: int, out: int, size: int, **attributes: Any) -> ir.Model:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="layer/Conv", **attributes)
    shape = ["batch", channels, size, size + 1]
    group = attributes.get("group", 1)
    return graph([node], {"x": shape}, {"w": normal(out, channels // group, 3, 3) * 0.1, "b": normal(out)})


def placement(model: ir.Model, scheme: str, runtime: str, feeds: list[dict[str, torch.Tensor]]) -> Placement:
    rules = scheme_for(scheme, runtime, 23)
    p = Placement(rules, runtime, "minmax", planned(sites_of(model), rules, runtime))
    if not p.taps():
        return p
    from optimize.quantize.calibrate import calibrate

    return Placement(rules, runtime, "minmax", p.sites, calibrate(copied(model), Path(), p.taps(), Given(feeds)))


class Given(list[dict[str, torch.Tensor]]):
    def digest(self) -> str:
        return "given"


def copied(model: ir.Model) -> ir.Model:
    return ir.serde.deserialize_model(ir.serde.serialize_model(model))


def written(model: ir.Model, p: Placement, folder: Path) -> Path:
    made = placed(copied(model), p)
    external.write_weights(made, folder / "w.safetensors", {}, lambda *_: None)
    external.inline_small(made)
    external.point_at(made, "w.safetensors", external.header_bytes(folder / "w.safetensors"))
    path = folder / "g.onnx"
    ir.save(made, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def run(path: Path, feeds: dict[str, torch.Tensor], **entries: str) -> Any:
    return GraphSession(ir.load(path), path.parent, options=session_options(None, 0, **entries)).run(feeds)["y"].numpy()


def fake(x: Any, scale: Any, fmt: Any) -> Any:
    return dequantize(quantize(x, scale, fmt), scale)


def grid_between(low: float, high: float, runtime: str) -> tuple[Any, int, Any]:
    """(scale, zero, format) of an activation with those extremes, as minmax has it."""
    if runtime == "tensorrt":
        return scale_of(max(-low, high), FORMATS["int8"]), 0, FORMATS["int8"]
    scale = np.float32((max(high, 0.0) - min(low, 0.0)) / 255)
    return scale, round(-min(low, 0.0) / float(scale)), FORMATS["uint8"]


def seen_as(x: Any, low: float, high: float, runtime: str) -> Any:
    scale, zero, fmt = grid_between(low, high, runtime)
    return dequantize(quantize(x, scale, fmt, zero), scale, zero)


def skewed(x: Any, side: str) -> Any:
    """The numbers as they come, none below zero, or hardly any above."""
    return {"both": x, "above": np.maximum(x, 0), "below": np.where(x > 0, 0.07 * x, x)}[side].astype(np.float32)


@pytest.mark.parametrize("side", ["both", "above", "below"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 64, 32), (7, 63, 77), (77, 128, 40)])
def test_linear_is_the_reference(tmp_path: Path, side: str, runtime: str, rows: int, k: int, n: int) -> None:
    model = linear(rows, k, n)
    w, b = (constant(model, name) for name in "wb")
    feeds = {"x": torch.from_numpy(skewed(normal(2, rows, k), side))}
    p = placement(model, "int8", runtime, [feeds])
    path = written(model, p, tmp_path)
    x, fmt = feeds["x"].numpy(), FORMATS["int8"]
    rounded = fake(w, spread(weight_scale(w, fmt, 1), w.shape, 1), fmt)
    expected = seen_as(x, x.min(), x.max(), runtime) @ rounded + b
    assert np.allclose(run(path, feeds), expected, atol=1e-4)
    assert np.allclose(run(path, feeds, **{NO_QDQ: "1"}), expected, atol=1e-4)
    assert receipt.exported(path, p) == {"layer/MatMul"}


@pytest.mark.parametrize(
    "attributes",
    [{"pads": [1, 1, 1, 1]}, {"pads": [0, 1, 2, 0], "strides": [2, 2]}, {"dilations": [2, 1]}, {"group": 2}],
)
@pytest.mark.parametrize("side", ["both", "above"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_convolution_is_the_reference(tmp_path: Path, side: str, runtime: str, attributes: dict[str, Any]) -> None:
    """Padding is zero whatever the zero point is; the output's range has the bias in it."""
    from optimize.quantize.sensitivity import product

    model = conv(6, 10, 11, **attributes)
    w, b = (constant(model, name) for name in "wb")
    feeds = {"x": torch.from_numpy(skewed(normal(3, 6, 11, 12), side))}
    p = placement(model, "int8", runtime, [feeds])
    path = written(model, p, tmp_path)
    x, fmt = feeds["x"].numpy(), FORMATS["int8"]
    rounded = fake(w, spread(weight_scale(w, fmt, 0), w.shape, 0), fmt)
    seen = torch.from_numpy(seen_as(x, x.min(), x.max(), runtime))
    exact = product("conv", seen, torch.from_numpy(rounded), attributes).numpy() + b[:, None, None]
    got, step = run(path, feeds), 0.0
    if runtime == "onnxruntime":  # the output is quantized too: a tie may fall either way
        whole = run_plain(model, feeds)
        step, exact = p.grid("y").scale, seen_as(exact, whole.min(), whole.max(), runtime)
    assert np.abs(got - exact).max() <= step * 1.001 + 1e-4
    assert np.abs(got - exact).mean() <= step * 0.01 + 1e-4


def test_the_bias_of_a_channel_without_weights_is_kept(tmp_path: Path) -> None:
    """ONNX Runtime writes it as an int32 in units of the scales: those of a channel of zeros must not be near zero."""
    model = conv(6, 10, 11)
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    w = tensor.numpy().copy()
    w[3], w[7] = 0, 1e-30
    model.graph.initializers["w"].const_value = ir.tensor(w, name="w")
    feeds = {"x": torch.from_numpy(normal(3, 6, 11, 12))}
    p = placement(model, "int8", "onnxruntime", [feeds])
    got, exact = run(written(model, p, tmp_path), feeds), run_plain(model, feeds)
    assert np.abs(got - exact)[:, [3, 7]].max() <= p.grid("y").scale
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.parametrize("scheme", ["int8", "int4-weight", "fp8"])
def test_an_fp16_graph_has_no_scale_of_zero(tmp_path: Path, scheme: str) -> None:
    """A channel without weights and an input that is always zero: fp16 has none of fp32's smallest numbers."""
    model = linear(7, 64, 96, TensorProto.FLOAT16)
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    w = tensor.numpy().copy()
    w[:, 5] = 0
    model.graph.initializers["w"].const_value = ir.tensor(w, name="w")
    feeds = {"x": torch.zeros(1, 7, 64).half()}
    p = placement(model, scheme, "tensorrt", [feeds])
    assert receipt.exported(written(model, p, tmp_path), p) == {"layer/MatMul"}


def test_a_product_of_a_constant_is_left_alone() -> None:
    nodes = [
        helper.make_node("MatMul", ["c", "w"], ["m"], name="layer/MatMul"),
        helper.make_node("Add", ["m", "x"], ["y"]),
    ]
    model = graph(nodes, {"x": [7, 8]}, {"c": normal(7, 8), "w": normal(8, 8)})
    (found,) = sites_of(model)
    assert "constant" in found.stays


def test_a_weight_that_is_read_both_ways_is_written_both_ways(tmp_path: Path) -> None:
    """For TensorRT nodes share what they read alike: here one reads the transpose."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="in/Gemm", transB=1),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="out/MatMul"),
    ]
    model = graph(nodes, {"x": [7, 64]}, {"w": normal(64, 64) * 0.1})
    feeds = {"x": torch.from_numpy(normal(7, 64))}
    p = placement(model, "int8", "tensorrt", [feeds])
    got, exact = run(written(model, p, tmp_path), feeds, **{NO_QDQ: "1"}), run_plain(model, feeds)
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.03


@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize(
    ("scheme", "rows"), [("int8", 1), ("int8", 77), ("int8-dynamic", 7), ("int8-weight", 63), ("int4-weight", 7)]
)
def test_onnx_runtime_computes_in_integers(tmp_path: Path, scheme: str, rows: int, batch: int | str) -> None:
    """The receipt's last count, on layers with a bias of rank 1, which ONNX Runtime otherwise makes a Gemm of."""
    model = linear(rows, 64, 96, batch=batch)
    feeds = {"x": torch.from_numpy(normal(1, rows, 64))}
    p = placement(model, scheme, "onnxruntime", [feeds])
    path = written(model, p, tmp_path)
    assert receipt.exported(path, p) == {"layer/MatMul"}
    assert receipt.kernels(path, p, tmp_path) == {"layer/MatMul"}
    error = np.linalg.norm(run(path, feeds) - run_plain(model, feeds)) / np.linalg.norm(run_plain(model, feeds))
    assert error < (0.2 if scheme == "int4-weight" else 0.02)


def run_plain(model: ir.Model, feeds: dict[str, torch.Tensor]) -> Any:
    return GraphSession(model, Path()).run(feeds)["y"].numpy()


def test_a_bias_of_rank_one_is_what_breaks_onnx_runtime(tmp_path: Path) -> None:
    """The reason for `unmerge_bias`: where sizes are static it merges product and bias into a Gemm, which
    it has no int8 kernel for. When this fails, ONNX Runtime was mended and the pass can go."""
    model = linear(7, 64, 96, batch=1)
    feeds = {"x": torch.from_numpy(normal(1, 7, 64))}
    p = placement(model, "int8", "tensorrt", [feeds])  # the same without the lifted bias, and in int8
    path = written(model, p, tmp_path)
    try:
        assert not receipt.kernels(path, p, tmp_path)
    except ort.capi.onnxruntime_pybind11_state.Fail as e:
        assert "does not match y_zero_point" in str(e)


def test_convolutions_become_integer_kernels(tmp_path: Path) -> None:
    model = conv(8, 16, 9, pads=[1, 1, 1, 1])
    p = placement(model, "int8", "onnxruntime", [{"x": torch.from_numpy(normal(1, 8, 9, 10))}])
    path = written(model, p, tmp_path)
    assert receipt.kernels(path, p, tmp_path) == {"layer/Conv"}


@pytest.mark.parametrize(("scheme", "block"), [("int8-weight", 16), ("int8-weight", 64), ("int4-weight", 128)])
@pytest.mark.parametrize("k", [128, 77])
def test_blocks_of_weights_share_a_scale(tmp_path: Path, scheme: str, block: int, k: int) -> None:
    """Also where the last block is not full. More scales, a smaller error than one for each channel."""
    model = linear(7, k, 96)
    feeds = {"x": torch.from_numpy(normal(1, 7, k))}
    rules = scheme_for(scheme, "onnxruntime", 23, block=block)
    p = Placement(rules, "onnxruntime", "minmax", planned(sites_of(model), rules, "onnxruntime"))
    path = written(model, p, tmp_path)
    assert receipt.exported(path, p) == {"layer/MatMul"}
    w, b = (constant(model, name) for name in "wb")
    fmt = FORMATS[rules.weights]
    rounded = fake(w, spread(weight_scale(w, fmt, 1, block), w.shape, 1, block), fmt)
    assert np.allclose(run(path, feeds, **{NO_QDQ: "1"}), feeds["x"].numpy() @ rounded + b, atol=1e-3)
    assert np.allclose(run(path, feeds), feeds["x"].numpy() @ rounded + b, atol=0.05)


def test_blocks_that_make_no_sense_are_refused() -> None:
    for scheme, block in (("int8", 32), ("int8-weight", 7), ("int4-weight", -1)):
        with pytest.raises(InputError, match="cannot share scales in blocks"):
            scheme_for(scheme, "onnxruntime", 23, block=block)
    with pytest.raises(InputError, match="opset 18"):
        scheme_for("int8-weight", "onnxruntime", 18, block=32)


@pytest.mark.parametrize("scheme", ["int8", "int8-weight", "int4-weight"])
def test_weights_are_stored_in_few_bits(tmp_path: Path, scheme: str) -> None:
    model = linear(7, 256, 256)
    p = placement(model, scheme, "onnxruntime", [{"x": torch.from_numpy(normal(1, 7, 256))}])
    path = written(model, p, tmp_path)
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    large = [t for t in tensors if np.prod(t.dims) == 256 * 256]
    assert [t.data_type for t in large] == [getattr(TensorProto, FORMATS[SCHEMES[scheme].weights].onnx)]
    bits = FORMATS[SCHEMES[scheme].weights].bits
    assert (tmp_path / "w.safetensors").stat().st_size < 256 * 256 * bits / 8 + 256 * 256 / 8 + 8000


def test_layers_that_share_an_input_have_quantizers_as_the_runtime_wants_them(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"], name=f"l{i}/MatMul") for i in range(3)]
    nodes.append(helper.make_node("Sum", ["m0", "m1", "m2"], ["y"], name="sum"))
    model = graph(nodes, {"x": [1, 7, 64]}, {f"w{i}": normal(64, 64) for i in range(3)})
    feeds = [{"x": torch.from_numpy(normal(1, 7, 64))}]
    for runtime, count in (("onnxruntime", 3), ("tensorrt", 1)):
        p = placement(model, "int8", runtime, feeds)
        path = written(model, p, tmp_path)
        ops = [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]
        assert ops.count("QuantizeLinear") == count
        if runtime == "onnxruntime":
            assert len(receipt.kernels(path, p, tmp_path)) == 3


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weight"])
@pytest.mark.parametrize("batch", [5, "batch"])
def test_a_gemm_becomes_a_product_and_a_sum(tmp_path: Path, scheme: str, batch: int | str) -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer/Gemm", transB=1)
    model = graph([node], {"x": [batch, 64]}, {"w": normal(40, 64), "b": normal(40)})
    feeds = {"x": torch.from_numpy(normal(5, 64))}
    p = placement(model, scheme, "onnxruntime", [feeds])
    path = written(model, p, tmp_path)
    assert receipt.exported(path, p) == receipt.kernels(path, p, tmp_path) == {"layer/Gemm"}
    exact = run_plain(model, feeds)
    assert np.linalg.norm(run(path, feeds) - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weight", "int4-weight"])
def test_a_head_that_reads_the_table_of_embeddings_is_a_layer_too(tmp_path: Path, scheme: str) -> None:
    """The table itself stays as it is for those who gather from it."""
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["x"], name="wte/Gather"),
        helper.make_node("Transpose", ["w"], ["t"], name="head/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="head/MatMul"),
    ]
    values = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 7])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    table = numpy_helper.from_array(normal(96, 64), "w")
    plain = helper.make_model(
        helper.make_graph(nodes, "g", values, outputs, [table]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    made = ir.from_proto(onnx.shape_inference.infer_shapes(plain))
    feeds = {"ids": torch.arange(7)[None]}
    p = placement(made, scheme, "onnxruntime", [feeds])
    assert [s.name for s in p.chosen()] == ["head/MatMul"]
    path = written(made, p, tmp_path)
    assert receipt.exported(path, p) == receipt.kernels(path, p, tmp_path) == {"head/MatMul"}
    exact = run_plain(made, feeds)
    error = np.linalg.norm(run(path, feeds) - exact) / np.linalg.norm(exact)
    assert error < (0.2 if scheme == "int4-weight" else 0.02)


def test_smoothing_changes_nothing_but_the_rounding(tmp_path: Path) -> None:
    """A channel that is 50 times larger than the others: without smoothing it takes all the steps."""
    model, feeds = norm_and_layer(50)
    plain = placement(model, "int8", "tensorrt", [feeds])
    groups = candidates(model, plain.sites)
    assert list(groups) == ["n"]
    normed = GraphSession(copied(model), Path(), ["n"]).run(feeds)["n"]
    vectors = smoothings(model, groups, {"n": normed.abs().reshape(-1, 64).amax(0).numpy()})
    seen = {"n": Seen()}
    seen["n"].add(normed / torch.from_numpy(vectors["n"].divisor), False)
    smooth = Placement(plain.scheme, "tensorrt", "minmax", plain.sites, Calibration(seen, 1, "x"), vectors)
    exact = run_plain(model, feeds)
    errors = {}
    for name, p in (("plain", plain), ("smooth", smooth)):
        (tmp_path / name).mkdir()
        got = run(written(model, p, tmp_path / name), feeds, **{NO_QDQ: "1"})
        errors[name] = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert errors["smooth"] < 0.5 * errors["plain"]


def test_an_activation_that_others_read_is_not_smoothed() -> None:
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "h"], ["n"], name="norm/LayerNormalization"),
        helper.make_node("MatMul", ["n", "w"], ["m"], name="layer/MatMul"),
        helper.make_node("Add", ["m", "n"], ["y"], name="residual/Add"),
    ]
    weights = {"g": np.ones(8, np.float32), "h": np.zeros(8, np.float32), "w": normal(8, 8)}
    model = graph(nodes, {"x": [1, 7, 8]}, weights)
    sites = planned(sites_of(model), SCHEMES["int8"], "onnxruntime")
    assert candidates(model, sites) == {}


def test_what_is_quantized_is_refused(tmp_path: Path) -> None:
    model = linear(7, 64, 96)
    p = placement(model, "int8-weight", "onnxruntime", [])
    path = written(model, p, tmp_path)
    with pytest.raises(InputError, match="quantized already"):
        sites_of(ir.load(path))


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no layer matches lyer"):
        planned(sites_of(linear(7, 64, 96)), SCHEMES["int8"], "onnxruntime", ["lyer"])


def test_schemes_that_a_target_cannot_run_are_refused() -> None:
    with pytest.raises(InputError, match="fp8 cannot run on SM86"):
        scheme_for("fp8", "tensorrt", 23, (86,))
    with pytest.raises(InputError, match="no kernels for int8-dynamic"):
        scheme_for("int8-dynamic", "tensorrt", 23)
    with pytest.raises(InputError, match="opset 18 has no tensors of int4-weight"):
        scheme_for("int4-weight", "onnxruntime", 18)


@needs_rtx
@pytest.mark.parametrize("sm", [89, 120])
@pytest.mark.parametrize("scheme", ["int8", "int8-weight", "fp8", "int4-weight"])
def test_tensorrt_rtx_builds_an_engine_of_few_bits(tmp_path: Path, scheme: str, sm: int) -> None:
    """The last count of a receipt for TensorRT: the engine computes the layer from inputs of few bits."""
    from optimize.compile.tensorrt import EngineSpec, engine_from_onnx

    model = linear(64, 128, 256, TensorProto.FLOAT16)
    feeds = {"x": torch.from_numpy(normal(1, 64, 128)).half()}
    p = placement(model, scheme, "tensorrt", [feeds])
    path = written(model, p, tmp_path)
    shape = ((1, 64, 128), (2, 64, 128), (4, 64, 128))
    build = engine_from_onnx(path, tmp_path / "g.engine", {"x": shape}, EngineSpec(sm=sm))
    assert receipt.layers_in_engine(build.layers, [x.name for x in p.chosen()]) == {"layer/MatMul"}, build.layers


@needs_rtx
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_tensorrt_rtx_builds_convolutions_of_few_bits(tmp_path: Path, scheme: str) -> None:
    from optimize.compile.tensorrt import EngineSpec, engine_from_onnx

    model = conv(32, 64, 16, pads=[1, 1, 1, 1])
    p = placement(model, scheme, "tensorrt", [{"x": torch.from_numpy(normal(1, 32, 16, 17))}])
    path = written(model, p, tmp_path)
    shape = ((1, 32, 16, 17), (1, 32, 16, 17), (2, 32, 16, 17))
    build = engine_from_onnx(path, tmp_path / "g.engine", {"x": shape}, EngineSpec(sm=89))
    assert receipt.layers_in_engine(build.layers, [x.name for x in p.chosen()]) == {"layer/Conv"}, build.layers
