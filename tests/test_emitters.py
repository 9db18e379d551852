"""Every emitter through the real pipeline: trace, translate, clean up, write, check, run in ONNX Runtime, compare.

A case is a row of `CASES`: a function or module and its inputs, "b" and "t" being sizes that vary. Each is compared
with eager at the traced sizes, at others, and at the smallest; integers and bools exactly.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimize.compile import emitters, external
from optimize.compile.onnx_model import Clock, graph_from_component
from optimize.compile.runners import OnnxRuntimeRunner, loaded_module
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.errors import GateError

A = torch.ops.aten
AXES = {"b": Axis("b", 1, 2, 16), "t": Axis("t", 1, 3, 64), "n": Axis("n", 4, 6, 64), "h": Axis("h", 8, 16, 64, 8),
        "p": Axis("p", 0, 3, 16)}
ATTENTION = (18, 23)
NORMS = (18, 20, 21, 23)
TOLERANCE = {"fp32": (1e-5, 1e-5), "fp16": (4e-3, 4e-3)}


@dataclass(frozen=True, eq=False)
class Case:
    """`fn` is a function of the inputs or a module; `counts` says how many nodes of a kind the graph has to have."""

    name: str
    fn: Callable
    inputs: tuple[TensorSpec, ...]
    precision: str = "fp32"
    opsets: tuple[int, ...] = (23,)
    counts: dict[str, int] = field(default_factory=dict)
    sizes: tuple[str, ...] = ("traced", "untraced", "smallest")


def case(name, fn, *inputs, **options):
    named = tuple(TensorSpec(f"in{i}", spec.shape, spec.dtype, spec.fill) for i, spec in enumerate(inputs))
    return Case(name, fn, named, **options)


def f(*shape, fill="normal", dtype="float"):
    return TensorSpec("", shape, dtype, fill)


def pos(*shape):
    return f(*shape, fill="positive")


def i64(*shape, fill="-9..9", dtype="int64"):
    return f(*shape, fill=fill, dtype=dtype)


def i32(*shape, fill="-9..9"):
    return i64(*shape, fill=fill, dtype="int32")


def ids(below, *shape):
    return i64(*shape, fill=f"0..{below - 1}")


def divisors(*shape, dtype="int64"):
    """Integers of both signs, none of them zero."""
    return i64(*shape, fill="divisors", dtype=dtype)


def flag(*shape):
    return f(*shape, fill="0..1", dtype="bool")


def tensor_of(spec: TensorSpec, sizes: dict[str, int], precision: str, rng: torch.Generator) -> torch.Tensor:
    shape, dtype = spec.sizes(sizes), getattr(torch, spec.torch_dtype(precision))
    if spec.fill == "normal":
        return torch.randn(shape, generator=rng).to(dtype)
    if spec.fill == "positive":
        return (torch.rand(shape, generator=rng) + 0.25).to(dtype)
    if spec.fill == "divisors":
        return ((torch.randint(0, 2, shape, generator=rng) * 2 - 1) * torch.randint(1, 5, shape, generator=rng)).to(dtype)
    low, _, high = spec.fill.partition("..")
    return torch.randint(int(low), int(high) + 1, shape, generator=rng).to(dtype)


class Fn(nn.Module):
    """`fn(*tensors, *parts)`: a function as a module, with modules or parameters that belong to it."""

    def __init__(self, fn, *parts):
        super().__init__()
        self.fn = fn
        self.parts = (nn.ModuleList if parts and isinstance(parts[0], nn.Module) else nn.ParameterList)(parts)

    def forward(self, *tensors):
        return self.fn(*tensors, *self.parts)


def seeded(module: nn.Module) -> nn.Module:
    """Norms' scales and statistics away from one and zero, so that none can be left out unseen."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=rng) * 0.8 + 0.2 - (tensor.ndim > 1) * 0.6)
    return module


