"""The receipt: what was to be quantized is followed to the file and to the kernels that a runtime makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx

from .place import Placement
from .running import GraphSession, session_options
from .sites import Site

KERNELS = frozenset(
    {
        "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits",
        "ConvInteger", "MatMulInteger", "NhwcQLinearConv", "QOrderedMatMul",
    }
)  # fmt: skip
"""Operators of ONNX Runtime's optimized graphs that multiply integers."""
FEW = ("INT8", "UINT8", "INT4", "FLOAT8E4M3FN")


def exported(path: Path, p: Placement) -> set[str]:
    """Names of the sites that the file at `path` has with their Q and DQ, whole, scales above zero."""
    model = onnx.load(path, load_external_data=False)
    makers = {o: n for n in model.graph.node for o in n.output}
    tensors = {t.name: t for t in model.graph.initializer}
    nodes = {n.name: n for n in model.graph.node}
    return {s.name for s in p.chosen() if complete(s, p, nodes, makers, tensors, path.parent)}


def complete(
    s: Site, p: Placement, nodes: Mapping[str, Any], makers: Mapping[str, Any], tensors: Mapping[str, Any], folder: Path
) -> bool:
    if p.scheme.activations == "dynamic":
        product = nodes.get(f"{s.name}/int32")
        return product is not None and few(product.input[1], tensors) and op(makers, product.input[0]) == DYNAMIC
    node = nodes.get(s.name)
    if node is None:
        return False
    wanted = list(range(3)) if s.kind == "attention" else [0] * (p.scheme.activations == "static")
    ends = [through_qdq(node.input[i], makers, tensors, folder) for i in wanted]
    if s.weight:
        dq = makers.get(node.input[1])
        ends.append(
            dq is not None
            and dq.op_type == "DequantizeLinear"
            and few(dq.input[0], tensors)
            and positive(dq.input[1], tensors, folder)
        )
    return all(ends)


DYNAMIC = "DynamicQuantizeLinear"


def op(makers: Mapping[str, Any], name: str) -> str:
    return makers[name].op_type if name in makers else ""


def few(name: str, tensors: Mapping[str, Any]) -> bool:
    tensor = tensors.get(name)
    return tensor is not None and onnx.TensorProto.DataType.Name(tensor.data_type) in FEW


def through_qdq(name: str, makers: Mapping[str, Any], tensors: Mapping[str, Any], folder: Path) -> bool:
    dq = makers.get(name)
    if dq is None or dq.op_type != "DequantizeLinear":
        return False
    return op(makers, dq.input[0]) == "QuantizeLinear" and positive(dq.input[1], tensors, folder)


def positive(name: str, tensors: Mapping[str, Any], folder: Path) -> bool:
    tensor = tensors.get(name)
    return tensor is not None and bool((onnx.numpy_helper.to_array(tensor, str(folder)) > 0).all())


def kernels(path: Path, p: Placement, workspace: Path) -> set[str]:
    """Names of the sites that ONNX Runtime computes in integers on the CPU: in its optimized graph a node of `KERNELS`
    reads their weight (`NAME_T` where it has packed it anew), or has their name."""
    import onnx_ir as ir

    optimized = workspace / "optimized.onnx"
    GraphSession(ir.load(path), path.parent, options=session_options(optimized))
    nodes = [n for n in onnx.load(optimized, load_external_data=False).graph.node if n.op_type in KERNELS]
    optimized.unlink()
    read = {name.removesuffix("_T") for n in nodes for name in n.input}
    names = {n.name for n in nodes}
    weights = weights_in_file(path, p)
    return {s.name for s in p.chosen() if s.name in names or weights.get(s.name) in read}


def weights_in_file(path: Path, p: Placement) -> dict[str, str]:
    """Site -> the initializer that holds its numbers of few bits."""
    graph = onnx.load(path, load_external_data=False).graph
    makers = {o: n for n in graph.node for o in n.output}
    nodes = {n.name: n for n in graph.node}
    found = {}
    for s in p.chosen():
        product, node = nodes.get(f"{s.name}/int32"), nodes.get(s.name)
        if product is not None:
            found[s.name] = product.input[1]
        elif node is not None and op(makers, node.input[1]) == "DequantizeLinear":
            found[s.name] = makers[node.input[1]].input[0]
    return found


def layers_in_engine(layers: Iterable[Any], sites: Iterable[str]) -> set[str]:
    """Which of the sites a TensorRT engine computes from inputs of few bits (`compile.tensorrt.EngineLayer`)."""
    quantized = [layer for layer in layers if any(kind in ("Int8", "FP8", "Int4", "E4M3") for kind in layer.reads)]
    return {name for layer in quantized for name in layer.onnx} & set(sites)
