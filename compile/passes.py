"""The clean-up after translation: few passes, each a rule for nodes of one operator, found through an index.

A rule looks at one node. It rewrites and returns `DONE`, or says why it did not: `NOT_MINE` where the pattern is not
there, any other text where it is but a condition does not hold. `optimize inspect` shows those texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from optimize.kernels import functions
from optimize.kernels.functions import DOMAIN

from .external import WeightTensor

DONE = ""
NOT_MINE = "not mine"


@dataclass
class PassResult:
    """What a rule did: how many nodes it rewrote, and why it declined others (`node name -> reason`)."""

    rewritten: int = 0
    declined: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    name: str
    operator: str
    apply: Callable[[ir.Graph, ir.Node], str]
    since: int = 18  # the first opset that has what the rule writes
    domain: str = ""


# --- helpers ---------------------------------------------------------------------------------------------------------


def producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of this kind that makes the value, if one does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    array = known(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def known(value: ir.Value | None) -> Any:
    """A small constant as an array, or None."""
    tensor = value.const_value if value is not None else None
    if tensor is None or isinstance(tensor, WeightTensor) or tensor.size > 64:
        return None
    return np.asarray(tensor.numpy())


def rank_of(value: ir.Value) -> int | None:
    return len(value.shape) if value.shape is not None else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def replace(graph: ir.Graph, old: ir.Node, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Node:
    """Puts a new node where `old` stands and gives it the users of `old`'s only output."""
    scope = str(old.name).rpartition("/")[0]
    new = before(graph, old, kind, inputs, scope=scope, like=old.outputs[0], **attributes)
    take_users(graph, old.outputs[0], new.outputs[0])
    return new


def take_users(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if new.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.old"


def before(
    graph: ir.Graph,
    place: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    *,
    scope: str,
    like: ir.Value | None = None,
    shape: Iterable[Any] | None = None,
    domain: str = "",
    **attributes: Any,
) -> ir.Node:
    node = ir.node(
        kind,
        list(inputs),
        {k: v for k, v in attributes.items() if v is not None},
        name=f"{scope}/{kind}" if scope else kind,
        domain=domain,
        metadata_props=dict(place.metadata_props),
    )
    value = node.outputs[0]
    value.name = f"{place.name}>{kind}{len(inputs)}" if like is None else f"{place.name}>{kind}"
    if like is not None:
        value.type, value.shape = like.type, like.shape
    if shape is not None:
        value.shape = ir.Shape(list(shape))
        value.type = inputs[0].type if inputs[0] is not None else None
    graph.insert_before(place, node)
    return node


def constant(graph: ir.Graph, array: Any, name: str) -> ir.Value:
    value = graph.initializers.get(name)
    if value is None:
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        graph.register_initializer(value)
    return value


# --- rules -----------------------------------------------------------------------------------------------------------


def fold_weight_transpose(graph: ir.Graph, node: ir.Node) -> str:
    """A transposed weight is stored transposed, unless somebody also needs it as it is (a tied embedding)."""
    value = node.inputs[0]
    tensor = value.const_value if value is not None else None
    if value is None or not isinstance(tensor, WeightTensor):
        return NOT_MINE
    perm = tuple(attribute(node, "perm", ()))
    if any(u.node.op_type != "Transpose" or tuple(attribute(u.node, "perm", ())) != perm for u in value.uses()):
        return "the weight is also used as it is stored"
    if any(u.node.outputs[0].is_graph_output() for u in value.uses()):
        return "it names an output of the graph"  # which an initializer should not be
    turned = tensor.permuted(perm)
    value.const_value, value.shape = turned, ir.Shape(turned.shape)
    for use in list(value.uses()):
        take_users(graph, use.node.outputs[0], value)
        graph.remove(use.node, safe=True)
    return DONE


def merge_transposes(graph: ir.Graph, node: ir.Node) -> str:
    first = producer(node.inputs[0], "Transpose")
    if first is None:
        return NOT_MINE
    inner, outer = attribute(first, "perm", None), attribute(node, "perm", None)
    if inner is None or outer is None:
        return "a permutation is implicit"
    perm = [inner[i] for i in outer]
    if perm == sorted(perm) and not node.outputs[0].is_graph_output():
        assert first.inputs[0] is not None
        take_users(graph, node.outputs[0], first.inputs[0])
    else:
        replace(graph, node, "Transpose", [first.inputs[0]], perm=perm)
    return DONE


def merge_reshapes(graph: ir.Graph, node: ir.Node) -> str:
    """Of two reshapes in a row only the second counts, if it reads no size of the first's result."""
    first = producer(node.inputs[0], "Reshape")
    if first is None:
        return NOT_MINE
    target = known(node.inputs[1])
    if target is not None and (target == 0).any():
        zeros = [i for i, d in enumerate(target) if d == 0]
        source, middle = first.inputs[0], first.outputs[0]
        if source is None or source.shape is None or middle.shape is None:
            return "sizes are not known"
        if any(i >= len(source.shape) or str(source.shape[i]) != str(middle.shape[i]) for i in zeros):
            return "the second copies a size that the first made"
    replace(graph, node, "Reshape", [first.inputs[0], node.inputs[1]], allowzero=attribute(node, "allowzero", None))
    return DONE


BROADCASTING = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Where",
        "Pow",
        "And",
        "Or",
        "Less",
        "Greater",
        "Equal",
        "LessOrEqual",
        "GreaterOrEqual",
        "Max",
        "Min",
    }
)


