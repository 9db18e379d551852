"""A component becomes a torch graph: traced on the meta device, so that no weight is ever in memory."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from optimize.errors import GateError

from .spec import Component, TensorSpec, dim_terms


@dataclass(frozen=True)
class Traced:
    """An exported program on meta tensors, and the real values of what is no weight.

    `constants` maps buffer names to real tensors. `fusions` says what became an operator of our own, where one was
    asked for: counts by kind, and for each site that did not, by its module's path, why.
    """

    program: torch.export.ExportedProgram
    constants: Mapping[str, torch.Tensor]
    module: torch.nn.Module
    fusions: Mapping[str, Any] = field(default_factory=dict)


def with_forward(module: torch.nn.Module, forward: Callable[..., tuple[Any, ...]]) -> torch.nn.Module:
    """Binds an adapter's forward to the module itself, so that parameters keep the names of the checkpoint.

    Inside, `module(...)` has to mean the class's own forward: the binding is lifted during the call.
    """

    def bound(self: torch.nn.Module, *tensors: torch.Tensor) -> tuple[Any, ...]:
        with own_forward(self):
            return forward(self, *tensors)

    module.forward = types.MethodType(bound, module)
    module.__dict__[ADAPTER] = forward
    return module.eval().requires_grad_(False)


ADAPTER = "_optimize_adapter"


class Adapted(torch.nn.Module):
    """A component's module with its own forward back in place, called through its adapter: what compilers take."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.adapter: Callable[..., tuple[Any, ...]] = module.__dict__[ADAPTER]
        module.__dict__.pop("forward", None)
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        return self.adapter(self.module, *tensors)


@contextlib.contextmanager
def own_forward(module: torch.nn.Module) -> Iterator[None]:
    bound = module.__dict__.pop("forward")
    try:
        yield
    finally:
        module.__dict__["forward"] = bound


def fused(module: torch.nn.Module) -> Mapping[str, Any]:
    """Rewrites the module with our own operators, its own forward behind the adapter's too. Gives the report."""
    from optimize import kernels

    with own_forward(module):
        found: Mapping[str, Any] = kernels.fuse(module).as_dict()
    return found


def cast(module: torch.nn.Module, precision: str) -> torch.nn.Module:
    """Parameters and persistent buffers take the precision. A diffusers or transformers model keeps its computed
    buffers (frequencies, position tables) and the modules that its authors keep in fp32, as when it is loaded with
    `torch_dtype`; of a plain torch module everything is cast, as by `module.half()`."""
    dtype = getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision])
    kept = list(getattr(module, "_keep_in_fp32_modules", None) or []) if precision == "fp16" else []
    persistent = set(module.state_dict()) if hasattr(module, "from_pretrained") else dict(module.named_buffers()).keys()
    tied: dict[int, tuple[torch.Tensor, torch.nn.Parameter]] = {}  # old (kept alive) and new, by the old one's id
    for prefix, child in module.named_modules():
        keep = any(part in kept for part in prefix.split("."))
        target = torch.float32 if keep else dtype
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                new = tied.get(id(parameter), (None, None))[1]
                if new is None or new.dtype != target:
                    new = torch.nn.Parameter(parameter.to(target), requires_grad=False)
                    tied[id(parameter)] = (parameter, new)
                child._parameters[name] = new
        for name, buffer in child._buffers.items():
            full = f"{prefix}.{name}" if prefix else name
            if buffer is not None and full in persistent and buffer.is_floating_point():
                child._buffers[name] = buffer.to(target)
    return module


def buffers_to_meta(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Moves all buffers to meta and returns their real values by name."""
    real = dict(module.named_buffers(remove_duplicate=False))
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to("meta")
    return real


def dynamic_dims(spec: TensorSpec, component: Component, dims: dict[str, Any]) -> dict[int, Any]:
    """torch's description of which sizes vary. A size of one axis is `step / divisor` times its unit."""
    found = {}
    for i, dim in enumerate(spec.shape):
        if isinstance(dim, int) or all(component.axes[n].static for n, _ in dim_terms(dim)):
            continue
        terms = dim_terms(dim)
        if len(terms) > 1:
            found[i] = torch.export.Dim.AUTO
            continue
        ((name, divisor),) = terms
        axis = component.axes[name]
        if name not in dims:
            dims[name] = torch.export.Dim(f"{name}_", min=axis.min // axis.step, max=axis.max // axis.step)
        factor = axis.step // divisor
        found[i] = dims[name] if factor == 1 else factor * dims[name]
    return found


@contextlib.contextmanager
def fast_tracing() -> Iterator[None]:
    """Leaves are kept whole; fake tensors are not cached: with symbolic sizes that costs more than it saves. No stack
    trace at each node: a fifth of the time, and the module path says where a node is from."""
    from torch._dynamo import config
    from torch.fx import config as fx_config

    from .leaves import KeepLeaves

    quiet = patch.object(fx_config, "do_not_emit_stack_traces", True)
    with config.patch(fake_tensor_cache_enabled=False), quiet, torch.no_grad(), KeepLeaves():
        yield


def trace_component(component: Component, precision: str) -> Traced:
    """Traces at the component's `traced` sizes. Raises GateError where the model cannot take its axes as they are."""
    module = cast(component.build(), precision)
    fusions = fused(module) if component.kernels else {}
    constants = buffers_to_meta(module)
    sizes = component.shape_sets()["traced"]
    tensors = [
        torch.empty(spec.sizes(sizes), dtype=getattr(torch, spec.torch_dtype(precision)), device="meta")
        for spec in component.inputs
    ]
    dims: dict[str, Any] = {}
    dynamic = tuple(dynamic_dims(spec, component, dims) for spec in component.inputs)
    try:
        with fast_tracing():
            program = torch.export.export(module, tuple(tensors), dynamic_shapes={"tensors": dynamic}, strict=False)
    except Exception as e:  # torch raises many kinds here; each means that this model does not trace
        raise GateError(
            f"{component.name} could not be traced",
            got=f"{type(e).__name__}: {str(e).strip()[:1500]}",
            mend="if a size is named above, make that axis static (--axis NAME=SIZE)",
        ) from e
    return Traced(program, constants, module, fusions)
