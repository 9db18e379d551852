"""One emitter per torch operator: `emitter(graph, out, *args, **kwargs)` appends ONNX nodes and gives the result.

`out` is what torch says of the result (size, type); tensors come as `Tensor`, sizes as int or sympy expressions.
Semantics are those of torch's documentation; where ONNX differs, a comment says how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from .translate import TYPES, Builder, Out, Size, Tensor, Untranslated

Emitter = Callable[..., Any]
TRUE_DIVISIONS = ("IntTrueDiv", "FloatTrueDiv", "TrueDiv")
INT64_MAX = 2**63 - 1
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# --- helpers ---------------------------------------------------------------------------------------------------------


def operand(g: Builder, x: Tensor | float | bool | sympy.Expr, dtype: torch.dtype) -> Any:
    """An operand of an element-wise operator in the type that it is computed in."""
    if isinstance(x, Tensor):
        return g.cast(x, dtype).value
    if isinstance(x, sympy.Expr) and not x.is_number:
        if type(x).__name__ in TRUE_DIVISIONS:
            parts = [operand(g, part, torch.float32) for part in x.args]
            value = g.op("Div", *parts, out=Out((), torch.float32))
            return value if dtype == torch.float32 else g.op("Cast", value, to=int(TYPES[dtype]), out=Out((), dtype))
        value = g.size_scalar(x)
        return value if dtype == torch.int64 else g.op("Cast", value, to=int(TYPES[dtype]), out=Out((), dtype))
    return g.scalar(float(x) if dtype in FLOATS else int(x) if dtype != torch.bool else bool(x), dtype)


def inexact(x: Any) -> bool:
    """A Python number that bf16 would change: torch computes with the number as it is and rounds only the result."""
    return isinstance(x, int | float) and float(torch.tensor(x, dtype=torch.bfloat16)) != x


def arithmetic(g: Builder, kind: str, out: Out, a: Any, b: Any) -> Any:
    """An element-wise operator in the result's type, or in fp32 inside where bf16 would change a number first."""
    dtype = torch.float32 if out.dtype == torch.bfloat16 and (inexact(a) or inexact(b)) else out.dtype
    value = g.op(kind, operand(g, a, dtype), operand(g, b, dtype), out=Out(out.shape, dtype))
    return value if dtype == out.dtype else g.cast(Tensor(g, out.shape, dtype, emitted=value), out.dtype)


def binary(kind: str) -> Emitter:
    return lambda g, out, a, b: arithmetic(g, kind, out, a, b)


def scaled(kind: str) -> Emitter:
    """`add` and `sub` with torch's `alpha`."""

    def emit(g: Builder, out: Out, a: Any, b: Any, alpha: float = 1) -> Any:
        if alpha == 1:
            return arithmetic(g, kind, out, a, b)
        right = g.op("Mul", operand(g, b, out.dtype), g.scalar(alpha, out.dtype))
        return g.op(kind, operand(g, a, out.dtype), right, out=out)

    return emit


def common_type(a: Any, b: Any) -> torch.dtype:
    """The type that torch compares or selects in."""
    sample = [torch.empty((1,) * x.rank, dtype=x.dtype) if isinstance(x, Tensor) else x for x in (a, b)]
    sample = [1 if isinstance(x, sympy.Expr) else x for x in sample]
    return torch.result_type(*sample)


def compare(kind: str, negate: bool = False) -> Emitter:
    def emit(g: Builder, out: Out, a: Any, b: Any) -> Any:
        dtype = common_type(a, b)
        dtype = torch.int32 if dtype == torch.bool and kind != "Equal" else dtype
        value = g.op(kind, operand(g, a, dtype), operand(g, b, dtype), out=out)
        return g.op("Not", value, out=out) if negate else value

    return emit


def unary(kind: str, **attributes: Any) -> Emitter:
    return lambda g, out, x, *_, **__: g.op(kind, g.cast(x, out.dtype).value, out=out, **attributes)


def same(g: Builder, out: Out, x: Any, *_: Any, **__: Any) -> Any:
    return x


