"""A traced torch graph becomes an ONNX graph, directly: one emitter per operator, no rewriting afterwards.

Three things keep it small and fast. Whatever depends on constants alone is computed by torch itself, here and now.
Sizes are sympy expressions of the inputs' sizes: each is written once, from the inputs' shapes, and shared. And an
operator without an emitter is decomposed by torch's own table, it alone, before anything gives up.
"""

from __future__ import annotations

import math
import operator
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
import onnx_ir as ir
import sympy
import torch
from torch.export.graph_signature import OutputKind
from torch.fx import Node as FxNode

from optimize.errors import GateError, InternalError

from .spec import Component, TensorSpec, dim_terms
from .trace import Traced

Size: TypeAlias = "int | sympy.Expr"

TYPES: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
SYMBOLIC = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
ORIGIN = "optimize.torch_node"  # metadata of an ONNX node: the torch node that it (partly) computes
MOST_FOLDED = 1 << 22  # elements: a larger constant is left to be computed at run time


class Untranslated(Exception):
    """These operators have no emitter."""

    def __init__(self, operators: set[str]) -> None:
        self.operators = operators
        super().__init__(", ".join(sorted(operators)))


@dataclass
class Tensor:
    """A tensor on its way: its type and size, and either a constant of torch's or a value in the graph."""

    graph: Builder
    shape: tuple[Size, ...]
    dtype: torch.dtype
    constant: torch.Tensor | None = None
    emitted: ir.Value | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def value(self) -> ir.Value:
        """The value in the graph; a constant becomes an initializer when somebody first needs it."""
        if self.emitted is None:
            assert self.constant is not None
            self.emitted = self.graph.constant(self.constant)
        return self.emitted


@dataclass(frozen=True)
class Out:
    """What torch says an operator gives: size and type."""

    shape: tuple[Size, ...]
    dtype: torch.dtype


