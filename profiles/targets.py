"""Target sheets: what each GPU can do at best, from its vendor's own papers, and how a target is named.

All peaks are dense. Where a paper prints figures with 2:4 sparsity they are halved here, and where it tells the two
apart, products in fp16, bf16 and fp8 are those that accumulate in fp32 (GeForce cards do them at half rate).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from optimize.compile.tensorrt import current_gpu
from optimize.errors import InputError


@dataclass(frozen=True)
class Source:
    title: str
    url: str


@dataclass(frozen=True)
class Peak:
    """Dense peaks in TFLOP/s (int8: TOP/s); None where the hardware has no such unit. All but fp32 on tensor cores."""

    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None
    fp8: float | None
    int8: float


@dataclass(frozen=True)
class TargetSheet:
    """One GPU model. `memory_gib` is the nominal size, of which the driver keeps a little; `power_w` the board's limit.

    `device` is what the driver calls it. `sources` holds where a figure is from if not from `source`.
    """

    name: str
    device: str
    sm: int
    memory_gib: int
    bandwidth_gbs: float
    power_w: int
    peak: Peak
    source: Source
    sources: Mapping[str, Source] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def shared_memory_per_block_kb(self) -> int:
        """The most shared memory that one thread block can have, in KiB."""
        return SHARED_MEMORY_PER_BLOCK_KB[self.sm]

    def source_of(self, figure: str) -> Source:
        """Where `figure` (a field's name, such as "power_w") is from."""
        return CUDA_GUIDE if figure in {"sm", "shared_memory_per_block_kb"} else self.sources.get(figure, self.source)


SHARED_MEMORY_PER_BLOCK_KB: Mapping[int, int] = {
    75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99,
}  # fmt: skip
"""SM -> KiB of shared memory for one thread block. Its keys are the SMs that we know."""

_NVIDIA = "https://www.nvidia.com/"
_PAPERS = _NVIDIA + "content/dam/en-zz/Solutions/"
_GEFORCE_PAPERS = "https://images.nvidia.com/aem-dam/Solutions/geforce/"
CUDA_GUIDE = Source(
    "CUDA C++ Programming Guide, Technical Specifications per Compute Capability",
    "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications",
)
_HOPPER = Source(
    "NVIDIA H100 Tensor Core GPU Architecture (whitepaper)",
    "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper",
)
_H100 = Source("NVIDIA H100 product page, specifications", _NVIDIA + "en-us/data-center/h100/")
_H200 = Source("NVIDIA H200 product page, specifications", _NVIDIA + "en-us/data-center/h200/")
_A100 = Source(
    "NVIDIA A100 80GB datasheet", _PAPERS + "Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_L4 = Source("NVIDIA L4 product page, specifications", _NVIDIA + "en-us/data-center/l4/")
_L40S = Source("NVIDIA L40S product page, specifications", _NVIDIA + "en-us/data-center/l40s/")
_BLACKWELL = Source(
    "NVIDIA Blackwell datasheet, HGX B200, one GPU",
    "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet",
)
_GA102 = Source(
    "NVIDIA Ampere GA102 GPU Architecture (whitepaper), appendix A",
    _NVIDIA + "content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf",
)
_ADA = Source(
    "NVIDIA Ada GPU Architecture (whitepaper), appendix A", _GEFORCE_PAPERS + "ada/nvidia-ada-gpu-architecture.pdf"
)
_RTX_BLACKWELL = Source(
    "NVIDIA RTX Blackwell GPU Architecture (whitepaper), appendix A",
    _GEFORCE_PAPERS + "blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
)
_RTX_PRO = Source(
    "NVIDIA RTX Blackwell PRO GPU Architecture (whitepaper), appendix A",
    _PAPERS + "design-visualization/quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
)
_T4 = Source("NVIDIA T4 datasheet", _PAPERS + "Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf")
_HOPPER_PEAK = Peak(fp32=66.9, tf32=494.7, fp16=989.4, bf16=989.4, fp8=1978.9, int8=1978.9)
_H100_PAGE = {figure: _H100 for figure in ("memory_gib", "bandwidth_gbs", "power_w")}

_SHEETS = (
    TargetSheet(
        "h100", "NVIDIA H100 80GB HBM3", 90, 80, 3350, 700, _HOPPER_PEAK, _HOPPER, _H100_PAGE, ("h100-sxm", "h100-80gb")
    ),
    TargetSheet("h200", "NVIDIA H200", 90, 141, 4800, 700, _HOPPER_PEAK, _H200, {"peak": _HOPPER}, ("h200-sxm",)),
    TargetSheet(
        "a100-80gb", "NVIDIA A100-SXM4-80GB", 80, 80, 2039, 400, Peak(19.5, 156, 312, 312, None, 624), _A100,
        aliases=("a100",),
    ),
    TargetSheet("l4", "NVIDIA L4", 89, 24, 300, 72, Peak(30.3, 60, 121, 121, 242.5, 242.5), _L4),
    TargetSheet("l40s", "NVIDIA L40S", 89, 48, 864, 350, Peak(91.6, 183, 362, 362, 733, 733), _L40S),
    TargetSheet("b200", "NVIDIA B200", 100, 180, 7700, 1000, Peak(75, 1100, 2250, 2250, 4500, 4500), _BLACKWELL),
    TargetSheet(
        "rtx-3090", "NVIDIA GeForce RTX 3090", 86, 24, 936, 350, Peak(35.6, 35.6, 71.2, 71.2, None, 284.7), _GA102,
        aliases=("3090",),
    ),
    TargetSheet(
        "rtx-4090", "NVIDIA GeForce RTX 4090", 89, 24, 1008, 450, Peak(82.6, 82.6, 165.2, 165.2, 330.3, 660.6), _ADA,
        aliases=("4090",),
    ),
    TargetSheet(
        "rtx-5090", "NVIDIA GeForce RTX 5090", 120, 32, 1792, 575, Peak(104.8, 104.8, 209.5, 209.5, 419, 838),
        _RTX_BLACKWELL, aliases=("5090",),
    ),
    TargetSheet(
        "rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 120, 96, 1792, 600,
        Peak(126, 251.9, 503.8, 503.8, 1007.6, 1007.6), _RTX_PRO,
    ),
    TargetSheet("t4", "Tesla T4", 75, 16, 320, 70, Peak(8.1, None, 65, None, None, 130), _T4),
)  # fmt: skip

TARGETS: Mapping[str, TargetSheet] = {sheet.name: sheet for sheet in _SHEETS}


def sheet_from_name(name: str) -> TargetSheet | None:
    """The sheet of a target or of a device as the driver calls it; None where there is none."""
    plain = _plain(name)
    return next((s for s in _SHEETS if plain in {s.name, _plain(s.device), *s.aliases}), None)


def sm_from_target(text: str) -> tuple[str, int]:
    """Name and SM of a target: a sheet's name, "sm89" or "89", or "current" for the GPU of this machine.

    InputError for anything else; MissingError where "current" finds no driver or GPU.
    """
    if text.strip().lower() == "current":
        device, sm = current_gpu()
        sheet = sheet_from_name(device)
        return (sheet.name if sheet else device), sm
    if sheet := sheet_from_name(text):
        return sheet.name, sheet.sm
    digits = re.fullmatch(r"(?:sm[-_]?)?(\d+)", text.strip().lower())
    if digits and int(digits[1]) in SHARED_MEMORY_PER_BLOCK_KB:
        return f"sm{digits[1]}", int(digits[1])
    raise InputError(
        "unknown target",
        got=text,
        expected=f"current, {', '.join(TARGETS)}, or " + ", ".join(f"sm{sm}" for sm in SHARED_MEMORY_PER_BLOCK_KB),
    )


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` -> `rtx-4090`."""
    return re.sub(r"^((nvidia|geforce|tesla)-)+", "", re.sub(r"[\s_-]+", "-", name.strip().lower()))
