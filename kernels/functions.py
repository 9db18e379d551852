"""Each operation as an ONNX function in the domain `ai.optimize`: one node, its body written in standard operators.

A runtime that has no kernel for the node runs its body; ours is preferred where the native library is loaded. Bodies
need opset 23 (Attention, RMSNormalization, RotaryEmbedding).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "ai.optimize"
VERSION = 1
LEAST_OPSET = 23

ATTENTION = """
Attention <causal, scale> (q, k, v) => (y) {{
    y = Attention <is_causal: int = @causal, scale: float = @scale> (q, k, v)
}}"""
# ONNX Runtime wants the last two sizes of a mask whole, whatever the standard says
ATTENTION_BIAS = """
AttentionBias <scale> (q, k, v, bias) => (y) {{
    one = Constant <value_ints = [1]> ()
    queries = Shape <start = 2, end = 3> (q)
    keys = Shape <start = 2, end = 3> (k)
    whole = Concat <axis = 0> (one, one, queries, keys)
    mask = Expand (bias, whole)
    y = Attention <scale: float = @scale> (q, k, v, mask)
}}"""
# Heads side by side, as a projection leaves them: [batch, tokens, heads * head_dim]
PACKED_ATTENTION = """
PackedAttention <causal, scale, heads, kv_heads> (q, k, v) => (y) {{
    y = Attention
        <is_causal: int = @causal, scale: float = @scale, q_num_heads: int = @heads, kv_num_heads: int = @kv_heads>
        (q, k, v)
}}"""
PACKED_ATTENTION_BIAS = """
PackedAttentionBias <scale, heads, kv_heads> (q, k, v, bias) => (y) {{
    one = Constant <value_ints = [1]> ()
    queries = Shape <start = 1, end = 2> (q)
    keys = Shape <start = 1, end = 2> (k)
    whole = Concat <axis = 0> (one, one, queries, keys)
    mask = Expand (bias, whole)
    y = Attention <scale: float = @scale, q_num_heads: int = @heads, kv_num_heads: int = @kv_heads> (q, k, v, mask)
}}"""
GROUP_NORM = """
{name} <groups, epsilon> (x, weight, bias) => (y) {{
    {normed} = GroupNormalization <num_groups: int = @groups, epsilon: float = @epsilon> (x, weight, bias)
    {then}
}}"""
NORM = """
{name} <epsilon> ({inputs}) => ({outputs}) {{
    {before}
    {normed} = {kind} <axis = -1, epsilon: float = @epsilon> ({operands})
    {then}
}}"""
ROTATED = """
    wide_{x} = Cast <to = 1> ({source})
    turned_{x} = RotaryEmbedding <interleaved: int = @interleaved> (wide_{x}, cos_whole, sin_whole)
    {x}_out = CastLike (turned_{x}, {x})"""
WHOLE_ANGLES = """
    one = Constant <value_ints = [1]> ()
    batch = Shape <start = 0, end = 1> (q)
    whole = Concat <axis = 0> (batch, one, one)
    cos_whole = Expand (cos, whole)
    sin_whole = Expand (sin, whole)"""
QK_NORMED = """
    {q} = RMSNormalization <axis = -1, epsilon: float = @epsilon> (q, q_weight)
    {k} = RMSNormalization <axis = -1, epsilon: float = @epsilon> (k, k_weight)"""
QK = """
{name} <{attributes}> ({inputs}) => (q_out, k_out) {{
    {body}
}}"""
GATED = {
    "GeGLU": """
GeGLU <approximate> (value, gate) => (y) {{
    opened = Gelu <approximate: string = @approximate> (gate)
    y = Mul (value, opened)
}}""",
    "SwiGLU": """
SwiGLU (value, gate) => (y) {{
    share = Sigmoid (gate)
    opened = Mul (gate, share)
    y = Mul (value, opened)
}}""",
}
SILU = "share = Sigmoid (normed) y = Mul (normed, share)"
MODULATION = """number = Constant <value_float = 1.0> ()
    unit = CastLike (number, x)
    factor = Add (scale, unit)
    scaled = Mul (normed, factor)
    y = Add (scaled, shift)"""
SUMS = {
    "": "",
    "Add": "total = Add (residual, x)",
    "GatedAdd": "opened = Mul (gate, x) total = Add (residual, opened)",
}
SUM_INPUTS = {"": ["x"], "Add": ["x", "residual"], "GatedAdd": ["x", "residual", "gate"]}
NORM_KINDS = {
    "LayerNorm": ("LayerNormalization", ["weight", "bias"]),
    "RMSNorm": ("RMSNormalization", ["weight"]),
}


def norm_texts() -> Iterator[tuple[str, str]]:
    """{"", Add, GatedAdd} x {LayerNorm, RMSNorm} x {"", Modulated}."""
    for sums, adding in SUMS.items():
        for kind, (standard, parameters) in NORM_KINDS.items():
            for suffix, then in (("", ""), ("Modulated", MODULATION)):
                name = sums + kind + suffix
                modulation = ["scale", "shift"] if suffix else []
                yield (
                    name,
                    NORM.format(
                        name=name,
                        inputs=", ".join([*SUM_INPUTS[sums], *parameters, *modulation]),
                        outputs="y, total" if sums else "y",
                        before=adding,
                        normed="normed" if suffix else "y",
                        kind=standard,
                        operands=", ".join(["total" if sums else "x", *parameters]),
                        then=then,
                    ),
                )


def qk_texts() -> Iterator[tuple[str, str]]:
    weights, angles = ["q_weight", "k_weight"], ["cos", "sin"]

    def text(name: str, inputs: list[str], attributes: str, body: str) -> tuple[str, str]:
        return name, QK.format(name=name, inputs=", ".join(["q", "k", *inputs]), attributes=attributes, body=body)

    normed = QK_NORMED.format(q="q_normed", k="k_normed")
    turned = ROTATED.format(x="q", source="q_normed") + ROTATED.format(x="k", source="k_normed")
    plain = ROTATED.format(x="q", source="q") + ROTATED.format(x="k", source="k")
    yield text("QKNormRope", weights + angles, "epsilon, interleaved", WHOLE_ANGLES + normed + turned)
    yield text("QKNorm", weights, "epsilon", QK_NORMED.format(q="q_out", k="k_out"))
    yield text("RotaryQK", angles, "interleaved", WHOLE_ANGLES + plain)


@functools.cache
def texts() -> Mapping[str, str]:
    """Operator name -> its function in ONNX's text form."""
    return {
        "Attention": ATTENTION.format(),
        "AttentionBias": ATTENTION_BIAS.format(),
        "PackedAttention": PACKED_ATTENTION.format(),
        "PackedAttentionBias": PACKED_ATTENTION_BIAS.format(),
        "GroupNorm": GROUP_NORM.format(name="GroupNorm", normed="y", then=""),
        "GroupNormSiLU": GROUP_NORM.format(name="GroupNormSiLU", normed="normed", then=SILU),
        **dict(norm_texts()),
        **dict(qk_texts()),
        **{name: text.format() for name, text in GATED.items()},
    }


def function(name: str, opset: int = LEAST_OPSET) -> onnx.FunctionProto:
    """The function of one operator, its body at this opset (23 or later). Raises KeyError for a name that is none."""
    import onnx.parser

    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    return onnx.parser.parse_function(head + texts()[name])