class Builder:
    """Nodes of the ONNX graph in order, with names that say where in the model they come from."""

    def __init__(self, opset: int, empties: bool = False, reserved: Iterable[str] = ()) -> None:
        self.opset = opset
        self.empties = empties  # whether a size can be zero (a decoder's past)
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.scope = ""  # path of the module that is being written
        self.origin = ""  # name of the torch node that is being written
        self.words: dict[sympy.Symbol, sympy.Expr] = {}
        self._written: dict[sympy.Expr, str] = {}
        self._names: Counter[str] = Counter()
        self._taken = set(reserved)  # names that the graph's inputs and outputs have
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._sizes: dict[sympy.Expr, ir.Value] = {}
        self._scalars: dict[sympy.Expr, ir.Value] = {}

    # --- nodes and constants ---

    def unique(self, name: str) -> str:
        free = name
        while free in self._taken:
            self._names[name] += 1
            free = f"{name}_{self._names[name]}"
        self._taken.add(free)
        return free

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        out: Out | None = None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Appends a node; gives its output value, or a tuple of them where `outputs` is more than one."""
        name = self.unique(f"{self.scope}/{kind}" if self.scope else kind)
        values = [ir.Value(name=name if outputs == 1 else f"{name}.{i}") for i in range(outputs)]
        if out is not None and outputs == 1:
            self.describe(values[0], out)
        else:
            kind_of = next((v.type for v in inputs if v is not None), None)
            for value in values:
                value.type = ir.TensorType(ir.DataType(attributes["to"])) if kind == "Cast" else kind_of
                value.type = ir.TensorType(ir.DataType.INT64) if kind == "Shape" else value.type
        self.nodes.append(
            ir.node(
                kind,
                list(inputs),
                {k: v for k, v in attributes.items() if v is not None},
                domain=domain,
                outputs=values,
                name=name,
                metadata_props={ORIGIN: self.origin} if self.origin else None,
            )
        )
        return values[0] if outputs == 1 else tuple(values)

    def describe(self, value: ir.Value, out: Out) -> None:
        value.type = ir.TensorType(TYPES[out.dtype])
        value.shape = ir.Shape([d if isinstance(d, int) else self.in_words(d) for d in out.shape])

    def in_words(self, size: sympy.Expr) -> str:
        if size not in self._written:
            self._written[size] = str(size.xreplace(self.words))
        return self._written[size]

    def constant(self, tensor: torch.Tensor, name: str = "constant") -> ir.Value:
        """An initializer; equal constants are one."""
        tensor = tensor.detach().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        key = (tensor.dtype, tuple(tensor.shape), raw)
        if key not in self._constants:
            array = ir.tensor(raw_array(tensor), dtype=TYPES[tensor.dtype])
            self._constants[key] = self.initializer(self.unique(name), array)
        return self._constants[key]

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.initializers[name] = value
        return value

    def ints(self, *values: int) -> ir.Value:
        return self.constant(torch.tensor(values, dtype=torch.int64), "sizes")

    def scalar(self, number: float | bool, dtype: torch.dtype) -> ir.Value:
        return self.constant(torch.tensor(number, dtype=dtype), "scalar")

    # --- sizes ---

    def know_size(self, expression: sympy.Expr, make: Callable[[], ir.Value]) -> None:
        if expression not in self._sizes:
            self._sizes[expression] = make()

    def size(self, size: Size) -> ir.Value:
        """A size as an int64 tensor of one element, each expression written once."""
        if isinstance(size, int) or size.is_Integer:
            return self.ints(int(size))
        if size not in self._sizes:
            self._sizes[size] = self._compute(size)
        return self._sizes[size]

    def _compute(self, e: sympy.Expr) -> ir.Value:
        kind = type(e).__name__
        scope, self.scope = self.scope, "sizes"
        origin, self.origin = self.origin, ""
        try:
            if e.is_Pow and e.exp.is_Integer and e.exp > 0:
                return self._reduce("Mul", [e.base] * int(e.exp))
            if kind == "FloorDiv" and not e.args[0].is_nonnegative:
                # ONNX divides integers towards zero: take the remainder (of the divisor's sign) off first
                whole, divisor = (self.size(a) for a in e.args)
                rest = self.op("Mod", whole, divisor, out=Out((1,), torch.int64))
                return cast(ir.Value, self.op("Div", self.op("Sub", whole, rest), divisor, out=Out((1,), torch.int64)))
            if kind in SIZE_OPS:
                return self._reduce(SIZE_OPS[kind], list(e.args))
            if kind in ROUNDINGS:
                whole = self.op(ROUNDINGS[kind], self.fraction(e.args[0]), out=Out((1,), torch.float32))
                return cast(ir.Value, self.op("Cast", whole, to=int(TYPES[torch.int64]), out=Out((1,), torch.int64)))
        finally:
            self.scope, self.origin = scope, origin
        raise Untranslated({f"size expression {e} ({kind})"})

    def fraction(self, e: sympy.Expr) -> ir.Value:
        """An expression of sizes that is no whole number (`t / 3`, `0.5 * t`, `sqrt(t)`), as fp32 of one element."""
        kind, out = type(e).__name__, Out((1,), torch.float32)
        if e.is_number:
            return self.constant(torch.tensor([float(e)]), "scalar")
        if kind == "ToFloat" or e.is_integer:
            whole = self.size(e.args[0] if kind == "ToFloat" else e)
            return cast(ir.Value, self.op("Cast", whole, to=int(TYPES[torch.float32]), out=out))
        if kind in FRACTION_OPS:
            first, *others = (self.fraction(a) for a in e.args)
            for other in others:
                first = self.op(FRACTION_OPS[kind], first, other, out=out)
            return first if others else cast(ir.Value, self.op(FRACTION_OPS[kind], first, out=out))
        raise Untranslated({f"size expression {e} ({kind})"})

    def _reduce(self, kind: str, terms: list[sympy.Expr]) -> ir.Value:
        values = [self.size(t) for t in terms]
        total = values[0]
        for value in values[1:]:
            total = self.op(kind, total, value, out=Out((1,), torch.int64))
        return total

    def size_scalar(self, size: Size) -> ir.Value:
        """A size as an int64 tensor without dimensions."""
        if isinstance(size, int) or size.is_Integer:
            return self.scalar(int(size), torch.int64)
        if size not in self._scalars:
            self._scalars[size] = self.op("Squeeze", self.size(size), self.ints(0), out=Out((), torch.int64))
        return self._scalars[size]

    def shape_value(self, sizes: Sequence[Size]) -> ir.Value:
        """Several sizes as one int64 tensor."""
        if all(isinstance(s, int) or s.is_Integer for s in sizes):
            return self.ints(*(int(s) for s in sizes))
        parts = [self.size(s) for s in sizes]
        return cast(ir.Value, self.op("Concat", *parts, axis=0, out=Out((len(sizes),), torch.int64)))

    # --- what many emitters share ---

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if x.constant is not None:
            return self.fixed(x.constant.to(dtype))
        out = Out(x.shape, dtype)
        return Tensor(self, x.shape, dtype, emitted=self.op("Cast", x.value, to=int(TYPES[dtype]), out=out))

    def fixed(self, tensor: torch.Tensor) -> Tensor:
        return Tensor(self, tuple(tensor.shape), tensor.dtype, constant=tensor)

    def reshape(self, x: ir.Value, before: Sequence[Size], out: Out) -> ir.Value:
        """Reshape with as few computed sizes as possible: kept ones are 0, one unknown is -1."""
        after = list(out.shape)
        if list(before) == after:
            return x
        plan = [
            d if isinstance(d, int) else 0 if i < len(before) and before[i] == d else None for i, d in enumerate(after)
        ]
        unknown = [i for i, d in enumerate(plan) if d is None]
        if len(unknown) == 1 and not any(d == 0 and isinstance(after[i], int) for i, d in enumerate(plan)):
            plan[unknown[0]] = -1
            unknown = []
        if unknown:
            allowzero = 1 if self.empties else None  # a computed zero is a size, where it could mean "as it was"
            return cast(ir.Value, self.op("Reshape", x, self.shape_value(after), out=out, allowzero=allowzero))
        return cast(ir.Value, self.op("Reshape", x, self.ints(*cast(list[int], plan)), out=out))


SIZE_OPS = {
    "Add": "Add",
    "Mul": "Mul",
    "FloorDiv": "Div",
    "CleanDiv": "Div",
    "Mod": "Mod",
    "PythonMod": "Mod",
    "Max": "Max",
    "Min": "Min",
}


FRACTION_OPS = {
    "Add": "Add",
    "Mul": "Mul",
    "Pow": "Pow",
    "FloatPow": "Pow",
    "PowByNatural": "Pow",
    "IntTrueDiv": "Div",
    "FloatTrueDiv": "Div",
    "OpaqueUnaryFn_sqrt": "Sqrt",
}
ROUNDINGS = {"TruncToInt": "Floor", "FloorToInt": "Floor", "CeilToInt": "Ceil", "RoundToInt": "Round"}


def raw_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor as NumPy, bf16 as ml_dtypes' type."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def size_of_symint(size: Any) -> Size:
    if isinstance(size, int | float):
        return cast(Size, size)
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def out_of(value: Any) -> Out | tuple[Out, ...] | None:
    if isinstance(value, torch.Tensor):
        return Out(tuple(size_of_symint(d) for d in value.shape), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(cast(Out, out_of(v)) for v in value)
    return None


def scope_of(node: FxNode) -> str:
    """The path of the module that the node was traced in: `down_blocks.0.resnets.1.conv1`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values()))), "")
    return path.replace("L['self']", "").lstrip(".").split("@")[0]