def component_of(c: Case) -> Component:
    module = c.fn if isinstance(c.fn, nn.Module) else Fn(c.fn)
    names = {name for spec in c.inputs for name in spec.axis_names()}
    axes = [axis for name, axis in AXES.items() if name in names]
    probe = Component.from_module(module, c.inputs, ("y",), axes)
    results = module.eval()(*feeds_of(c, probe.shape_sets()["traced"]).values())
    outputs = tuple(f"y{i}" for i in range(len(results))) if isinstance(results, tuple) else ("y",)
    return Component.from_module(module, c.inputs, outputs, axes)


def feeds_of(c: Case, sizes: dict[str, int], precision: str | None = "fp32") -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(zlib.crc32(c.name.encode()))
    return {spec.name: tensor_of(spec, sizes, precision, rng) for spec in c.inputs}


class Recorded(dict):
    """EMITTERS, noting which entries are used."""

    used: set[str] = set()

    def __getitem__(self, key):
        Recorded.used.add(key)
        return super().__getitem__(key)


@cache
def exported(c: Case, opset: int) -> tuple[ir.Model, Component, frozenset[str]]:
    """The cleaned graph, and the torch operators that were emitted for it."""
    component = component_of(c)
    Recorded.used = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emitters, "EMITTERS", Recorded(emitters.EMITTERS))
        model, _, _ = graph_from_component(component, c.precision, opset, Clock(lambda s: None))
    return model, component, frozenset(Recorded.used)


def written(model: ir.Model, folder) -> object:
    """The file, as `make_onnx` writes it."""
    path, weights = folder / "model.onnx", folder / "model.safetensors"
    external.write_weights(model, weights, {}, lambda done, total: None)
    external.inline_small(model)
    external.point_at(model, weights.name, external.header_bytes(weights))
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def compare(c: Case, got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    rtol, atol = TOLERANCE[c.precision] if want.is_floating_point() else (0, 0)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}")


# --- the table -------------------------------------------------------------------------------------------------------

bt7 = ("b", "t", 7)
half = lambda *parts: nn.Parameter(torch.randn(*parts))  # noqa: E731

