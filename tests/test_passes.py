"""Each rule of the clean-up: what it rewrites, with the same numbers before and after, and every reason to decline."""

import ast
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from optimize import kernels
from optimize.compile import external, passes
from optimize.compile.feeds import feeds_for
from optimize.compile.onnx_model import Clock, drop_unused_initializers, graph_from_component, merge_tied, same_as
from optimize.compile.runners import EagerRunner, OnnxRuntimeRunner
from optimize.compile.sources import source_from_text
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.compile.trace import trace_component
from optimize.compile.translate import translate

AXES = (Axis("b", 1, 2, 16), Axis("t", 1, 3, 64))


# --- tools -----------------------------------------------------------------------------------------------------------


class Fn(nn.Module):
    """`fn(*tensors, *parts)`: a function as a module, with the modules or parameters that belong to it."""

    def __init__(self, fn, *parts):
        super().__init__()
        self.fn = fn
        self.parts = (nn.ModuleList if parts and isinstance(parts[0], nn.Module) else nn.ParameterList)(parts)

    def forward(self, *tensors):
        return self.fn(*tensors, *self.parts)


def component_of(module: nn.Module | Callable, *shapes: tuple, outputs: tuple[str, ...] = ("y",)) -> Component:
    torch.manual_seed(0)
    specs = [TensorSpec(f"x{i}", shape) for i, shape in enumerate(shapes)]
    names = {name for spec in specs for name in spec.axis_names()}
    return Component.from_module(
        module if isinstance(module, nn.Module) else Fn(module),
        specs,
        outputs,
        [axis for axis in AXES if axis.name in names],
    )


def translated(component: Component, precision: str = "fp32", opset: int = 23) -> ir.Model:
    """The graph as the translator leaves it, before any rule."""
    traced = trace_component(component, precision)
    weights = component.weights.bind(traced.module)
    model = translate(traced, component, opset, external.weight_maker(weights, same_as(traced.module)))
    merge_tied(model)
    passes.give_bodies(model)
    return model


def cleaned(component: Component, precision: str = "fp32", opset: int = 23) -> tuple[ir.Model, dict]:
    model, _, results = graph_from_component(component, precision, opset, Clock(lambda s: None))
    return model, results


def kinds(model: ir.Model) -> Counter:
    return Counter(node.op_type for node in model.graph)


def saved(model: ir.Model, folder: Path, name: str) -> Path:
    """The graph with its weights inside, as the checker takes it."""
    path = folder / f"{name}.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def outputs_of(path: Path, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with OnnxRuntimeRunner(path, threads=1) as runner:
        return runner.infer(feeds)


def same_numbers(component: Component, folder: Path, precision: str = "fp32") -> tuple[ir.Model, ir.Model, dict]:
    """(before, after, what the rules did), both run at a size that was not traced and found equal to eager."""
    before, (after, results) = translated(component, precision), cleaned(component, precision)
    paths = [saved(model, folder, name) for model, name in ((before, "before"), (after, "after"))]
    feeds = feeds_for(component.inputs, component.shape_sets()["untraced"], precision)
    with EagerRunner(component, precision) as eager:
        expected = eager.infer(feeds)
    tolerance = {"fp32": 1e-4, "fp16": 2e-2}[precision]
    for path in paths:
        for name, value in outputs_of(path, feeds).items():
            torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)
    return before, after, results


def model_of(text: str) -> ir.Model:
    """A graph in ONNX's own text form, with `value_info` filled in where it can be."""
    header = '<ir_version: 10, opset_import: ["" : 23]>\n'
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(header + text)))


# --- rules that rewrite ----------------------------------------------------------------------------------------------


