"""What every Triton kernel of this room is made of: a frozen config, a heuristic, a search space and a prune.

The jitted function and its tuner are separate objects, so that a kernel compiles ahead of time without a driver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

P = TypeVar("P")
C = TypeVar("C")
SMS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that are compiled ahead of time and shipped in the native library."""


@dataclass(frozen=True)
class Limits:
    """What one thread block may use. Source: CUDA C++ Programming Guide, compute capabilities table."""

    shared_bytes: int
    registers_per_thread: int = 255
    registers_per_block: int = 65536


LIMITS: Mapping[int, Limits] = {
    80: Limits(163 << 10),
    86: Limits(99 << 10),
    89: Limits(99 << 10),
    90: Limits(227 << 10),
    100: Limits(227 << 10),
    120: Limits(99 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """What one specialisation compiles from. `signature` is Triton's: argument -> "*fp16", "i32", "fp32", "constexpr";
    `divisible_by_16` are the arguments (pointers and sizes) that the caller promises to be multiples of 16."""

    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel(Generic[P, C]):
    """One Triton kernel. P is its problem (what decides which code is good: type, sizes, flags), C its config; both are
    frozen dataclasses of plain values, so that they can be keys and JSON."""

    name: str
    jit: Any  # triton.JITFunction
    config: type[C]
    heuristic: Callable[[P, int], C]  # problem, SM -> a good config without measuring
    space: Callable[[P, int], Iterable[C]]  # all that is worth measuring
    prune: Callable[[P, C, int], str | None]  # why this config cannot or need not be tried on this SM; None if it may
    compiled: Callable[[P, C], Compiled]
    shipped: tuple[P, ...]  # compiled ahead of time, checked against the limits, embedded in the native library


def next_power_of_2(n: int) -> int:
    return 1 << max(0, math.ceil(math.log2(n))) if n > 1 else 1
