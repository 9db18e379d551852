"""How tensors lie in memory, as the kernels of rows see them: collapsed dimensions, strides and their alignment."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

TYPES: dict[torch.dtype, str] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Triton's names of the types that are served."""
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
UNIT = 16
"""Elements that Triton's own specialisation looks for in a size or stride. Rows of 1000 or 72 channels miss it, and
would be read element by element, unless the kernel is told the smaller unit that does divide them."""


def type_of(t: Tensor | None) -> str:
    """Triton's name of the tensor's type; nothing where there is no tensor."""
    return "" if t is None else TYPES[t.dtype]


def unit_of(numbers: Iterable[int]) -> int:
    """The largest of 1, 2, 4, 8 and 16 that divides all these sizes and strides (in elements)."""
    return math.gcd(UNIT, *numbers)


def bucket(n: int) -> int:
    """The next power of two, 2^20 at most: sizes of one bucket share a config."""
    return 1 << min(20, max(0, n - 1).bit_length())


def dense(t: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def outer(t: Tensor, dims: int) -> list[tuple[int, int]]:
    """(size, stride) of the first dimensions that are not of size 1."""
    return [(size, stride) for size, stride in zip(t.shape[:dims], t.stride()[:dims], strict=True) if size > 1]


def one_stride(t: Tensor) -> bool:
    """Whether all dimensions but the last can be walked with one stride."""
    dims = outer(t, t.dim() - 1)
    return all(size * step == stride for (_, stride), (size, step) in itertools.pairwise(dims))


def flat(t: Tensor) -> Tensor:
    """[..., channels] as [1, rows, channels]: a view where the leading dimensions collapse, else a copy."""
    return dense(t).reshape(1, -1, t.shape[-1])


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape [..., channels], all as [1, rows, channels] or, where only that needs no copy, as [batch,
    tokens, channels]."""
    if tensors[0].dim() == 3 and not all(map(one_stride, tensors)):
        return [dense(t) for t in tensors]
    return [flat(t) for t in tensors]
