"""Compiled code's kernels find their modules through what Inductor itself keeps of their origin.

While it generates code, Inductor notes for each kernel, in the order of the calls, which nodes of its last graph it
computes, and which nodes of the graph that torch.compile took these are made of. Each of the latter knows the modules
around it. A profiler's events come in the order of the calls, region by region.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

Kernels = Mapping[str, Sequence[str]]
"""Kernel -> the modules of its calls, in order."""


@dataclass
class KernelOrigins:
    """`modules` of the nodes that torch.compile took, by name; `graphs` has one entry per compiled region."""

    modules: dict[str, str] = field(default_factory=dict)
    graphs: list[Kernels] = field(default_factory=list)

    def keep(self, kernels: Mapping[str, Sequence[str]], sources: Mapping[str, Sequence[str]]) -> None:
        """One region: `kernels` tells the nodes of each call (`name:number`), `sources` what a node is made of."""
        found: dict[str, list[str]] = defaultdict(list)
        for call, nodes in kernels.items():
            votes = Counter(self.modules[s] for n in nodes for s in sources.get(n, ()) if s in self.modules)
            found[plain_name(call.rpartition(":")[0])].append(max(votes, key=lambda m: votes[m]) if votes else "")
        self.graphs.append(found)

    def reading(self) -> Reading:
        return Reading(self.graphs)


class Reading:
    """Events of one run are put to modules. Regions come in the order in which they were compiled, which is that of
    their first run; one that runs again begins anew."""

    def __init__(self, graphs: Sequence[Kernels]) -> None:
        self.graphs = graphs
        self.regions: dict[str, dict[str, deque[str]]] = {}

    def module(self, region: str, kernel: str) -> str:
        if not region:  # what is not compiled
            return ""
        if region not in self.regions:
            i = len(self.regions)
            graph = self.graphs[i] if i < len(self.graphs) else {}
            self.regions[region] = {name: deque(modules) for name, modules in graph.items()}
        waiting = self.regions[region].get(plain_name(kernel))
        if not waiting:
            return ""
        waiting.rotate(-1)
        return waiting[-1]


def plain_name(kernel: str) -> str:
    """`graph_0_cpp_fused_add_1` -> `cpp_fused_add_1`; `aten::addmm`, `extern_kernels.addmm` -> `addmm`;
    `torch.ops.mkldnn._linear_pointwise.default` -> `_linear_pointwise`."""
    plain = re.sub(r"^graph_\d+_", "", kernel).removesuffix(".default").removesuffix(".out")
    return re.split(r"::|\.", plain)[-1]


@contextlib.contextmanager
def named_kernels(runner: Any) -> Iterator[KernelOrigins | None]:
    """While this lasts, torch.compile makes kernels that the profiler sees by name, and their origin is kept.

    None where modules run as they are; a package that is compiled already has no origins.
    """
    if not hasattr(runner, "style"):
        yield None if hasattr(runner, "_module") else KernelOrigins()
        return
    from torch._inductor import config, debug
    from torch._inductor.graph import GraphLowering

    origins = KernelOrigins()

    def generated(_: str) -> None:
        sources = debug._inductor_post_to_pre_grad_nodes.get("postToPre", {})
        origins.keep(debug._inductor_triton_kernel_to_post_grad_node_info, sources)

    words = {
        "cpp.enable_kernel_profile": True,
        "trace.provenance_tracking_level": 1,
        "force_disable_caches": True,
        "pre_grad_custom_pass": SourceModules(origins.modules),
    }
    with (
        warnings.catch_warnings(),
        config.patch(words),
        mock.patch.object(GraphLowering, "save_output_code", generated),
    ):
        warnings.filterwarnings("ignore", message="dynamo_pgo")
        yield origins


class SourceModules(CustomGraphPass):
    """Sees the graph that torch.compile took, and keeps the innermost module of each node. Changes nothing."""

    def __init__(self, modules: dict[str, str]) -> None:
        self.modules = modules

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            if stack and node.op != "placeholder":
                self.modules[node.name] = path_of(str(stack[-1][0]))

    def uuid(self) -> str:
        """The key of a cache that is off here."""
        return type(self).__name__


def path_of(stack: str) -> str:
    """Dynamo's path of a module, `L['self']._modules['blocks']._modules['0']` or `L['self'].blocks[0]`, in dots; its
    root, and the wrapper that gives a component its outputs as a tuple, are left out."""
    steps = re.sub(
        r"\._modules\['(.*?)'\]|\['(.*?)'\]|\[(\d+)\]", lambda m: "." + next(filter(None, m.groups())), stack
    )
    path = ".".join(steps.split(".")[2:])
    return path.removeprefix("module").lstrip(".") if re.match(r"module(\.|$)", path) else path
