"""GroupNorm in Triton's interpreter, against float64 and within twice torch's own error."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.kernels import triton_group_norm
from optimize.kernels.kernel import Kernel
from optimize.kernels.reference import memory_format_of
from optimize.kernels.select import interpreting
from optimize.kernels.triton_group_norm import APPLY, MERGE, PARTIAL, MergeConfig, TileConfig, launch

pytestmark = [
    pytest.mark.skipif(
        not interpreting() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1, or a GPU"
    ),
    pytest.mark.usefixtures("on_the_device", "poisoned"),
]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
Budget = Callable[[Tensor, Tensor, Tensor], None]


def truth_of(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """In float64, from the definition."""
    grouped = x.double().reshape(x.shape[0], groups, -1)
    deviation = grouped - grouped.sum(-1, keepdim=True) / grouped.shape[-1]
    y = deviation / ((deviation**2).sum(-1, keepdim=True) / grouped.shape[-1] + eps) ** 0.5
    y = y.reshape(x.shape).transpose(1, -1)  # channels last
    y = y if weight is None else y * weight.double()
    y = (y if bias is None else y + bias.double()).transpose(1, -1)
    return y / (1 + torch.exp(-y)) if silu else y


def eager(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """torch's own operations in the type of x. Always on a contiguous x: for channels-last the CPU takes the variance
    as E[x^2] - E[x]^2, and a rival that is off by 0.1 would forgive everything."""
    y = F.group_norm(x.contiguous(), groups, weight, bias, eps)
    return F.silu(y) if silu else y


def check(
    budget: Budget, x: Tensor, groups: int, silu: bool = True, weighted: bool = True, biased: bool = True
) -> None:
    weight, bias = (torch.randn(x.shape[1]).to(x.dtype) if there else None for there in (weighted, biased))
    ours = launch(x, groups, weight, bias, 1e-5, "silu" if silu else "")
    assert ours.is_contiguous(memory_format=memory_format_of(x))
    budget(ours, eager(x, groups, weight, bias, 1e-5, silu), truth_of(x, groups, weight, bias, 1e-5, silu))


def drawn(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    torch.manual_seed(sum(shape))
    x = (torch.randn(*shape) * 1.5 + 0.25).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.fixture(params=("by size", "never"))
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a group may be taken in one pass."""
    if request.param == "never":
        monkeypatch.setattr(triton_group_norm, "ONE_PASS", 0)
    return str(request.param)


SHAPES = (
    ((1, 32, 7, 9), 4),
    ((3, 40, 8, 8), 8),
    ((2, 12, 11, 7), 1),  # one group
    ((2, 24, 5, 16), 24),  # one channel per group
    ((1, 96, 4, 4), 32),
    ((1, 64, 1, 1), 4),
    ((2, 30, 3, 1), 10),
)


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels-last"))
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], groups: int, last: bool, passes: str, within_budget: Budget) -> None:
    for dtype in TYPES:
        check(within_budget, drawn(*shape, dtype=dtype, last=last), groups)


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels-last"))
def test_flags(last: bool, passes: str, within_budget: Budget) -> None:
    for dtype, silu, weighted, biased in itertools.product(TYPES, (False, True), (False, True), (False, True)):
        check(within_budget, drawn(1, 12, 6, 6, dtype=dtype, last=last), 4, silu, weighted, biased)


@pytest.mark.parametrize("shape", ((3, 12), (3, 12, 77), (1, 12, 3, 5, 7)), ids=str)
def test_ranks(shape: tuple[int, ...], passes: str, within_budget: Budget) -> None:
    for dtype in TYPES:
        check(within_budget, drawn(*shape, dtype=dtype), 3)


def test_a_view_that_is_in_no_format(passes: str, within_budget: Budget) -> None:
    check(within_budget, drawn(2, 24, 10, 10, dtype=torch.float16)[:, ::2, :, 1:8], 3)
    check(within_budget, drawn(2, 24, 10, 10, dtype=torch.float16, last=True)[:, :12], 3)


def forced(first: TileConfig, second: TileConfig, merge: int = 32) -> Callable[..., object]:
    configs = {PARTIAL.name: first, APPLY.name: second, MERGE.name: MergeConfig(merge, 1)}

    def config_for(kernel: Kernel, problem: object, device: object) -> object:
        return configs[kernel.name]

    return config_for


TILES = (
    (TileConfig(1, 16, 1, 2), TileConfig(1, 32, 1)),
    (TileConfig(8, 16, 1, 3), TileConfig(4, 64, 1)),
    (TileConfig(16, 4, 1, 7), TileConfig(16, 8, 1)),  # tiles across groups: statistics from the kernel between
)


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels-last"))
@pytest.mark.parametrize(("first", "second"), TILES, ids=str)
@pytest.mark.parametrize("parts", (1024, 8), ids=("merged by each", "merged between"))
def test_chunks_by_config(
    first: TileConfig, second: TileConfig, last: bool, parts: int, monkeypatch: pytest.MonkeyPatch,
    within_budget: Budget,
) -> None:  # fmt: skip
    """Many chunks, the last of them partial; channels that are no multiple of the tile."""
    monkeypatch.setattr(triton_group_norm, "ONE_PASS", 0)
    monkeypatch.setattr(triton_group_norm, "PARTS", parts)
    monkeypatch.setattr(triton_group_norm, "config_for", forced(first, second))
    for dtype in TYPES:
        check(within_budget, drawn(2, 12, 9, 11, dtype=dtype, last=last), 3)


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels-last"))
def test_chunks_by_size(last: bool, within_budget: Budget) -> None:
    """A level of a VAE: a group is 4 channels of 16900 positions, more than a program holds."""
    x = drawn(1, 8, 130, 130, dtype=torch.float16, last=last)
    assert x[0, :4].numel() > triton_group_norm.ONE_PASS
    check(within_budget, x, 2)


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels-last"))
def test_a_large_mean_does_not_cancel(last: bool, passes: str) -> None:
    """At a mean of 4096 with a deviation of 1, E[x^2] - E[x]^2 in fp32 has no digit left."""
    x = drawn(2, 8, 30, 30, dtype=torch.float32, last=last) + 4096
    error = launch(x, 2, None, None, 1e-5, "").double() - truth_of(x, 2, None, None, 1e-5, False)
    assert error.abs().max() < 2e-3  # half a unit of x is 2.4e-4


@pytest.mark.parametrize("tiles", (1, 3))
@pytest.mark.parametrize("parts", (1024, 0), ids=("merged by each", "merged between"))
def test_chunks_of_unequal_means(tiles: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles whose means are 1000 apart: each merge has to add the differences between them, not only within them."""
    monkeypatch.setattr(triton_group_norm, "ONE_PASS", 0)
    monkeypatch.setattr(triton_group_norm, "PARTS", parts)
    monkeypatch.setattr(
        triton_group_norm, "config_for", forced(TileConfig(1, 16, 1, tiles), TileConfig(1, 32, 1), merge=4)
    )
    x = drawn(1, 4, 7, 16, dtype=torch.float32) + 1000 * torch.arange(7.0)[:, None]
    error = launch(x, 2, None, None, 1e-5, "").double() - truth_of(x, 2, None, None, 1e-5, False)
    assert error.abs().max() < 1e-6
