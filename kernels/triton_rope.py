"""RMSNorm of the heads of q and k, and their rotation by position, in one Triton kernel.

A program takes a few tokens and a few heads of either q or k: cos and sin are read once for all of them. Each head is
read once, as two halves or as pairs, and stays in registers.
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

from .kernel import Compiled, Kernel, next_power_of_2
from .layout import BYTES, bucket, dense, type_of, unit_of
from .triton_common import multiple
from .tuning import config_for, interpretable

NO_ROTATION, INTERLEAVED, HALVES = 0, 1, 2


@triton.jit
def angles(pointer, batch, token, tokens, pair, pairs, batch_stride, token_stride, pair_stride):
    """cos or sin of a block of tokens, [TOKENS, 1, PAIRS], in fp32."""
    at = batch * batch_stride + token * token_stride + pair * pair_stride
    return tl.load(pointer + at, mask=(token < tokens) & (pair < pairs), other=0.0).to(tl.float32)


@triton.jit
def one_of_two(x, weight, out, cos, sin, batch, token, head, tokens, heads, head_dim, eps, x_batch, x_head, x_token,
               cos_batch, cos_token, cos_pair, sin_batch, sin_token, sin_pair, ROTATION, UNIT, TOKENS, HEADS,
               BLOCK):  # fmt: skip
    """Normalizes and rotates tokens [TOKENS, 1, 1] and heads [1, HEADS, 1] of q or of k."""
    HALF: tl.constexpr = BLOCK // 2
    row = batch * multiple(x_batch, UNIT) + token * multiple(x_token, UNIT) + head * multiple(x_head, UNIT)
    out_row = ((batch * tokens + token) * heads + head) * multiple(head_dim, UNIT)
    there = (token < tokens) & (head < heads)
    pair = tl.arange(0, HALF)[None, None, :]
    if ROTATION == 2:
        half = multiple(head_dim // 2, UNIT // 2) if UNIT > 1 else head_dim // 2
        seen = there & (pair < half)
        a = tl.load(x + row + pair, mask=seen, other=0.0).to(tl.float32)
        b = tl.load(x + row + half + pair, mask=seen, other=0.0).to(tl.float32)
        if weight is not None:
            scale = tl.rsqrt((tl.sum(a * a, 2) + tl.sum(b * b, 2)) / head_dim + eps)[:, :, None]
            a = a * scale * tl.load(weight + pair, mask=pair < half, other=0.0).to(tl.float32)
            b = b * scale * tl.load(weight + half + pair, mask=pair < half, other=0.0).to(tl.float32)
        c = angles(cos, batch, token, tokens, pair, half, cos_batch, cos_token, cos_pair)
        s = angles(sin, batch, token, tokens, pair, half, sin_batch, sin_token, sin_pair)
        tl.store(out + out_row + pair, (a * c - b * s).to(out.dtype.element_ty), mask=seen)
        tl.store(out + out_row + half + pair, (b * c + a * s).to(out.dtype.element_ty), mask=seen)
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        inside = column < multiple(head_dim, UNIT)
        seen = there & inside
        y = tl.load(x + row + column, mask=seen, other=0.0).to(tl.float32)
        if weight is not None:
            y = y * tl.rsqrt(tl.sum(y * y, 2) / head_dim + eps)[:, :, None]
            y = y * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if ROTATION == 1:
            c = angles(cos, batch, token, tokens, pair, head_dim // 2, cos_batch, cos_token, cos_pair)
            s = angles(sin, batch, token, tokens, pair, head_dim // 2, sin_batch, sin_token, sin_pair)
            a, b = tl.split(tl.reshape(y, [TOKENS, HEADS, HALF, 2]))
            y = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [TOKENS, HEADS, BLOCK])
        tl.store(out + out_row + column, y.to(out.dtype.element_ty), mask=seen)


OF_ANGLES = ("cos_batch", "cos_token", "cos_pair", "sin_batch", "sin_token", "sin_pair")
OF_HEADS = ("q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token")
SIZES = [
    *("tokens", "q_heads", "k_heads", "head_dim", "token_blocks", "q_blocks", "blocks", *OF_HEADS),
    *("cos_batch", "cos_token", "sin_batch", "sin_token"),
]
"""Triton would compile anew for each of them that is 1, or a multiple of 16, or neither. UNIT says what is needed."""


@triton.jit(do_not_specialize=SIZES)
def rope_kernel(q, k, q_weight, k_weight, cos, sin, q_out, k_out, tokens, q_heads, k_heads, head_dim, token_blocks,
                q_blocks, blocks, eps, q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, cos_token,
                cos_pair, sin_batch, sin_token, sin_pair, ROTATION: tl.constexpr, UNIT: tl.constexpr,
                TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The outputs are contiguous [batch, tokens, heads, head_dim]. `blocks` of heads: q_blocks of q, then those of k.
    Grid: batch * token_blocks * blocks."""
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    batch = (rest // token_blocks).to(tl.int64)
    token = ((rest % token_blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    head = tl.arange(0, HEADS).to(tl.int64)[None, :, None]
    if block < q_blocks:
        one_of_two(q, q_weight, q_out, cos, sin, batch, token, head + block * HEADS, tokens, q_heads, head_dim, eps,
                   q_batch, q_head, q_token, cos_batch, cos_token, cos_pair, sin_batch, sin_token, sin_pair, ROTATION,
                   UNIT, TOKENS, HEADS, BLOCK)  # fmt: skip
    else:
        one_of_two(k, k_weight, k_out, cos, sin, batch, token, head + (block - q_blocks) * HEADS, tokens, k_heads,
                   head_dim, eps, k_batch, k_head, k_token, cos_batch, cos_token, cos_pair, sin_batch, sin_token,
                   sin_pair, ROTATION, UNIT, TOKENS, HEADS, BLOCK)  # fmt: skip


@dataclass(frozen=True)
class RopeProblem:
    """Types are Triton's names, empty for what is not there."""

    rows: int  # batch times tokens, as the next power of two
    q_heads: int
    k_heads: int
    head_dim: int
    dtype: str
    weight: str = ""
    angles: str = ""
    rotation: int = NO_ROTATION
    unit: int = 16  # elements that divide the head_dim and all strides of q and k


@dataclass(frozen=True)
class RopeConfig:
    """Tokens and heads of one program."""

    tokens: int
    heads: int
    warps: int


def heuristic(problem: RopeProblem, sm: int) -> RopeConfig:
    """16 values a thread, 2048 a program: heads of one token first, which lie next to one another."""
    block = next_power_of_2(problem.head_dim)
    most = max(1, 2048 // block)
    heads = min(most, next_power_of_2(problem.q_heads) if problem.q_heads == problem.k_heads else 8)
    while heads > 1 and problem.q_heads % heads:  # no program of heads that are not there
        heads //= 2
    tokens = max(1, min(most // heads, problem.rows))
    return RopeConfig(tokens, heads, max(1, tokens * heads * block // (32 * 16)))


def space(problem: RopeProblem, sm: int) -> Iterator[RopeConfig]:
    for tokens in (1, 2, 4, 8, 16):
        for heads in (1, 2, 4, 8, 16, 32):
            yield from (RopeConfig(tokens, heads, warps) for warps in (1, 2, 4, 8))


def prune(problem: RopeProblem, config: RopeConfig, sm: int) -> str | None:
    each = config.tokens * config.heads * next_power_of_2(problem.head_dim) // (32 * config.warps)
    if each > 32:
        return f"{each} values for each thread: with their angles over half of its registers"
    if each < 16 // BYTES[problem.dtype]:
        return f"{each} values for each thread: less than one 16-byte load"
    if config.heads > next_power_of_2(problem.q_heads):
        return f"{config.heads} heads in a tile, and there are {problem.q_heads}"
    if config.tokens > problem.rows:
        return f"{config.tokens} tokens in a tile, and there are {problem.rows}"
    return None


def meta(problem: RopeProblem, config: RopeConfig) -> dict[str, Any]:
    return {
        "ROTATION": problem.rotation,
        "UNIT": problem.unit,
        "TOKENS": config.tokens,
        "HEADS": config.heads,
        "BLOCK": max(2, next_power_of_2(problem.head_dim)),
    }


def compiled(problem: RopeProblem, config: RopeConfig) -> Compiled:
    """For angles whose last dimension is contiguous."""
    p = problem
    types = {"q": p.dtype, "k": p.dtype, "q_weight": p.weight, "k_weight": p.weight, "cos": p.angles, "sin": p.angles}
    types |= {"q_out": p.dtype, "k_out": p.dtype}
    constants: dict[str, Any] = {name: None for name, kind in types.items() if not kind}
    constants |= {"cos_pair": 1, "sin_pair": 1} if p.rotation else dict.fromkeys(OF_ANGLES, 0)
    constants |= meta(p, config)
    kinds = {name: "i32" for name in rope_kernel.arg_names} | {"eps": "fp32"}
    kinds |= dict.fromkeys((*OF_ANGLES, *OF_HEADS), "i64") | {name: f"*{kind}" for name, kind in types.items()}
    kinds |= dict.fromkeys(constants, "constexpr")
    pointers = tuple(name for name, kind in kinds.items() if kind.startswith("*"))
    return Compiled({name: kinds[name] for name in rope_kernel.arg_names}, constants, config.warps, 1, pointers)


def shipped() -> Iterator[RopeProblem]:
    for dtype in ("fp16", "bf16"):
        yield RopeProblem(8192, 24, 24, 128, dtype, dtype, "fp32", INTERLEAVED)  # FLUX
        yield RopeProblem(8192, 38, 38, 64, dtype, dtype)  # SD3.5 large
        yield RopeProblem(4096, 32, 8, 128, dtype, "", "fp32", HALVES)  # llama 3


KERNEL: Kernel[RopeProblem, RopeConfig] = Kernel(
    "qk_norm_rope", rope_kernel, RopeConfig, heuristic, space, prune, compiled, tuple(shipped())
)


def angle_strides(t: Tensor | None, tokens: int) -> tuple[int, int, int]:
    """Of batch, token and pair, in elements; 0 where there is one angle for all of the batch."""
    if t is None:
        return 0, 0, 0
    return (t.stride(0) if t.dim() == 3 and t.shape[0] > 1 else 0), t.stride(-2), t.stride(-1)


def head_strides(t: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token, in elements; a size of 1 has none."""
    batch, head, token = (0 if size == 1 else step for size, step in zip(t.shape[:3], t.stride()[:3], strict=True))
    return batch, head, token


@interpretable
def launch(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.qk_norm_rope`; the results lie in memory as [batch, tokens, heads, head_dim]."""
    q, k = dense(q), dense(k)
    q_weight, k_weight = (None if t is None else dense(t) for t in (q_weight, k_weight))
    batch, q_heads, tokens, head_dim = q.shape
    k_heads = k.shape[1]
    outs = [t.new_empty(batch, tokens, t.shape[1], head_dim) for t in (q, k)]
    rotation = NO_ROTATION if cos is None else INTERLEAVED if interleaved else HALVES
    unit = unit_of((head_dim, *head_strides(q), *head_strides(k)))
    problem = RopeProblem(
        bucket(batch * tokens), q_heads, k_heads, head_dim, type_of(q), type_of(q_weight), type_of(cos), rotation, unit
    )
    config = config_for(KERNEL, problem, q.device)
    token_blocks = triton.cdiv(tokens, config.tokens)
    q_blocks, k_blocks = triton.cdiv(q_heads, config.heads), triton.cdiv(k_heads, config.heads)
    KERNEL.jit[(batch * token_blocks * (q_blocks + k_blocks),)](
        q, k, q_weight, k_weight, cos, sin, *outs, tokens, q_heads, k_heads, head_dim, token_blocks, q_blocks,
        q_blocks + k_blocks, eps, *head_strides(q), *head_strides(k), *angle_strides(cos, tokens),
        *angle_strides(sin, tokens), **meta(problem, config), num_warps=config.warps,
    )  # fmt: skip
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)
