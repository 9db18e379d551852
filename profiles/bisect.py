"""After a missed gate: the first node whose value departs, and a command that shows the miss again.

Every ONNX node carries the name of the torch node that it computes. The traced torch graph is run node by node, and a
binary search over the values that both graphs have finds where they part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from optimize.compile.emulate import emulated
from optimize.compile.external import weight_maker
from optimize.compile.feeds import feeds_for
from optimize.compile.onnx_model import same_as
from optimize.compile.runners import EagerRunner, OnnxRuntimeRunner
from optimize.compile.spec import Component
from optimize.compile.trace import Traced, trace_component
from optimize.compile.translate import ORIGIN, translation
from optimize.compile.wide import WideHalf, WideRange, weight_in

from .parity import FP32_LIMIT, distance, widened

DEPARTS = {"fp32": FP32_LIMIT, "fp16": 0.004, "bf16": 0.03}
"""Relative error from which a single value counts as another one: the gate's own in fp32, gross in the others."""


class TorchGraph(torch.fx.Interpreter):
    """Runs a graph that was traced on meta tensors on the CPU, keeping each node's value."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, torch.Tensor] = {}
        self.garbage_collect_values = True

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        if str(target) == "aten._assert_tensor_metadata.default":
            return None
        return super().call_function(target, args, kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.values[n.name] = result
        return result


def torch_values(
    traced: Traced, component: Component, feeds: Mapping[str, torch.Tensor], wide: bool = False
) -> dict[str, torch.Tensor]:
    """The value of each node of the traced graph for these feeds, by its name; `wide`: fp16 with fp32's range."""
    signature = traced.program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    weights = component.weights.bind(traced.module)
    tied, given = same_as(traced.module), iter(component.inputs)
    checkpoint = set(traced.module.state_dict())
    arguments: list[torch.Tensor] = []
    for node in traced.program.graph.find_nodes(op="placeholder"):
        name = names.get(node.name)
        meta = node.meta["val"]
        if name is None:
            arguments.append(feeds[next(given).name])
        elif name in checkpoint:
            arguments.append(weight_in(weights.tensor(tied.get(name, name)), meta.dtype, wide).reshape(meta.shape))
        elif name in traced.constants:
            arguments.append(traced.constants[name])
        else:
            known = traced.program.constants[name]
            arguments.append(known if known.device.type != "meta" else torch.empty(meta.shape, dtype=meta.dtype))
    graph = TorchGraph(traced.program.graph_module)
    with torch.no_grad(), WideRange() if wide else contextlib.nullcontext():
        graph.run(*arguments, enable_io_processing=False)
    return {name: t.wide if isinstance(t, WideHalf) else t for name, t in graph.values.items()}


def shared_values(model: ir.Model) -> list[tuple[ir.Node, str, str]]:
    """(node, its output, the torch node that the output is) in order: where a torch node's last ONNX node ends."""
    found = []
    for node in model.graph:
        origin = node.metadata_props.get(ORIGIN)
        value = node.outputs[0]
        inner = [u for u in value.uses() if u.node.metadata_props.get(ORIGIN) == origin]
        if origin and not inner and len(node.outputs) == 1:
            found.append((node, str(value.name), origin))
    return found


