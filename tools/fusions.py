"""Where a graph computes attention, norms and activations, and whether each is one standard node, or why it is not.

A standard node is found by its operator. What is written out in smaller operators is found from the one operator that
every spelling of it has (`ANCHORS`), by walking a few nodes up and down from there. Reads graphs of any exporter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimize.kernels.functions import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

STANDARD: Mapping[str, tuple[str, int]] = {
    "Attention": ("attention", 23),
    "LayerNormalization": ("layer norm", 17),
    "RMSNormalization": ("rms norm", 23),
    "GroupNormalization": ("group norm", 21),
    "InstanceNormalization": ("instance norm", 1),
    "BatchNormalization": ("batch norm", 1),
    "RotaryEmbedding": ("rotary embedding", 23),
    "Gelu": ("gelu", 20),
    "Swish": ("silu", 24),
}
"""Operator of the ONNX standard -> what it computes, and the first opset that has it as it is used now."""

CONTRIB: Mapping[str, str] = {
    "Attention": "attention",
    "MultiHeadAttention": "attention",
    "GroupQueryAttention": "attention",
    "PackedMultiHeadAttention": "attention",
    "SkipLayerNormalization": "layer norm",
    "GroupNorm": "group norm",
    "SkipGroupNorm": "group norm",
    "SimplifiedLayerNormalization": "rms norm",
    "RotaryEmbedding": "rotary embedding",
    "SkipSimplifiedLayerNormalization": "rms norm",
    "Gelu": "gelu",
    "FastGelu": "gelu",
    "BiasGelu": "gelu",
    "QuickGelu": "silu",
}
"""Operators of other domains that are one node too."""

OURS: Mapping[str, str] = {
    "Attention": "attention",
    "LayerNorm": "layer norm",
    "RMSNorm": "rms norm",
    "GroupNorm": "group norm",
    "Rotary": "rotary embedding",
    "QKNorm": "rms norm",
    "GeGLU": "gelu",
    "SwiGLU": "silu",
}
"""What the name of an operator of `ai.optimize` has in it -> what it computes, with what is fused around it."""

FIRST = {kind: (operator, since) for operator, (kind, since) in STANDARD.items()}
SCORES = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Identity", "Max", "Min", "Clip", "Tanh"})
WEIGHTS = frozenset({"Cast", "Dropout", "Where", "Identity", "Reshape"})
PRODUCTS = frozenset({"MatMul", "Einsum", "Gemm"})
DEPTH = 8  # nodes between the softmax and its products: a mask, a scale, casts, a soft cap


@dataclass(frozen=True)
class Site:
    """One attention, norm, rotary embedding or activation.

    `path` is the module's path as far as the graph tells it, `node` the name of the node that it was found by, `into`
    the operators that compute it. `standard`: it is one node of the ONNX standard. `reason`: why not, or what was left
    around the node.
    """

    path: str
    kind: str
    node: str
    standard: bool
    into: str
    reason: str


@dataclass(frozen=True)
class Pattern:
    """What is written out: the nodes in order, and why no rule takes it, where its form says so."""

    kind: str
    nodes: Sequence[ir.Node]
    why: str = ""


# --- walking ---------------------------------------------------------------------------------------------------------


def upstream(value: ir.Value | None, wanted: frozenset[str], through: frozenset[str]) -> ir.Node | None:
    """The nearest producer of a wanted operator, through nodes of the others."""
    level = [value]
    for _ in range(DEPTH):
        nodes = [node for v in level if v is not None and (node := v.producer()) is not None]
        for node in nodes:
            if node.op_type in wanted:
                return node
        level = [v for node in nodes if node.op_type in through for v in node.inputs]
    return None


def downstream(value: ir.Value, wanted: frozenset[str], through: frozenset[str] = frozenset()) -> ir.Node | None:
    """The nearest user of a wanted operator, through nodes of the others."""
    level = [value]
    for _ in range(DEPTH):
        nodes = [use.node for v in level for use in v.uses()]
        for node in nodes:
            if node.op_type in wanted:
                return node
        level = [v for node in nodes if node.op_type in through for v in node.outputs]
    return None


def producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in kinds else None


def user(value: ir.Value, *kinds: str) -> ir.Node | None:
    return downstream(value, frozenset(kinds))


def first_of(values: Iterable[ir.Value | None], *kinds: str) -> ir.Node | None:
    return next((node for v in values if (node := producer(v, *kinds)) is not None), None)


# --- patterns, each from its anchor ----------------------------------------------------------------------------------


def attention_at(softmax: ir.Node) -> Pattern | None:
    """`softmax(q k^T * scale + mask) v` (Vaswani et al. 2017, section 3.2.1)."""
    scores = upstream(softmax.inputs[0], PRODUCTS, SCORES)
    product = downstream(softmax.outputs[0], PRODUCTS, WEIGHTS)
    return Pattern("attention", [scores, softmax, product]) if scores and product else None


def group_norm_at(node: ir.Node) -> Pattern | None:
    """Instance normalization over groups that a Reshape made (Wu and He 2018)."""
    split, merge = producer(node.inputs[0], "Reshape"), user(node.outputs[0], "Reshape")
    return Pattern("group norm", [split, node, merge]) if split and merge else None


def norm_at(root: ir.Node) -> Pattern | None:
    """`y / sqrt(mean(y * y) + eps)`: a layer norm where y is x minus its mean, else an RMS norm."""
    added = producer(root.inputs[0], "Add")
    mean = first_of(added.inputs, "ReduceMean") if added else None
    square = producer(mean.inputs[0], "Mul", "Pow") if mean else None
    if added is None or mean is None or square is None:
        return None
    if square.op_type == "Mul" and square.inputs[0] is not square.inputs[1]:
        return None
    inverse = user(root.outputs[0], "Reciprocal")
    divided = user(inverse.outputs[0], "Mul") if inverse else user(root.outputs[0], "Div")
    if divided is None:
        return None
    centred = producer(square.inputs[0], "Sub")
    is_layer = centred is not None and producer(centred.inputs[1], "ReduceMean") is not None
    nodes = [square, mean, added, root, *([inverse] if inverse else []), divided]
    return Pattern("layer norm" if is_layer else "rms norm", nodes)


def silu_at(sigmoid: ir.Node) -> Pattern | None:
    """`x * sigmoid(a x)` (Hendrycks and Gimpel 2016, section 2; Elfwing et al. 2017)."""
    x = sigmoid.inputs[0]
    scale = producer(x, "Mul")
    sources = {x, *(scale.inputs if scale else ())}
    for use in sigmoid.outputs[0].uses():
        if use.node.op_type == "Mul" and any(v in sources for v in use.node.inputs if v is not sigmoid.outputs[0]):
            return Pattern("silu", [sigmoid, use.node])
    return None


def gelu_at(node: ir.Node) -> Pattern | None:
    """`x / 2 * (1 + erf(...))`, or with tanh (Hendrycks and Gimpel 2016, section 2)."""
    added = user(node.outputs[0], "Add")
    product = user(added.outputs[0], "Mul") if added else None
    return Pattern("gelu", [node, added, product]) if added and product else None


def rotary_at(negated: ir.Node) -> Pattern | None:
    """`x * cos + rotate(x) * sin` (Su et al. 2021, section 3.4.2)."""
    interleaved = user(negated.outputs[0], "Unsqueeze")
    joined = user(interleaved.outputs[0] if interleaved else negated.outputs[0], "Concat")
    product = downstream(joined.outputs[0], frozenset({"Mul"}), frozenset({"Reshape", "Cast"})) if joined else None
    added = downstream(product.outputs[0], frozenset({"Add"}), frozenset({"Cast"})) if product else None
    if joined is None or product is None or added is None:
        return None
    why = "its pairs are interleaved, and no rule fuses those" if interleaved else ""
    return Pattern("rotary embedding", [negated, joined, product, added], why)


ANCHORS: Mapping[str, Callable[[ir.Node], Pattern | None]] = {
    "Softmax": attention_at,
    "InstanceNormalization": group_norm_at,
    "Sqrt": norm_at,
    "Sigmoid": silu_at,
    "Erf": gelu_at,
    "Tanh": gelu_at,
    "Neg": rotary_at,
}

# --- sites -----------------------------------------------------------------------------------------------------------


def path_of(node: ir.Node) -> str:
    """The module's path that a node belongs to: from `module.path/Operator` (ours, and TorchScript's with more
    slashes), or from the scopes that `torch.onnx.export(dynamo=True)` writes as metadata."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        names = [n for n in re.findall("'([^']*)'", scopes)[:-1] if not n.startswith("_empty")]
        return names[-1] if names else ""
    return str(node.name or "").rpartition("/")[0].strip("/").replace("/", ".")


