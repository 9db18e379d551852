"""Runs a graph that is too large for the machine: cut into pieces that fit, one session after another.

Every node of the artifact itself is run, at real size and depth; only the order of loading differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from .runners import OnnxRuntimeRunner
from .translate import ORIGIN

Tensors = dict[str, torch.Tensor]
NEAR = 16  # nodes: no operator is written in more


def as_it_is(piece: ir.Model) -> ir.Model:
    return piece


@dataclass(frozen=True)
class Segment:
    """Some nodes in a row: the values that they need from before and those that are needed after."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def segments_of(model: ir.Model, budget: int) -> list[Segment]:
    """Cuts the graph where the weights since the last cut exceed `budget` bytes, between two torch operators."""
    nodes = list(model.graph)
    groups: list[list[ir.Node]] = [[]]
    size, seen = 0, set[ir.Value]()
    for i, node in enumerate(nodes):
        own = {v for v in node.inputs if v is not None and v.const_value is not None} - seen
        weight = sum(v.const_value.nbytes for v in own if v.const_value is not None)
        if groups[-1] and size + weight > budget and between_operators(nodes, i):
            groups.append([])
            size, seen, weight = 0, set(), sum(v.const_value.nbytes for v in own if v.const_value is not None)
        groups[-1].append(node)
        size, seen = size + weight, seen | own
    return list(interfaces(model, groups))


def between_operators(nodes: list[ir.Node], i: int) -> bool:
    """Whether no torch operator has nodes on both sides of the i-th: bf16 is rounded where they end, and only there."""
    before, after = (
        {n.metadata_props.get(ORIGIN) for n in side} - {None}
        for side in (nodes[max(0, i - NEAR) : i], nodes[i : i + NEAR])
    )
    return not before & after


def interfaces(model: ir.Model, groups: list[list[ir.Node]]) -> Iterator[Segment]:
    finals = set(model.graph.outputs)
    for group in groups:
        inside = set(group)
        made = [v for node in group for v in node.outputs]
        needed = dict.fromkeys(
            v
            for node in group
            for v in node.inputs
            if v is not None and v.const_value is None and v.producer() not in inside
        )
        leaving = [v for v in made if v in finals or any(u.node not in inside for u in v.uses())]
        if leaving:
            yield Segment(tuple(str(v.name) for v in needed), tuple(str(v.name) for v in leaving))


def run_segments(
    path: Path,
    segments: list[Segment],
    feeds: Sequence[Mapping[str, torch.Tensor]],
    change: Callable[[ir.Model], ir.Model] = as_it_is,
) -> list[Tensors]:
    """Runs the pieces of the graph at `path`, each as `change` makes it, for all feeds.

    Gives for each all outputs of the graph, and the outputs that `change` added to a piece.
    """
    model = ir.load(path)
    last_use = {name: i for i, s in enumerate(segments) for name in s.inputs}
    outputs = {str(v.name) for v in model.graph.outputs}
    between = {name for s in segments for name in (*s.inputs, *s.outputs)} | {n for f in feeds for n in f}
    known: list[Tensors] = [dict(f) for f in feeds]
    for i, segment in enumerate(segments):
        part = path.with_name(f".{path.stem}.{os.getpid()}.segment.onnx")
        try:
            ir.save(change(piece_of(model, segment)), part)
            with OnnxRuntimeRunner(part) as runner:
                for values in known:
                    values.update(runner.infer({n: values[n] for n in segment.inputs}))
        finally:
            part.unlink(missing_ok=True)
        for values in known:
            for name in [n for n in values if n in between and last_use.get(n, -1) <= i and n not in outputs]:
                del values[name]
    return known


def piece_of(model: ir.Model, segment: Segment) -> ir.Model:
    """A model of one segment's nodes, its weights still in the whole model's file."""
    graph: Any = ir.convenience.extract(model.graph, list(segment.inputs), list(segment.outputs))
    graph.opset_imports.update(model.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
