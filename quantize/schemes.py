"""What can be quantized how: one row per scheme, and the number formats that they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from optimize.errors import InputError

METHODS = ("minmax", "percentile", "entropy", "mse")
"""How a tensor's scale is chosen from its histogram, see `scales.amax_of`."""
RUNTIMES = ("onnxruntime", "tensorrt")


@dataclass(frozen=True)
class Format:
    """Numbers of few bits, from `least` to `largest`. All are symmetric but the unsigned ones; zero is always exact."""

    name: str
    onnx: str
    bits: int
    least: float
    largest: float


FORMATS: Mapping[str, Format] = {
    "int8": Format("int8", "INT8", 8, -127, 127),
    "uint8": Format("uint8", "UINT8", 8, 0, 255),
    "int4": Format("int4", "INT4", 4, -7, 7),
    "e4m3": Format("e4m3", "FLOAT8E4M3FN", 8, -448, 448),
}


@dataclass(frozen=True)
class Scheme:
    """`activations` is "static" (scales calibrated), "dynamic" (measured at run time) or "" (left as they are).

    `kinds` are the kinds of sites that are quantized for each runtime; a runtime that is absent cannot run the scheme.
    `block` is how many weights along the reduction share a scale (0: a scale per output channel); `least_sm` the
    oldest GPU, as in `sm89`, and `least_opset` the oldest opset that has the format.
    """

    name: str
    weights: str
    activations: str
    kinds: Mapping[str, tuple[str, ...]]
    block: int = 0
    least_sm: int = 75
    least_opset: int = 18


BOTH = ("conv", "linear")
SCHEMES: Mapping[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("int8", "int8", "static", {"onnxruntime": BOTH, "tensorrt": BOTH}),
        Scheme("int8-dynamic", "int8", "dynamic", {"onnxruntime": ("linear",)}),
        Scheme("int8-weight", "int8", "", {"onnxruntime": ("linear",), "tensorrt": BOTH}),
        Scheme("fp8", "e4m3", "static", {"tensorrt": (*BOTH, "attention")}, least_sm=89, least_opset=19),
        Scheme(
            "int4-weight", "int4", "", {"onnxruntime": ("linear",), "tensorrt": ("linear",)}, 32, 80, least_opset=21
        ),
    )
}


def with_block(scheme: Scheme, block: int | None) -> Scheme:
    """The scheme with another block size, which ONNX has from opset 21 on."""
    if block is None or block == scheme.block:
        return scheme
    if scheme.activations or block < 0 or block & (block - 1) or 0 < block < 16:
        able = [s.name for s in SCHEMES.values() if not s.activations]
        raise InputError(
            f"weights of {scheme.name} cannot share scales in blocks of {block}",
            got=f"--block {block}",
            expected=f"a power of two from 16 on, or 0 for a scale per channel, with {' or '.join(able)}",
        )
    return replace(scheme, block=block, least_opset=21 if block else scheme.least_opset)


def scheme_for(name: str, runtime: str, opset: int, sms: tuple[int, ...] = (), block: int | None = None) -> Scheme:
    """The scheme of that name; with `block` so many weights share a scale (0: a channel's).

    Raises InputError where the runtime, the opset or a GPU cannot run it.
    """
    if name not in SCHEMES:
        raise InputError(f"unknown scheme {name}", expected="one of " + ", ".join(SCHEMES))
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime}", expected="one of " + ", ".join(RUNTIMES))
    scheme = with_block(SCHEMES[name], block)
    able = [s.name for s in SCHEMES.values() if runtime in s.kinds]
    if runtime not in scheme.kinds:
        raise InputError(
            f"{runtime} has no kernels for {name}",
            got=f"--scheme {name} --for {runtime}",
            expected=f"for {runtime} one of {', '.join(able)}",
            mend=f"--for {next(iter(scheme.kinds))}, or another scheme",
        )
    for sm in sms:
        if sm < scheme.least_sm:
            other = [s.name for s in SCHEMES.values() if "tensorrt" in s.kinds and s.least_sm <= sm]
            raise InputError(
                f"{name} cannot run on SM{sm}",
                got=f"a target of SM{sm}",
                expected=f"SM{scheme.least_sm} or later",
                mend=f"on this GPU one of {', '.join(other)}",
            )
    if opset < scheme.least_opset:
        raise InputError(
            f"opset {opset} has no tensors of {name}",
            got=f"opset {opset}",
            expected=f"opset {scheme.least_opset} or later",
            mend=f"export with --opset {max(23, scheme.least_opset)}",
        )
    return scheme
