"""What stays in fp32 inside a 16-bit graph: as few nodes and casts as the probe's figures and the user's words allow.

Rules, referred to by number below:

1. A value that the probe saw above `LIMIT` is fp32: what makes it and what reads it computes in fp32. So is one whose
   numbers are so small that fp16 would lose them, where that shows in what is made of it.
2. A value that depends on masks, ids and constants alone is the same in every run: it may go up to fp16's end.
3. A score under a mask is judged without the mask: softmax makes nothing of what a mask closes.
4. Attention whose scores, which it keeps to itself, pass the limit computes in fp32.
5. A bias is added where its product is made: between the two eager rounds nothing either.
6. Cheap nodes between two islands join them where that saves casts.
7. A weight is a value like others, but known: it may go up to fp16's end. One that fp32 nodes alone read is stored in
   fp32.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import onnx_ir as ir

from optimize.compile.emulate import NARROW
from optimize.compile.external import INLINE_BYTES, WeightTensor
from optimize.compile.translate import ORIGIN
from optimize.errors import InputError

from .probe import INFINITE, LIMIT, SCORES, Range

FLOAT = ir.DataType.FLOAT
HEAVY = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "Einsum"})
"""In fp32 these cost far more than a cast: none becomes fp32 to save one."""
SIZES = frozenset({"Shape", "Size"})
"""They read no numbers."""


@dataclass(frozen=True)
class Kept:
    """A node that stays in fp32: why, and the magnitude that decided it, where one did."""

    node: str
    module: str
    why: str
    figure: float | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


Islands = dict[ir.Node, Kept]


def module_of(node: ir.Node) -> str:
    """The path of the torch module: a node is named `path/Operator`."""
    return str(node.name).rpartition("/")[0]


def matches(pattern: str, node: str, module: str) -> bool:
    """Whether a pattern of the user means this node: by its name, its module's path, or a module above that."""
    parts = module.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(name, pattern) for name in (node, *paths))


def check_patterns(patterns: Sequence[str], modules: Iterable[str]) -> None:
    """Raises InputError for a pattern that no module's path matches. Of a node's name only the module's part is known
    before the graph is."""
    known = [m for m in modules if m]
    for pattern in patterns:
        path = pattern.rpartition("/")[0] or pattern
        if any(fnmatch.fnmatchcase(m, path) for m in known):
            continue
        near = difflib.get_close_matches(path.strip("*"), known, 3, 0.3)
        raise InputError(
            f"no module matches {pattern}",
            got=f"--keep-fp32 {pattern}",
            expected="a module's path, a node's name or a pattern of one"
            + (f", such as {', '.join(near)}" if near else ""),
            mend="`optimize inspect` shows the names of an exported graph",
        )


def check_nodes(patterns: Sequence[str], model: ir.Model) -> None:
    """Raises InputError for a node's name that this graph does not have, though it has its module."""
    names = [str(node.name) for node in model.graph]
    modules = {module_of(node) for node in model.graph}
    for pattern in patterns:
        path, is_node, _ = pattern.rpartition("/")
        if is_node and path in modules and not any(matches(pattern, name, "") for name in names):
            raise InputError(
                f"{path} has no node {pattern}",
                got=f"--keep-fp32 {pattern}",
                expected=", ".join(name for name in names if name.startswith(f"{path}/")),
                mend="name one of these, or the module",
            )


# --- which nodes -----------------------------------------------------------------------------------------------------


