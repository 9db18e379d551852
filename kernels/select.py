"""Which implementation runs: what was asked for, or for `auto` what was measured to be faster."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, float32

from optimize.errors import MissingError

Impl = Literal["auto", "triton", "reference"]
IMPLS = ("auto", "triton", "reference")
THRESHOLDS = Path(__file__).with_name("thresholds.json")
"""Written by `tools/bench_kernels.py` on a GPU: per device, where Triton was measured to win."""


@dataclass(frozen=True)
class Threshold:
    """`auto` takes Triton for this operation where the work is at least `min_work` (elements of the first tensor; for
    attention query tokens times key tokens) and the head or row is at most `max_width` wide."""

    min_work: int
    max_width: int


@functools.cache
def thresholds() -> Mapping[str, Any]:
    """`{"device name": {"made": ..., "record": ..., "operations": {name: {"min_work": ..., "max_width": ...}}}}`."""
    found: Mapping[str, Any] = json.loads(THRESHOLDS.read_text()) if THRESHOLDS.exists() else {}
    return found


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python: `TRITON_INTERPRET=1` when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(IMPLS)}")


def why_not_triton(x: Tensor) -> str | None:
    """Why Triton cannot take this tensor; None where it can."""
    if not triton_installed():
        return "triton is not installed"
    if not x.is_cuda and not interpreting():
        return f"the tensors are on {x.device.type} and Triton needs a GPU"
    return None


def chosen(operation: str, impl: str, x: Tensor, work: int, width: int) -> Literal["triton", "reference"]:
    """The implementation that runs. `impl="triton"` never falls back: MissingError where it cannot run."""
    if impl == "reference":
        return "reference"
    why = why_not_triton(x)
    if impl == "triton":
        if why is None:
            return "triton"
        raise MissingError(
            f'{operation}(impl="triton") cannot run here',
            got=why,
            expected="a CUDA GPU, or Triton's interpreter",
            mend='use impl="auto" or "reference"; to try it on a CPU set TRITON_INTERPRET=1 before importing triton',
        )
    if why is not None or not x.is_cuda or x.dtype == float32:
        return "reference"
    rule = measured(operation, x.device.index or 0)
    return "triton" if rule is not None and work >= rule.min_work and width <= rule.max_width else "reference"


@functools.cache
def measured(operation: str, device: int) -> Threshold | None:
    """What was measured for this operation on this device; None where nothing was."""
    import torch

    rules = thresholds().get(torch.cuda.get_device_name(device), {}).get("operations", {})
    return Threshold(**rules[operation]) if operation in rules else None
