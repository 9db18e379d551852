"""The roofline: what a device allows for a piece of work, and how near a measurement comes to it.

After Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (CACM 2009): time is at least
operations over the peak rate, and at least bytes over the bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optimize.errors import InputError

from .counts import PRODUCTS
from .schema import Estimate, Limits, Roofline, Work
from .targets import TargetSheet
from .work import GraphWork, NodeWork

WIDER: Mapping[str, str] = {
    "int4": "int8", "fp4": "fp8", "fp8": "fp16", "int8": "fp32", "bf16": "fp32", "fp16": "fp32", "tf32": "fp32",
    "int8-dynamic": "int8",
}  # fmt: skip
"""Type -> the one that a device computes in where it has no peak for the former."""


def peak_of(limits: Limits, dtype: str) -> float:
    """GFLOP/s of products in this type, or in the one that takes its place on this device; what is no float runs on
    the plain units of fp32."""
    while dtype not in limits.peak_gflops and dtype in WIDER:
        dtype = WIDER[dtype]
    return limits.peak_gflops.get(dtype, limits.peak_gflops["fp32"])


def roofline_of(work: Work, latency_ms: float, limits: Limits, precision: str) -> Roofline:
    """Rates that a latency means for this work. `share` is the least time that the limits allow over the latency; each
    part of the work is held to the peak of its own type."""
    parts = dict(work.flops_by_type) or {precision: work.flops}
    if precision == "tf32" and "fp32" in parts:
        parts["tf32"] = parts.pop("fp32")
    compute_ms = sum(flops / peak_of(limits, kind) for kind, flops in parts.items()) / 1e6
    memory_ms = work.bytes / limits.bandwidth_gbs / 1e6
    return Roofline(
        gflops=work.flops / latency_ms / 1e6,
        gbs=work.bytes / latency_ms / 1e6,
        intensity=work.flops / work.bytes if work.bytes else 0.0,
        share=max(compute_ms, memory_ms) / latency_ms,
        bound=bound(compute_ms, memory_ms),
        precision=precision,
    )


def bound(compute_ms: float, memory_ms: float) -> Literal["compute", "memory"]:
    return "compute" if compute_ms >= memory_ms else "memory"


@dataclass(frozen=True)
class Recast:
    """What a float graph becomes in a precision: what products by weights and all else compute in, and how many bytes a
    number of the activations and of those weights takes."""

    weighted: str
    rest: str
    activation_bytes: float
    weight_bytes: float
    words: str = ""


RECASTS: Mapping[str, Recast] = {
    "fp32": Recast("fp32", "fp32", 4, 4),
    "tf32": Recast("tf32", "tf32", 4, 4),
    "fp16": Recast("fp16", "fp16", 2, 2),
    "bf16": Recast("bf16", "bf16", 2, 2),
    "fp8": Recast("fp8", "fp16", 2, 1, "every product by weights is in fp8, the rest in fp16"),
    "int8": Recast("int8", "fp16", 2, 1, "every product by weights is in int8, the rest in fp16"),
    "int8-dynamic": Recast("int8", "fp16", 2, 1, "products by weights are in int8 (scales are free), the rest in fp16"),
    "int8-weight": Recast("fp16", "fp16", 2, 1, "weights are int8 in memory, products are in fp16"),
    "int4-weight": Recast("fp16", "fp16", 2, 0.5, "weights are int4 in memory (scales left out), products are in fp16"),
}  # fmt: skip
FLOATS: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
SHARE, LAUNCH_US = 0.6, 2.0


@dataclass(frozen=True)
class Kernel:
    """Nodes that run as one kernel: operations by type, and bytes that go to memory and back."""

    flops: Mapping[str, float]
    bytes: float


def estimate(
    work: GraphWork,
    sheet: TargetSheet,
    limits: Limits,
    precision: str,
    *,
    component: str,
    shape: str,
    share: float = SHARE,
    launch_us: float = LAUNCH_US,
) -> Estimate:
    """What a target that is not here would take: an ESTIMATE, kernel by kernel, the larger of compute and traffic.

    `work` is that of the component's fp32 or fp16 graph, or of one that is quantized already; `limits` are the sheet's.
    Raises InputError for a precision that the target, or this function, does not have.
    """
    recast = check(work, sheet, limits, precision)
    kernels = fused(work, recast)
    rates = {kind: peak_of(limits, kind) for k in kernels for kind in k.flops}
    times = [(sum(f / rates[kind] for kind, f in k.flops.items()), k.bytes / limits.bandwidth_gbs) for k in kernels]
    least_ms = sum(max(pair) for pair in times) / 1e6
    compute, memory = (sum(max(pair) for pair in times if (pair[0] >= pair[1]) is wanted) for wanted in (True, False))
    return Estimate(
        target=sheet.name,
        component=component,
        shape=shape,
        precision=precision,
        latency_ms=least_ms / share + len(kernels) * launch_us / 1e3,
        bound=bound(compute, memory),
        share=share,
        assumptions=assumptions(work, sheet, limits, recast, share, launch_us, len(kernels)),
    )


def check(work: GraphWork, sheet: TargetSheet, limits: Limits, precision: str) -> Recast:
    if precision not in RECASTS:
        raise InputError(f"there is no estimate in {precision}", expected="one of " + ", ".join(RECASTS))
    recast = RECASTS[precision]
    needed = {computed_in(n, recast) for n in work.nodes} | {recast.weighted}
    missing = sorted(kind for kind in needed if kind not in limits.peak_gflops and kind in RECASTS)
    if missing:
        raise InputError(
            f"{sheet.name} (SM {sheet.sm}) has no {', '.join(missing)}",
            got=precision,
            expected="one of " + ", ".join(p for p, r in RECASTS.items() if r.weighted in limits.peak_gflops),
        )
    return recast


def assumptions(
    work: GraphWork, sheet: TargetSheet, limits: Limits, recast: Recast, share: float, launch_us: float, kernels: int
) -> list[str]:
    words = [
        "ESTIMATE, not measured: the roofline of a target sheet",
        f"every kernel reaches {share:.0%} of the roof ({limits.how}, dense peaks, {limits.bandwidth_gbs:g} GB/s)",
        f"{launch_us:g} us for the launch of each of {kernels} kernels",
        "pointwise work is fused into the kernel that makes its input, Q and DQ into the products; attention is one",
        "nothing stays in a cache from one kernel to the next; clocks hold under load",
    ]
    if not any(n.bytes for n in work.nodes):
        words.append("there is no graph to count traffic from: one kernel that moves weights, inputs and outputs alone")
    if recast.words:
        words.append(recast.words)
    if work.total.weight_bytes > sheet.memory_gib * 2**30:
        words.append(
            f"its weights ({work.total.weight_bytes / 2**30:.1f} GiB in this graph) exceed {sheet.memory_gib} GiB"
        )
    return [*words, f"counts {work.total.how}"]


JOINS = frozenset({"elementwise", "softmax", "quantize"})
"""Kinds that a kernel before them takes in."""


def fused(work: GraphWork, recast: Recast) -> list[Kernel]:
    """Kernels after plausible fusion: pointwise work joins the latest kernel among those that make its inputs."""
    if not any(n.bytes for n in work.nodes):  # counted by torch, which knows no traffic
        return [kernel_of(0, work.nodes, {}, work.outputs, recast, work.total.bytes)]
    group: dict[str, int] = {}
    groups: list[list[NodeWork]] = []
    for node in work.nodes:
        makers = [group[r] for r in node.reads if r in group]
        if node.operator not in JOINS or not makers:
            groups.append([])
            makers = [len(groups) - 1]
        groups[max(makers)].append(node)
        group |= dict.fromkeys(node.writes, max(makers))
    readers: dict[str, set[int]] = {}
    for i, nodes in enumerate(groups):
        for node in nodes:
            for name in node.reads:
                readers.setdefault(name, set()).add(i)
    return [kernel_of(i, nodes, readers, work.outputs, recast) for i, nodes in enumerate(groups)]


def kernel_of(
    i: int,
    nodes: Sequence[NodeWork],
    readers: Mapping[str, set[int]],
    outputs: frozenset[str],
    recast: Recast,
    known: float = 0.0,
) -> Kernel:
    """`readers` tells which kernels read a value; what none but this one reads stays inside. `known` are bytes that
    no node tells of."""
    made = {name for n in nodes for name in n.writes}
    flops: dict[str, float] = {}
    moved: dict[str, float] = {}
    for n in nodes:
        kind = computed_in(n, recast)
        flops[kind] = flops.get(kind, 0.0) + n.flops
        weight_bytes = recast.weight_bytes if n.operator in PRODUCTS else recast.activation_bytes
        moved |= {v: b * scale(n, v, weight_bytes) for v, b in n.weights.items()}
        passing = {v: b for v, b in n.reads.items() if v not in made}
        passing |= {v: b for v, b in n.writes.items() if v in outputs or readers.get(v, set()) - {i}}
        moved |= {v: b * scale(n, v, recast.activation_bytes) for v, b in passing.items()}
    return Kernel(flops, sum(moved.values()) + known)


def scale(node: NodeWork, value: str, wanted_bytes: float) -> float:
    """What a value's bytes become; integers and what is quantized already stay as they are."""
    return wanted_bytes / FLOATS[node.types[value]] if node.types[value] in FLOATS else 1.0


def computed_in(node: NodeWork, recast: Recast) -> str:
    """The type whose peak holds a node; pointwise work runs on the plain units, at fp32's rate."""
    if node.operator not in PRODUCTS:
        return "fp32"
    if node.dtype not in FLOATS:
        return node.dtype
    return recast.weighted if node.weights else recast.rest