def drop_identity(graph: ir.Graph, node: ir.Node) -> str:
    """An Identity stays where it gives an output of the graph a name of its own."""
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    if out.is_graph_output():
        if source.is_graph_input() or source.is_initializer() or source.is_graph_output():
            return "it names an output of the graph"
        source.name = out.name
    out.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return DONE


def drop_expand(graph: ir.Graph, node: ir.Node) -> str:
    """An element-wise operator broadcasts by itself, where its other operand already has the full size."""
    out = node.outputs[0]
    if out.is_graph_output() or out.shape is None:
        return NOT_MINE
    full = [str(d) for d in out.shape]
    for user, _ in out.uses():
        if user.op_type not in BROADCASTING:
            return NOT_MINE
        others = [v for v in user.inputs if v is not None and v is not out and v.shape is not None]
        if not any([str(d) for d in v.shape or ()][-len(full) :] == full for v in others):
            return "no other operand has the full size"
    assert node.inputs[0] is not None
    take_users(graph, out, node.inputs[0])
    return DONE


def fuse_rms_norm(graph: ir.Graph, node: ir.Node) -> str:
    """`x * rsqrt(mean(x * x) + eps) * weight` (Zhang and Sennrich 2019), with the casts that keep it in fp32."""
    root = producer(node.inputs[0], "Sqrt")
    added = producer(root.inputs[0], "Add") if root else None
    if added is None:
        return NOT_MINE
    epsilon = number(added.inputs[1])
    mean = producer(added.inputs[0], "ReduceMean")
    mean = mean if mean is not None and attribute(mean, "keepdims", 1) else None
    squares = producer(mean.inputs[0], "Mul") if mean else None
    if epsilon is None or mean is None or squares is None or squares.inputs[0] is not squares.inputs[1]:
        return NOT_MINE
    x = squares.inputs[0]
    axes = known(mean.inputs[1])
    if x is None or rank_of(x) is None or axes is None or list(axes) not in ([-1], [len(x.shape or ()) - 1]):
        return "the mean is not over the last dimension"
    scaled = only_user(node.outputs[0])
    if scaled is None or scaled.op_type != "Mul" or x not in scaled.inputs:
        return "the reciprocal root is not multiplied with the input alone"
    return rms_norm_with_weight(graph, x, scaled, epsilon)


def rms_norm_with_weight(graph: ir.Graph, x: ir.Value, scaled: ir.Node, epsilon: float) -> str:
    """The end of the pattern: an optional cast back, then the multiplication with the weight."""
    end, source = scaled, x
    follower = only_user(scaled.outputs[0])
    cast_in = producer(x, "Cast")
    if follower is not None and follower.op_type == "Cast" and cast_in is not None:
        if cast_in.inputs[0] is None or cast_in.inputs[0].type != follower.outputs[0].type:
            return "the casts before and after do not match"
        end, source = follower, cast_in.inputs[0]
        follower = only_user(follower.outputs[0])
    weight = None
    if follower is not None and follower.op_type == "Mul":
        others = [v for v in follower.inputs if v is not end.outputs[0] and v is not None]
        if others and others[0].is_initializer() and rank_of(others[0]) == 1 and others[0].type == source.type:
            weight, end = others[0], follower
    if weight is None:
        if x.shape is None or not isinstance(x.shape[-1], int) or source.dtype is None:
            return "there is no weight, and the last size is not known"
        weight = constant(
            graph, np.ones(x.shape[-1], dtype=source.dtype.numpy()), f"ones.{x.shape[-1]}.{source.dtype.name}"
        )
    replace(graph, end, "RMSNormalization", [source, weight], axis=-1, epsilon=epsilon)
    return DONE


ELEMENT = ("Cast", "Cos", "Sin", "Mul", "Unsqueeze", "Expand")


def doubled(value: ir.Value | None) -> bool:
    """Whether the last dimension holds the same numbers twice: a Concat of one value with itself, then element-wise."""
    for _ in range(8):
        node = value.producer() if value is not None else None
        if node is None:
            return False
        if node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and attribute(node, "axis", 0) in (-1, 2)
        if node.op_type not in ELEMENT or (node.op_type == "Mul" and number(node.inputs[1]) is None):
            return False
        value = node.inputs[0]
    return False


