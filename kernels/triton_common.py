# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The jitted functions have no Python types: Triton gives them theirs when it compiles.
"""Jitted functions that several kernels call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """n, which UNIT divides, in a form that tells the compiler so. (`tl.multiple_of` does nothing to an argument, and
    on a tensor of one element it fails an assertion in Triton 3.7.1.)"""
    return n // UNIT * UNIT


@triton.jit
def merged(mean, square, count, part_mean, part_square, part_count):
    """(mean, sum of squared differences from it) of two sets together, from those of each. Source: Chan, Golub and
    LeVeque, Updating formulae for computing sample variances, 1979, 2.1."""
    share = part_count / (count + part_count)
    delta = part_mean - mean
    return mean + delta * share, square + part_square + delta * delta * (count * share)
