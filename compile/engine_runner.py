"""TensorRT engines as runners: tensors bound where they lie, on torch's stream; as a CUDA graph where asked."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch

from optimize.errors import GateError, InputError, MissingError

from .runners import Bound, Feeds, check_names

TORCH_OF_TENSORRT = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class EngineRunner:
    """An engine of TensorRT or TensorRT-RTX (`module` is its Python module). `graphs` captures a bound run once and
    replays it."""

    def __init__(self, path: Path, module: str = "tensorrt", *, graphs: bool = False) -> None:
        self.path, self.module, self.graphs = path, module, graphs
        self.name = "tensorrt-cudagraphs" if graphs else "tensorrt"
        self._trt: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._last: Any = None
        """The inputs that the context has the addresses of."""
        self._captured: dict[Any, tuple[dict[str, torch.Tensor], Bound]] = {}
        """Sizes -> what a CUDA graph reads, and a run of it."""

    def __enter__(self) -> Self:
        if not torch.cuda.is_available():
            raise MissingError(
                "an engine runs on a GPU", got="no CUDA device", expected="the GPU that it was built for"
            )
        try:
            self._trt = import_module(self.module)
        except (ImportError, OSError) as e:
            raise MissingError(f"{self.module} cannot be imported", got=e, mend=f"pip install {self.module}") from e
        runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        self._context = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            raise MissingError(
                f"{self.path.name} does not load here",
                got=f"{self.module} {self._trt.__version__} on {torch.cuda.get_device_name()}",
                expected="the version and the GPU that it was built for",
                mend="optimize build DIR --target current",
            )
        return self

    def __exit__(self, *error: Any) -> None:
        self._captured.clear()
        self._context = self._engine = self._last = None

    def names(self, mode: str) -> list[str]:
        every = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        return [n for n in every if self._engine.get_tensor_mode(n) == getattr(self._trt.TensorIOMode, mode)]

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_OF_TENSORRT[self._engine.get_tensor_dtype(name).name]

    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        if not self.graphs:
            return {n: t.clone() for n, t in self.bound(feeds)[1]().items()}
        inputs = self.names("INPUT")
        sizes = tuple((n, tuple(feeds[n].shape)) for n in inputs)
        if sizes not in self._captured:  # of its own tensors: they are written for each call
            own = {n: feeds[n].to("cuda", self.dtype(n), copy=True) for n in inputs}
            self._captured[sizes] = self.bound(own)
        given, run = self._captured[sizes]
        for name, tensor in given.items():
            tensor.copy_(feeds[name])
        return {n: t.clone() for n, t in run().items()}

    def bind(self, feeds: Feeds) -> Bound:
        return self.bound(feeds)[1]

    def bound(self, feeds: Feeds) -> tuple[dict[str, torch.Tensor], Bound]:
        """(what is bound as inputs, a run of it). Raises InputError for sizes outside of the engine's profile.

        A CUDA graph has a context of its own: what a captured one is fed next would change under the graph.
        """
        assert self._context is not None, "use the runner in a with statement"
        context = self._engine.create_execution_context() if self.graphs else self._context
        inputs = self.names("INPUT")
        check_names({n: t for n, t in feeds.items() if n in inputs}, inputs)
        given = {n: feeds[n].to("cuda", self.dtype(n)).contiguous() for n in inputs}
        self.point(context, given)
        outputs = {
            n: torch.empty(tuple(context.get_tensor_shape(n)), dtype=self.dtype(n), device="cuda")
            for n in self.names("OUTPUT")
        }
        once = self.enqueued(context, given, outputs)
        return given, self.replayed(once) if self.graphs else once

    def point(self, context: Any, given: dict[str, torch.Tensor]) -> None:
        """Gives the context these inputs' sizes and addresses."""
        self._last = None
        for name, tensor in given.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise InputError(
                    f"the engine does not take {name} in this size",
                    got=tuple(tensor.shape),
                    expected=f"{tuple(low)} to {tuple(high)}",
                    mend="build an engine with wider axes (--axis NAME=MIN:OPT:MAX)",
                )
            context.set_tensor_address(name, tensor.data_ptr())

    def enqueued(self, context: Any, given: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> Bound:
        """Other feeds may have been bound since: it is their addresses, maybe freed ones, that the context has then."""

        def run() -> dict[str, torch.Tensor]:
            if self._last is not given:
                self.point(context, given)
                for name, tensor in outputs.items():
                    context.set_tensor_address(name, tensor.data_ptr())
                self._last = given
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise GateError(f"{self.path.name}: TensorRT did not run it", mend="look at its log")
            return outputs

        return run

    def replayed(self, once: Bound) -> Bound:
        """Two runs outside of the graph first, as TensorRT asks: its lazy set-up cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # the inputs are converted there
        with torch.cuda.stream(stream):
            once(), once()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = once()

        def run(held: Any = once) -> dict[str, torch.Tensor]:
            graph.replay()
            return outputs

        return run
