"""GroupNorm, with SiLU if asked, in Triton, for NCHW and channels-last alike.

The kernels see [batch, channels, positions] through two strides, one of which is 1; their tiles are [channels,
positions]. Where a group fits into one tile, one program normalizes it in one pass. Else there are two: first the mean
and the sum of squared differences of each channel in each chunk of positions, then, after these are merged per group as
in Chan, Golub and LeVeque, Updating formulae for computing sample variances, 1979, each tile is normalized. The second
pass goes backwards, so that it finds the end of the first in the L2 cache.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The jitted functions have no Python types: Triton gives them theirs when it compiles.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import LIMITS, Compiled, Kernel, next_power_of_2
from .layout import BYTES, UNIT, dense, type_of
from .reference import memory_format_of
from .triton_common import merged, multiple
from .tuning import config_for, interpretable

ONE_PASS = 32768
"""Elements of a group, its sizes rounded up to powers of two, that one program holds: 32 for each of 1024 threads."""
SECTOR = 32
"""Bytes. Where a group's channels at one position are fewer, a program of one group wastes what it reads."""


GROUP_SIZES = ["groups", "group_channels", "positions"]
PARTIAL_SIZES = ["channels", "positions", "channel_blocks", "chunks"]
MERGE_SIZES = [*GROUP_SIZES, "chunks", "chunk"]
APPLY_SIZES = [*MERGE_SIZES, "channel_blocks", "position_blocks"]
"""Triton would compile anew for each of them that is 1, or a multiple of 16, or neither. UNIT says what is needed."""


@triton.jit
def affine(y, weight, bias, channel, inside):
    """`y * weight + bias`, of what there is; y [channels, positions]."""
    if weight is not None:
        y = y * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        y = y + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def activated(y, SILU):
    return y * tl.sigmoid(y) if SILU else y


@triton.jit
def offsets(batch, channel, position, channels, positions, CHANNELS_LAST, UNIT):
    """Where a tile lies: channel [CHANNELS], position [POSITIONS]; UNIT divides the contiguous dimension."""
    if CHANNELS_LAST:
        step = multiple(channels, UNIT)
        return batch * positions * step + channel[:, None] + position.to(tl.int64)[None, :] * step
    step = multiple(positions, UNIT)
    return batch * channels * step + channel.to(tl.int64)[:, None] * step + position[None, :]


@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_kernel(x, weight, bias, out, groups, group_channels, positions, eps, SILU: tl.constexpr,
                      CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr,
                      POSITIONS: tl.constexpr):  # fmt: skip
    """One program normalizes one group of one batch entry. Grid: batch * groups."""
    if CHANNELS_LAST:
        group_channels = multiple(group_channels, UNIT)
    else:
        positions = multiple(positions, UNIT)
    batch = (tl.program_id(0) // groups).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    position = tl.arange(0, POSITIONS)
    inside = channel < group_channels
    seen = inside[:, None] & (position < positions)[None, :]
    channel += (tl.program_id(0) % groups) * group_channels
    at = offsets(batch, channel, position, groups * group_channels, positions, CHANNELS_LAST, UNIT)
    y = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    size = group_channels * positions
    mean = tl.sum(tl.sum(y, 1), 0) / size
    y = tl.where(seen, y - mean, 0.0)
    y = y * tl.rsqrt(tl.sum(tl.sum(y * y, 1), 0) / size + eps)
    y = activated(affine(y, weight, bias, channel, inside), SILU)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=seen)


