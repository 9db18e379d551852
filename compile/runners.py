"""Runners: context managers with one method, `infer(feeds) -> outputs`, torch tensors by name on both sides."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from optimize.errors import InputError, MissingError
from optimize.kernels.functions import DOMAIN

from .onnx_model import same_as
from .spec import Component
from .streaming import DivergedError, groups_of, return_large_blocks, run_together, set_tensor, streamed_module
from .trace import cast
from .wide import WideHalf, WideRange, weight_in

Feeds = Mapping[str, torch.Tensor]


class Runner(Protocol):
    """`with runner: outputs = runner.infer(feeds)`. Outputs live as long as the caller keeps them."""

    name: str

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: Any) -> None: ...
    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]: ...


def check_names(feeds: Feeds, expected: Sequence[str]) -> None:
    if set(feeds) != set(expected):
        raise InputError(
            "the feeds do not fit the component", got=", ".join(sorted(feeds)), expected=", ".join(expected)
        )


# --- eager -----------------------------------------------------------------------------------------------------------


def loaded_module(component: Component, precision: str, wide: bool = False) -> torch.nn.Module:
    """The torch module with its weights in this precision, tied ones shared; `wide` as in `wide.weight_in`."""
    module = cast(component.build(), precision)
    weights = component.weights.bind(module)
    tied = same_as(module)
    made: dict[str, torch.Tensor] = {}
    for name, slot in list(module.state_dict(keep_vars=True).items()):
        source = tied.get(name, name)
        if source not in made:
            made[source] = weight_in(weights.tensor(source), slot.dtype, wide).reshape(slot.shape).contiguous()
        set_tensor(module, name, made[source])
    return module


class HalfProducts(TorchFunctionMode):
    """Eager fp16's convolutions and matrix products on a CPU: computed in fp32, rounded to fp16.

    torch's own half kernels there accumulate in fp32 and round once too: the same error (2.0762e-4 and 2.0762e-4 for
    a 320-channel convolution), 30 times slower for a convolution and 3 times for a linear layer.
    """

    PRODUCTS = frozenset(
        {
            torch.conv1d,
            torch.conv2d,
            torch.conv3d,
            torch.conv_transpose2d,
            torch.nn.functional.linear,
            torch.matmul,
            torch.bmm,
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func not in self.PRODUCTS or not isinstance(first, torch.Tensor) or first.dtype != torch.float16:
            return func(*args, **(kwargs or {}))
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        named = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named).half()


class EagerRunner:
    """torch as it is: the reference. `streamed` reads each module's weights when it runs and forgets them after.

    `wide` gives fp16 the range of fp32 (`compile/wide.py`); its outputs are fp32 then.
    """

    name = "eager"

    def __init__(
        self, component: Component, precision: str = "fp32", *, streamed: bool = False, wide: bool = False
    ) -> None:
        self.component, self.precision, self.streamed, self.wide = component, precision, streamed, wide
        self._module: torch.nn.Module | None = None

    def __enter__(self) -> Self:
        if self.streamed:
            return_large_blocks()
            self._module = streamed_module(self.component, self.precision, wide=self.wide)
        else:
            self._module = loaded_module(self.component, self.precision, self.wide)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._module = None

    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        assert self._module is not None, "use the runner in a with statement"
        return self.called(self._module, feeds)

    def infer_all(self, feeds: Sequence[Feeds]) -> list[dict[str, torch.Tensor]]:
        """`infer` of each. Streamed runs go together, so that each weight is read once for all of them."""
        if not self.streamed or len(feeds) < 2:
            return [self.infer(f) for f in feeds]
        results: list[dict[str, torch.Tensor]] = []
        for group in groups_of(feeds):
            calls = [functools.partial(self.called, feeds=f) for f in group]
            try:
                results += run_together(self.component, self.precision, calls, self.wide)
            except DivergedError:
                results += [self.infer(f) for f in group]
        return results

    def called(self, module: torch.nn.Module, feeds: Feeds) -> dict[str, torch.Tensor]:
        check_names(feeds, [t.name for t in self.component.inputs])
        given = [feeds[t.name] for t in self.component.inputs]
        if self.wide:
            with torch.no_grad(), WideRange():
                outputs = [t.wide if isinstance(t, WideHalf) else t for t in module(*given)]
        else:
            with torch.inference_mode(), HalfProducts():
                outputs = module(*given)
        return dict(zip(self.component.outputs, outputs, strict=True))


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------

NUMPY_OF_ORT = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
}


class OnnxRuntimeRunner:
    """ONNX Runtime on one provider. A session that would put a node elsewhere is refused.

    A graph with nodes of `ai.optimize` runs on the native library where that was built (`native=None`), on it or not at
    all (True: MissingError without it), or by the functions' bodies (False). `entries` are session options by name.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        *,
        threads: int = 0,
        optimize: bool = True,
        native: bool | None = None,
        entries: Mapping[str, str] = {},
    ) -> None:
        self.entries = entries
        self.path, self.provider, self.threads, self.optimize, self.native = path, provider, threads, optimize, native
        self._session: Any = None

    def __enter__(self) -> Self:
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingError("ONNX Runtime is not installed", mend="pip install onnxruntime-gpu (or onnxruntime)")
        import onnxruntime as ort

        if self.provider not in ort.get_available_providers():
            raise MissingError(
                f"ONNX Runtime has no {self.provider} here", got=", ".join(ort.get_available_providers())
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        if not self.optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self.native is not False and uses_kernels(self.path):
            library = native_library(self.provider, required=self.native is True)
            if library is not None:
                options.register_custom_ops_library(str(library))
        self._session = ort.InferenceSession(str(self.path), options, providers=[self.provider])
        if self._session.get_providers()[0] != self.provider:
            raise MissingError(f"ONNX Runtime fell back from {self.provider}", got=self._session.get_providers())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        assert self._session is not None, "use the runner in a with statement"
        inputs = {i.name: i.type for i in self._session.get_inputs()}
        unused = set(feeds) - set(inputs)
        check_names({n: t for n, t in feeds.items() if n not in unused}, list(inputs))
        arrays: dict[str, Any] = {
            n: feeds[n].numpy().astype(NUMPY_OF_ORT[kind], copy=False) for n, kind in inputs.items()
        }
        names = [o.name for o in self._session.get_outputs()]
        return {n: torch.from_numpy(np.asarray(v)) for n, v in zip(names, self._session.run(None, arrays), strict=True)}


def uses_kernels(path: Path) -> bool:
    """Whether the graph has nodes of ours: the name of their domain stands in the file."""
    return DOMAIN.encode() in path.read_bytes()


def native_library(provider: str = "CPUExecutionProvider", *, required: bool = False) -> Path | None:
    """The operator library for ONNX Runtime; where it has nothing for the provider None, or MissingError where it is
    `required`."""
    from optimize.kernels.native_library import cubins, ort_library

    try:
        library = ort_library()
        if provider != "CPUExecutionProvider" and not cubins(library):
            raise MissingError(
                "the native library was built without GPU kernels",
                got=library,
                expected=f"kernels for {provider}",
                mend="build it with OPTIMIZE_CUBINS (see kernels/native_cubins.py), or run the nodes' bodies",
            )
    except MissingError:
        if required:
            raise
        return None
    return library


BACKENDS: Mapping[str, Callable[..., OnnxRuntimeRunner]] = {"onnxruntime": OnnxRuntimeRunner}
"""Backend name -> a runner of an artifact's file."""
