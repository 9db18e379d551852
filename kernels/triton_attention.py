# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The jitted functions have no Python types: Triton gives them theirs when it compiles.
"""Attention in Triton: one pass over the keys with a running maximum and sum, in base 2 and fp32.

A program takes `block_m` query rows of one head. Where few queries share a key head (decoding), the rows are the
queries of all heads of its group. The head is held in at most two chunks whose widths are powers of two (80 = 64 + 16),
so that little is padded. Blocks of keys that every row sees are walked first, without masks; then those at the edge.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao, FlashAttention-2, 2023, 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import LIMITS, Compiled, Kernel, next_power_of_2
from .layout import BYTES, TYPES, bucket, type_of, unit_of
from .ops import heads_last
from .triton_common import multiple
from .tuning import config_for, interpretable, sm_of

LOG2E = tl.constexpr(1.4426950408889634)
ALSO = ("gluon_attention.py",)
"""What a measured config may name besides this kernel: its source counts too."""
FINEST = 16
"""The least width of a chunk and of a block: what the tensor cores multiply at once."""
SHORT = 128
"""Keys up to which one block holds them all."""
EVEN = 128
"""Where the keys are a multiple of this, no block of them has an edge."""
TENSOR_COLUMNS = 512
"""Of sm_100's tensor memory. Triton 3.7.1 makes an empty kernel of what does not fit into it."""


