import subprocess
import sys

import pytest

from optimize.errors import InputError, MissingError
from optimize.profiles import targets
from optimize.profiles.targets import SHARED_MEMORY_PER_BLOCK_KB, TARGETS, sheet_from_name, sm_from_target

NO_BF16 = {"t4"}
NO_FP8 = {"t4", "a100-80gb", "rtx-3090"}
GEFORCE = {"rtx-3090", "rtx-4090", "rtx-5090"}  # half rate where fp16 and bf16 products accumulate in fp32


def test_the_table_holds_the_promised_targets() -> None:
    promised = "h100 h200 a100-80gb l4 l40s b200 rtx-3090 rtx-4090 rtx-5090 rtx-pro-6000 t4"
    assert sorted(TARGETS) == sorted(promised.split())


@pytest.mark.parametrize("sheet", TARGETS.values(), ids=TARGETS)
def test_peaks_are_dense_and_follow_the_ratios_of_tensor_cores(sheet: targets.TargetSheet) -> None:
    peak = sheet.peak
    assert (peak.bf16 is None) == (peak.tf32 is None) == (sheet.name in NO_BF16)
    assert (peak.fp8 is None) == (sheet.name in NO_FP8)
    assert peak.int8 / peak.fp16 == pytest.approx(4 if sheet.name in GEFORCE else 2, rel=0.02)
    if peak.bf16 is not None and peak.tf32 is not None:
        assert peak.bf16 == peak.fp16
        assert peak.fp16 / peak.tf32 == pytest.approx(2, rel=0.03)
    if peak.fp8 is not None:
        assert peak.fp8 / peak.fp16 == pytest.approx(2, rel=0.03)


# SMs x tensor operations per clock and SM x boost clock in GHz, from the same papers: an independent way to the figure
@pytest.mark.parametrize(
    ("name", "sms", "per_clock", "clock_ghz"),
    [
        ("h100", 132, 4096, 1.83),
        ("a100-80gb", 108, 2048, 1.41),
        ("rtx-3090", 82, 512, 1.695),
        ("rtx-4090", 128, 512, 2.52),
        ("rtx-5090", 170, 512, 2.407),
        ("rtx-pro-6000", 188, 1024, 2.617),
        ("t4", 40, 1024, 1.59),
        ("l4", 60, 1024, 2.04),
    ],
)
def test_fp16_peak_agrees_with_units_times_clock(name: str, sms: int, per_clock: int, clock_ghz: float) -> None:
    assert TARGETS[name].peak.fp16 == pytest.approx(sms * per_clock * clock_ghz / 1e3, rel=0.04)


@pytest.mark.parametrize("sheet", TARGETS.values(), ids=TARGETS)
def test_every_figure_has_a_source(sheet: targets.TargetSheet) -> None:
    for figure in ("sm", "memory_gib", "bandwidth_gbs", "power_w", "peak", "shared_memory_per_block_kb"):
        source = sheet.source_of(figure)
        assert "NVIDIA" in source.title or "CUDA" in source.title
        assert source.url.startswith("https://") and "nvidia.com" in source.url
    assert TARGETS["h100"].source_of("bandwidth_gbs") != TARGETS["h100"].source_of("peak")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtx-4090", ("rtx-4090", 89)),
        ("RTX 4090", ("rtx-4090", 89)),
        ("NVIDIA GeForce RTX 5090", ("rtx-5090", 120)),
        ("a100", ("a100-80gb", 80)),
        ("H100", ("h100", 90)),
        ("sm89", ("sm89", 89)),
        ("SM_120", ("sm120", 120)),
        ("89", ("sm89", 89)),
    ],
)
def test_a_target_resolves_by_name_by_device_and_by_sm(text: str, expected: tuple[str, int]) -> None:
    assert sm_from_target(text) == expected


@pytest.mark.parametrize("text", ["rtx-9999", "sm70", "12", "", "sm", "89x"])
def test_an_unknown_target_lists_the_known_ones(text: str) -> None:
    with pytest.raises(InputError) as caught:
        sm_from_target(text)
    assert "unknown target" in str(caught.value)
    assert all(name in str(caught.value) for name in (*TARGETS, "current", "sm89"))


def test_current_is_the_gpu_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "current_gpu", lambda: ("NVIDIA H200", 90))
    assert sm_from_target("current") == ("h200", 90)
    monkeypatch.setattr(targets, "current_gpu", lambda: ("NVIDIA GB10", 121))
    assert sm_from_target("Current") == ("NVIDIA GB10", 121)


def test_current_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", no_library)
    with pytest.raises(MissingError, match=r"no NVIDIA driver(.|\n)*--target sm89"):
        sm_from_target("current")


def test_shared_memory_comes_from_the_sm() -> None:
    assert {name: TARGETS[name].shared_memory_per_block_kb for name in ("t4", "a100-80gb", "l4", "h100")} == {
        "t4": 64, "a100-80gb": 163, "l4": 99, "h100": 227,
    }  # fmt: skip
    assert {sheet.sm for sheet in TARGETS.values()} <= set(SHARED_MEMORY_PER_BLOCK_KB)


def test_names_devices_and_aliases_are_unambiguous() -> None:
    for sheet in TARGETS.values():
        for word in (sheet.name, sheet.device, *sheet.aliases):
            assert sheet_from_name(word) is sheet
    assert sheet_from_name("NVIDIA A100-PCIE-40GB") is None


def test_the_sheets_need_no_heavy_package() -> None:
    code = "import sys, optimize.profiles.targets; print({'torch', 'onnx', 'tensorrt_rtx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