class Plan:
    """Which nodes of a graph compute in fp32. `narrow` is the graph's 16-bit type."""

    def __init__(self, model: ir.Model, precision: str) -> None:
        self.graph, self.narrow = model.graph, NARROW[precision]
        self.order = list(model.graph)
        self.kept: Islands = {}

    def is_narrow(self, value: ir.Value | None) -> bool:
        return value is not None and value.dtype == self.narrow

    def computes(self, node: ir.Node) -> bool:
        """Whether the node has numbers in the 16-bit type to compute with."""
        return node.op_type not in SIZES and any(map(self.is_narrow, (*node.inputs, *node.outputs)))

    def keep(self, node: ir.Node, why: str, figure: float | None = None) -> None:
        if self.computes(node):
            self.kept.setdefault(node, Kept(str(node.name), module_of(node), why, figure))

    def keep_value(self, value: ir.Value, why: str, figure: float, readers: Sequence[ir.Node] = ()) -> None:
        """Rule 1: its maker, then its readers, all or these."""
        maker = value.producer()
        if maker is not None:
            self.kept.pop(maker, None)  # that it makes such a value says more than that it reads one
            self.keep(maker, f"its output {why}", figure)
        for user in readers or dict.fromkeys(use.node for use in value.uses()):
            self.keep(user, f"it reads {value.name}, which {why}", figure)


def islands_of(
    model: ir.Model, precision: str, ranges: Mapping[str, Range], patterns: Sequence[str], weights: Mapping[str, Range]
) -> list[Kept]:
    """The nodes that are to compute in fp32, in the graph's order.

    `ranges` are the probe's and `weights` those of the weights (initializers); in bf16 both are empty.
    """
    plan = Plan(model, precision)
    for pattern in patterns:
        for node in plan.order:
            if matches(pattern, str(node.name), module_of(node)):
                plan.keep(node, f"asked for: --keep-fp32 {pattern}")
    for name, weight in weights.items():
        judge(plan, model.graph.initializers[name], weight, INFINITE, ranges)  # a weight is known: it needs no margin
    fixed = fixed_values(model, plan)
    opened = without_masks(plan, ranges, fixed)
    for node in plan.order:
        for value in filter(plan.is_narrow, node.outputs):
            seen = ranges.get(str(value.name))
            if seen is not None:
                seen = replace(seen, largest=opened[value]) if value in opened else seen
                judge(plan, value, seen, INFINITE if value in fixed else LIMIT, ranges)
        scores = ranges.get(f"{node.outputs[0].name}{SCORES}")
        if scores is not None and scores.largest > LIMIT:  # rule 4
            plan.keep(node, f"its scores reach {scores.largest:.4g}", scores.largest)
    if plan.kept:
        join_biases(plan)
        join_neighbours(plan)
    return [plan.kept[node] for node in plan.order if node in plan.kept]


def judge(plan: Plan, value: ir.Value, seen: Range, limit: float, ranges: Mapping[str, Range]) -> None:
    """Rule 1 for one value."""
    if seen.largest > limit:
        plan.keep_value(value, f"reaches {seen.largest:.4g}", seen.largest)
    elif seen.lost and (readers := readers_of_small(value, ranges)):
        plan.keep_value(value, f"is about {seen.rms:.2g}, too small for fp16", seen.rms, readers)


SUMS = frozenset({"Add", "Sub", "Sum"})
BIASED = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "LayerNormalization", "GroupNormalization", "InstanceNormalization"}
)


def readers_of_small(value: ir.Value, ranges: Mapping[str, Range]) -> list[ir.Node]:
    """Who would notice that fp16 keeps little of a small value: not a sum with larger numbers, and not what makes of it
    another small value that nobody would miss."""

    def notices(use: Any) -> bool:
        if use.node.op_type in SUMS or (use.node.op_type in BIASED and use.idx == 2):
            return False
        return any(not lost(v) or v.is_graph_output() or readers_of_small(v, ranges) for v in use.node.outputs)

    def lost(made: ir.Value) -> bool:
        seen = ranges.get(str(made.name))
        return seen is not None and seen.lost

    return list(dict.fromkeys(use.node for use in value.uses() if notices(use)))


def fixed_values(model: ir.Model, plan: Plan) -> set[ir.Value]:
    """Rule 2: what is computed from integers, bools and constants alone. Weights are no constants here."""
    fixed = {v for v in model.graph.inputs if v.dtype is not None and not v.dtype.is_floating_point()}
    fixed |= {v for v in model.graph.initializers.values() if not isinstance(v.const_value, WeightTensor)}
    for node in plan.order:
        numbers = node.inputs[1:] if node.op_type == "Where" else node.inputs  # whichever is chosen is fixed
        if all(v in fixed for v in numbers if v is not None) or node.op_type in SIZES:
            fixed |= set(node.outputs)
    return fixed