def sites_of(
    model: ir.Model, declined: Mapping[str, Mapping[str, str]], unfused: Sequence[Mapping[str, str]] = ()
) -> Iterator[Site]:
    """All sites in the graph's order. `declined` is what the clean-up wrote: rule -> node -> reason; `unfused` what our
    own operators did not take: path of the module and why."""
    said = {
        node: f"the rule '{rule}' declined: {reason}"
        for rule, nodes in declined.items()
        for node, reason in nodes.items()
    }
    left = {row["path"]: f"not one of ours: {row['why']}" for row in unfused}
    opset = model.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        name = str(node.name or "")
        pattern = ANCHORS[node.op_type](node) if node.op_type in ANCHORS else None
        if pattern is not None:
            why = reason_for(pattern, said, opset, model.producer_name)
            yield Site(path_of(node), pattern.kind, name, False, " ".join(n.op_type for n in pattern.nodes), why)
        elif node.domain in ("", "ai.onnx") and node.op_type in STANDARD:
            yield Site(
                path_of(node),
                STANDARD[node.op_type][0],
                name,
                True,
                node.op_type,
                said.get(name) or left.get(path_of(node), ""),
            )
        elif node.domain == DOMAIN:
            kind = next(kind for part, kind in OURS.items() if part in node.op_type)
            yield Site(path_of(node), kind, name, False, f"{DOMAIN}::{node.op_type}", "")
        elif node.domain not in ("", "ai.onnx") and node.op_type in CONTRIB:
            yield Site(
                path_of(node),
                CONTRIB[node.op_type],
                name,
                False,
                f"{node.domain}::{node.op_type}",
                f"one node, but of the domain {node.domain}, not of the standard",
            )


