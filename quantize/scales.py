"""Numbers of few bits, in NumPy: quantize, dequantize, and the choice of a scale. What the graphs do is held to these.

All is symmetric: `q = round(x / scale)` with ties to even, saturated, as QuantizeLinear defines it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optimize.errors import InputError

from .schemes import METHODS, Format

Array = np.ndarray[Any, Any]
BINS = 2048
PERCENTILE = 99.99
LEVELS = 128
"""Magnitudes that an int8 tensor can tell apart."""
LEAST_SCALE = 2.0**-126
"""The smallest normal fp32 number: a tensor of zeros gets it, a scale of zero would divide by it."""


def quantize(x: Array, scale: Array | float, fmt: Format) -> Array:
    """`x` in units of `scale` (which broadcasts), as int8 (int4 in int8) or ml_dtypes' float8_e4m3fn."""
    units = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    if fmt.name == "e4m3":
        import ml_dtypes

        return np.clip(units, -fmt.largest, fmt.largest).astype(ml_dtypes.float8_e4m3fn)
    return np.clip(np.rint(units), -fmt.largest, fmt.largest).astype(np.int8)


def dequantize(q: Array, scale: Array | float) -> Array:
    """What the numbers `q` stand for, in fp32."""
    return np.asarray(q.astype(np.float32) * np.asarray(scale, np.float32))


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


def spread(scale: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """Scales in a form that broadcasts against a weight of `shape`."""
    if block:
        return np.repeat(scale, block, axis=0)[: shape[0]]
    return scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])


@dataclass
class Histogram:
    """Magnitudes of a tensor over any number of samples, in constant memory.

    The bins have one width, which doubles (neighbours are merged) when a larger magnitude comes."""

    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    width: float = 0.0
    largest: float = 0.0

    def add(self, x: Any) -> None:
        """Counts the magnitudes of a torch tensor. Raises InputError for values that are not finite."""
        import torch

        magnitude = x.detach().float().abs().reshape(-1)
        if not magnitude.numel():
            return
        top = float(magnitude.max())
        if not np.isfinite(top):
            raise InputError("values that are not finite cannot be calibrated", got=top)
        self.largest = max(self.largest, top)
        if top == 0.0:
            self.counts[0] += magnitude.numel()
            return
        if self.width == 0.0:  # so far nothing, or zeros, which stay in the first bin
            self.width = top * (1 + 1e-6) / BINS
        while top >= self.width * BINS:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.width *= 2
        found = torch.histc(magnitude, BINS, 0.0, self.width * BINS)
        self.counts += found.to(torch.int64).numpy()

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
    if method == "minmax" or fmt.name == "e4m3" or histogram.width == 0.0:
        return histogram.largest
    if method == "percentile":
        last = int(np.searchsorted(np.cumsum(histogram.counts), total * PERCENTILE / 100))
        return min(histogram.largest, (last + 1) * histogram.width)
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    bins = np.unique(np.linspace(min(LEVELS, used), used, 128).round().astype(int))
    loss = squared_error if method == "mse" else divergence
    losses = [loss(histogram, int(n), fmt) for n in bins]
    return min(histogram.largest, float(bins[int(np.argmin(losses))] * histogram.width))


def squared_error(histogram: Histogram, bins: int, fmt: Format) -> float:
    """Summed squared error where magnitudes above `bins` bins saturate."""
    x = histogram.centres
    step = bins * histogram.width / fmt.largest
    got = np.minimum(np.rint(x / step), fmt.largest) * step
    # a bin narrower than a step is spread over it: the mean of the squared rounding error is step^2 / 12
    inside = x <= bins * histogram.width
    error = np.where(inside, min(step, 1e30) ** 2 / 12, (x - got) ** 2)
    return float((histogram.counts * error).sum())


def divergence(histogram: Histogram, bins: int, fmt: Format) -> float:
    """Kullback-Leibler divergence of the distribution cut at `bins` bins from the same in `LEVELS` levels."""
    counts = histogram.counts.astype(np.float64)
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
