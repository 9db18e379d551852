"""The shape of every value of an ONNX file at given sizes: dims in words are evaluated, the rest is inferred."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError

if TYPE_CHECKING:
    import onnx

TYPES: Mapping[str, tuple[str, int]] = {
    "FLOAT": ("fp32", 32), "FLOAT16": ("fp16", 16), "BFLOAT16": ("bf16", 16), "DOUBLE": ("fp64", 64),
    "FLOAT8E4M3FN": ("fp8", 8), "FLOAT8E5M2": ("fp8", 8), "FLOAT8E8M0": ("fp8", 8), "FLOAT4E2M1": ("fp4", 4),
    "INT8": ("int8", 8), "UINT8": ("int8", 8), "INT4": ("int4", 4), "UINT4": ("int4", 4), "BOOL": ("bool", 8),
    "INT16": ("int16", 16), "UINT16": ("int16", 16), "INT32": ("int32", 32), "UINT32": ("int32", 32),
    "INT64": ("int64", 64), "UINT64": ("int64", 64),
}  # fmt: skip
"""ONNX's name of a type -> ours and its bits."""


@dataclass(frozen=True)
class Tensor:
    """A value's type and shape; `shape` is None where it is not known."""

    dtype: str
    bits: int
    shape: tuple[int, ...] | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def bytes(self) -> float:
        return self.numel * self.bits / 8


def tensor_of(kind: int, shape: tuple[int, ...] | None) -> Tensor:
    import onnx

    return Tensor(*TYPES.get(onnx.TensorProto.DataType.Name(kind), ("", 0)), shape)


_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "floor": math.floor,
    "ceiling": math.ceil,
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
}


def size_in_words(words: str, sizes: Mapping[str, int]) -> int | None:
    """`"height*width/64 + tokens"` in numbers, as `compile.translate` writes it; None where it has a name that is not
    in `sizes`, or is no arithmetic. Divisions are exact until the end."""
    if words in sizes:
        return sizes[words]
    try:
        number: int = math.floor(_value(ast.parse(words, mode="eval").body, sizes))
        return number
    except (SyntaxError, KeyError, TypeError, ZeroDivisionError):
        return None


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> Any:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return Fraction(tree.value)
    if isinstance(tree, ast.Name):
        return Fraction(sizes[tree.id])
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, sizes)
    if isinstance(tree, ast.BinOp):
        return _OPERATORS[type(tree.op)](_value(tree.left, sizes), _value(tree.right, sizes))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        return Fraction(_FUNCTIONS[tree.func.id](*(_value(a, sizes) for a in tree.args)))
    raise KeyError(ast.dump(tree))


def tensors_of(model: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Every value of the graph by name, weights too. Writes the numbers into `model`'s own shapes.

    Raises InputError where an input has a size that `sizes` does not give.
    """
    import onnx

    graph = model.graph
    weights = {t.name for t in graph.initializer}
    for value in graph.input:
        unknown = write_sizes(value, sizes)
        if unknown and value.name not in weights:
            raise InputError(
                f"the size of the input {value.name} is not given",
                got=", ".join(f"{k}={v}" for k, v in sizes.items()) or "no sizes",
                expected="a size for " + ", ".join(unknown),
            )
    for value in (*graph.value_info, *graph.output):
        write_sizes(value, sizes)
    found = described(model)
    if any(found.get(o, NOTHING).shape is None for n in graph.node for o in n.output if o):
        found |= described(onnx.shape_inference.infer_shapes(model, data_prop=True))
    return found


NOTHING = Tensor("", 0, None)


def write_sizes(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> list[str]:
    """Puts numbers for the words of a value's dims; gives those that stay words."""
    unknown = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_param"):
            number = size_in_words(dim.dim_param, sizes)
            if number is None:
                unknown.append(dim.dim_param)
                dim.ClearField("dim_param")
            else:
                dim.dim_value = number
    return unknown


def described(model: onnx.ModelProto) -> dict[str, Tensor]:
    graph = model.graph
    found = {t.name: tensor_of(t.data_type, tuple(t.dims)) for t in graph.initializer}
    values: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.value_info, *graph.output)
    for value in values:
        kind = value.type.tensor_type
        known = kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim)
        found[value.name] = tensor_of(kind.elem_type, tuple(d.dim_value for d in kind.shape.dim) if known else None)
    return found