def first_departure(
    path: Path, component: Component, precision: str, sizes: dict[str, int], *, wide: bool = False
) -> str:
    """Words on the first node of the graph at `path` whose value is not torch's (`wide`: with fp32's range), at these
    axis sizes."""
    feeds = feeds_for(component.inputs, sizes, precision)
    model = ir.load(path)
    traced = trace_component(component, precision)
    weight = weight_maker(component.weights.bind(traced.module), same_as(traced.module))
    _, program = translation(traced, component, int(model.graph.opset_imports[""]), weight)
    expected = torch_values(program, component, feeds, wide)
    common = [(node, value, origin) for node, value, origin in shared_values(model) if origin in expected]
    sizes_agree = [
        c for c in common if c[0].outputs[0].shape is None or len(c[0].outputs[0].shape) == expected[c[2]].ndim
    ]
    if not sizes_agree:
        return "the graphs have no value in common"
    places = {node: (value, origin) for node, value, origin in sizes_agree}

    @cache
    def error(node: ir.Node) -> float:
        value, origin = places[node]
        return distance([value_of(model, path, value, feeds, precision)], [expected[origin]])[0]

    ends = [*(node for node in places if node.outputs[0].is_graph_output()), next(reversed(places))]
    wrong = next((node for node in ends if error(node) > DEPARTS[precision]), None)
    if wrong is None:
        return "none: each value is torch's within its precision, the error is spread over the graph"
    while True:  # a branch that is right can lie behind the guilty node: what the search finds is looked above again
        chain = [node for node in places if node in above(wrong)] + [wrong]
        low, high = 0, len(chain) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if error(chain[middle]) > DEPARTS[precision] else (middle + 1, high)
        found = chain[low]
        wrong = next((node for node in above(found, places) if error(node) > DEPARTS[precision]), found)
        if wrong is found:
            return f"{found.name} ({found.op_type}), relative error {error(found):.3g} in {places[found][0]}"


def above(node: ir.Node, until: Container[ir.Node] = ()) -> set[ir.Node]:
    """The nodes that this one depends on, going no further than those of `until`."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        producers = {v.producer() for v in waiting.pop().inputs if v is not None}
        for maker in producers - found - {None}:
            assert maker is not None
            found.add(maker)
            if maker not in until:
                waiting.append(maker)
    return {n for n in found if n in until} if until else found


def value_of(
    model: ir.Model, path: Path, value: str, feeds: Mapping[str, torch.Tensor], precision: str
) -> torch.Tensor:
    """One value of the graph: the part that computes it, run in ONNX Runtime."""
    names = {str(v.name): v for v in model.graph.inputs}
    part: Any = ir.convenience.extract(model.graph, list(names), [value])
    part.opset_imports.update(model.opset_imports)
    piece = ir.Model(part, ir_version=model.ir_version, functions=list(model.functions.values()))
    file = path.with_name("departure.onnx")
    ir.save(emulated(piece, "bf16") if precision == "bf16" else piece, file)
    given = widened(feeds) if precision == "bf16" else feeds
    try:
        with OnnxRuntimeRunner(file) as runner:
            return runner.infer(given)[value]
    finally:
        file.unlink()


def write_reproduction(path: Path, component: Component, precision: str, sizes: dict[str, int], folder: Path) -> str:
    """Writes the feeds and eager's outputs in polygraphy's form; gives the polygraphy command that compares."""
    feeds = feeds_for(component.inputs, sizes, precision)
    with EagerRunner(component, "fp32") as eager:
        outputs = eager.infer(widened(feeds))
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
    except ImportError:
        return "install polygraphy to have a command written here"
    G_LOGGER.severity = G_LOGGER.ERROR  # it writes on stdout otherwise
    if precision == "bf16":  # ONNX Runtime's CPU provider has no bf16 kernels: the same graph, emulated
        copy = path.with_name(f"{path.stem}.emulated.onnx")
        ir.save(emulated(ir.load(path), "bf16"), copy)
        path = copy
    arrays = {k: t.numpy() if t.dtype != torch.bfloat16 else t.float().numpy() for k, t in feeds.items()}
    save_json([arrays], str(folder / "inputs.json"))
    results = RunResults()
    results.append(
        ("eager-fp32", [IterationResult(outputs={k: t.numpy() for k, t in outputs.items()}, runner_name="eager-fp32")])
    )
    results.save(str(folder / "reference.json"))
    return (
        f"polygraphy run {path} --onnxrt --load-inputs {folder / 'inputs.json'} "
        f"--load-outputs {folder / 'reference.json'} --rtol 1e-4 --atol 1e-4 --check-error-stat max"
    )
