"""Scales: the NumPy references are right, agree with ONNX Runtime's Q and DQ, and each method does what it says."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper

from optimize.errors import InputError
from optimize.quantize.scales import (
    BINS,
    Histogram,
    amax_of,
    dequantize,
    grid_of,
    quantize,
    scale_of,
    spread,
    squared_error,
    weight_scale,
)
from optimize.quantize.schemes import FORMATS, METHODS

INT8, UINT8, INT4, E4M3 = FORMATS["int8"], FORMATS["uint8"], FORMATS["int4"], FORMATS["e4m3"]
floats = st.floats(-1e4, 1e4, width=32, allow_nan=False)
tensors = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=7), elements=floats)


@given(tensors, st.sampled_from([INT8, INT4]))
def test_rounding_is_at_most_half_a_step_and_repeating_it_changes_nothing(x, fmt) -> None:
    scale = scale_of(np.abs(x).max(), fmt)
    once = dequantize(quantize(x, scale, fmt), scale)
    assert np.abs(once - x).max() <= scale * 0.5000001 + np.abs(x).max() * 1e-6
    assert np.array_equal(dequantize(quantize(once, scale, fmt), scale), once)


@given(tensors)
def test_it_is_symmetric_and_keeps_zero(x) -> None:
    scale = scale_of(np.abs(x).max(), INT8)
    assert np.array_equal(quantize(-x, scale, INT8), -quantize(x, scale, INT8))
    assert not quantize(np.zeros_like(x), scale, INT8).any()


@given(tensors)
def test_floats_of_eight_bits_keep_three_bits_of_each_number(x) -> None:
    scale = scale_of(np.abs(x).max(), E4M3)
    got = dequantize(quantize(x, scale, E4M3), scale)
    normal = np.abs(x) > scale * 2**-6
    assert np.all(np.abs(got - x)[normal] <= np.abs(x)[normal] * 2**-4 * 1.0001)


@pytest.mark.parametrize(
    ("kind", "fmt", "zero"),
    [(TensorProto.INT8, INT8, 0), (TensorProto.FLOAT8E4M3FN, E4M3, 0), (TensorProto.UINT8, UINT8, 7)],
)
@settings(max_examples=25, deadline=None)
@given(x=arrays.arrays(np.float32, 63, elements=floats), amax=st.floats(0.1, 1e4))
def test_onnx_runtime_agrees(kind, fmt, zero, x, amax) -> None:
    """QuantizeLinear goes down to -128, our weights and references to -127: the same but for that one number."""
    scale = scale_of(amax, fmt)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    initializers = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [float(scale)]),
        helper.make_tensor("z", kind, [], [zero]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [63]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    ours = dequantize(quantize(x, scale, fmt, zero), scale, zero)
    below = np.isclose(got, -128 * scale) if fmt is INT8 else np.zeros(63, bool)
    assert np.allclose(got[~below], ours[~below], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (1, 1, 1, 1), (63, 77, 1, 1)])
def test_a_convolution_has_a_scale_per_output_channel(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    scale = weight_scale(weight, INT8, 0)
    assert scale.shape == shape[:1]
    q = quantize(weight, spread(scale, shape, 0), INT8)
    assert np.array_equal(np.abs(q).reshape(shape[0], -1).max(1), np.full(shape[0], 127))


@pytest.mark.parametrize("rows", [1, 31, 32, 77])
def test_blocks_have_scales_of_their_own(rows: int) -> None:
    weight = np.random.default_rng(1).standard_normal((rows, 5)).astype(np.float32)
    scale = weight_scale(weight, INT4, 1, 32)
    assert scale.shape == (-(-rows // 32), 5)
    q = quantize(weight, spread(scale, weight.shape, 1, 32), INT4)
    assert np.abs(q).max() == 7
    assert np.abs(dequantize(q, spread(scale, weight.shape, 1, 32)) - weight).max() <= scale.max() / 2 * 1.001


def test_a_channel_of_zeros_has_a_scale_that_divides() -> None:
    scale = weight_scale(np.zeros((3, 4), np.float32), INT8, 0)
    assert (scale > 0).all()
    assert not quantize(np.zeros((3, 4)), spread(scale, (3, 4), 0), INT8).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(arrays.arrays(np.float32, st.integers(1, 77), elements=floats), min_size=1, max_size=5))
def test_a_histogram_counts_every_number_whatever_the_order(parts) -> None:
    one, other = Histogram(), Histogram()
    for part in parts:
        one.add(torch.from_numpy(part))
    for part in reversed(parts):
        other.add(torch.from_numpy(part))
    assert one.counts.sum() == other.counts.sum() == sum(p.size for p in parts)
    assert one.largest == other.largest == max(np.abs(p).max() for p in parts)
    whole = np.concatenate(parts)
    assert (one.low, one.high) == (min(whole.min(), 0), max(whole.max(), 0))
    assert (whole < -one.width).sum() <= one.counts[1].sum() <= (whole < 0).sum()
    assert one.width == 0 or one.width * BINS > one.largest


def test_a_histogram_refuses_what_is_not_finite() -> None:
    with pytest.raises(InputError, match="not finite"):
        Histogram().add(torch.tensor([1.0, float("nan")]))


def heavy() -> Histogram:
    """A bell with a few numbers far out."""
    histogram = Histogram()
    rng = torch.Generator().manual_seed(0)
    histogram.add(torch.cat([torch.randn(100_000, generator=rng), torch.tensor([60.0, -80.0])]))
    return histogram


@pytest.mark.parametrize("method", METHODS)
def test_no_method_exceeds_what_was_seen(method: str) -> None:
    assert 0 < amax_of(heavy(), method, INT8) <= 80


def test_methods_cut_off_what_is_rare() -> None:
    histogram = heavy()
    assert amax_of(histogram, "minmax", INT8) == 80
    assert 3 < amax_of(histogram, "percentile", INT8) < 6
    assert amax_of(histogram, "entropy", INT8) < 20
    assert amax_of(histogram, "minmax", E4M3) == amax_of(histogram, "mse", E4M3) == 80


def test_mse_is_the_least_squared_error_of_all_candidates() -> None:
    """Against brute force on the numbers themselves."""
    rng = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(50_000, generator=rng), 12 * torch.rand(50, generator=rng)])
    histogram = Histogram()
    histogram.add(x)

    def error(amax: float) -> float:
        scale = scale_of(amax, INT8)
        return float(((dequantize(quantize(x.numpy(), scale, INT8), scale) - x.numpy()) ** 2).mean())

    found = amax_of(histogram, "mse", INT8)
    best = min(error(a) for a in np.linspace(1, float(x.abs().max()), 200))
    assert error(found) <= 1.05 * best
    assert squared_error(histogram, BINS, INT8) > 0


@given(tensors, st.sampled_from(METHODS))
def test_a_grid_of_unsigned_numbers_has_zero_and_lies_where_the_numbers_are(x, method) -> None:
    histogram = Histogram()
    histogram.add(torch.from_numpy(x))
    scale, zero = grid_of(histogram, method, UINT8)
    assert scale > 0 and 0 <= zero <= 255
    assert not dequantize(quantize(np.zeros(7), scale, UINT8, zero), scale, zero).any()
    low, high = (0 - zero) * scale, (255 - zero) * scale
    if histogram.largest > 1e-30:
        assert low >= histogram.low - 0.51 * scale and high <= histogram.high + 0.51 * scale
    if method == "minmax":
        got = dequantize(quantize(x, scale, UINT8, zero), scale, zero)
        assert np.abs(got - x).max() <= scale * 1.001


@pytest.mark.parametrize(("method", "share"), [("minmax", 0.35), ("percentile", 0.6), ("mse", 0.35), ("entropy", 0.9)])
def test_what_is_hardly_negative_has_twice_as_many_numbers(method: str, share: float) -> None:
    """SiLU of a bell: the squared error over that of the same method around zero. What saturates is the same."""
    rng = torch.Generator().manual_seed(0)
    histogram, x = Histogram(), torch.nn.functional.silu(torch.randn(77_777, generator=rng))
    histogram.add(x)
    errors = []
    for fmt in (UINT8, INT8):
        scale, zero = grid_of(histogram, method, fmt)
        errors.append(float(((dequantize(quantize(x.numpy(), scale, fmt, zero), scale, zero) - x.numpy()) ** 2).sum()))
    assert errors[0] < share * errors[1]


def test_mse_finds_the_best_pair_of_sides() -> None:
    """Against brute force over pairs, on the numbers themselves: one side has a tail, the other has not."""
    rng = torch.Generator().manual_seed(2)
    x = torch.cat([torch.rand(50_000, generator=rng), -3 * torch.rand(63, generator=rng), 7 + torch.zeros(1)]).numpy()
    histogram = Histogram()
    histogram.add(torch.from_numpy(x))

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = round(-low / scale)
        return float(((dequantize(quantize(x, scale, UINT8, zero), scale, zero) - x) ** 2).sum())

    scale, zero = grid_of(histogram, "mse", UINT8)
    pairs = [(-low, high) for low in np.linspace(0, 3, 31) for high in np.linspace(0.5, 7, 66)]
    assert error(-zero * scale, (255 - zero) * scale) <= 1.05 * min(error(*pair) for pair in pairs)


@pytest.mark.parametrize("fmt", [INT8, UINT8])
def test_zeros_cost_nothing_on_any_grid(fmt) -> None:
    """Of a tensor that is nearly all zeros mse cuts off as little as of the rest alone."""
    x, both, rest = torch.randn(7_777, generator=torch.Generator().manual_seed(3)), Histogram(), Histogram()
    both.add(torch.cat([torch.zeros(777_777), x]))
    rest.add(x)
    assert both.zeros == 777_777 and both.counts.sum() == 785_554
    assert grid_of(both, "mse", fmt) == grid_of(rest, "mse", fmt)


def test_unknown_methods_and_empty_histograms_are_refused() -> None:
    with pytest.raises(InputError, match="unknown calibration"):
        amax_of(heavy(), "magic", INT8)
    with pytest.raises(InputError, match="nothing was calibrated"):
        amax_of(Histogram(), "mse", INT8)


def test_onnx_has_the_formats() -> None:
    assert all(hasattr(onnx.TensorProto, f.onnx) for f in FORMATS.values())
