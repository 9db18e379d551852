"""The attention kernel in Triton's interpreter, against softmax written out in float64. Run by test_interpreted.py."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optimize import kernels
from optimize.kernels import triton_attention, tuning
from optimize.kernels.select import interpreting

pytestmark = [
    pytest.mark.skipif(
        not interpreting() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1, or a GPU"
    ),
    pytest.mark.usefixtures("on_the_device"),
]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FLOOR = {FP32: 2e-7, FP16: 3e-4, BF16: 2.4e-3}
"""Relative L2 error of a result that is exact and then rounded to its type (2^-24, 2^-11 and 2^-8 over about the square
root of 3), with room for one more rounding: where torch is luckier than that, twice its error would be too little."""


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    causal: bool = False
    bias: str = ""  # "row": added, the same for all queries; "full": added; "bool": one for each batch entry and query

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}/{self.kv_heads}x{self.queries}:{self.keys}x{self.head_dim}"
        return "-".join((sizes, str(self.dtype)[6:], self.bias or "plain", *("causal",) * self.causal))


CASES = [
    Case(1, 1, 1, 1, 1, 40, FP32),
    Case(2, 2, 2, 7, 77, 40, FP16),
    Case(1, 2, 2, 63, 77, 72, BF16),
    Case(1, 2, 2, 77, 77, 64, FP32, causal=True),
    Case(2, 3, 3, 199, 77, 80, FP16, bias="bool"),
    Case(1, 1, 1, 63, 154, 160, BF16, bias="row"),
    Case(1, 1, 1, 63, 231, 96, FP16, bias="full"),
    Case(1, 1, 1, 77, 512, 32, FP16, bias="row"),
    Case(1, 1, 1, 199, 199, 80, FP32, bias="full", causal=True),
    Case(1, 1, 1, 1128, 1128, 40, FP16),
    Case(1, 1, 1, 1128, 1128, 72, FP16, causal=True),
    Case(1, 1, 1, 199, 1128, 160, FP32),
    Case(1, 1, 1, 63, 199, 512, FP16),
    Case(1, 1, 1, 7, 63, 256, BF16),
    Case(1, 4, 2, 63, 199, 128, FP16, causal=True),
    Case(2, 8, 2, 1, 199, 128, BF16, causal=True),
    Case(1, 6, 2, 7, 300, 64, FP16, causal=True, bias="full"),
    Case(1, 4, 1, 7, 63, 128, FP32, causal=True, bias="bool"),
    Case(1, 2, 2, 256, 256, 64, FP16),
    Case(1, 1, 1, 128, 129, 40, FP32, causal=True),  # the last key is alone in its block
    Case(1, 2, 1, 130, 256, 8, FP32, bias="bool"),
    Case(1, 1, 1, 16, 128, 1, FP32),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does not write is not a number."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *size, **words: new_empty(self, *size, **words).fill_(math.nan)
    )


def drawn(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(seed)
    q = torch.randn(case.batch, case.heads, case.queries, case.head_dim).to(case.dtype)
    k, v = (torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim).to(case.dtype) for _ in range(2))
    if not case.bias:
        return q, k, v, None
    if case.bias == "bool":
        sees = torch.rand(case.batch, 1, case.queries, case.keys) > 0.4
        sees[:, :, ::5] = False  # every fifth query sees nothing
        return q, k, v, sees
    shape = (case.batch, 1, 1, case.keys) if case.bias == "row" else (1, case.heads, case.queries, case.keys)
    bias = 2 * torch.randn(shape).to(case.dtype)
    bias[..., :3] = -math.inf  # 3 keys that no query sees
    return q, k, v, bias


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(q k^T * scale + bias) v, written out in float64."""
    times = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(times, 1), v.double().repeat_interleave(times, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.double()
    if causal:
        last = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        scores = scores.masked_fill(torch.arange(k.shape[2]) > last, -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total == 0, 1.0, total)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def torchs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's own operation, with the zeros that it leaves to chance where a query sees nothing."""
    mask = bias
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mask = seen if bias is None else bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out if bias is None or bias.dtype != torch.bool else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_twice_torchs_own_error(case: Case) -> None:
    q, k, v, bias = drawn(case)
    scale = case.head_dim**-0.5
    got = kernels.attention(q, k, v, bias=bias, causal=case.causal, impl="triton")
    assert got.dtype == case.dtype and got.shape == q.shape
    assert got.transpose(1, 2).is_contiguous()
    expected = exact(q, k, v, bias, case.causal, scale)
    allowed = 2 * relative(torchs(q, k, v, bias, case.causal, scale), expected)
    assert relative(got, expected) <= max(allowed, FLOOR[case.dtype])
    if case.bias == "bool":
        assert (got[:, :, ::5] == 0).all()


def test_any_strides() -> None:
    """Slices of one projection, a reversed layout, a last dimension that is not contiguous, an expanded batch."""
    torch.manual_seed(1)
    qkv = torch.randn(2, 63, 3, 2, 40).to(FP16)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    spread = torch.randn(2, 2, 40, 63).to(FP16).transpose(-1, -2)
    shared = torch.randn(1, 2, 63, 40).to(FP16).expand(2, -1, -1, -1)
    odd = torch.randn(2, 2, 63, 41).to(FP16)[..., 1:]
    bias = torch.randn(63, 2, 63).to(FP16).permute(1, 0, 2)[None]
    flat = torch.randn(2, 2, 63, 1).to(FP16).expand(-1, -1, -1, 40)
    for a, b, c in ((q, k, v), (spread, k, spread), (q, shared, shared), (odd, odd, v), (q, k, flat), (flat, flat, v)):
        got = kernels.attention(a, b, c, bias=bias, impl="triton")
        assert relative(got, exact(a, b, c, bias, False, 40**-0.5)) <= FLOOR[FP16]


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_any_scale(scale: float) -> None:
    q, k, v, _ = drawn(Case(1, 1, 1, 63, 199, 40, FP32))
    got = kernels.attention(q, k, v, scale=scale, impl="triton")
    assert relative(got, exact(q, k, v, None, False, scale)) <= 4 * FLOOR[FP32]


def test_scores_that_are_large_do_not_overflow() -> None:
    """Scores near 1e4: their exponentials are past what fp32 holds."""
    q, k, v, _ = drawn(Case(1, 1, 1, 63, 199, 64, FP32))
    got = kernels.attention(q * 100, k * 100, v, impl="triton")
    assert (
        relative(got, exact(q * 100, k * 100, v, None, False, 0.125)) <= 1e-4
    )  # the last bit of a score near 1e4 is 0.001


@pytest.mark.parametrize("lowest", [torch.finfo(FP32).min, -1e4, -math.inf])
def test_a_row_whose_keys_are_all_masked_by_a_bias(lowest: float) -> None:
    """-inf gives zeros; a large negative number, added to every key alike, changes nothing but its rounding."""
    q, k, v, _ = drawn(Case(1, 2, 2, 7, 199, 40, FP32))
    bias = torch.zeros(1, 1, 7, 199)
    bias[:, :, 3] = lowest
    got = kernels.attention(q, k, v, bias=bias, impl="triton")
    expected = exact(q, k, v, bias, False, 40**-0.5)
    assert got.isfinite().all()
    assert relative(got, expected) <= (1e-3 if lowest == -1e4 else 3e-6)
    assert (got[:, :, 3] == 0).all() == (lowest == -math.inf)


def test_masked_keys_are_not_looked_at() -> None:
    """What lies past the tokens in memory may be anything."""
    q, k, v, _ = drawn(Case(1, 1, 1, 7, 77, 40, FP16))
    whole = torch.full((3, 1, 1, 128, 64), math.nan, dtype=FP16)
    whole[0, ..., :7, :40], whole[1, ..., :77, :40], whole[2, ..., :77, :40] = q, k, v
    a, b, c = whole[0, ..., :7, :40], whole[1, ..., :77, :40], whole[2, ..., :77, :40]
    assert relative(kernels.attention(a, b, c, impl="triton"), exact(q, k, v, None, False, 40**-0.5)) <= FLOOR[FP16]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 64), (128, 128)])
def test_every_config_gives_the_same(block_m: int, block_n: int, pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, bias = drawn(Case(1, 4, 2, 63, 150, 40, FP32, bias="full"))
    config = triton_attention.AttentionConfig(block_m, block_n, 4, 1, pack)
    tuning.forget()
    monkeypatch.setattr(triton_attention, "config_for", lambda kernel, problem, device: config)
    got = triton_attention.launch(q, k, v, bias, True, 40**-0.5)
    assert relative(got, exact(q, k, v, bias, True, 40**-0.5)) <= 2 * FLOOR[FP32]
