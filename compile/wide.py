"""Eager fp16 with fp32's range: what the model would compute if no number were too large for its 11 bits.

Where fp16 itself overflows, eager in fp16 proves nothing. Here the model runs as it does in fp16, type for type, but a
tensor that calls itself fp16 holds fp32 numbers, rounded after each operator to fp16 or, out of its range, to 11 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_flatten, tree_map, tree_unflatten

HALF, FLOAT, META = torch.float16, torch.float32, torch.device("meta")


LEAST_RMS = 2.0**-17
"""Where a tensor's numbers are smaller than this on the whole (root mean square), fp16's step of 2^-24 costs more than
2^-9 of them, which is bf16's precision: fp16 cannot hold them."""


def to_11_bits(x: torch.Tensor) -> torch.Tensor:
    """fp32 numbers rounded as fp16 rounds them, ties to even; a tensor that fp16 cannot hold keeps fp32's exponents."""
    near = x.half().float()
    if fits(x, near):
        return near
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(FLOAT)


def fits(x: torch.Tensor, near: torch.Tensor) -> bool:
    """Whether fp16 (`near`) holds the numbers: nothing becomes infinite, and they are not too small."""
    if bool((torch.isinf(near) & ~torch.isinf(x)).any()):
        return False
    size = float(torch.linalg.vector_norm(x, dtype=torch.float64)) if x.numel() else 0.0
    return not 0 < size < LEAST_RMS * math.sqrt(x.numel())


def weight_in(tensor: torch.Tensor, dtype: torch.dtype, wide: bool) -> torch.Tensor:
    """A weight in the type; where fp16 cannot hold it and its range is to be wide, as a `WideHalf`."""
    made = tensor.to(dtype)
    if not wide or dtype != HALF or fits(tensor.float(), made.float()):
        return made
    return WideHalf(to_11_bits(tensor.float()))


class WideHalf(torch.Tensor):
    """A tensor that is fp16 to whoever asks, and holds `wide`, fp32."""

    wide: torch.Tensor

    @staticmethod
    def __new__(cls, wide: torch.Tensor) -> WideHalf:
        made: WideHalf = torch.Tensor._make_wrapper_subclass(
            cls, wide.shape, strides=wide.stride(), storage_offset=wide.storage_offset(), dtype=HALF, device=wide.device
        )
        made.wide = wide
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stubs leave out `func`
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(func, args, kwargs or {})


class WideRange(TorchDispatchMode):
    """While active, every operator that gives fp16 gives a `WideHalf`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The operator on fp32 numbers; what it gives as fp16 is rounded and wrapped."""
    half = tree_any(lambda a: a is HALF or (isinstance(a, torch.Tensor) and a.dtype == HALF), (args, kwargs))
    if not half or kwargs.get("device") == META:  # on meta are weights that are not there now
        return func(*args, **kwargs)
    wide_args, wide_kwargs = tree_map(widened, (tuple(args), dict(kwargs)))
    if not any("Tensor" in str(r.type) for r in func._schema.returns):  # item(), equal()
        return func(*wide_args, **wide_kwargs)
    halves = half_results(func, args, kwargs)
    results, spec = tree_flatten(func(*wide_args, **wide_kwargs))
    if func._schema.is_mutable and isinstance(args[0], WideHalf):  # written into, through whatever view it is
        args[0].wide.copy_(to_11_bits(args[0].wide))
        return args[0]
    keep = (lambda x: x) if getattr(func, "is_view", False) else to_11_bits  # a view shares numbers rounded already
    made = [WideHalf(keep(r)) if half and r.dtype == FLOAT else r for r, half in zip(results, halves, strict=True)]
    return tree_unflatten(made, spec)


def widened(a: Any) -> Any:
    if isinstance(a, WideHalf):
        return a.wide
    if a is HALF:
        return FLOAT
    return a.float() if isinstance(a, torch.Tensor) and a.dtype == HALF else a


def half_results(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[bool]:
    """For each result of the operator, whether it is fp16: torch's own answer, on tensors without numbers."""

    def empty(a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=META)
        return META if isinstance(a, torch.device) else a

    meta_args, meta_kwargs = tree_map(empty, (tuple(args), dict(kwargs)))
    flat, _ = tree_flatten(func(*meta_args, **meta_kwargs))
    return [isinstance(r, torch.Tensor) and r.dtype == HALF for r in flat]
