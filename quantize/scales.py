"""Numbers of few bits, in NumPy: quantize, dequantize, and the choice of a scale. What the graphs do is held to these.

`q = round(x / scale) + zero` with ties to even, saturated, as QuantizeLinear defines it. `zero` is 0 but for
activations in uint8, whose range lies where the numbers are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from optimize.errors import InputError

from .schemes import METHODS, Format

Array = np.ndarray[Any, Any]
BINS = 2048
PERCENTILE = 99.99
LEVELS = 128
"""Magnitudes that an int8 tensor can tell apart."""
CANDIDATES = 128
LEAST_SCALE = 2.0**-126
"""The smallest normal fp32 number: a tensor of zeros gets it, a scale of zero would divide by it."""


def quantize(x: Array, scale: Array | float, fmt: Format, zero: int = 0) -> Array:
    """`x` in units of `scale` (which broadcasts), as int8 (int4 in int8), uint8 or ml_dtypes' float8_e4m3fn."""
    units = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    if fmt.name == "e4m3":
        import ml_dtypes

        return np.clip(units, fmt.least, fmt.largest).astype(ml_dtypes.float8_e4m3fn)
    kind = np.int8 if fmt.least else np.uint8
    return np.asarray(np.clip(np.rint(units) + zero, fmt.least, fmt.largest).astype(kind))


def dequantize(q: Array, scale: Array | float, zero: int = 0) -> Array:
    """What the numbers `q` stand for, in fp32."""
    return np.asarray((q.astype(np.float32) - zero) * np.asarray(scale, np.float32))


def scale_of(amax: Array | float, fmt: Format) -> Array:
    """fp32 scales that put magnitudes of `amax` at the format's largest number."""
    return np.asarray(np.maximum(np.asarray(amax, np.float32) / np.float32(fmt.largest), np.float32(LEAST_SCALE)))


def weight_scale(weight: Array, fmt: Format, axis: int, block: int = 0) -> Array:
    """Scales for a weight: one per channel of `axis`; with `block` one per `block` numbers along the other axis too.

    A blocked weight is `[rows, columns]` with `axis` 1; its scales are `[ceil(rows / block), columns]`."""
    magnitude = np.abs(weight.astype(np.float32))
    if block:
        starts = np.arange(0, weight.shape[0], block)
        return scale_of(np.maximum.reduceat(magnitude, starts, axis=0), fmt)
    return scale_of(magnitude.max(tuple(i for i in range(weight.ndim) if i != axis)), fmt)


def held(scale: Array, kind: Any) -> Array:
    """Scales in fp32 as the floats of `kind` have them, rounded; never zero, which would divide."""
    return np.asarray(np.maximum(scale.astype(kind), np.finfo(kind).smallest_subnormal), np.float32)


def spread(scale: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """Scales in a form that broadcasts against a weight of `shape`."""
    if block:
        return np.repeat(scale, block, axis=0)[: shape[0]]
    return scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])


class Grid(NamedTuple):
    """What `q` stands for: `scale * (q - zero)`."""

    scale: float
    zero: int = 0