ARITHMETIC = (
    # scaled
    case("add", lambda x, y: (x + y, x + 2, A.add.Scalar(x, 0.5), torch.add(x, y, alpha=-3), y + x.shape[1], 1 + x),
         f(*bt7), f(7)),
    case("add ranks", lambda x, y, z: (x + y, y + z, x + z), f("b", 1, 63, 1, 2), f(63, 77, 1), f()),
    case("add ints", lambda x, y, z: (x + y, x + z, x + 2, x + 0.5, torch.add(x, y, alpha=2), z + True), i64("b", 7), i32(7), flag(7)),
    case("add bools", lambda x, y: (x + y, x * y, torch.maximum(x, y), torch.minimum(x, y)), flag("b", 7), flag(7)),
    case("add in place", lambda x, y: (x * 1).add_(y).add_(2).add_(y, alpha=2), f(*bt7), f(7)),
    case("add in place scalar", lambda x: A.add_.Scalar(x * 1, 3), f(*bt7)),
    case("sub", lambda x, y: (x - y, x - 2, 2 - x, A.sub.Scalar(x, 0.5), torch.sub(x, y, alpha=2), torch.rsub(x, y, alpha=2),
                              A.rsub.Scalar(x, 3, 2), y - x.shape[0]), f(*bt7), f(7)),
    case("sub ints", lambda x, y: (x - y, 3 - x, x - 1.5, torch.rsub(x, y)), i64("b", 7), i32(7)),
    case("sub in place", lambda x, y: (x * 1).sub_(y), f(*bt7), f(7)),
    # binary
    case("mul", lambda x, y: (x * y, x * 2, A.mul.Scalar(x, 3), x * x.shape[1], x * True), f(*bt7), f(7)),
    case("mul ints", lambda x, y: (x * y, x * 2, x * 0.5, x * x.shape[0]), i64("b", 7), i32(7)),
    case("mul in place", lambda x, y: A.mul_.Scalar((x + 0).mul_(y), 2), f(*bt7), f(7)),
    case("mul fp16", lambda x, y: (x * y, x * 2, x + y.float(), x - 0.1), f(*bt7), f(7), precision="fp16"),
    case("remainder", lambda x, y: (x % y, x % 3, x % -4, torch.remainder(x, 3)), i64("b", 63), divisors(63)),
    case("remainder int32", lambda x, y: (x % y, x % -3), i32("b", 63), divisors(63, dtype="int32")),
    case("remainder of floats", lambda x, y: (x % y, x % 0.7, x % -0.7, torch.remainder(x * 3, 2)), f("b", 63), pos(63)),
    case("remainder of signed floats", lambda x, y: (x % -y, x % y, (-x) % y), f("b", 63), pos(63)),
    case("maximum", lambda x, y: (torch.maximum(x, y), A.max.other(x, y), torch.minimum(x, y), A.min.other(x, y)),
         f(*bt7), f(7)),
    case("maximum ints", lambda x, y: (torch.maximum(x, y), torch.minimum(x, y)), i64("b", 7), i32(7)),
    # divide
    case("div", lambda x, y: (x / y, x / 2, A.div.Scalar(x, 4), 1 / y, x / x.shape[1], x * (x.shape[1] / 3)), f(*bt7), pos(7)),
    case("div ints", lambda x, y: (x / y, x / 4, 1 / y), i64("b", 7), divisors(7)),
    case("div in place", lambda x, y: (x + 0).div_(y), f(*bt7), pos(7)),
    case("div floor", lambda x, y: (torch.div(x, y, rounding_mode="floor"), x // y, x // 3, x // -3,
                                    A.div.Scalar_mode(x, 4, rounding_mode="floor")), i64("b", 63), divisors(63)),
    case("div trunc", lambda x, y: (torch.div(x, y, rounding_mode="trunc"), torch.div(x, 3, rounding_mode="trunc")),
         i64("b", 63), divisors(63)),
    case("div modes of floats", lambda x, y: (torch.div(x, y, rounding_mode="floor"), torch.div(x, y, rounding_mode="trunc"),
                                              x // y, torch.div(x, 0.3, rounding_mode="floor"), torch.div(x, y, rounding_mode=None)),
         f("b", 63), pos(63)),
    case("div floor int32", lambda x, y: (x // y, x // 2), i32("b", 63), divisors(63, dtype="int32")),
    case("div by sizes", lambda x: (x // x.shape[1], x + x.shape[1] // 2, x + (x.shape[1] - 9) // 2, x + (x.shape[1] - 9) % 4),
         i64("b", "t")),
    # power
    case("pow", lambda x, y: (x**2, x**3, x**0.5, x**-1, x**y, 2**y, y**2.0, torch.pow(3, x)), pos(*bt7), pos(7)),
    case("pow ints", lambda x, y: (x**2, x**3, 2**y, x**y, x**0.5), ids(5, "b", 7), ids(4, 7)),
    case("square", lambda x: (torch.square(x), x.rsqrt()), pos(*bt7)),
    case("square ints", lambda x: (torch.square(x), torch.rsqrt(x)), divisors(7, "b")),
)

COMPARISON = (
    case("compare", lambda x, y: (x == y, x != y, x < y, x > y, x <= y, x >= y), i64("b", 63, fill="-2..2"), i32(63, fill="-2..2")),
    case("compare scalars", lambda x: (x == 1, x != 1, x < 0.5, x > 1, x <= 1, x >= 0.5, x > x.shape[1] - 3, 0 < x), i64("b", "t", fill="-2..2")),
    case("compare floats", lambda x, y: (x == y, x != y, x < y, x > y, x <= y, x >= y, x > 0, x == x, y < 1), f(*bt7), f(7)),
    case("compare bools", lambda x, y: (x == y, x != y, x < y, x > y, x <= y, x >= y, x == True, y > 0), flag("b", 63), flag(63)),  # noqa: E712
    case("compare ranks", lambda x, y: (x[:, None] < y, y == x.shape[0]), i64(7), i64("b", 1, 7)),
    # logical, logical_not
    case("logical", lambda x, y: (x & y, x | y, x ^ y, ~x, torch.logical_and(x, y), torch.logical_or(x, y),
                                  torch.logical_xor(x, y), torch.logical_not(x), torch.bitwise_and(x, y), torch.bitwise_or(x, y)),
         flag("b", 63), flag(63)),
    case("logical of numbers", lambda x, y: (torch.logical_and(x, y), torch.logical_or(x, y), torch.logical_xor(x, y),
                                             torch.logical_not(x)), f("b", 63, fill="-1..1"), i64(63, fill="-1..1")),
    case("bitwise", lambda x, y: (x & y, x | y, x ^ y, ~x, A.__and__.Tensor(x, y), A.__or__.Tensor(x, y), x & 3, x | 4),
         i64("b", 63), i64(63)),
    case("bitwise int32", lambda x, y: (x & y, x | y, ~x), i32("b", 63), i32(63)),
    # where, masked_fill, clamp
    case("where", lambda c, x, y: (torch.where(c, x, y), torch.where(c, x, 2.0), torch.where(c, -1.0, x), torch.where(c, 1.0, 0.0),
                                   torch.where(x > 0, x, y), torch.where(c, x, float("-inf"))), flag("b", "t", 1), f(*bt7), f(7)),
    case("where ints", lambda c, x: (torch.where(c, x, 2), torch.where(c, x, 0.5), torch.where(c, 1, 0), torch.where(c, x, x.shape[0])),
         flag("b", 7), i64(7)),
    case("masked_fill", lambda x, c, y: (x.masked_fill(c, -1e4), x.masked_fill(~c, y), x.masked_fill(c, float("-inf"))),
         f(*bt7), flag("b", 1, 7), f()),
    case("masked_fill ints", lambda x, c: (x.masked_fill(c, 3), x.masked_fill_(c, -100) * 1 if False else x.masked_fill(c, 0)), i64("b", 7), flag(7)),
    case("masked_fill fp16", lambda x, c: x.masked_fill(c, torch.finfo(x.dtype).min), f(*bt7), flag(7), precision="fp16"),
    case("clamp", lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0), x.clamp(max=0.3), A.clamp_min(x, 0.1), A.clamp_max(x, 0.1),
                             F.hardtanh(x), F.hardtanh(x, -0.2, 0.3), A.hardtanh(x), F.relu6(x * 9), torch.clip(x, 0, 1)), f(*bt7)),
    case("clamp ints", lambda x: (x.clamp(-2, 3), x.clamp(min=0), x.clamp(max=1), x.clamp(0.5, 2.5), x.clamp(max=x.shape[1])), i64("b", "t")),
    case("clamp tensors", lambda x, y: (torch.clamp(x, y, y + 1), torch.clip(x, min=y), torch.clamp(x, max=y)), f(*bt7), f("t", 1)),
)

FLOAT_NAMES = ("exp", "sin", "cos", "tan", "tanh", "neg", "abs", "sigmoid", "erf", "floor", "ceil", "round", "sign", "atan", "relu")
UNARY = (
    case("unary", lambda x: tuple(getattr(torch, name)(x) for name in FLOAT_NAMES), f(*bt7)),
    case("unary scalar", lambda x: tuple(getattr(torch, name)(x) for name in FLOAT_NAMES), f()),
    case("unary positive", lambda x: (x.log(), x.sqrt(), x.reciprocal(), x.rsqrt()), pos("b", 63)),
    case("unary halves", lambda x: (torch.round(x / 2), torch.floor(x / 2), torch.ceil(x / 2), torch.round(x)), i64("b", 63)),
    case("unary ints", lambda x: (x.abs(), x.neg(), x.sign(), x.floor(), x.ceil(), x.round(), x.relu(), x.exp(), x.sigmoid(), x.cos()),
         i64("b", 7)),
    case("unary int32", lambda x: (x.abs(), x.neg(), x.sign(), x.relu(), x.tanh()), i32("b", 7)),
    case("unary fp16", lambda x: tuple(getattr(torch, name)(x) for name in FLOAT_NAMES), f(*bt7), precision="fp16"),
    case("not finite", lambda x: (torch.isnan(x / x), torch.isinf(1 / x), torch.isnan(x), torch.isinf(-1 / x), torch.isnan(0.5 + 0 * x)),
         f("b", 63, fill="-1..1")),
    case("softplus", lambda x: (F.softplus(x), F.softplus(x, 2.0), F.softplus(x, beta=0.5, threshold=30), F.mish(x)), f(*bt7)),
    case("activation", lambda x: (F.silu(x), F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh")), f(*bt7), opsets=(18, 20, 23)),
    case("activation fp16", lambda x: (F.silu(x), F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh")), f(*bt7),
         opsets=(18, 20, 23), precision="fp16"),
    case("activation aten", lambda x: (A.silu(x), A.gelu(x), A.gelu(x, approximate="tanh"), A.relu(x)), f("b", 63), opsets=(18, 23)),
    case("activation in place", lambda x: (F.silu(x + 0, inplace=True), F.relu(x + 0, inplace=True), torch.relu_(x * 1),
                                           F.leaky_relu(x + 0, 0.3, inplace=True)), f("b", 63)),
    case("activation others", lambda x: (F.hardsigmoid(x * 4), F.leaky_relu(x), F.leaky_relu(x, 0.2), F.elu(x), F.elu(x, 0.5), F.selu(x),
                                         F.celu(x, 0.5), A.elu(x, 1.5, 2.0, 3.0), F.hardswish(x * 4), F.logsigmoid(x), F.softsign(x), F.tanhshrink(x)),
         f(*bt7)),
    case("prelu and glu", Fn(lambda x, act: (act(x), F.glu(x, 1)), nn.PReLU(6)), f("b", 6, "t")),
)

KINDS = (
    # convert, same
    case("convert", lambda x, y: (x.to(torch.int64), x.int(), x.bool(), x.half().float(), x.double(), x.to(y), x.type_as(y), x.to("cpu"),
                                  A.to.dtype_layout(x, dtype=torch.int32), A._to_copy(x, dtype=torch.int64), x.to(torch.device("cpu"), torch.int32)),
         f(*bt7), i32(7)),
    case("convert ints", lambda x: (x.float(), x.bool(), x.int(), x.to(torch.uint8).long(), x.half()), ids(3, "b", 7)),
    case("convert bools", lambda x: (x.float(), x.long(), x.int(), 1 - x.float()), flag("b", 7)),
    case("same", lambda x: (F.dropout(x, 0.5, False) + 1, x.contiguous() * 2, x.clone() - 1, x.detach() * 3, A.alias(x) + 2,
                            A.lift_fresh_copy(x) * 5, A.feature_dropout(x, 0.3, False) + 7, A.detach_(x * 9) + 1), f(*bt7)),
    case("same as it came", lambda x: x, f(*bt7)),
)

REDUCTIONS = (
    case("mean", lambda x: (x.mean(), x.mean(1), x.mean(-1, keepdim=True), x.mean((0, 2)), x.mean((-1, -2), keepdim=True)), f("b", "t", 7, 3)),
    case("sum", lambda x: (x.sum(), x.sum(0), x.sum(-1, keepdim=True), x.sum((1, -1)), x.sum((-1, -2), keepdim=True)), f("b", "t", 7)),
    case("sum ints", lambda x, y, z: (x.sum(), x.sum(0), y.sum(-1), z.sum(0), z.sum(), y.sum(0, dtype=torch.float32), y.sum(-1, dtype=torch.int32)),
         i64("b", 7), i32("b", 7), flag("b", 7)),
    case("mean of others", lambda x, y: (x.mean(0, dtype=torch.float32), y.float().mean(-1), y.mean(dtype=torch.float32)), i64("b", 7), flag("b", 7)),
    case("amax", lambda x: (x.amax(), x.amax(1), x.amax((0, -1), keepdim=True), x.amin(), x.amin(-1), x.max(), x.min()), f(*bt7)),
    case("amax ints", lambda x, y: (x.amax(0), x.amin(-1), x.max(), x.min(), y.max(), y.amin(0)), i64("b", 63), i32("b", 63)),
    case("amax bools", lambda x: (x.amax(0), x.amin(-1), x.max(), x.min()), flag("b", 3)),
    case("any", lambda x: (x.any(), x.any(0), x.any(-1, keepdim=True), x.all(), x.all(0), x.all(-1), A.any.dims(x, [0, 1])), flag("b", 2, 3)),
    case("any ints", lambda x: (x.any(), x.any(0), x.all(0), x.all(-1, keepdim=True)), i64("b", 7, fill="-2..1")),
    case("any floats", lambda x: (x.any(), x.any(0), x.all(0), (x / 4).any(1), (x / 4).all(1), (-x.abs() / 4).any(0)), f("b", 7, fill="-1..1")),
    case("max with index", lambda x: (*x.max(1), *x.max(-1, keepdim=True), *x.min(0), *x.min(-2, keepdim=True)), f(*bt7)),
    case("max with index ints", lambda x: (*x.max(1), *x.min(-1)), i64("b", 7, fill="-99..99")),
    case("argmax", lambda x: (x.argmax(), x.argmax(1), x.argmax(-1, keepdim=True), x.argmin(), x.argmin(0), x.argmin(-1, keepdim=True)), f(*bt7)),
    case("argmax flat keepdim", lambda x: torch.argmax(x, keepdim=True), f(*bt7)),
    case("argmax ties", lambda x, y: (x.argmax(-1), x.int().argmax(-1), y.int().argmax(-1), x.argmin(-1)), i64("b", 63, fill="0..3"), flag("b", 7)),
    case("cumsum", lambda x: (x.cumsum(0), x.cumsum(-1), x.cumsum(1)), f(*bt7)),
    case("cumsum ints", lambda x, y, z: (x.cumsum(-1), y.cumsum(0), z.cumsum(-1), z.long().cumsum(1) - 1, y.cumsum(0, dtype=torch.int32)),
         i64("b", 7), i32("b", 7), flag("b", 7)),
    case("reductions fp16", lambda x: (x.mean(-1), x.sum(1), x.amax(0), x.cumsum(-1), x.norm(dim=-1)), f("b", "t", 7), precision="fp16"),
    case("norm", lambda x: (torch.linalg.vector_norm(x), torch.linalg.vector_norm(x, 1, -1), torch.linalg.vector_norm(x, dim=(0, 1), keepdim=True),
                            x.norm(dim=-1), F.normalize(x, dim=-1), F.normalize(x, dim=1), torch.linalg.vector_norm(x, math.inf, 1)), f(*bt7)),
    case("var", lambda x: (x.var(-1), x.std(-1), x.var(1, unbiased=False), torch.var_mean(x, -1)[1]), f("b", 7, "n")),
    case("softmax", lambda x: (x.softmax(-1), x.softmax(0), x.softmax(1), F.softmax(x, -2, dtype=torch.float32), A.softmax.int(x, -1),
                               A._softmax(x, 1, False)), f(*bt7)),
    case("softmax more", lambda x: (F.log_softmax(x, -1), torch.logsumexp(x, -1), x.softmax(-1).log()), f(*bt7)),
    case("softmax fp16", lambda x: (x.softmax(-1), F.softmax(x, -1, dtype=torch.float32), F.softmax(x, -1, dtype=torch.float32).to(x.dtype)),
         f(*bt7), precision="fp16"),
)


# --- the tests -------------------------------------------------------------------------------------------------------

CASES = (*ARITHMETIC, *COMPARISON, *UNARY, *KINDS, *REDUCTIONS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose more by waiting for a second thread than it does, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows() -> Iterator[object]:
    for c in CASES:
        for opset in c.opsets:
            yield pytest.param(c, opset, id=f"{c.name}-{opset}" if len(c.opsets) > 1 else c.name)


@pytest.mark.parametrize(("c", "opset"), rows())
def test_an_export_gives_what_eager_gives(c, opset, tmp_path):
    model, component, _ = exported(c, opset)
    path = written(model, tmp_path)
    for kind, count in c.counts.items():
        assert sum(n.op_type == kind for n in ir.load(path).graph) == count, kind
    module = loaded_module(component, c.precision)
    with OnnxRuntimeRunner(path, threads=1) as runner, torch.no_grad():
        for name in c.sizes:
            feeds = feeds_of(c, component.shape_sets()[name], c.precision)
            want = dict(zip(component.outputs, module(*(t.clone() for t in feeds.values())), strict=True))
            got = runner.infer(feeds)
            for output in component.outputs:
                compare(c, got[output], want[output], f"{output} at the {name} sizes")
