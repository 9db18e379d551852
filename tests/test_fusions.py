"""Where attention, norms and activations are found, by opset, by exporter, and in graphs written for the purpose."""

import json
from pathlib import Path

import onnx.parser
import onnx_ir as ir
import pytest
import torch

import optimize
from optimize.tools import fusions
from optimize.tools.graphs import Graph
from optimize.tools.inspecting import inspect


def sites(graph: Graph, kind: str) -> list[fusions.Site]:
    return [site for site in graph.sites if site.kind == kind]


def reasons(graph: Graph, kind: str) -> set[str]:
    return {site.reason for site in sites(graph, kind)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    """A llama at two opsets, and the demo's VAE decoder at the older one."""
    root = tmp_path_factory.mktemp("opsets")
    for opset in (18, 23):
        optimize.export("arch:llama@tiny", root / f"llama {opset}", opset=opset)
    optimize.export("demo", root / "vae 18", components=["vae_decoder"], opset=18)
    return {folder.name: inspect(folder).graphs[0] for folder in root.iterdir()}


NEEDS = {
    "attention": ("Attention", 23),
    "rms norm": ("RMSNormalization", 23),
    "group norm": ("GroupNormalization", 21),
    "rotary embedding": ("RotaryEmbedding", 23),
    "silu": ("Swish", 24),
}


@pytest.mark.parametrize(("kind", "count"), [("attention", 3), ("rotary embedding", 6), ("rms norm", 7)])
def test_both_opsets_have_the_same_sites_and_only_the_later_one_node_each(
    exported: dict[str, Graph], kind: str, count: int
) -> None:
    old, new = exported["llama 18"], exported["llama 23"]
    operator, since = NEEDS[kind]
    assert [s.path for s in sites(old, kind)] == [s.path for s in sites(new, kind)]
    assert len(sites(new, kind)) == new.operators[operator] == count
    assert {(s.standard, s.into) for s in sites(new, kind)} == {(True, operator)}
    assert {s.standard for s in sites(old, kind)} == {False}
    assert reasons(old, kind) == {f"opset 18 has no {operator} (from {since} on)"}


def test_sites_name_their_modules(exported: dict[str, Graph]) -> None:
    found = sites(exported["llama 18"], "attention")
    assert [s.path for s in found] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert {s.into for s in found} == {"MatMul Softmax MatMul"}


@pytest.mark.parametrize(("kind", "standard"), [("group norm", True), ("attention", True), ("silu", False)])
def test_a_vae_at_both_opsets(exported: dict[str, Graph], demo_bundle: Path, kind: str, standard: bool) -> None:
    old, (new,) = exported["vae 18"], inspect(demo_bundle, component="vae_decoder").graphs
    operator, since = NEEDS[kind]
    assert [s.path for s in sites(old, kind)] == [s.path for s in sites(new, kind)] != []
    assert {s.standard for s in sites(new, kind)} == {standard}
    assert reasons(new, kind) == ({""} if standard else {f"opset 23 has no {operator} (from {since} on)"})
    assert reasons(old, kind) == {f"opset 18 has no {operator} (from {since} on)"}
    anchor = {"group norm": "InstanceNormalization", "attention": "Softmax", "silu": "Sigmoid"}[kind]
    assert len(sites(old, kind)) == old.operators[anchor]


def test_what_the_clean_up_declined_is_said(exported: dict[str, Graph]) -> None:
    graph = exported["llama 23"]
    spec = json.loads((Path(graph.path).parents[1] / "manifest.json").read_text())["artifacts"]["llama/fp32"]["spec"]
    declined = spec["declined"]["pack attention heads"]
    assert {s.node: s.reason for s in sites(graph, "attention")} == {
        node: f"the rule 'pack attention heads' declined: {reason}" for node, reason in declined.items()
    }


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.groups = torch.nn.LayerNorm(32), torch.nn.Linear(32, 96), torch.nn.GroupNorm(4, 32)
        self.act, self.gate = torch.nn.SiLU(), torch.nn.GELU(approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.groups(y.transpose(1, 2)).transpose(1, 2)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) + self.gate(self.act(y))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("dynamo", "opset"), [(True, 18), (False, 14)])
def test_a_graph_of_another_exporter(tmp_path: Path, dynamo: bool, opset: int) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    words = {"dynamic_shapes": ({0: torch.export.Dim("rows")},)} if dynamo else {"dynamic_axes": {"x": {0: "rows"}}}
    torch.onnx.export(
        Model().eval(),
        (torch.randn(2, 6, 32),),
        tmp_path / "m.onnx",
        dynamo=dynamo,
        opset_version=opset,
        input_names=["x"],
        **words,
    )
    (graph,) = inspect(tmp_path / "m.onnx").graphs
    assert graph.producer.startswith("pytorch") and graph.opset == opset
    assert [(a.name, a.where) for a in graph.axes] == [("rows", ("x[0]",))]
    assert "unknown" not in graph.precision["outputs"]
    layer = "" if opset >= 17 else "opset 14 has no LayerNormalization (from 17 on)"
    found = [(s.path, s.kind, s.reason) for s in graph.sites if s.path.startswith("blocks.1")]
    none = f"opset {opset} has no "
    assert sorted(found) == sorted(
        [
            ("blocks.1", "attention", none + "Attention (from 23 on)"),
            ("blocks.1", "rms norm", none + "RMSNormalization (from 23 on)"),
            ("blocks.1.norm", "layer norm", layer),
            ("blocks.1.groups", "group norm", none + "GroupNormalization (from 21 on)"),
            ("blocks.1.act", "silu", none + "Swish (from 24 on)"),
            ("blocks.1.gate", "gelu", none + "Gelu (from 20 on)"),
        ]
    )


