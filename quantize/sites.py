"""Where a graph multiplies by weights, and which of these places stay as they are by rule, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from optimize.errors import InputError

from .scales import Array
from .schemes import Scheme

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")

STAYS: Sequence[tuple[str, str]] = (
    (
        r"time_?(text_)?embed|time_proj|time_emb_proj|timestep_embed|guidance_embed|add_embedding|adaln_single|norm\d*\.emb\b",
        "embedding of timestep or condition: a few rows of work that every block depends on",
    ),
    (
        r"norm\w*\.linear(_\d)?$|norm_out\.|proj_out_1$|\bmodulation",
        "modulation: a row per image of work that scales every token",
    ),
    (r"(^|\.)(conv_in|x_embedder|context_embedder|pos_embed\.proj|patch_embeddings?\b.*)$",
     "first layer: reads raw input"),
    (r"(^|\.)conv_out$|^(proj_out|proj_out_2)$", "last layer: its rounding is the output's"),
)  # fmt: skip
"""Module paths -> why they stay in the base precision. What diffusers, NVIDIA's recipes and our own sensitivity tables
leave high: little work, large effect."""


@dataclass(frozen=True)
class Site:
    """A place that could be quantized. `stays` is the reason where it is not.

    `activation`, `weight` and `output` are value names; `axis` is the weight's output channel axis as the graph has
    it, `rank` the activation's, `others` an attention's keys and values. `kind` is "conv", "linear" (weights) or
    "attention" (none: q, k, v).
    """

    name: str
    module: str
    kind: str
    activation: str
    weight: str
    output: str
    axis: int
    rank: int
    weights: int
    stays: str = ""
    others: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The activations that are quantized."""
        return (self.activation, *self.others)


def module_of(node: ir.Node) -> str:
    """The torch module's path: a node is named `path/Operator`."""
    return str(node.name).rpartition("/")[0]


def initializer(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.is_initializer()


def turned(s: Site, weight: Array) -> Array:
    """A linear site's weight as `[in, out]`."""
    return weight.T if s.axis == 0 else weight


def sites_of(model: ir.Model) -> list[Site]:
    """All sites in the graph's order. Raises InputError for a graph that is quantized already."""
    done = [n for n in model.graph if n.op_type in QUANTIZED]
    if done:
        raise InputError(
            "the graph is quantized already",
            got=f"{len(done)} nodes such as {done[0].name} ({done[0].op_type})",
            expected="a graph in floating point",
            mend="quantize the fp32 artifact that it was made from",
        )
    return list(all_sites(model))


def all_sites(model: ir.Model) -> Iterator[Site]:
    for node in model.graph:
        if node.op_type == "Attention":
            q = node.inputs[0]
            assert q is not None
            others = tuple(str(v.name) for v in node.inputs[1:3] if v is not None)
            yield replace(site(node, "attention", q, None, -1, 0), others=others)
        elif node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            x, w = node.inputs[0], node.inputs[1]
            assert x is not None and w is not None
            if x.dtype not in FLOATS:
                continue
            yield from weighted(node, x, w)


def weighted(node: ir.Node, x: ir.Value, w: ir.Value) -> Iterator[Site]:
    kind = "conv" if "Conv" in node.op_type else "linear"
    if initializer(x):
        yield site(node, kind, x, None, -1, 0, "its input is a constant: it is computed once")
        return
    tied = tied_weight(w) if node.op_type == "MatMul" else None
    if tied is not None and tied.shape is not None:
        out, rows = (int(d) for d in tied.shape.numpy())
        yield site(node, kind, x, tied, 0, out * rows)
        return
    if not initializer(w):
        yield site(node, kind, x, None, -1, 0, "a product of two activations: no runtime here has int8 kernels for it")
        return
    assert w.shape is not None
    dims = [int(d) for d in w.shape.numpy()]
    count = 1
    for d in dims:
        count *= d
    stays = ""
    axis = 0
    if node.op_type == "Conv":
        group = node.attributes.get_int("group", 1)
        if group == dims[0] and group > 1:
            stays = "depthwise: a handful of products per channel, nothing to gain"
        elif len(dims) != 4:
            stays = f"a convolution over {len(dims) - 2} dimensions: int8 kernels have two"
    elif node.op_type == "ConvTranspose":
        stays = "transposed convolution: no runtime here has int8 kernels for it"
    elif node.op_type == "MatMul":
        axis = 1
        if len(dims) != 2:
            stays = f"weights of {len(dims)} dimensions"
    else:
        axis = 0 if node.attributes.get_int("transB", 0) else 1
        plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
        if node.attributes.get_int("transA", 0) or not plain:
            stays = "a Gemm with factors of its own"
    yield site(node, kind, x, w, axis, count, stays)


def tied_weight(w: ir.Value) -> ir.Value | None:
    """The table of embeddings that a language model's head reads turned round."""
    turn = w.producer()
    if turn is None or turn.op_type != "Transpose" or not initializer(turn.inputs[0]):
        return None
    table = turn.inputs[0]
    return table if table is not None and table.shape is not None and len(table.shape) == 2 else None


def site(node: ir.Node, kind: str, x: ir.Value, w: ir.Value | None, axis: int, weights: int, stays: str = "") -> Site:
    rank = len(x.shape) if x.shape is not None else 0
    weight = "" if w is None else str(w.name)
    out = str(node.outputs[0].name)
    return Site(str(node.name), module_of(node), kind, str(x.name), weight, out, axis, rank, weights, stays)


def planned(sites: Sequence[Site], scheme: Scheme, runtime: str, keep: Sequence[str] = ()) -> list[Site]:
    """The sites with the reasons of all rules: of the graph, of the family, of the runtime, of the user."""
    used = dict.fromkeys(keep, False)
    result = []
    for s in sites:
        reason = s.stays or by_name(s.module) or by_runtime(s, scheme, runtime)
        for pattern in keep:
            if matches(pattern, s):
                used[pattern] = True
                reason = reason or f"asked for: --keep-high {pattern}"
        result.append(replace(s, stays=reason))
    unknown = [pattern for pattern, hit in used.items() if not hit]
    if unknown:
        import difflib

        names = [s.module for s in sites]
        near = difflib.get_close_matches(unknown[0].strip("*"), names, 3, 0.3)
        raise InputError(
            f"no layer matches {unknown[0]}",
            got=f"--keep-high {unknown[0]}",
            expected="a module path or a pattern of one" + (f", such as {', '.join(near)}" if near else ""),
            mend="--dry-run lists all of them",
        )
    return result


def matches(pattern: str, s: Site) -> bool:
    import fnmatch

    return fnmatch.fnmatch(s.module, pattern) or fnmatch.fnmatch(s.name, pattern)


def by_name(module: str) -> str:
    return next((why for pattern, why in STAYS if re.search(pattern, module)), "")


def by_runtime(s: Site, scheme: Scheme, runtime: str) -> str:
    if s.kind not in scheme.kinds[runtime]:
        if s.kind == "attention":
            return f"attention: {runtime} has no {scheme.weights} kernel that reads quantized q, k and v"
        return f"{scheme.name} for {runtime} is made for {' and '.join(scheme.kinds[runtime])} layers"
    return ""