@dataclass
class Histogram:
    """Numbers of a tensor over any number of samples, in constant memory: `counts` `[2, BINS]` are of magnitudes from
    zero on, those of negative numbers in the second row; `low` and `high` the extremes, zero included; `zeros` those
    that are exactly zero.

    The bins have one width, which doubles (neighbours are merged) when a larger magnitude comes."""

    counts: Array = field(default_factory=lambda: np.zeros((2, BINS), np.int64))
    width: float = 0.0
    low: float = 0.0
    high: float = 0.0
    zeros: int = 0

    def add(self, x: Any) -> None:
        """Counts the numbers of a torch tensor. Raises InputError for values that are not finite."""
        import torch

        x = x.detach().float().reshape(-1)
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not np.isfinite([low, high]).all():
            raise InputError("values that are not finite cannot be calibrated", got=f"{low} to {high}")
        self.zeros += x.numel() - int(torch.count_nonzero(x))
        self.low, self.high, top = min(self.low, low), max(self.high, high), max(-low, high)
        if top == 0.0:
            self.counts[0, 0] += x.numel()
            return
        if self.width == 0.0:  # so far nothing, or zeros, which stay in the first bin
            self.width = top * (1 + 1e-6) / BINS
        while top >= self.width * BINS:
            self.counts = np.pad(self.counts.reshape(2, -1, 2).sum(2), ((0, 0), (0, BINS // 2)))
            self.width *= 2
        found = torch.histc(x, 2 * BINS, -self.width * BINS, self.width * BINS).to(torch.int64).numpy()
        self.counts += np.stack([found[BINS:], found[:BINS][::-1]])

    @property
    def largest(self) -> float:
        return max(-self.low, self.high)

    @property
    def magnitudes(self) -> Array:
        return np.asarray(self.counts.sum(0))

    @property
    def centres(self) -> Array:
        return (np.arange(BINS) + 0.5) * self.width


def amax_of(histogram: Histogram, method: str, fmt: Format) -> float:
    """The magnitude that is scaled to the format's largest number; what lies above saturates.

    - minmax: the largest magnitude seen. Floating formats always take it: their steps shrink towards zero.
    - percentile: what 99.99 % of the numbers do not exceed.
    - mse: the candidate with the least expected squared error, rounding and saturation together.
    - entropy: the candidate whose quantized distribution diverges least (Kullback-Leibler) from the one seen
      (Migacz, "8-bit inference with TensorRT", 2017).
    """
    if method not in METHODS:
        raise InputError(f"unknown calibration {method}", expected="one of " + ", ".join(METHODS))
    total = int(histogram.counts.sum())
    if total == 0:
        raise InputError("nothing was calibrated", expected="at least one sample")
    if method_for(fmt, method) == "minmax" or histogram.width == 0.0:
        return histogram.largest
    if method == "percentile":
        last = int(np.searchsorted(np.cumsum(histogram.magnitudes), total * PERCENTILE / 100))
        return min(histogram.largest, (last + 1) * histogram.width)
    used = used_bins(histogram.magnitudes)
    bins = np.unique(np.linspace(min(LEVELS, used), used, CANDIDATES).round().astype(int))
    loss = squared_error if method == "mse" else divergence
    losses = [loss(histogram, int(n), fmt) for n in bins]
    return min(histogram.largest, float(bins[int(np.argmin(losses))] * histogram.width))


def method_for(fmt: Format, method: str) -> str:
    """The method that a format's scales are chosen by where `method` is asked for."""
    return "minmax" if fmt.name == "e4m3" else method


def grid_of(histogram: Histogram, method: str, fmt: Format) -> Grid:
    """An activation's grid: around zero for signed formats. Unsigned numbers lie where the tensor's are, zero among
    them: what is hardly ever negative (the outputs of SiLU, GELU, ReLU) has twice as many for the rest.

    Each side is cut off as `amax_of` does it with magnitudes; for mse both sides' candidates are tried in pairs.
    """
    if fmt.least:
        return Grid(float(scale_of(amax_of(histogram, method, fmt), fmt)))
    pair = method == "mse" and histogram.width
    above, below = least_squares(histogram, fmt) if pair else (amax_of(histogram, method, fmt),) * 2
    low, high = max(histogram.low, -below), min(histogram.high, above)
    scale = np.float32(max((high - low) / fmt.largest, LEAST_SCALE))
    return Grid(float(scale), int(np.clip(np.rint(-low / scale), 0, fmt.largest)))


def least_squares(histogram: Histogram, fmt: Format) -> tuple[float, float]:
    """The magnitudes above and below zero between which the format's steps have the least expected squared error: of
    rounding inside (its mean is step^2 / 12, but for zeros, which every grid has), of saturation outside."""
    x, inside, outside, ends = histogram.centres, [], [], []
    rounded = histogram.counts.astype(np.float64)
    rounded[0, 0] -= histogram.zeros
    for counts in rounded:
        used = used_bins(counts)
        bins = np.unique(np.linspace(0, used, CANDIDATES).round().astype(int))
        end = bins * histogram.width
        sums = [np.concatenate([np.cumsum((counts * x**k)[::-1])[::-1], [0.0]])[bins] for k in range(3)]
        inside.append(counts.sum() - sums[0])
        outside.append(sums[2] - 2 * end * sums[1] + end**2 * sums[0])
        ends.append(end)
    step = np.add.outer(*ends) / fmt.largest
    error = np.add.outer(*inside) * step**2 / 12 + np.add.outer(*outside)
    i, j = np.unravel_index(int(np.argmin(error)), error.shape)
    return float(ends[0][i]), float(ends[1][j])


def used_bins(counts: Array) -> int:
    """How many bins there are up to the last that has something in it."""
    used = np.flatnonzero(counts)
    return int(used[-1]) + 1 if used.size else 0


def squared_error(histogram: Histogram, bins: int, fmt: Format) -> float:
    """Summed squared error where magnitudes above `bins` bins saturate."""
    x = histogram.centres
    step = bins * histogram.width / fmt.largest
    got = np.minimum(np.rint(x / step), fmt.largest) * step
    # a bin narrower than a step is spread over it: the mean of the squared rounding error is step^2 / 12
    inside = x <= bins * histogram.width
    error = np.where(inside, min(step, 1e30) ** 2 / 12, (x - got) ** 2)
    return float((histogram.magnitudes * error).sum() - histogram.zeros * error[0])


def divergence(histogram: Histogram, bins: int, fmt: Format) -> float:
    """Kullback-Leibler divergence of the distribution cut at `bins` bins from the same in `LEVELS` levels."""
    counts = histogram.magnitudes.astype(np.float64)
    inside = counts[:bins]
    seen = inside.copy()
    seen[-1] += counts[bins:].sum()
    edges = np.linspace(0, bins, min(LEVELS, bins) + 1).round().astype(int)[:-1]
    sums = np.add.reduceat(inside, edges)
    filled = np.add.reduceat((inside > 0).astype(np.float64), edges)
    lengths = np.diff([*edges, bins])
    told = np.where(inside > 0, np.repeat(sums / np.maximum(filled, 1), lengths), 0.0)
    seen, told = seen / seen.sum(), told / max(told.sum(), 1e-30)
    there = seen > 0
    return float((seen[there] * np.log(seen[there] / np.maximum(told[there], 1e-12))).sum())
