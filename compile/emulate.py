"""bf16 on a runtime without bf16 kernels: compute in fp32, round to bf16 after each torch operator, as eager does."""

from __future__ import annotations

import onnx_ir as ir

from .translate import ORIGIN

FLOAT, BF16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def emulated_bf16(model: ir.Model) -> ir.Model:
    """A copy of the graph in which every bf16 tensor is an fp32 tensor of bf16 values; inputs and outputs are fp32."""
    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    graph = copy.graph
    for value in graph.inputs:
        if value.dtype == BF16:
            value.dtype = FLOAT
            rounded(graph, value, None)
    for name, value in list(graph.initializers.items()):
        if value.dtype == BF16:
            wide = ir.node("Cast", [value], {"to": int(FLOAT)}, name=f"{name}>fp32")
            wide.outputs[0].name = f"{name}>fp32"
            value.replace_all_uses_with(wide.outputs[0])
            graph.insert_before(graph[0], wide)
            wide.replace_input_with(0, value)
    for node in list(graph):
        if node.op_type == "Cast" and str(node.name).endswith(("> round", ">fp32", "> back")):
            continue
        if node.op_type == "Cast" and node.attributes["to"].value == int(BF16):
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        for value in node.outputs:
            if value.dtype == BF16:
                value.dtype = FLOAT
                if not within_operator(value, node):
                    rounded(graph, value, node)
    return copy


def within_operator(value: ir.Value, node: ir.Node) -> bool:
    """Whether the value never leaves one torch operator (MatMul before its bias, Sigmoid inside SiLU)."""
    origin = node.metadata_props.get(ORIGIN)
    return (
        bool(origin)
        and not value.is_graph_output()
        and all(use.node.metadata_props.get(ORIGIN) == origin for use in value.uses())
    )


def rounded(graph: ir.Graph, value: ir.Value, after: ir.Node | None) -> None:
    """Sends the users of `value` through fp32 -> bf16 -> fp32."""
    name, output = str(value.name), value.is_graph_output()
    down = ir.node("Cast", [value], {"to": int(BF16)}, name=f"{name}> round")
    back = ir.node("Cast", [down.outputs[0]], {"to": int(FLOAT)}, name=f"{name}> back")
    down.outputs[0].name, back.outputs[0].name = f"{name}> round", f"{name}> back"
    down.outputs[0].type, back.outputs[0].type = ir.TensorType(BF16), ir.TensorType(FLOAT)
    back.outputs[0].shape = value.shape
    value.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
    down.replace_input_with(0, value)
    if output:
        value.name, back.outputs[0].name = f"{name}> raw", name
    if after is None:
        graph.insert_before(graph[0], [down, back])
    else:
        graph.insert_after(after, [down, back])
