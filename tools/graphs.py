"""An ONNX file as data, without its weights: what `optimize inspect` tells of one graph."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError
from optimize.tools.fusions import Site, sites_of

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = 10
NO_WEIGHTS = frozenset({"int64", "int32", "bool", "string"})  # indices, sizes, masks


@dataclass(frozen=True)
class Tensor:
    """An input or output; `dims` are sizes, or the names of axes that may vary ("?" where there is none)."""

    name: str
    dtype: str
    dims: Sequence[int | str]


@dataclass(frozen=True)
class Weight:
    name: str
    dtype: str
    dims: Sequence[int]
    bytes: int


@dataclass(frozen=True)
class Axis:
    """An axis that may vary: its `min:opt:max` where the file says it, and the input dimensions that it is in."""

    name: str
    range: str | None
    where: Sequence[str]


@dataclass(frozen=True)
class Graph:
    """One graph.

    `nodes` and `operators` count subgraphs too, but no function's body. `parameters` are the elements of constants that
    have dimensions and are no indices, `weight_bytes` their size; `precision` the shares by type, of `parameters` and
    of node `outputs`.
    """

    name: str
    path: str
    file_bytes: int
    opset: int
    opsets: Mapping[str, int]
    ir_version: int
    producer: str
    metadata: Mapping[str, str]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    axes: Sequence[Axis]
    nodes: int
    operators: Mapping[str, int]
    parameters: int
    weight_bytes: int
    precision: Mapping[str, Mapping[str, float]]
    largest: Sequence[Weight]
    sites: Sequence[Site]
    warnings: Sequence[str]


def model_from_file(path: Path) -> ir.Model:
    """Reads a graph; weights in other files stay there. Raises InputError for what is missing or is no ONNX."""
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its stubs are a package apart

    if not path.is_file():
        raise InputError(f"{path} is missing", expected="an ONNX file")
    try:
        model = ir.load(path, format="protobuf")
    except DecodeError as e:
        raise InputError(f"{path} is no ONNX file", got=str(e), mend="a cut download? export it again") from e
    if not model.graph.outputs:
        raise InputError(f"{path} is no ONNX file", got="a graph without outputs", mend="export it again")
    return model


def graph_from_file(path: Path, name: str, said: Mapping[str, Any] | None = None) -> Graph:
    """What the file says. `said`: what the manifest says of it, `declined` by the clean-up, `fusions` by kernels."""
    model = model_from_file(path)
    infer_types(model)
    nodes = list(model.graph.all_nodes())
    operators = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes)
    weights = sorted(weights_of(model), key=lambda w: -w[0].bytes)
    elements: Counter[str] = Counter()
    for weight, count in weights:
        elements[weight.dtype] += count
    outputs = Counter(dtype_of(v.dtype) for node in nodes for v in node.outputs)
    return Graph(
        name=name,
        path=str(path),
        file_bytes=path.stat().st_size,
        opset=model.opset_imports.get("", 0),
        opsets=dict(model.opset_imports),
        ir_version=model.ir_version,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        metadata=dict(model.metadata_props),
        inputs=tuple(map(tensor_of, model.graph.inputs)),
        outputs=tuple(map(tensor_of, model.graph.outputs)),
        axes=tuple(axes_of(model)),
        nodes=len(nodes),
        operators=dict(operators.most_common()),
        parameters=elements.total(),
        weight_bytes=sum(w.bytes for w, _ in weights),
        precision={"parameters": shares_of(elements), "outputs": shares_of(outputs)},
        largest=tuple(w for w, _ in weights[:LARGEST]),
        sites=tuple(sites_of(model, *declined_in(said or {}))),
        warnings=tuple(warnings_of(model)),
    )


def declined_in(said: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[Any]]:
    return said.get("declined", {}), said.get("fusions", {}).get("declined", ())


def infer_types(model: ir.Model) -> None:
    """Types of values that the exporter left out, as far as onnx can tell them."""
    if all(v.dtype is not None for node in model.graph.all_nodes() for v in node.outputs):
        return
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)


def dtype_of(dtype: ir.DataType | None) -> str:
    """A type by the name that NumPy and ml_dtypes give it."""
    name = "unknown" if dtype is None else dtype.name.lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def tensor_of(value: ir.Value) -> Tensor:
    return Tensor(str(value.name), dtype_of(value.dtype), tuple(map(dim_of, value.shape or ())))


def dim_of(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value or "?")


def axes_of(model: ir.Model) -> Iterator[Axis]:
    """Every name in the inputs' dimensions, in order; `height/4` is the axis height."""
    ranges = json.loads(model.metadata_props.get("optimize.axes", "{}"))
    found: dict[str, list[str]] = {}
    for tensor in map(tensor_of, model.graph.inputs):
        for i, dim in enumerate(tensor.dims):
            for name in re.findall(r"[A-Za-z_][\w.]*|\?", dim) if isinstance(dim, str) else ():
                found.setdefault(name, []).append(f"{tensor.name}[{i}]")
    return (Axis(name, ranges.get(name), tuple(where)) for name, where in found.items())


def weights_of(model: ir.Model) -> Iterator[tuple[Weight, int]]:
    """Each weight with its number of elements: initializers, and what older exporters put into Constant nodes."""
    named = [(name, v.const_value) for graph in model.graphs() for name, v in graph.initializers.items()]
    named += [
        (str(n.outputs[0].name), n.attributes["value"].as_tensor())
        for n in model.graph.all_nodes()
        if n.op_type == "Constant" and "value" in n.attributes
    ]
    for name, tensor in named:
        if tensor is None or not len(tensor.shape) or dtype_of(tensor.dtype) in NO_WEIGHTS:
            continue
        dims = tuple(int(d) for d in tensor.shape.numpy())
        yield Weight(name, dtype_of(tensor.dtype), dims, tensor.nbytes), tensor.size


def shares_of(counts: Counter[str]) -> dict[str, float]:
    total = counts.total()
    return {dtype: round(count / total, 6) for dtype, count in counts.most_common() if count}


def warnings_of(model: ir.Model) -> Iterator[str]:
    """Weights' files that are missing or too short for what the graph points at."""
    import onnx_ir as ir

    ends: dict[Path, int] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                file = Path(tensor.path)
                ends[file] = max(ends.get(file, 0), (tensor.offset or 0) + tensor.nbytes)
    for file, end in ends.items():
        if not file.is_file():
            yield f"its weights are missing: {file}"
        elif file.stat().st_size < end:
            yield f"its weights were cut: {file} has {file.stat().st_size} bytes, the graph points at {end}"
