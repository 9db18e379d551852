"""The operations as torch operators (`torch.ops.optimize.*`) and as functions that check their arguments first.

One operator boundary each: the checks are Python on shapes, the operator picks the implementation when it runs. Forward
only. Under autocast the products' inputs take autocast's type; the norms compute in fp32 whatever comes in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks, reference
from .select import Impl, check_impl, chosen

NAMESPACE = "optimize"


class Operator(NamedTuple):
    """An operator: its signature, the reference, where its Triton launcher is, its fake, what `auto` looks at."""

    schema: str
    reference: Callable[..., Any]
    launcher: str  # module:function, with the arguments of the reference
    fake: Callable[..., Any]
    size: Callable[..., tuple[int, int]]  # (work, width) for the thresholds


def heads_last(x: Tensor) -> Tensor:
    """An empty [batch, heads, tokens, head_dim] that lies in memory as [batch, tokens, heads, head_dim]: the transpose
    and reshape that follow an attention are then free."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def like_groups(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format_of(x))


def like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def like_added(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def by_tokens(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any) -> tuple[int, int]:
    """With a bias nothing was measured: no rule takes in such a width."""
    return q.shape[2] * k.shape[2], q.shape[3] if bias is None else sys.maxsize


def by_row(x: Tensor, *_: Any) -> tuple[int, int]:
    return x.numel(), x.shape[-1]


OPERATORS: dict[str, Operator] = {
    "attention": Operator(
        "(Tensor q, Tensor k, Tensor v, Tensor? bias, bool causal, float scale, str impl) -> Tensor",
        reference.attention,
        "attention:launch",
        lambda q, *_: heads_last(q),
        by_tokens,
    ),
    "group_norm": Operator(
        "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, str activation, str impl) -> Tensor",
        reference.group_norm,
        "group_norm:launch",
        like_groups,
        lambda x, groups, *_: (x.numel(), x[0].numel() // groups),
    ),
    "layer_norm": Operator(
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, str impl) -> Tensor",
        reference.layer_norm,
        "norms:launch_layer_norm",
        like_first,
        by_row,
    ),
    "rms_norm": Operator(
        "(Tensor x, Tensor? weight, float eps, Tensor? scale, Tensor? shift, str impl) -> Tensor",
        reference.rms_norm,
        "norms:launch_rms_norm",
        like_first,
        by_row,
    ),
    "add_layer_norm": Operator(
        "(Tensor x, Tensor residual, Tensor? gate, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
        "Tensor? shift, str impl) -> (Tensor, Tensor)",
        reference.add_layer_norm,
        "norms:launch_add_layer_norm",
        like_added,
        by_row,
    ),
    "add_rms_norm": Operator(
        "(Tensor x, Tensor residual, Tensor? gate, Tensor? weight, float eps, Tensor? scale, Tensor? shift, str impl) "
        "-> (Tensor, Tensor)",
        reference.add_rms_norm,
        "norms:launch_add_rms_norm",
        like_added,
        by_row,
    ),
    "qk_norm_rope": Operator(
        "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
        "bool interleaved, str impl) -> (Tensor, Tensor)",
        reference.qk_norm_rope,
        "rope:launch",
        lambda q, k, *_: (heads_last(q), heads_last(k)),
        by_row,
    ),
    "gated": Operator(
        "(Tensor value, Tensor gate, str activation, str impl) -> Tensor",
        reference.gated,
        "gated:launch",
        like_first,
        by_row,
    ),
}
AUTOCAST = {"attention"}
"""What takes autocast's type. The others compute in fp32 inside and keep their input's type."""


def launcher(where: str) -> Callable[..., Any]:
    import importlib

    module, _, name = where.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.triton_{module}"), name)
    return found


def implementation(name: str, operator: Operator) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        *rest, impl = args
        if impl == "reference" or chosen(name, impl, rest[0], *operator.size(*rest)) == "reference":
            return operator.reference(*rest)
        return launcher(operator.launcher)(*rest)

    return run


def autocast_of(name: str, device: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        key = torch._C.DispatchKey.AutocastCUDA if device == "cuda" else torch._C.DispatchKey.AutocastCPU
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return getattr(torch.ops.optimize, name)(*cast)

    return run


def register() -> torch.library.Library:
    """Defines every operator of the table. The library object has to be kept: with it the operators go."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, operator in OPERATORS.items():
        library.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        library.impl(name, implementation(name, operator), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", operator.fake, lib=library)
        if name in AUTOCAST:
            for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
                library.impl(name, autocast_of(name, device), key)
    return library


LIBRARY = register()
OPS: Any = torch.ops.optimize


# --- what people call ------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`softmax(q k^T * scale + bias) v` for each head, computed block by block with a running maximum and sum.

    q: [batch, heads, queries, head_dim]; k and v: [batch, kv_heads, keys, head_dim], where kv_heads divides heads
    (grouped and multi-query attention). Any strides; fp16, bf16 or fp32, all three alike; head_dim up to 512.
    bias: what broadcasts to [batch, heads, queries, keys]: added to the scores, or boolean, True where a query sees.
    causal: query i sees the keys up to i + keys - queries, so that the last query sees the last key (a KV cache).
    scale: 1 / sqrt(head_dim) unless given. Returns [batch, heads, queries, head_dim], laid out in memory as [batch,
    queries, heads, head_dim]. A query that sees no key gives zeros.

    Raises ValueError and TypeError for what does not fit, MissingError where impl="triton" cannot run.
    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao, FlashAttention-2, 2023, 3.1.
    """
    check_impl(impl)
    checks.check_attention(q, k, v, bias, causal)
    bias = bias if bias is None else bias[(None,) * (4 - bias.dim())]
    return OPS.attention(q, k, v, bias, causal, q.shape[-1] ** -0.5 if scale is None else float(scale), impl)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Literal["silu"] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Normalizes each group of channels over its positions, then scales and shifts each channel, then SiLU if asked.

    x: [batch, channels, ...], contiguous or channels-last, which the result keeps; weight and bias: [channels].
    Raises ValueError and TypeError for what does not fit. Source: Wu and He, Group Normalization, 2018; statistics of
    chunks are merged as in Chan, Golub and LeVeque, Updating formulae for computing sample variances, 1979.
    """
    check_impl(impl)
    checks.check_group_norm(x, groups, weight, bias, activation)
    return OPS.group_norm(x, groups, weight, bias, eps, activation or "", impl)


def rows(t: Tensor | None) -> Tensor | None:
    """A modulation per batch entry, [batch, channels], as [batch, 1, channels]."""
    return t[:, None] if t is not None and t.dim() == 2 else t


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: None = None,
    gate: None = None, scale: Tensor | None = None, shift: Tensor | None = None, impl: Impl = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor,
    gate: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None, impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization over the last dimension, with what stands around it in transformers in the same pass.

    x: [..., channels]; weight and bias: [channels] or None. With `residual` (shape of x), `total = residual + gate * x`
    is normed in the place of x and (normed, total) is returned: AdaLN-zero's gate, or a plain add without one. With
    scale and shift the result is `normed * (1 + scale) + shift`: AdaLN. gate, scale, shift: [batch, channels] or
    [batch, tokens, channels]. Raises ValueError and TypeError for what does not fit.
    Source: Ba et al., Layer Normalization, 2016; Peebles and Xie, DiT, 2023, 3.2.
    """
    check_impl(impl)
    checks.check_norm(x, weight, bias, residual, gate, scale, shift)
    if residual is None:
        return OPS.layer_norm(x, weight, bias, eps, rows(scale), rows(shift), impl)
    return OPS.add_layer_norm(x, residual, rows(gate), weight, bias, eps, rows(scale), rows(shift), impl)


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: None = None, gate: None = None,
    scale: Tensor | None = None, shift: Tensor | None = None, impl: Impl = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor, gate: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None, impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, with the residual, gate and modulation of
    `layer_norm`. Shapes and errors as there. Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    check_impl(impl)
    checks.check_norm(x, weight, None, residual, gate, scale, shift)
    if residual is None:
        return OPS.rms_norm(x, weight, eps, rows(scale), rows(shift), impl)
    return OPS.add_rms_norm(x, residual, rows(gate), weight, eps, rows(scale), rows(shift), impl)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    *,
    interleaved: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """RMS-normalizes each head of q and k, then rotates it by its token's position: what FLUX, SD3.5 and llama do.

    q: [batch, heads, tokens, head_dim]; k: [batch, kv_heads, tokens, head_dim]; any strides. The weights: [head_dim],
    or None for no norm. cos, sin: [tokens, head_dim / 2] or [batch, tokens, head_dim / 2], one number per pair, or None
    for no rotation. `interleaved` pairs (0, 1), (2, 3), ... (FLUX); otherwise (0, d/2), (1, d/2 + 1), ... (llama).
    Returns q and k, laid out in memory as [batch, tokens, heads, head_dim]. Raises ValueError and TypeError for what
    does not fit. Source: Su et al., RoFormer, 2021, 3.4.2.
    """
    check_impl(impl)
    checks.check_qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
    return OPS.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, interleaved, impl)


def geglu(value: Tensor, gate: Tensor, *, approximate: Literal["none", "tanh"] = "none", impl: Impl = "auto") -> Tensor:
    """`value * gelu(gate)`, both [..., channels] of any strides (halves of a projection, say); a contiguous result.

    Raises ValueError and TypeError for what does not fit. Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    check_impl(impl)
    checks.check_gated(value, gate)
    if approximate not in ("none", "tanh"):
        raise checks.fail("approximate", repr(approximate), '"none" or "tanh"')
    return OPS.gated(value, gate, "gelu" if approximate == "none" else "gelu_tanh", impl)


def swiglu(value: Tensor, gate: Tensor, *, impl: Impl = "auto") -> Tensor:
    """`value * silu(gate)`, both [..., channels] of any strides; contiguous result.

    Raises ValueError and TypeError for what does not fit. Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    check_impl(impl)
    checks.check_gated(value, gate)
    return OPS.gated(value, gate, "silu", impl)
