"""LayerNorm and RMSNorm with what stands around them in transformers, in one Triton kernel.

One program takes a few rows of one batch entry. A row is read once and stays in registers; only rows wider than the
config's block are walked twice. Statistics are fp32: the mean first, then the mean square of the differences.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The jitted functions have no Python types: Triton gives them theirs when it compiles.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .kernel import LIMITS, Compiled, Kernel, next_power_of_2
from .layout import BYTES, bucket, dense, rows_of, type_of, unit_of
from .triton_common import merged, multiple
from .tuning import config_for, interpretable

SINGLE_PASS = 16384
"""Channels up to which a row is held in registers: 32 fp32 values for each of 512 threads."""
NONE, PER_BATCH, PER_TOKEN = 0, 1, 2
"""What a gate, scale or shift is: absent, one row for each batch entry, one row for each token."""


@triton.jit
def row_offset(batch, token, batch_stride, token_stride, UNIT):
    """Offsets of rows, all multiples of UNIT; `token` is [ROWS, 1] in 64 bits."""
    return batch * multiple(batch_stride, UNIT) + token * multiple(token_stride, UNIT)


@triton.jit
def shared_row(pointer, cols, inside):
    """A row that all tokens share, as it is stored; None where there is none."""
    return None if pointer is None else tl.load(pointer + cols, mask=inside, other=0.0)


@triton.jit
def modulation(pointer, batch, token, cols, seen, inside, batch_stride, token_stride, KIND, UNIT):
    """A row of the batch entry, [1, BLOCK], or one for each token, [ROWS, BLOCK], in fp32."""
    if KIND == 1:
        value = tl.load(pointer + batch * multiple(batch_stride, UNIT) + cols, mask=inside, other=0.0)
    else:
        rows = row_offset(batch, token, batch_stride, token_stride, UNIT)
        value = tl.load(pointer + rows + cols, mask=seen, other=0.0)
    return value.to(tl.float32)


@triton.jit
def summed(x, residual, gate, total, batch, token, cols, seen, inside, out_row, x_batch, x_token,
           residual_batch, residual_token, gate_batch, gate_token, GATE, UNIT):  # fmt: skip
    """What is normed, in fp32: x, or `residual + gate * x`, stored in the residual's type and rounded to it."""
    y = tl.load(x + row_offset(batch, token, x_batch, x_token, UNIT) + cols, mask=seen, other=0.0).to(tl.float32)
    if residual is not None:
        rows = row_offset(batch, token, residual_batch, residual_token, UNIT)
        old = tl.load(residual + rows + cols, mask=seen, other=0.0).to(tl.float32)
        if GATE != 0:
            y = y * modulation(gate, batch, token, cols, seen, inside, gate_batch, gate_token, GATE, UNIT)
        stored = (old + y).to(total.dtype.element_ty)
        tl.store(total + out_row + cols, stored, mask=seen)
        y = stored.to(tl.float32)
    return y


@triton.jit
def finished(y, weight, bias, scale, shift, batch, token, cols, seen, inside, scale_batch, scale_token,
             shift_batch, shift_token, SCALE, SHIFT, UNIT):  # fmt: skip
    """`(y * weight + bias) * (1 + scale) + shift`, of what there is."""
    if weight is not None:
        y = y * weight.to(tl.float32)
    if bias is not None:
        y = y + bias.to(tl.float32)
    if SCALE != 0:
        y = y * (1 + modulation(scale, batch, token, cols, seen, inside, scale_batch, scale_token, SCALE, UNIT))
    if SHIFT != 0:
        y = y + modulation(shift, batch, token, cols, seen, inside, shift_batch, shift_token, SHIFT, UNIT)
    return y


STRIDES = ("x", "residual", "gate", "scale", "shift")
SIZES = [
    *("tokens", "channels", "blocks", "blocks_per_batch"),
    *(f"{x}_{of}" for x in STRIDES for of in ("batch", "token")),
]
"""Triton would compile anew for each of them that is 1, or a multiple of 16, or neither. UNIT says what is needed."""


