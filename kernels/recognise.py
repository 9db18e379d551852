"""What a submodule or a function of a library is: told by its type, or by how its body is written.

Many classes of transformers are copies of one another. So a class is known by its text, not by its name: one that looks
the same computes the same, and one that differs in a word (`1 + self.weight`) is none of these.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

from .forwards import DeclinedError, canonical, read

RMS_TEXTS: Mapping[str, tuple[str, ...]] = {
    # the product with the weight is in the wider of the two types (llama, Mistral, Qwen, ...)
    "rms_norm": (
        """
input_dtype = x.dtype
x = x.to(torch.float32)
variance = x.pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.eps)
return self.weight * x.to(input_dtype)""",
    ),
    # the result has the weight's type (T5; RMSNorm of diffusers)
    "rms_norm_as_weight": (
        """
variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.eps)
if self.weight.dtype in [torch.float16, torch.bfloat16]:
    x = x.to(self.weight.dtype)
return self.weight * x""",
        """
input_dtype = x.dtype
variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.eps)
if self.weight.dtype in [torch.float16, torch.bfloat16]:
    x = x.to(self.weight.dtype)
x = x * self.weight
return x""",
    ),
}
FP32_LAYER_NORM = """
origin_dtype = x.dtype
return F.layer_norm(x.float(), self.normalized_shape, self.weight.float() if self.weight is not None else None, \
self.bias.float() if self.bias is not None else None, self.eps).to(origin_dtype)"""
ACTIVATION_TEXTS: Mapping[str, str] = {
    "return nn.functional.silu(x)": "silu",
    "return nn.functional.gelu(x)": "gelu",
    "return F.gelu(x)": "gelu",
    "return nn.functional.gelu(x, approximate='tanh')": "gelu_tanh",
    "return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))": "gelu_tanh",
    """if x.device.type == 'mps' and is_torch_version('<', '2.0.0'):
    return F.gelu(x.to(dtype=torch.float32)).to(dtype=x.dtype)
return F.gelu(x)""": "gelu",
}
HALF_ROTATION = """cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = q * cos + rotate_half(q) * sin
k_embed = k * cos + rotate_half(k) * sin
return (q_embed, k_embed)"""
EPSILONS = ("eps", "variance_epsilon", "epsilon")
NORMS = ("layer_norm", "rms_norm", "rms_norm_as_weight", "group_norm")
NOT_OURS = (nn.modules.batchnorm._NormBase, nn.LocalResponseNorm, nn.CrossMapLRN2d)  # batch and instance norms


BOUND = "its forward is bound to the instance, by a hook or a wrapper: remove that first"


def text_of(function: Any, owner: object) -> str:
    try:
        return canonical(function, owner)
    except DeclinedError:
        return ""


def untouched(module: nn.Module) -> None:
    """Raises where something else hangs on the module's own call, which an operator would go round."""
    if "forward" in module.__dict__:
        raise DeclinedError(BOUND)
    if module._forward_hooks or module._forward_pre_hooks:
        raise DeclinedError("it has forward hooks: remove them first")


def eps_of(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in EPSILONS)
    return next((float(eps) for eps in found if eps is not None), None)


def norm_kind(module: object) -> str | None:
    """One of NORMS, None for what is no norm; raises DeclinedError for a norm that is not served."""
    if not isinstance(module, nn.Module) or isinstance(module, NOT_OURS):
        return None
    kind = plain_norm_kind(module)
    if kind is None:
        name = type(module).__name__
        if any(True for _ in module.children()) or not name.lower().endswith("norm"):
            return None
        raise DeclinedError(f"{name} is written as no norm that is known: needs a layer, group or RMS norm")
    if eps_of(module) is None:
        raise DeclinedError("its eps is None, which every version of torch reads anew: needs a number")
    shape: Any = getattr(module, "normalized_shape", None) or getattr(getattr(module, "weight", None), "shape", (1,))
    if kind != "group_norm" and len(shape) != 1:
        raise DeclinedError(f"it normalizes over {len(shape)} dimensions: needs the last one alone")
    return kind


def plain_norm_kind(module: nn.Module) -> str | None:
    forward = type(module).forward
    for cls, kind in ((nn.LayerNorm, "layer_norm"), (nn.GroupNorm, "group_norm"), (nn.RMSNorm, "rms_norm")):
        if forward is cls.forward:
            return kind
    if not type(module).__name__.lower().endswith("norm"):
        return None
    text = text_of(forward, module)
    if text == FP32_LAYER_NORM.strip():
        return "layer_norm"
    return next((k for k, texts in RMS_TEXTS.items() if text in [t.strip() for t in texts]), None)


def activation_kind(thing: Any) -> str | None:
    """silu, gelu or gelu_tanh; None for anything else."""
    if thing is F.silu or isinstance(thing, nn.SiLU):
        return "silu"
    if thing is F.gelu or isinstance(thing, nn.GELU):
        return "gelu_tanh" if getattr(thing, "approximate", "none") == "tanh" else "gelu"
    if isinstance(thing, nn.Module):
        inner = getattr(thing, "act", None)  # GELUActivation keeps the function that it calls
        by_inner = activation_kind(inner) if text_of(type(thing).forward, thing) == "return self.act(x)" else None
        return by_inner or ACTIVATION_TEXTS.get(text_of(type(thing).forward, thing))
    method = getattr(thing, "__func__", None)
    return ACTIVATION_TEXTS.get(text_of(method, thing.__self__)) if method is not None else None


ATTENTION_CALLS: Mapping[str, str] = {"diffusers.models.attention_dispatch.dispatch_attention_fn": "dispatched"}
INTERLEAVED_ROTATION = "diffusers.models.embeddings.apply_rotary_emb"


def qualified(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def attention_call(function: Any) -> str | None:
    """The function of `served.py` that stands in for this one."""
    return "sdpa" if function is F.scaled_dot_product_attention else ATTENTION_CALLS.get(qualified(function))


def rotation_kind(function: Any) -> str | None:
    """How this function pairs the numbers that it rotates. Functions called apply_rotary_pos_emb are many: llama's is
    known by its text."""
    if qualified(function) == INTERLEAVED_ROTATION:
        return "interleaved"
    if getattr(function, "__name__", "") != "apply_rotary_pos_emb":
        return None
    return "halves" if "\n".join(map(ast.unparse, read(function, bare=False).body)) == HALF_ROTATION else None
