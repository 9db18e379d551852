"""Operators that tracing keeps whole: attention, norms, activations, linear layers, resizing.

torch.export under symbolic sizes spends most of its time working out the sizes inside composite operators. A leaf
says its output's size in one line instead (three times faster on a U-Net), and reaches the translator as what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_library = torch.library.Library("leaf", "DEF")


def _leaf(schema: str, fake: Callable[..., Any], real: Callable[..., Any]) -> Any:
    """Defines `leaf::<schema>`: `fake` gives its output's size, `real` is torch's own function."""
    _library.define(schema)
    name = schema.partition("(")[0]
    torch.library.register_fake(f"leaf::{name}", fake, lib=_library)
    _library.impl(name, real, "CPU")
    return getattr(torch.ops.leaf, name)


def _like(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


attention = _leaf(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale) -> Tensor",
    lambda q, k, v, mask, causal, scale: q.new_empty((*q.shape[:-1], v.shape[-1])),
    lambda q, k, v, mask, causal, scale: F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ),
)
group_norm = _leaf(
    "group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps) -> Tensor", _like, F.group_norm
)
layer_norm = _leaf(
    "layer_norm(Tensor x, int dims, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _like,
    lambda x, dims, weight, bias, eps: F.layer_norm(x, x.shape[-dims:], weight, bias, eps),
)
rms_norm = _leaf(
    "rms_norm(Tensor x, int dims, Tensor? weight, float? eps) -> Tensor",
    _like,
    lambda x, dims, weight, eps: F.rms_norm(x, x.shape[-dims:], weight, eps),
)
activation = _leaf("activation(Tensor x, str kind) -> Tensor", _like, lambda x, kind: ACTIVATIONS[kind](x))
softmax = _leaf("softmax(Tensor x, int dim) -> Tensor", _like, F.softmax)
linear = _leaf(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    F.linear,
)
resize = _leaf(
    "resize(Tensor x, SymInt height, SymInt width, str mode, bool align_corners, float[] scales) -> Tensor",
    lambda x, height, width, mode, align_corners, scales: x.new_empty((*x.shape[:2], height, width)),
    lambda x, height, width, mode, align_corners, scales: F.interpolate(
        x, (height, width), mode=mode, align_corners=align_corners if mode != "nearest" else None
    ),
)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.ndim != 4 or dropout_p:
        return NotImplemented
    return attention(query, key, value, attn_mask, is_causal, scale)


def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return group_norm(input, num_groups, weight, bias, eps)


def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return layer_norm(input, len(normalized_shape), weight, bias, eps)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    return rms_norm(input, len(normalized_shape), weight, eps)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return linear(input, weight, bias) if weight.ndim == 2 else NotImplemented


def _softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if dim is None:
        return NotImplemented
    return softmax(input if dtype is None else input.to(dtype), dim)


def _resize(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Any:
    known = mode in ("nearest", "bilinear", "bicubic") and input.ndim == 4
    if not known or antialias or recompute_scale_factor:
        return NotImplemented
    if size is not None:
        height, width = (size, size) if isinstance(size, int | torch.SymInt) else size
        return resize(input, height, width, mode, bool(align_corners), [])
    scales = [float(s) for s in (scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * 2)]
    if any(s != int(s) for s in scales):
        return NotImplemented
    height, width = (int(s) * d for s, d in zip(scales, input.shape[2:], strict=True))
    return resize(input, height, width, mode, bool(align_corners), scales)


def _meshgrid(*tensors: Any, indexing: str | None = None) -> Any:
    return torch.meshgrid(*tensors, indexing=indexing or "ij")  # torch's form without a word does not trace


def _act(kind: str) -> Callable[..., Any]:
    return lambda input, inplace=False: activation(input, kind) if not inplace else NotImplemented


LEAVES: Mapping[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.linear: _linear,
    F.softmax: _softmax,
    F.interpolate: _resize,
    torch.meshgrid: _meshgrid,
    F.silu: _act("silu"),
    F.relu: _act("relu"),
    F.gelu: lambda input, approximate="none": activation(input, "gelu" if approximate == "none" else "gelu_tanh"),
}


MAKERS = frozenset(
    {
        torch.arange,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.zeros,
        torch.tril_indices,
        torch.triu_indices,
        torch.rand,
        torch.randn,
        torch.randint,
    }
)
LITERALS = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy})


class KeepLeaves(TorchFunctionMode):
    """While active, the functions of `LEAVES` are recorded as leaf operators where they can be.

    Tensors that a forward makes without naming a device are made on meta, where its inputs are; literals keep their
    numbers (those without dimensions mix with every device as they are).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaf = LEAVES.get(func)
        if leaf is not None:
            out = leaf(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in MAKERS and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": "meta"})
        out = func(*args, **kwargs)
        return out.to("meta") if func in LITERALS and out.ndim and kwargs.get("device") is None else out
