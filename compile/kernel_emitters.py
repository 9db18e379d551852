"""Emitters of the kernels room's operators: each is one node in the domain `ai.optimize` (kernels/functions.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from optimize.kernels.functions import DOMAIN, LEAST_OPSET

from . import emitters
from .emitters import Emitter
from .translate import Builder, Out, Tensor, Untranslated


def node(g: Builder, kind: str, *inputs: Tensor, out: Any, **attributes: Any) -> Any:
    if g.opset < LEAST_OPSET:
        raise Untranslated({f"{DOMAIN}::{kind} below opset {LEAST_OPSET}"})
    outs = out if isinstance(out, tuple) else (out,)
    values = g.op(kind, *(t.value for t in inputs), domain=DOMAIN, outputs=len(outs), **attributes)
    values = values if isinstance(out, tuple) else (values,)
    for value, each in zip(values, outs, strict=True):
        g.describe(value, each)
    return values if isinstance(out, tuple) else values[0]


def attention(
    g: Builder, out: Out, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, impl: str
) -> Any:
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries not in (1, keys):  # the standard's `is_causal` is for as many queries as keys
        seen = triangle(g, queries, keys)
        bias = seen if bias is None else both(g, bias, seen)
        causal = False
    if bias is None:
        return node(g, "Attention", q, k, v, out=out, causal=int(causal and queries != 1), scale=scale)
    bias = bias if bias.dtype == torch.bool else g.cast(bias, q.dtype)
    if causal and queries != 1:
        bias = both(g, bias, triangle(g, queries, keys))
    return node(g, "AttentionBias", q, k, v, bias, out=out, scale=scale)


def triangle(g: Builder, queries: Any, keys: Any) -> Tensor:
    """[1, 1, queries, keys]: True where a query sees a key, the last query the last key."""
    out = Out((1, 1, queries, keys), torch.int32)
    ones = emitters.tensor(g, emitters.filled(g, out, 1), out)
    lower = g.op("Trilu", ones.value, g.size_scalar(keys - queries), upper=0, out=out)
    return g.cast(Tensor(g, out.shape, out.dtype, emitted=lower), torch.bool)


def both(g: Builder, bias: Tensor, seen: Tensor) -> Tensor:
    shape = (*bias.shape[:-2], *seen.shape[-2:])
    out = Out(shape, bias.dtype)
    if bias.dtype == torch.bool:
        return Tensor(g, shape, bias.dtype, emitted=g.op("And", bias.value, seen.value, out=out))
    closed = g.scalar(torch.finfo(bias.dtype).min, bias.dtype)
    return Tensor(g, shape, bias.dtype, emitted=g.op("Where", seen.value, bias.value, closed, out=out))


def group_norm(
    g: Builder,
    out: Out,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    impl: str,
) -> Any:
    channels = int(x.shape[1])
    unit, zero = (g.fixed(torch.full((channels,), n, dtype=x.dtype)) for n in (1.0, 0.0))
    kind = "GroupNormSiLU" if activation else "GroupNorm"
    return node(
        g,
        kind,
        x,
        g.cast(weight or unit, x.dtype),
        g.cast(bias or zero, x.dtype),
        out=out,
        groups=groups,
        epsilon=eps,
    )


def norm(kind: str, sums: bool, has_bias: bool) -> Emitter:
    """The family {"", Add, GatedAdd} x {LayerNorm, RMSNorm} x {"", Modulated}; arguments as of the torch operators."""

    def emit(g: Builder, out: Any, x: Tensor, *rest: Any) -> Any:
        given = list(rest)
        residual, gate = (given.pop(0), given.pop(0)) if sums else (None, None)
        weight, bias = given.pop(0), given.pop(0) if has_bias else None
        eps, scale, shift, _impl = given
        normed = residual or x
        inputs = [x, *(t for t in (residual, gate) if t is not None)]
        inputs.append(weight or number(g, normed, 1.0))
        if has_bias:
            inputs.append(bias or number(g, normed, 0.0))
        modulated = scale is not None or shift is not None
        if modulated:
            inputs += [scale or number(g, normed, 0.0, 3), shift or number(g, normed, 0.0, 3)]
        name = ("GatedAdd" if gate else "Add" if residual else "") + kind + ("Modulated" if modulated else "")
        return node(g, name, *(g.cast(t, normed.dtype) for t in inputs), out=out, epsilon=eps)

    return emit


def number(g: Builder, x: Tensor, value: float, rank: int = 1) -> Tensor:
    """[..., channels of x], which changes nothing: 1 for a factor, 0 for a summand."""
    return g.fixed(torch.full((*[1] * (rank - 1), int(x.shape[-1])), value, dtype=x.dtype))


def qk_norm_rope(
    g: Builder,
    out: tuple[Out, Out],
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    impl: str,
) -> Any:
    weights = [g.cast(t, q.dtype) for t in (q_weight, k_weight) if t is not None]
    angles = [batched(g, g.cast(t, torch.float32)) for t in (cos, sin) if t is not None]
    name = "QKNormRope" if weights and angles else "QKNorm" if weights else "RotaryQK"
    attributes = {"epsilon": eps} if weights else {}
    attributes |= {"interleaved": int(interleaved)} if angles else {}
    return node(g, name, q, k, *weights, *angles, out=out, **attributes)


def batched(g: Builder, t: Tensor) -> Tensor:
    """Angles as [1 or batch, tokens, head_dim / 2]."""
    if t.rank == 3:
        return t
    if t.constant is not None:
        return g.fixed(t.constant[None])
    shape = (1, *t.shape)
    return Tensor(g, shape, t.dtype, emitted=g.op("Unsqueeze", t.value, g.ints(0), out=Out(shape, t.dtype)))


def gated(g: Builder, out: Out, value: Tensor, gate: Tensor, activation: str, impl: str) -> Any:
    if activation == "silu":
        return node(g, "SwiGLU", value, gate, out=out)
    return node(g, "GeGLU", value, gate, out=out, approximate="tanh" if activation == "gelu_tanh" else "none")


KERNEL_EMITTERS: Mapping[str, Emitter] = {
    "optimize.attention.default": attention,
    "optimize.group_norm.default": group_norm,
    "optimize.layer_norm.default": norm("LayerNorm", sums=False, has_bias=True),
    "optimize.rms_norm.default": norm("RMSNorm", sums=False, has_bias=False),
    "optimize.add_layer_norm.default": norm("LayerNorm", sums=True, has_bias=True),
    "optimize.add_rms_norm.default": norm("RMSNorm", sums=True, has_bias=False),
    "optimize.qk_norm_rope.default": qk_norm_rope,
    "optimize.gated.default": gated,
}
