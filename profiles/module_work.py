"""The same counts for a component that has no ONNX graph: torch runs it on meta tensors, which compute nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError

from .schema import Work
from .work import GraphWork, NodeWork

if TYPE_CHECKING:
    import torch

    from optimize.compile.spec import Component

HOW = (
    "from torch's own count on meta tensors: products alone (convolutions, matmuls, attention), a multiply-add is two "
    "operations; bytes are the least that must move (each parameter once, inputs and outputs of the component)"
)
KINDS: Mapping[str, str] = {"convolution": "convolution", "attention": "attention"}
"""What a torch operator's name contains -> kind of work; all others that torch counts are matmuls."""


def work_of_component(component: Component, precision: str, sizes: Mapping[str, int]) -> GraphWork:
    """Counts a component's own module. Raises InputError where it cannot run on meta tensors."""
    import torch

    from optimize.compile.trace import cast

    module = cast(component.build(), precision).to("meta")
    kind = {"float": getattr(torch, component_dtype(precision))}
    feeds = [
        torch.empty(t.sizes(sizes), dtype=kind.get(t.dtype) or getattr(torch, t.dtype), device="meta")
        for t in component.inputs
    ]
    return work_of_call(module, feeds, precision)


def component_dtype(precision: str) -> str:
    from optimize.compile.spec import PRECISIONS

    return PRECISIONS.get(precision, "float32")


def work_of_call(module: torch.nn.Module, inputs: list[Any], precision: str = "fp32") -> GraphWork:
    """Counts `module(*inputs)`; both on meta, or both real. Work is told by module, as torch's own modules go."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            outputs = module(*inputs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise InputError(
                f"the operations of {type(module).__name__} cannot be counted",
                got=str(error).splitlines()[0] if str(error) else type(error).__name__,
                mend="export it: they are counted from the graph then",
            ) from error
    weights = sum(bytes_of(p) for p in module.parameters())
    moved = sum(bytes_of(t) for t in tensors_in((inputs, outputs)))
    flops = float(counter.get_total_flops())
    work = Work(flops=flops, bytes=weights + moved, weight_bytes=weights, how=HOW, flops_by_type={precision: flops})
    return GraphWork(tuple(nodes_of(counter.get_flop_counts(), type(module).__name__, precision)), work)


def bytes_of(tensor: torch.Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def tensors_in(value: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if hasattr(leaf, "element_size")]


def nodes_of(counts: Mapping[str, Mapping[Any, int]], root: str, precision: str) -> list[NodeWork]:
    """What each module computes itself: torch's counts hold those of the modules below it as well."""
    own = {path: dict(found) for path, found in counts.items() if path != "Global"}
    for path, found in counts.items():
        above = parent(path, own)
        for operator, flops in found.items() if above else ():
            own[above][operator] = own[above].get(operator, 0) - flops
    for path in sorted(own, key=lambda p: -p.count(".")):  # below nothing: called from elsewhere, whose it was then
        for operator, left in own[path].items():
            if left < 0 and (above := parent(path, own)):
                own[path][operator] = 0
                own[above][operator] = own[above].get(operator, 0) + left
    return [
        node_of(path.removeprefix(root).lstrip("."), str(operator).removeprefix("aten."), left, precision)
        for path, found in own.items()
        for operator, left in found.items()
        if left > 0
    ]


def node_of(module: str, operator: str, flops: int, precision: str) -> NodeWork:
    kind = next((k for word, k in KINDS.items() if word in operator), "matmul")
    return NodeWork(f"{module}/{operator}", module, kind, operator, float(flops), 0.0, 0.0, precision)


def parent(path: str, called: Mapping[str, Any]) -> str:
    """The innermost module around `path` that was called: not a ModuleList, which is none."""
    while path:
        path = path.rpartition(".")[0]
        if path in called:
            return path
    return ""
