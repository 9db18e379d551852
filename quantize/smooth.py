"""SmoothQuant: large channels of an activation are made smaller, and the weights that read them larger.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023. The
vector is folded into the norm before, so that the graph gets no node: only layers that read a norm's output qualify.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .scales import Array
from .sites import Site, initializer, turned

NORMS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,)}
"""Operator -> its inputs that are multiplied into its output's channels."""
STRENGTH = 0.5
"""The paper's alpha: how much of the difficulty is moved from activations to weights."""
LEAST = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """`divisor` is what each channel of `activation` is divided by: in the norm's tensors `folded`."""

    activation: str
    divisor: Array
    folded: tuple[str, ...]


def candidates(model: ir.Model, sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Activation -> the linear sites that read it, where a norm of constant factors makes it and only they read it."""
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    groups: dict[str, list[Site]] = {}
    for s in sites:
        if s.kind == "linear" and not s.stays:
            groups.setdefault(s.activation, []).append(s)
    found = {}
    for name, group in groups.items():
        value = values.get(name)
        norm = value.producer() if value is not None else None
        if value is None or norm is None or norm.op_type not in NORMS or value.is_graph_output():
            continue
        readers = {str(use.node.name) for use in value.uses()}
        factors = [norm.inputs[i] for i in NORMS[norm.op_type] if i < len(norm.inputs) and norm.inputs[i] is not None]
        alone = all(initializer(f) and len(f.uses()) == 1 for f in factors if f is not None)
        if readers == {s.name for s in group} and factors and alone:
            found[name] = group
    return found


def smoothings(
    model: ir.Model, groups: Mapping[str, list[Site]], channels: Mapping[str, Array]
) -> dict[str, Smoothing]:
    """For each activation its vector: `max|x|^a / max|w|^(1 - a)`, per channel."""
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    result = {}
    for name, group in groups.items():
        norm = values[name].producer()
        assert norm is not None
        weight = np.max([np.abs(weight_of(model, s)).max(1) for s in group], axis=0)
        x = np.maximum(channels[name], LEAST)
        divisor = (x**STRENGTH / np.maximum(weight, LEAST) ** (1 - STRENGTH)).astype(np.float32)
        divisor = np.clip(divisor, LEAST, 1 / LEAST)
        folded = tuple(
            str(norm.inputs[i].name)  # type: ignore[union-attr]
            for i in NORMS[norm.op_type]
            if i < len(norm.inputs) and norm.inputs[i] is not None
        )
        result[name] = Smoothing(name, divisor, folded)
    return result


def weight_of(model: ir.Model, s: Site) -> Array:
    """A linear site's weight as fp32 `[in, out]`."""
    tensor = model.graph.initializers[s.weight].const_value
    assert tensor is not None
    return turned(s, tensor.numpy().astype(np.float32))
