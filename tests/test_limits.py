"""The roof over a device: measured here by running, read from sheets elsewhere; both say which they are."""

import time

import numpy as np
import onnx
import pytest
import torch

from optimize.errors import InputError, MissingError
from optimize.profiles import limits
from optimize.profiles.limits import (
    best_seconds,
    copy_bytes,
    cpu_copies,
    cpu_limits,
    cpu_products,
    int8_product,
    limits_from_sheet,
    limits_of_device,
    product_graph,
    torch_product,
)
from optimize.profiles.targets import TARGETS


def test_this_cpu_is_measured() -> None:
    """By a real clock, and so within what any CPU does: others may have the core for all of a test's time."""
    measured = cpu_limits(threads=1, seconds=0.06)
    assert (measured.how, measured.target) == ("measured", "this CPU")
    assert {"fp32", "int8"} <= set(measured.peak_gflops) and "1 threads" in measured.sources[0]
    assert all(0.01 < rate < 1e6 for rate in (measured.bandwidth_gbs, *measured.peak_gflops.values()))


def test_a_roof_is_the_best_ways_best_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is scripted: bytes read and written, or operations, over the shortest time of all rounds."""
    monkeypatch.setattr(limits, "CPU_SIZE", 7)
    monkeypatch.setattr(limits, "LEAST_COPY", 77 << 20)
    ways = list(cpu_copies() | cpu_products(1))
    seconds = {way: [0.5 + 0.25 * (i % 3), 0.125 * (1 + i), 1.0] for i, way in enumerate(ways)}
    times = iter([took for each in zip(*seconds.values(), strict=True) for took in each])
    monkeypatch.setattr(limits, "best_seconds", lambda run, seconds: next(times))
    found = cpu_limits(threads=1)
    least = {way: min(took) for way, took in seconds.items()}
    moved = {"copy": 2 * copy_bytes(), "sum": copy_bytes()}
    bandwidths = {how: moved[how] / least["bandwidth", how] / 1e9 for how in moved}
    assert found.bandwidth_gbs == pytest.approx(max(bandwidths.values()))
    assert f"({max(bandwidths, key=bandwidths.__getitem__)})" in found.sources[0]
    for kind, peak in found.peak_gflops.items():
        best = min((took, how) for (each, how), took in least.items() if each == kind)
        assert peak == pytest.approx(2 * 7**3 / best[0] / 1e9) and f"{kind} by {best[1]}" in found.sources[1]
    assert next(times, None) is None


def test_what_is_timed_does_the_work_that_is_counted() -> None:
    """A copy of every byte; a product of two square matrices, of each library and type."""
    size, copy = cpu_copies()["bandwidth", "copy"]
    assert size == 2 * copy_bytes() and torch.equal(copy(), torch.ones(size // 8))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch_product(str(dtype).removeprefix("torch."))(63)().shape == (63, 63)
    assert int8_product(64)().shape == (64, 64)
    for kind, dtype, operator in (("FLOAT", np.float32, "MatMul"), ("UINT8", np.int8, "MatMulInteger")):
        graph = onnx.load_from_string(product_graph(np.ones((63, 63), dtype), kind)).graph
        assert [n.op_type for n in graph.node] == [operator]
        assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == [63, 63]


def test_measuring_is_quick_and_leaves_torchs_threads_alone() -> None:
    before, start = torch.get_num_threads(), time.process_time()
    limits_of_device("cpu", threads=1, seconds=0.06)
    assert torch.get_num_threads() == before and time.process_time() - start < 6


def test_a_product_that_is_not_to_be_had_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(size: int) -> None:
        raise NotImplementedError("no such unit")

    monkeypatch.setattr(limits, "int8_product", none)
    monkeypatch.setattr(limits, "ort_product", lambda kind, threads: none)
    monkeypatch.setattr(limits, "CPU_SIZE", 64)
    found = limits.cpu_products(1)
    assert ("int8", "torch") not in found and ("fp32", "torch") in found


def test_best_seconds_takes_the_shortest() -> None:
    waits = iter([0.0, 0.02, 0.001, 0.02])
    assert 0.001 <= best_seconds(lambda: time.sleep(next(waits, 0.02)), 0.03) < 0.02


@pytest.mark.parametrize("name", TARGETS)
def test_sheets_say_that_they_are_sheets(name: str) -> None:
    sheet, found = TARGETS[name], limits_from_sheet(name)
    assert found.how == "sheet" and found.target == name
    assert found.peak_gflops["fp16"] == sheet.peak.fp16 * 1000
    assert ("fp8" in found.peak_gflops) == (sheet.peak.fp8 is not None)
    assert found.bandwidth_gbs == sheet.bandwidth_gbs and all("https://" in s for s in found.sources)


def test_unknown_devices_and_targets_are_refused() -> None:
    with pytest.raises(InputError, match=r"no sheet of this target[\s\S]*rtx-4090"):
        limits_from_sheet("voodoo-2")
    with pytest.raises(InputError, match="cpu or cuda"):
        limits_of_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="no GPU to measure"):
            limits_of_device("cuda")


@pytest.mark.gpu
def test_a_gpus_peaks_are_near_its_sheet() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from optimize.profiles.targets import sheet_from_name

    found = limits_of_device("cuda")
    sheet = sheet_from_name(found.target)
    if sheet is None:
        pytest.skip(f"needs a GPU with a sheet, not {found.target}")
    roof = limits_from_sheet(sheet)
    assert 0.5 < found.bandwidth_gbs / roof.bandwidth_gbs < 1.05
    for kind, rate in found.peak_gflops.items():
        assert 0.3 < rate / roof.peak_gflops[kind] < 1.1, kind