def reason_for(pattern: Pattern, said: Mapping[str, str], opset: int, producer_name: str | None) -> str:
    """Why it is not one node: what the clean-up said, the opset, or the form in which it is written."""
    for node in pattern.nodes:
        if str(node.name) in said:
            return said[str(node.name)]
    operator, since = FIRST[pattern.kind]
    if opset < since:
        return f"opset {opset} has no {operator} (from {since} on)"
    if pattern.why:
        return pattern.why
    if producer_name == "optimize":
        return f"the model writes it out, and no rule makes it {operator}"
    return f"{producer_name or 'its exporter'} wrote it out; opset {opset} has {operator}"


def totals_of(sites: Iterable[Site]) -> list[dict[str, str | int]]:
    """One row per kind: how many sites, how many of them one standard node, and the reasons with their counts."""
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    rows: list[dict[str, str | int]] = []
    for kind, found in kinds.items():
        standard = sum(site.standard for site in found)
        ours = Counter(site.into for site in found if site.into.startswith(DOMAIN))
        reasons = Counter(site.reason for site in found if site.reason)
        rows.append(
            {
                "kind": kind,
                "sites": len(found),
                "standard": standard,
                "ours": "; ".join(f"{count} {into.partition('::')[2]}" for into, count in ours.most_common()),
                "other": len(found) - standard - ours.total(),
                "why": "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common()),
            }
        )
    return rows
