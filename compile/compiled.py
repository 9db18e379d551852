"""torch.compile as a runner: a component's module compiled whole or block by block, once for each set of sizes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from .runners import Bound, EagerRunner, Feeds, bound_module
from .spec import Component
from .trace import Adapted


@dataclass(frozen=True)
class Style:
    """How torch.compile is called; `regional` compiles each block that repeats instead of the whole network."""

    words: Mapping[str, Any]
    regional: bool = False


STYLES: Mapping[str, Style] = {
    "torch.compile": Style({}),
    "torch.compile-max-autotune": Style({"mode": "max-autotune"}),
    "torch.compile-regional": Style({}, regional=True),
    "torch.compile-cudagraphs": Style({"mode": "reduce-overhead"}),
}
"""Backend's name -> how. Sizes are static: each set of sizes has code of its own, which is what is fastest."""
MOST_CODES = 64
"""Of one function, for sets of sizes and kinds of block. Beyond its own limit, 8, torch runs eager and only logs it."""


class CompiledRunner(EagerRunner):
    """Eager's module through torch.compile. The first run with new sizes compiles; `cached` says whether a cache on
    disk spared that."""

    def __init__(
        self, component: Component, precision: str, style: str, *, device: str = "cpu", kernels: bool = False
    ) -> None:
        super().__init__(component, precision, device=device, kernels=kernels)
        self.name, self.style = style, STYLES[style]
        self._call: Callable[..., Any] | None = None
        self._limits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._module is not None
        network = Adapted(self._module)
        torch._dynamo.reset()
        limits = torch._dynamo.config.patch(recompile_limit=MOST_CODES, fail_on_recompile_limit_hit=True)
        self._limits.enter_context(limits)
        if self.style.regional:
            for block in repeated_blocks(network):
                block.compile(dynamic=False, **self.style.words)
            self._call = network
        else:
            self._call = torch.compile(network, dynamic=False, **self.style.words)
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._call = None
        self._limits.close()
        torch._dynamo.reset()

    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        return {n: t.clone() for n, t in self.bind(feeds)().items()}  # CUDA graphs write over what they gave

    def bind(self, feeds: Feeds) -> Bound:
        assert self._call is not None, "use the runner in a with statement"
        return bound_module(self._call, self.component, feeds, self.device)

    @property
    def cached(self) -> bool:
        """Whether all that was compiled so far came from the compiler's cache on disk."""
        counts = torch._dynamo.utils.counters["inductor"]
        return bool(counts["fxgraph_cache_hit"]) and not counts["fxgraph_cache_miss"]


def repeated_blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost modules in lists whose class occurs there more than once; the whole network where there is none."""
    listed = {
        f"{prefix}.{i}": child
        for prefix, module in network.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        for i, child in enumerate(module)
    }
    counts = Counter(type(m) for m in listed.values())
    names = [n for n, m in listed.items() if counts[type(m)] > 1]
    outermost = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    return [listed[n] for n in outermost] or [network]
