"""What `bench_export` measures: the cases, each a model with the sides that export it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimize.compile.architectures import ARCHITECTURES
from optimize.tools import bench_record

ALL = ("ours", "ours-gated", "dynamo", "dynamo-opset23", "torchscript", "optimum")


@dataclass(frozen=True)
class Case:
    """A denoiser, the sides that export it, and the sizes (images in pixels) at which ONNX Runtime is timed."""

    what: str
    config: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    latency: Mapping[str, int] = field(default_factory=dict)
    sides: tuple[str, ...] = ALL
    ratios: tuple[bench_record.Ratio, ...] = bench_record.EXPORTS
    runs: int = 3
    memory: int | None = None
    class_name: str = "UNet2DConditionModel"


UNET_220M = {"block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 768, "attention_head_dim": 8}


def pixels(size: int, tokens: int = 77) -> dict[str, int]:
    return {"batch": 1, "height": size, "width": size, "tokens": tokens}


CASES: Mapping[str, Case] = {
    "tiny": Case("arch:sd15@tiny's U-Net", ARCHITECTURES["sd15-unet"].values(tiny=True), latency=pixels(64, 8)),
    "unet-220m": Case("a U-Net of 220M parameters", UNET_220M, latency=pixels(512)),
    "sd15-unet": Case("the U-Net of SD 1.5, 860M parameters", ARCHITECTURES["sd15-unet"].values(), latency=pixels(256)),
    "sdxl-unet-fp16": Case(
        "the U-Net of SDXL in fp16: memory",
        ARCHITECTURES["sdxl-base-unet"].values(),
        "fp16",
        sides=("ours", "ours-gated"),
        ratios=bench_record.MEMORY,
        memory=3 << 29,
    ),
    "flux-bf16": Case(
        "the 12B transformer of FLUX.1 in bf16: memory",
        ARCHITECTURES["flux-dev-transformer"].values(),
        "bf16",
        sides=("ours", "ours-gated"),
        ratios=bench_record.FLUX,
        memory=4 << 30,
        class_name="FluxTransformer2DModel",
    ),
    "help": Case("what it costs to ask for help", sides=(), ratios=bench_record.COMMAND),
}