def axis_of(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# --- element-wise ----------------------------------------------------------------------------------------------------


def divide(g: Builder, out: Out, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return arithmetic(g, "Div", out, a, b)
    value = g.op("Div", operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)
    if rounding_mode == "trunc" and out.dtype not in FLOATS:
        return value
    if out.dtype in FLOATS:
        return g.op({"floor": "Floor", "trunc": "Trunc"}.get(rounding_mode, "Floor"), value, out=out)
    # ONNX divides integers towards zero, floor goes down: the remainder's sign says by how much they differ
    rest = g.op("Mod", operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)
    return g.op("Div", g.op("Sub", operand(g, a, out.dtype), rest, out=out), operand(g, b, out.dtype), out=out)


def power(g: Builder, out: Out, a: Any, b: Any) -> Any:
    if b == 2 and isinstance(a, Tensor):
        value = g.cast(a, out.dtype).value
        return g.op("Mul", value, value, out=out)
    return g.op("Pow", operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)


def rsqrt(g: Builder, out: Out, x: Tensor) -> Any:
    return g.op("Reciprocal", g.op("Sqrt", g.cast(x, out.dtype).value, out=out), out=out)


def square(g: Builder, out: Out, x: Tensor) -> Any:
    return g.op("Mul", x.value, x.value, out=out)


def clamp(g: Builder, out: Out, x: Tensor, min: Any = None, max: Any = None) -> Any:
    low = None if min is None else operand(g, min, out.dtype)
    high = None if max is None else operand(g, max, out.dtype)
    return g.op("Clip", g.cast(x, out.dtype).value, low, high, out=out)


def clamp_between(g: Builder, out: Out, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Any:
    """Bounds that are tensors of any size: Clip takes scalars only."""
    value = g.cast(x, out.dtype).value
    for kind, limit in (("Max", low), ("Min", high)):
        value = value if limit is None else g.op(kind, value, operand(g, limit, out.dtype), out=out)
    return value


def where(g: Builder, out: Out, condition: Tensor, a: Any, b: Any) -> Any:
    return g.op("Where", g.cast(condition, torch.bool).value, operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)


def masked_fill(g: Builder, out: Out, x: Tensor, mask: Tensor, value: Any) -> Any:
    return where(g, out, mask, value, x)


def logical(kind: str, bitwise: str | None = None) -> Emitter:
    def emit(g: Builder, out: Out, a: Any, b: Any) -> Any:
        name = bitwise if bitwise and out.dtype != torch.bool else kind
        return g.op(name, operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)

    return emit


def logical_not(g: Builder, out: Out, x: Tensor) -> Any:
    if out.dtype != torch.bool:
        return g.op("BitwiseNot", x.value, out=out)
    return g.op("Not", g.cast(x, torch.bool).value, out=out)


def convert(g: Builder, out: Out, x: Tensor, *_: Any, **__: Any) -> Any:
    return g.cast(x, out.dtype)


# --- reductions ------------------------------------------------------------------------------------------------------


def reduce(kind: str) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        dims = [dim] if isinstance(dim, int) else list(dim or range(x.rank))
        logic = out.dtype == torch.bool
        value = g.cast(x, torch.int32 if logic else out.dtype).value
        result = g.op(kind, value, g.ints(*(axis_of(d, x.rank) for d in dims)), keepdims=int(keepdim),
                      out=Out(out.shape, torch.int32 if logic else out.dtype))
        return g.op("Cast", result, to=int(TYPES[torch.bool]), out=out) if logic else result

    return emit


def extreme_with_index(kind: str, arg: str) -> Emitter:
    def emit(g: Builder, out: Any, x: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
        return (g.op(kind, x.value, g.ints(axis_of(dim, x.rank)), keepdims=int(keepdim), out=out[0]),
                g.op(arg, x.value, axis=axis_of(dim, x.rank), keepdims=int(keepdim), out=out[1]))

    return emit


def arg_extreme(kind: str) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        x = g.cast(x, torch.int32) if x.dtype == torch.bool else x
        if dim is None:
            flat = g.op("Reshape", x.value, g.ints(-1))
            return g.op(kind, flat, axis=0, keepdims=0, out=out)
        return g.op(kind, x.value, axis=axis_of(dim, x.rank), keepdims=int(keepdim), out=out)

    return emit


def cumsum(g: Builder, out: Out, x: Tensor, dim: int, **_: Any) -> Any:
    return g.op("CumSum", g.cast(x, out.dtype).value, g.scalar(axis_of(dim, x.rank), torch.int64), out=out)


def vector_norm(g: Builder, out: Out, x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    if ord not in (1, 2):
        raise Untranslated({f"linalg_vector_norm of order {ord}"})
    return reduce(f"ReduceL{int(ord)}")(g, out, x, dim, keepdim)


# --- shape -----------------------------------------------------------------------------------------------------------


def reshape(g: Builder, out: Out, x: Tensor, *_: Any, **__: Any) -> Any:
    return x if x.shape == out.shape else g.reshape(x.value, x.shape, out)


def squeeze_dim(g: Builder, out: Out, x: Tensor, dim: Any) -> Any:
    """A size that is not fixed at one stays, as it does in torch: the result's rank says which happened."""
    if len(out.shape) == x.rank:
        return x
    dims = [dim] if isinstance(dim, int) else list(dim)
    gone = [axis_of(d, x.rank) for d in dims if x.shape[axis_of(d, x.rank)] == 1]
    return g.op("Squeeze", x.value, g.ints(*gone), out=out)


def unsqueeze(g: Builder, out: Out, x: Tensor, dim: int) -> Any:
    return g.op("Unsqueeze", x.value, g.ints(axis_of(dim, x.rank + 1)), out=out)


def transpose(g: Builder, out: Out, x: Tensor, a: int = 0, b: int = 1) -> Any:
    perm = list(range(x.rank))
    if x.rank > 1:
        a, b = axis_of(a, x.rank), axis_of(b, x.rank)
        perm[a], perm[b] = perm[b], perm[a]
    return permute(g, out, x, perm)


def permute(g: Builder, out: Out, x: Tensor, dims: Sequence[int]) -> Any:
    perm = [axis_of(d, x.rank) for d in dims]
    return x if perm == sorted(perm) else g.op("Transpose", x.value, perm=perm, out=out)


def expand(g: Builder, out: Out, x: Tensor, *_: Any, **__: Any) -> Any:
    if x.shape == out.shape:
        return x
    # Expand broadcasts both ways: a size that stays is 1 here, so that only real growth is computed
    lead = len(out.shape) - x.rank
    target: list[Size] = [1 if i >= lead and x.shape[i - lead] == d else d for i, d in enumerate(out.shape)]
    return g.op("Expand", x.value, g.shape_value(target), out=out)


def cat(g: Builder, out: Out, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    parts = [t for t in tensors if t.shape != (0,)]
    if len(parts) == 1:
        return g.cast(parts[0], out.dtype)
    return g.op("Concat", *(g.cast(t, out.dtype).value for t in parts), axis=axis_of(dim, len(out.shape)), out=out)


def stack(g: Builder, out: Out, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    axis = axis_of(dim, len(out.shape))
    raised = [g.op("Unsqueeze", g.cast(t, out.dtype).value, g.ints(axis)) for t in tensors]
    return g.op("Concat", *raised, axis=axis, out=out)


def split(g: Builder, out: tuple[Out, ...], x: Tensor, _: Any, dim: int = 0) -> Any:
    axis = axis_of(dim, x.rank)
    if len(out) == 1:
        return (x,)
    sizes = g.shape_value([o.shape[axis] for o in out])
    return g.op("Split", x.value, sizes, axis=axis, outputs=len(out))


def unbind(g: Builder, out: tuple[Out, ...], x: Tensor, dim: int = 0) -> Any:
    return tuple(select(g, o, x, dim, i) for i, o in enumerate(out))


def bound(g: Builder, x: Any, default: int) -> Any:
    if x is None:
        return g.ints(default)
    return g.ints(min(int(x), INT64_MAX)) if isinstance(x, int) else g.size(x)


def slice_(g: Builder, out: Out, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    axis = axis_of(dim, x.rank)
    if out.shape == x.shape and step == 1:
        return x
    return g.op("Slice", x.value, bound(g, start, 0), bound(g, end, INT64_MAX), g.ints(axis), g.ints(step), out=out)


def select(g: Builder, out: Out, x: Tensor, dim: int, index: Any) -> Any:
    position = g.scalar(index, torch.int64) if isinstance(index, int) else g.size_scalar(index)
    return g.op("Gather", x.value, position, axis=axis_of(dim, x.rank), out=out)


def index_select(g: Builder, out: Out, x: Tensor, dim: int, index: Tensor) -> Any:
    return g.op("Gather", x.value, index.value, axis=axis_of(dim, x.rank), out=out)


def gather(g: Builder, out: Out, x: Tensor, dim: int, index: Tensor, **_: Any) -> Any:
    return g.op("GatherElements", x.value, index.value, axis=axis_of(dim, x.rank), out=out)


def index(g: Builder, out: Out, x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """Integer indexing: one index is a Gather, several on leading dimensions a GatherND of them broadcast together."""
    given = [(i, t) for i, t in enumerate(indices) if t is not None]
    if any(t.dtype == torch.bool for _, t in given):
        raise Untranslated({"index with a boolean mask (its result's size depends on data)"})
    if len(given) == 1:
        return g.op("Gather", x.value, given[0][1].value, axis=given[0][0], out=out)
    if [i for i, _ in given] != list(range(len(given))):
        raise Untranslated({"index on dimensions that do not lead"})
    shape = out.shape[: len(out.shape) - (x.rank - len(given))]
    columns = []
    for _, t in given:
        wide = expand(g, Out(shape, torch.int64), g.cast(t, torch.int64))
        wide = wide.value if isinstance(wide, Tensor) else wide
        columns.append(g.op("Unsqueeze", wide, g.ints(-1)))
    return g.op("GatherND", x.value, g.op("Concat", *columns, axis=-1), out=out)


def embedding(g: Builder, out: Out, weight: Tensor, ids: Tensor, *_: Any, **__: Any) -> Any:
    return g.op("Gather", weight.value, ids.value, axis=0, out=out)


def repeat(g: Builder, out: Out, x: Tensor, repeats: Sequence[Size]) -> Any:
    lead = len(repeats) - x.rank
    raised = g.reshape(x.value, x.shape, Out((1,) * lead + x.shape, x.dtype)) if lead else x.value
    return g.op("Tile", raised, g.shape_value(repeats), out=out)


def repeat_interleave(g: Builder, out: Out, x: Tensor, repeats: Size, dim: int | None = None, **_: Any) -> Any:
    if dim is None:
        raise Untranslated({"repeat_interleave without a dimension"})
    axis = axis_of(dim, x.rank)
    raised = g.op("Unsqueeze", x.value, g.ints(axis + 1))
    wide = g.op("Expand", raised, g.shape_value([1] * (axis + 1) + [repeats] + [1] * (x.rank - axis - 1)))
    return g.reshape(wide, (), out)


def flip(g: Builder, out: Out, x: Tensor, dims: Sequence[int]) -> Any:
    axes = [axis_of(d, x.rank) for d in dims]
    n = len(axes)
    return g.op("Slice", x.value, g.ints(*[-1] * n), g.ints(*[-INT64_MAX] * n), g.ints(*axes), g.ints(*[-1] * n), out=out)


def roll(g: Builder, out: Out, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    value = x.value
    for shift, dim in zip(shifts, dims, strict=True):
        axis = g.ints(axis_of(dim, x.rank))
        tail = g.op("Slice", value, g.ints(-shift), g.ints(INT64_MAX), axis)
        head = g.op("Slice", value, g.ints(0), g.ints(-shift), axis)
        value = g.op("Concat", tail, head, axis=axis_of(dim, x.rank), out=out)
    return value


def pad(g: Builder, out: Out, x: Tensor, pads: Sequence[Size], mode: str = "constant", value: float | None = None) -> Any:
    """torch lists pads from the last dimension, before and after in pairs; ONNX all befores, then all afters."""
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    pairs = [(0, 0)] * (x.rank - len(pairs)) + pairs[::-1]
    sizes = g.shape_value([p[0] for p in pairs] + [p[1] for p in pairs])
    fill = g.scalar(value or 0, x.dtype) if mode == "constant" else None
    kind = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    return g.op("Pad", x.value, sizes, fill, mode=kind, out=out)


def triangle(upper: int) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, diagonal: int = 0) -> Any:
        logic = x.dtype == torch.bool
        value = g.cast(x, torch.int32).value if logic else x.value
        value = g.op("Trilu", value, g.scalar(diagonal, torch.int64), upper=upper)
        return g.op("Cast", value, to=int(TYPES[torch.bool]), out=out) if logic else value

    return emit


def meshgrid(g: Builder, out: tuple[Out, ...], tensors: Sequence[Tensor], indexing: str = "ij") -> Any:
    results = []
    for i, (t, o) in enumerate(zip(tensors, out, strict=True)):
        place = i if indexing == "ij" or i > 1 else 1 - i
        shape: list[Size] = [t.shape[0] if j == place else 1 for j in range(len(out))]
        column = g.fixed(t.constant.reshape(*shape)) if t.constant is not None else Tensor(
            g, tuple(shape), t.dtype, emitted=g.reshape(t.value, t.shape, Out(tuple(shape), t.dtype)))
        results.append(expand(g, o, column))
    return tuple(results)


# --- creation --------------------------------------------------------------------------------------------------------


def filled(g: Builder, out: Out, number: Any) -> Any:
    if all(isinstance(d, int) for d in out.shape) and not isinstance(number, sympy.Expr):
        return g.fixed(torch.full([int(d) for d in out.shape], number, dtype=out.dtype))
    return g.op("Expand", operand(g, number, out.dtype), g.shape_value(out.shape), out=out)


def constant_fill(number: float) -> Emitter:
    return lambda g, out, *_, **__: filled(g, out, number)


def full(g: Builder, out: Out, _: Any, number: Any, **__: Any) -> Any:
    return filled(g, out, number)


def arange(g: Builder, out: Out, *args: Any, start: Any = 0, step: Any = 1, **_: Any) -> Any:
    """arange(end), arange(start, end), arange(start, end, step): integers are counted, floats cast afterwards."""
    low, end, by = ((start, args[0], step), (*args[:2], step), args[:3])[len(args) - 1]
    whole = all(not isinstance(v, float) for v in (low, end, by))
    dtype = torch.int64 if whole else out.dtype
    value = g.op("Range", *(operand(g, v, dtype) for v in (low, end, by)), out=Out(out.shape, dtype))
    return g.cast(Tensor(g, out.shape, dtype, emitted=value), out.dtype)


# --- linear algebra and convolution ----------------------------------------------------------------------------------


def matmul(g: Builder, out: Out, a: Tensor, b: Tensor) -> Any:
    return g.op("MatMul", g.cast(a, out.dtype).value, g.cast(b, out.dtype).value, out=out)


def addmm(g: Builder, out: Out, bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
    return g.op("Gemm", a.value, b.value, bias.value, alpha=float(alpha), beta=float(beta), out=out)


def baddbmm(g: Builder, out: Out, bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
    value = g.op("MatMul", a.value, b.value, out=out)
    if alpha != 1:
        value = g.op("Mul", value, g.scalar(alpha, out.dtype), out=out)
    if beta == 0:
        return value
    extra = bias.value if beta == 1 else g.op("Mul", bias.value, g.scalar(beta, out.dtype))
    return g.op("Add", value, extra, out=out)


def linear(g: Builder, out: Out, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Gemm for two dimensions, MatMul with a transposed weight (folded into the stored one) and Add for more."""
    x = g.cast(x, weight.dtype)
    if x.rank == 2:
        inputs = [x.value, weight.value] + ([bias.value] if bias else [])
        return g.op("Gemm", *inputs, transB=1, out=out)
    turned = g.op("Transpose", weight.value, perm=[1, 0], out=Out(weight.shape[::-1], weight.dtype))
    value = g.op("MatMul", x.value, turned, out=out)
    return g.op("Add", value, bias.value, out=out) if bias else value


def convolution(g: Builder, out: Out, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    n = x.rank - 2
    many = lambda v: [v] * n if isinstance(v, int) else list(v) * (n // len(v))  # noqa: E731
    attributes: dict[str, Any] = {"strides": many(stride), "dilations": many(dilation), "group": groups,
                                  "kernel_shape": [int(d) for d in weight.shape[2:]]}
    if isinstance(padding, str):
        attributes["auto_pad"] = "VALID" if padding == "valid" else "SAME_UPPER"
    else:
        attributes["pads"] = many(padding) * 2
    inputs = [x.value, weight.value] + ([bias.value] if bias else [])
    return g.op("Conv", *inputs, out=out, **attributes)


def conv_transpose(g: Builder, out: Out, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                   padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:
    n = x.rank - 2
    many = lambda v: [v] * n if isinstance(v, int) else list(v) * (n // len(v))  # noqa: E731
    inputs = [x.value, weight.value] + ([bias.value] if bias else [])
    return g.op("ConvTranspose", *inputs, strides=many(stride), pads=many(padding) * 2, dilations=many(dilation),
                output_padding=many(output_padding), group=groups, kernel_shape=[int(d) for d in weight.shape[2:]], out=out)


def pool(kind: str) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, *rest: Any, **kw: Any) -> Any:
        many = lambda v: [v, v] if isinstance(v, int) else list(v) * (2 // len(v))  # noqa: E731
        extra: dict[str, Any] = {}
        if kind == "AveragePool":
            ceil, count = (*rest, *(False, True)[len(rest):])[:2]
            extra = {"count_include_pad": int(kw.get("count_include_pad", count))}
        else:
            dilation, ceil = (*rest, *(1, False)[len(rest):])[:2]
            extra = {"dilations": many(kw.get("dilation", dilation))}
        return g.op(kind, x.value, kernel_shape=many(kernel), strides=many(stride or kernel), pads=many(padding) * 2,
                    ceil_mode=int(kw.get("ceil_mode", ceil)), out=out, **extra)

    return emit


def adaptive_pool(g: Builder, out: Out, x: Tensor, size: Sequence[int]) -> Any:
    if list(size) != [1, 1]:
        raise Untranslated({f"adaptive_avg_pool2d to {list(size)}"})
    return g.op("GlobalAveragePool", x.value, out=out)


def einsum(g: Builder, out: Out, equation: str, tensors: Sequence[Tensor], **_: Any) -> Any:
    """A permutation of one tensor is a Transpose. ONNX has no Einsum in bf16: there it is computed in fp32."""
    left, _, right = equation.replace(" ", "").partition("->")
    if len(tensors) == 1 and "." not in equation and len(set(left)) == len(left) and sorted(left) == sorted(right):
        return permute(g, out, g.cast(tensors[0], out.dtype), [left.index(c) for c in right])
    dtype = torch.float32 if out.dtype == torch.bfloat16 else out.dtype
    value = g.op("Einsum", *(g.cast(t, dtype).value for t in tensors), equation=equation, out=Out(out.shape, dtype))
    return g.cast(Tensor(g, out.shape, dtype, emitted=value), out.dtype)


def outer(g: Builder, out: Out, a: Tensor, b: Tensor) -> Any:
    column = g.op("Unsqueeze", g.cast(a, out.dtype).value, g.ints(1))
    return g.op("Mul", column, g.cast(b, out.dtype).value, out=out)


def pixel_shuffle(g: Builder, out: Out, x: Tensor, factor: int) -> Any:
    return g.op("DepthToSpace", x.value, blocksize=factor, mode="CRD", out=out)


# --- leaves ----------------------------------------------------------------------------------------------------------


def attention(g: Builder, out: Out, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
              scale: float | None) -> Any:
    """Vaswani et al. 2017, section 3.2.1; `[batch, heads, tokens, head_dim]`. One Attention node from opset 23 on."""
    if mask is not None and mask.dtype != torch.bool:
        mask = g.cast(mask, q.dtype)
    if g.opset >= 23:
        if mask is not None and mask.shape[-2:] != (q.shape[-2], k.shape[-2]):
            # the standard lets the last two sizes broadcast, ONNX Runtime wants them whole
            full = Out((*mask.shape[:-2], q.shape[-2], k.shape[-2]), mask.dtype)
            wide = expand(g, full, mask)
            mask = wide if isinstance(wide, Tensor) else Tensor(g, full.shape, full.dtype, emitted=wide)
        return g.op("Attention", q.value, k.value, v.value, mask.value if mask else None, is_causal=int(causal) or None,
                    scale=scale, out=out)
    return decomposed_attention(g, out, q, k, v, mask, causal, scale)


def decomposed_attention(g: Builder, out: Out, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
                         scale: float | None) -> Any:
    dim = int(q.shape[-1])
    root = math.sqrt(scale if scale is not None else 1 / math.sqrt(dim))  # on both sides: fp16 products stay small
    keys, values = (many_heads(g, t, q) for t in (k, v))
    turned = g.op("Transpose", keys, perm=[0, 1, 3, 2])
    left = g.op("Mul", q.value, g.scalar(root, q.dtype))
    right = g.op("Mul", turned, g.scalar(root, q.dtype))
    shape = (*q.shape[:-1], k.shape[-2])
    scores = g.op("MatMul", left, right, out=Out(shape, q.dtype))
    if causal:
        ones = filled(g, Out((q.shape[-2], k.shape[-2]), torch.int32), 1)
        lower = g.op("Trilu", ones.value if isinstance(ones, Tensor) else ones, upper=0)
        mask = Tensor(g, (q.shape[-2], k.shape[-2]), torch.bool, emitted=g.op("Cast", lower, to=int(TYPES[torch.bool])))
    if mask is not None and mask.dtype == torch.bool:
        scores = g.op("Where", mask.value, scores, g.scalar(torch.finfo(q.dtype).min, q.dtype), out=Out(shape, q.dtype))
    elif mask is not None:
        scores = g.op("Add", scores, mask.value, out=Out(shape, q.dtype))
    weights = g.op("Softmax", scores, axis=-1, out=Out(shape, q.dtype))
    return g.op("MatMul", weights, values, out=out)


def many_heads(g: Builder, t: Tensor, q: Tensor) -> Any:
    """Keys and values of grouped heads, one for each query head."""
    heads, groups = q.shape[1], t.shape[1]
    if heads == groups:
        return t.value
    times = int(heads) // int(groups)
    wide = g.op("Expand", g.op("Unsqueeze", t.value, g.ints(2)), g.ints(1, 1, times, 1, 1))
    return g.reshape(wide, (), Out((t.shape[0], heads, *t.shape[2:]), t.dtype))


def group_norm(g: Builder, out: Out, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """Wu and He 2018. The standard node from opset 21 on; before, InstanceNormalization over the groups."""
    channels = int(x.shape[1])
    scale = weight.value if weight else g.constant(torch.ones(channels, dtype=x.dtype))
    shift = bias.value if bias else g.constant(torch.zeros(channels, dtype=x.dtype))
    if g.opset >= 21:
        return g.op("GroupNormalization", x.value, scale, shift, epsilon=eps, num_groups=groups, out=out)
    flat = g.op("Reshape", x.value, g.ints(0, groups, -1))
    unit, zero = (g.constant(torch.full((groups,), n, dtype=x.dtype)) for n in (1.0, 0.0))
    normed = g.op("InstanceNormalization", flat, unit, zero, epsilon=eps)
    normed = g.op("Reshape", normed, g.op("Shape", x.value), out=out)
    axes = g.ints(*range(1, x.rank - 1))
    grown = [g.op("Unsqueeze", t, axes) for t in (scale, shift)]
    return g.op("Add", g.op("Mul", normed, grown[0], out=out), grown[1], out=out)


def layer_norm(g: Builder, out: Out, x: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    shape = [int(d) for d in x.shape[-dims:]]
    scale = g.cast(weight, x.dtype).value if weight else g.constant(torch.ones(shape, dtype=x.dtype))
    return g.op("LayerNormalization", x.value, scale, g.cast(bias, x.dtype).value if bias else None, axis=-dims,
                epsilon=eps, out=out)


def rms_norm(g: Builder, out: Out, x: Tensor, dims: int, weight: Tensor | None, eps: float | None) -> Any:
    """Zhang and Sennrich 2019."""
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    shape = [int(d) for d in x.shape[-dims:]]
    scale = g.cast(weight, x.dtype).value if weight else g.constant(torch.ones(shape, dtype=x.dtype))
    if g.opset >= 23:
        return g.op("RMSNormalization", x.value, scale, axis=-dims, epsilon=epsilon, out=out)
    wide = g.cast(x, torch.float32)
    mean = g.op("ReduceMean", g.op("Mul", wide.value, wide.value), g.ints(*range(-dims, 0)), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.scalar(epsilon, torch.float32)))
    normed = Tensor(g, x.shape, torch.float32, emitted=g.op("Div", wide.value, root))
    return g.op("Mul", g.cast(normed, x.dtype).value, scale, out=out)


def activation(g: Builder, out: Out, x: Tensor, kind: str) -> Any:
    if kind == "silu":
        return g.op("Mul", x.value, g.op("Sigmoid", x.value, out=out), out=out)
    if kind == "relu":
        return g.op("Relu", x.value, out=out)
    if g.opset >= 20:
        return g.op("Gelu", x.value, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)
    number = lambda v: g.scalar(v, x.dtype)  # noqa: E731
    if kind == "gelu_tanh":  # Hendrycks and Gimpel 2016, section 2
        cube = g.op("Mul", g.op("Mul", x.value, x.value), x.value)
        inner = g.op("Mul", g.op("Add", x.value, g.op("Mul", cube, number(0.044715))), number(math.sqrt(2 / math.pi)))
        gate = g.op("Add", g.op("Tanh", inner), number(1))
    else:
        gate = g.op("Add", g.op("Erf", g.op("Mul", x.value, number(1 / math.sqrt(2)))), number(1))
    return g.op("Mul", g.op("Mul", x.value, gate), number(0.5), out=out)


def softmax(g: Builder, out: Out, x: Tensor, dim: int, *_: Any) -> Any:
    return g.op("Softmax", g.cast(x, out.dtype).value, axis=axis_of(dim, x.rank), out=out)


def resize(g: Builder, out: Out, x: Tensor, height: Any, width: Any, mode: str, align: bool, scales: Sequence[float]) -> Any:
    """Keys' cubic uses a = -0.75, as torch; nearest takes the floor of unshifted coordinates, as torch's does."""
    attributes: dict[str, Any] = {"mode": {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}[mode]}
    attributes["coordinate_transformation_mode"] = (
        "asymmetric" if mode == "nearest" else "align_corners" if align else "half_pixel" if mode == "bicubic"
        else "pytorch_half_pixel")
    if mode == "nearest":
        attributes["nearest_mode"] = "floor"
    if mode == "bicubic":
        attributes["cubic_coeff_a"] = -0.75
    if scales:
        return g.op("Resize", x.value, None, g.constant(torch.tensor([1.0, 1.0, *scales])), out=out, **attributes)
    sizes = g.shape_value([x.shape[0], x.shape[1], height, width])
    return g.op("Resize", x.value, None, None, sizes, out=out, **attributes)


def upsample(mode: str) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        align = bool(args[1]) if mode != "nearest" and len(args) > 1 and isinstance(args[1], bool) else False
        return resize(g, out, x, out.shape[2], out.shape[3], mode, align, ())

    return emit


def hard_sigmoid(g: Builder, out: Out, x: Tensor) -> Any:
    return g.op("HardSigmoid", x.value, alpha=1 / 6, beta=0.5, out=out)


def leaky_relu(g: Builder, out: Out, x: Tensor, slope: float = 0.01) -> Any:
    return g.op("LeakyRelu", x.value, alpha=float(slope), out=out)


def elu(g: Builder, out: Out, x: Tensor, alpha: float = 1, *_: Any) -> Any:
    return g.op("Elu", x.value, alpha=float(alpha), out=out)


def aten_layer_norm(g: Builder, out: Out, x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None,
                    eps: float = 1e-5, *_: Any) -> Any:
    return layer_norm(g, out, x, len(shape), weight, bias, eps)


def aten_group_norm(g: Builder, out: Out, x: Tensor, groups: int, weight: Any = None, bias: Any = None,
                    eps: float = 1e-5, *_: Any) -> Any:
    return group_norm(g, out, x, groups, weight, bias, eps)


def batch_norm(g: Builder, out: Out, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool,
               momentum: float, eps: float, *_: Any) -> Any:
    channels = int(x.shape[1])
    ones, zeros = torch.ones(channels, dtype=x.dtype), torch.zeros(channels, dtype=x.dtype)
    scale = weight.value if weight else g.constant(ones)
    shift = bias.value if bias else g.constant(zeros)
    return g.op("BatchNormalization", x.value, scale, shift, mean.value, var.value, epsilon=eps, out=out)


def sdpa(g: Builder, out: Out, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0,
         causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Any:
    return attention(g, out, q, k, v, mask, causal, scale)


def by_overload(emitter: Emitter, *names: str) -> dict[str, Emitter]:
    return dict.fromkeys(names, emitter)


EMITTERS: Mapping[str, Emitter] = {
    "optimize.attention.default": attention,
    "optimize.group_norm.default": group_norm,
    "optimize.layer_norm.default": layer_norm,
    "optimize.rms_norm.default": rms_norm,
    "optimize.activation.default": activation,
    "optimize.softmax.default": softmax,
    "optimize.linear.default": linear,
    "optimize.resize.default": resize,
    "aten.scaled_dot_product_attention.default": sdpa,
    "aten.layer_norm.default": aten_layer_norm,
    "aten.group_norm.default": aten_group_norm,
    "aten.batch_norm.default": batch_norm,
    **by_overload(scaled("Add"), "aten.add.Tensor", "aten.add.Scalar", "aten.add_.Tensor", "aten.add_.Scalar"),
    **by_overload(scaled("Sub"), "aten.sub.Tensor", "aten.sub.Scalar", "aten.sub_.Tensor"),
    **by_overload(binary("Mul"), "aten.mul.Tensor", "aten.mul.Scalar", "aten.mul_.Tensor", "aten.mul_.Scalar"),
    **by_overload(divide, "aten.div.Tensor", "aten.div.Scalar", "aten.div_.Tensor", "aten.div_.Scalar",
                  "aten.div.Tensor_mode", "aten.div.Scalar_mode"),
    **by_overload(lambda g, out, a, b: divide(g, out, a, b, "floor"), "aten.floor_divide.default"),
    **by_overload(lambda g, out, a, b, alpha=1: scaled("Sub")(g, out, b, a, alpha), "aten.rsub.Scalar", "aten.rsub.Tensor"),
    **by_overload(binary("Mod"), "aten.remainder.Tensor", "aten.remainder.Scalar"),
    **by_overload(power, "aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar"),
    **by_overload(binary("Max"), "aten.maximum.default", "aten.max.other"),
    **by_overload(binary("Min"), "aten.minimum.default", "aten.min.other"),
    **by_overload(compare("Equal"), "aten.eq.Tensor", "aten.eq.Scalar"),
    **by_overload(compare("Equal", negate=True), "aten.ne.Tensor", "aten.ne.Scalar"),
    **by_overload(compare("Less"), "aten.lt.Tensor", "aten.lt.Scalar"),
    **by_overload(compare("Greater"), "aten.gt.Tensor", "aten.gt.Scalar"),
    **by_overload(compare("LessOrEqual"), "aten.le.Tensor", "aten.le.Scalar"),
    **by_overload(compare("GreaterOrEqual"), "aten.ge.Tensor", "aten.ge.Scalar"),
    **by_overload(logical("And", "BitwiseAnd"), "aten.__and__.Tensor", "aten.bitwise_and.Tensor", "aten.logical_and.default"),
    **by_overload(logical("Or", "BitwiseOr"), "aten.__or__.Tensor", "aten.bitwise_or.Tensor", "aten.logical_or.default"),
    **by_overload(logical("Xor", "BitwiseXor"), "aten.bitwise_xor.Tensor", "aten.logical_xor.default"),
    **by_overload(logical_not, "aten.logical_not.default", "aten.bitwise_not.default"),
    **by_overload(where, "aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar"),
    **by_overload(masked_fill, "aten.masked_fill.Scalar", "aten.masked_fill.Tensor"),
    **by_overload(clamp, "aten.clamp.default", "aten.clamp_min.default", "aten.hardtanh.default", "aten.clip.default"),
    **by_overload(clamp_between, "aten.clamp.Tensor", "aten.clip.Tensor"),
    **by_overload(lambda g, out, x, most: clamp(g, out, x, None, most), "aten.clamp_max.default"),
    **{f"aten.{name}.default": unary(kind) for name, kind in {
        "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "tanh": "Tanh", "sqrt": "Sqrt",
        "abs": "Abs", "neg": "Neg", "reciprocal": "Reciprocal", "sigmoid": "Sigmoid", "erf": "Erf", "floor": "Floor",
        "ceil": "Ceil", "round": "Round", "sign": "Sign", "softplus": "Softplus",
        "relu": "Relu", "atan": "Atan", "mish": "Mish",
    }.items()},
    **by_overload(lambda g, out, x: g.op("IsNaN", x.value, out=out), "aten.isnan.default"),
    **by_overload(lambda g, out, x: g.op("IsInf", x.value, out=out), "aten.isinf.default"),
    **by_overload(lambda g, out, x: activation(g, out, x, "silu"), "aten.silu.default"),
    **by_overload(lambda g, out, x, approximate="none": activation(
        g, out, x, "gelu" if approximate == "none" else "gelu_tanh"), "aten.gelu.default"),
    **by_overload(hard_sigmoid, "aten.hardsigmoid.default"),
    **by_overload(leaky_relu, "aten.leaky_relu.default"),
    **by_overload(elu, "aten.elu.default"),
    "aten.rsqrt.default": rsqrt,
    "aten.square.default": square,
    **by_overload(convert, "aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten._to_copy.default",
                  "aten.type_as.default", "aten.to.other", "aten.float.default"),
    **by_overload(same, "aten.dropout.default", "aten.contiguous.default", "aten.clone.default", "aten.detach.default",
                  "aten.detach_.default", "aten.alias.default", "aten.lift_fresh_copy.default", "aten.feature_dropout.default"),
    **by_overload(reduce("ReduceMean"), "aten.mean.dim", "aten.mean.default"),
    **by_overload(reduce("ReduceSum"), "aten.sum.dim_IntList", "aten.sum.default"),
    **by_overload(reduce("ReduceMax"), "aten.amax.default", "aten.any.dim", "aten.any.default", "aten.any.dims",
                  "aten.max.default"),
    **by_overload(reduce("ReduceMin"), "aten.amin.default", "aten.all.dim", "aten.all.default", "aten.min.default"),
    "aten.max.dim": extreme_with_index("ReduceMax", "ArgMax"),
    "aten.min.dim": extreme_with_index("ReduceMin", "ArgMin"),
    "aten.argmax.default": arg_extreme("ArgMax"),
    "aten.argmin.default": arg_extreme("ArgMin"),
    "aten.cumsum.default": cumsum,
    "aten.linalg_vector_norm.default": vector_norm,
    **by_overload(softmax, "aten.softmax.int", "aten._softmax.default"),
    **by_overload(reshape, "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
                  "aten.flatten.using_ints", "aten.unflatten.int", "aten.squeeze.default", "aten.view_as.default",
                  "aten.reshape_as.default"),
    **by_overload(squeeze_dim, "aten.squeeze.dim", "aten.squeeze.dims"),
    "aten.unsqueeze.default": unsqueeze,
    **by_overload(transpose, "aten.transpose.int", "aten.t.default", "aten.swapaxes.default"),
    **by_overload(lambda g, out, x: transpose(g, out, x, -1, -2), "aten.mT.default"),
    **by_overload(permute, "aten.permute.default"),
    **by_overload(expand, "aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default"),
    **by_overload(cat, "aten.cat.default", "aten.concat.default", "aten.concatenate.default"),
    "aten.stack.default": stack,
    **by_overload(split, "aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes", "aten.chunk.default",
                  "aten.tensor_split.sections"),
    "aten.unbind.int": unbind,
    "aten.slice.Tensor": slice_,
    "aten.narrow.default": lambda g, out, x, dim, start, length: slice_(g, out, x, dim, start, start + length),
    "aten.select.int": select,
    "aten.index_select.default": index_select,
    "aten.gather.default": gather,
    "aten.index.Tensor": index,
    "aten.embedding.default": embedding,
    "aten.repeat.default": repeat,
    **by_overload(repeat, "aten.tile.default"),
    "aten.repeat_interleave.self_int": repeat_interleave,
    "aten.flip.default": flip,
    "aten.roll.default": roll,
    **by_overload(pad, "aten.pad.default"),
    "aten.constant_pad_nd.default": lambda g, out, x, pads, value=0: pad(g, out, x, pads, "constant", value),
    "aten.triu.default": triangle(1),
    "aten.tril.default": triangle(0),
    **by_overload(meshgrid, "aten.meshgrid.indexing", "aten.meshgrid.default"),
    **by_overload(constant_fill(1), "aten.ones.default", "aten.new_ones.default", "aten.ones_like.default"),
    **by_overload(constant_fill(0), "aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default"),
    **by_overload(full, "aten.full.default", "aten.new_full.default", "aten.full_like.default"),
    "aten.scalar_tensor.default": lambda g, out, number, **_: filled(g, out, number),
    **by_overload(arange, "aten.arange.default", "aten.arange.start", "aten.arange.start_step"),
    **by_overload(matmul, "aten.matmul.default", "aten.bmm.default", "aten.mm.default"),
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": baddbmm,
    "aten.linear.default": linear,
    **by_overload(convolution, "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv2d.padding",
                  "aten.conv1d.padding"),
    **by_overload(conv_transpose, "aten.conv_transpose2d.input", "aten.conv_transpose1d.default"),
    "aten.avg_pool2d.default": pool("AveragePool"),
    "aten.max_pool2d.default": pool("MaxPool"),
    "aten.adaptive_avg_pool2d.default": adaptive_pool,
    "aten.einsum.default": einsum,
    "aten.outer.default": outer,
    "aten.pixel_shuffle.default": pixel_shuffle,
    **by_overload(upsample("nearest"), "aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default"),
    **by_overload(upsample("bilinear"), "aten.upsample_bilinear2d.vec", "aten.upsample_bilinear2d.default"),
    **by_overload(upsample("bicubic"), "aten.upsample_bicubic2d.vec", "aten.upsample_bicubic2d.default"),
}

IGNORED = frozenset({
    "aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default", "aten._assert_async.msg", "aten.sym_size.int",
})
"""Checks at tracing time and sizes (which come as expressions): they leave no node."""
