"""Whether a backend gives right numbers here, and how good they are: outputs against eager fp32's on the same feeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from optimize.compile.spec import PRECISIONS, TensorSpec
from optimize.quantize.measures import cosine, psnr, snr

from .parity import FP32_LIMIT, ROUNDING, distance
from .quality import mean, worst
from .schema import RowParity, RowQuality

Tensors = Mapping[str, torch.Tensor]

EXACT: Mapping[str, float] = {"cpu": FP32_LIMIT, "cuda": 5e-3}
"""Device -> the most that fp32 may be off. GPUs' backends use TF32 in fp32 graphs, with 11 bits."""
OWN = 1.5
"""fp16, bf16: times eager's own error in that precision. One draw is compared here, where exports use up to 32."""
FLOOR_DB = 10.0
"""Quantized graphs on random feeds, which lie outside of what was calibrated: a wrong graph is below 0."""
FAR, MOST_DB = 1e30, 200.0
"""Stand for infinity, which JSON does not have."""
COARSE = 8
"""Bits of the sample feeds' mantissas: bf16, fp16 and fp32 all hold them exactly, so that one reference serves all."""


def coarse(feeds: Tensors) -> dict[str, torch.Tensor]:
    """Feeds whose floats every precision holds: rounded to bf16, and none so small that fp16 would lose bits."""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        short = t.to(torch.bfloat16).to(t.dtype)
        return torch.where(short.abs() < 2.0**-14 * 2**COARSE, torch.zeros_like(short), short)

    return {n: rounded(t) if t.is_floating_point() else t for n, t in feeds.items()}


def in_precision(inputs: Sequence[TensorSpec], feeds: Tensors, precision: str) -> dict[str, torch.Tensor]:
    """The same feeds in the types that a component has in this precision (a quantized one in its base's)."""
    base = precision if precision in PRECISIONS else "fp32"
    return {t.name: feeds[t.name].to(getattr(torch, t.torch_dtype(base))).contiguous() for t in inputs}


def parity_of_row(got: Tensors, exact: Tensors, own: Tensors | None, precision: str, device: str) -> RowParity:
    """The output that is furthest over its limit. `own` is eager's in the same precision, where that runs.

    An output that is missing, or not finite where the reference is, is infinitely off.
    """
    rows = []
    for name, reference in exact.items():
        relative = min(distance([got[name]], [reference])[0] if name in got else math.inf, FAR)
        limit, rule = limit_of(reference, own.get(name) if own else None, precision, device)
        rows.append(RowParity(output=name, relative=relative, limit=limit, rule=rule, passed=relative <= limit))
    return max(rows, key=lambda r: r.relative / r.limit)


def limit_of(exact: torch.Tensor, own: torch.Tensor | None, precision: str, device: str) -> tuple[float, str]:
    if precision == "fp32":
        limit = EXACT[device]
        return limit, f"relative error <= {limit:g}" + (" (TF32 allowed)" if device == "cuda" else "")
    if precision in ROUNDING and own is not None:
        error = distance([own], [exact])[0]
        if math.isfinite(error):
            return max(OWN * error, ROUNDING[precision]), f"relative error <= {OWN} x eager {precision}'s own"
    return 10 ** (-FLOOR_DB / 20), f"SNR >= {FLOOR_DB:g} dB on random feeds"


def quality_of_row(pairs: Sequence[tuple[Tensors, Tensors]], data: str) -> RowQuality | None:
    """(got, exact) of each sample: the output with the lowest mean cosine. None where no output is a float."""
    figures: dict[str, list[tuple[float, float, float]]] = {}
    for got, exact in pairs:
        for name, reference in exact.items():
            if reference.is_floating_point() and reference.numel():
                both = got[name], reference
                figures.setdefault(name, []).append((cosine(*both), snr(*both), psnr(*both)))
    rows = [
        RowQuality(
            output=name,
            cosine=mean([c for c, _, _ in each]),
            lowest=worst(c for c, _, _ in each),
            snr_db=min(mean([s for _, s, _ in each]), MOST_DB),
            psnr_db=min(mean([p for _, _, p in each]), MOST_DB),
            samples=len(each),
            data=data,
        )
        for name, each in figures.items()
    ]
    return min(rows, key=badness, default=None)


def badness(row: RowQuality | None) -> tuple[bool, float]:
    """What the worst of several has least of: NaN first, and what was not judged last."""
    return (True, math.inf) if row is None else (not math.isnan(row.cosine), row.cosine)