def rotated(x, angles):
    """As in llama: `x` is `[b, heads, t, head_dim]`, `angles` `[b, t, head_dim / 2]`."""
    double = torch.cat([angles, angles], -1)
    cos, sin = double.cos().unsqueeze(1), double.sin().unsqueeze(1)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def normed(x, weight):
    """As in llama and T5: computed in fp32, cast back, scaled."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def attended(x, q, k, v):
    """Projections, heads split off and joined again, as all libraries write it."""
    heads = [m(x).view(x.shape[0], -1, 4, m.out_features // 4).transpose(1, 2) for m in (q, k, v)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape[0], -1, v.out_features)


def attended_by_ours(x, q, k, v, bias=None):
    """The same with our operation, three heads of the query to each of key and value."""
    heads = [m(x).unflatten(2, (-1, 4)).transpose(1, 2) for m in (q, k, v)]
    return kernels.attention(*heads, bias=bias).transpose(1, 2).flatten(2)


def dense(*sizes: int) -> list[nn.Linear]:
    return [nn.Linear(8, size) for size in sizes]


@dataclass(frozen=True)
class Positive:
    """A rule, a forward that it rewrites, the counts of operators before and after."""

    rule: str
    module: Callable[[], nn.Module]
    shapes: tuple[tuple, ...]
    before: dict[str, int]
    after: dict[str, int]
    rewritten: int = 1
    precision: str = "fp32"


X = ("b", "t", 8)
POSITIVES = {
    "a linear layer": Positive(
        "fold weight transposes",
        lambda: nn.Linear(8, 63),
        (X,),
        {"Transpose": 1, "MatMul": 1},
        {"Transpose": 0, "MatMul": 1},
    ),
    "one weight, two products": Positive(
        "fold weight transposes",
        lambda: Fn(lambda x, w: F.linear(F.linear(x, w), w), nn.Parameter(torch.randn(8, 8))),
        (X,),
        {"Transpose": 2},
        {"Transpose": 0},
    ),
    "a weight turned otherwise": Positive(
        "fold weight transposes",
        lambda: Fn(lambda x, w: x @ w.permute(2, 0, 1), nn.Parameter(torch.randn(8, 5, 2))),
        ((*X[:1], 2, "t", 8),),
        {"Transpose": 1},
        {"Transpose": 0},
    ),
    "there and back": Positive(
        "merge transposes",
        lambda: Fn(lambda x: x.transpose(1, 2).transpose(1, 2) + 1),
        (X,),
        {"Transpose": 2},
        {"Transpose": 0},
    ),
    "two turns": Positive(
        "merge transposes",
        lambda: Fn(lambda x: x.permute(1, 2, 0).permute(2, 1, 0) + 1),
        (X,),
        {"Transpose": 2},
        {"Transpose": 1},
    ),
    "there and back, an output": Positive(
        "merge transposes",
        lambda: Fn(lambda x: x.transpose(1, 2).transpose(1, 2)),
        (X,),
        {"Transpose": 2},
        {"Transpose": 1},
    ),
    "two reshapes": Positive(
        "merge reshapes", lambda: Fn(lambda x: x.unflatten(-1, (2, 4)).flatten(1)), (X,), {"Reshape": 2}, {"Reshape": 1}
    ),
    "an expand that Add does itself": Positive(
        "drop expands",
        lambda: Fn(lambda x, y: x + y.expand(x.shape[0], x.shape[1], 8)),
        (X, (1, 1, 8)),
        {"Expand": 1},
        {"Expand": 0},
    ),
    "RMSNorm": Positive(
        "fuse RMSNorm",
        lambda: Fn(normed, nn.Parameter(torch.rand(8) + 0.5)),
        (X,),
        {"Reciprocal": 1, "RMSNormalization": 0},
        {"Reciprocal": 0, "RMSNormalization": 1, "Mul": 0},
    ),
    "RMSNorm in fp16": Positive(
        "fuse RMSNorm",
        lambda: Fn(normed, nn.Parameter(torch.rand(8) + 0.5)),
        (X,),
        {"Cast": 2},
        {"Cast": 0, "RMSNormalization": 1},
        precision="fp16",
    ),
    "RMSNorm without a weight": Positive(
        "fuse RMSNorm",
        lambda: Fn(lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 0.1)),
        (X,),
        {"Reciprocal": 1},
        {"Reciprocal": 0, "RMSNormalization": 1, "Mul": 0},
    ),
    "rotary embedding": Positive(
        "fuse rotary embedding",
        lambda: Fn(rotated),
        (("b", 2, "t", 8), ("b", "t", 4)),
        {"Neg": 1, "RotaryEmbedding": 0},
        {"Neg": 0, "RotaryEmbedding": 1, "Concat": 1},
    ),
    "rotary embedding in fp16": Positive(
        "fuse rotary embedding",
        lambda: Fn(rotated),
        (("b", 2, "t", 8), ("b", "t", 4)),
        {"Neg": 1},
        {"Neg": 0, "RotaryEmbedding": 1},
        precision="fp16",
    ),
    "queries and keys share their tables": Positive(
        "fuse rotary embedding",
        lambda: Fn(lambda q, k, a: rotated(q, a) @ rotated(k, a).mT),
        (("b", 4, "t", 8), ("b", 4, "t", 8), ("b", "t", 4)),
        {"Neg": 2},
        {"RotaryEmbedding": 2, "Slice": 2},
        rewritten=2,
    ),
    "attention": Positive(
        "pack attention heads",
        lambda: Fn(attended, *dense(8, 8, 8)),
        (X,),
        {"Transpose": 7, "Reshape": 4},
        {"Transpose": 0, "Reshape": 0, "Attention": 1},
    ),
    "attention with wider values": Positive(
        "pack attention heads",
        lambda: Fn(attended, *dense(8, 8, 12)),
        (X,),
        {"Reshape": 4},
        {"Reshape": 0, "Attention": 1},
    ),
    "our attention": Positive(
        "pack heads of our attention",
        lambda: Fn(attended_by_ours, *dense(24, 8, 8)),
        (X,),
        {"Attention": 1, "Reshape": 4},
        {"PackedAttention": 1, "Transpose": 0, "Reshape": 0, "Attention": 0},
    ),
    "our attention with a bias": Positive(
        "pack heads of our attention with a bias",
        lambda: Fn(lambda x, bias, *parts: attended_by_ours(x, *parts, bias[:, None, None] > 0), *dense(8, 8, 8)),
        (X, ("b", "t")),
        {"AttentionBias": 1, "Reshape": 4},
        {"PackedAttentionBias": 1, "Transpose": 0, "Reshape": 0, "AttentionBias": 0},
    ),
}


@pytest.mark.parametrize("name", POSITIVES)
def test_a_rule_rewrites_and_keeps_the_numbers(name, tmp_path):
    p = POSITIVES[name]
    before, after, results = same_numbers(component_of(p.module(), *p.shapes), tmp_path, p.precision)
    counted = kinds(before)
    assert {kind: counted[kind] for kind in p.before} == p.before
    counted = kinds(after)
    assert {kind: counted[kind] for kind in p.after} == p.after
    assert results[p.rule].rewritten == p.rewritten


def test_an_identity_goes_where_it_names_no_output_of_its_own():
    model = model_of(
        "g (float[b, 8] x) => (float[b, 8] y) "
        "{ a = Identity (x) \n c = Relu (a) \n d = Identity (c) \n y = Identity (d) }"
    )
    result = passes.run_rule(model, passes.RULES[-1])
    assert (result.rewritten, kinds(model), [v.name for v in model.graph.outputs]) == (3, {"Relu": 1}, ["y"])


def test_every_rule_has_a_case():
    assert {p.rule for p in POSITIVES.values()} | {"drop identities"} == {rule.name for rule in passes.RULES}


def test_rules_of_later_opsets_wait_for_them():
    component = component_of(Fn(rotated), ("b", 2, "t", 8), ("b", "t", 4))
    model, results = cleaned(component, opset=22)
    assert set(results) == {rule.name for rule in passes.RULES if rule.since <= 22}
    assert kinds(model)["RotaryEmbedding"] == 0


# --- rules that decline ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Negative:
    """A rule and a forward, or a graph in ONNX's text form, that it has to leave alone; `keeps` must still be there."""

    rule: str
    reason: str
    what: Callable[[], nn.Module] | str
    shapes: tuple[tuple, ...] = ()
    keeps: dict[str, int] = field(default_factory=dict)


