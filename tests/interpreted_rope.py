"""The norm and rotation of q and k in Triton's interpreter, against float64 and within twice torch's own error."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.kernels import triton_rope
from optimize.kernels.select import interpreting
from optimize.kernels.triton_rope import RopeConfig, launch

pytestmark = [
    pytest.mark.skipif(
        not interpreting() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1, or a GPU"
    ),
    pytest.mark.usefixtures("on_the_device", "poisoned"),
]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
Budget = Callable[[Tensor, Tensor, Tensor], None]


def truth_of(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    """In float64: each pair is a complex number that is multiplied by cos + i sin."""
    y = x.double()
    if weight is not None:
        y = y / ((y**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5 * weight.double()
    if cos is None or sin is None:
        return y
    half = x.shape[-1] // 2
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + 1 if interleaved else first + half
    turn = torch.complex(cos.double(), sin.double())
    turned = torch.complex(y[..., first], y[..., second]) * (turn if turn.dim() == 2 else turn[:, None])
    out = torch.empty_like(y)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def eager(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    """The chain of torch's own operations in the type of x."""
    y = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)
    if cos is None or sin is None:
        return y.clone()
    c, s = (t.to(x.dtype) if t.dim() == 2 else t.to(x.dtype)[:, None] for t in (cos, sin))
    a, b = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
    pair = (a * c - b * s, b * c + a * s)
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def check(
    budget: Budget, q: Tensor, k: Tensor, normed: bool, angles: Tensor | None, interleaved: bool,
    weights: torch.dtype | None = None,
) -> None:  # fmt: skip
    q_weight, k_weight = (torch.randn(q.shape[-1]).to(weights or q.dtype) if normed else None for _ in range(2))
    cos, sin = (None, None) if angles is None else (angles.cos(), angles.sin())
    results = launch(q, k, q_weight, k_weight, cos, sin, 1e-6, interleaved)
    for ours, x, weight in zip(results, (q, k), (q_weight, k_weight), strict=True):
        assert ours.transpose(1, 2).is_contiguous()
        theirs = eager(x, None if weight is None else weight.to(x.dtype), cos, sin, 1e-6, interleaved)
        budget(ours, theirs, truth_of(x, weight, cos, sin, 1e-6, interleaved))


def drawn(batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """As attention gets it: the heads of a projection."""
    return torch.randn(batch, tokens, heads, head_dim).to(dtype).transpose(1, 2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", (2, 40, 64, 72, 80, 128, 160))
def test_all_flags(head_dim: int, dtype: torch.dtype, within_budget: Budget) -> None:
    for interleaved, normed, kind in itertools.product((False, True), (False, True), range(4)):
        if kind or normed:
            q, k = drawn(2, 6, 7, head_dim, dtype), drawn(2, 2, 7, head_dim, dtype)
            shape = (None, (7,), (1, 7), (2, 7))[kind]
            angles = None if shape is None else 6.3 * torch.rand(*shape, head_dim // 2)
            check(within_budget, q, k, normed, angles, interleaved)


@pytest.mark.parametrize("tokens", (1, 7, 63, 77, 199))
def test_tokens(tokens: int, within_budget: Budget) -> None:
    for dtype, interleaved in itertools.product(TYPES, (False, True)):
        q, k = drawn(1, 3, tokens, 40, dtype), drawn(1, 3, tokens, 40, dtype)
        check(within_budget, q, k, True, 6.3 * torch.rand(tokens, 20), interleaved)


def test_1128_tokens(within_budget: Budget) -> None:
    q, k = drawn(1, 2, 1128, 64, torch.bfloat16), drawn(1, 1, 1128, 64, torch.bfloat16)
    check(within_budget, q, k, True, 6.3 * torch.rand(1128, 32), True)


CONFIGS = (RopeConfig(1, 1, 1), RopeConfig(4, 2, 1), RopeConfig(2, 8, 1), RopeConfig(16, 4, 2))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tiles(config: RopeConfig, monkeypatch: pytest.MonkeyPatch, within_budget: Budget) -> None:
    """More tokens and heads in a tile than there are, fewer, and numbers that it does not divide."""
    monkeypatch.setattr(triton_rope, "config_for", lambda *_: config)
    for interleaved in (False, True):
        q, k = drawn(3, 5, 11, 40, torch.float16), drawn(3, 3, 11, 40, torch.float16)
        check(within_budget, q, k, True, 6.3 * torch.rand(3, 11, 20), interleaved)


def test_layouts(within_budget: Budget) -> None:
    for interleaved in (False, True):
        q, k, _ = torch.randn(2, 9, 3, 4, 40).half().unbind(2)  # of one projection
        check(within_budget, q.transpose(1, 2), k.transpose(1, 2), True, 6.3 * torch.rand(9, 20), interleaved)
        q, k = torch.randn(2, 4, 9, 40).half(), torch.randn(2, 2, 40, 9).half().transpose(2, 3)
        angles = 6.3 * torch.rand(20, 9).T  # one number per pair, not contiguous
        check(within_budget, q, k, True, angles, interleaved)
        q, k = torch.randn(2, 4, 9, 44).half()[..., 3:43], torch.randn(1, 1, 9, 40).half().expand(2, 4, -1, -1)
        check(within_budget, q, k, True, 6.3 * torch.rand(9, 40)[:, ::2], interleaved)


def test_odd_head_without_rotation(within_budget: Budget) -> None:
    for head_dim in (1, 7):
        q, k = drawn(1, 3, 5, head_dim, torch.float32), drawn(1, 3, 5, head_dim, torch.float32)
        check(within_budget, q, k, True, None, True)


def test_mixed_types(within_budget: Budget) -> None:
    q, k = drawn(1, 3, 5, 64, torch.float16), drawn(1, 3, 5, 64, torch.float16)
    check(within_budget, q, k, True, 6.3 * torch.rand(5, 32), True, weights=torch.float32)
