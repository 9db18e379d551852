"""What `bench_models` profiles: networks at full size with random weights, in the order of what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from optimize.tools.kernel_cases import Goal

if TYPE_CHECKING:
    from optimize.compile.spec import Component

GOALS: Mapping[str, Goal] = {
    "G9": Goal("FLUX blocks bf16: our best backend / torch.compile max-autotune", 0.95, 0.81, 0.75, least=False),
    "G10": Goal("SDXL's U-Net: our best backend / torch.compile max-autotune", 1.00, 0.86, 0.78, least=False),
    "G11": Goal("VAE decode: our best backend / eager", 0.60, 0.32, 0.28, least=False),
    "G12 fp8": Goal("FLUX blocks: fp8 / torch.compile bf16", 0.85, 0.70, 0.58, least=False),
    "G12 int8": Goal("FLUX blocks: int8 / torch.compile bf16", 0.95, 0.80, 0.72, least=False),
    "G13": Goal("the profiler's pick / the true best, by a second, longer measurement", 1.05, 1.02, 1.00, least=False),
    "G14": Goal("spread of a ratio over three processes", 0.05, 0.02, 0.01, least=False),
}
EVERY = ("G13", "G14")
"""Goals that every case counts for."""


@dataclass(frozen=True)
class Rule:
    """How a goal's ratio is made of a case's rows: the fastest one in `ours` (a precision; none: the case's own) over
    the backend `theirs` in the case's own."""

    theirs: str
    ours: str = ""


RULES: Mapping[str, Rule] = {
    "G9": Rule("torch.compile-max-autotune"),
    "G10": Rule("torch.compile-max-autotune"),
    "G11": Rule("eager"),
    "G12 fp8": Rule("torch.compile", "fp8"),
    "G12 int8": Rule("torch.compile", "int8"),
}

BACKENDS = (
    "eager",
    "torch.compile",
    "torch.compile-max-autotune",
    "torch.compile-regional",
    "torch.compile-cudagraphs",
    "fused",
    "torch.compile-fused",
    "torch.compile-max-autotune-fused",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "tensorrt",
    "tensorrt-cudagraphs",
)
"""The last four run files, which only a bundle has (`--bundle CASE=DIR`): else they are rows that say so."""


@dataclass(frozen=True)
class Case:
    """A component of a source at `sizes`, in one precision (and with a bundle in fp8 and int8 too).

    `seconds` is a guess of what its profile takes on an H200, most of it compilation: with less left it is not begun.
    `small` are the sizes of `--tiny`, with which the same code runs on a CPU in seconds.
    """

    name: str
    what: str
    source: str
    component: str
    precision: str
    sizes: Mapping[str, int]
    small: Mapping[str, int]
    seconds: float
    goals: tuple[str, ...] = field(default=())

    def source_at(self, tiny: bool) -> str:
        if not tiny:
            return self.source
        return f"{self.source}_tiny" if self.source.startswith("python:") else f"{self.source}@tiny"

    def shape(self, tiny: bool) -> str:
        sizes = self.small if tiny else self.sizes
        return "full=" + ",".join(f"{axis}:{size}" for axis, size in sizes.items())


HERE = "python:optimize.tools.model_cases:"
IMAGE = {"batch": 2, "tokens": 77}
"""Guided: both halves of a prompt's pair in one call."""
SMALL_IMAGE = {"batch": 1, "height": 64, "width": 64}
_CASES = (
    Case(
        "flux-blocks",
        "2 double and 4 single blocks of FLUX.1 (3072 wide, 24 heads of 128), 1024 px: 4096 + 512 tokens",
        HERE + "flux_blocks",
        "flux_blocks",
        "bf16",
        {"batch": 1, "image_tokens": 4096, "tokens": 512},
        {"batch": 1, "image_tokens": 63, "tokens": 7},
        180,
        ("G9", "G12 fp8", "G12 int8"),
    ),
    Case(
        "vae-sdxl",
        "the VAE decoder of SDXL (and of SD1.5, whose network is the same), 1024 px",
        "arch:vae-sdxl",
        "vae_sdxl_decoder",
        "bf16",
        {"batch": 1, "height": 1024, "width": 1024},
        SMALL_IMAGE,
        120,
        ("G11",),
    ),
    Case(
        "sdxl-unet",
        "SDXL's U-Net, 1024 px, guided",
        "arch:sdxl-base-unet",
        "sdxl_base_unet",
        "fp16",
        {**IMAGE, "height": 1024, "width": 1024},
        {**SMALL_IMAGE, "tokens": 7},
        420,
        ("G10",),
    ),
    Case(
        "vae-flux",
        "the VAE decoder of FLUX (16 latent channels), 1024 px",
        "arch:vae-flux",
        "vae_flux_decoder",
        "bf16",
        {"batch": 1, "height": 1024, "width": 1024},
        SMALL_IMAGE,
        120,
        ("G11",),
    ),
    Case(
        "sd15-unet",
        "SD1.5's U-Net, 512 px, guided",
        "arch:sd15-unet",
        "sd15_unet",
        "fp16",
        {**IMAGE, "height": 512, "width": 512},
        {**SMALL_IMAGE, "tokens": 7},
        240,
    ),
    Case(
        "llama-decode",
        "TinyLlama 1.1B, one token at a past of 1024",
        "arch:llama",
        "llama",
        "bf16",
        {"batch": 1, "tokens": 1, "past": 1024},
        {"batch": 1, "tokens": 1, "past": 63},
        120,
    ),
    Case(
        "clip-l",
        "CLIP-L's text encoder, two prompts",
        "arch:clip-l",
        "clip_l",
        "fp16",
        IMAGE,
        {"batch": 3, "tokens": 7},
        90,
    ),
    Case(
        "clip-g",
        "OpenCLIP bigG's text encoder, two prompts",
        "arch:openclip-bigg",
        "openclip_bigg",
        "fp16",
        IMAGE,
        {"batch": 3, "tokens": 7},
        120,
    ),
    Case(
        "t5",
        "T5-XXL's encoder, 6 of its 24 layers, 512 tokens",
        HERE + "t5_layers",
        "t5_layers",
        "bf16",
        {"batch": 1, "tokens": 512},
        {"batch": 1, "tokens": 63},
        90,
    ),
)
CASES: Mapping[str, Case] = {case.name: case for case in _CASES}


# --- networks with fewer layers ---------------------------------------------------------------------------------------


def fewer_layers(name: str, key: str, layers: Mapping[str, Any], tiny: bool = False) -> list[Component]:
    """The architecture `key` with other numbers of layers, as a component `name`; what `arch:` builds, else."""
    from optimize.compile.architectures import ARCHITECTURES
    from optimize.compile.sources import components_of_network, full_config, make_module
    from optimize.compile.weights import RandomWeights

    row = ARCHITECTURES[key]
    config = {**row.values(tiny), **layers}
    full = full_config(row.library, row.class_name, config)
    make = partial(make_module, row.library, row.class_name, config)
    return list(components_of_network(name, row.class_name, full, make, RandomWeights()))


FLUX_BLOCKS = {"num_layers": 2, "num_single_layers": 4}
"""One to two, as in the whole model (19 and 38)."""


def flux_blocks() -> list[Component]:
    return fewer_layers("flux_blocks", "flux-dev-transformer", FLUX_BLOCKS)


def flux_blocks_tiny() -> list[Component]:
    return fewer_layers("flux_blocks", "flux-dev-transformer", FLUX_BLOCKS, tiny=True)


def t5_layers() -> list[Component]:
    return fewer_layers("t5_layers", "t5-xxl", {"num_layers": 6})


def t5_layers_tiny() -> list[Component]:
    return fewer_layers("t5_layers", "t5-xxl", {"num_layers": 2}, tiny=True)
