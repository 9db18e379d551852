"""TensorRT's times by layer, mapped back to modules through the ONNX nodes that a layer's metadata names.

An `IProfiler` is told each layer's time after each run, by the layer's name; the inspector's description of the engine
(JSON, with detailed verbosity) says which ONNX nodes that layer computes. Reading and mapping are apart from running,
so that they are tested without a GPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.compile.tensorrt import EngineLayer

from .counts import COUNTS, PRODUCTS
from .operators import WARM, Piece, Profiled, Run, median_ms
from .work import module_of

if TYPE_CHECKING:
    from optimize.compile.engine_runner import EngineRunner
    from optimize.compile.runners import Feeds

PROVIDER = "TensorRT"


def profile_engine(runner: EngineRunner, feeds: Feeds, runs: int, trace: Path | None) -> Profiled:
    """Runs an engine with a profiler that is told each layer's time. Its layers run one by one then."""
    import torch

    plain = type(runner)(runner.path, runner.module)  # a CUDA graph tells a profiler nothing
    with plain:
        run = plain.bind(feeds)
        unprofiled = median_ms(run, runs, torch.cuda.synchronize)
        engine, context = plain._engine, plain._context
        layers = layers_from_json(inspected(plain, engine, context))
        recorder = recorder_for(plain.module)
        context.profiler = recorder
        found = []
        for _ in range(WARM + runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            recorder.times.clear()
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(Run(begin.elapsed_time(end), list(pieces_of(recorder.times, layers))))
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(found[WARM:])))
    return Profiled(found[WARM:], "TensorRT's profiler of layers", unprofiled, trace)


def inspected(runner: EngineRunner, engine: Any, context: Any) -> str:
    trt = import_module(runner.module)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def recorder_for(module: str) -> Any:
    """An `IProfiler` of this product that keeps what it is told: `times`, pairs of layer and milliseconds."""
    trt = import_module(module)

    class Recorder(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, ms))

    return Recorder()


def layers_from_json(text: str) -> tuple[EngineLayer, ...]:
    """The inspector's list. A layer of an engine without detailed verbosity is its name alone."""
    from optimize.compile.tensorrt import _onnx_nodes

    found = []
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, str):
            found.append(EngineLayer(layer, "", (), (), ()))
            continue
        reads, writes = (
            tuple(str(t.get("Format/Datatype", t.get("Datatype", ""))) for t in layer.get(side, []))
            for side in ("Inputs", "Outputs")
        )
        nodes = _onnx_nodes(layer.get("Metadata", ""))
        found.append(EngineLayer(layer["Name"], layer.get("LayerType", ""), reads, writes, nodes))
    return tuple(found)


def pieces_of(times: Iterable[tuple[str, float]], layers: Sequence[EngineLayer]) -> Iterator[Piece]:
    known = {layer.name: layer for layer in layers}
    for name, ms in times:
        layer = known.get(name, EngineLayer(name, "", (), (), ()))
        module, kind = place_of(layer)
        yield Piece(module, kind, name, ms, PROVIDER)


def place_of(layer: EngineLayer) -> tuple[str, str]:
    """The module and the kind of what weighs most in a layer: a product, else a norm, else what it has most of."""
    nodes = [(module_of(n), kind_of_node(n)) for n in nodes_in(layer)]
    for kinds in (PRODUCTS, {"norm"}):
        if heavy := [n for n in nodes if n[1] in kinds]:
            return heavy[0]
    if nodes:
        return Counter(nodes).most_common(1)[0][0]
    return "", KINDS.get(layer.kind.lower(), "layout" if "reformat" in layer.name.lower() else "other")


KINDS: Mapping[str, str] = {
    "convolution": "convolution", "caskconvolution": "convolution", "gemm": "matmul", "matrix_multiply": "matmul",
    "caskgemm": "matmul", "reformat": "layout", "shuffle": "layout", "noop": "layout", "slice": "layout",
    "constant": "layout", "kgen": "elementwise", "pointwise": "elementwise", "pointwisev2": "elementwise",
}  # fmt: skip
"""A layer's type -> kind of work, where no ONNX node says it."""


def nodes_in(layer: EngineLayer) -> tuple[str, ...]:
    """From the metadata; without it from the name, where TensorRT joins nodes with ` + `."""
    if layer.onnx:
        return layer.onnx
    parts = layer.name.replace("PWN(", "").replace(")", "").split(" + ")
    return tuple(p.strip() for p in parts if "/" in p)


def kind_of_node(name: str) -> str:
    """Our nodes' names end in the operator and perhaps a number: `attn1/Attention_2`; so do their parts (`x.q`)."""
    words = name.partition("/")[2].split("/")
    operator = words[0].partition("_")[0]
    if words[-1].endswith((".q", ".dq")):
        return "quantize"
    return COUNTS[operator][0] if operator in COUNTS else "other"


def chrome_trace(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Layers one after the other, run by run, as a trace to open in Chrome or Perfetto. Times are microseconds."""
    events: list[dict[str, Any]] = []
    start = 0.0
    for i, run in enumerate(runs):
        events.append(
            {"ph": "X", "name": f"run {i}", "cat": "run", "pid": 0, "tid": 0, "ts": start, "dur": run.ms * 1e3}
        )
        at = start
        for p in run.pieces:
            words = {"module": p.module, "operator": p.operator}
            events.append(
                {
                    "ph": "X",
                    "name": p.kernel,
                    "cat": "layer",
                    "pid": 0,
                    "tid": 1,
                    "ts": at,
                    "dur": p.ms * 1e3,
                    "args": words,
                }
            )
            at += p.ms * 1e3
        start += run.ms * 1e3
    return events