def is_half(node: ir.Node, second: bool) -> bool:
    """Whether a Slice takes exactly the first or the second half of the last dimension."""
    source, rank = node.inputs[0], rank_of(node.outputs[0])
    start, end, axis = (number(v) for v in node.inputs[1:4])
    if source is None or source.shape is None or rank is None or not isinstance(source.shape[-1], int) or start is None:
        return False
    size = source.shape[-1]
    whole = end is not None and end >= size
    fits = (start in (size / 2, -size / 2) and whole) if second else (start == 0 and end in (size / 2, -size / 2))
    return fits and axis in (-1, rank - 1) and number(node.inputs[4] if len(node.inputs) > 4 else None) in (None, 1)


def fuse_rotary(graph: ir.Graph, node: ir.Node) -> str:  # noqa: PLR0911 - each return is a reason
    """`x * cos + rotate_half(x) * sin` (Su et al. 2021, section 3.4.2), halves split as in llama."""
    left, right = (producer(v, "Mul") for v in node.inputs)
    if left is None or right is None:
        return NOT_MINE
    turned = next((producer(v, "Concat") for v in right.inputs if producer(v, "Concat")), None)
    halves = [v.producer() for v in turned.inputs if v is not None] if turned else []
    if (
        len(halves) != 2
        or halves[0] is None
        or halves[0].op_type != "Neg"
        or producer(turned.inputs[1] if turned else None, "Slice") is None
    ):
        return NOT_MINE
    second, first = producer(halves[0].inputs[0], "Slice"), halves[1]
    if second is None or first is None or turned is None:
        return NOT_MINE
    x = first.inputs[0]
    if x is None or x is not second.inputs[0] or x not in left.inputs or rank_of(x) != 4:
        return "the halves are not of the tensor that is rotated, as [batch, heads, tokens, head_dim]"
    if not (is_half(first, False) and is_half(second, True)) or attribute(turned, "axis", 0) not in (-1, 3):
        return "the parts are not the two halves of the last dimension"
    cos = next(v for v in left.inputs if v is not x)
    sin = next(v for v in right.inputs if v is not turned.outputs[0])
    if not (doubled(cos) and doubled(sin)):
        return "cosine and sine are not one half repeated"
    tables = [half_table(graph, node, table) for table in (cos, sin)]
    if any(t is None for t in tables):
        return "cosine and sine are not [batch, 1, tokens, head_dim]"
    if any(str(t.shape[0]) != str(x.shape[0]) for t in tables if t is not None and t.shape is not None and x.shape):
        return "cosine and sine are of another batch than what they rotate"
    replace(graph, node, "RotaryEmbedding", [x, *tables])
    return DONE


def half_table(graph: ir.Graph, place: ir.Node, table: ir.Value | None) -> ir.Value | None:
    """`[batch, tokens, head_dim / 2]` of a `[batch, 1, tokens, head_dim]` table: made once, right after the table."""
    raised = producer(table, "Unsqueeze")
    if raised is None or rank_of(raised.outputs[0]) != 4 or number(raised.inputs[1]) not in (1, -3):
        return None
    whole = raised.inputs[0]
    assert whole is not None
    if whole.shape is None or not isinstance(whole.shape[-1], int):
        return None
    for user, _ in whole.uses():
        if user.op_type == "Slice" and str(user.name).endswith("/half"):
            return user.outputs[0]
    half = int(whole.shape[-1]) // 2
    ints = [constant(graph, np.array([n], dtype=np.int64), f"half.{n}") for n in (0, half, -1)]
    cut = ir.node("Slice", [whole, *ints], name=f"{raised.name}/half")
    cut.outputs[0].name = f"{raised.name}/half"
    cut.outputs[0].type, cut.outputs[0].shape = whole.type, ir.Shape([*list(whole.shape)[:-1], half])
    graph.insert_before(raised, cut)
    return cut.outputs[0]


PACKED: dict[tuple[str, str], tuple[str, str, str]] = {
    ("", "Attention"): ("Attention", "q_num_heads", "kv_num_heads"),
    (DOMAIN, "Attention"): ("PackedAttention", "heads", "kv_heads"),
    (DOMAIN, "AttentionBias"): ("PackedAttentionBias", "heads", "kv_heads"),
}
"""The operator that takes packed heads, and its attributes that say how many there are."""


