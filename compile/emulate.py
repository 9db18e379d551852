"""A 16-bit graph computed in fp32: rounded after each torch operator, as eager does, or not rounded at all.

ONNX Runtime's CPU provider has no bf16 kernels, and of fp16 it computes neighbours in fp32: an overflow can hide there.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from .translate import ORIGIN

FLOAT = ir.DataType.FLOAT
NARROW: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""Precision -> the type whose tensors become fp32."""


def emulated(model: ir.Model, precision: str, *, rounds: bool = True) -> ir.Model:
    """A copy of the graph in which every tensor of the precision is an fp32 tensor of such values; what is fp32 there
    stays as it is. Inputs and outputs are fp32. Without `rounds` nothing but the weights is rounded."""
    narrow = NARROW[precision]
    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    graph = copy.graph
    for value in graph.inputs:
        if value.dtype == narrow:
            value.dtype = FLOAT
            if rounds:
                rounded(graph, value, None, narrow)
    for name, value in list(graph.initializers.items()):
        if value.dtype == narrow:
            wide = ir.node("Cast", [value], {"to": int(FLOAT)}, name=f"{name}>fp32")
            wide.outputs[0].name = f"{name}>fp32"
            value.replace_all_uses_with(wide.outputs[0])
            graph.insert_before(graph[0], wide)
            wide.replace_input_with(0, value)
    for node in list(graph):
        if node.op_type == "Cast" and str(node.name).endswith(("> round", ">fp32", "> back")):
            continue
        if node.op_type == "Cast" and node.attributes["to"].value == int(narrow):
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        for value in node.outputs:
            if value.dtype == narrow:
                value.dtype = FLOAT
                if rounds and not within_operator(value, node):
                    rounded(graph, value, node, narrow)
    return copy


def within_operator(value: ir.Value, node: ir.Node) -> bool:
    """Whether the value never leaves one torch operator (MatMul before its bias, Sigmoid inside SiLU)."""
    origin = node.metadata_props.get(ORIGIN)
    return (
        bool(origin)
        and not value.is_graph_output()
        and all(use.node.metadata_props.get(ORIGIN) == origin for use in value.uses())
    )


def rounded(graph: ir.Graph, value: ir.Value, after: ir.Node | None, narrow: ir.DataType) -> None:
    """Sends the users of `value` through fp32 -> `narrow` -> fp32."""
    name, output = str(value.name), value.is_graph_output()
    down = ir.node("Cast", [value], {"to": int(narrow)}, name=f"{name}> round")
    back = ir.node("Cast", [down.outputs[0]], {"to": int(FLOAT)}, name=f"{name}> back")
    down.outputs[0].name, back.outputs[0].name = f"{name}> round", f"{name}> back"
    down.outputs[0].type, back.outputs[0].type = ir.TensorType(narrow), ir.TensorType(FLOAT)
    back.outputs[0].shape = value.shape
    value.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
    down.replace_input_with(0, value)
    if output:
        value.name, back.outputs[0].name = f"{name}> raw", name
    if after is None:
        graph.insert_before(graph[0], [down, back])
    else:
        graph.insert_after(after, [down, back])
