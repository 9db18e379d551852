"""Rooflines and estimates by hand: what bounds, what is refused, and that an estimate is called one."""

from pathlib import Path

import onnx
import pytest

from optimize.errors import InputError
from optimize.profiles.limits import limits_from_sheet
from optimize.profiles.roofline import RECASTS, estimate, fused, peak_of, roofline_of
from optimize.profiles.schema import Estimate, Limits, Work
from optimize.profiles.targets import TARGETS
from optimize.profiles.work import GraphWork, work_of

ROOF = Limits(target="t", how="sheet", bandwidth_gbs=100, peak_gflops={"fp32": 1000, "fp16": 4000, "int8": 8000})


def work(flops: float, moved: float, **by: float) -> Work:
    return Work(flops=flops, bytes=moved, weight_bytes=0, how="by hand", flops_by_type=by)


@pytest.mark.parametrize(
    ("flops", "moved", "ms", "share", "bound"),
    [
        (1e9, 1e6, 2.0, 0.5, "compute"),  # 1 ms at the peak
        (1e6, 1e8, 4.0, 0.25, "memory"),  # 1 ms at the bandwidth
        (1e9, 1e8, 1.0, 1.0, "compute"),  # both at once, on the ridge
    ],
)
def test_rates_and_share_by_hand(flops: float, moved: float, ms: float, share: float, bound: str) -> None:
    line = roofline_of(work(flops, moved), ms, ROOF, "fp32")
    assert line.gflops == pytest.approx(flops / ms / 1e6) and line.gbs == pytest.approx(moved / ms / 1e6)
    assert line.share == pytest.approx(share) and line.bound == bound
    assert line.intensity == pytest.approx(flops / moved)


def test_each_part_is_held_to_its_own_peak() -> None:
    """1e9 in fp32 (1 ms) and 8e9 in int8 (1 ms): a run of 4 ms has half of what the limits allow."""
    assert roofline_of(work(9e9, 1, fp32=1e9, int8=8e9), 4.0, ROOF, "int8").share == pytest.approx(0.5)


def test_a_type_without_a_peak_is_computed_in_a_wider_one() -> None:
    assert peak_of(ROOF, "bf16") == 1000 and peak_of(ROOF, "fp8") == 4000 and peak_of(ROOF, "int64") == 1000


MLP = """<ir_version: 10, opset_import: ["" : 23]> g (float[b,256] x) => (float[b,256] y) {
    a = MatMul (x, w1)  s = Sigmoid (a)  h = Mul (a, s)  z = MatMul (h, w2)  y = Add (z, x)
}"""


@pytest.fixture
def mlp(tmp_path: Path) -> GraphWork:
    """Two products with pointwise work behind each: two kernels. b is 63."""
    import numpy as np

    model = onnx.parser.parse_model(MLP)
    for name, shape in (("w1", (256, 1024)), ("w2", (1024, 256))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    onnx.save(model, tmp_path / "mlp.onnx")
    return work_of(tmp_path / "mlp.onnx", {"b": 63})


def test_pointwise_work_is_fused_and_its_values_never_leave(mlp: GraphWork) -> None:
    first, second = fused(mlp, RECASTS["fp16"])
    assert first.flops["fp16"] == second.flops["fp16"] == 2 * 63 * 256 * 1024
    assert first.bytes == 2 * (63 * 256 + 256 * 1024 + 63 * 1024)  # x, w1 and h in halves
    assert second.bytes == 2 * (63 * 1024 + 1024 * 256 + 63 * 256 + 63 * 256)  # h, w2, x again, y


def test_an_estimate_by_hand(mlp: GraphWork) -> None:
    sheet = TARGETS["rtx-4090"]
    made = estimate(mlp, sheet, limits_from_sheet(sheet), "fp16", component="mlp", shape="63", share=0.5, launch_us=3)
    kernels = fused(mlp, RECASTS["fp16"])
    by_hand = sum(k.bytes / 1008e9 for k in kernels) * 1e3 / 0.5 + 2 * 3e-3  # both wait for memory
    assert made.latency_ms == pytest.approx(by_hand) and made.bound == "memory"
    assert made.assumptions[0].startswith("ESTIMATE, not measured")
    assert any("50%" in a for a in made.assumptions) and any("3 us" in a for a in made.assumptions)


def quick(mlp: GraphWork, target: str, precision: str) -> Estimate:
    sheet = TARGETS[target]
    return estimate(mlp, sheet, limits_from_sheet(sheet), precision, component="mlp", shape="63")


def test_fewer_bits_and_better_targets_take_less(mlp: GraphWork) -> None:
    by_bits = [quick(mlp, "h100", p).latency_ms for p in ("fp32", "fp16", "fp8", "int4-weight")]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[0] > by_bits[2]
    assert quick(mlp, "t4", "fp16").latency_ms > quick(mlp, "l4", "fp16").latency_ms * 0.9
    assert quick(mlp, "l4", "fp16").latency_ms > quick(mlp, "b200", "fp16").latency_ms


@pytest.mark.parametrize(
    ("target", "precision", "words"),
    [
        ("rtx-3090", "fp8", r"rtx-3090 \(SM 86\) has no fp8"),
        ("a100", "fp8", r"SM 80\) has no fp8"),
        ("t4", "bf16", r"has no bf16"),
        ("t4", "int2", r"no estimate in int2"),
    ],
)
def test_a_precision_that_the_target_lacks_is_refused(mlp: GraphWork, target: str, precision: str, words: str) -> None:
    target = {"a100": "a100-80gb"}.get(target, target)
    with pytest.raises(InputError, match=words):
        quick(mlp, target, precision)


def test_weights_that_do_not_fit_are_said(mlp: GraphWork) -> None:
    from dataclasses import replace

    heavy = replace(mlp, total=mlp.total.model_copy(update={"weight_bytes": 30 * 2**30}))
    assert any("exceed 24 GiB" in a for a in quick(heavy, "rtx-4090", "fp16").assumptions)
    assert not any("exceed" in a for a in quick(mlp, "rtx-4090", "fp16").assumptions)


def test_counts_without_traffic_say_so() -> None:
    import torch

    from optimize.profiles.module_work import work_of_call

    module = torch.nn.Linear(256, 1024, device="meta")
    counted = work_of_call(module, [torch.empty(7, 256, device="meta")])
    made = quick(counted, "h100", "fp16")
    assert made.latency_ms > 0 and any("no graph" in a for a in made.assumptions)
