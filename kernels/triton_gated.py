"""The product of a value and an activated gate (GEGLU, SwiGLU) in Triton: one read of each, one write."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The jitted functions have no Python types: Triton gives them theirs when it compiles.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .kernel import Compiled, Kernel, next_power_of_2
from .layout import BYTES, bucket, one_stride, type_of, unit_of
from .triton_common import multiple
from .tuning import config_for, interpretable


@triton.jit
def activated(x, ACTIVATION):
    """In fp32. tanh(u) is 2 sigmoid(2u) - 1, so the approximate gelu is x sigmoid(2u) (Hendrycks and Gimpel, 2016)."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * tl.sigmoid(x)


SIZES = ["rows", "columns", "blocks", "value_row", "gate_row"]
"""Triton would compile anew for each of them that is 1, or a multiple of 16, or neither. UNIT says what is needed."""


@triton.jit(do_not_specialize=SIZES)
def gated_kernel(value, gate, out, rows, columns, blocks, value_row, value_column, gate_row, gate_column,
                 ACTIVATION: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A tile [ROWS, BLOCK] of [rows, columns]; out is contiguous. Grid: row blocks * blocks (of columns)."""
    columns = multiple(columns, UNIT)
    row = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    seen = (row < rows) & (column < columns)
    v = tl.load(value + row * multiple(value_row, UNIT) + column * value_column, mask=seen, other=0.0)
    g = tl.load(gate + row * multiple(gate_row, UNIT) + column * gate_column, mask=seen, other=0.0)
    y = v.to(tl.float32) * activated(g.to(tl.float32), ACTIVATION)
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=seen)


@dataclass(frozen=True)
class GatedProblem:
    rows: int  # as the next power of two
    columns: int
    dtype: str
    activation: str  # a key of reference.GATES
    unit: int = 16  # elements that divide the columns and the strides of rows


@dataclass(frozen=True)
class GatedConfig:
    """A tile of [rows, columns]."""

    rows: int
    block: int
    warps: int


def heuristic(problem: GatedProblem, sm: int) -> GatedConfig:
    """16 values a thread of value and gate each: four 16-byte loads under way in half precision."""
    block = min(2048, next_power_of_2(problem.columns))
    rows = max(1, min(2048 // block, problem.rows))
    return GatedConfig(rows, block, max(1, rows * block // (32 * 16)))


def space(problem: GatedProblem, sm: int) -> Iterator[GatedConfig]:
    widest = next_power_of_2(problem.columns)
    for block in (256, 512, 1024, 2048, 4096):
        for rows in (1, 2, 4, 8):
            if block <= widest:
                yield from (GatedConfig(rows, block, warps) for warps in (2, 4, 8, 16))


def prune(problem: GatedProblem, config: GatedConfig, sm: int) -> str | None:
    each = config.rows * config.block // (32 * config.warps)
    if each > 64:
        return f"{each} values for each thread: value and gate are over half of its registers in fp32"
    if each < 16 // BYTES[problem.dtype]:
        return f"{each} values for each thread: less than one 16-byte load"
    if config.rows > problem.rows:
        return f"{config.rows} rows in a tile, and there are {problem.rows}"
    return None


def meta(problem: GatedProblem, config: GatedConfig) -> dict[str, Any]:
    return {"ACTIVATION": problem.activation, "UNIT": problem.unit, "ROWS": config.rows, "BLOCK": config.block}


def compiled(problem: GatedProblem, config: GatedConfig) -> Compiled:
    """For a last dimension that is contiguous."""
    pointers = dict.fromkeys(("value", "gate", "out"), f"*{problem.dtype}")
    strides = dict.fromkeys(("value_row", "gate_row"), "i64")
    constants = {"value_column": 1, "gate_column": 1, **meta(problem, config)}
    kinds = pointers | strides | dict.fromkeys(("rows", "blocks"), "i32") | {"columns": "i64"}
    kinds |= dict.fromkeys(constants, "constexpr")
    return Compiled({name: kinds[name] for name in gated_kernel.arg_names}, constants, config.warps, 1, tuple(pointers))


def shipped() -> Iterator[GatedProblem]:
    for dtype in ("fp16", "bf16"):
        yield GatedProblem(8192, 2560, dtype, "gelu")  # SDXL's transformers
        yield GatedProblem(2048, 5120, dtype, "gelu")
        yield GatedProblem(4096, 14336, dtype, "silu")  # llama
        yield GatedProblem(512, 10240, dtype, "gelu_tanh")  # T5 v1.1


KERNEL: Kernel[GatedProblem, GatedConfig] = Kernel(
    "gated", gated_kernel, GatedConfig, heuristic, space, prune, compiled, tuple(shipped())
)


def rows_and_columns(value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [rows, columns]: all in one row where both are contiguous, else views, or copies where the leading
    dimensions cannot be walked with one stride."""
    if value.is_contiguous() and gate.is_contiguous():
        return value.view(1, -1), gate.view(1, -1)
    first, second = (t if one_stride(t) else t.contiguous() for t in (value, gate))
    return first.reshape(-1, value.shape[-1]), second.reshape(-1, value.shape[-1])


@interpretable
def launch(value: Tensor, gate: Tensor, activation: str) -> Tensor:
    """As `reference.gated`."""
    out = value.new_empty(value.shape)
    value, gate = rows_and_columns(value, gate)
    rows, columns = value.shape
    steps = [t.stride(0) if rows > 1 else 0 for t in (value, gate)]
    unit = unit_of((columns, *steps))
    problem = GatedProblem(bucket(rows), columns, type_of(value), activation, unit)
    config = config_for(KERNEL, problem, value.device)
    blocks = triton.cdiv(columns, config.block)
    KERNEL.jit[(triton.cdiv(rows, config.rows) * blocks,)](
        value, gate, out, rows, columns, blocks, steps[0], value.stride(1), steps[1], gate.stride(1),
        **meta(problem, config), num_warps=config.warps,
    )  # fmt: skip
    return out
