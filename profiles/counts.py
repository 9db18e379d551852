"""How many operations one ONNX node computes. A multiply-add is two, as in every vendor's peak rate.

Products (convolution, matmul, attention) are exact, without their bias. For the rest a table says how many operations
an element takes: round figures, because what these nodes cost is their traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .sizes import Tensor

if TYPE_CHECKING:
    import onnx

Tensors = Sequence[Tensor]
Attributes = Mapping[str, Any]


def convolution(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    """x, w [out, in / groups, *kernel]: each output is a sum over in / groups times the kernel."""
    return 2.0 * outs[0].numel * math.prod((ins[1].shape or ())[1:])


def qlinear_convolution(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    return convolution((ins[0], ins[3]), outs, attributes)


def transposed_convolution(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    """x, w [in, out / groups, *kernel]: each input goes to out / groups times the kernel."""
    return 2.0 * ins[0].numel * math.prod((ins[1].shape or ())[1:])


def matmul(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    return 2.0 * outs[0].numel * (ins[0].shape or (0,))[-1]


def gemm(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    return 2.0 * outs[0].numel * (ins[0].shape or (0, 0))[0 if attributes.get("transA") else 1]


def attention(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    """q k^T and the product with v; in 4D [batch, heads, tokens, head_dim] or 3D [batch, tokens, heads * head_dim],
    with fewer heads in k and v or as many, and with a past. Causal attention is counted whole, as torch does."""
    q, k, v = (t.shape or () for t in ins[:3])
    past = ins[4].shape if len(ins) > 4 and ins[4].shape else (0, 0, 0, 0)
    if len(q) == 4:
        batch, heads, tokens, depth = q
        keys, depth_v = k[2], v[3]
    else:
        heads, kv_heads = attributes["q_num_heads"], attributes["kv_num_heads"]
        batch, tokens, depth = q[0], q[1], q[2] // heads
        keys, depth_v = k[1], v[2] // kv_heads
    return 2.0 * batch * heads * tokens * (keys + past[2]) * (depth + depth_v)


def einsum(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    """One product over all letters of the equation."""
    letters: dict[str, int] = {}
    for term, tensor in zip(attributes["equation"].replace(" ", "").split("->")[0].split(","), ins, strict=False):
        letters |= dict(zip(term, tensor.shape or (), strict=False))
    return 2.0 * math.prod(letters.values())


def pool(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    return float(outs[0].numel * math.prod(attributes.get("kernel_shape", [1])))


def resize(ins: Tensors, outs: Tensors, attributes: Attributes) -> float:
    """Linear: two per axis that it interpolates; nearest copies."""
    taps = {"linear": 2, "cubic": 7}.get(attributes.get("mode", "nearest"), 0)
    axes = sum(a != b for a, b in zip(ins[0].shape or (), outs[0].shape or (), strict=False))
    return float(taps * axes * outs[0].numel)


def per_output(operations: int) -> Callable[[Tensors, Tensors, Attributes], float]:
    return lambda ins, outs, attributes: float(operations * outs[0].numel)


def per_input(operations: int) -> Callable[[Tensors, Tensors, Attributes], float]:
    return lambda ins, outs, attributes: float(operations * ins[0].numel)


Count = Callable[[Tensors, Tensors, Attributes], float]
Kind = str
COUNTS: dict[str, tuple[Kind, Count]] = {
    "Conv": ("convolution", convolution),
    "ConvInteger": ("convolution", convolution),
    "QLinearConv": ("convolution", qlinear_convolution),
    "ConvTranspose": ("convolution", transposed_convolution),
    "MatMul": ("matmul", matmul),
    "MatMulInteger": ("matmul", matmul),
    "QLinearMatMul": ("matmul", matmul),
    "Gemm": ("matmul", gemm),
    "Einsum": ("matmul", einsum),
    "Attention": ("attention", attention),
    "Resize": ("resize", resize),
    "Upsample": ("resize", resize),
    "RotaryEmbedding": ("elementwise", per_output(3)),
}
"""Operator -> kind of work and how it is counted. Kinds are the words of every breakdown."""

_MOVES = (
    "Transpose Concat Slice Split Gather GatherND GatherElements Pad Expand Tile DepthToSpace SpaceToDepth ScatterND "
    "ScatterElements Range ConstantOfShape EyeLike Trilu Compress NonZero OneHot ReverseSequence"
)
_VIEWS = "Reshape Squeeze Unsqueeze Flatten Identity Shape Size Constant Dropout"
_ONE = (
    "Add Sub Mul Div Neg Abs Min Max Relu LeakyRelu PRelu Clip Where Equal Less LessOrEqual Greater GreaterOrEqual And "
    "Or Not Xor Sqrt Reciprocal Floor Ceil Round Sign Mod Sum Cast CastLike IsNaN IsInf BitShift"
)
_MORE = "Sigmoid Tanh Exp Log Erf Gelu Softplus HardSigmoid HardSwish Swish Mish Elu Selu Celu Sin Cos Pow QuickGelu"
_TABLES: tuple[tuple[str, Kind, Count], ...] = (
    (_MOVES, "layout", per_output(0)),
    (_VIEWS, "view", per_output(0)),
    (_ONE, "elementwise", per_output(1)),
    (_MORE, "elementwise", per_output(4)),  # a handful of operations for an exponential
    ("LayerNormalization GroupNormalization InstanceNormalization BatchNormalization", "norm", per_input(7)),
    ("RMSNormalization LpNormalization MeanVarianceNormalization", "norm", per_input(4)),
    ("Softmax LogSoftmax", "softmax", per_input(5)),
    (
        "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare",
        "reduction",
        per_input(1),
    ),
    ("ReduceLogSumExp ArgMax ArgMin CumSum TopK", "reduction", per_input(1)),
    ("GlobalAveragePool GlobalMaxPool", "reduction", per_input(1)),
    ("AveragePool MaxPool LpPool", "reduction", pool),
    ("QuantizeLinear", "quantize", per_output(2)),
    ("DynamicQuantizeLinear", "quantize", per_input(4)),
    ("DequantizeLinear", "quantize", per_output(0)),  # folded into what reads it, see `work`
)
COUNTS |= {name: (kind, count) for names, kind, count in _TABLES for name in names.split()}

PRODUCTS = frozenset({"convolution", "matmul", "attention"})
"""Kinds that run at the peak of matrix units."""
CONSTANT_READS = frozenset({"Shape", "Size"})  # look at no data
PART_READS = frozenset({"Gather", "GatherND", "GatherElements", "Slice", "Split"})  # read what they write, no more


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def operations(op: str, ins: Tensors, outs: Tensors, attributes: Attributes) -> tuple[Kind, float | None]:
    """Kind and operations of a node; None where its shapes, or the operator, are not known."""
    if op not in COUNTS:
        return "other", None
    kind, count = COUNTS[op]
    needed = (*ins[: 3 if kind == "attention" else 2], *outs[:1]) if kind in PRODUCTS else (*ins[:1], *outs[:1])
    if count is not COUNTS["Reshape"][1] and any(t.shape is None for t in needed):
        return kind, 0.0 if kind in ("layout", "view") else None
    return kind, count(ins, outs, attributes)
