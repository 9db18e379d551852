"""The roof over a device: measured here by running, read from sheets elsewhere; both say which they are."""

import time

import pytest
import torch

from optimize.errors import InputError, MissingError
from optimize.profiles import limits
from optimize.profiles.limits import best_seconds, cpu_limits, limits_from_sheet, limits_of_device
from optimize.profiles.targets import TARGETS


@pytest.fixture(scope="module")
def measured():
    return cpu_limits(threads=1, seconds=0.15)


def test_this_cpu_is_measured(measured) -> None:
    """An independent clock over the same kinds of work finds nothing that exceeds the roof by more than a busy machine
    explains, and no roof that nothing reaches. One that was measured while others had the core is measured again."""
    assert (measured.how, measured.target) == ("measured", "this CPU")
    assert {"fp32", "int8"} <= set(measured.peak_gflops) and "1 threads" in measured.sources[0]
    a, b, numbers = torch.rand(777, 1024), torch.rand(1024, 513), torch.rand(2**25)

    def shares() -> tuple[float, float]:
        roof = cpu_limits(threads=1, seconds=0.15)
        rate = 2 * 777 * 1024 * 513 / best_seconds(lambda: a @ b, 0.3) / 1e9
        read = numbers.numel() * 4 / best_seconds(numbers.amax, 0.3) / 1e9
        return rate / roof.peak_gflops["fp32"], read / roof.bandwidth_gbs

    assert any(0.2 < rate < 1.3 and 0.1 < read < 1.5 for rate, read in (shares() for _ in range(7)))


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