class Translator:
    """Walks the torch graph once. `weight(name, shape, dtype)` gives the initializer's tensor for a parameter."""

    def __init__(
        self,
        traced: Traced,
        component: Component,
        opset: int,
        weight: Callable[[str, tuple[int, ...], torch.dtype], ir.TensorProtocol],
    ) -> None:
        from .emitters import EMITTERS, IGNORED
        from .kernel_emitters import KERNEL_EMITTERS

        self.traced, self.component, self.weight = traced, component, weight
        self.graph = Builder(
            opset,
            empties=any(axis.min == 0 for axis in component.axes.values()),
            reserved=(*(spec.name for spec in component.inputs), *component.outputs),
        )
        self.emitters: Mapping[str, Any] = ChainMap(cast(Any, EMITTERS), cast(Any, KERNEL_EMITTERS))
        self.ignored = IGNORED
        self.checkpoint_names = set(traced.module.state_dict())
        self.env: dict[FxNode, Any] = {}
        self.region = ""  # the inlined regions that the walk is in: their nodes have names of their own
        self.inputs: list[ir.Value] = []

    def run(self) -> ir.Model:
        program = self.traced.program
        missing = {described(n) for n in all_nodes(program.graph_module) if not self.served(n)}
        if missing:
            raise Untranslated(missing)
        self.placeholders()
        outputs = self.walk(program.graph_module)
        return self.model(outputs)

    def served(self, node: FxNode) -> bool:
        if node.op != "call_function" or isinstance(node.meta.get("val"), SYMBOLIC):
            return True
        name = str(node.target)
        if name in self.emitters and writes_a_view(node):
            return False
        return (
            node.target is operator.getitem
            or name in self.ignored
            or self.emitters.get(name) is not None
            or (name.startswith("wrap_with") and not is_autocast(node))
            or foldable(node)
        )

    # --- inputs ---

    def placeholders(self) -> None:
        program = self.traced.program
        signature = program.graph_signature
        specs = iter(self.component.inputs)
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in program.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if node.name in names:
                self.env[node] = self.stored(names[node.name], value)
                continue
            spec = next(specs)
            out = cast(Out, out_of(value))
            self.name_sizes(spec, out.shape)
            graph_input = ir.Value(name=spec.name)
            self.graph.describe(graph_input, out)
            self.inputs.append(graph_input)
            self.env[node] = Tensor(self.graph, out.shape, out.dtype, emitted=graph_input)
        self.size_roots()

    def name_sizes(self, spec: TensorSpec, shape: tuple[Size, ...]) -> None:
        """Lets sizes be written in the words of the axes (`height/8`) rather than in torch's symbols (`8*s53`)."""
        for dim, size in zip(spec.shape, shape, strict=True):
            if isinstance(dim, int):
                continue
            axes = [self.component.axes[name] for name, _ in dim_terms(dim)]
            if isinstance(size, int):
                if not all(axis.static for axis in axes):
                    raise GateError(
                        f"{spec.name}: the model takes {dim} at the traced size only",
                        got=size,
                        expected=", ".join(f"{a.name}={a}" for a in axes),
                        mend=f"make it static: --axis {axes[0].name}={size}",
                    )
            elif len(axes) == 1 and len(size.free_symbols) == 1:
                (symbol,) = size.free_symbols
                self.graph.words.setdefault(symbol, sympy.Symbol(axes[0].name, integer=True) / axes[0].step)
            elif size.is_Symbol:
                self.graph.words.setdefault(size, sympy.Symbol(dim, integer=True))

    def stored(self, name: str, value: torch.Tensor) -> Tensor:
        """A buffer or lifted constant is known now; a parameter is only named."""
        program = self.traced.program
        real = self.traced.constants.get(name)
        persistent = name in self.checkpoint_names
        if real is None and name in program.constants and program.constants[name].device.type != "meta":
            real = program.constants[name]
        if real is not None and not persistent:
            return self.graph.fixed(real.detach())
        if value.numel() == 0:
            return self.graph.fixed(torch.empty(tuple(value.shape), dtype=value.dtype))
        if name not in program.state_dict:
            raise InternalError(f"{name} has no value: it was made from meta tensors inside forward")
        shape = tuple(int(d) for d in value.shape)
        tensor = self.weight(name, shape, value.dtype)
        return Tensor(self.graph, shape, value.dtype, emitted=self.graph.initializer(self.graph.unique(name), tensor))

    def size_roots(self) -> None:
        """Each varying size of an input is one Shape node; a symbol that is no size itself is divided out of one."""
        self.graph.scope = "sizes"
        pending: list[tuple[sympy.Symbol, sympy.Expr, int]] = []
        for value, tensor in zip(self.inputs, (t for t in self.env.values() if t.emitted in self.inputs), strict=True):
            for i, size in enumerate(tensor.shape):
                if isinstance(size, int):
                    continue
                self.graph.know_size(
                    size,
                    lambda v=value, i=i: self.graph.op(  # type: ignore[misc]
                        "Shape", v, start=i, end=i + 1, out=Out((1,), torch.int64)
                    ),
                )
                if not size.is_Symbol and len(size.free_symbols) == 1:
                    factor, (symbol,) = size.as_coeff_Mul()[0], size.free_symbols
                    if size == factor * symbol:
                        pending.append((symbol, size, int(factor)))
        for symbol, size, factor in pending:
            self.graph.know_size(
                symbol,
                lambda s=size, f=factor: self.graph.op(  # type: ignore[misc]
                    "Div", self.graph.size(s), self.graph.ints(f), out=Out((1,), torch.int64)
                ),
            )

    # --- the walk ---

    def walk(self, module: torch.fx.GraphModule) -> Any:
        for node in module.graph.nodes:
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], lambda n: self.env[n])
            if node.op == "call_function":
                self.env[node] = self.call(node, module)
            elif node.op == "get_attr":
                self.env[node] = self.attribute(module, str(node.target))
        return ()

    def attribute(self, module: torch.fx.GraphModule, target: str) -> Any:
        found: Any = module
        for part in target.split("."):
            found = getattr(found, part)
        return self.graph.fixed(found.detach()) if isinstance(found, torch.Tensor) else found

    def call(self, node: FxNode, module: torch.fx.GraphModule) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return size_of_symint(value)
        name = str(node.target)
        if isinstance(value, SYMBOLIC) or name in self.ignored:
            return value
        if name.startswith("wrap_with"):
            return self.inline(node)
        args, kwargs = cast(Any, torch.fx.map_arg(cast(Any, (node.args, node.kwargs)), lambda n: self.env[n]))
        if node.target is operator.getitem:
            return args[0][args[1]]
        self.graph.scope, self.graph.origin = scope_of(node), self.region + node.name
        folded = self.fold(node, args, kwargs)
        if folded is not None:
            return folded
        out = out_of(value)
        if name not in self.emitters:  # it could have been computed from constants, and was not
            raise Untranslated({name})
        if isinstance(out, Out) and out.dtype not in TYPES:
            raise Untranslated({f"{name} of {str(out.dtype).removeprefix('torch.')} numbers"})
        try:
            result = self.wrap(self.emitters[name](self.graph, out, *args, **kwargs), out)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            raise InternalError(f"the emitter of {name} failed in {self.graph.scope or 'the forward'}: {e}") from e
        if cast(Any, node.target)._schema.is_mutable:
            self.env[cast(FxNode, node.args[0])] = result  # whoever reads it from here on sees the change
        return result

    def wrap(self, result: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return tuple(self.wrap(r, o) for r, o in zip(result, out, strict=False))
        if isinstance(result, Tensor):
            return result
        if result.shape is None:
            self.graph.describe(result, out)
        return Tensor(self.graph, out.shape, out.dtype, emitted=result)

    def inline(self, node: FxNode) -> Any:
        """`no_grad` and `autocast(enabled=False)` regions hold their nodes in a module of their own."""
        position = next(
            i
            for i, a in enumerate(node.args)
            if isinstance(a, FxNode) and a.op == "get_attr" and isinstance(self.env[a], torch.fx.GraphModule)
        )
        body = self.env[cast(FxNode, node.args[position])]
        for inner, outer in zip(body.graph.find_nodes(op="placeholder"), node.args[position + 1 :], strict=True):
            self.env[inner] = self.env[outer] if isinstance(outer, FxNode) else outer
        before, self.region = self.region, f"{self.region}{node.args[position]}/"
        try:
            return self.walk(body)
        finally:
            self.region = before

    def fold(self, node: FxNode, args: Any, kwargs: Any) -> Any:
        """torch computes it now if nothing in it depends on an input, and the result is not huge."""
        out = node.meta.get("val")
        if not isinstance(out, torch.Tensor) or not foldable(node):
            return None
        if any(not isinstance(d, int) for d in out.shape) or out.numel() > MOST_FOLDED:
            return None
        flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        if any(isinstance(a, sympy.Expr) or (isinstance(a, Tensor) and a.constant is None) for a in flat):
            return None
        real = [
            a.constant if isinstance(a, Tensor) else torch.device("cpu") if isinstance(a, torch.device) else a
            for a in flat
        ]
        args, kwargs = torch.utils._pytree.tree_unflatten(real, spec)
        return self.graph.fixed(cast(Any, node.target)(*args, **kwargs))

    # --- the result ---

    def model(self, outputs: Any) -> ir.Model:
        graph_outputs, seen = [], set()
        specs = self.traced.program.graph_signature.output_specs  # decomposition adds what the forward wrote into
        own = [t for t, spec in zip(outputs, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
        if len(own) != len(self.component.outputs):
            raise GateError(
                f"{self.component.name}: its forward gives other outputs than are named",
                got=f"{len(own)} tensors",
                expected=", ".join(self.component.outputs),
                mend="return a flat tuple, one tensor for each name",
            )
        for name, tensor in zip(self.component.outputs, own, strict=True):
            value = tensor.value
            if value in seen or value in self.inputs or value.is_initializer() or value.producer() is None:
                self.graph.scope = ""
                value = self.graph.op("Identity", value, out=Out(tensor.shape, tensor.dtype))
            seen.add(value)
            value.name = name
            graph_outputs.append(value)
        graph = ir.Graph(
            self.inputs,
            graph_outputs,
            nodes=self.graph.nodes,
            initializers=list(self.graph.initializers.values()),
            opset_imports={"": self.graph.opset},
            name=self.component.name,
        )
        ir_version = 10 if self.graph.opset < 23 else 11
        return ir.Model(graph, ir_version=ir_version, producer_name="optimize")


def all_nodes(module: torch.fx.GraphModule) -> Iterator[FxNode]:
    for node in module.graph.nodes:
        yield node
        if node.op == "get_attr":
            inner = getattr(module, str(node.target), None)
            if isinstance(inner, torch.fx.GraphModule):
                yield from all_nodes(inner)


def is_autocast(node: FxNode) -> bool:
    """A region that `torch.autocast` rewrites while it runs: its graph does not show the types that it computes in."""
    return str(node.target) == "wrap_with_autocast" and bool(node.args[2])


def described(node: FxNode) -> str:
    """The operator's name; a region of autocast by the words that a user knows it by."""
    if is_autocast(node):
        return f"torch.autocast({node.args[0]!r}, {node.args[1]}) inside a forward: choose the type with --precision"
    return str(node.target)


def writes_a_view(node: FxNode) -> bool:
    """An in-place operator on memory that another name may see: torch's functionalization has to sort that out."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or str(node.target) == "aten.detach_.default":
        return False
    written = cast(FxNode, node.args[0])
    aliases = [written, *written.users]
    if written.target is operator.getitem:  # a piece of split, chunk or unbind
        aliases.append(cast(FxNode, written.args[0]))
    return any(a is not node and getattr(a.target, "is_view", False) for a in aliases)


def foldable(node: FxNode) -> bool:
    """A pure aten operator: the same inputs always give the same output."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and "empty" not in target._schema.name
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
    )


def translate(
    traced: Traced,
    component: Component,
    opset: int,
    weight: Callable[[str, tuple[int, ...], torch.dtype], ir.TensorProtocol],
) -> ir.Model:
    """The ONNX graph of a traced component. Raises Untranslated where an operator stays unknown after decomposition."""
    return translation(traced, component, opset, weight)[0]


def translation(
    traced: Traced,
    component: Component,
    opset: int,
    weight: Callable[[str, tuple[int, ...], torch.dtype], ir.TensorProtocol],
) -> tuple[ir.Model, Traced]:
    """The ONNX graph, and the program whose nodes it names: the traced one, decomposed as far as was needed."""
    for _ in range(8):  # each round decomposes what the one before it met
        try:
            return Translator(traced, component, opset, weight).run(), traced
        except Untranslated as e:
            smaller = decomposed(traced, e.operators)
            if smaller is None:
                raise
            traced = smaller
    return Translator(traced, component, opset, weight).run(), traced


def decomposed(traced: Traced, operators: set[str]) -> Traced | None:
    """The same program with these operators, and no others, written in simpler ones; None where torch has no way."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    known = {str(op): op for op in all_overloads(traced.program.graph_module)}
    targets = [known[name] for name in operators if name in known]
    table = {op: fn for op, fn in core_aten_decompositions().items() if op in targets}
    table.update(get_decompositions([op for op in targets if op not in table]))
    mutable = any(op._schema.is_mutable for op in targets)
    composite = any(op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd) for op in targets)
    if not table and not mutable and not composite:
        return None
    try:
        with torch.no_grad():
            program = traced.program.run_decompositions(table)
    except Exception as e:  # torch raises many kinds here; each means that it cannot write them in simpler ones
        raise Untranslated(operators) from e
    return replace(traced, program=program)


def all_overloads(module: torch.fx.GraphModule) -> Iterator[Any]:
    return (n.target for n in all_nodes(module) if isinstance(n.target, torch._ops.OpOverload))


def full_shape(shape: Sequence[Size]) -> int | None:
    """Number of elements, where it is fixed."""
    return math.prod(cast(Sequence[int], shape)) if all(isinstance(d, int) for d in shape) else None
