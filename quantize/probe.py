"""The range probe: how large each fp16 value of a graph gets on a few real inputs, and how much of it fp16 would lose.

The graph runs in fp32, so that nothing overflows on the way, and each value is reduced to a few numbers where it is
made: memory stays flat. Graphs that do not fit run in segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from optimize.compile.emulate import NARROW, emulated
from optimize.compile.external import WeightTensor
from optimize.compile.feeds import feeds_for
from optimize.compile.segments import Tensors, run_segments, segments_of
from optimize.compile.spec import Component
from optimize.compile.wide import LEAST_RMS

LARGEST = 65504.0
INFINITE = 65520.0
"""From here on fp16 rounds to infinity."""
LIMIT = LARGEST / 2
"""What a value may reach in the probe, which sees a few inputs: others can go higher. In the demo, 64 samples of other
prompts, seeds and timesteps went up to 1.95 times as high as four had, in one tensor; in most of them 1.1 times."""
MARK, SCORES = "//", "/scores"
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True)
class Range:
    """One value over all feeds: its largest finite magnitude, the largest root mean square of a feed, the share of its
    numbers above `LIMIT`, and how many are not finite even in fp32 (a mask's infinities)."""

    largest: float
    rms: float
    near: float = 0.0
    nonfinite: int = 0

    @property
    def overflows(self) -> bool:
        return self.largest >= INFINITE

    @property
    def lost(self) -> bool:
        """Whether fp16 would keep less of the numbers than bf16 does, because they are so small."""
        return 0 < self.rms < LEAST_RMS


@dataclass(frozen=True)
class Probe:
    """What the probe saw, on how many feeds, and `how` those came about. `ranges` is by value in the graph's order, the
    weights that fp16 cannot hold first; an Attention node's own scores stand under its output's name with `/scores`."""

    ranges: Mapping[str, Range]
    feeds: int
    how: str = ""

    @property
    def first_overflow(self) -> str | None:
        """The first value that plain fp16 would make infinite."""
        return next((name for name, r in self.ranges.items() if r.overflows), None)

    def summary(self) -> dict[str, Any]:
        """The figures for a manifest: the whole table is in a file of its own."""
        top = max(self.ranges.items(), key=lambda item: item[1].largest, default=("", Range(0.0, 0.0)))
        return {
            "feeds": self.feeds,
            "how": self.how,
            "values": len(self.ranges),
            "limit": LIMIT,
            "largest": {"value": top[0], "magnitude": top[1].largest},
            "near": sum(r.largest > LIMIT for r in self.ranges.values()),
            "first_overflow": self.first_overflow,
        }

    def table(self) -> dict[str, Any]:
        """Each value's figures, as JSON takes them."""
        rows = {
            n: {"largest": r.largest, "rms": r.rms, "near": r.near, "nonfinite": r.nonfinite}
            for n, r in self.ranges.items()
        }
        return {**self.summary(), "ranges": rows}


def parity_feeds(component: Component) -> list[Tensors]:
    """Parity's own feeds, one at each of its sets of sizes."""
    return [feeds_for(component.inputs, sizes, "fp16") for sizes in component.shape_sets().values()]


def drawn_feeds(component: Component, steps: int) -> list[Tensors]:
    """Random feeds at the traced sizes, with timesteps from first to last."""
    found = []
    for step in range(steps):
        feeds = feeds_for(component.inputs, component.shape_sets()["traced"], "fp16", seed=step + 1)
        for spec in component.inputs:
            if spec.fill in TIMES:
                feeds[spec.name] = torch.full_like(feeds[spec.name], TIMES[spec.fill](step, steps))
        found.append(feeds)
    return found


TIMES: Mapping[str, Callable[[int, int], float]] = {
    "timestep": lambda step, steps: round(999 * (1 - step / max(steps - 1, 1))),
    "unit": lambda step, steps: 0.5 ** round(5 * step / max(steps - 1, 1)),  # powers of two, as in compile.feeds
}
"""Kind of input -> its value at a step: noise first."""


def weight_ranges(model: ir.Model, path: Path) -> dict[str, Range]:
    """The weights, by initializer, that fp16 cannot hold. Those of the graph at `path`, where they are in fp16, tell
    which to look at in the source that `model` knows: one that became infinite, or small."""
    written = ir.load(path).graph.initializers
    found: dict[str, Range] = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, WeightTensor) and value.dtype == NARROW["fp16"] and value.const_value.size:
            near = written[name].const_value
            assert near is not None
            half = tensor_range(torch.from_numpy(near.numpy().copy()))
            if math.isinf(half.largest) or half.rms < LEAST_RMS:
                seen = tensor_range(value.const_value.weights.tensor(value.const_value.recipe.name))
                found |= {name: seen} if seen.overflows or seen.lost else {}
    return found


