"""Operations and bytes: each operator against numbers by hand, whole networks against torch's own count."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from optimize.compile import external
from optimize.compile.onnx_model import Clock, graph_from_component
from optimize.compile.spec import Component
from optimize.errors import InputError
from optimize.profiles.counts import PRODUCTS
from optimize.profiles.module_work import work_of_component
from optimize.profiles.sizes import size_in_words
from optimize.profiles.work import GraphWork, NodeWork, work_of


def counted(text: str, folder: Path, **sizes: int) -> GraphWork:
    """The work of a graph in ONNX's text form (opset 23)."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23, "ai.optimize" : 1]> g {text}')
    onnx.save(model, folder / "g.onnx")
    return work_of(folder / "g.onnx", sizes)


def only(text: str, folder: Path, **sizes: int) -> NodeWork:
    nodes = counted(text, folder, **sizes).nodes
    assert len(nodes) == 1
    return nodes[0]


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("height/8", 9),
        ("height*width/64 + tokens", 9 * 7 + 63),
        ("past + tokens", 64),
        ("height/2 + 1", 37),
        ("floor(tokens/2)", 31),
        ("tokens//2", 31),
        ("6*batch", 42),
        ("Max(1, batch - 9)", 1),
        ("nobody/8", None),
        ("__import__('os')", None),
        ("tokens +", None),
    ],
)
def test_dims_in_words_become_numbers(words: str, number: int | None) -> None:
    sizes = {"height": 72, "width": 56, "tokens": 63, "past": 1, "batch": 7}
    assert size_in_words(words, sizes) == number


