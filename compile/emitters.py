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
INT64_MAX = 2**63 - 1
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# --- helpers ---------------------------------------------------------------------------------------------------------


def operand(g: Builder, x: Tensor | float | bool | sympy.Expr, dtype: torch.dtype) -> Any:
    """An operand of an element-wise operator in the type that it is computed in."""
    if isinstance(x, Tensor):
        return g.cast(x, dtype).value
    if isinstance(x, sympy.Expr) and not x.is_number:
        known = torch.int64 if x.is_integer else torch.float32
        value = g.size_scalar(x) if x.is_integer else g.op("Squeeze", g.fraction(x), g.ints(0), out=Out((), known))
        return value if dtype == known else g.op("Cast", value, to=int(TYPES[dtype]), out=Out((), dtype))
    return g.scalar(float(x) if dtype in FLOATS else int(x) if dtype != torch.bool else bool(x), dtype)


LOGICAL: Mapping[str, str] = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}
"""What torch's arithmetic is on bools; ONNX has none there."""


def unheld(x: Any, dtype: torch.dtype) -> bool:
    """A number or a size that a narrow type would change, or has no place for: torch computes with it as it is and
    rounds only the result."""
    if dtype not in (torch.bfloat16, torch.float16) or not isinstance(x, int | float | sympy.Expr):
        return False
    if isinstance(x, sympy.Expr) and not x.is_number:
        return True
    number = abs(float(x))
    if dtype == torch.bfloat16:
        return float(torch.tensor(number, dtype=dtype)) != number
    return math.isfinite(number) and number != 0 and not 2.0**-14 <= number <= 65504


def arithmetic(g: Builder, kind: str, out: Out, a: Any, b: Any) -> Any:
    """An element-wise operator in the result's type, or in fp32 inside where that would change a number first."""
    kind = LOGICAL.get(kind, kind) if out.dtype == torch.bool else kind
    dtype = torch.float32 if unheld(a, out.dtype) or unheld(b, out.dtype) else out.dtype
    inner = Out(out.shape, dtype)
    return g.cast(tensor(g, g.op(kind, operand(g, a, dtype), operand(g, b, dtype), out=inner), inner), out.dtype)


def binary(kind: str) -> Emitter:
    return lambda g, out, a, b: arithmetic(g, kind, out, a, b)


def scaled(kind: str) -> Emitter:
    """`add` and `sub` with torch's `alpha`."""

    def emit(g: Builder, out: Out, a: Any, b: Any, alpha: float = 1) -> Any:
        if alpha == 1:
            return arithmetic(g, kind, out, a, b)
        inner = Out(out.shape, torch.float32 if any(unheld(x, out.dtype) for x in (a, b, alpha)) else out.dtype)
        right = g.op("Mul", operand(g, b, inner.dtype), g.scalar(alpha, inner.dtype))
        value = g.op(kind, operand(g, a, inner.dtype), right, out=inner)
        return g.cast(tensor(g, value, inner), out.dtype)

    return emit


def common_type(a: Any, b: Any) -> torch.dtype:
    """The type that torch compares or selects in."""
    sample = [torch.empty((1,) * x.rank, dtype=x.dtype) if isinstance(x, Tensor) else x for x in (a, b)]
    sample = [(1 if x.is_integer else 1.0) if isinstance(x, sympy.Expr) else x for x in sample]
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


def relu(g: Builder, out: Out, x: Tensor) -> Any:
    if out.dtype in FLOATS:
        return g.op("Relu", x.value, out=out)
    return g.op("Max", x.value, g.scalar(0, out.dtype), out=out)  # runtimes have no Relu of integers


def expm1(g: Builder, out: Out, x: Tensor) -> Any:
    return g.op("Sub", g.op("Exp", g.cast(x, out.dtype).value), g.scalar(1, out.dtype), out=out)


def log1p(g: Builder, out: Out, x: Tensor) -> Any:
    return g.op("Log", g.op("Add", g.cast(x, out.dtype).value, g.scalar(1, out.dtype)), out=out)


def rounding(kind: str) -> Emitter:
    """Integers are whole already, and ONNX rounds floats only."""
    return lambda g, out, x: g.op(kind, x.value, out=out) if out.dtype in FLOATS else x


def question(kind: str) -> Emitter:
    """Of a float, answered with a bool; integers are finite."""
    return lambda g, out, x: g.op(kind, g.cast(x, x.dtype if x.dtype in FLOATS else torch.float32).value, out=out)


def same(g: Builder, out: Out, x: Any, *_: Any, **__: Any) -> Any:
    return x


def dropout(g: Builder, out: Out, x: Tensor, p: float, train: bool) -> Any:
    if train and p:
        raise Untranslated({"dropout in training (random numbers)"})
    return x


def tensor(g: Builder, result: Any, out: Out) -> Tensor:
    """What an emitter gave, as an operand for another."""
    return result if isinstance(result, Tensor) else Tensor(g, out.shape, out.dtype, emitted=result)


def reshaped(g: Builder, x: Tensor, shape: Sequence[Size]) -> Tensor:
    out = Out(tuple(shape), x.dtype)
    return x if out.shape == x.shape else tensor(g, g.reshape(x.value, x.shape, out), out)