@triton.jit(do_not_specialize=SIZES)
def norm_kernel(x, residual, gate, weight, bias, scale, shift, out, total,
                tokens, channels, blocks, blocks_per_batch, eps,
                x_batch, x_token, residual_batch, residual_token, gate_batch, gate_token,
                scale_batch, scale_token, shift_batch, shift_token,
                RMS: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOPED: tl.constexpr, EARLY: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """Rows of [batch, tokens, channels]; out and total are contiguous. A program walks blocks of ROWS rows."""
    channels = multiple(channels, UNIT)
    cols = tl.arange(0, BLOCK)[None, :]
    if EARLY:  # under way while the first rows come in, kept for the others; it costs registers
        part = cols < channels
        w = shared_row(weight, cols, part)
        b = shared_row(bias, cols, part)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        batch = (block // blocks_per_batch).to(tl.int64)
        token = ((block % blocks_per_batch) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        out_row = (batch * tokens + token) * channels
        if not LOOPED:
            inside = cols < channels
            seen = (token < tokens) & inside
            y = summed(x, residual, gate, total, batch, token, cols, seen, inside, out_row, x_batch, x_token,
                       residual_batch, residual_token, gate_batch, gate_token, GATE, UNIT)  # fmt: skip
            if not RMS:
                mean = tl.sum(y, 1) / channels
                y = tl.where(inside, y - mean[:, None], 0.0)
            y = y * tl.rsqrt(tl.sum(y * y, 1) / channels + eps)[:, None]
            if not EARLY:
                w = shared_row(weight, cols, inside)
                b = shared_row(bias, cols, inside)
            y = finished(y, w, b, scale, shift, batch, token, cols, seen, inside, scale_batch, scale_token,
                         shift_batch, shift_token, SCALE, SHIFT, UNIT)  # fmt: skip
            tl.store(out + out_row + cols, y.to(out.dtype.element_ty), mask=seen)
        else:
            mean = tl.zeros([ROWS], tl.float32)
            square = tl.zeros([ROWS], tl.float32)  # of the differences from the mean; for RMS of the values
            for start in range(0, channels, BLOCK):
                inside = start + cols < channels
                seen = (token < tokens) & inside
                y = summed(x, residual, gate, total, batch, token, start + cols, seen, inside, out_row, x_batch,
                           x_token, residual_batch, residual_token, gate_batch, gate_token, GATE, UNIT)  # fmt: skip
                if RMS:
                    square += tl.sum(y * y, 1)
                else:
                    count = tl.minimum(BLOCK, channels - start).to(tl.float32)
                    part = tl.sum(y, 1) / count
                    y = tl.where(inside, y - part[:, None], 0.0)
                    mean, square = merged(mean, square, start * 1.0, part, tl.sum(y * y, 1), count)
            scaling = tl.rsqrt(square / channels + eps)
            tl.debug_barrier()  # the totals are read again, by other threads of the block
            for start in range(0, channels, BLOCK):
                inside = start + cols < channels
                seen = (token < tokens) & inside
                if residual is not None:
                    y = tl.load(total + out_row + start + cols, mask=seen, other=0.0).to(tl.float32)
                else:
                    y = summed(x, residual, gate, total, batch, token, start + cols, seen, inside, out_row, x_batch,
                               x_token, residual_batch, residual_token, gate_batch, gate_token, GATE, UNIT)  # fmt: skip
                y = (y - mean[:, None]) * scaling[:, None]
                w = shared_row(weight, start + cols, inside)
                b = shared_row(bias, start + cols, inside)
                y = finished(y, w, b, scale, shift, batch, token, start + cols, seen, inside, scale_batch,
                             scale_token, shift_batch, shift_token, SCALE, SHIFT, UNIT)  # fmt: skip
                tl.store(out + out_row + start + cols, y.to(out.dtype.element_ty), mask=seen)


@dataclass(frozen=True)
class NormProblem:
    """What decides which code is good. Types are Triton's names, empty for what is not there."""

    rows: int  # batch times tokens, as the next power of two
    channels: int
    dtype: str
    rms: bool = False
    weight: str = ""
    bias: str = ""
    residual: str = ""
    modulation: str = ""  # of gate, scale and shift
    gate: int = NONE
    scale: int = NONE
    shift: int = NONE
    unit: int = 16  # elements that divide the channels and all strides


@dataclass(frozen=True)
class NormConfig:
    rows: int  # that a program holds at once
    block: int  # channels that it holds at once; fewer than there are: the row is walked twice
    warps: int
    programs: int = 0  # at most so many, each walking rows; 0: one for each block of rows
    stages: int = 1  # blocks of rows that a walking program has under way
    early: bool = False  # weight and bias are read before the rows, not after their statistics


def heuristic(problem: NormProblem, sm: int) -> NormConfig:
    """16 values a thread (two 16-byte loads in half precision), at least 2048 values a program where rows abound."""
    block = min(next_power_of_2(problem.channels), SINGLE_PASS)
    wanted = max(1, 2048 // block)
    many = max(1, problem.rows // 512)  # few rows: rather more programs than larger ones
    rows = min(wanted, next_power_of_2(many) if many < wanted else wanted)
    each = 16 if block < SINGLE_PASS else 32
    return NormConfig(rows, block, max(1, min(16, rows * block // (32 * each))))


def space(problem: NormProblem, sm: int) -> Iterator[NormConfig]:
    block = min(next_power_of_2(problem.channels), SINGLE_PASS)
    for rows in (1, 2, 4, 8):
        for warps in (1, 2, 4, 8, 16, 32):
            yield NormConfig(rows, block, warps)
            yield NormConfig(rows, block, warps, early=True)
            for programs in (264, 528, 1056):
                for stages in (1, 2, 3):
                    yield NormConfig(rows, block, warps, programs, stages, early=True)


def prune(problem: NormProblem, config: NormConfig, sm: int) -> str | None:
    each = config.rows * config.block // (32 * config.warps)
    if each > 64:
        return f"{each} values for each thread: two fp32 copies of them are over half of its registers"
    if each < 16 // BYTES[problem.dtype]:
        return f"{each} values for each thread: less than one 16-byte load"
    if config.programs >= problem.rows // config.rows > 0:
        return f"{config.programs} programs for about {problem.rows // config.rows} blocks of rows: none walks"
    if config.early and not config.programs and not (problem.weight or problem.bias):
        return "there is no weight to read early"
    inputs = 1 + sum(map(bool, (problem.residual, problem.gate, problem.scale, problem.shift)))
    held = (config.stages - 1) * inputs * config.rows * config.block * BYTES[problem.dtype]
    if held > LIMITS[sm].shared_bytes:
        return f"{held} bytes of shared memory for {config.stages} stages, {LIMITS[sm].shared_bytes} are there"
    return None


def compiled(problem: NormProblem, config: NormConfig) -> Compiled:
    p = problem
    kinds = {
        "gate": p.modulation if p.gate else "",
        "scale": p.modulation if p.scale else "",
        "shift": p.modulation if p.shift else "",
    }
    result = p.residual or p.dtype
    there = {"x": p.dtype, "residual": p.residual, "weight": p.weight, "bias": p.bias, **kinds}
    order = ("x", "residual", "gate", "weight", "bias", "scale", "shift")
    signature = {name: f"*{there[name]}" if there[name] else "constexpr" for name in order}
    signature |= {"out": f"*{result}", "total": f"*{p.residual}" if p.residual else "constexpr"}
    signature |= {"tokens": "i32", "channels": "i32", "blocks": "i32", "blocks_per_batch": "i32", "eps": "fp32"}
    strides = {f"{name}_{of}": "i64" for name in STRIDES for of in ("batch", "token") if there[name]}
    constants: dict[str, Any] = {name: None for name in (*order, "total") if signature[name] == "constexpr"}
    constants |= {f"{name}_{of}": 0 for name in STRIDES for of in ("batch", "token") if not there[name]}
    constants |= meta(problem, config)
    signature |= strides | {name: "constexpr" for name in constants}
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    ordered = {name: signature[name] for name in norm_kernel.arg_names}
    return Compiled(ordered, constants, config.warps, config.stages, tuple(aligned))


def meta(problem: NormProblem, config: NormConfig) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "RMS": problem.rms,
        "GATE": problem.gate,
        "SCALE": problem.scale,
        "SHIFT": problem.shift,
        "UNIT": problem.unit,
        "ROWS": config.rows,
        "BLOCK": config.block,
        "LOOPED": config.block < problem.channels,
        "EARLY": config.early and config.block >= problem.channels,
        "STAGES": config.stages,
    }


def adaln(rows: int, channels: int, dtype: str) -> NormProblem:
    return NormProblem(rows, channels, dtype, modulation=dtype, scale=PER_BATCH, shift=PER_BATCH)


def add_adaln(rows: int, channels: int, dtype: str) -> NormProblem:
    return NormProblem(
        rows, channels, dtype, residual=dtype, modulation=dtype, gate=PER_BATCH, scale=PER_BATCH, shift=PER_BATCH
    )


def shipped() -> Iterator[NormProblem]:
    for dtype in ("fp16", "bf16"):
        yield NormProblem(8192, 640, dtype, weight=dtype, bias=dtype)  # SDXL's transformer blocks
        yield NormProblem(2048, 1280, dtype, weight=dtype, bias=dtype)  # SDXL, SD1.5
        yield adaln(8192, 3072, dtype)  # FLUX
        yield add_adaln(8192, 3072, dtype)
        yield add_adaln(512, 1152, dtype)  # DiT-XL/2
        yield NormProblem(4096, 4096, dtype, rms=True, weight=dtype, residual=dtype)  # llama


KERNEL: Kernel[NormProblem, NormConfig] = Kernel(
    "norm", norm_kernel, NormConfig, heuristic, space, prune, compiled, tuple(shipped())
)


def modulation_rows(t: Tensor | None, like: Tensor) -> Tensor | None:
    """A gate, scale or shift as [batch, tokens, channels] with strides of 0 where it is broadcast."""
    return None if t is None else dense(t).expand(like.shape)


def kind_of(t: Tensor | None) -> int:
    if t is None:
        return NONE
    return PER_BATCH if t.stride(1) == 0 or t.shape[1] == 1 else PER_TOKEN


def strides_of(t: Tensor | None) -> tuple[int, int]:
    """Of batch and tokens in elements; a size of 1 has none."""
    if t is None:
        return 0, 0
    return (0 if t.shape[0] == 1 else t.stride(0)), (0 if t.shape[1] == 1 else t.stride(1))


def views_of(
    x: Tensor, residual: Tensor | None, modulations: list[Tensor | None]
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """x and residual as [batch, tokens, channels], modulations alike. Where each batch entry is one token, the entries
    are taken as the tokens: a program's rows share a batch entry."""
    rows = [x] if residual is None else [x, residual]
    if all(t is None for t in modulations):
        views: list[Tensor] = rows_of(*rows)
        return views[0], views[1] if residual is not None else None, modulations
    views = [dense(t) for t in rows]
    modulations = [modulation_rows(t, x) for t in modulations]
    if x.shape[1] == 1:
        views = [t.transpose(0, 1) for t in views]
        modulations = [None if t is None else t.transpose(0, 1) for t in modulations]
    return views[0], views[1] if residual is not None else None, modulations


def problem_of(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, modulations: list[Tensor | None],
    rms: bool,
) -> NormProblem:  # fmt: skip
    numbers = [x.shape[2]] + [stride for t in (x, residual, *modulations) for stride in strides_of(t)]
    kinds = [kind_of(t) for t in modulations]
    found = [type_of(t) for t in modulations if t is not None]
    return NormProblem(
        bucket(x.shape[0] * x.shape[1]), x.shape[2], type_of(x), rms, type_of(weight), type_of(bias),
        type_of(residual), found[0] if found else "", kinds[0], kinds[1], kinds[2], unit_of(numbers),
    )  # fmt: skip


def launch(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, shift: Tensor | None, rms: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(normed, total or None), contiguous, in the type of the residual or else of x."""
    like = x if residual is None else residual
    out = like.new_empty(x.shape)
    total = None if residual is None else like.new_empty(x.shape)
    rows, old, modulations = views_of(x, residual, [gate, scale, shift])
    weight, bias = (None if t is None else dense(t) for t in (weight, bias))
    problem = problem_of(rows, old, weight, bias, modulations, rms)
    config = config_for(KERNEL, problem, x.device)
    batch, tokens, channels = rows.shape
    per_batch = triton.cdiv(tokens, config.rows)
    blocks = batch * per_batch
    grid = (min(blocks, config.programs) if config.programs else blocks,)
    strides = [s for t in (rows, old, *modulations) for s in strides_of(t)]
    gate, scale, shift = modulations
    KERNEL.jit[grid](
        rows, old, gate, weight, bias, scale, shift, out, total, tokens, channels, blocks, per_batch, eps, *strides,
        **meta(problem, config), num_warps=config.warps,
    )  # fmt: skip
    return out, total


@interpretable
def launch_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    return launch(x, None, None, weight, bias, eps, scale, shift, rms=False)[0]


@interpretable
def launch_rms_norm(x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return launch(x, None, None, weight, None, eps, scale, shift, rms=True)[0]


@interpretable(like=1)
def launch_add_layer_norm(
    x: Tensor, residual: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return launch(x, residual, gate, weight, bias, eps, scale, shift, rms=False)


@interpretable(like=1)
def launch_add_rms_norm(
    x: Tensor, residual: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return launch(x, residual, gate, weight, None, eps, scale, shift, rms=True)
