"""A component becomes an ONNX file: the pipeline is the list `STEPS`, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from optimize.errors import GateError

from . import external, passes
from .spec import Component
from .trace import Traced, trace_component
from .translate import Untranslated, translate

OPSETS = range(18, 26)
DEFAULT_OPSET = 23


@dataclass(frozen=True)
class OnnxModel:
    """A graph on disk with what made it. Paths are absolute; sizes in bytes, times in seconds."""

    path: Path
    weights_path: Path
    view_path: Path
    opset: int
    precision: str
    nodes: int
    seconds: Mapping[str, float]
    declined: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def same_as(module: torch.nn.Module) -> dict[str, str]:
    """Tied weights: each further name -> the first, so that none is written twice."""
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    tied = getattr(module, "_tied_weights_keys", None) or {}
    names = dict(module.named_parameters(remove_duplicate=False))
    if isinstance(tied, Mapping) and getattr(getattr(module, "config", None), "tie_word_embeddings", True):
        found = {name: source for name, source in tied.items() if name in names and source in names}
    for name, parameter in names.items():
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def graph_from_component(
    component: Component, precision: str, opset: int, timed: Callable[[str], Any]
) -> tuple[ir.Model, Traced, dict[str, passes.PassResult]]:
    """Trace, bind weights, translate, clean up. Raises GateError with the operators that cannot be translated."""
    with timed("trace"):
        traced = trace_component(component, precision)
    with timed("bind weights"):
        weights = component.weights.bind(traced.module)
    with timed("translate"):
        try:
            model = translate(traced, component, opset, external.weight_maker(weights, same_as(traced.module)))
        except Untranslated as e:
            raise GateError(
                f"{component.name} uses operators that have no ONNX form here",
                got=str(e),
                mend="report them, or write the part with other operators",
            ) from e
    with timed("clean up"):
        merge_tied(model)
        results = passes.clean_up(model, opset)
    return model, traced, results


def merge_tied(model: ir.Model) -> None:
    """Initializers of one recipe become one."""
    first: dict[external.Recipe, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if isinstance(tensor, external.WeightTensor):
            kept = first.setdefault(tensor.recipe, value)
            if kept is not value:
                value.replace_all_uses_with(kept)
                del model.graph.initializers[name]


def drop_unused_initializers(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


class Clock:
    """Seconds per step, by name."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.say = say
        self._name, self._start = "", 0.0

    def __call__(self, name: str) -> Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self.say(self._name)
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = round(time.perf_counter() - self._start, 3)