def tensor_range(tensor: torch.Tensor) -> Range:
    total = float(torch.linalg.vector_norm(tensor.float(), dtype=torch.float64))
    return Range(float(tensor.abs().max()), total / math.sqrt(tensor.numel()))


def probe_graph(
    path: Path,
    feeds: Sequence[Tensors],
    segment_bytes: int,
    say: Callable[[str], None],
    *,
    how: str = "",
    weights: Mapping[str, Range] = {},
) -> Probe:
    """Runs the fp16 graph at `path` for all feeds, in pieces of `segment_bytes` of weights.

    A second run measures what the first found to be near the limit: the share, and what is not finite.
    """
    segments = segments_of(ir.load(path), segment_bytes)

    def measured(change: Callable[[ir.Model], ir.Model]) -> dict[str, Range]:
        runs = [by_value(found) for found in run_segments(path, segments, feeds, change)]
        return {
            name: over_all([r[name] for r in runs if name in r]) for name in dict.fromkeys(n for r in runs for n in r)
        }

    say(f"range probe, {len(feeds)} runs")
    ranges = measured(with_bounds)
    close = {name for name, r in ranges.items() if r.largest > LIMIT or r.nonfinite}
    exact: dict[str, Range] = {}
    if close:
        say(f"range probe, {len(close)} values near the limit")
        exact = measured(lambda piece: with_shares(piece, close))
    ranges = {n: replace(exact[n], rms=r.rms) if n in exact else r for n, r in ranges.items()}
    bounds = {n for n in ranges if n.endswith(SCORES) and n not in exact}  # of scores only a bound is known, a low one
    return Probe({**weights, **{n: r for n, r in ranges.items() if n not in bounds}}, len(feeds), how)


def by_value(found: Tensors) -> dict[str, Range]:
    """The figures of one run, by value. An empty tensor has none."""
    figures: dict[str, dict[str, float]] = {}
    for name, tensor in found.items():
        value, mark, figure = name.rpartition(MARK)
        if mark:
            figures.setdefault(value, {})[figure] = float(tensor)
    return {value: range_of(f) for value, f in figures.items() if f.get("size", 1)}


def range_of(f: Mapping[str, float]) -> Range:
    if "over" in f:
        return Range(f["most"], 0.0, f["over"] / f["size"], int(f["bad"]))
    if "q" in f:  # Cauchy and Schwarz: no score is above the product of the longest query and the longest key
        return Range(f["q"] * f["k"] * f["scale"], 0.0)
    largest, rms = max(f["max"], -f["min"]), math.sqrt(f["square"] / f["size"])
    finite = math.isfinite(largest) and math.isfinite(rms)
    return Range(largest if finite else math.inf, rms if finite else math.inf, nonfinite=int(not finite))


def over_all(runs: Sequence[Range]) -> Range:
    return Range(*(max(getattr(r, field) for r in runs) for field in ("largest", "rms", "near", "nonfinite")))


# --- graphs that measure ---------------------------------------------------------------------------------------------


def narrow_values(piece: ir.Model) -> list[str]:
    """Names of the fp16 values that nodes of the graph make."""
    return [str(v.name) for node in piece.graph for v in node.outputs if v.dtype == NARROW["fp16"] and v.name]


def in_fp32(piece: ir.Model) -> ir.Model:
    """The graph in fp32, our own operators as their bodies."""
    wide = emulated(piece, "fp16", rounds=False)
    if wide.functions:
        common.InlinePass()(wide)
    return wide


