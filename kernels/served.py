"""What rewritten forwards call: the operations of `ops.py`, with a norm's module or a library's own arguments.

Where a library computes what the operations do not (a dropout, a softcap), the call is refused in words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .recognise import EPSILONS
from .select import Impl


def unserved(what: str) -> ValueError:
    return ValueError(
        f"a fused module met {what}, which its kernels do not compute: unfuse(module), or fuse it without this module"
    )


# --- norms -----------------------------------------------------------------------------------------------------------


def result_dtype(kind: str, module: Any, x: Tensor) -> torch.dtype:
    """The type that the library's own norm gives, where its weight's differs from x's."""
    weight = module.weight
    if weight is None or weight.dtype == x.dtype or kind == "layer_norm":
        dtype: torch.dtype = x.dtype
        return dtype
    return weight.dtype if kind == "rms_norm_as_weight" else torch.promote_types(weight.dtype, x.dtype)


def eps_of(module: Any) -> float:
    """Under the name that the class gives it."""
    return float(next(eps for eps in (getattr(module, name, None) for name in EPSILONS) if eps is not None))


def norm(
    kind: str, module: Any, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, impl: Impl
) -> Tensor:
    """`module(x) * (1 + scale) + shift`."""
    dtype = result_dtype(kind, module, x)
    x = x if x.dtype == dtype else x.to(torch.promote_types(dtype, x.dtype))
    if kind == "layer_norm":
        y = ops.layer_norm(x, module.weight, module.bias, eps_of(module), scale=scale, shift=shift, impl=impl)
    else:
        y = ops.rms_norm(x, module.weight, eps_of(module), scale=scale, shift=shift, impl=impl)
    return y if y.dtype == dtype else y.to(dtype)


def add_norm(
    kind: str,
    module: Any,
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """`total = residual + gate * x` and `module(total) * (1 + scale) + shift`: the latter, then the total."""
    if residual.dtype != x.dtype:  # the sum has the wider of the two
        residual = residual.to(torch.promote_types(residual.dtype, x.dtype))
    around: dict[str, Any] = dict(residual=residual, gate=gate, scale=scale, shift=shift, impl=impl)
    if kind == "layer_norm":
        y, total = ops.layer_norm(x, module.weight, module.bias, eps_of(module), **around)
    else:
        y, total = ops.rms_norm(x, module.weight, eps_of(module), **around)
    dtype = result_dtype(kind, module, total)
    return (y if y.dtype == dtype else y.to(dtype)), total


def group_norm(module: Any, x: Tensor, activation: Any = None, *, impl: Impl) -> Tensor:
    return ops.group_norm(
        x, module.num_groups, module.weight, module.bias, module.eps, activation=activation, impl=impl
    )


# --- rotations -------------------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]


def qk_norm(q_norm: Any, k_norm: Any, q: Tensor, k: Tensor, *, impl: Impl) -> Pair:
    """Both norms in one pass. q and k: [batch, heads, tokens, head_dim]."""
    return ops.qk_norm_rope(q, k, q_norm.weight, k_norm.weight, eps=eps_of(q_norm), impl=impl)


def qk_norm_rope(q_norm: Any, k_norm: Any, q: Tensor, k: Tensor, angles: Pair | None, *, impl: Impl) -> Pair:
    """FLUX. q and k: [batch, tokens, heads, head_dim]; angles: cos and sin of [tokens, head_dim], each number twice."""
    cos, sin = (None, None) if angles is None else (t.to(q.device)[:, ::2] for t in angles)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = ops.qk_norm_rope(q, k, q_norm.weight, k_norm.weight, cos, sin, eps_of(q_norm), impl=impl)
    return q.transpose(1, 2), k.transpose(1, 2)


def joint_qk_norm_rope(
    first_norms: tuple[Any, Any], first: Pair, norms: tuple[Any, Any], then: Pair, angles: Pair | None, *, impl: Impl
) -> Pair:
    """As above for two streams, each with norms of its own; the result is one after the other along the tokens."""
    tokens = first[0].shape[1]
    parts: list[Pair | None] = [None, None]
    if angles is not None:
        parts = [(angles[0][:tokens], angles[1][:tokens]), (angles[0][tokens:], angles[1][tokens:])]
    q, k = qk_norm_rope(*first_norms, *first, parts[0], impl=impl)
    q_then, k_then = qk_norm_rope(*norms, *then, parts[1], impl=impl)
    return torch.cat([q, q_then], dim=1), torch.cat([k, k_then], dim=1)


def half_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl) -> Pair:
    """llama. q and k: [batch, heads, tokens, head_dim]; cos and sin: [batch, tokens, head_dim], two equal halves."""
    half = q.shape[-1] // 2
    return ops.qk_norm_rope(q, k, cos=cos[..., :half], sin=sin[..., :half], interleaved=False, impl=impl)


# --- gates -----------------------------------------------------------------------------------------------------------


def gated(activation: str, value: Tensor, gate: Tensor, *, impl: Impl) -> Tensor:
    """`value * activation(gate)`."""
    if activation == "silu":
        return ops.swiglu(value, gate, impl=impl)
    return ops.geglu(value, gate, approximate="tanh" if activation == "gelu_tanh" else "none", impl=impl)


# --- attention -------------------------------------------------------------------------------------------------------


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    impl: Impl,
) -> Tensor:
    """torch's `scaled_dot_product_attention`. Its causal mask starts at the first key, ours ends at the last."""
    if dropout_p:
        raise unserved(f"a dropout of {dropout_p} on attention")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise unserved(f"{query.shape[1]} heads of q with {key.shape[1]} of k and no enable_gqa")
    if is_causal and query.shape[2] != key.shape[2]:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return ops.attention(query, key, value, bias=seen, scale=scale, impl=impl)
    return ops.attention(query, key, value, bias=attn_mask, causal=is_causal, scale=scale, impl=impl)


def dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Any = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
    impl: Impl,
) -> Tensor:
    """`dispatch_attention_fn` of diffusers: everything is [batch, tokens, heads, head_dim]."""
    if backend is not None or parallel_config is not None or attention_kwargs:
        raise unserved(f"attention asked of another backend ({backend or parallel_config or attention_kwargs})")
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa=True, impl=impl)
    return out.transpose(1, 2)


def interface(impl: Impl) -> Callable[..., tuple[Tensor, None]]:
    """An attention function of transformers, with the masks and the result of its own "sdpa"."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        softcap: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        if dropout or softcap is not None or cache is not None:
            raise unserved(f"attention with dropout {dropout}, softcap {softcap} or a paged cache")
        causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        queries, keys = query.shape[2], key.shape[2]
        if causal and keys != queries and queries > 1:  # an empty static cache: its tail is not filled yet
            key, value = key[:, :, :queries], value[:, :, :queries]
            position_bias = position_bias if position_bias is None else position_bias[..., :queries]
        bias = biased(position_bias, attention_mask)
        out = ops.attention(query, key, value, bias=bias, causal=causal, scale=scaling, impl=impl)
        return out.transpose(1, 2).contiguous(), None

    return attend


def biased(position_bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """T5's learned bias under a mask; a key that is not seen gets the least number, as in transformers."""
    if position_bias is None or mask is None:
        return position_bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask
