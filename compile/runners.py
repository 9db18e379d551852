"""Runners: context managers that take and give torch tensors by name, `infer(feeds) -> outputs`, without copies where
the backend can. `bind(feeds)` gives a function that runs once on these feeds: what a measurement calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import from_dlpack

from optimize.errors import InputError, MissingError
from optimize.kernels.functions import DOMAIN

from .onnx_model import same_as
from .spec import Component
from .streaming import DivergedError, groups_of, return_large_blocks, run_together, set_tensor, streamed_module
from .trace import cast, fused
from .wide import WideHalf, WideRange, weight_in

Feeds = Mapping[str, torch.Tensor]
Bound = Callable[[], dict[str, torch.Tensor]]


class Runner(Protocol):
    """`with runner: outputs = runner.infer(feeds)`. Outputs live as long as the caller keeps them.

    Those of a bound run may lie in the same memory as those of its next one.
    """

    name: str

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: Any) -> None: ...
    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]: ...
    def bind(self, feeds: Feeds) -> Bound: ...


def check_names(feeds: Feeds, expected: Sequence[str]) -> None:
    if set(feeds) != set(expected):
        raise InputError(
            "the feeds do not fit the component", got=", ".join(sorted(feeds)), expected=", ".join(expected)
        )


# --- eager -----------------------------------------------------------------------------------------------------------


def loaded_module(component: Component, precision: str, wide: bool = False, device: str = "cpu") -> torch.nn.Module:
    """The torch module with its weights in this precision, tied ones shared; `wide` as in `wide.weight_in`.

    Each weight goes to `device` as it is read: the host never holds them all. Random ones are drawn by all cores, each
    tensor by one: a generator makes 200 million numbers a second, and SDXL's U-Net has 2.6 billion.
    """
    module = cast(component.build(), precision)
    weights = component.weights.bind(module)
    tied = same_as(module)
    slots = dict(module.state_dict(keep_vars=True))
    sources = {tied.get(name, name): slot for name, slot in reversed(slots.items())}  # of tied ones the first decides

    def made(source: str) -> torch.Tensor:
        slot = sources[source]
        tensor = weight_in(weights.tensor(source), slot.dtype, wide).reshape(slot.shape).contiguous()
        return tensor if device == "cpu" else tensor.to(device)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        each = (pool.map if weights.kind == "random" else map)(made, sources)
        found = dict(zip(sources, each, strict=True))
    for name in slots:
        set_tensor(module, name, found[tied.get(name, name)])
    return module if device == "cpu" else module.to(device)


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


@contextlib.contextmanager
def exact_arithmetic(device: str) -> Iterator[None]:
    """What a reference is computed with: on a CPU `HalfProducts`, on a GPU no TF32 in fp32. cuDNN takes it by default,
    and its 11 bits are fp16's: fp16 would be compared with an error as large as its own."""
    if device == "cpu":
        with HalfProducts():
            yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class EagerRunner:
    """torch as it is: the reference. `streamed` reads each module's weights when it runs and forgets them after.

    `wide` gives fp16 the range of fp32 (`compile/wide.py`); its outputs are fp32 then. `kernels` rewrites the module
    with our own operations (`kernels.fuse`): no reference any more.
    """

    name = "eager"

    def __init__(
        self,
        component: Component,
        precision: str = "fp32",
        *,
        streamed: bool = False,
        wide: bool = False,
        device: str = "cpu",
        kernels: bool = False,
    ) -> None:
        self.component, self.precision, self.streamed, self.wide = component, precision, streamed, wide
        self.device, self.kernels = device, kernels
        self._module: torch.nn.Module | None = None

    def __enter__(self) -> Self:
        if self.streamed:
            return_large_blocks()
            self._module = streamed_module(self.component, self.precision, wide=self.wide)
        else:
            self._module = loaded_module(self.component, self.precision, self.wide, self.device)
        if self.kernels:
            fused(self._module)
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

    def bind(self, feeds: Feeds) -> Bound:
        """torch's own kernels and settings: without `exact_arithmetic`, which only `infer` uses."""
        assert self._module is not None, "use the runner in a with statement"
        return bound_module(self._module, self.component, feeds, self.device)

    def called(self, module: torch.nn.Module, feeds: Feeds) -> dict[str, torch.Tensor]:
        check_names(feeds, [t.name for t in self.component.inputs])
        given = [feeds[t.name].to(self.device) for t in self.component.inputs]
        if self.wide:
            with torch.no_grad(), WideRange():
                outputs = [t.wide if isinstance(t, WideHalf) else t for t in module(*given)]
        else:
            with torch.inference_mode(), exact_arithmetic(self.device):
                outputs = module(*given)
        return dict(zip(self.component.outputs, outputs, strict=True))


def bound_module(
    module: Callable[..., Sequence[torch.Tensor]], component: Component, feeds: Feeds, device: str
) -> Bound:
    """One call of `module` with a component's inputs in order, on its device already."""
    check_names(feeds, [t.name for t in component.inputs])
    given = [feeds[t.name].to(device) for t in component.inputs]

    def run() -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return dict(zip(component.outputs, module(*given), strict=True))

    return run


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------

NUMPY_OF_ORT = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
}


TORCH_OF_ORT = {kind: torch.from_numpy(np.empty(0, numpy)).dtype for kind, numpy in NUMPY_OF_ORT.items()} | {
    "tensor(bfloat16)": torch.bfloat16
}
ONNX_OF_TORCH = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""torch type -> number of the type in ONNX's TensorProto."""
CPU = "CPUExecutionProvider"
SLOW_ON_CPU = ["SkipLayerNormFusion"]
"""Optimizers whose result takes longer than what they replace: the kernel for a sum and its norm six times (1.31)."""


class OnnxRuntimeRunner:
    """ONNX Runtime on one provider. A session that would put a node elsewhere is refused, with the nodes' names.

    Inputs and outputs are bound where they lie: nothing is copied. A graph with nodes of `ai.optimize` runs on the
    native library where that was built (`native=None`), on it or not at all (True: MissingError without it), or by the
    functions' bodies (False). `entries` are session options by name; `trace` is a file (without its end) that ONNX
    Runtime writes its own profile to.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        provider: str = CPU,
        *,
        threads: int = 0,
        optimize: bool = True,
        native: bool | None = None,
        entries: Mapping[str, str] = {},
        trace: Path | None = None,
    ) -> None:
        self.entries, self.trace = entries, trace
        self.path, self.provider, self.threads, self.optimize, self.native = path, provider, threads, optimize, native
        self._session: Any = None
        self._stream: Any = None

    @property
    def device(self) -> str:
        return "cpu" if self.provider == CPU else "cuda"

    def __enter__(self) -> Self:
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingError("ONNX Runtime is not installed", mend="pip install onnxruntime-gpu (or onnxruntime)")
        import onnxruntime as ort

        if self.provider not in ort.get_available_providers():
            raise MissingError(
                f"ONNX Runtime has no {self.provider} here", got=", ".join(ort.get_available_providers())
            )
        if self.device != "cpu" and torch.cuda.is_available():
            self._stream = torch.cuda.Stream()
        self._session = ort.InferenceSession(
            str(self.path),
            self.options(ort),
            providers=self.providers(),
            disabled_optimizers=SLOW_ON_CPU if self.provider == CPU else None,
        )
        check_placement(self._session, self.provider, self.path)
        return self

    def providers(self) -> list[Any]:
        """On a GPU with a stream of ours. torch's default one is no such: its number is 0, which ONNX Runtime takes for
        none, and computes on a stream of its own that torch's events do not see."""
        if self._stream is None:  # without a GPU it falls back, and is refused for that
            return [self.provider]
        return [(self.provider, {"user_compute_stream": str(self._stream.cuda_stream)})]

    def options(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(PLACEMENT, "1")
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        if not self.optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self.trace is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(self.trace)
        if self.native is not False and uses_kernels(self.path):
            library = native_library(self.provider, required=self.native is True)
            if library is not None:
                options.register_custom_ops_library(str(library))
        return options

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = self._stream = None

    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        return self.bind(feeds)()

    def bind(self, feeds: Feeds) -> Bound:
        assert self._session is not None, "use the runner in a with statement"
        import onnxruntime as ort

        inputs = {i.name: i.type for i in self._session.get_inputs()}
        unused = set(feeds) - set(inputs)
        check_names({n: t for n, t in feeds.items() if n not in unused}, list(inputs))
        given = {n: feeds[n].to(self.device, TORCH_OF_ORT[kind]).contiguous() for n, kind in inputs.items()}
        names = [o.name for o in self._session.get_outputs()]
        binding = self._session.io_binding()
        for name, tensor in given.items():
            bind_tensor(binding, name, tensor)
        session, device, words, stream = self._session, self.device, None, self._stream
        if device != "cpu":  # streams order the work; who reads the outputs waits for it
            words = ort.RunOptions()
            words.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def run(held: Any = given) -> dict[str, torch.Tensor]:
            for name in names:  # anew for each run, else it writes over what the last one gave
                binding.bind_output(name, device)
            with ordered(stream):
                session.run_with_iobinding(binding, words)
            return {n: tensor_of(v) for n, v in zip(names, binding.get_outputs(), strict=True)}

        return run


@contextlib.contextmanager
def ordered(stream: Any) -> Iterator[None]:
    """Work on `stream` (None: on a CPU) after what torch's current stream has to do, and before what it gets next."""
    if stream is None:
        yield
        return
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    yield
    here.wait_stream(stream)


PLACEMENT = "session.record_ep_graph_assignment_info"
"""Session option: ONNX Runtime (1.24 and later) keeps which provider each node was given to."""


SIZES = "sizes/"
"""Names of the nodes that compute sizes from sizes: providers of GPUs leave those to the CPU, where sizes are."""


def check_placement(session: Any, provider: str, path: Path) -> None:
    """Raises MissingError where ONNX Runtime fell back from `provider`, whole or for some nodes."""
    if session.get_providers()[0] != provider:
        raise MissingError(
            f"ONNX Runtime fell back from {provider} for {path.name}",
            got=", ".join(session.get_providers()),
            expected=f"{provider} alone",
            mend="look at ONNX Runtime's own words for what the provider lacks (a driver, CUDA or TensorRT libraries)",
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        if provider != CPU:
            raise MissingError(
                "this ONNX Runtime does not say where it runs each node",
                expected="onnxruntime 1.24 or later",
                mend='pip install "onnxruntime-gpu>=1.24"',
            )
        return
    elsewhere = [
        f"{node.name} ({node.op_type}) on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if not (part.ep_name == CPU and node.name.startswith(SIZES))
    ]
    if elsewhere:
        raise MissingError(
            f"ONNX Runtime would run {len(elsewhere)} nodes of {path.name} on another provider than {provider}",
            got=", ".join(elsewhere[:8]) + (" ..." if len(elsewhere) > 8 else ""),
            expected=f"every node on {provider}",
            mend="use a backend that takes the whole graph: data that move back and forth make such sessions slow",
        )


def bind_tensor(binding: Any, name: str, tensor: torch.Tensor) -> None:
    """Binds the tensor's own memory as an input. It has to live as long as the binding is used."""
    import onnxruntime as ort

    kind, shape, device = ONNX_OF_TORCH[tensor.dtype], tuple(tensor.shape), tensor.device
    if not tensor.numel():  # it has no memory to bind
        empty = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device.type, device.index or 0)
        binding.bind_ortvalue_input(name, empty)
        return
    binding.bind_input(name, device.type, device.index or 0, kind, shape, tensor.data_ptr())


def tensor_of(value: Any) -> torch.Tensor:
    """An output as a torch tensor in the same memory."""
    if not all(value.shape()):
        kind = TORCH_OF_ORT[value.data_type()]
        return torch.empty(value.shape(), dtype=kind, device=value.device_name())
    found: torch.Tensor = from_dlpack(value._ortvalue.to_dlpack())  # a capsule: a tenth of torch.from_dlpack's time
    return found.bool() if value.data_type() == "tensor(bool)" else found


def uses_kernels(path: Path) -> bool:
    """Whether the graph has nodes of ours: the name of their domain stands in the file."""
    return DOMAIN.encode() in path.read_bytes()


def native_library(provider: str = CPU, *, required: bool = False) -> Path | None:
    """The operator library for ONNX Runtime; where it has nothing for the provider None, or MissingError where it is
    `required`."""
    from optimize.kernels.native_library import cubins, ort_library

    try:
        library = ort_library()
        if provider != CPU and not cubins(library):
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
