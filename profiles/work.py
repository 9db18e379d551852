"""What one run computes and moves, counted from an ONNX graph at given sizes, node by node; nothing is run.

The conventions stand in `HOW`, so that every record says what its figures are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.kernels.functions import DOMAIN

from .counts import CONSTANT_READS, COUNTS, PART_READS, PRODUCTS, attributes_of, operations
from .schema import Work
from .sizes import NOTHING, TYPES, Tensor, tensors_of

if TYPE_CHECKING:
    import onnx

HOW = (
    "from the graph: a multiply-add is two operations, biases and masks are not counted, causal attention is counted "
    "whole; bytes are the least that must move (each weight once, inputs and outputs of the component), unfused_bytes "
    "what moves when every node reads its inputs and writes its output"
)
FEW = frozenset({"int8", "fp8", "fp4", "int4"})


@dataclass(frozen=True)
class NodeWork:
    """One node. `module` is the torch module's path, `operator` the kind of work, `op` ONNX's (or torch's) operator.

    `bytes` is all that it reads and writes, its weights too, with nothing fused. `dtype` is the type that it computes
    in: a product of quantized inputs is int8 or fp8, whatever the type of its result. `reads`, `writes` and `weights`
    have the bytes of each value by name, `types` its type; views and dequantized values stand under the name of what
    they are made of.
    """

    node: str
    module: str
    operator: str
    op: str
    flops: float
    bytes: float
    weight_bytes: float
    dtype: str
    reads: Mapping[str, float] = field(default_factory=dict)
    writes: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphWork:
    """All nodes in order, and their sum. `outputs` names the component's outputs as `NodeWork.writes` does."""

    nodes: tuple[NodeWork, ...]
    total: Work
    outputs: frozenset[str] = frozenset()

    def by_module(self) -> dict[str, tuple[float, float]]:
        """Operations and unfused bytes of each module, the heaviest first."""
        found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for n in self.nodes:
            flops, moved = found[n.module]
            found[n.module] = flops + n.flops, moved + n.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def work_of(path: Path, sizes: Mapping[str, int]) -> GraphWork:
    """Counts the graph at `path` with a size for each axis. Its weights' data are not read.

    Raises InputError where an input's size is not given.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    return counted(model, tensors_of(model, sizes))


def counted(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> GraphWork:
    counting = Counting(model, tensors)
    nodes = tuple(w for n in model.graph.node if (w := counting.node(n)) is not None)
    roots = {counting.root(o.name) for o in model.graph.output}
    inputs = {counting.root(i.name): counting.tensor(i.name).bytes for i in model.graph.input}
    moved = sum(b for name, b in inputs.items() if name not in counting.constants)
    moved += sum(counting.tensor(o.name).bytes for o in model.graph.output)
    return GraphWork(nodes, total(nodes, moved, counting.how()), frozenset(roots))


def total(nodes: Sequence[NodeWork], moved: float, how: str) -> Work:
    """The sum of nodes; `moved` are the bytes of the component's inputs and outputs."""
    weights = {name: size for n in nodes for name, size in n.weights.items()}
    flops: Counter[str] = Counter()
    for n in nodes:
        flops[n.dtype] += n.flops  # type: ignore[assignment]  # Counter counts floats as well
    weight_bytes = sum(weights.values())
    return Work(
        flops=sum(flops.values()),
        bytes=weight_bytes + moved,
        weight_bytes=weight_bytes,
        how=how,
        unfused_bytes=sum(n.bytes for n in nodes),
        flops_by_type={k: float(v) for k, v in flops.items() if v},
    )


class Counting:
    """The state while a graph is walked: `alias` leads from a view or a dequantized value to what it is made of,
    `constants` are weights and what depends on them alone (a runtime computes it once)."""

    def __init__(self, model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.constants = {t.name for t in model.graph.initializer}
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.opsets = list(model.opset_import)
        self.alias: dict[str, str] = {}
        self.scales: dict[str, float] = {}  # bytes that come with a quantized weight
        self.unknown: list[str] = []

    def tensor(self, name: str) -> Tensor:
        return self.tensors.get(name, NOTHING)

    def root(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def how(self) -> str:
        if not self.unknown:
            return HOW
        shown = ", ".join(self.unknown[:8]) + (" ..." if len(self.unknown) > 8 else "")
        return f"{HOW}; counted as nothing, because shapes or operators are not known: {shown}"

    def node(self, node: onnx.NodeProto) -> NodeWork | None:
        """The work of a node; None for views, constants, and what a runtime folds."""
        inputs = [i for i in node.input if i]
        if all(self.root(i) in self.constants for i in inputs):  # or there are none
            self.fold(node)
            return None
        kind, flops = self.flops(node)
        if kind == "view" or (node.op_type == "DequantizeLinear" and kind == "quantize"):
            self.alias |= {node.output[0]: node.input[0]} if node.op_type not in CONSTANT_READS else {}
            return None
        if flops is None:
            self.unknown.append(f"{node.name or node.output[0]} ({node.op_type})")
        return self.work(node, kind, flops or 0.0)

    def fold(self, node: onnx.NodeProto) -> None:
        """A dequantized weight is its few bits; anything else that is made of constants is a weight of its own."""
        dequantized = node.op_type == "DequantizeLinear"
        for output in filter(None, node.output):
            if node.input and (dequantized or COUNTS.get(node.op_type, ("",))[0] == "view"):
                self.alias[output] = node.input[0]
                self.scales[node.input[0]] = sum(self.tensor(i).bytes for i in node.input[1:]) if dequantized else 0.0
            else:
                self.constants.add(output)

    def flops(self, node: onnx.NodeProto) -> tuple[str, float | None]:
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            return self.of_function(node, function)
        ins = [self.tensor(i) for i in node.input]
        if ins and node.output and self.tensor(node.output[0]).shape is None:
            self.infer(node, ins)
        outs = [self.tensor(o) for o in node.output]
        return operations(node.op_type, ins, outs, attributes_of(node))

    def infer(self, node: onnx.NodeProto, ins: Sequence[Tensor]) -> None:
        """Where ONNX's inference gives up (GroupNormalization is one): norms keep a shape, pointwise work has the
        largest of its inputs'."""
        kind = COUNTS.get(node.op_type, ("",))[0]
        if kind in ("norm", "softmax", "elementwise") and all(t.shape is not None for t in ins):
            source = ins[0] if kind != "elementwise" else max(ins, key=lambda t: t.numel)
            self.tensors[node.output[0]] = Tensor(source.dtype, source.bits, source.shape)

    def of_function(self, node: onnx.NodeProto, function: onnx.FunctionProto) -> tuple[str, float | None]:
        """A node of our own is one kernel that computes what its body says."""
        body = body_of(node, function, self)
        inner = Counting(body, tensors_of(body, {}))
        parts = [(inner.flops(n)) for n in body.graph.node]
        kinds = [k for k, _ in parts if k not in ("view", "layout")]
        flops = [f for k, f in parts if k != "view"]
        kind = next((k for k in ("attention", "norm", *kinds) if k in kinds), "elementwise")
        return kind, None if any(f is None for f in flops) else sum(f for f in flops if f is not None)

    def work(self, node: onnx.NodeProto, kind: str, flops: float) -> NodeWork:
        weights, reads = {}, {}
        written = {self.root(o): self.tensor(o).bytes for o in node.output if o}
        for i, name in enumerate(node.input):
            root = self.root(name)
            size = self.tensor(root).bytes
            if node.op_type in PART_READS and i == 0:
                size = min(size, sum(written.values()))
            if name and root in self.constants:
                weights[root] = size + self.scales.get(root, 0.0)
            elif name:
                reads[root] = size
        weight_bytes = sum(weights.values())
        return NodeWork(
            node=node.name or node.output[0],
            module=module_of(node.name),
            operator=kind,
            op=node.op_type if node.domain != DOMAIN else f"{DOMAIN}.{node.op_type}",
            flops=flops,
            bytes=weight_bytes + sum(reads.values()) + sum(written.values()),
            weight_bytes=weight_bytes,
            dtype=self.dtype(node, kind),
            reads=reads,
            writes=written,
            weights=weights,
            types={name: self.tensor(name).dtype for name in (*weights, *reads, *written)},
        )

    def dtype(self, node: onnx.NodeProto, kind: str) -> str:
        """What it computes in: few bits only where all factors are."""
        if kind not in PRODUCTS:
            return self.tensor(node.input[0] if kind == "quantize" else node.output[0]).dtype
        factors = [self.tensor(self.root(i)).dtype for i in node.input[: 3 if kind == "attention" else 2]]
        few = {"int8" if f == "int4" else f for f in factors if f in FEW}
        if len(few) == 1 and all(f in FEW for f in factors):
            return few.pop()
        return self.tensor(node.input[0]).dtype or self.tensor(node.output[0]).dtype


def module_of(name: str) -> str:
    """The torch module in a node's name: what our files write before the first slash. "" for what only computes sizes,
    and for names of other exporters."""
    scope, slash, _ = name.partition("/")
    return scope if slash and scope != "sizes" else ""


def body_of(node: onnx.NodeProto, function: onnx.FunctionProto, outer: Counting) -> onnx.ModelProto:
    """A function's body as a graph of its own, with the node's attributes and shapes."""
    import onnx

    given = {a.name: a for a in node.attribute}
    graph = onnx.GraphProto(name=function.name)
    for inner in function.node:
        made = graph.node.add()
        made.CopyFrom(inner)
        del made.attribute[:]
        made.attribute.extend(resolved(inner.attribute, given))
    for own, name in zip(function.input, node.input, strict=False):
        graph.input.append(described(own, outer.tensor(name)))
    for own, name in zip(function.output, node.output, strict=False):
        graph.output.append(described(own, outer.tensor(name)))
    return onnx.helper.make_model(graph, opset_imports=list(function.opset_import) or outer.opsets)


def resolved(attributes: Iterable[Any], given: Mapping[str, Any]) -> Iterator[Any]:
    import onnx

    for a in attributes:
        if not a.ref_attr_name:
            yield a
        elif a.ref_attr_name in given:
            found = onnx.AttributeProto()
            found.CopyFrom(given[a.ref_attr_name])
            found.name = a.name
            yield found


def described(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
    import onnx

    kind = next((k for k, v in TYPES.items() if v == (tensor.dtype, tensor.bits)), "FLOAT")
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind), tensor.shape)