# --- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def chunk(pointer, rows, cols, col_stride, seen, HEAD: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
          EDGE: tl.constexpr):  # fmt: skip
    """Columns START to START + WIDTH of rows at the offsets `rows` [N]; zeros past the head, and past the last row
    where EDGE."""
    at = START + cols
    where = pointer + rows[:, None] + at.to(tl.int64)[None, :] * col_stride
    if EDGE and START + WIDTH > HEAD:
        return tl.load(where, mask=seen[:, None] & (at < HEAD)[None, :], other=0.0)
    elif EDGE:
        return tl.load(where, mask=seen[:, None], other=0.0)
    elif START + WIDTH > HEAD:
        return tl.load(where, mask=(at < HEAD)[None, :], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def biased(scores, bias, bias_rows, row_seen, start, n, seen, bias_key, scale, KIND: tl.constexpr,
           ONE_ROW: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Scores with the bias: scaled where it is added, as they are where not; -inf for a key that is not seen.
    KIND: 0 none, 1 added, 2 boolean. ONE_ROW: the bias is the same for all rows."""
    if KIND == 1:
        scores = scores * scale
    if KIND != 0:
        where = bias + (start + n).to(tl.int64)[None, :] * bias_key
        if ONE_ROW:
            inside = seen[None, :] if EDGE else None
        else:
            where += bias_rows[:, None]
            inside = row_seen[:, None] & seen[None, :] if EDGE else row_seen[:, None]
        if KIND == 1:
            scores += tl.load(where, mask=inside, other=0.0 if EDGE or not ONE_ROW else None).to(tl.float32)
        else:
            sees = tl.load(where, mask=inside, other=0 if EDGE or not ONE_ROW else None)
            scores = tl.where(sees != 0, scores, -float("inf"))
    return scores


@triton.jit
def step(m, total, acc0, acc1, q0, q1, k, v, k_rows, v_rows, bias, bias_rows, row_seen, last_key, start, keys,
         n, cols0, cols1, k_token, v_token, k_dim, v_dim, bias_key, scale,
         HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, KIND: tl.constexpr, ONE_ROW: tl.constexpr,
         CAUSAL: tl.constexpr, EDGE: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The keys from `start` on: the new maximum [M], sum [M] and weighted values [M, D0], [M, D1]."""
    k += start * k_token
    v += start * v_token
    seen = start + n < keys
    k0 = chunk(k, k_rows, cols0, k_dim, seen, HEAD, 0, D0, EDGE)
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        k1 = chunk(k, k_rows, cols1, k_dim, seen, HEAD, D0, D1, EDGE)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
    scores = biased(scores, bias, bias_rows, row_seen, start, n, seen, bias_key, scale, KIND, ONE_ROW, EDGE)
    if EDGE:
        inside = seen[None, :]
        if CAUSAL:
            inside = inside & (last_key[:, None] >= (start + n)[None, :])
        scores = tl.where(inside, scores, -float("inf"))
    best = tl.max(scores, 1)
    if not FIRST:
        best = tl.maximum(m, best)
    top = best
    if KIND != 0:  # a row that has seen no key yet: -inf - -inf is not a number
        top = tl.where(best == -float("inf"), 0.0, best)
    if KIND == 1:  # a large negative bias must not overflow, so the difference is scaled
        p = tl.exp2((scores - top[:, None]) * LOG2E)
    else:  # one multiply-add for each score
        p = tl.exp2(scores * (scale * LOG2E) - (top * (scale * LOG2E))[:, None])
    if FIRST:
        total = tl.sum(p, 1)
    else:
        shrunk = tl.exp2((m - top) * (LOG2E if KIND == 1 else scale * LOG2E))
        total = total * shrunk + tl.sum(p, 1)
        acc0 = acc0 * shrunk[:, None]
    v0 = chunk(v, v_rows, cols0, v_dim, seen, HEAD, 0, D0, EDGE)
    acc0 = tl.dot(p.to(v0.dtype), v0, acc0, input_precision=PRECISION)
    if D1 > 0:
        if not FIRST:
            acc1 = acc1 * shrunk[:, None]
        v1 = chunk(v, v_rows, cols1, v_dim, seen, HEAD, D0, D1, EDGE)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1, input_precision=PRECISION)
    return best, total, acc0, acc1


ATTENTION_SIZES = ["q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token",
                   "bias_batch", "bias_head", "bias_query", "bias_key", "out_batch", "out_head", "out_token",
                   "programs", "queries", "keys", "blocks"]  # fmt: skip


@triton.jit(do_not_specialize=ATTENTION_SIZES)
def attention_kernel(  # noqa: PLR0915
    q, k, v, bias, out,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    bias_batch, bias_head, bias_query, bias_key, out_batch, out_head, out_token,
    programs, queries, keys, blocks, scale,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, ONE_ROW: tl.constexpr, ONE_BLOCK: tl.constexpr, EVEN_KEYS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: batch * programs * blocks, where `programs` are the heads (PACK: the key heads) and `blocks` those of query
    rows. Strides are in elements and divisible by UNIT where they are not those of a last dimension or a bias.

    GROUP query heads share a key head; PACK: their rows stand together, the heads of one query next to each other.
    """
    block = blocks - 1 - tl.program_id(0) % blocks if CAUSAL else tl.program_id(0) % blocks  # the longest start first
    head = (tl.program_id(0) // blocks) % programs
    batch = (tl.program_id(0) // blocks // programs).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP if PACK else row
    row_seen = query < queries
    key_head = (head if PACK else head // GROUP).to(tl.int64)
    first_head = (head * GROUP if PACK else head).to(tl.int64)
    sub = (row % GROUP if PACK else row * 0).to(tl.int64)

    q_token, q_head = multiple(q_token, UNIT).to(tl.int64), multiple(q_head, UNIT).to(tl.int64)
    k_token, v_token = multiple(k_token, UNIT).to(tl.int64), multiple(v_token, UNIT).to(tl.int64)
    q += batch * multiple(q_batch, UNIT) + first_head * q_head
    k += batch * multiple(k_batch, UNIT) + key_head * multiple(k_head, UNIT)
    v += batch * multiple(v_batch, UNIT) + key_head * multiple(v_head, UNIT)
    n = tl.arange(0, BLOCK_N)
    cols0, cols1 = tl.arange(0, D0), tl.arange(0, D1 if D1 > 0 else D0)
    q_rows = query.to(tl.int64) * q_token + sub * q_head
    k_rows, v_rows = n.to(tl.int64) * k_token, n.to(tl.int64) * v_token
    bias_rows = sub
    if KIND != 0:
        bias += batch * bias_batch + first_head * bias_head
        bias_rows = query.to(tl.int64) * bias_query + sub * bias_head

    q0 = chunk(q, q_rows, cols0, q_dim, row_seen, HEAD, 0, D0, True)
    q1 = q0
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = total
    if D1 > 0:
        q1 = chunk(q, q_rows, cols1, q_dim, row_seen, HEAD, D0, D1, True)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)

    last_key = query + keys - queries  # what a causal row sees up to
    if ONE_BLOCK:
        m, total, acc0, acc1 = step(
            m, total, acc0, acc1, q0, q1, k, v, k_rows, v_rows, bias, bias_rows, row_seen, last_key, 0, keys,
            n, cols0, cols1, k_token, v_token, k_dim, v_dim, bias_key, scale,
            HEAD, D0, D1, KIND, ONE_ROW, CAUSAL, True, True, PRECISION)  # fmt: skip
    else:
        whole, end = keys // BLOCK_N * BLOCK_N, keys
        if CAUSAL:
            first = block * BLOCK_M // GROUP if PACK else block * BLOCK_M
            last = (block * BLOCK_M + BLOCK_M - 1) // GROUP if PACK else block * BLOCK_M + BLOCK_M - 1
            whole = tl.minimum(whole, (first + keys - queries + 1) // BLOCK_N * BLOCK_N)
            end = tl.minimum(keys, last + keys - queries + 1)
        for start in tl.range(0, whole, BLOCK_N):
            m, total, acc0, acc1 = step(
                m, total, acc0, acc1, q0, q1, k, v, k_rows, v_rows, bias, bias_rows, row_seen, last_key, start, keys,
                n, cols0, cols1, k_token, v_token, k_dim, v_dim, bias_key, scale,
                HEAD, D0, D1, KIND, ONE_ROW, CAUSAL, False, False, PRECISION)  # fmt: skip
        if CAUSAL or not EVEN_KEYS:
            for start in tl.range(whole, end, BLOCK_N, num_stages=1):
                m, total, acc0, acc1 = step(
                    m, total, acc0, acc1, q0, q1, k, v, k_rows, v_rows, bias, bias_rows, row_seen, last_key, start,
                    keys, n, cols0, cols1, k_token, v_token, k_dim, v_dim, bias_key, scale,
                    HEAD, D0, D1, KIND, ONE_ROW, CAUSAL, True, False, PRECISION)  # fmt: skip

    if KIND != 0:
        total = tl.where(total == 0.0, 1.0, total)  # a row that sees no key gives zeros
    out += batch * multiple(out_batch, UNIT) + first_head * multiple(out_head, UNIT)
    where = out + query.to(tl.int64)[:, None] * multiple(out_token, UNIT) + (sub * multiple(out_head, UNIT))[:, None]
    over = (1.0 / total)[:, None]
    tl.store(
        where + cols0[None, :], (acc0 * over).to(out.dtype.element_ty), mask=row_seen[:, None] & (cols0 < HEAD)[None, :]
    )
    if D1 > 0:
        at = D0 + cols1
        tl.store(
            where + at[None, :], (acc1 * over).to(out.dtype.element_ty), mask=row_seen[:, None] & (at < HEAD)[None, :]
        )


# --- problem and config ----------------------------------------------------------------------------------------------
KINDS = {"": 0, "bool": 2}
"""What a bias is to the kernel; every other type is added."""


@dataclass(frozen=True)
class AttentionProblem:
    head_dim: int
    dtype: str  # "fp16", "bf16", "fp32"
    queries: int  # as the next power of two
    keys: int  # as the next power of two
    heads: int = 16  # batch * heads, as the next power of two: what there is to spread over the GPU
    group: int = 1  # query heads for each key head
    causal: bool = False
    bias: str = ""  # "" none, "bool", or the type of what is added
    one_row: bool = False  # the bias is the same for all queries, and for all heads of a group: a padding mask
    even: bool = False  # the keys are a multiple of EVEN
    unit: int = 8  # elements that divide the strides of batch, head and token


@dataclass(frozen=True)
class AttentionConfig:
    """Blocks of [block_m query rows, block_n keys]."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: bool = False  # rows are the queries of all heads of a group
    parts: int = 0  # 0 this kernel; 1 or 2 that of gluon_attention, on sm_90, where a table names it


def chunks(head_dim: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that hold a head with the least padding: 80 -> 64, 16; 64 -> 64, 0."""
    first = max(FINEST, next_power_of_2(head_dim + 1) // 2)
    second = max(FINEST, next_power_of_2(head_dim - first)) if head_dim > first else 0
    return (2 * first, 0) if second == first else (first, second)


def heuristic(problem: AttentionProblem, sm: int) -> AttentionConfig:
    """Not measured. Sized so that what stays in registers fits: resources.json has what the compiler makes of it."""
    pack = problem.group > 1 and problem.queries < 64
    rows = next_power_of_2(problem.queries * (problem.group if pack else 1))
    wide = sum(chunks(problem.head_dim)) > 256 or problem.dtype == "fp32"  # the accumulator wants every thread
    for most_rows, most_keys, most_warps, stages in sizes(problem, sm):
        block_m, block_n = max(FINEST, min(most_rows, rows)), max(FINEST, min(most_keys, problem.keys))
        warps = most_warps if block_m >= 64 or wide else min(most_warps, 4)
        config = AttentionConfig(block_m, block_n, warps, 1 if block_n >= problem.keys else stages, pack)
        if prune(problem, config, sm) is None:
            return config
    return AttentionConfig(FINEST, FINEST, 4, 1, pack)


def sizes(problem: AttentionProblem, sm: int) -> Iterator[tuple[int, int, int, int]]:
    """(block_m, block_n, warps, stages), the best first. sm_90 and sm_100 multiply from shared memory, which leaves
    more registers; a bias takes some."""
    width, wide_tiles = sum(chunks(problem.head_dim)), sm in (90, 100)
    per_row = problem.bias != "" and not problem.one_row
    if problem.dtype == "fp32":  # multiplied outside the tensor cores
        yield (64, 32, 8, 1) if width <= 64 else (32, 32, 8, 1) if width <= 192 else (16, 512 // width * 16, 8, 1)
    elif problem.keys <= SHORT and width <= 128:
        yield from ((128, SHORT, 8, 1), (64, SHORT, 4, 1))
    elif width <= 64:
        yield (128, 128, 8, 3) if wide_tiles and not problem.bias else (128, 64, 8, 2 if per_row else 3)
    elif width <= 128:
        if wide_tiles:
            yield (128, 64, 8, 3) if problem.bias else (128, 128, 8, 2)
        yield (128, 32, 8, 2) if per_row else (128, 64, 8, 3)
    elif width <= 256:
        yield (64, 32, 8, 2)
    yield from ((32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1))


def space(problem: AttentionProblem, sm: int) -> Iterator[AttentionConfig]:
    for block_m in (16, 32, 64, 128, 256):
        for block_n in (16, 32, 64, 128):
            for warps in (4, 8, 16):
                for stages in (1, 2, 3, 4):
                    for pack in (False, True):
                        yield AttentionConfig(block_m, block_n, warps, stages, pack)
    for block_n in (64, 128):
        for stages in (2, 3, 4):
            yield from (AttentionConfig(128, block_n, 8, stages, parts=parts) for parts in (1, 2))


def shared_bytes(problem: AttentionProblem, config: AttentionConfig, sm: int) -> int:
    """An estimate: keys, values and bias for each stage, and where the tensor cores read them there, the queries."""
    width, size = sum(chunks(problem.head_dim)), BYTES[problem.dtype]
    queries, blocks = config.block_m * width * size, 2 * config.block_n * width * size * config.stages
    if problem.bias and not problem.one_row:
        blocks += config.block_m * config.block_n * size * max(1, config.stages - 1)
    return queries + blocks if sm in (90, 100) else max(queries, blocks)


def registers(problem: AttentionProblem, config: AttentionConfig) -> int:
    """For each thread: the accumulator and the scores in fp32, and the weights in the values' type."""
    width, size = sum(chunks(problem.head_dim)), BYTES[problem.dtype]
    held = config.block_m * (width + config.block_n + config.block_n * size // 4)
    return held // (32 * config.warps)


def prune(problem: AttentionProblem, config: AttentionConfig, sm: int) -> str | None:
    return next(reasons(problem, config, sm), None)


def reasons(problem: AttentionProblem, config: AttentionConfig, sm: int) -> Iterator[str]:
    limits, rows = LIMITS[sm], problem.queries * (problem.group if config.pack else 1)
    threads, width = 32 * config.warps, sum(chunks(problem.head_dim))
    if config.parts and (sm != 90 or problem.dtype == "fp32" or problem.head_dim not in (64, 128) or problem.bias):
        yield "the Gluon kernel takes heads of 64 and 128 in half precision, without a bias, on sm_90"
    if config.parts and (problem.unit < 8 or config.block_m != 128 or config.warps != 8 or config.pack):
        yield "the Gluon kernel takes 16-byte strides, and blocks of 128 rows by 8 warps"
    if config.pack and problem.group == 1:
        yield "no group of heads to pack"
    if config.block_m > max(FINEST, next_power_of_2(rows)):
        yield f"{config.block_m} rows in a block, and there are {rows}"
    if config.block_n > max(FINEST, problem.keys):
        yield f"{config.block_n} keys in a block, and there are {problem.keys}"
    if problem.even and config.block_n > EVEN:
        yield f"{config.block_n} keys in a block do not divide {EVEN}"
    if problem.keys <= config.block_n and config.stages > 1:
        yield "one block has no loop to pipeline"
    if threads * 4 > config.block_m * config.block_n and config.block_m > FINEST:
        yield f"{config.warps} warps have less than 4 scores a thread"
    shared, held = shared_bytes(problem, config, sm), registers(problem, config)
    if shared > limits.shared_bytes:
        yield f"about {shared} bytes of shared memory, and there are {limits.shared_bytes}"
    if held > 0.85 * limits.registers_per_thread:
        yield f"about {held} registers a thread before addresses, and there are {limits.registers_per_thread}"
    if threads * held > limits.registers_per_block:
        yield f"about {threads * held} registers a block, and there are {limits.registers_per_block}"
    if sm == 100 and config.block_m >= 64 and width + config.block_n > TENSOR_COLUMNS:
        yield f"accumulator and scores take more than the {TENSOR_COLUMNS} columns of tensor memory"


def meta(problem: AttentionProblem, config: AttentionConfig) -> dict[str, Any]:
    d0, d1 = chunks(problem.head_dim)
    return {
        "HEAD": problem.head_dim, "D0": d0, "D1": d1, "GROUP": problem.group, "PACK": config.pack,
        "CAUSAL": problem.causal, "KIND": KINDS.get(problem.bias, 1), "ONE_ROW": problem.one_row,
        "ONE_BLOCK": problem.keys <= config.block_n, "EVEN_KEYS": problem.even, "UNIT": problem.unit,
        "PRECISION": "ieee" if problem.dtype == "fp32" else "tf32", "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }  # fmt: skip


def compiled(problem: AttentionProblem, config: AttentionConfig) -> Compiled:
    """For heads whose numbers are contiguous."""
    constants = {"q_dim": 1, "k_dim": 1, "v_dim": 1, **meta(problem, config)}
    kinds = dict.fromkeys(("q", "k", "v", "out"), f"*{problem.dtype}")
    if problem.bias:
        kinds["bias"] = "*i1" if problem.bias == "bool" else f"*{problem.bias}"
    else:
        constants["bias"] = None
    kinds |= dict.fromkeys(ATTENTION_SIZES, "i64") | dict.fromkeys(ATTENTION_SIZES[-4:], "i32") | {"scale": "fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in attention_kernel.arg_names}
    return Compiled(signature, constants, config.warps, config.stages, ("q", "k", "v", "out"))


def shipped() -> Iterator[AttentionProblem]:
    for dtype in ("fp16", "bf16"):
        for head_dim, tokens in ((40, 4096), (80, 1024), (160, 256)):  # SD1.5, and its attention to 77 tokens
            yield AttentionProblem(head_dim, dtype, tokens, tokens)
            yield AttentionProblem(head_dim, dtype, tokens, 128)
        yield AttentionProblem(64, dtype, 4096, 4096)  # SDXL, SD3.5
        yield AttentionProblem(64, dtype, 4096, 128)
        yield AttentionProblem(64, dtype, 4096, 4096, bias="bool", one_row=True)  # padded text
        yield AttentionProblem(128, dtype, 8192, 8192)  # FLUX
        yield AttentionProblem(72, dtype, 256, 256)  # DiT, PixArt
        yield AttentionProblem(72, dtype, 4096, 512, bias=dtype, one_row=True)  # PixArt's text
        yield AttentionProblem(512, dtype, 4096, 4096, heads=1)  # the VAE's middle
        yield AttentionProblem(128, dtype, 4096, 4096, heads=32, group=4, causal=True)  # llama
        yield AttentionProblem(128, dtype, 1, 4096, heads=32, group=4)
        yield AttentionProblem(64, dtype, 128, 128, causal=True)  # CLIP, GPT-2
        yield AttentionProblem(64, dtype, 512, 512, bias=dtype)  # T5's positions, BERT's padding


KERNEL: Kernel[AttentionProblem, AttentionConfig] = Kernel(
    "attention", attention_kernel, AttentionConfig, heuristic, space, prune, compiled, tuple(shipped())
)


# --- the launch ------------------------------------------------------------------------------------------------------


def strides(t: Tensor) -> list[int]:
    """0 for a dimension of size 1: its stride is never walked and may not be divisible."""
    return [step if size > 1 else 0 for size, step in zip(t.shape, t.stride(), strict=True)]


def problem_of(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, unit: int) -> AttentionProblem:
    batch, heads, queries, head_dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    kind = "" if bias is None else "bool" if bias.dtype == torch.bool else TYPES[bias.dtype]
    one_row = bias is not None and bias.shape[2] == 1 and (bias.shape[1] == 1 or group == 1)
    return AttentionProblem(
        head_dim, type_of(q), bucket(queries), bucket(keys), bucket(batch * heads), group,
        causal and queries > 1, kind, one_row, keys % EVEN == 0, unit,
    )  # fmt: skip


@interpretable
def launch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """As `reference.attention`; the arguments are checked. Any strides, 64-bit offsets."""
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    out = heads_last(q)
    moves = [strides(t) for t in (q, k, v, out)]
    problem = problem_of(q, k, bias, causal, unit_of(s for move in moves for s in move[:3]))
    config = config_for(KERNEL, problem, q.device)
    if config.parts:
        from . import gluon_attention

        blocks_of = (config.block_m, config.block_n)
        if gluon_attention.launch(q, k, v, out, problem.causal, scale, blocks_of, config.stages, config.parts):
            return out
        config = heuristic(problem, sm_of(q.device))
    batch, heads, queries, _ = q.shape
    programs, rows = (k.shape[1], queries * problem.group) if config.pack else (heads, queries)
    blocks = triton.cdiv(rows, config.block_m)
    bias_moves = [0] * 4 if bias is None else strides(bias)
    dims = [1 if t.shape[3] == 1 else t.stride(3) for t in (q, k, v)]  # 0 where it is expanded
    KERNEL.jit[(batch * programs * blocks,)](
        q, k, v, bias, out, *moves[0][:3], dims[0], *moves[1][:3], dims[1], *moves[2][:3], dims[2],
        *bias_moves, *moves[3][:3], programs, queries, k.shape[2], blocks, scale,
        **meta(problem, config), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