# name: graph, operations by hand, bytes of its weights. Axis b is 7, t is 63.
BY_HAND = {
    "conv": (
        "(float[b,6,t,9] x, float[10,3,3,5] w) => (float[b,10,h,5] y) { y = Conv <group=2, pads=[1,0,1,0]> (x, w) }",
        2 * (7 * 10 * 63 * 5) * (3 * 3 * 5),
    ),
    "conv transpose": (
        "(float[b,6,t] x, float[6,5,4] w) => (float[b,10,o] y) { y = ConvTranspose <group=2> (x, w) }",
        2 * (7 * 6 * 63) * (5 * 4),
    ),
    "matmul": ("(float[b,t,33] x, float[33,11] w) => (float[b,t,11] y) { y = MatMul (x, w) }", 2 * 7 * 63 * 33 * 11),
    "matmul of batches": (
        "(float[b,2,t,33] x, float[b,1,33,t] w) => (float[b,2,t,t] y) { y = MatMul (x, w) }",
        2 * 7 * 2 * 63 * 33 * 63,
    ),
    "gemm": ("(float[33,b] x, float[33,11] w) => (float[b,11] y) { y = Gemm <transA=1> (x, w) }", 2 * 7 * 33 * 11),
    "einsum": (
        '(float[b,t,3] x, float[b,3,5] w) => (float[b,t,5] y) { y = Einsum <equation="btc,bcd->btd"> (x, w) }',
        2 * 7 * 63 * 3 * 5,
    ),
    "attention 4D, grouped": (
        "(float[b,6,t,16] q, float[b,2,77,16] k, float[b,2,77,24] v) => (float[b,6,t,24] y)"
        " { y = Attention (q, k, v) }",
        2 * 7 * 6 * 63 * 77 * (16 + 24),
    ),
    "attention 3D, grouped": (
        "(float[b,t,96] q, float[b,77,32] k, float[b,77,48] v) => (float[b,t,144] y)"
        " { y = Attention <q_num_heads=6, kv_num_heads=2> (q, k, v) }",
        2 * 7 * 6 * 63 * 77 * (16 + 24),
    ),
    "attention with a past": (
        "(float[b,2,1,16] q, float[b,2,1,16] k, float[b,2,1,16] v, float[b,2,t,16] pk, float[b,2,t,16] pv)"
        " => (float[b,2,1,16] y, float[b,2,64,16] nk, float[b,2,64,16] nv)"
        " { y, nk, nv = Attention <is_causal=1> (q, k, v, , pk, pv) }",
        2 * 7 * 2 * 1 * 64 * 32,
    ),
    "layer norm": (
        "(float[b,t,33] x, float[33] w) => (float[b,t,33] y) { y = LayerNormalization (x, w) }",
        7 * 7 * 63 * 33,
    ),
    "softmax": ("(float[b,t] x) => (float[b,t] y) { y = Softmax (x) }", 5 * 7 * 63),
    "add with broadcast": ("(float[b,t] x, float[t] z) => (float[b,t] y) { y = Add (x, z) }", 7 * 63),
    "sigmoid": ("(float[b,t] x) => (float[b,t] y) { y = Sigmoid (x) }", 4 * 7 * 63),
    "reduce": ("(float[b,t] x) => (float[b,1] y) { y = ReduceSum <keepdims=1> (x) }", 7 * 63),
    "transpose": ("(float[b,t] x) => (float[t,b] y) { y = Transpose (x) }", 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_operations_by_hand(name: str, tmp_path: Path) -> None:
    text, flops = BY_HAND[name]
    node = only(text, tmp_path, b=7, t=63, h=63, o=66)
    assert node.flops == flops
    assert node.bytes == sum(node.reads.values()) + sum(node.writes.values())


def test_shapes_that_the_file_does_not_tell_are_inferred(tmp_path: Path) -> None:
    text = "(float[b,t] x, float[t,5] w) => (y) { z = MatMul (x, w)  y = Relu (z) }"
    work = counted(text, tmp_path, b=7, t=63)
    assert [n.flops for n in work.nodes] == [2 * 7 * 63 * 5, 7 * 5]
    assert work.total.unfused_bytes == 4 * ((7 * 63 + 63 * 5 + 35) + (35 + 35))
    assert work.total.bytes == 4 * (7 * 63 + 63 * 5 + 35)  # both are inputs here


def test_what_is_not_known_is_named_and_counts_nothing(tmp_path: Path) -> None:
    text = "(float[b] x) => (float[o] y) { [odd] z = NonZero (x)  [strange] y = Unheard (x) }"
    work = counted(text, tmp_path, b=7, o=7)
    assert work.total.flops == 0 and "strange (Unheard)" in work.total.how


def test_a_missing_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input x is not given[\s\S]*expected: a size for t"):
        counted(BY_HAND["softmax"][0], tmp_path, b=7)


def test_our_own_nodes_count_as_their_bodies(tmp_path: Path) -> None:
    from optimize.kernels.functions import function

    head = '<ir_version: 10, opset_import: ["" : 23, "ai.optimize" : 1]> g '
    norm = (
        "(float[b,6,t] x, float[6] w, float[6] c) => (float[b,6,t] y)"
        " { y = ai.optimize.GroupNormSiLU <groups=2, epsilon=0.00001> (x, w, c) }"
    )
    packed = (
        "(float[b,t,96] q, float[b,77,32] k, float[b,77,32] v) => (float[b,t,96] y)"
        " { y = ai.optimize.PackedAttention <causal=0, scale=0.25, heads=6, kv_heads=2> (q, k, v) }"
    )
    expected = {
        "GroupNormSiLU": (norm, "norm", 7 * 63 * 6 * (7 + 4 + 1)),  # the norm, a sigmoid, a product
        "PackedAttention": (packed, "attention", 2 * 7 * 6 * 63 * 77 * 32),
    }
    for name, (text, kind, flops) in expected.items():
        model = onnx.parser.parse_model(head + text)
        model.functions.append(function(name))
        onnx.save(model, tmp_path / "g.onnx")
        (node,) = work_of(tmp_path / "g.onnx", {"b": 7, "t": 63}).nodes
        assert (node.operator, node.flops, node.op) == (kind, flops, f"ai.optimize.{name}")


def quantized(folder: Path, weight_only: bool) -> GraphWork:
    """Q and DQ around a product of 7 x 64 by 64 x 32, its weight int8 in the file."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.integers(-127, 127, (64, 32)).astype(np.int8), "s": rng.random(32).astype(np.float32),
        "z": np.zeros(32, np.int8), "xs": np.float32(0.1), "xz": np.int8(0),
    }  # fmt: skip
    node = onnx.helper.make_node
    weight = node("DequantizeLinear", ["w", "s", "z"], ["wf"], name="fc/w.dq", axis=1)
    pair = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="fc/x.q"),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xf"], name="fc/x.dq"),
    ]
    product = node("MatMul", ["x" if weight_only else "xf", "wf"], ["y"], name="fc/MatMul")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [*([] if weight_only else pair), weight, product],
        "g",
        [info("x", 1, ["b", 64])],
        [info("y", 1, ["b", 32])],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), folder / "q.onnx")
    return work_of(folder / "q.onnx", {"b": 7})


def test_a_product_of_quantized_inputs_is_int8(tmp_path: Path) -> None:
    work = quantized(tmp_path, weight_only=False)
    product = work.nodes[-1]
    assert (product.dtype, product.module) == ("int8", "fc")
    assert product.reads == {"xq": 7 * 64} and product.writes == {"y": 7 * 32 * 4}
    assert product.weight_bytes == 64 * 32 + 32 * 4 + 32  # a byte each, scales and zero points
    assert work.total.flops_by_type["int8"] == 2 * 7 * 64 * 32


def test_few_bits_in_memory_alone_leave_the_product_in_fp32(tmp_path: Path) -> None:
    product = quantized(tmp_path, weight_only=True).nodes[-1]
    assert product.dtype == "fp32" and product.weight_bytes == 64 * 32 + 32 * 4 + 32


def test_embeddings_read_their_rows_alone(tmp_path: Path) -> None:
    weights = onnx.numpy_helper.from_array(np.zeros((1000, 8), np.float32), "w")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["w", "ids"], ["y"], name="table/Gather")],
        "g",
        [info("ids", 7, ["b", "t"])],
        [info("y", 1, ["b", "t", 8])],
        [weights],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), tmp_path / "e.onnx")
    (node,) = work_of(tmp_path / "e.onnx", {"b": 1, "t": 7}).nodes
    assert node.weight_bytes == 7 * 8 * 4 and node.bytes == 2 * 7 * 8 * 4 + 7 * 8


def file_of(component: Component, folder: Path) -> Path:
    """A component's graph on disk, as the exporter writes it."""
    import onnx_ir as ir

    model, _, _ = graph_from_component(component, "fp32", 23, Clock(lambda s: None))
    external.write_weights(model, folder / "m.safetensors", {}, lambda done, total: None)
    external.inline_small(model)
    external.point_at(model, "m.safetensors", external.header_bytes(folder / "m.safetensors"))
    ir.save(model, folder / "m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize(
    ("source", "sizes", "twice"),
    [
        ("demo:unet", {"batch": 3, "height": 56, "width": 40, "tokens": 77}, "none"),
        ("arch:dit-xl-2-256@tiny", {"batch": 3}, "transformer_blocks.0.norm1.emb"),
        ("arch:llama@tiny", {"batch": 1, "tokens": 7, "past": 63}, "none"),
    ],
)
def test_products_agree_with_torchs_own_count(source: str, sizes: dict[str, int], twice: str, tmp_path: Path) -> None:
    """The graph's convolutions, matmuls and attention sum to what FlopCounterMode sees of the module, to the last
    operation; module by module for those that have weights. The DiT's first embedder is called twice with the same
    timestep, which the graph computes once."""
    from optimize.compile.sources import source_from_text

    name, part = ("demo", "unet") if source == "demo:unet" else (source, "")
    component = next(c for c in source_from_text(name).components if part in ("", c.name))
    sizes = {a: sizes.get(a, v.opt) for a, v in component.axes.items()}
    work = work_of(file_of(component, tmp_path), sizes)
    theirs = work_of_component(component, "fp32", sizes)
    products = [n for n in work.nodes if n.operator in PRODUCTS]
    again = sum(n.flops for n in products if n.module.startswith(twice))
    assert sum(n.flops for n in products) + again == theirs.total.flops > 1e5
    assert sum(n.flops for n in theirs.nodes) == theirs.total.flops
    ours = {n.module: n.flops for n in products if n.operator in ("convolution", "matmul") and n.weights}
    own = {n.module: n.flops for n in theirs.nodes}
    assert len(ours) > 10 and all(own[m] == flops * (1 + m.startswith(twice)) for m, flops in ours.items())
    # the least: of a table of embeddings only the rows that are read; the graph has tables of frequencies beside
    assert 0.7 * theirs.total.weight_bytes < work.total.weight_bytes < 1.05 * theirs.total.weight_bytes
    assert not [n for n in work.nodes if n.op != "Shape" and n.writes and not sum(n.writes.values())]


def test_a_quantized_graph_has_the_products_of_its_base(demo_bundle: Path) -> None:
    """Nothing of the demo's graphs stays uncounted, and its largest module is a convolution of the last blocks."""
    sizes = {"batch": 1, "height": 32, "width": 32, "tokens": 77}
    work = work_of(demo_bundle / "unet" / "unet.fp32.onnx", sizes)
    assert "not known" not in work.total.how
    assert work.total.unfused_bytes > 2 * work.total.bytes > 2 * work.total.weight_bytes > 6e6
    assert next(iter(work.by_module())) == "up_blocks.0.upsamplers.0.conv"
