"""What each argument has to be. A misfit is a ValueError or TypeError that names it, what it got and what it takes.

Every check is on types and shapes alone, so that it also runs under torch.compile and torch.export.
"""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32
from torch import bool as torch_bool

MAX_HEAD_DIM = 512
DTYPES = (float16, bfloat16, float32)


def fail(argument: str, got: object, expected: object) -> ValueError:
    return ValueError(f"{argument}: got {got}, expected {expected}")


def shape(x: Tensor) -> list[int]:
    return list(x.shape)


def spans(size: int, full: int) -> bool:
    """Whether a size broadcasts to the full one. A symbolic size is compared with the full one first: that it is no 1
    would be a condition on the exported graph."""
    if isinstance(size, int) and size == 1:
        return True
    return size in (full, 1)


def check_tensors(**tensors: Tensor | None) -> None:
    """All are tensors, of a float type that is served, on the first one's device; none is empty."""
    first: tuple[str, Tensor] | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if any(size == 0 for size in x.shape):
            raise fail(name, shape(x), "no size of 0")
        if first is None:
            first = (name, x)
        elif x.device != first[1].device:
            raise fail(name, f"device {x.device}", f"{first[1].device}, as {first[0]}")


def check_forward_only(*tensors: Tensor | None) -> None:
    """There is no backward here: a gradient that is silently lost would be worse than an error."""
    import torch

    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "requires_grad: got a tensor that wants a gradient, expected inference: call under torch.no_grad()"
        )


def check_same_dtype(**tensors: Tensor | None) -> None:
    (first, x), *rest = [(n, t) for n, t in tensors.items() if t is not None]
    for name, other in rest:
        if other.dtype != x.dtype:
            raise TypeError(f"{name}: got {other.dtype}, expected {x.dtype}, as {first}")


def check_dims(name: str, x: Tensor, dims: int, layout: str) -> None:
    if x.dim() != dims:
        raise fail(name, f"{x.dim()} dimensions, {shape(x)}", layout)


def casts(x: Tensor) -> bool:
    """Whether autocast will give all floating-point arguments one type."""
    import torch

    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def check_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> None:
    floats = bias if bias is not None and bias.dtype != torch_bool else None
    check_tensors(q=q, k=k, v=v, bias=floats)
    check_forward_only(q, k, v, floats)
    if not casts(q):
        check_same_dtype(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dims(name, x, 4, "[batch, heads, tokens, head_dim]")
    batch, heads, queries, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM:
        raise fail("q", f"a head_dim of {head_dim}", f"at most {MAX_HEAD_DIM}")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise fail("k", shape(k), f"batch {batch} and head_dim {head_dim}, as q")
    if v.shape != k.shape:
        raise fail("v", shape(v), f"{shape(k)}, as k")
    if heads % k.shape[1] != 0:
        raise fail("k", f"{k.shape[1]} heads", f"a number that divides the {heads} heads of q")
    if causal and queries > k.shape[2]:
        raise fail("k", f"{k.shape[2]} tokens for {queries} causal queries", "at least as many: the last sees the last")
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: got {type(bias).__name__}, expected a tensor")
    if bias.device != q.device:
        raise fail("bias", f"device {bias.device}", f"{q.device}, as q")
    full = (batch, heads, queries, k.shape[2])
    if bias.dim() > 4 or any(not spans(b, f) for b, f in zip(reversed(bias.shape), reversed(full), strict=False)):
        raise fail("bias", shape(bias), f"what broadcasts to {list(full)}")


def check_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, activation: str | None
) -> None:
    check_tensors(x=x, weight=weight, bias=bias)
    check_forward_only(x, weight, bias)
    if x.dim() < 2:
        raise fail("x", shape(x), "[batch, channels, ...]")
    channels = x.shape[1]
    if groups < 1 or channels % groups != 0:
        raise fail("groups", groups, f"a number that divides the {channels} channels of x")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dim() != 1 or t.shape[0] != channels):
            raise fail(name, shape(t), f"[{channels}]")
    if activation not in (None, "silu"):
        raise fail("activation", repr(activation), 'None or "silu"')


def check_modulation(name: str, t: Tensor | None, x: Tensor) -> None:
    """[batch, channels] (or with a 1 between) per batch entry; [batch, tokens, channels] per token."""
    if t is None:
        return
    if x.dim() != 3:
        raise fail("x", f"{shape(x)} with {name}", "[batch, tokens, channels]")
    batch, tokens, channels = x.shape
    fits = t.dim() in (2, 3) and t.shape[-1] == channels and spans(t.shape[0], batch)
    if not fits or (t.dim() == 3 and not spans(t.shape[1], tokens)):
        raise fail(name, shape(t), f"[{batch}, {channels}] or [{batch}, {tokens}, {channels}]")


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    tensors = dict(x=x, weight=weight, bias=bias, residual=residual, gate=gate, scale=scale, shift=shift)
    check_tensors(**tensors)
    check_forward_only(*tensors.values())
    if x.dim() < 1:
        raise fail("x", shape(x), "[..., channels]")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dim() != 1 or t.shape[0] != x.shape[-1]):
            raise fail(name, shape(t), f"[{x.shape[-1]}], the channels of x")
    if residual is not None and residual.shape != x.shape:
        raise fail("residual", shape(residual), f"{shape(x)}, as x")
    if gate is not None and residual is None:
        raise fail("gate", "no residual to add to", "a residual too")
    for name, t in (("gate", gate), ("scale", scale), ("shift", shift)):
        check_modulation(name, t, x)


def check_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> None:
    check_tensors(q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    check_forward_only(q, k, q_weight, k_weight, cos, sin)
    for name, x in (("q", q), ("k", k)):
        check_dims(name, x, 4, "[batch, heads, tokens, head_dim]")
    batch, _, tokens, head_dim = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (batch, tokens, head_dim):
        raise fail("k", shape(k), f"batch {batch}, tokens {tokens} and head_dim {head_dim}, as q")
    if (q_weight is None) != (k_weight is None):
        raise fail("k_weight", "one of two weights", "both or none")
    for name, t in (("q_weight", q_weight), ("k_weight", k_weight)):
        if t is not None and (t.dim() != 1 or t.shape[0] != head_dim):
            raise fail(name, shape(t), f"[{head_dim}], the head_dim")
    if (cos is None) != (sin is None):
        raise fail("sin", "one of cos and sin", "both or none")
    if cos is None and q_weight is None:
        raise fail("cos", "neither weights nor rotation", "one of them: there is nothing to do")
    for name, t in (("cos", cos), ("sin", sin)):
        if t is None:
            continue
        if head_dim % 2:
            raise fail("q", f"a head_dim of {head_dim}", "an even one to rotate")
        fits = t.dim() in (2, 3) and t.shape[-2] == tokens and t.shape[-1] == head_dim // 2
        if not fits or (t.dim() == 3 and not spans(t.shape[0], batch)):
            raise fail(name, shape(t), f"[{tokens}, {head_dim // 2}] or [{batch}, {tokens}, {head_dim // 2}]")


def check_gated(value: Tensor, gate: Tensor) -> None:
    check_tensors(value=value, gate=gate)
    check_forward_only(value, gate)
    check_same_dtype(value=value, gate=gate)
    if value.dim() < 1 or gate.shape != value.shape:
        raise fail("gate", shape(gate), f"{shape(value)}, as value")