@triton.jit
def place(tile, channel_blocks, position_blocks, CHANNELS_LAST):
    """(batch, channel block, position block) of the n-th tile in the order of memory."""
    if CHANNELS_LAST:
        rest = tile // channel_blocks
        return (rest // position_blocks).to(tl.int64), tile % channel_blocks, rest % position_blocks
    rest = tile // position_blocks
    return (rest // channel_blocks).to(tl.int64), rest % channel_blocks, tile % position_blocks


@triton.jit(do_not_specialize=PARTIAL_SIZES)
def partial_kernel(x, means, squares, channels, positions, channel_blocks, chunks, CHANNELS_LAST: tl.constexpr,
                   UNIT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
                   TILES: tl.constexpr):  # fmt: skip
    """Mean and sum of squared differences of each channel in a chunk of TILES * POSITIONS positions, into means and
    squares, both [batch, chunks, channels] in fp32. Grid: batch * channel_blocks * chunks."""
    if CHANNELS_LAST:
        channels = multiple(channels, UNIT)
    else:
        positions = multiple(positions, UNIT)
    batch, block, chunk = place(tl.program_id(0), channel_blocks, chunks, CHANNELS_LAST)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mean = tl.zeros([CHANNELS], tl.float32)
    square = tl.zeros([CHANNELS], tl.float32)
    first = chunk * (TILES * POSITIONS)
    for start in range(first, tl.minimum(first + TILES * POSITIONS, positions), POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        seen = inside[:, None] & (position < positions)[None, :]
        at = offsets(batch, channel, position, channels, positions, CHANNELS_LAST, UNIT)
        y = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
        count = tl.minimum(POSITIONS, positions - start).to(tl.float32)
        part = tl.sum(y, 1) / count
        y = tl.where(seen, y - part[:, None], 0.0)
        mean, square = merged(mean, square, (start - first).to(tl.float32), part, tl.sum(y * y, 1), count)
    at = (batch * chunks + chunk) * channels + channel
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, square, mask=inside)


@triton.jit
def group_statistics(means, squares, batch, group, channels, group_channels, positions, chunks, chunk, eps, BLOCK):
    """(mean, 1 / standard deviation) of a group, from those of its channels in chunks of `chunk` positions."""
    mean = 0.0
    square = 0.0
    count = 0.0
    parts = chunks * group_channels
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        index = part // group_channels
        at = (batch * chunks + index) * channels + group * group_channels + part % group_channels
        counts = tl.where(part < parts, tl.minimum(chunk, positions - index * chunk), 0).to(tl.float32)
        each = tl.load(means + at, mask=part < parts, other=0.0)
        within = tl.load(squares + at, mask=part < parts, other=0.0)
        total = tl.sum(counts, 0)
        part_mean = tl.sum(counts * each, 0) / total
        between = counts * (each - part_mean) * (each - part_mean)
        mean, square = merged(mean, square, count, part_mean, tl.sum(within + between, 0), total)
        count += total
    return mean, tl.rsqrt(square / count + eps)


@triton.jit(do_not_specialize=MERGE_SIZES)
def merge_kernel(means, squares, statistics, groups, group_channels, positions, chunks, chunk, eps,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Into statistics [batch, groups, 2]: mean and 1 / standard deviation. Grid: batch * groups."""
    batch = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    mean, scale = group_statistics(
        means, squares, batch, group, groups * group_channels, group_channels, positions, chunks, chunk, eps, BLOCK
    )
    at = (batch * groups + group) * 2
    tl.store(statistics + at, mean)
    tl.store(statistics + at + 1, scale)


@triton.jit(do_not_specialize=APPLY_SIZES)
def apply_kernel(x, means, squares, statistics, weight, bias, out, groups, group_channels, positions, channel_blocks,
                 position_blocks, chunks, chunk, eps, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                 UNIT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Normalizes one tile. PARTS > 0: its channels are of one group, whose parts are merged here, PARTS at a time;
    otherwise statistics has them. Grid: batch * channel_blocks * position_blocks, walked backwards."""
    channels = groups * group_channels
    if CHANNELS_LAST:
        channels = multiple(channels, UNIT)
    else:
        positions = multiple(positions, UNIT)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, block, column = place(tile, channel_blocks, position_blocks, CHANNELS_LAST)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    position = column * POSITIONS + tl.arange(0, POSITIONS)
    inside = channel < channels
    seen = inside[:, None] & (position < positions)[None, :]
    at = offsets(batch, channel, position, channels, positions, CHANNELS_LAST, UNIT)
    y = tl.load(x + at, mask=seen, other=0.0)
    if PARTS > 0:
        group = block * CHANNELS // group_channels
        mean, scale = group_statistics(
            means, squares, batch, group, channels, group_channels, positions, chunks, chunk, eps, PARTS
        )
        y = (y.to(tl.float32) - mean) * scale
    else:
        where = (batch * groups + channel // group_channels) * 2
        mean = tl.load(statistics + where, mask=inside, other=0.0)
        scale = tl.load(statistics + where + 1, mask=inside, other=0.0)
        y = (y.to(tl.float32) - mean[:, None]) * scale[:, None]
    y = activated(affine(y, weight, bias, channel, inside), SILU)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=seen)


@dataclass(frozen=True)
class GroupNormProblem:
    """What decides which code is good. Types are Triton's names, empty for what is not there."""

    batch: int
    channels: int
    groups: int
    positions: int
    dtype: str
    weight: str = ""
    bias: str = ""
    silu: bool = False
    channels_last: bool = False

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_unit(self) -> int:
        """Elements that divide where rows of a group begin and end: its channels, or the positions."""
        return math.gcd(UNIT, self.group_channels if self.channels_last else self.positions)

    @property
    def unit(self) -> int:
        """The same for rows of all channels."""
        return math.gcd(UNIT, self.channels if self.channels_last else self.positions)

    @property
    def group_tile(self) -> tuple[int, int]:
        return next_power_of_2(self.group_channels), next_power_of_2(self.positions)


def one_pass(problem: GroupNormProblem) -> bool:
    """Whether one program takes a group at once."""
    if math.prod(problem.group_tile) > ONE_PASS:
        return False
    row = problem.group_channels * BYTES[problem.dtype]
    return not problem.channels_last or row >= SECTOR or problem.positions == 1


@dataclass(frozen=True)
class GroupNormConfig:
    """How many warps hold the group."""

    warps: int


@dataclass(frozen=True)
class TileConfig:
    """A tile of [channels, positions], and how many of them along the positions one program merges (first pass)."""

    channels: int
    positions: int
    warps: int
    tiles: int = 1


@dataclass(frozen=True)
class MergeConfig:
    """How many parts are merged at once."""

    block: int
    warps: int


def group_heuristic(problem: GroupNormProblem, sm: int) -> GroupNormConfig:
    """16 values a thread, 32 for the largest groups."""
    elements = math.prod(problem.group_tile)
    return GroupNormConfig(max(1, min(32, elements // (32 * 16))))


def group_space(problem: GroupNormProblem, sm: int) -> Iterator[GroupNormConfig]:
    yield from (GroupNormConfig(warps) for warps in (1, 2, 4, 8, 16, 32))


def group_prune(problem: GroupNormProblem, config: GroupNormConfig, sm: int) -> str | None:
    each = math.prod(problem.group_tile) // (32 * config.warps)
    room = LIMITS[sm].registers_per_block // (32 * config.warps)
    if 2 * each > min(room, LIMITS[sm].registers_per_thread):
        return f"{each} values for each thread, of {room} registers: they would spill"
    if each < 1 and config.warps > 1:
        return "more threads than values"
    return None


TILE = 4096
"""Elements of a tile: 32 for each of 128 threads, four 16-byte loads in half precision."""
PROGRAMS = 2048
"""Programs of a first pass: below, chunks are made smaller; about twice what the largest GPU runs at once."""


def tile_of(problem: GroupNormProblem) -> tuple[int, int]:
    """[channels, positions] of a tile: rows of 128 bytes at least; in NCHW the channels of one group only."""
    if problem.channels_last:
        channels = min(64, next_power_of_2(problem.channels))
        return channels, min(TILE // channels, next_power_of_2(problem.positions))
    positions = min(TILE, next_power_of_2(problem.positions))
    together = problem.group_channels & -problem.group_channels  # the largest power of two that divides it
    return min(TILE // positions, together), positions


def partial_heuristic(problem: GroupNormProblem, sm: int) -> TileConfig:
    channels, positions = tile_of(problem)
    rows = problem.batch * -(-problem.channels // channels) * -(-problem.positions // positions)
    tiles = next_power_of_2(max(1, min(32, rows // PROGRAMS)))
    return TileConfig(channels, positions, warps_for(channels * positions), min(32, tiles))


def apply_heuristic(problem: GroupNormProblem, sm: int) -> TileConfig:
    channels, positions = tile_of(problem)
    return TileConfig(channels, positions, warps_for(channels * positions))


def warps_for(elements: int) -> int:
    return max(1, min(8, elements // (32 * 32)))


def tiles_of(problem: GroupNormProblem) -> Iterator[tuple[int, int, int]]:
    """(channels, positions, warps) worth measuring."""
    channels, positions = tile_of(problem)
    for grow in (1, 2, 4):
        for shape in {(channels * grow, positions), (channels, positions * grow)}:
            yield from ((*shape, warps) for warps in (2, 4, 8, 16))


def partial_space(problem: GroupNormProblem, sm: int) -> Iterator[TileConfig]:
    yield from (TileConfig(*tile, tiles) for tile in tiles_of(problem) for tiles in (1, 2, 4, 8, 16, 32))


def apply_space(problem: GroupNormProblem, sm: int) -> Iterator[TileConfig]:
    yield from (TileConfig(*tile) for tile in tiles_of(problem))


def tile_prune(problem: GroupNormProblem, config: TileConfig, sm: int) -> str | None:
    each = config.channels * config.positions // (32 * config.warps)
    if each > 64:
        return f"{each} values for each thread: two fp32 copies of them are over half of its registers"
    if each < 16 // BYTES[problem.dtype]:
        return f"{each} values for each thread: less than one 16-byte load"
    if config.tiles > 1 and config.tiles * config.positions >= 2 * problem.positions:
        return f"{config.tiles} tiles of {config.positions} positions, and there are {problem.positions}"
    return None


def merge_heuristic(problem: GroupNormProblem, sm: int) -> MergeConfig:
    return MergeConfig(1024, 4)


def merge_space(problem: GroupNormProblem, sm: int) -> Iterator[MergeConfig]:
    yield from (MergeConfig(block, warps) for block in (256, 1024, 4096) for warps in (1, 4, 8))


def merge_prune(problem: GroupNormProblem, config: MergeConfig, sm: int) -> str | None:
    return "more threads than parts" if config.block < 32 * config.warps else None


def group_meta(problem: GroupNormProblem, config: GroupNormConfig) -> dict[str, Any]:
    channels, positions = problem.group_tile
    return {
        "SILU": problem.silu,
        "CHANNELS_LAST": problem.channels_last,
        "UNIT": problem.group_unit,
        "CHANNELS": channels,
        "POSITIONS": positions,
    }


def tile_meta(problem: GroupNormProblem, config: TileConfig) -> dict[str, Any]:
    return {
        "CHANNELS_LAST": problem.channels_last,
        "UNIT": problem.unit,
        "CHANNELS": config.channels,
        "POSITIONS": config.positions,
    }


def partial_meta(problem: GroupNormProblem, config: TileConfig) -> dict[str, Any]:
    return {**tile_meta(problem, config), "TILES": config.tiles}


PARTS = 1024
"""Parts of a group up to which every tile of the second pass merges them itself: that costs it a few kilobytes from the
L2 cache and saves a launch."""


def parts_of(problem: GroupNormProblem, config: TileConfig, chunks: int) -> int:
    """How many parts a tile of the second pass merges at once; 0 where it leaves that to the kernel between."""
    parts = next_power_of_2(problem.group_channels * chunks)
    return parts if parts <= PARTS and problem.group_channels % config.channels == 0 else 0


def apply_meta(problem: GroupNormProblem, config: TileConfig, parts: int) -> dict[str, Any]:
    return {**tile_meta(problem, config), "SILU": problem.silu, "PARTS": parts}


def chunks_of(problem: GroupNormProblem, config: TileConfig) -> int:
    return -(-problem.positions // (config.tiles * config.positions))


def specialised(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Compiled:
    """Pointers as in `types` (empty: None), sizes are int32, eps is fp32."""
    constants = constants | {name: None for name, kind in types.items() if not kind}
    pointers = {name: f"*{kind}" for name, kind in types.items() if kind}
    kinds = (
        {name: "i32" for name in kernel.arg_names} | {"eps": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    )
    return Compiled({name: kinds[name] for name in kernel.arg_names}, constants, warps, 1, tuple(pointers))


def group_compiled(problem: GroupNormProblem, config: GroupNormConfig) -> Compiled:
    types = {"x": problem.dtype, "weight": problem.weight, "bias": problem.bias, "out": problem.dtype}
    return specialised(group_norm_kernel, types, group_meta(problem, config), config.warps)


FP32 = {"means": "fp32", "squares": "fp32"}


def partial_compiled(problem: GroupNormProblem, config: TileConfig) -> Compiled:
    types = {"x": problem.dtype, **FP32}
    return specialised(partial_kernel, types, partial_meta(problem, config), config.warps)


def merge_compiled(problem: GroupNormProblem, config: MergeConfig) -> Compiled:
    return specialised(merge_kernel, {**FP32, "statistics": "fp32"}, {"BLOCK": config.block}, config.warps)


def apply_compiled(problem: GroupNormProblem, config: TileConfig) -> Compiled:
    parts = parts_of(problem, config, chunks_of(problem, partial_heuristic(problem, 90)))
    made = dict.fromkeys(FP32, "") | {"statistics": "fp32"} if parts == 0 else FP32 | {"statistics": ""}
    types = {"x": problem.dtype, "weight": problem.weight, "bias": problem.bias, "out": problem.dtype, **made}
    return specialised(apply_kernel, types, apply_meta(problem, config, parts), config.warps)


def shipped() -> Iterator[GroupNormProblem]:
    for dtype in ("fp16", "bf16"):
        for silu, last, shape in (
            (True, False, (2, 1280, 32, 256)),  # SD1.5's and SDXL's inner levels: one pass
            (True, False, (2, 320, 32, 16384)),  # SDXL's outer level
            (True, True, (2, 320, 32, 16384)),
            (False, False, (2, 640, 32, 4096)),  # before its transformers
            (True, False, (1, 128, 32, 1048576)),  # the VAE's last level
            (True, True, (1, 128, 32, 1048576)),
        ):
            yield GroupNormProblem(*shape, dtype, dtype, dtype, silu, last)


ONE = tuple(p for p in shipped() if one_pass(p))
CHUNKED = tuple(p for p in shipped() if not one_pass(p))
KERNEL: Kernel[GroupNormProblem, GroupNormConfig] = Kernel(
    "group_norm", group_norm_kernel, GroupNormConfig, group_heuristic, group_space, group_prune, group_compiled, ONE
)
PARTIAL: Kernel[GroupNormProblem, TileConfig] = Kernel(
    "group_norm_partial", partial_kernel, TileConfig, partial_heuristic, partial_space, tile_prune, partial_compiled,
    CHUNKED,
)  # fmt: skip
MERGE: Kernel[GroupNormProblem, MergeConfig] = Kernel(
    "group_norm_merge",
    merge_kernel,
    MergeConfig,
    merge_heuristic,
    merge_space,
    merge_prune,
    merge_compiled,
    CHUNKED[:1],
)
APPLY: Kernel[GroupNormProblem, TileConfig] = Kernel(
    "group_norm_apply", apply_kernel, TileConfig, apply_heuristic, apply_space, tile_prune, apply_compiled, CHUNKED
)


def run_one_pass(
    problem: GroupNormProblem, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    config = config_for(KERNEL, problem, x.device)
    KERNEL.jit[(problem.batch * problem.groups,)](
        x, weight, bias, out, problem.groups, problem.group_channels, problem.positions, eps,
        **group_meta(problem, config), num_warps=config.warps,
    )  # fmt: skip


def run_chunked(
    problem: GroupNormProblem, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    p = problem
    first, second = config_for(PARTIAL, p, x.device), config_for(APPLY, p, x.device)
    chunks, chunk = chunks_of(p, first), first.tiles * first.positions
    means, squares = x.new_empty(2, p.batch, chunks, p.channels, dtype=torch.float32)
    blocks = triton.cdiv(p.channels, first.channels)
    PARTIAL.jit[(p.batch * blocks * chunks,)](
        x, means, squares, p.channels, p.positions, blocks, chunks, **partial_meta(p, first), num_warps=first.warps
    )
    parts = parts_of(p, second, chunks)
    statistics = None
    if parts == 0:
        statistics = x.new_empty(p.batch, p.groups, 2, dtype=torch.float32)
        merge = config_for(MERGE, p, x.device)
        MERGE.jit[(p.batch * p.groups,)](
            means, squares, statistics, p.groups, p.group_channels, p.positions, chunks, chunk, eps, merge.block,
            num_warps=merge.warps,
        )  # fmt: skip
    blocks, columns = triton.cdiv(p.channels, second.channels), triton.cdiv(p.positions, second.positions)
    APPLY.jit[(p.batch * blocks * columns,)](
        x, means if parts else None, squares if parts else None, statistics, weight, bias, out, p.groups,
        p.group_channels, p.positions, blocks, columns, chunks, chunk, eps, **apply_meta(p, second, parts),
        num_warps=second.warps,
    )  # fmt: skip


@interpretable
def launch(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    """As `reference.group_norm`; the result keeps the memory format."""
    kept = memory_format_of(x)
    x = x.contiguous(memory_format=kept)
    batch, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    last = kept == torch.channels_last or positions == 1
    out = torch.empty_like(x, memory_format=kept)
    weight, bias = (None if t is None else dense(t) for t in (weight, bias))
    problem = GroupNormProblem(
        batch, channels, groups, positions, type_of(x), type_of(weight), type_of(bias), activation == "silu", last
    )
    run = run_one_pass if one_pass(problem) else run_chunked
    run(problem, x, weight, bias, eps, out)
    return out
