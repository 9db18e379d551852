"""Outliers: the few channels of an activation that are much larger than all others stay in the base precision.

One scale serves a whole activation, so a channel that is ten times larger leaves the others a tenth of the steps. Its
products are few: `x W` is computed as `few(x) few(W) + x[:, outliers] W[outliers]`, the second in floating point. The
decomposition is that of Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS
2022; which channels they are is found in calibration rather than anew in each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .scales import Array
from .sites import Site
from .smooth import Smoothing

MOST, SHARE = 16, 16
"""So many channels at most, and no more than this part of them: their products have to stay few."""
ENOUGH = 0.7
"""They stand apart where without them the largest magnitude is less than so much of what it was: steps that much
smaller (3 dB less error) where the range is all of it, as minmax has it."""


def outliers(
    sites: Sequence[Site], channels: Mapping[str, Array], smoothing: Mapping[str, Smoothing]
) -> dict[str, Array]:
    """Activation -> which of its channels are outliers once it is smoothed: truth values, `[channels]`.

    `channels` are the largest magnitudes of each channel of an activation's last axis. Left out is what a quantized
    convolution or attention has to do with too: the value has one scale for all of them."""
    linear = {s.activation for s in sites if s.kind == "linear" and not s.stays}
    others = {name for s in sites if s.kind != "linear" and not s.stays for name in (*s.reads, s.output)}
    found = {}
    for name in sorted((linear - others) & set(channels)):
        smooth = smoothing.get(name)
        found[name] = largest(channels[name] / smooth.divisor if smooth is not None else channels[name])
    return {name: mask for name, mask in found.items() if mask.any()}


def largest(channels: Array) -> Array:
    """Which are outliers among channels of these magnitudes: as many as may be, or none."""
    count, found = min(MOST, channels.size // SHARE), np.zeros(channels.size, bool)
    order = np.argsort(channels, kind="stable")
    if count and channels[order[-count - 1]] < ENOUGH * channels[order[-1]]:
        found[order[-count:]] = True
    return found