def rotary(
    turn: Callable, double: Callable = lambda a: torch.cat([a, a], -1), raised: int = 1
) -> Callable[[], nn.Module]:
    """A rotary embedding with one part changed."""
    return lambda: Fn(lambda x, a: x * double(a).cos().unsqueeze(raised) + turn(x) * double(a).sin().unsqueeze(raised))


def root(x):
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + 0.1)


def turned(x):
    return torch.cat([-x[..., 4:], x[..., :4]], -1)


def attention_with(split: Callable, join: Callable) -> Callable[[], nn.Module]:
    def fn(x, q, k, v):
        return join(F.scaled_dot_product_attention(*(split(m(x)) for m in (q, k, v))), x)

    return lambda: Fn(fn, *dense(8, 8, 8))


def heads_of(x):
    return x.view(x.shape[0], -1, 4, 2).transpose(1, 2)


ROTARY_SHAPES = (("b", 2, "t", 8), ("b", "t", 4))
NEGATIVES = {
    "a tied weight": Negative(
        "fold weight transposes",
        "the weight is also used as it is stored",
        lambda: Fn(lambda x, w: F.linear(x, w) @ w, nn.Parameter(torch.randn(63, 8))),
        (X,),
        {"Transpose": 1},
    ),
    "turned in two ways": Negative(
        "fold weight transposes",
        "the weight is also used as it is stored",
        lambda: Fn(
            lambda x, w: x @ w.permute(0, 2, 1) + (x @ w.permute(1, 2, 0)).sum(), nn.Parameter(torch.randn(8, 8, 8))
        ),
        ((8, "t", 8),),
        {"Transpose": 2},
    ),
    "an implicit permutation": Negative(
        "merge transposes",
        "a permutation is implicit",
        "g (float[b, 8] x) => (float[b, 8] y) { a = Transpose (x) \n c = Transpose <perm: ints = [1, 0]> (a) \n y = Relu (c) }",
        keeps={"Transpose": 2},
    ),
    "a size of the first's": Negative(
        "merge reshapes",
        "the second copies a size that the first made",
        "g (float[b, 2, 6] x) => (float[c, 3, 4] y) < int64[3] r = {-1, 4, 3}, int64[3] s = {0, 3, 4} > "
        "{ a = Reshape (x, r) \n e = Reshape (a, s) \n y = Relu (e) }",
        keeps={"Reshape": 2},
    ),
    "sizes that nobody knows": Negative(
        "merge reshapes",
        "sizes are not known",
        "g (float[b, 12] x, int64[n] r) => (float[b, 3, 4] y) < int64[3] s = {0, 3, 4} > "
        "{ a = Reshape (x, r) \n e = Reshape (a, s) \n y = Relu (e) }",
        keeps={"Reshape": 2},
    ),
    "only the smaller one is expanded": Negative(
        "drop expands",
        "no other operand has the full size",
        lambda: Fn(lambda x, y: y.expand(x.shape[0], 5, 8) * y),
        (("b", "t", 8), (1, 1, 8)),
        {"Expand": 1},
    ),
    "an output that another one is": Negative(
        "drop identities", "it names an output of the graph", lambda: Fn(lambda x: x), (X,), {"Identity": 1}
    ),
    "a mean over other dimensions": Negative(
        "fuse RMSNorm",
        "the mean is not over the last dimension",
        lambda: Fn(lambda x: x * torch.rsqrt((x * x).mean(1, keepdim=True) + 0.1)),
        (X,),
        {"Reciprocal": 1},
    ),
    "another one is scaled": Negative(
        "fuse RMSNorm",
        "the reciprocal root is not multiplied with the input alone",
        lambda: Fn(lambda x: (x + 1) * root(x)),
        (X,),
        {"Reciprocal": 1},
    ),
    "the root is used twice": Negative(
        "fuse RMSNorm",
        "the reciprocal root is not multiplied with the input alone",
        lambda: Fn(lambda x: x * root(x) + root(x)),
        (X,),
        {"Reciprocal": 1},
    ),
    "a cast to a third type": Negative(
        "fuse RMSNorm",
        "the casts before and after do not match",
        lambda: Fn(lambda x: (x.double() * torch.rsqrt((x.double() ** 2).mean(-1, keepdim=True) + 0.1)).half().float()),
        (X,),
        {"Reciprocal": 1},
    ),
    "no weight and no size": Negative(
        "fuse RMSNorm",
        "there is no weight, and the last size is not known",
        lambda: Fn(lambda x: x * root(x)),
        (("b", "t"),),
        {"Reciprocal": 1},
    ),
    "halves of another tensor": Negative(
        "fuse rotary embedding",
        "the halves are not of the tensor that is rotated, as [batch, heads, tokens, head_dim]",
        rotary(lambda x: turned(x + 1)),
        ROTARY_SHAPES,
        {"Neg": 1},
    ),
    "parts that are no halves": Negative(
        "fuse rotary embedding",
        "the parts are not the two halves of the last dimension",
        rotary(lambda x: torch.cat([-x[..., 3:], x[..., :3]], -1)),
        ROTARY_SHAPES,
        {"Neg": 1},
    ),
    "halves that stay in place": Negative(
        "fuse rotary embedding",
        "the parts are not the two halves of the last dimension",
        rotary(lambda x: torch.cat([-x[..., :4], x[..., 4:]], -1)),
        ROTARY_SHAPES,
        {"Neg": 1},
    ),
    "tables of two halves": Negative(
        "fuse rotary embedding",
        "cosine and sine are not one half repeated",
        rotary(turned, lambda a: torch.cat([a, a + 1], -1)),
        ROTARY_SHAPES,
        {"Neg": 1},
    ),
    "tokens before heads": Negative(
        "fuse rotary embedding",
        "cosine and sine are not [batch, 1, tokens, head_dim]",
        rotary(turned, raised=2),
        (("b", "t", 2, 8), ("b", "t", 4)),
        {"Neg": 1},
    ),
    "one table for the whole batch": Negative(
        "fuse rotary embedding",
        "cosine and sine are of another batch than what they rotate",
        rotary(turned),
        (("b", 2, "t", 8), (1, "t", 4)),
        {"Neg": 1},
    ),
    "heads that are scaled first": Negative(
        "pack attention heads",
        "an input does not come straight from a projection",
        attention_with(lambda x: heads_of(x) * 2, lambda y, x: y.transpose(1, 2).flatten(2)),
        (X,),
        {"Transpose": 4},
    ),
    "tokens that are cut": Negative(
        "pack attention heads",
        "heads are not split off the last of three dimensions",
        attention_with(
            lambda x: x.view(x.shape[0], -1, 2, 2).transpose(1, 2), lambda y, x: y.transpose(1, 2).flatten(2)
        ),
        (X,),
        {"Transpose": 4},
    ),
    "tokens that stay behind": Negative(
        "pack attention heads",
        "the output does not go straight back to [batch, tokens, channels]",
        attention_with(heads_of, lambda y, x: y.flatten(2)),
        (X,),
        {"Transpose": 3},
    ),
    "channels before tokens": Negative(
        "pack attention heads",
        "the output does not go straight back to [batch, tokens, channels]",
        attention_with(heads_of, lambda y, x: y.permute(0, 1, 3, 2).flatten(1, 2)),
        (X,),
        {"Transpose": 4},
    ),
    "joined to another width": Negative(
        "pack attention heads",
        "the output does not go straight back to [batch, tokens, channels]",
        attention_with(heads_of, lambda y, x: y.transpose(1, 2).reshape(x.shape[0], -1, 4)),
        (X,),
        {"Transpose": 4},
    ),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_a_rule_declines_and_says_why(name, tmp_path):
    n = NEGATIVES[name]
    if isinstance(n.what, str):
        model = model_of(n.what)
        rule = next(rule for rule in passes.RULES if rule.name == n.rule)
        result = passes.run_rule(model, rule)
    else:
        _, model, results = same_numbers(component_of(n.what(), *n.shapes), tmp_path)
        result = results[n.rule]
    assert set(result.declined.values()) == {n.reason}
    assert result.rewritten == 0
    counted = kinds(model)
    assert {kind: counted[kind] for kind in n.keeps} == n.keeps


def test_every_reason_to_decline_has_a_case():
    written = set()
    for function in ast.walk(ast.parse(inspect.getsource(passes))):
        if isinstance(function, ast.FunctionDef):
            returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
            written |= {v.value for v in returned if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    assert written == {n.reason for n in NEGATIVES.values()}


# --- the whole clean-up ----------------------------------------------------------------------------------------------


def test_an_output_that_comes_twice_keeps_both_names(tmp_path):
    def fn(x):
        y = x.sin()
        return y, y, x.sin(), x, x

    component = component_of(Fn(fn), X, outputs=("a", "b", "c", "d", "e"))
    _, after, _ = same_numbers(component, tmp_path)
    assert [v.name for v in after.graph.outputs] == ["a", "b", "c", "d", "e"]
    assert kinds(after) == {"Sin": 1, "Identity": 4}


def test_a_weight_that_is_an_output_too(tmp_path):
    component = component_of(
        Fn(lambda x, w: (F.linear(x, w), w.t(), w), nn.Parameter(torch.randn(63, 8))),
        X,
        outputs=("y", "turned", "weight"),
    )
    same_numbers(component, tmp_path)
    component = component_of(
        Fn(lambda x, w: (F.linear(x, w), w.t()), nn.Parameter(torch.randn(63, 8))), X, outputs=("y", "turned")
    )
    _, after, _ = same_numbers(component, tmp_path)
    assert [v.name for v in after.graph.outputs] == ["y", "turned"]


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(63, 32)
        self.inner = nn.Linear(32, 32)
        self.again = self.inner
        self.head = nn.Linear(32, 63, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.again(self.inner(self.table(ids))))


def test_tied_weights_are_written_once(tmp_path):
    component = Component.from_module(Tied(), [TensorSpec("ids", ("b", "t"), "int64", "ids:63")], ["y"], AXES)
    model, _ = cleaned(component)
    drop_unused_initializers(model)
    external.write_weights(model, tmp_path / "w.safetensors", {}, lambda done, total: None)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["inner.weight.T", "table.weight"]
        turned = file.get_tensor("inner.weight.T")
        assert torch.equal(turned.T, component.weights.tensor("inner.weight"))
    assert (tmp_path / "w.safetensors").stat().st_size < 4 * (63 * 32 + 32 * 32) + 1024
    same_numbers(component, tmp_path)


def test_no_initializer_is_dead_and_none_is_there_twice():
    component = component_of(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), ("b", "t", 32))
    model, _ = cleaned(component)
    drop_unused_initializers(model)
    assert all(value.uses() or value.is_graph_output() for value in model.graph.initializers.values())
    constants = [v for v in model.graph.initializers.values() if not isinstance(v.const_value, external.WeightTensor)]
    seen = Counter((v.dtype, tuple(v.shape.numpy()), v.const_value.numpy().tobytes()) for v in constants)
    assert max(seen.values()) == 1


def test_names_are_unique_and_keep_the_modules_path():
    (component,) = source_from_text("arch:clip-l@tiny").components
    model, _ = cleaned(component)
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == len(names)
    values = [str(v.name) for node in model.graph for v in node.outputs]
    values += [str(v.name) for v in (*model.graph.inputs, *model.graph.initializers.values())]
    assert len(set(values)) == len(values)
    paths = {name for name, _ in component.build().named_modules()} | {"", "sizes"}
    assert {name.rpartition("/")[0] for name in names} <= paths
    for kind, count in (("Attention", 3), ("LayerNormalization", 7)):
        assert len({n.name.rpartition("/")[0] for n in model.graph if n.op_type == kind}) == count


def test_a_rewritten_node_does_not_take_the_name_of_another(tmp_path):
    """Three attentions in one scope: the second is not packed and has the name that the third would be given."""

    def fn(x, *parts):
        first, third = (attended(x, *parts[i : i + 3]) for i in (0, 6))
        second = F.scaled_dot_product_attention(*(heads_of(m(x)) * 2 for m in parts[3:6])).transpose(1, 2).flatten(2)
        return attended(first + second + third, *parts[:3])

    _, after, results = same_numbers(component_of(Fn(fn, *dense(*[8] * 9)), X), tmp_path)
    assert results["pack attention heads"].rewritten == 3
    assert len({node.name for node in after.graph}) == len(after.graph)
    assert set(results["pack attention heads"].declined) <= {str(node.name) for node in after.graph}


@pytest.mark.parametrize("names", [("Add", "constant", "sizes"), ("scale", "parts.0", "MatMul")])
def test_names_of_inputs_and_outputs_are_nobody_elses(names, tmp_path):
    module = Fn(lambda x, y, w: (x.flatten(1) + y.sum() + 3).view(x.shape) @ w, nn.Parameter(torch.randn(8, 8)))
    specs = [TensorSpec(names[0], X), TensorSpec(names[1], X)]
    same_numbers(Component.from_module(module, specs, [names[2]], AXES), tmp_path)


# --- patterns of the libraries ---------------------------------------------------------------------------------------

LIBRARY = {
    "llama": (
        "arch:llama@tiny",
        {"RMSNormalization": 7, "RotaryEmbedding": 6, "Attention": 3},
        {"fuse RMSNorm": 7, "fuse rotary embedding": 6, "pack attention heads": 0},
    ),
    "t5": (
        "arch:t5-xxl@tiny",
        {"RMSNormalization": 7, "Attention": 3},
        {"fuse RMSNorm": 7, "pack attention heads": 3, "drop expands": 1},
    ),
    "bert": (
        "arch:bert-base@tiny",
        {"LayerNormalization": 7, "Attention": 3, "Transpose": 0},
        {"pack attention heads": 3, "fold weight transposes": 18},
    ),
    "gpt2": ("arch:gpt2@tiny", {"LayerNormalization": 7, "Attention": 3}, {"merge reshapes": 3}),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", LIBRARY)
def test_patterns_of_real_modules_are_found(name, precision, tmp_path):
    text, nodes, rewritten = LIBRARY[name]
    (component,) = source_from_text(text).components
    _, after, results = same_numbers(component, tmp_path, precision)
    counted = kinds(after)
    assert {kind: counted[kind] for kind in nodes} == nodes
    assert {rule: results[rule].rewritten for rule in rewritten} == rewritten
    assert counted["Reciprocal"] == 0


def test_packed_attention_is_what_diffusers_attention_becomes(tmp_path):
    from diffusers.models.attention_processor import Attention

    module = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    component = component_of(module, ("b", "t", 16), ("b", 77, 12))
    _, after, _ = same_numbers(component, tmp_path)
    (node,) = [n for n in after.graph if n.op_type == "Attention"]
    assert (node.attributes["q_num_heads"].value, node.attributes["kv_num_heads"].value) == (2, 2)
    assert kinds(after) == {"MatMul": 4, "Attention": 1, "Add": 1, "Div": 1}