HEAD = '<ir_version: 11, opset_import: ["": 24, "com.microsoft": 1], producer_name: "optimize">'
GRAPHS = {
    "masked and scaled": (
        "(float[2,t,8] q, float[2,8,s] k, float[2,s,8] v, float[1,t,s] m) => (float[2,t,8] y) "
        "{ a = MatMul(q, k) b = Mul(a, a) c = Add(b, m) d = Softmax(c) y = MatMul(d, v) }",
        [("attention", False, "MatMul Softmax MatMul")],
    ),
    "a softmax that guards against rows of -inf": (
        "(float16[2,t,s] a, float16[2,s,8] v, float zero) => (float16[2,t,8] y) { k = Transpose(v) p = MatMul(a, k) "
        "w = Cast<to=1>(p) d = Softmax(w) n = IsNaN(d) g = Where(n, zero, d) h = Cast<to=10>(g) y = MatMul(h, v) }",
        [("attention", False, "MatMul Softmax MatMul")],
    ),
    "a router": (
        "(float[4,8] x, float[8,8] w, float[8,8] z) => (float[4,8] y) "
        "{ a = MatMul(x, w) b = Softmax(a) c = Mul(b, x) y = MatMul(c, z) }",
        [],
    ),
    "interleaved rotation": (
        "(float[2,4,8] x, float[2,4] a, float[2,4] b, float[2,8] c, float[2,8] d, int64[1] i, int64[2] j) => (float y) "
        "{ n = Neg(a) m = Unsqueeze(n, i) o = Unsqueeze(b, i) p = Concat<axis=-1>(m, o) q = Reshape(p, j) "
        "r = Mul(q, c) s = Mul(x, d) y = Add(s, r) }",
        [("rotary embedding", False, "Neg Concat Mul Add")],
    ),
    "a classifier's softmax": (
        "(float[2,8] x, float[8,8] w) => (float[2,8] y) { a = MatMul(x, w) y = Softmax(a) }",
        [],
    ),
    "instance norm": (
        "(float[2,4,8] x, float[4] a) => (float[2,4,8] y) { y = InstanceNormalization(x, a, a) }",
        [("instance norm", True, "InstanceNormalization")],
    ),
    "a gate of another tensor": ("(float[2] x, float[2] z) => (float[2] y) { s = Sigmoid(z) y = Mul(x, s) }", []),
    "quick gelu": (
        "(float[2] x, float c) => (float[2] y) { z = Mul(x, c) s = Sigmoid(z) y = Mul(x, s) }",
        [("silu", False, "Sigmoid Mul")],
    ),
    "tanh alone": ("(float[2] x, float[2] z) => (float[2] y) { t = Tanh(x) y = Mul(t, z) }", []),
    "a mean of no square": (
        "(float[2,8] x, float[2,8] z, float e) => (float[2,8] y) "
        "{ p = Mul(x, z) m = ReduceMean(p) a = Add(m, e) r = Sqrt(a) y = Div(x, r) }",
        [],
    ),
    "a layer norm written out": (
        "(float[2,8] x, float e) => (float[2,8] y) { u = ReduceMean(x) c = Sub(x, u) p = Mul(c, c) m = ReduceMean(p) "
        "a = Add(m, e) r = Sqrt(a) y = Div(c, r) }",
        [("layer norm", False, "Mul ReduceMean Add Sqrt Div")],
    ),
    "contrib": (
        "(float[2,4,8] q) => (float[2,4,8] y) { y = com.microsoft.MultiHeadAttention <num_heads=2> (q, q, q) }",
        [("attention", False, "com.microsoft::MultiHeadAttention")],
    ),
    "swish": ("(float[2] x) => (float[2] y) { y = Swish(x) }", [("silu", True, "Swish")]),
}


SAID = {
    "masked and scaled": "the model writes it out, and no rule makes it Attention",
    "interleaved rotation": "its pairs are interleaved, and no rule fuses those",
    "contrib": "one node, but of the domain com.microsoft, not of the standard",
}


@pytest.mark.parametrize("name", GRAPHS)
def test_patterns(name: str) -> None:
    text, expected = GRAPHS[name]
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{HEAD} g {text}"))
    found = list(fusions.sites_of(model, {}))
    assert [(s.kind, s.standard, s.into) for s in found] == expected
    for site in found:
        assert bool(site.reason) == (not site.standard)
    if name in SAID:
        assert found[0].reason == SAID[name]


def test_totals_add_up(demo_bundle: Path) -> None:
    for graph in inspect(demo_bundle).graphs:
        rows = fusions.totals_of(graph.sites)
        assert sum(int(r["sites"]) for r in rows) == len(graph.sites)
        assert all(int(r["standard"]) + int(r["other"]) == int(r["sites"]) for r in rows)
        assert sum(int(r["standard"]) for r in rows) == sum(graph.operators.get(name, 0) for name in fusions.STANDARD)
