"""The operations in torch's own operators: what they mean, on any device. `impl="reference"` runs these.

Statistics, softmax and rotations are computed in fp32 (float64 stays float64); results have the type of the input,
and lie in memory as the operators' fakes say: what is compiled ahead of time reads them so, unchecked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def widening(x: Tensor, *factors: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`wide`, or nothing where torch's own norm is as good: on a GPU it sums in fp32 whatever the type, and a copy of x
    in fp32 would take longer than the norm."""
    same = all(f is None or f.dtype == x.dtype for f in factors)
    return (lambda t: t) if x.is_cuda and same else wide


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    mask, square = bias, causal and bias is None and queries == keys  # torch's kernels have a triangle of their own
    if causal and queries > 1 and not square:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if mask is not None:  # a query that sees no key gives zeros, whichever of torch's ways was taken
        lost = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        out = out.masked_fill(lost.all(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> Tensor:
    up = widening(x, weight, bias)
    y = F.group_norm(up(x), groups, None if weight is None else up(weight), None if bias is None else up(bias), eps)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels-last where the tensor is that and not plainly contiguous too."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def modulated(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * (1 + wide(scale))
    return y if shift is None else y + wide(shift)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    up = widening(x, weight, bias) if scale is None and shift is None else wide
    y = F.layer_norm(
        up(x), x.shape[-1:], None if weight is None else up(weight), None if bias is None else up(bias), eps
    )
    return modulated(y, scale, shift).to(x.dtype).contiguous()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    up = widening(x, weight) if scale is None and shift is None else wide
    y = F.rms_norm(up(x), x.shape[-1:], None if weight is None else up(weight), eps)
    return modulated(y, scale, shift).to(x.dtype).contiguous()


def added(x: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """`residual + gate * x`, rounded once to the residual's type: what the next block adds to, and what is normed."""
    branch = wide(x) if gate is None else wide(gate) * wide(x)
    return (wide(residual) + branch).to(residual.dtype).contiguous()


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = added(x, residual, gate)
    return layer_norm(total, weight, bias, eps, scale, shift), total


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = added(x, residual, gate)
    return rms_norm(total, weight, eps, scale, shift), total


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`x` [batch, heads, tokens, d] in fp32; cos and sin [batch or 1, 1, tokens, d / 2]."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        y = wide(x) if weight is None else F.rms_norm(wide(x), x.shape[-1:], wide(weight), eps)
        if cos is not None and sin is not None:
            c, s = (wide(t if t.dim() == 3 else t[None])[:, None] for t in (cos, sin))
            y = rotated(y, c, s, interleaved)
        return y.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)

    return one(q, q_weight), one(k, k_weight)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def gated(value: Tensor, gate: Tensor, activation: str) -> Tensor:
    return (wide(value) * GATES[activation](wide(gate))).to(value.dtype).contiguous()