def one_image(emitter: Emitter, spatial: int) -> Emitter:
    """torch takes an image without a batch as well: it gets one, and loses it again."""

    def emit(g: Builder, out: Out, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.rank > spatial + 1:
            return emitter(g, out, x, *args, **kwargs)
        grown = Out((1, *x.shape), x.dtype)
        alone = tensor(g, g.op("Unsqueeze", x.value, g.ints(0), out=grown), grown)
        return g.op("Squeeze", emitter(g, Out((1, *out.shape), out.dtype), alone, *args, **kwargs), g.ints(0), out=out)

    return emit


def axis_of(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# --- element-wise ----------------------------------------------------------------------------------------------------


def divide(g: Builder, out: Out, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return arithmetic(g, "Div", out, a, b)
    value = g.op("Div", operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)
    if rounding_mode == "trunc" and out.dtype not in FLOATS:
        return value
    if out.dtype in FLOATS and rounding_mode == "trunc":
        return truncated(g, out, value)
    if out.dtype in FLOATS:  # by the remainder, as torch: 1 // 0.1 is 9 though 1 / 0.1 rounds to 10
        real = Out(out.shape, torch.float32)  # Round knows no bf16 before opset 22
        whole = g.op("Sub", operand(g, a, out.dtype), remainder(g, out, a, b), out=out)
        whole = g.op("Div", whole, operand(g, b, out.dtype), out=out)
        whole = g.op("Round", g.cast(tensor(g, whole, out), real.dtype).value, out=real)
        shape = b.shape if isinstance(b, Tensor) else ()
        nothing = g.op("Equal", operand(g, b, out.dtype), g.scalar(0, out.dtype), out=Out(shape, torch.bool))
        return g.op("Where", nothing, value, g.cast(tensor(g, whole, real), out.dtype).value, out=out)
    # ONNX divides integers towards zero, floor goes down: the remainder's sign says by how much they differ
    rest = g.op("Mod", operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)
    return g.op("Div", g.op("Sub", operand(g, a, out.dtype), rest, out=out), operand(g, b, out.dtype), out=out)


def truncated(g: Builder, out: Out, value: Any) -> Any:
    return g.op("Mul", g.op("Sign", value), g.op("Floor", g.op("Abs", value)), out=out)


def trunc(g: Builder, out: Out, x: Tensor) -> Any:
    return truncated(g, out, x.value) if out.dtype in FLOATS else x


def remainder(g: Builder, out: Out, a: Any, b: Any) -> Any:
    """The result has the divisor's sign. ONNX has that for integers; of floats it has C's, of the dividend's sign."""
    left, right = operand(g, a, out.dtype), operand(g, b, out.dtype)
    if out.dtype not in FLOATS:
        return g.op("Mod", left, right, out=out)
    rest = g.op("Mod", left, right, fmod=1, out=out)
    sign = g.op("Mul", rest, g.op("Sign", right), out=out)
    wrong = g.op("Less", sign, g.scalar(0, out.dtype), out=Out(out.shape, torch.bool))
    return g.op("Where", wrong, g.op("Add", rest, right, out=out), rest, out=out)


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
    chosen = g.cast(condition, torch.bool).value
    return g.op("Where", chosen, operand(g, a, out.dtype), operand(g, b, out.dtype), out=out)


def hardtanh(g: Builder, out: Out, x: Tensor, low: Any = -1.0, high: Any = 1.0) -> Any:
    return clamp(g, out, x, low, high)


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


def truth(kind: str) -> Emitter:
    """`any` and `all`: 0 or 1, of uint8 in its own type."""

    def emit(g: Builder, out: Out, x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
        flag = Out(out.shape, torch.bool)
        return g.cast(tensor(g, reduce(kind)(g, flag, x, dim, keepdim), flag), out.dtype)

    return emit


def reduce(kind: str) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        dims = [dim] if isinstance(dim, int) else list(dim or range(x.rank))
        logic = out.dtype == torch.bool
        value = g.cast(g.cast(x, out.dtype), torch.int32).value if logic else g.cast(x, out.dtype).value
        result = g.op(
            kind,
            value,
            g.ints(*(axis_of(d, x.rank) for d in dims)),
            keepdims=int(keepdim),
            out=Out(out.shape, torch.int32 if logic else out.dtype),
        )
        return g.op("Cast", result, to=int(TYPES[torch.bool]), out=out) if logic else result

    return emit


def extreme_with_index(kind: str, arg: str) -> Emitter:
    def emit(g: Builder, out: Any, x: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
        return (
            g.op(kind, x.value, g.ints(axis_of(dim, x.rank)), keepdims=int(keepdim), out=out[0]),
            g.op(arg, x.value, axis=axis_of(dim, x.rank), keepdims=int(keepdim), out=out[1]),
        )

    return emit


def arg_extreme(kind: str) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        x = g.cast(x, torch.int32) if x.dtype == torch.bool else x
        if dim is None:
            flat = g.op("Reshape", x.value, g.ints(-1))
            first = g.op(kind, flat, axis=0, keepdims=int(keepdim), out=Out((1,) * keepdim, torch.int64))
            return g.op("Reshape", first, g.ints(*[1] * x.rank), out=out) if keepdim else first
        return g.op(kind, x.value, axis=axis_of(dim, x.rank), keepdims=int(keepdim), out=out)

    return emit


def cumsum(g: Builder, out: Out, x: Tensor, dim: int, **_: Any) -> Any:
    return g.op("CumSum", g.cast(x, out.dtype).value, g.scalar(axis_of(dim, x.rank), torch.int64), out=out)


def vector_norm(
    g: Builder, out: Out, x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Any:
    if ord == math.inf:
        whole = Out(x.shape, out.dtype)
        sizes = tensor(g, g.op("Abs", g.cast(x, out.dtype).value, out=whole), whole)
        return reduce("ReduceMax")(g, out, sizes, dim, keepdim)
    if ord not in (1, 2):
        raise Untranslated({f"linalg_vector_norm of order {ord}"})
    return reduce(f"ReduceL{int(ord)}")(g, out, x, dim, keepdim)


def variance(root: bool) -> Emitter:
    """`var` and `std`: the squared distances from the mean over their number less `correction`."""

    def emit(
        g: Builder,
        out: Out,
        x: Tensor,
        dim: Any = None,
        unbiased: bool = True,
        keepdim: bool = False,
        correction: float | None = None,
    ) -> Any:
        if isinstance(dim, bool):  # var(x, unbiased)
            dim, unbiased = None, dim
        dims = [axis_of(d, x.rank) for d in ([dim] if isinstance(dim, int) else dim or range(x.rank))]
        less = int(unbiased) if correction is None else correction
        apart = g.op("Sub", x.value, g.op("ReduceMean", x.value, g.ints(*dims), keepdims=1), out=Out(x.shape, x.dtype))
        total = g.op("ReduceSum", g.op("Mul", apart, apart), g.ints(*dims), keepdims=int(keepdim), out=out)
        count = operand(g, sympy.prod([x.shape[d] for d in dims]) - less, out.dtype)
        value = g.op("Div", total, count, out=out)
        return g.op("Sqrt", value, out=out) if root else value

    return emit


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
    """Integer indexing: one index is a Gather, several are a GatherND of them broadcast together.

    Indices on neighbours stay in their place in the result, others come to the front (NumPy's advanced indexing).
    """
    given = [(i, t) for i, t in enumerate(indices) if t is not None]
    if any(t.dtype == torch.bool for _, t in given):
        raise Untranslated({"index with a boolean mask (its result's size depends on data)"})
    if len(given) == 1:
        return g.op("Gather", x.value, given[0][1].value, axis=given[0][0], out=out)
    dims = [i for i, _ in given]
    together = dims == list(range(dims[0], dims[0] + len(dims)))
    lead, width = dims[0] if together else 0, len(out.shape) - (x.rank - len(given))
    shape = out.shape[lead : lead + width]
    columns = []
    for _, t in given:
        full = Out(shape, torch.int64)
        columns.append(g.op("Unsqueeze", tensor(g, expand(g, full, g.cast(t, torch.int64)), full).value, g.ints(-1)))
    if dims == list(range(len(dims))):
        return g.op("GatherND", x.value, g.op("Concat", *columns, axis=-1), out=out)
    turned = g.op("Transpose", x.value, perm=[*dims, *(i for i in range(x.rank) if i not in dims)])
    taken = g.op("GatherND", turned, g.op("Concat", *columns, axis=-1), out=None if lead else out)
    perm = [*range(width, width + lead), *range(width), *range(width + lead, len(out.shape))]
    return g.op("Transpose", taken, perm=perm, out=out) if lead else taken


def embedding(g: Builder, out: Out, weight: Tensor, ids: Tensor, *_: Any, **__: Any) -> Any:
    return g.op("Gather", weight.value, ids.value, axis=0, out=out)


def index_put(
    g: Builder, out: Out, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    """`x[mask] = number`; other writes at indices are refused."""
    place, mask = next((i, t) for i, t in enumerate(indices) if t is not None)
    single = all(d == 1 for d in values.shape)
    if accumulate or mask.dtype != torch.bool or not single or len([t for t in indices if t is not None]) > 1:
        raise Untranslated({"aten.index_put.default other than of one number under a mask"})
    below = reshaped(g, mask, (*mask.shape, *[1] * (x.rank - place - mask.rank)))
    return where(g, out, below, reshaped(g, values, ()), x)


def slice_scatter(
    g: Builder, out: Out, x: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """`x[start:end] = source`: what is before, the source, what is after. With a step each goes to its place."""
    axis = axis_of(dim, x.rank)
    parts = [g.cast(source, x.dtype).value]
    if step != 1:
        first = (start or 0) + (x.shape[axis] if isinstance(start, int) and start < 0 else 0)
        count, whole = source.shape[axis], torch.int64
        ends = (operand(g, n, whole) for n in (first, first + step * count, step))
        places = g.op("Range", *ends, out=Out((count,), whole))
        if axis < x.rank - 1:
            places = g.op("Unsqueeze", places, g.ints(*range(1, x.rank - axis)))
        wide = g.op("Expand", places, g.shape_value(source.shape), out=Out(source.shape, whole))
        return g.op("ScatterElements", x.value, wide, parts[0], axis=axis, out=out)
    if start is not None and start != 0:
        parts.insert(0, g.op("Slice", x.value, g.ints(0), bound(g, start, 0), g.ints(axis)))
    if end is not None and end != x.shape[axis] and end != INT64_MAX:
        parts.append(g.op("Slice", x.value, bound(g, end, 0), g.ints(INT64_MAX), g.ints(axis)))
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=axis, out=out)


def select_scatter(g: Builder, out: Out, x: Tensor, source: Tensor, dim: int, index: Any) -> Any:
    row = g.op("Unsqueeze", g.cast(source, x.dtype).value, g.ints(axis_of(dim, x.rank)))
    return slice_scatter(g, out, x, tensor(g, row, out), dim, index, None if index == -1 else index + 1)


def repeat(g: Builder, out: Out, x: Tensor, repeats: Sequence[Size]) -> Any:
    repeats = [*[1] * (x.rank - len(repeats)), *repeats]  # tile may name fewer dimensions than there are
    lead = len(repeats) - x.rank
    raised = g.reshape(x.value, x.shape, Out((1,) * lead + x.shape, x.dtype)) if lead else x.value
    return g.op("Tile", raised, g.shape_value(repeats), out=out)


def repeat_interleave(g: Builder, out: Out, x: Tensor, repeats: Size, dim: int | None = None, **_: Any) -> Any:
    if dim is None:
        x, dim = reshaped(g, x, (math.prod(x.shape),)), 0
    axis = axis_of(dim, x.rank)
    raised = g.op("Unsqueeze", x.value, g.ints(axis + 1))
    wide = g.op("Expand", raised, g.shape_value([1] * (axis + 1) + [repeats] + [1] * (x.rank - axis - 1)))
    return g.reshape(wide, (), out)


def flip(g: Builder, out: Out, x: Tensor, dims: Sequence[int]) -> Any:
    axes = [axis_of(d, x.rank) for d in dims]
    n = len(axes)
    back = g.ints(*[-1] * n)
    return g.op("Slice", x.value, back, g.ints(*[-INT64_MAX] * n), g.ints(*axes), back, out=out)


def roll(g: Builder, out: Out, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if not dims:
        flat = roll(g, Out((math.prod(x.shape),), x.dtype), reshaped(g, x, (math.prod(x.shape),)), shifts, (0,))
        return g.reshape(flat, (), out)
    value = x.value
    for shift, dim in zip(shifts, dims, strict=True):
        axis = g.ints(axis_of(dim, x.rank))
        cut = g.size(-shift % x.shape[axis_of(dim, x.rank)])
        tail = g.op("Slice", value, cut, g.ints(INT64_MAX), axis)
        head = g.op("Slice", value, g.ints(0), cut, axis)
        value = g.op("Concat", tail, head, axis=axis_of(dim, x.rank), out=out)
    return value


def pad(
    g: Builder, out: Out, x: Tensor, pads: Sequence[Size], mode: str = "constant", value: float | None = None
) -> Any:
    """torch lists pads from the last dimension, before and after in pairs; ONNX all befores, then all afters."""
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    pairs = [(0, 0)] * (x.rank - len(pairs)) + pairs[::-1]
    sizes = g.shape_value([p[0] for p in pairs] + [p[1] for p in pairs])
    fill = g.scalar(value or 0, x.dtype) if mode == "constant" else None
    kind = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    if kind == "wrap" and g.opset < 19:
        raise Untranslated({"pad with mode circular (from opset 19 on)"})
    return g.op("Pad", x.value, sizes, fill, mode=kind, out=out)


def triangle(upper: int) -> Emitter:
    def emit(g: Builder, out: Out, x: Tensor, diagonal: int = 0) -> Any:
        logic = x.dtype == torch.bool
        value = g.cast(x, torch.int32).value if logic else x.value
        value = g.op("Trilu", value, g.size_scalar(diagonal), upper=upper)
        return g.op("Cast", value, to=int(TYPES[torch.bool]), out=out) if logic else value

    return emit


def meshgrid(g: Builder, out: tuple[Out, ...], tensors: Sequence[Tensor], indexing: str = "ij") -> Any:
    results = []
    for i, (t, o) in enumerate(zip(tensors, out, strict=True)):
        place = i if indexing == "ij" or i > 1 else 1 - i
        shape: list[Size] = [t.shape[0] if j == place else 1 for j in range(len(out))]
        column = (
            g.fixed(t.constant.reshape(*shape))
            if t.constant is not None
            else Tensor(g, tuple(shape), t.dtype, emitted=g.reshape(t.value, t.shape, Out(tuple(shape), t.dtype)))
        )
        results.append(expand(g, o, column))
    return tuple(results)


# --- creation --------------------------------------------------------------------------------------------------------


def filled(g: Builder, out: Out, number: Any) -> Any:
    if all(isinstance(d, int) for d in out.shape) and not isinstance(number, sympy.Expr):
        return g.fixed(torch.full([int(d) for d in out.shape], number, dtype=out.dtype))
    return g.op("Expand", operand(g, number, out.dtype), g.shape_value(out.shape), out=out)


def constant_fill(number: float) -> Emitter:
    return lambda g, out, *_, **__: filled(g, out, number)


def full(g: Builder, out: Out, *args: Any, **__: Any) -> Any:
    """`full(size, number)`, `new_full(x, size, number)`, `full_like(x, number)`, `fill(x, number)`: it comes last."""
    number = args[-1]
    return filled(g, out, number) if not isinstance(number, Tensor) else copy(g, out, None, number)


def copy(g: Builder, out: Out, _: Any, source: Tensor, *__: Any) -> Any:
    return expand(g, out, g.cast(source, out.dtype))


def arange(g: Builder, out: Out, *args: Any, start: Any = 0, step: Any = 1, **_: Any) -> Any:
    """arange(end), arange(start, end), arange(start, end, step): integers are counted, floats cast afterwards."""
    low, end, by = ((start, args[0], step), (*args[:2], step), args[:3])[len(args) - 1]
    whole = all(isinstance(v, int) or (isinstance(v, sympy.Expr) and v.is_integer) for v in (low, end, by))
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
    if weight.rank == 1:
        value = g.op("MatMul", x.value, weight.value, out=out)
        return g.op("Add", value, bias.value, out=out) if bias else value
    if x.rank == 2:
        inputs = [x.value, weight.value] + ([bias.value] if bias else [])
        return g.op("Gemm", *inputs, transB=1, out=out)
    turned = g.op("Transpose", weight.value, perm=[1, 0], out=Out(weight.shape[::-1], weight.dtype))
    value = g.op("MatMul", x.value, turned, out=out)
    return g.op("Add", value, bias.value, out=out) if bias else value


def per_dim(value: Any, n: int) -> list[int]:
    """A size for each of `n` dimensions: torch takes one for all as well."""
    return [value] * n if isinstance(value, int) else list(value) * (n // len(value))


def convolution(
    g: Builder,
    out: Out,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    n = x.rank - 2
    attributes: dict[str, Any] = {
        "strides": per_dim(stride, n),
        "dilations": per_dim(dilation, n),
        "group": groups,
        "kernel_shape": [int(d) for d in weight.shape[2:]],
    }
    if isinstance(padding, str):  # `same` is for a stride of one; auto_pad does not know dilations everywhere
        reach = zip(per_dim(dilation, n), attributes["kernel_shape"], strict=True)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in reach]
        attributes["pads"] = [*(p // 2 for p in total), *(p - p // 2 for p in total)]
    else:
        attributes["pads"] = per_dim(padding, n) * 2
    inputs = [x.value, weight.value] + ([bias.value] if bias else [])
    return g.op("Conv", *inputs, out=out, **attributes)


def conv_transpose(
    g: Builder,
    out: Out,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    n, kernel = x.rank - 2, [int(d) for d in weight.shape[2:]]
    inputs = [x.value, weight.value] + ([bias.value] if bias else [])
    return g.op(
        "ConvTranspose",
        *inputs,
        strides=per_dim(stride, n),
        pads=per_dim(padding, n) * 2,
        dilations=per_dim(dilation, n),
        output_padding=per_dim(output_padding, n),
        group=groups,
        kernel_shape=kernel,
        out=out,
    )


def pool(kind: str) -> Emitter:
    def emit(
        g: Builder, out: Out, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, *rest: Any, **kw: Any
    ) -> Any:
        n = x.rank - 2
        extra: dict[str, Any] = {}
        if kind == "AveragePool":
            if kw.get("divisor_override", rest[2] if len(rest) > 2 else None) is not None:
                raise Untranslated({"average pooling with divisor_override"})
            ceil, count = (*rest, *(False, True)[len(rest) :])[:2]
            extra = {"count_include_pad": int(kw.get("count_include_pad", count))}
        else:
            dilation, ceil = (*rest, *(1, False)[len(rest) :])[:2]
            extra = {"dilations": per_dim(kw.get("dilation", dilation), n)}
        kernel, strides, pads = per_dim(kernel, n), per_dim(stride or kernel, n), per_dim(padding, n)
        ceil, dilations = bool(kw.get("ceil_mode", ceil)), extra.get("dilations", [1] * n)
        sizes = zip(x.shape[2:], out.shape[2:], strides, pads, kernel, dilations, strict=True)
        if ceil and g.opset < 22 and any(-((d * (k - 1) + 1 - 2 * p - i) // s) + 1 != o for i, o, s, p, k, d in sizes):
            raise Untranslated({f"{kind} with ceil_mode and a window that starts in the padding (from opset 22 on)"})
        return g.op(
            kind, x.value, kernel_shape=kernel, strides=strides, pads=pads * 2, ceil_mode=int(ceil), out=out, **extra
        )

    return emit


def adaptive_pool(g: Builder, out: Out, x: Tensor, size: Sequence[int]) -> Any:
    if all(n == 1 for n in size):
        return g.op("GlobalAveragePool", x.value, out=out)
    before = x.shape[2:]
    if any(not isinstance(d, int) or d % n for d, n in zip(before, size, strict=True)):
        raise Untranslated({f"adaptive average pooling from {list(before)} to {list(size)}, which is no multiple"})
    step = [int(d) // n for d, n in zip(before, size, strict=True)]
    return g.op("AveragePool", x.value, kernel_shape=step, strides=step, out=out)


def einsum(g: Builder, out: Out, equation: str, tensors: Sequence[Tensor], **_: Any) -> Any:
    """A permutation of one tensor is a Transpose. ONNX has no Einsum in bf16: there it is computed in fp32."""
    left, _arrow, right = equation.replace(" ", "").partition("->")
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


def attention(
    g: Builder, out: Out, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Any:
    """Vaswani et al. 2017, section 3.2.1; `[batch, heads, tokens, head_dim]`. One Attention node from opset 23 on."""
    if mask is not None and mask.dtype != torch.bool:
        mask = g.cast(mask, q.dtype)
    if g.opset >= 23:
        if mask is not None and mask.shape[-2:] != (q.shape[-2], k.shape[-2]):
            # the standard lets the last two sizes broadcast, ONNX Runtime wants them whole
            full = Out((*mask.shape[:-2], q.shape[-2], k.shape[-2]), mask.dtype)
            mask = tensor(g, expand(g, full, mask), full)
        return g.op(
            "Attention",
            q.value,
            k.value,
            v.value,
            mask.value if mask else None,
            is_causal=int(causal) or None,
            scale=scale,
            out=out,
        )
    return decomposed_attention(g, out, q, k, v, mask, causal, scale)


def decomposed_attention(
    g: Builder, out: Out, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Any:
    if scale is None and not isinstance(q.shape[-1], int):
        raise Untranslated({"attention over a head size that varies"})
    root = math.sqrt(scale if scale is not None else int(q.shape[-1]) ** -0.5)  # on both sides: fp16 stays small
    keys, values = (many_heads(g, t, q) for t in (k, v))
    turned = g.op("Transpose", keys, perm=[0, 1, 3, 2])
    left = g.op("Mul", q.value, g.scalar(root, q.dtype))
    right = g.op("Mul", turned, g.scalar(root, q.dtype))
    shape = (*q.shape[:-1], k.shape[-2])
    scores = g.op("MatMul", left, right, out=Out(shape, q.dtype))
    if causal:
        square = Out((q.shape[-2], k.shape[-2]), torch.int32)
        lower = g.op("Trilu", tensor(g, filled(g, square, 1), square).value, upper=0)
        mask = Tensor(g, (q.shape[-2], k.shape[-2]), torch.bool, emitted=g.op("Cast", lower, to=int(TYPES[torch.bool])))
    if mask is not None and mask.dtype == torch.bool:
        scores = g.op("Where", mask.value, scores, g.scalar(torch.finfo(q.dtype).min, q.dtype), out=Out(shape, q.dtype))
    elif mask is not None:
        scores = g.op("Add", scores, mask.value, out=Out(shape, q.dtype))
    weights = g.op("Softmax", scores, axis=-1, out=Out(shape, q.dtype))
    result = g.op("MatMul", weights, values, out=out)
    if mask is None or mask.dtype != torch.bool or causal:
        return result
    # a row that the mask closes entirely is zero in torch; deciding it here leaves MatMul, Softmax, MatMul together
    some = reduce("ReduceMax")(g, Out((*mask.shape[:-1], 1), torch.bool), mask, -1, True)
    return g.op("Where", some, result, g.scalar(0, q.dtype), out=out)


def many_heads(g: Builder, t: Tensor, q: Tensor) -> Any:
    """Keys and values of grouped heads, one for each query head."""
    heads, groups = q.shape[1], t.shape[1]
    if heads == groups:
        return t.value
    times = int(heads) // int(groups)
    wide = g.op("Expand", g.op("Unsqueeze", t.value, g.ints(2)), g.ints(1, 1, times, 1, 1))
    return g.reshape(wide, (), Out((t.shape[0], heads, *t.shape[2:]), t.dtype))


def group_norm(
    g: Builder, out: Out, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
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


def ones_for(g: Builder, x: Tensor, dims: int) -> Any:
    out = Out(x.shape[-dims:], x.dtype)
    return tensor(g, filled(g, out, 1), out).value


def layer_norm(
    g: Builder, out: Out, x: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    scale = g.cast(weight, x.dtype).value if weight else ones_for(g, x, dims)
    return g.op(
        "LayerNormalization",
        x.value,
        scale,
        g.cast(bias, x.dtype).value if bias else None,
        axis=-dims,
        epsilon=eps,
        out=out,
    )


def rms_norm(g: Builder, out: Out, x: Tensor, dims: int, weight: Tensor | None, eps: float | None) -> Any:
    """Zhang and Sennrich 2019."""
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps  # torch's own default: it computes halves in fp32
    scale = g.cast(weight, x.dtype).value if weight else ones_for(g, x, dims)
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
        return relu(g, out, x)
    if g.opset >= 20:
        return g.op("Gelu", x.value, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)

    def number(value: float) -> Any:
        return g.scalar(value, x.dtype)

    if kind == "gelu_tanh":  # Hendrycks and Gimpel 2016, section 2
        cube = g.op("Mul", g.op("Mul", x.value, x.value), x.value)
        inner = g.op("Mul", g.op("Add", x.value, g.op("Mul", cube, number(0.044715))), number(math.sqrt(2 / math.pi)))
        gate = g.op("Add", g.op("Tanh", inner), number(1))
    else:
        gate = g.op("Add", g.op("Erf", g.op("Mul", x.value, number(1 / math.sqrt(2)))), number(1))
    return g.op("Mul", g.op("Mul", x.value, gate), number(0.5), out=out)


def softmax(g: Builder, out: Out, x: Tensor, dim: int, *_: Any, **__: Any) -> Any:
    return g.op("Softmax", g.cast(x, out.dtype).value, axis=axis_of(dim, x.rank), out=out)


def log_softmax(g: Builder, out: Out, x: Tensor, dim: int, *_: Any, **__: Any) -> Any:
    return g.op("LogSoftmax", g.cast(x, out.dtype).value, axis=axis_of(dim, x.rank), out=out)


def resize(
    g: Builder, out: Out, x: Tensor, height: Any, width: Any, mode: str, align: bool, scales: Sequence[float]
) -> Any:
    return resized(g, out, x, {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}[mode], align, scales)


def resized(g: Builder, out: Out, x: Tensor, mode: str, align: bool, scales: Sequence[float]) -> Any:
    """Keys' cubic uses a = -0.75, as torch; nearest takes the floor of unshifted coordinates, as torch's does.

    Given scales count as they are, though the sizes are rounded down: 7 by 1.5 is 10, and steps of 1 / 1.5.
    """
    attributes: dict[str, Any] = {"mode": mode}
    attributes["coordinate_transformation_mode"] = (
        "asymmetric" if mode == "nearest" else "align_corners" if align else "half_pixel"
    )
    if mode == "nearest":
        attributes["nearest_mode"] = "floor"
    if mode == "cubic":
        attributes["cubic_coeff_a"] = -0.75
    if scales and mode != "cubic":  # torch leaves a size that stays as it is, whatever its scale
        scales = [1.0 if x.shape[i] == out.shape[i] else s for i, s in enumerate(scales, start=2)]
    if out.shape == x.shape and all(s == 1 for s in scales):
        return x
    if out.shape == x.shape:
        raise Untranslated({"bicubic interpolation by a scale that leaves the size as it is"})  # runtimes copy
    if mode == "nearest" and any(s != int(s) for s in scales):
        return taken_nearest(g, out, x, [1 / s for s in scales])
    sides = list(zip(x.shape[2:], out.shape[2:], strict=True))
    if mode == "nearest" and not scales and not all((sympy.sympify(o) / i).is_Integer for i, o in sides):
        return taken_nearest(g, out, x, [step_between(g, i, o) for i, o in sides])
    if scales and not align:
        factors = g.constant(torch.tensor([1.0, 1.0, *map(not_below, scales)]))
        return g.op("Resize", x.value, None, factors, out=out, **attributes)
    return g.op("Resize", x.value, None, None, g.shape_value(out.shape), out=out, **attributes)


def not_below(scale: float) -> float:
    """The fp32 number at or above: 10 * 1.3 must not become 12.99 and then 12."""
    near = torch.tensor(scale, dtype=torch.float32)
    return float(near if float(near) >= scale else torch.nextafter(near, torch.tensor(math.inf)))


def step_between(g: Builder, i: Any, o: Any) -> float | Tensor:
    """Of a size into another: torch divides them in fp32, and a product with a reciprocal is not the same."""
    i, o = sympy.sympify(i), sympy.sympify(o)
    if (i / o).is_number:
        return float(i / o)
    real = Out((), torch.float32)
    return tensor(g, g.op("Div", operand(g, i, real.dtype), operand(g, o, real.dtype), out=real), real)


def taken_nearest(g: Builder, out: Out, x: Tensor, steps_in: Sequence[float | Tensor]) -> Any:
    """Pixel `floor(i * step)` in fp32, torch's own arithmetic, with the step between pixels that are taken:
    `i / (1 / step)` can come out at its neighbour."""
    value = x.value
    for axis, step in enumerate(steps_in, start=x.rank - len(steps_in)):
        whole, real = (Out((out.shape[axis],), dtype) for dtype in (torch.int64, torch.float32))
        steps = tensor(g, arange(g, real, out.shape[axis]), real)
        places = g.op("Mul", steps.value, operand(g, step, torch.float32), out=real)
        places = tensor(g, g.op("Floor", places, out=real), real)
        last = operand(g, x.shape[axis] - 1, torch.int64)
        value = g.op("Gather", value, g.op("Min", g.cast(places, torch.int64).value, last, out=whole), axis=axis)
    g.describe(value, out)
    return value


def upsample(mode: str) -> Emitter:
    """`vec(x, sizes, align, scales)` and `default(x, sizes, align, scale, scale, ...)`; nearest has no `align`."""

    def emit(g: Builder, out: Out, x: Tensor, _: Any, *args: Any, **kwargs: Any) -> Any:
        align, rest = (False, args) if mode == "nearest" else (bool(args[0]), args[1:])
        scales = [*rest, *kwargs.values()]
        if scales and not isinstance(scales[0], int | float):
            scales = list(scales[0] or ())
        return resized(g, out, x, mode, align, [float(s) for s in scales if s is not None])

    return emit


def hard_sigmoid(g: Builder, out: Out, x: Tensor) -> Any:
    return g.op("HardSigmoid", x.value, alpha=1 / 6, beta=0.5, out=out)


def leaky_relu(g: Builder, out: Out, x: Tensor, slope: float = 0.01) -> Any:
    return g.op("LeakyRelu", x.value, alpha=float(slope), out=out)


def elu(g: Builder, out: Out, x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """`scale * x` above zero, `scale * alpha * (exp(input_scale * x) - 1)` below."""
    if input_scale != 1:
        low = g.op("Elu", g.op("Mul", x.value, g.scalar(input_scale, x.dtype)), alpha=float(alpha), out=out)
        above = g.op("Greater", x.value, g.scalar(0, x.dtype), out=Out(out.shape, torch.bool))
        value = g.op("Where", above, x.value, low, out=out)
    else:
        value = g.op("Elu", x.value, alpha=float(alpha), out=out)
    return value if scale == 1 else g.op("Mul", value, g.scalar(scale, x.dtype), out=out)


def softplus(g: Builder, out: Out, x: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    """`log(1 + exp(beta * x)) / beta`, and x above a threshold: torch's own one only guards what ONNX computes without
    overflow, a lower one shows."""
    inner = x.value if beta == 1 else g.op("Mul", x.value, g.scalar(beta, x.dtype), out=out)
    value = g.op("Softplus", inner, out=out)
    value = value if beta == 1 else g.op("Div", value, g.scalar(beta, x.dtype), out=out)
    if threshold >= 20:
        return value
    above = g.op("Greater", inner, g.scalar(threshold, x.dtype), out=Out(out.shape, torch.bool))
    return g.op("Where", above, x.value, value, out=out)


def aten_layer_norm(
    g: Builder,
    out: Out,
    x: Tensor,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    return layer_norm(g, out, x, len(shape), weight, bias, eps)


def aten_group_norm(
    g: Builder, out: Out, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    return group_norm(g, out, x, groups, weight, bias, eps)


def batch_norm(
    g: Builder,
    out: Out,
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    if training or mean is None:
        raise Untranslated({"aten.batch_norm.default"})  # statistics of the batch: torch has them in simpler operators
    channels = int(x.shape[1])
    ones, zeros = torch.ones(channels, dtype=x.dtype), torch.zeros(channels, dtype=x.dtype)
    scale = weight.value if weight else g.constant(ones)
    shift = bias.value if bias else g.constant(zeros)
    return g.op("BatchNormalization", x.value, scale, shift, mean.value, var.value, epsilon=eps, out=out)


def sdpa(
    g: Builder,
    out: Out,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch takes any number of leading dimensions; here they become the batch, with one head."""
    if dropout:
        raise Untranslated({"scaled_dot_product_attention with dropout"})
    if q.rank == 4:
        return attention(g, out, q, k, v, mask, causal, scale)
    lead = q.shape[:-2]
    if k.shape[:-2] != lead or v.shape[:-2] != lead:
        raise Untranslated({f"scaled_dot_product_attention of {q.rank} dimensions with leading ones that differ"})
    if mask is not None and mask.rank > 2:
        wide = Out((*lead, *mask.shape[-2:]), mask.dtype)
        mask = tensor(g, expand(g, wide, mask), wide)
        mask = reshaped(g, mask, (math.prod(lead), 1, *mask.shape[-2:]))
    q, k, v = (reshaped(g, t, (math.prod(lead), 1, *t.shape[-2:])) for t in (q, k, v))
    inner = Out((math.prod(lead), 1, *out.shape[-2:]), out.dtype)
    return g.reshape(attention(g, inner, q, k, v, mask, causal, scale), inner.shape, out)


def by_overload(emitter: Emitter, *names: str) -> dict[str, Emitter]:
    return dict.fromkeys(names, emitter)


EMITTERS: Mapping[str, Emitter] = {
    "leaf.attention.default": attention,
    "leaf.group_norm.default": group_norm,
    "leaf.layer_norm.default": layer_norm,
    "leaf.rms_norm.default": rms_norm,
    "leaf.activation.default": activation,
    "leaf.softmax.default": softmax,
    "leaf.linear.default": linear,
    "leaf.resize.default": resize,
    "aten.scaled_dot_product_attention.default": sdpa,
    "aten.layer_norm.default": aten_layer_norm,
    "aten.group_norm.default": aten_group_norm,
    "aten.batch_norm.default": batch_norm,
    **by_overload(scaled("Add"), "aten.add.Tensor", "aten.add.Scalar", "aten.add_.Tensor", "aten.add_.Scalar"),
    **by_overload(scaled("Sub"), "aten.sub.Tensor", "aten.sub.Scalar", "aten.sub_.Tensor"),
    **by_overload(binary("Mul"), "aten.mul.Tensor", "aten.mul.Scalar", "aten.mul_.Tensor", "aten.mul_.Scalar"),
    **by_overload(
        divide,
        "aten.div.Tensor",
        "aten.div.Scalar",
        "aten.div_.Tensor",
        "aten.div_.Scalar",
        "aten.div.Tensor_mode",
        "aten.div.Scalar_mode",
    ),
    **by_overload(lambda g, out, a, b: divide(g, out, a, b, "floor"), "aten.floor_divide.default"),
    **by_overload(
        lambda g, out, a, b, alpha=1: scaled("Sub")(g, out, b, a, alpha), "aten.rsub.Scalar", "aten.rsub.Tensor"
    ),
    **by_overload(remainder, "aten.remainder.Tensor", "aten.remainder.Scalar"),
    **by_overload(power, "aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar"),
    **by_overload(binary("Max"), "aten.maximum.default", "aten.max.other"),
    **by_overload(binary("Min"), "aten.minimum.default", "aten.min.other"),
    **by_overload(compare("Equal"), "aten.eq.Tensor", "aten.eq.Scalar"),
    **by_overload(compare("Equal", negate=True), "aten.ne.Tensor", "aten.ne.Scalar"),
    **by_overload(compare("Less"), "aten.lt.Tensor", "aten.lt.Scalar"),
    **by_overload(compare("Greater"), "aten.gt.Tensor", "aten.gt.Scalar"),
    **by_overload(compare("LessOrEqual"), "aten.le.Tensor", "aten.le.Scalar"),
    **by_overload(compare("GreaterOrEqual"), "aten.ge.Tensor", "aten.ge.Scalar"),
    **by_overload(
        logical("And", "BitwiseAnd"),
        "aten.__and__.Tensor",
        "aten.bitwise_and.Tensor",
        "aten.logical_and.default",
        "aten.__and__.Scalar",
        "aten.bitwise_and.Scalar",
    ),
    **by_overload(
        logical("Or", "BitwiseOr"),
        "aten.__or__.Tensor",
        "aten.bitwise_or.Tensor",
        "aten.logical_or.default",
        "aten.__or__.Scalar",
        "aten.bitwise_or.Scalar",
    ),
    **by_overload(
        logical("Xor", "BitwiseXor"),
        "aten.bitwise_xor.Tensor",
        "aten.logical_xor.default",
        "aten.__xor__.Tensor",
        "aten.bitwise_xor.Scalar",
    ),
    **by_overload(logical_not, "aten.logical_not.default", "aten.bitwise_not.default"),
    **by_overload(where, "aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar"),
    **by_overload(masked_fill, "aten.masked_fill.Scalar", "aten.masked_fill.Tensor"),
    **by_overload(clamp, "aten.clamp.default", "aten.clamp_min.default", "aten.clip.default"),
    "aten.hardtanh.default": hardtanh,
    **by_overload(clamp_between, "aten.clamp.Tensor", "aten.clip.Tensor"),
    **by_overload(lambda g, out, x, most: clamp(g, out, x, None, most), "aten.clamp_max.default"),
    **{
        f"aten.{name}.default": unary(kind)
        for name, kind in {
            "exp": "Exp",
            "log": "Log",
            "sin": "Sin",
            "cos": "Cos",
            "tan": "Tan",
            "tanh": "Tanh",
            "sqrt": "Sqrt",
            "abs": "Abs",
            "neg": "Neg",
            "reciprocal": "Reciprocal",
            "sigmoid": "Sigmoid",
            "erf": "Erf",
            "sign": "Sign",
            "atan": "Atan",
            "mish": "Mish",
            "selu": "Selu",
            "hardswish": "HardSwish",
        }.items()
    },
    "aten.relu.default": relu,
    "aten.expm1.default": expm1,
    "aten.log1p.default": log1p,
    **{f"aten.{name}.default": rounding(name.title()) for name in ("floor", "ceil", "round")},
    **{f"aten.{name}.default": question(kind) for name, kind in {"isnan": "IsNaN", "isinf": "IsInf"}.items()},
    "aten.trunc.default": trunc,
    "aten.softplus.default": softplus,
    **by_overload(lambda g, out, x: activation(g, out, x, "silu"), "aten.silu.default"),
    **by_overload(
        lambda g, out, x, approximate="none": activation(g, out, x, "gelu" if approximate == "none" else "gelu_tanh"),
        "aten.gelu.default",
    ),
    **by_overload(hard_sigmoid, "aten.hardsigmoid.default"),
    **by_overload(leaky_relu, "aten.leaky_relu.default"),
    **by_overload(elu, "aten.elu.default"),
    **by_overload(lambda g, out, x, alpha=1: elu(g, out, x, alpha, 1, 1 / alpha), "aten.celu.default"),
    "aten.rsqrt.default": rsqrt,
    "aten.square.default": square,
    **by_overload(
        convert,
        "aten.to.dtype",
        "aten.to.device",
        "aten.to.dtype_layout",
        "aten._to_copy.default",
        "aten.type_as.default",
        "aten.to.other",
    ),
    **by_overload(dropout, "aten.dropout.default", "aten.feature_dropout.default"),
    **by_overload(
        same,
        "aten.contiguous.default",
        "aten.clone.default",
        "aten.detach.default",
        "aten.detach_.default",
        "aten.alias.default",
        "aten.lift_fresh_copy.default",
    ),
    **by_overload(reduce("ReduceMean"), "aten.mean.dim", "aten.mean.default"),
    **by_overload(reduce("ReduceSum"), "aten.sum.dim_IntList", "aten.sum.default"),
    **by_overload(reduce("ReduceMax"), "aten.amax.default", "aten.max.default"),
    **by_overload(reduce("ReduceMin"), "aten.amin.default", "aten.min.default"),
    **by_overload(truth("ReduceMax"), "aten.any.dim", "aten.any.default", "aten.any.dims"),
    **by_overload(truth("ReduceMin"), "aten.all.dim", "aten.all.default"),
    **by_overload(variance(False), "aten.var.default", "aten.var.dim", "aten.var.correction"),
    **by_overload(variance(True), "aten.std.default", "aten.std.dim", "aten.std.correction"),
    "aten.var_mean.correction": lambda g, out, x, dim=None, keepdim=False, **kw: (
        variance(False)(g, out[0], x, dim, keepdim=keepdim, **kw),
        reduce("ReduceMean")(g, out[1], x, dim, keepdim),
    ),
    "aten.max.dim": extreme_with_index("ReduceMax", "ArgMax"),
    "aten.min.dim": extreme_with_index("ReduceMin", "ArgMin"),
    "aten.argmax.default": arg_extreme("ArgMax"),
    "aten.argmin.default": arg_extreme("ArgMin"),
    "aten.cumsum.default": cumsum,
    "aten.linalg_vector_norm.default": vector_norm,
    **by_overload(softmax, "aten.softmax.int", "aten._softmax.default"),
    **by_overload(log_softmax, "aten.log_softmax.int", "aten._log_softmax.default"),
    **by_overload(
        reshape,
        "aten.view.default",
        "aten.reshape.default",
        "aten._unsafe_view.default",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.squeeze.default",
        "aten.view_as.default",
        "aten.reshape_as.default",
    ),
    **by_overload(squeeze_dim, "aten.squeeze.dim", "aten.squeeze.dims"),
    "aten.unsqueeze.default": unsqueeze,
    **by_overload(transpose, "aten.transpose.int", "aten.t.default", "aten.swapaxes.default"),
    **by_overload(lambda g, out, x: transpose(g, out, x, -1, -2), "aten.mT.default"),
    **by_overload(permute, "aten.permute.default"),
    **by_overload(expand, "aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default"),
    **by_overload(cat, "aten.cat.default", "aten.concat.default", "aten.concatenate.default"),
    "aten.stack.default": stack,
    **by_overload(
        split,
        "aten.split.Tensor",
        "aten.split_with_sizes.default",
        "aten.split.sizes",
        "aten.chunk.default",
        "aten.tensor_split.sections",
    ),
    "aten.unbind.int": unbind,
    "aten.slice.Tensor": slice_,
    "aten.narrow.default": lambda g, out, x, dim, start, length: slice_(g, out, x, dim, start, start + length),
    "aten.select.int": select,
    "aten.index_select.default": index_select,
    "aten.gather.default": gather,
    "aten.index.Tensor": index,
    "aten.index_put.default": index_put,
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
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
    "aten.meshgrid.indexing": meshgrid,
    **by_overload(constant_fill(1), "aten.ones.default", "aten.new_ones.default", "aten.ones_like.default"),
    **by_overload(constant_fill(0), "aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default"),
    **by_overload(
        constant_fill(0),
        "aten.empty.memory_format",
        "aten.new_empty.default",
        "aten.empty_like.default",
        "aten.zero.default",
    ),
    **by_overload(
        full,
        "aten.full.default",
        "aten.new_full.default",
        "aten.full_like.default",
        "aten.fill.Scalar",
        "aten.fill.Tensor",
    ),
    "aten.copy.default": copy,
    "aten.scalar_tensor.default": lambda g, out, number, **_: filled(g, out, number),
    **by_overload(arange, "aten.arange.default", "aten.arange.start", "aten.arange.start_step"),
    **by_overload(
        matmul, "aten.matmul.default", "aten.bmm.default", "aten.mm.default", "aten.mv.default", "aten.dot.default"
    ),
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": baddbmm,
    "aten.linear.default": linear,
    **{f"aten.conv{n}d.{kind}": one_image(convolution, n) for n in (1, 2, 3) for kind in ("default", "padding")},
    **{
        name: one_image(conv_transpose, n)
        for n, name in enumerate(
            ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"), 1
        )
    },
    **{f"aten.avg_pool{n}d.default": one_image(pool("AveragePool"), n) for n in (1, 2, 3)},
    **{f"aten.max_pool{n}d.default": one_image(pool("MaxPool"), n) for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d.default": one_image(adaptive_pool, n) for n in (1, 2, 3)},
    "aten.einsum.default": einsum,
    "aten.outer.default": outer,
    "aten.pixel_shuffle.default": one_image(pixel_shuffle, 2),
    **{
        f"aten.upsample_{kind}.{form}": upsample(mode)
        for form in ("vec", "default")
        for kind, mode in {
            "nearest1d": "nearest",
            "nearest2d": "nearest",
            "nearest3d": "nearest",
            "linear1d": "linear",
            "bilinear2d": "linear",
            "trilinear3d": "linear",
            "bicubic2d": "cubic",
        }.items()
    },
}

IGNORED = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
        "aten._assert_async.msg",
        "aten.sym_size.int",
    }
)
"""Checks at tracing time and sizes (which come as expressions): they leave no node."""
