# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The jitted functions have no Python types: Triton gives them theirs when it compiles.
"""Attention for sm_90 beyond plain Triton, in Gluon: one warp fetches, two warpgroups multiply.

The fetching warp copies queries, keys and values by tensor descriptor (TMA) into a ring in shared memory. Two
warpgroups multiply from there, 64 query rows each, as one partition or as two that run free of each other; in each the
product of the next block of keys runs while the softmax of this one is computed. Source: Shah et al.,
FlashAttention-3, 2024, 3.1 (producer and consumers) and 3.2 (the pipeline within a warpgroup).

It has been compiled and never been run: no GPU was at hand. No heuristic takes it. It is in the search space of
`triton_attention` on sm_90, so a tuning cache or table may name it, after its result was held against the plain
kernel's. Heads of 64 and 128, fp16 and bf16, causal or not, no bias, strides of multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Its name before Triton 3.7."""
LOG2E = 1.4426950408889634
FETCH_REGISTERS, MULTIPLY_REGISTERS = gl.constexpr(24), gl.constexpr(240)
"""For each thread: 4 warps of the one (Triton rounds up) and 8 of the other take 64512 of 65536."""


@gluon.jit
def extent(block, queries, keys, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many blocks of keys the rows of this block see."""
    end = keys
    if CAUSAL:
        end = gl.minimum(keys, block * BLOCK_M + BLOCK_M + keys - queries)
    return (end + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def fetch(q, k, v, q_tile, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free, batch, head, key_head, block,
          queries, keys, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """The fetching warp. A place in the ring is refilled when both warpgroups have read it."""
    mbarrier.expect(q_full, q.block_type.nbytes)
    tma.async_copy_global_to_shared(q, [batch, head, block * BLOCK_M, 0], q_full, q_tile)
    for i in range(extent(block, queries, keys, CAUSAL, BLOCK_M, BLOCK_N)):
        place = i % STAGES
        again = (i // STAGES & 1) ^ 1
        mbarrier.wait(k_free.index(place), again)
        mbarrier.expect(k_full.index(place), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [batch, key_head, i * BLOCK_N, 0], k_full.index(place), k_ring.index(place))
        mbarrier.wait(v_free.index(place), again)
        mbarrier.expect(v_full.index(place), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [batch, key_head, i * BLOCK_N, 0], v_full.index(place), v_ring.index(place))


@gluon.jit
def seen_scores(scores, i, rows, queries, keys, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr,
                BLOCK_N: gl.constexpr, block, MMA: gl.constexpr):  # fmt: skip
    """-inf for a key that is not seen. Only blocks at an edge pay for the comparison."""
    edge = (i + 1) * BLOCK_N > keys
    if CAUSAL:
        edge = edge | ((i + 1) * BLOCK_N > block * BLOCK_M + keys - queries + 1)
    if edge:
        key = i * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
        inside = gl.expand_dims(key < keys, 0)
        if CAUSAL:
            inside = inside & (gl.expand_dims(rows + (keys - queries), 1) >= gl.expand_dims(key, 0))
        scores = gl.where(inside, scores, -float("inf"))
    return scores


@gluon.jit
def multiply(out, out_batch, out_head, out_token, q_tile, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free,
             batch, head, block, queries, keys, scale, part: gl.constexpr, HEAD: gl.constexpr, CAUSAL: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """One of PARTS that share the query rows: block i is weighted while the weights of i - 1 multiply its values."""
    dtype: gl.constexpr = q_tile.dtype
    ROWS: gl.constexpr = BLOCK_M // PARTS
    WARPS: gl.constexpr = ROWS // 16
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, of_scores)
    rows = block * BLOCK_M + part * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, of_scores))
    blocks = extent(block, queries, keys, CAUSAL, BLOCK_M, BLOCK_N)
    queries_tile = q_tile.reshape([BLOCK_M, HEAD]).slice(part * ROWS, ROWS)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(
        queries_tile, k_ring.index(0).reshape([BLOCK_N, HEAD]).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0), count=1)
    scores = seen_scores(scores, 0, rows, queries, keys, CAUSAL, BLOCK_M, BLOCK_N, block, of_scores)
    m = gl.max(scores, 1)
    p = gl.exp2(scores * scale - gl.expand_dims(m * scale, 1))
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(dtype), of_weights)
    acc = gl.zeros([ROWS, HEAD], gl.float32, of_out)

    for i in range(1, blocks):
        place, before = i % STAGES, (i - 1) % STAGES
        mbarrier.wait(k_full.index(place), i // STAGES & 1)
        coming = warpgroup_mma(
            queries_tile,
            k_ring.index(place).reshape([BLOCK_N, HEAD]).permute((1, 0)),
            zero,
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
        growing = warpgroup_mma(weights, v_ring.index(before).reshape([BLOCK_N, HEAD]), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[coming])
        mbarrier.arrive(k_free.index(place), count=1)
        scores = seen_scores(scores, i, rows, queries, keys, CAUSAL, BLOCK_M, BLOCK_N, block, of_scores)
        best = gl.maximum(m, gl.max(scores, 1))
        p = gl.exp2(scores * scale - gl.expand_dims(best * scale, 1))
        shrunk = gl.exp2((m - best) * scale)
        total = total * shrunk + gl.sum(p, 1)
        m = best
        acc = warpgroup_mma_wait(0, deps=[growing])
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrunk, gl.SliceLayout(1, of_out)), 1)
        weights = gl.convert_layout(p.to(dtype), of_weights)

    last = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(last), (blocks - 1) // STAGES & 1)
    growing = warpgroup_mma(weights, v_ring.index(last).reshape([BLOCK_N, HEAD]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[growing])
    acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, of_out)), 1)
    row = block * BLOCK_M + part * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, of_out))
    col = gl.arange(0, HEAD, layout=gl.SliceLayout(0, of_out))
    where = out + batch.to(gl.int64) * out_batch + head.to(gl.int64) * out_head
    where = where + gl.expand_dims(row.to(gl.int64) * out_token, 1) + gl.expand_dims(col, 0)
    gl.store(where, acc.to(dtype), mask=gl.expand_dims(row < queries, 1))


@gluon.jit(do_not_specialize=["heads", "queries", "keys", "blocks"])
def gluon_attention_kernel(q, k, v, out, out_batch, out_head, out_token, heads, queries, keys, blocks, scale,
                           HEAD: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr,
                           BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """Grid: batch * heads * blocks of query rows. q, k and v: descriptors of [batch, heads, tokens, head]. `scale` is
    in base 2 and above 0. Warps: those of one part."""
    block = blocks - 1 - gl.program_id(0) % blocks if CAUSAL else gl.program_id(0) % blocks  # the longest start first
    head = gl.program_id(0) // blocks % heads
    batch = gl.program_id(0) // blocks // heads
    q_tile = gl.allocate_shared_memory(q.dtype, q.block_shape, q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_shape, k.layout)  # noqa: RUF005
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_shape, v.layout)  # noqa: RUF005
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=PARTS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=PARTS)
    barrier()  # the fetching warp must not wait on a barrier that is not there yet
    # each tuple stands in place: a variable would make tensors of its constants
    if PARTS == 1:
        gl.warp_specialize([
            (multiply, (out, out_batch, out_head, out_token, q_tile, k_ring, v_ring, q_full, k_full, k_free, v_full,
                        v_free, batch, head, block, queries, keys, scale, 0, HEAD, CAUSAL, BLOCK_M, BLOCK_N, STAGES,
                        PARTS)),
            (fetch, (q, k, v, q_tile, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free, batch, head,
                     head // GROUP, block, queries, keys, CAUSAL, BLOCK_M, BLOCK_N, STAGES)),
        ], [1], [FETCH_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (multiply, (out, out_batch, out_head, out_token, q_tile, k_ring, v_ring, q_full, k_full, k_free, v_full,
                        v_free, batch, head, block, queries, keys, scale, 0, HEAD, CAUSAL, BLOCK_M, BLOCK_N, STAGES,
                        PARTS)),
            (multiply, (out, out_batch, out_head, out_token, q_tile, k_ring, v_ring, q_full, k_full, k_free, v_full,
                        v_free, batch, head, block, queries, keys, scale, 1, HEAD, CAUSAL, BLOCK_M, BLOCK_N, STAGES,
                        PARTS)),
            (fetch, (q, k, v, q_tile, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free, batch, head,
                     head // GROUP, block, queries, keys, CAUSAL, BLOCK_M, BLOCK_N, STAGES)),
        ], [4, 1], [MULTIPLY_REGISTERS, FETCH_REGISTERS])  # fmt: skip


# --- the launch ------------------------------------------------------------------------------------------------------


def layout_of() -> gl.NVMMASharedLayout:
    """How a tile of 16-bit numbers lies in shared memory: in rows of 128 bytes, swizzled."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def described(t: Tensor, block: int) -> TensorDescriptor | None:
    """[batch, heads, tokens, head_dim] for the copying hardware, in tiles of `block` tokens of one head; None where it
    cannot take it: it wants 16-byte steps, and every dimension walked."""
    head_dim = t.shape[3]
    steps = [step if size > 1 else head_dim for size, step in zip(t.shape, t.stride(), strict=True)]
    if t.data_ptr() % 16 or steps[3] != 1 or any(step <= 0 or step % 8 for step in steps[:3]):
        return None
    return TensorDescriptor(t, list(t.shape), steps, [1, 1, block, head_dim], layout_of())


def meta(head_dim: int, group: int, causal: bool, blocks: tuple[int, int], stages: int, parts: int) -> dict[str, Any]:
    return {"HEAD": head_dim, "GROUP": group, "CAUSAL": causal, "BLOCK_M": blocks[0], "BLOCK_N": blocks[1],
            "STAGES": stages, "PARTS": parts}  # fmt: skip


def signature(dtype: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """What the kernel compiles from, for contiguous heads."""
    kinds = {"out": f"*{dtype}", "scale": "fp32"} | dict.fromkeys(("out_batch", "out_head", "out_token"), "i64")
    kinds |= dict.fromkeys(("heads", "queries", "keys", "blocks"), "i32") | dict.fromkeys(constants, "constexpr")
    for name, block in (("q", constants["BLOCK_M"]), ("k", constants["BLOCK_N"]), ("v", constants["BLOCK_N"])):
        tile = f"{dtype}[1, 1, {block}, {constants['HEAD']}]"
        kinds[name] = f"tensordesc<{tile},{layout_of()!r}>"
    return {name: kinds[name] for name in gluon_attention_kernel.arg_names}


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal: bool, scale: float, blocks: tuple[int, int], stages: int,
    parts: int,
) -> bool:  # fmt: skip
    """Writes the attention into `out`; False, and nothing is done, where the tensors cannot be described. `scale` is
    above 0."""
    tiles = [described(t, block) for t, block in ((q, blocks[0]), (k, blocks[1]), (v, blocks[1]))]
    if None in tiles:
        return False
    batch, heads, queries, head_dim = q.shape
    rows = triton.cdiv(queries, blocks[0])
    gluon_attention_kernel[(batch * heads * rows,)](
        *tiles, out, *out.stride()[:3], heads, queries, k.shape[2], rows, scale * LOG2E,
        **meta(head_dim, heads // k.shape[1], causal, blocks, stages, parts), num_warps=blocks[0] // 16 // parts,
    )  # fmt: skip
    return True
