"""LayerNorm and RMSNorm in Triton's interpreter, against float64 and within twice torch's own error."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.kernels import triton_norms
from optimize.kernels.select import interpreting
from optimize.kernels.triton_norms import NormConfig, launch

pytestmark = [
    pytest.mark.skipif(
        not interpreting() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1, or a GPU"
    ),
    pytest.mark.usefixtures("on_the_device", "poisoned"),
]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
Budget = Callable[[Tensor, Tensor, Tensor], None]


def truth_of(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, shift: Tensor | None, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(normed, total) in float64, from the definition."""
    total = x.double()
    if residual is not None:
        total = residual.double() + (total if gate is None else gate.double() * total)
    mean = torch.zeros_like(total[..., :1]) if rms else total.sum(-1, keepdim=True) / x.shape[-1]
    y = (total - mean) / (((total - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    y = y if scale is None else y * (1 + scale.double())
    return (y if shift is None else y + shift.double()), total


def eager(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, shift: Tensor | None, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chain of torch's own operations in the type of x."""
    total = x
    if residual is not None:
        total = residual + (x if gate is None else gate * x)
    sizes = x.shape[-1:]
    y = F.rms_norm(total, sizes, weight, eps) if rms else F.layer_norm(total, sizes, weight, bias, eps)
    y = y if scale is None else y * (1 + scale)
    return (y if shift is None else y + shift), total


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape) * 1.5 + 0.25).to(dtype)


def launched(*args: Any) -> tuple[Tensor, Tensor | None]:
    """Through the operator's launchers."""
    x, residual, gate, weight, bias, eps, scale, shift, rms = args
    if rms:
        rest = (weight, eps, scale, shift)
        plain, with_add = triton_norms.launch_rms_norm, triton_norms.launch_add_rms_norm
    else:
        rest = (weight, bias, eps, scale, shift)
        plain, with_add = triton_norms.launch_layer_norm, triton_norms.launch_add_layer_norm
    return (plain(x, *rest), None) if residual is None else with_add(x, residual, gate, *rest)


def check(budget: Budget, *args: Any) -> None:
    torch.manual_seed(0)
    ours, theirs, truth = launched(*args), eager(*args), truth_of(*args)
    assert ours[0].is_contiguous()
    budget(ours[0], theirs[0], truth[0])
    if args[1] is not None:
        assert ours[1] is not None and ours[1].is_contiguous()
        budget(ours[1], theirs[1], truth[1])


def plain(rows: int, channels: int, dtype: torch.dtype, rms: bool) -> tuple[Any, ...]:
    torch.manual_seed(rows * 7919 + channels)
    x = drawn(rows, channels, dtype=dtype)
    return (
        x,
        None,
        None,
        drawn(channels, dtype=dtype),
        None if rms else drawn(channels, dtype=dtype),
        1e-5,
        None,
        None,
        rms,
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("rows", (1, 7, 63, 77, 199, 1128))
def test_rows(rows: int, rms: bool, dtype: torch.dtype, within_budget: Budget) -> None:
    check(within_budget, *plain(rows, 40, dtype, rms))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("channels", (1, 40, 72, 320, 1000, 1152, 3072, triton_norms.SINGLE_PASS + 9))
def test_channels(channels: int, rms: bool, dtype: torch.dtype, within_budget: Budget) -> None:
    check(within_budget, *plain(7, channels, dtype, rms))


def flags() -> Iterator[tuple[int, ...]]:
    """Every combination: rms, weight, bias, residual, gate, scale, shift, each with a type in turn."""
    turn = itertools.cycle(range(3))
    for one in itertools.product((0, 1), (0, 1), (0, 1), (0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2)):
        rms, _, bias, residual, gate, *_ = one
        if not (rms and bias) and not (gate and not residual):
            yield (*one, next(turn))


def modulation(kind: int, batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Tensor | None:
    return None if kind == 0 else drawn(batch, tokens if kind == 2 else 1, channels, dtype=dtype)


@pytest.mark.parametrize("config", (NormConfig(8, 64, 1), NormConfig(8, 32, 1)), ids=("one-pass", "looped"))
def test_all_flags(config: NormConfig, monkeypatch: pytest.MonkeyPatch, within_budget: Budget) -> None:
    monkeypatch.setattr(triton_norms, "config_for", lambda *_: config)
    torch.manual_seed(1)
    for rms, weight, bias, residual, gate, scale, shift, turn in flags():
        dtype = TYPES[turn]
        x, old = drawn(3, 7, 40, dtype=dtype), drawn(3, 7, 40, dtype=dtype) if residual else None
        w, b = (drawn(40, dtype=dtype) if there else None for there in (weight, bias))
        g, s, t = (modulation(kind, 3, 7, 40, dtype) for kind in (gate, scale, shift))
        check(within_budget, x, old, g, w, b, 1e-6, s, t, bool(rms))


CONFIGS = (
    NormConfig(1, 64, 1, early=True),
    NormConfig(8, 64, 1, programs=2),
    NormConfig(2, 64, 1, programs=3, stages=2, early=True),
    NormConfig(1, 32, 1, programs=5),
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_walking_programs(config: NormConfig, monkeypatch: pytest.MonkeyPatch, within_budget: Budget) -> None:
    monkeypatch.setattr(triton_norms, "config_for", lambda *_: config)
    x = drawn(3, 11, 40, dtype=torch.float16)
    w, g, s = drawn(40, dtype=x.dtype), drawn(3, 1, 40, dtype=x.dtype), drawn(1, 11, 40, dtype=x.dtype)
    check(within_budget, x, x + 1, g, w, w - 1, 1e-6, s, g + 1, False)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of a wider tensor": lambda x: x[..., 8:48],
    "every second token": lambda x: x[:, ::2, :40],
    "tokens first": lambda x: x.transpose(0, 1)[..., :40],
    "one entry for all": lambda x: x[:1, :, :40].expand(3, -1, -1),
    "channels not last in memory": lambda x: x[..., :12].transpose(1, 2),
    "odd offset": lambda x: x[..., 3:40],
    "four dimensions": lambda x: x[..., :40].unflatten(1, (3, 4)).transpose(1, 2),
    "one dimension": lambda x: x[0, 0],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, within_budget: Budget) -> None:
    torch.manual_seed(2)
    x, old = (LAYOUTS[name](drawn(3, 12, 60, dtype=torch.float16)) for _ in range(2))
    w = drawn(2 * x.shape[-1], dtype=torch.float32)[::2].to(x.dtype)
    check(within_budget, x, None, None, w, None, 1e-5, None, None, True)
    check(within_budget, x, old, None, w, w, 1e-5, None, None, False)
    if x.dim() == 3:  # halves of one projection, as AdaLN makes them
        g, s, t = drawn(x.shape[0], 1, 3 * x.shape[-1], dtype=x.dtype).chunk(3, -1)
        check(within_budget, x, old, g, w, w, 1e-5, s, t, False)


def test_one_token_for_each_entry(within_budget: Budget) -> None:
    x, s = drawn(77, 1, 40, dtype=torch.bfloat16), drawn(77, 1, 40, dtype=torch.bfloat16)
    check(within_budget, x, None, None, None, None, 1e-5, s, s + 1, False)


def test_mixed_types(within_budget: Budget) -> None:
    """A half-precision branch with fp32 weights onto an fp32 stream: the results have the stream's type."""
    x, old = drawn(2, 9, 72, dtype=torch.float16), drawn(2, 9, 72, dtype=torch.float32)
    w, s = drawn(72, dtype=torch.float32), drawn(2, 1, 72, dtype=torch.float16)
    check(within_budget, x, old, s, w, w, 1e-5, s, s, False)


def test_the_total_is_rounded_before_it_is_normed() -> None:
    """2048 + 1 is 2048 in fp16: a row of 2048 and 2049 is normed as one of equal numbers."""
    old = torch.full((1, 1, 8), 2048.0, dtype=torch.float16)
    x = torch.tensor([0.0, 1.0] * 4, dtype=torch.float16).view(1, 1, 8)
    normed, total = triton_norms.launch_add_layer_norm(x, old, None, None, None, 1e-5, None, None)
    assert torch.equal(total, old) and torch.equal(normed, torch.zeros_like(old))


@pytest.mark.parametrize("block", (64, 16), ids=("one-pass", "looped"))
def test_a_large_mean_does_not_cancel(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a mean of 4096 with a deviation of 1, E[x^2] - E[x]^2 in fp32 has no digit left."""
    monkeypatch.setattr(triton_norms, "config_for", lambda *_: NormConfig(1, block, 1))
    torch.manual_seed(3)
    x = torch.randn(5, 40) + 4096
    truth = truth_of(x, None, None, None, None, 1e-5, None, None, False)[0]
    normed = launch(x, None, None, None, None, 1e-5, None, None, rms=False)[0]
    assert (normed.double() - truth).abs().max() < 2e-3  # half a unit of x is 2.4e-4