def pack_attention(graph: ir.Graph, node: ir.Node) -> str:
    """Attention takes `[batch, tokens, heads * head_dim]` too: the reshapes and transposes around it go away.

    All three inputs have to come from Transpose(Reshape(x)) and the output has to go back the same way.
    """
    packed, heads = [], []
    for value in node.inputs[:3]:
        turn = producer(value, "Transpose")
        split = producer(turn.inputs[0], "Reshape") if turn else None
        if turn is None or split is None or attribute(turn, "perm", None) != (0, 2, 1, 3) or split.inputs[0] is None:
            return "an input does not come straight from a projection"
        source, shape = split.inputs[0], split.outputs[0].shape
        if rank_of(source) != 3 or shape is None or not isinstance(shape[2], int) or not isinstance(shape[3], int):
            return "heads are not split off the last of three dimensions"
        if source.shape is None or source.shape[2] != shape[2] * shape[3] or str(source.shape[1]) != str(shape[1]):
            return "heads are not split off the last of three dimensions"
        packed.append(source)
        heads.append(int(shape[2]))
    back = only_user(node.outputs[0])
    merge = only_user(back.outputs[0]) if back and back.op_type == "Transpose" else None
    if back is None or merge is None or merge.op_type != "Reshape" or attribute(back, "perm", None) != (0, 2, 1, 3):
        return "the output does not go straight back to [batch, tokens, channels]"
    goal, values = merge.outputs[0].shape, packed[2].shape
    if (
        goal is None
        or len(goal) != 3
        or values is None
        or packed[0].shape is None
        or (goal[2] != heads[0] * (values[2] // heads[1]) or str(goal[1]) != str(packed[0].shape[1]))
    ):
        return "the output does not go straight back to [batch, tokens, channels]"
    kind, *counts = PACKED[node.domain, node.op_type]
    attributes = {k: a.value for k, a in node.attributes.items()} | dict(zip(counts, heads[:2], strict=True))
    new = before(
        graph,
        node,
        kind,
        [*packed, *node.inputs[3:]],
        scope=str(node.name).rpartition("/")[0],
        like=merge.outputs[0],
        domain=node.domain,
        **attributes,
    )
    new.metadata_props.update(merge.metadata_props)
    take_users(graph, merge.outputs[0], new.outputs[0])
    return DONE


RULES: tuple[Rule, ...] = (
    Rule("fold weight transposes", "Transpose", fold_weight_transpose),
    Rule("merge transposes", "Transpose", merge_transposes),
    Rule("merge reshapes", "Reshape", merge_reshapes),
    Rule("drop expands", "Expand", drop_expand),
    Rule("fuse RMSNorm", "Reciprocal", fuse_rms_norm, since=23),
    Rule("fuse rotary embedding", "Add", fuse_rotary, since=23),
    Rule("pack attention heads", "Attention", pack_attention, since=23),
    Rule("pack heads of our attention", "Attention", pack_attention, since=23, domain=DOMAIN),
    Rule("pack heads of our attention with a bias", "AttentionBias", pack_attention, since=23, domain=DOMAIN),
    Rule("drop identities", "Identity", drop_identity),
)


def run_rule(model: ir.Model, rule: Rule) -> PassResult:
    """Applies one rule to every node of its operator, in order."""
    result = PassResult()
    graph = model.graph
    for node in [n for n in graph if (n.domain, n.op_type) == (rule.domain, rule.operator)]:
        if node.graph is None:
            continue  # an earlier rewrite of this rule took it out
        reason = rule.apply(graph, node)
        if reason == DONE:
            result.rewritten += 1
        elif reason != NOT_MINE:
            result.declined[str(node.name)] = reason
    common.RemoveUnusedNodesPass()(model)
    return result


def clean_up(model: ir.Model, opset: int) -> dict[str, PassResult]:
    """All passes in order; the graph is changed in place. Gives what each rule did and declined."""
    common.CommonSubexpressionEliminationPass()(model)
    results = {rule.name: run_rule(model, rule) for rule in RULES if opset >= rule.since}
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    name_nodes(model.graph)
    give_bodies(model)
    return results


def give_bodies(model: ir.Model) -> None:
    """Nodes of ours get the functions that are their bodies; the graph imports their domain."""
    used = sorted({node.op_type for node in model.graph if node.domain == DOMAIN})
    if used:
        model.graph.opset_imports[DOMAIN] = functions.VERSION
    for kind in used:
        body = ir.serde.deserialize_function(functions.function(kind, model.graph.opset_imports[""]))
        model.functions[body.identifier()] = body


def name_nodes(graph: ir.Graph) -> None:
    """Every node has a name of its own, and its output the same one unless it is an output of the graph."""
    own = {str(v.name) for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    kept, seen, counts = {str(node.name) for node in graph}, own, dict[str, int]()
    for node in graph:
        name = base = str(node.name or node.op_type)
        while name in seen or (name != base and name in kept):
            counts[base] = counts.get(base, 0) + 1
            name = f"{base}_{counts[base]}"
        seen.add(name)
        node.name = name
        for i, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{i}"