class Meter:
    """Appends nodes that measure to a graph, each figure an output of its own: `<value>//<figure>`."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.values = {str(v.name): v for node in graph for v in node.outputs}

    def op(self, kind: str, *inputs: ir.Value, dtype: ir.DataType = FLOAT, **attributes: Any) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes)
        node.outputs[0].dtype = dtype
        self.graph.append(node)
        return node.outputs[0]

    def number(self, x: float, dtype: ir.DataType = FLOAT) -> ir.Value:
        return self.op("Constant", value=ir.tensor(x, dtype=dtype), dtype=dtype)

    def gives(self, name: str, figure: str, value: ir.Value, dtype: ir.DataType = FLOAT) -> None:
        value.name, value.type, value.shape = f"{name}{MARK}{figure}", ir.TensorType(dtype), ir.Shape([])
        self.graph.outputs.append(value)

    def all_of(self, kind: str, x: ir.Value) -> ir.Value:
        return self.op(kind, x, keepdims=0)


def with_bounds(piece: ir.Model) -> ir.Model:
    """Gives for each fp16 value its largest and smallest number and the sum of squares; for scores a bound."""
    names, wide = narrow_values(piece), in_fp32(piece)
    meter = Meter(wide.graph)
    attentions = [node for node in wide.graph if node.op_type == "Attention"]
    for name in names:
        x = meter.values[name]
        for figure, kind in (("max", "ReduceMax"), ("min", "ReduceMin"), ("square", "ReduceSumSquare")):
            meter.gives(name, figure, meter.all_of(kind, x))
        meter.gives(name, "size", meter.op("Size", x, dtype=INT64), INT64)
    last = meter.op("Constant", value_ints=[-1], dtype=INT64)
    for node in attentions:
        name = str(node.outputs[0].name)
        if name not in names:
            continue
        for figure, side in zip("qk", node.inputs[:2], strict=True):
            assert side is not None
            meter.gives(name + SCORES, figure, meter.all_of("ReduceMax", meter.op("ReduceL2", side, last)))
        meter.gives(name + SCORES, "scale", meter.number(scale_of(node)))
    return wide


def scale_of(node: ir.Node) -> float:
    """What an Attention node multiplies its scores by."""
    given = node.attributes.get("scale")
    if given is not None:
        return float(given.value)
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    width = query.shape[-1]
    heads = node.attributes.get_int("q_num_heads", 1) if len(query.shape) == 3 else 1
    return (int(width) // heads) ** -0.5 if isinstance(width, int) else 1.0


def with_shares(piece: ir.Model, names: Container[str]) -> ir.Model:
    """Gives for these values the largest finite magnitude, how many numbers are above the limit or not finite."""
    wide = in_fp32(piece)
    meter = Meter(wide.graph)
    measured = {n: v for n, v in meter.values.items() if n in names}
    for node in list(wide.graph):
        name = str(node.outputs[0].name)
        if node.op_type == "Attention" and name + SCORES in names:
            measured[name + SCORES] = scores_of(node)
    for name, x in measured.items():
        size = meter.op("Abs", x)
        finite = meter.op("LessOrEqual", size, meter.number(torch.finfo(torch.float32).max), dtype=BOOL)
        known = meter.op("Where", finite, size, meter.number(0.0))
        over = meter.op("Greater", known, meter.number(LIMIT), dtype=BOOL)
        bad = meter.op("Not", finite, dtype=BOOL)
        meter.gives(name, "most", meter.all_of("ReduceMax", known))
        for figure, mask in (("over", over), ("bad", bad)):
            meter.gives(name, figure, meter.all_of("ReduceSum", meter.op("Cast", mask, to=int(FLOAT))))
        meter.gives(name, "size", meter.op("Size", x, dtype=INT64), INT64)
    return wide


def scores_of(node: ir.Node) -> ir.Value:
    """The scores of an Attention node before its mask, as a fourth output of the node."""
    node.resize_outputs(4)
    node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", 0)
    scores = node.outputs[3]
    scores.name, scores.type = f"{node.outputs[0].name}> scores", ir.TensorType(FLOAT)
    for spare in node.outputs[1:3]:
        spare.name = ""
    return scores