MOVES = frozenset({"Cast", "Expand", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def without_masks(plan: Plan, ranges: Mapping[str, Range], fixed: set[ir.Value]) -> dict[ir.Value, float]:
    """Rule 3: values that a mask is added to or chosen over, and how large they are where it is open. A fixed operand
    (which the mask is, or comes with) counts nothing."""
    found: dict[ir.Value, float] = {}
    closing: dict[ir.Value, bool] = {}
    for node in plan.order:
        out = node.outputs[0]
        masks = node.op_type in ("Add", "Where") and out not in fixed and any(v in fixed for v in node.inputs)
        carries = node.op_type in ("Add", "Where", *MOVES) and any(v in found for v in node.inputs)
        if (masks or carries) and is_closed(out, closing):
            parts = [found.get(v, size_of(v, ranges)) for v in node.inputs if v is not None and v not in fixed]
            found[out] = sum(parts) if node.op_type == "Add" else max(parts, default=0.0)
    return found


def size_of(value: ir.Value, ranges: Mapping[str, Range]) -> float:
    seen = ranges.get(str(value.name))
    return seen.largest if seen else 0.0


def is_closed(value: ir.Value, known: dict[ir.Value, bool]) -> bool:
    """Whether all that becomes of the value is the input of a softmax, Attention's own among them."""
    if value not in known:
        known[value] = not value.is_graph_output() and all(
            use.node.op_type == "Softmax"
            or ("Attention" in use.node.op_type and use.idx == 3)
            or (use.node.op_type in ("Add", "Where", *MOVES) and is_closed(use.node.outputs[0], known))
            for use in value.uses()
        )
    return known[value]


def join_biases(plan: Plan) -> None:
    """Rule 5."""
    for node in [n for n in plan.kept if n.op_type == "Add"]:
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            same = maker is not None and maker.metadata_props.get(ORIGIN) == node.metadata_props.get(ORIGIN)
            if maker is not None and same and maker.op_type == "MatMul":
                plan.keep(maker, f"its bias is added in fp32, in {node.name}")


def join_neighbours(plan: Plan) -> None:
    """Rule 6: of the cheap nodes below one island and above another, each connected group that saves casts."""
    cheap = [
        n for n in plan.order if n not in plan.kept and n.op_type not in HEAVY and not n.domain and plan.computes(n)
    ]
    below, above = set(plan.kept), set(plan.kept)
    for node in cheap:
        if any(v.producer() in below for v in node.inputs if plan.is_narrow(v) and v is not None):
            below.add(node)
    for node in reversed(cheap):
        if any(use.node in above for v in node.outputs if plan.is_narrow(v) for use in v.uses()):
            above.add(node)
    for group in groups_of([n for n in cheap if n in below and n in above], plan):
        if casts(plan, {*plan.kept, *group}, group) < casts(plan, set(plan.kept), group):
            for node in group:
                plan.keep(node, "between nodes in fp32: that takes fewer casts")


def groups_of(nodes: Sequence[ir.Node], plan: Plan) -> Iterator[set[ir.Node]]:
    """Nodes that pass 16-bit values to one another."""
    left = dict.fromkeys(nodes)
    while left:
        waiting, group = [next(iter(left))], set[ir.Node]()
        while waiting:
            node = waiting.pop()
            if node not in left:
                continue
            del left[node]
            group.add(node)
            waiting += [use.node for v in node.outputs if plan.is_narrow(v) for use in v.uses()]
            waiting += [
                m for v in node.inputs if v is not None and plan.is_narrow(v) if (m := v.producer()) is not None
            ]
        yield group


def casts(plan: Plan, kept: set[ir.Node], around: Iterable[ir.Node]) -> int:
    """How many casts the values that these nodes read and make take, with `kept` in fp32."""
    values = {v for n in around for v in (*n.inputs, *n.outputs) if v is not None and plan.is_narrow(v)}
    return sum(crosses(v, kept) for v in values if v.const_value is None)


def crosses(value: ir.Value, kept: set[ir.Node]) -> bool:
    made = value.producer() in kept
    leaves = made and value.is_graph_output()
    return leaves or any((use.node in kept) != made for use in value.uses() if use.node.op_type not in SIZES)


# --- the graph with them ---------------------------------------------------------------------------------------------


def widen(model: ir.Model, precision: str, kept: Iterable[Kept], ranges: Mapping[str, Range]) -> None:
    """Makes these nodes compute in fp32, in place: casts only where a value passes between them and the others.

    An output of the graph that fp16 cannot hold becomes fp32; the others keep their type.
    """
    plan = Plan(model, precision)
    names = {k.node for k in kept}
    inside = {node for node in plan.order if str(node.name) in names}
    up: dict[ir.Value, ir.Value] = {}
    for node in plan.order:
        if node not in inside:
            continue
        for i, value in enumerate(node.inputs):
            if value is not None and plan.is_narrow(value) and value.producer() not in inside:
                if value not in up:
                    up[value] = in_fp32(plan, value, inside)
                node.replace_input_with(i, up[value])
    for node in plan.order:
        if node in inside:
            for value in [v for v in node.outputs if plan.is_narrow(v)]:
                seen = ranges.get(str(value.name))
                value.type = ir.TensorType(FLOAT)  # a new one: values share their types
                hand_down(plan, node, value, inside, fits=seen is None or seen.largest <= LIMIT)
            if node.op_type == "Cast" and node.attributes["to"].value == int(plan.narrow):
                node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
    for node in [n for n in inside if n.op_type == "Cast"]:
        source, made = node.inputs[0], node.outputs[0]
        if source is not None and source.dtype == made.dtype and not made.is_graph_output():
            made.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def in_fp32(plan: Plan, value: ir.Value, inside: set[ir.Node]) -> ir.Value:
    """The fp32 form of a value that 16-bit nodes or nobody make, for the nodes inside. Rule 7 for weights."""
    constant, maker = value.const_value, value.producer()
    if constant is not None and maker is None and not value.is_graph_input():
        alone = all(use.node in inside for use in value.uses()) and not value.is_graph_output()
        if alone or constant.nbytes < INLINE_BYTES:
            wide = wide_tensor(constant)
            name = str(value.name) if alone else f"{value.name}.fp32"
            made = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=value.shape, const_value=wide)
            if alone:
                del plan.graph.initializers[name]
            plan.graph.register_initializer(made)
            return made
    up = ir.node("Cast", [value], {"to": int(FLOAT)}, name=f"{value.name}/widened")
    up.outputs[0].name, up.outputs[0].type, up.outputs[0].shape = up.name, ir.TensorType(FLOAT), value.shape
    if maker is None:
        plan.graph.insert_before(plan.graph[0], up)
    else:
        plan.graph.insert_after(maker, up)
    return up.outputs[0]


def wide_tensor(tensor: Any) -> Any:
    """A constant in fp32: a weight from its source, unrounded."""
    import torch

    if isinstance(tensor, WeightTensor):
        return WeightTensor(replace(tensor.recipe, dtype=torch.float32), tensor.weights)
    return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)


def hand_down(plan: Plan, node: ir.Node, value: ir.Value, inside: set[ir.Node], *, fits: bool) -> None:
    """Gives the 16-bit readers of an fp32 value its 16-bit form; an output of the graph too, where that `fits`."""
    readers = [use for use in value.uses() if use.node not in inside and use.node.op_type not in SIZES]
    narrows = value.is_graph_output() and fits
    if not readers and not narrows:
        return
    down = ir.node("Cast", [value], {"to": int(plan.narrow)}, name=f"{value.name}/narrowed")
    made = down.outputs[0]
    made.name, made.type, made.shape = str(down.name), ir.TensorType(plan.narrow), value.shape
    plan.graph.insert_after(node, down)
    for use in readers:
        use.node.replace_input_with(use.idx, made)
    if narrows:
        plan.graph.outputs[plan.graph.outputs.index(value)] = made
        value.name, made.name = f"{value.name}/wide", str(value.name)
