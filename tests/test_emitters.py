"""Every emitter through the real pipeline: trace, translate, clean up, write, check, run in ONNX Runtime, compare.

A case is a row of `CASES`: a function or module and its inputs, "b" and "t" being sizes that vary. Each is compared
with eager at the traced sizes, at others, and at the smallest; integers and bools exactly.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from optimize.errors import GateError, InternalError

A = torch.ops.aten
AXES = {"b": Axis("b", 1, 2, 16), "t": Axis("t", 1, 3, 63), "n": Axis("n", 6, 9, 61), "p": Axis("p", 0, 3, 16)}
ATTENTION = (18, 23)
NORMS = (18, 20, 21, 23)
TOLERANCE = {"fp32": (1e-5, 1e-5), "fp16": (4e-3, 4e-3)}


@dataclass(frozen=True, eq=False)
class Case:
    """`fn` is a function of the inputs or a module; `sizes` are the sets of sizes that it is compared at."""

    name: str
    fn: Callable
    inputs: tuple[TensorSpec, ...]
    precision: str = "fp32"
    opsets: tuple[int, ...] = (23,)
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
        return ((torch.randint(0, 2, shape, generator=rng) * 2 - 1) * torch.randint(1, 5, shape, generator=rng)).to(
            dtype
        )
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
    inputs = [replace(spec, fill="normal") for spec in c.inputs]  # `feeds_of` fills them in its own ways
    probe = Component.from_module(module, inputs, ("y",), axes)
    results = module.eval()(*feeds_of(c, probe.shape_sets()["traced"]).values())
    outputs = tuple(f"y{i}" for i in range(len(results))) if isinstance(results, tuple) else ("y",)
    return Component.from_module(module, inputs, outputs, axes)


def feeds_of(c: Case, sizes: dict[str, int], precision: str | None = "fp32") -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(zlib.crc32(c.name.encode()))
    return {spec.name: tensor_of(spec, sizes, precision, rng) for spec in c.inputs}


class Recorded(dict):
    """EMITTERS, noting which entries are used."""

    def __init__(self, table):
        super().__init__(table)
        self.used = set()

    def __getitem__(self, key):
        self.used.add(key)
        return super().__getitem__(key)


@cache
def exported(c: Case, opset: int) -> tuple[ir.Model, Component, frozenset[str]]:
    """The cleaned graph, and the torch operators that were emitted for it."""
    component, table = component_of(c), Recorded(emitters.EMITTERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emitters, "EMITTERS", table)
        model, _, _ = graph_from_component(component, c.precision, opset, Clock(lambda s: None))
    return model, component, frozenset(table.used)


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

ARITHMETIC = (
    # scaled
    case(
        "add",
        lambda x, y: (x + y, x + 2, A.add.Scalar(x, 0.5), torch.add(x, y, alpha=-3), y + x.shape[1], 1 + x),
        f(*bt7),
        f(7),
    ),
    case("add ranks", lambda x, y, z: (x + y, y + z, x + z), f("b", 1, 63, 1, 2), f(63, 77, 1), f()),
    case(
        "add ints",
        lambda x, y, z: (x + y, x + z, x + 2, x + 0.5, torch.add(x, y, alpha=2), z + True),
        i64("b", 7),
        i32(7),
        flag(7),
    ),
    case("add bools", lambda x, y: (x + y, x * y, torch.maximum(x, y), torch.minimum(x, y)), flag("b", 7), flag(7)),
    case("add in place", lambda x, y: (x * 1).add_(y).add_(2).add_(y, alpha=2), f(*bt7), f(7)),
    case("add in place scalar", lambda x: A.add_.Scalar(x * 1, 3), f(*bt7)),
    case(
        "sub",
        lambda x, y: (
            x - y,
            x - 2,
            2 - x,
            A.sub.Scalar(x, 0.5),
            torch.sub(x, y, alpha=2),
            torch.rsub(x, y, alpha=2),
            A.rsub.Scalar(x, 3, 2),
            y - x.shape[0],
        ),
        f(*bt7),
        f(7),
    ),
    case("sub ints", lambda x, y: (x - y, 3 - x, x - 1.5, torch.rsub(x, y)), i64("b", 7), i32(7)),
    case("sub in place", lambda x, y: (x * 1).sub_(y), f(*bt7), f(7)),
    # binary
    case("mul", lambda x, y: (x * y, x * 2, A.mul.Scalar(x, 3), x * x.shape[1], x * True), f(*bt7), f(7)),
    case("mul ints", lambda x, y: (x * y, x * 2, x * 0.5, x * x.shape[0]), i64("b", 7), i32(7)),
    case("mul in place", lambda x, y: A.mul_.Scalar((x + 0).mul_(y), 2), f(*bt7), f(7)),
    case("mul fp16", lambda x, y: (x * y, x * 2, x + y.float(), x - 0.1), f(*bt7), f(7), precision="fp16"),
    case("remainder", lambda x, y: (x % y, x % 3, x % -4, torch.remainder(x, 3)), i64("b", 63), divisors(63)),
    case("remainder int32", lambda x, y: (x % y, x % -3), i32("b", 63), divisors(63, dtype="int32")),
    case(
        "remainder of floats", lambda x, y: (x % y, x % 0.7, x % -0.7, torch.remainder(x * 3, 2)), f("b", 63), pos(63)
    ),
    case("remainder of signed floats", lambda x, y: (x % -y, x % y, (-x) % y), f("b", 63), pos(63)),
    case(
        "maximum",
        lambda x, y: (torch.maximum(x, y), A.max.other(x, y), torch.minimum(x, y), A.min.other(x, y)),
        f(*bt7),
        f(7),
    ),
    case("maximum ints", lambda x, y: (torch.maximum(x, y), torch.minimum(x, y)), i64("b", 7), i32(7)),
    # divide
    case(
        "div",
        lambda x, y: (x / y, x / 2, A.div.Scalar(x, 4), 1 / y, x / x.shape[1], x * (x.shape[1] / 3)),
        f(*bt7),
        pos(7),
    ),
    case("div ints", lambda x, y: (x / y, x / 4, 1 / y), i64("b", 7), divisors(7)),
    case("div in place", lambda x, y: A.div_.Scalar((x + 0).div_(y), 3), f(*bt7), pos(7)),
    case(
        "div floor",
        lambda x, y: (
            torch.div(x, y, rounding_mode="floor"),
            x // y,
            x // 3,
            x // -3,
            A.div.Scalar_mode(x, 4, rounding_mode="floor"),
        ),
        i64("b", 63),
        divisors(63),
    ),
    case("div floor of whole floats", lambda x: (x // 0.1, x // -0.3, x // 0.0), f("b", 63, fill="-9..9")),
    case(
        "numbers that fp16 has no place for",
        lambda x: (
            x / (x.shape[1] * 66000) * x.shape[1] * 60000,
            (x * 0) * -1e9,
            x / 70000 * 60000,
        ),
        f("b", "t", 7),
        precision="fp16",
    ),
    case(
        "div trunc",
        lambda x, y: (torch.div(x, y, rounding_mode="trunc"), torch.div(x, 3, rounding_mode="trunc")),
        i64("b", 63),
        divisors(63),
    ),
    case(
        "div modes of floats",
        lambda x, y: (
            torch.div(x, y, rounding_mode="floor"),
            torch.div(x, y, rounding_mode="trunc"),
            x // y,
            torch.div(x, 0.3, rounding_mode="floor"),
            torch.div(x, y, rounding_mode=None),
        ),
        f("b", 63),
        pos(63),
    ),
    case("div floor int32", lambda x, y: (x // y, x // 2), i32("b", 63), divisors(63, dtype="int32")),
    case(
        "div by sizes",
        lambda x: (x // x.shape[1], x + x.shape[1] // 2, x + (x.shape[1] - 9) // 2, x + (x.shape[1] - 9) % 4),
        i64("b", "t"),
    ),
    # power
    case("pow", lambda x, y: (x**2, x**3, x**0.5, x**-1, x**y, 2**y, y**2.0, torch.pow(3, x)), pos(*bt7), pos(7)),
    case("pow ints", lambda x, y: (x**2, x**3, 2**y, x**y, x**0.5), ids(5, "b", 7), ids(4, 7)),
    case("square", lambda x: (torch.square(x), x.rsqrt()), pos(*bt7)),
    case("square ints", lambda x: (torch.square(x), torch.rsqrt(x)), divisors(7, "b")),
)

COMPARISON = (
    case(
        "compare",
        lambda x, y: (x == y, x != y, x < y, x > y, x <= y, x >= y),
        i64("b", 63, fill="-2..2"),
        i32(63, fill="-2..2"),
    ),
    case(
        "compare scalars",
        lambda x: (x == 1, x != 1, x < 0.5, x > 1, x <= 1, x >= 0.5, x > x.shape[1] - 3),
        i64("b", "t", fill="-2..2"),
    ),
    case("compare floats", lambda x, y: (x == y, x != y, x < y, x > y, x <= y, x >= y, x > 0, y < 1), f(*bt7), f(7)),
    case("compare bools", lambda x, y: (x == y, x != y, x < y, x > y, x <= y, x >= y, y > 0), flag("b", 63), flag(63)),
    case("compare ranks", lambda x, y: (x[:, None] < y, y == x.shape[0]), i64(7), i64("b", 1, 7)),
    # logical, logical_not
    case(
        "logical",
        lambda x, y: (
            x & y,
            x | y,
            x ^ y,
            ~x,
            torch.logical_and(x, y),
            torch.logical_or(x, y),
            torch.logical_xor(x, y),
            torch.logical_not(x),
            torch.bitwise_and(x, y),
            torch.bitwise_or(x, y),
        ),
        flag("b", 63),
        flag(63),
    ),
    case(
        "logical of numbers",
        lambda x, y: (torch.logical_and(x, y), torch.logical_or(x, y), torch.logical_xor(x, y), torch.logical_not(x)),
        f("b", 63, fill="-1..1"),
        i64(63, fill="-1..1"),
    ),
    case(
        "bitwise",
        lambda x, y: (x & y, x | y, x ^ y, ~x, A.__and__.Tensor(x, y), A.__or__.Tensor(x, y), x & 3, x | 4),
        i64("b", 63),
        i64(63),
    ),
    case("bitwise int32", lambda x, y: (x & y, x | y, ~x, x & 3, x | 4, x ^ 6), i32("b", 63), i32(63)),
    case(
        "bitwise named",
        lambda x, y: (
            torch.bitwise_and(x, 3),
            torch.bitwise_or(x, 4),
            torch.bitwise_xor(x, 5),
            torch.bitwise_xor(x, y),
        ),
        i64("b", 63),
        i64(63),
    ),
    # where, masked_fill, clamp
    case(
        "where",
        lambda c, x, y: (
            torch.where(c, x, y),
            torch.where(c, x, 2.0),
            torch.where(c, -1.0, x),
            torch.where(c, 1.0, 0.0),
            torch.where(x > 0, x, y),
            torch.where(c, x, float("-inf")),
        ),
        flag("b", "t", 1),
        f(*bt7),
        f(7),
    ),
    case(
        "where ints",
        lambda c, x: (
            torch.where(c, x, 2),
            torch.where(c, x, 0.5),
            torch.where(c, 1, 0),
            torch.where(c, x, x.shape[0]),
        ),
        flag("b", 7),
        i64(7),
    ),
    case(
        "masked_fill",
        lambda x, c, y: (x.masked_fill(c, -1e4), x.masked_fill(~c, y), x.masked_fill(c, float("-inf"))),
        f(*bt7),
        flag("b", 1, 7),
        f(),
    ),
    case("masked_fill ints", lambda x, c: (x.masked_fill(c, 3), x.masked_fill(c, 0)), i64("b", 7), flag(7)),
    case(
        "masked_fill fp16", lambda x, c: x.masked_fill(c, torch.finfo(x.dtype).min), f(*bt7), flag(7), precision="fp16"
    ),
    case(
        "clamp",
        lambda x: (
            x.clamp(-0.5, 0.5),
            x.clamp(min=0),
            x.clamp(max=0.3),
            A.clamp_min(x, 0.1),
            A.clamp_max(x, 0.1),
            F.hardtanh(x),
            F.hardtanh(x, -0.2, 0.3),
            A.hardtanh(x),
            F.relu6(x * 9),
            torch.clip(x, 0, 1),
        ),
        f(*bt7),
    ),
    case(
        "clamp ints",
        lambda x: (x.clamp(-2, 3), x.clamp(min=0), x.clamp(max=1), x.clamp(0.5, 2.5), x.clamp(max=x.shape[1])),
        i64("b", "t"),
    ),
    case(
        "clamp tensors",
        lambda x, y: (torch.clamp(x, y, y + 1), torch.clip(x, min=y), torch.clamp(x, max=y)),
        f(*bt7),
        f("t", 1),
    ),
)

FLOAT_NAMES = (
    "exp",
    "sin",
    "cos",
    "tan",
    "tanh",
    "neg",
    "abs",
    "sigmoid",
    "erf",
    "floor",
    "ceil",
    "round",
    "sign",
    "atan",
    "relu",
)
UNARY = (
    case("unary", lambda x: tuple(getattr(torch, name)(x) for name in FLOAT_NAMES), f(*bt7)),
    case("unary scalar", lambda x: tuple(getattr(torch, name)(x) for name in FLOAT_NAMES), f()),
    case("unary positive", lambda x: (x.log(), x.sqrt(), x.reciprocal(), x.rsqrt()), pos("b", 63)),
    case(
        "unary halves",
        lambda x: (
            torch.round(x / 2),
            torch.trunc(x / 2),
            torch.trunc(x),
            torch.floor(x / 2),
            torch.ceil(x / 2),
            torch.round(x),
        ),
        i64("b", 63),
    ),
    case(
        "unary ints",
        lambda x: (x.abs(), x.neg(), x.sign(), x.floor(), x.ceil(), x.round(), x.relu(), x.exp(), x.sigmoid(), x.cos()),
        i64("b", 7),
    ),
    case("unary int32", lambda x: (x.abs(), x.neg(), x.sign(), x.relu(), x.tanh()), i32("b", 7)),
    case("unary fp16", lambda x: tuple(getattr(torch, name)(x) for name in FLOAT_NAMES), f(*bt7), precision="fp16"),
    case(
        "not finite",
        lambda x: (
            torch.isnan(x / x),
            torch.isinf(1 / x),
            torch.isnan(x),
            torch.isinf(-1 / x),
            torch.isnan(0.5 + 0 * x),
        ),
        f("b", 63, fill="-1..1"),
    ),
    case(
        "softplus",
        lambda x: (
            F.softplus(x),
            F.softplus(x, 2.0),
            F.softplus(x, beta=0.5, threshold=30),
            F.softplus(x, 1.5, 0.3),
            F.mish(x),
        ),
        f(*bt7),
    ),
    case(
        "activation",
        lambda x: (F.silu(x), F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh")),
        f(*bt7),
        opsets=(18, 20, 23),
    ),
    case(
        "activation fp16",
        lambda x: (F.silu(x), F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh")),
        f(*bt7),
        opsets=(18, 20, 23),
        precision="fp16",
    ),
    case(
        "activation aten",
        lambda x: (A.silu(x), A.gelu(x), A.gelu(x, approximate="tanh"), A.relu(x)),
        f("b", 63),
        opsets=(18, 23),
    ),
    case(
        "activation in place",
        lambda x: (
            F.silu(x + 0, inplace=True),
            F.relu(x + 0, inplace=True),
            torch.relu_(x * 1),
            F.leaky_relu(x + 0, 0.3, inplace=True),
        ),
        f("b", 63),
    ),
    case(
        "activation others",
        lambda x: (
            F.hardsigmoid(x * 4),
            F.leaky_relu(x),
            F.leaky_relu(x, 0.2),
            F.elu(x),
            F.elu(x, 0.5),
            F.selu(x),
            F.celu(x, 0.5),
            A.elu(x, 1.5, 2.0, 3.0),
            F.hardswish(x * 4),
            F.softsign(x),
            F.tanhshrink(x),
            torch.expm1(x),
            torch.log1p(x * x),
        ),
        f(*bt7),
    ),
    case(
        "decomposed by torch",
        Fn(
            lambda x, act: (act(x), F.glu(x, 1), torch.logsumexp(x, -1), x.movedim(0, -1), F.pixel_unshuffle(x, 2)),
            nn.PReLU(6),
        ),
        f("b", 6, 2, 8),
    ),
)

KINDS = (
    # convert, same
    case(
        "convert",
        lambda x, y: (
            x.to(torch.int64),
            x.int(),
            x.bool(),
            x.half().float(),
            x.double(),
            x.to(y),
            A.to.other(x, y),
            x.type_as(y),
            x.to("cpu"),
            A.to.dtype_layout(x, dtype=torch.int32),
            A._to_copy(x, dtype=torch.int64),
            x.to(torch.device("cpu"), torch.int32),
        ),
        f(*bt7),
        i32(7),
    ),
    case("convert ints", lambda x: (x.float(), x.bool(), x.int(), x.to(torch.uint8).long(), x.half()), ids(3, "b", 7)),
    case("convert bools", lambda x: (x.float(), x.long(), x.int(), 1 - x.float()), flag("b", 7)),
    case(
        "same",
        lambda x: (
            F.dropout(x, 0.5, False) + 1,
            x.contiguous() * 2,
            x.clone() - 1,
            x.detach() * 3,
            A.alias(x) + 2,
            A.lift_fresh_copy(x) * 5,
            A.feature_dropout(x, 0.3, False) + 7,
            A.detach_(x * 9) + 1,
        ),
        f(*bt7),
    ),
    case("same as it came", lambda x: x, f(*bt7)),
)

REDUCTIONS = (
    case(
        "mean",
        lambda x: (x.mean(), x.mean(1), x.mean(-1, keepdim=True), x.mean((0, 2)), x.mean((-1, -2), keepdim=True)),
        f("b", "t", 7, 3),
    ),
    case(
        "sum",
        lambda x: (x.sum(), x.sum(0), x.sum(-1, keepdim=True), x.sum((1, -1)), x.sum((-1, -2), keepdim=True)),
        f("b", "t", 7),
    ),
    case(
        "sum ints",
        lambda x, y, z: (
            x.sum(),
            x.sum(0),
            y.sum(-1),
            z.sum(0),
            z.sum(),
            y.sum(0, dtype=torch.float32),
            y.sum(-1, dtype=torch.int32),
        ),
        i64("b", 7),
        i32("b", 7),
        flag("b", 7),
    ),
    case(
        "mean of others",
        lambda x, y: (x.mean(0, dtype=torch.float32), y.float().mean(-1), y.mean(dtype=torch.float32)),
        i64("b", 7),
        flag("b", 7),
    ),
    case(
        "amax",
        lambda x: (x.amax(), x.amax(1), x.amax((0, -1), keepdim=True), x.amin(), x.amin(-1), x.max(), x.min()),
        f(*bt7),
    ),
    case(
        "amax ints",
        lambda x, y: (x.amax(0), x.amin(-1), x.max(), x.min(), y.max(), y.amin(0)),
        i64("b", 63),
        i32("b", 63),
    ),
    case("amax bools", lambda x: (x.amax(0), x.amin(-1), x.max(), x.min()), flag("b", 3)),
    case(
        "any",
        lambda x: (x.any(), x.any(0), x.any(-1, keepdim=True), x.all(), x.all(0), x.all(-1), A.any.dims(x, [0, 1])),
        flag("b", 2, 3),
    ),
    case(
        "any bytes",
        lambda x: (x.any(), x.any(0), x.all(1), A.any.dims(x, [0, 1])),
        i64("b", 7, fill="0..2", dtype="uint8"),
    ),
    case("any ints", lambda x: (x.any(), x.any(0), x.all(0), x.all(-1, keepdim=True)), i64("b", 7, fill="-2..1")),
    case(
        "any floats",
        lambda x: (x.any(), x.any(0), x.all(0), (x / 4).any(1), (x / 4).all(1), (-x.abs() / 4).any(0)),
        f("b", 7, fill="-1..1"),
    ),
    case(
        "max with index", lambda x: (*x.max(1), *x.max(-1, keepdim=True), *x.min(0), *x.min(-2, keepdim=True)), f(*bt7)
    ),
    case("max with index ints", lambda x: (*x.max(1), *x.min(-1)), i64("b", 7, fill="-99..99")),
    case(
        "argmax",
        lambda x: (
            x.argmax(),
            x.argmax(1),
            x.argmax(-1, keepdim=True),
            x.argmin(),
            x.argmin(0),
            x.argmin(-1, keepdim=True),
        ),
        f(*bt7),
    ),
    case("argmax flat keepdim", lambda x: torch.argmax(x, keepdim=True), f(*bt7)),
    case(
        "argmax ties",
        lambda x, y: (x.argmax(-1), x.int().argmax(-1), y.int().argmax(-1), x.argmin(-1)),
        i64("b", 63, fill="0..3"),
        flag("b", 7),
    ),
    case("cumsum", lambda x: (x.cumsum(0), x.cumsum(-1), x.cumsum(1)), f(*bt7)),
    case(
        "cumsum ints",
        lambda x, y, z: (
            x.cumsum(-1),
            y.cumsum(0),
            z.cumsum(-1),
            z.long().cumsum(1) - 1,
            y.cumsum(0, dtype=torch.int32),
        ),
        i64("b", 7),
        i32("b", 7),
        flag("b", 7),
    ),
    case(
        "reductions fp16",
        lambda x: (x.mean(-1), x.sum(1), x.amax(0), x.cumsum(-1), x.norm(dim=-1)),
        f("b", "t", 7),
        precision="fp16",
    ),
    case(
        "norm",
        lambda x: (
            torch.linalg.vector_norm(x),
            torch.linalg.vector_norm(x, 1, -1),
            torch.linalg.vector_norm(x, dim=(0, 1), keepdim=True),
            x.norm(dim=-1),
            F.normalize(x, dim=-1),
            F.normalize(x, dim=1),
            torch.linalg.vector_norm(x, math.inf, 1),
        ),
        f(*bt7),
    ),
    case(
        "var",
        lambda x: (
            x.var(-1),
            x.std(-1),
            x.var(1, unbiased=False),
            *torch.var_mean(x, -1),
            x.var(),
            x.std(),
            torch.var(x, (0, 1), correction=0),
            torch.std(x, 2, correction=2, keepdim=True),
            A.var(x, False),
            A.std(x, False),
            A.var.correction(x, [1]),
            A.std.correction(x),
        ),
        f("b", 7, "n"),
    ),
    case(
        "softmax",
        lambda x: (
            x.softmax(-1),
            x.softmax(0),
            x.softmax(1),
            F.softmax(x, -2, dtype=torch.float32),
            A.softmax.int(x, -1),
            A._softmax(x, 1, False),
        ),
        f(*bt7),
    ),
    case("softmax more", lambda x: (F.log_softmax(x, -1), x.log_softmax(1), A._log_softmax(x, 0, False)), f(*bt7)),
    case(
        "softmax fp16",
        lambda x: (
            x.softmax(-1),
            F.softmax(x, -1, dtype=torch.float32),
            F.softmax(x, -1, dtype=torch.float32).to(x.dtype),
        ),
        f(*bt7),
        precision="fp16",
    ),
)

SHAPES = (
    # reshape, squeeze_dim, unsqueeze, transpose, permute, expand
    case(
        "reshape",
        lambda x: (
            x.view(x.shape[0], -1),
            x.reshape(-1, 12),
            x.view(x.shape[0], x.shape[1], 3, 4),
            x.flatten(1),
            x.flatten(0, 1),
            x.unflatten(2, (2, 6)),
            x.unflatten(-1, (-1, 3)),
            x.reshape(x.shape[1], x.shape[0], 12),
            x.reshape(-1),
            x.reshape(x.shape[0] * x.shape[1], 2, 6),
        ),
        f("b", "t", 12),
    ),
    case(
        "reshape heads",
        lambda x: (
            x.reshape(x.shape[0], -1, 4, 3).transpose(1, 2),
            x.transpose(1, 2).reshape(x.shape[0], 12, x.shape[1]),
        ),
        f("b", "t", 12),
    ),
    case(
        "reshape empty",
        lambda x: (
            x.reshape(x.shape[0] * 2, x.shape[2], 8),
            x.repeat_interleave(2, 1),
            x.transpose(1, 2).flatten(2),
            x.sum(2),
        ),
        f("b", 2, "p", 8),
    ),
    case(
        "reshape like",
        lambda x, y: (
            x.view_as(y),
            x.reshape_as(y),
            A._unsafe_view(x, [x.shape[0], 12]),
            x[:, None].squeeze(1),
            x[:, None, :, None].squeeze(),
        ),
        f("b", 2, 6),
        f("b", 3, 4),
        sizes=("traced", "untraced"),
    ),
    case(
        "squeeze",
        lambda x: (x.squeeze(1), x.squeeze(-1), x.squeeze(0), x.squeeze((1, -1)), x.squeeze(2), x.squeeze((0, 1))),
        f("b", 1, 7, 1),
        sizes=("traced", "untraced"),
    ),
    case(
        "unsqueeze",
        lambda x, y: (
            x.unsqueeze(0),
            x.unsqueeze(-1),
            x.unsqueeze(2),
            x[:, None],
            x[..., None],
            x[None, :, :, None],
            y.unsqueeze(-1),
            y[None],
        ),
        f("b", "t"),
        f(),
    ),
    case(
        "transpose",
        lambda x, y, z: (
            x.transpose(1, 2),
            x.transpose(-1, 0),
            x.swapaxes(0, -2),
            A.swapaxes(x, 1, 2),
            x.mT,
            y.t(),
            y.T,
            z.t(),
            x.transpose(1, 1),
            x.transpose(-1, -2),
        ),
        f(*bt7),
        f("b", 7),
        f(63),
    ),
    case("permute", lambda x: (x.permute(2, 0, 1), x.permute(0, -1, 1), x.permute(0, 1, 2) + 1), f(*bt7)),
    case(
        "permute ints",
        lambda x, y: (x.permute(1, 0), y.permute(1, 0), y.transpose(0, 1)[:, None]),
        i64("b", 7),
        flag("b", "t"),
    ),
    case(
        "expand",
        lambda x, y: (
            x.expand(-1, 5, -1),
            x.expand(3, -1, 4, 7),
            y.expand(x.shape[0], x.shape[2], 7),
            y.expand_as(x[:, 0]),
            y.broadcast_to(2, 7),
            A.broadcast_to(y, [x.shape[0], 7]),
            x.expand(x.shape[0], 1, 7),
        ),
        f("b", 1, 7),
        f(7),
    ),
    case(
        "expand ints",
        lambda x, y: (x.expand(-1, x.shape[0] * 2), y.expand(-1, 5), x[:, None].expand(-1, 3, -1)),
        i64("b", 1),
        flag("b", 1),
    ),
    # cat, stack, split, unbind
    case(
        "cat",
        lambda x, y: (
            torch.cat([x, y], 1),
            torch.cat([x, x, y], dim=-2),
            torch.concat([x, x], 2),
            torch.concatenate([x, x], -1),
            A.concat([x, y], 1),
            A.concatenate([x, x], 0),
            torch.cat([x]),
        ),
        f("b", "t", 7),
        f("b", 3, 7),
    ),
    case(
        "cat kinds",
        lambda x, y, z: (torch.cat([x, y], 1), torch.cat([x, z], -1), torch.cat([torch.zeros(0), z * 1.0])),
        i64("b", 7),
        i32("b", 3),
        f("b", 7),
    ),
    case(
        "stack",
        lambda x, y: (
            torch.stack([x, y]),
            torch.stack([x, y], -1),
            torch.stack([x, y, x], 1),
            torch.stack([x, y.int()], 2),
        ),
        f("b", 7),
        f("b", 7),
    ),
    case(
        "split",
        lambda x: (
            *x.split(3, -1),
            *x.split([1, 2, 4], 2),
            *A.split.sizes(x, [3, 4], -1),
            *x.chunk(2, -1),
            *x.chunk(3, 2),
            *x.tensor_split(3, -1),
            *x.split(63, 2),
        ),
        f(*bt7),
    ),
    case("split sizes", lambda x: (*x.split([x.shape[1] - 1, 1], 1), *x.split([1, x.shape[1] - 1], 1)), f("b", "n", 7)),
    case("split ints", lambda x: (*x.split(3, -1), *x.chunk(2, 1)), i64("b", 7)),
    case("unbind", lambda x: (*x.unbind(2), *x[..., :2].unbind(-1)), f("b", "t", 3)),
    # slice_, select, narrow
    case(
        "slice",
        lambda x: (
            x[:, 1:],
            x[:, :-1],
            x[:, ::2],
            x[..., -3:],
            x[..., 2:5],
            x[..., 1:-1:3],
            x[:, : x.shape[0]],
            x[:, -2:],
            x[..., :99],
            x[:, x.shape[1] - 2 :],
            x[:, 1:, 0],
        ),
        f("b", "n", 7),
    ),
    case("slice ints", lambda x, y: (x[:, 1:], y[:, :3], x[:, ::3]), i64("b", 7), flag("b", 7)),
    case(
        "slice at a length",
        lambda x, y: (x[:, : y.shape[1]] + y, x[:, -y.shape[1] :] - y),
        f("b", 64, 7),
        f("b", "t", 1),
    ),
    case(
        "select",
        lambda x: (x[0], x[:, -1], x[..., 3], x[:, 0, 2], x.select(1, 1), x[:, x.shape[1] - 1], x[-1, -1]),
        f("b", "n", 7),
    ),
    case("narrow", lambda x: (x.narrow(1, 1, 2), x.narrow(-1, 3, 4), x.narrow(1, 0, x.shape[1] - 1)), f("b", "n", 7)),
    # index_select, gather, index, embedding
    case(
        "index_select",
        lambda x, i, j: (x.index_select(1, i), x.index_select(-1, i), x.index_select(1, j)),
        f("b", 7, 7),
        ids(7, "t"),
        i32(5, fill="0..6"),
    ),
    case(
        "gather",
        lambda x, i: (x.gather(1, i), x.gather(-1, i), torch.gather(x, 1, i[:, :1])),
        f("b", 7, 3),
        ids(3, "b", 7, 3),
    ),
    case(
        "index",
        lambda x, i, j: (x[i], x[:, i], x[..., i], x[i, j], x[i[:, None], j], x[i, j, 2], x[i, j[:, None], 1:]),
        f(7, 7, 7),
        ids(7, "t"),
        ids(7, "t"),
    ),
    case("index negative", lambda x, i: (x[i], x[:, i], x[i, i]), f(9, 9, 2), i64("t")),
    case(
        "index later",
        lambda x, i, j: (
            x[:, i, j],
            x[..., i, j],
            x[:, i[:, None], j[None]],
            x[:, :, i, j],
            x[:, i, :, j],
            x[:, :, i, j].sum(1),
        ),
        f("b", 7, 7, 7),
        ids(7, 5),
        ids(7, 5),
        sizes=("traced", "untraced"),
    ),
    case(
        "index rows",
        lambda x, i: (x[torch.arange(x.shape[0]), i], x[torch.arange(x.shape[0], device=x.device), -1]),
        f("b", 7, 3),
        ids(7, "b"),
    ),
    case("index kinds", lambda x, i: (x[i], x[:, i], x[i, i]), i64(7, 7), i32("t", fill="0..6")),
    case(
        "embedding",
        Fn(lambda i, j, e: (e(i), e(j)), nn.Embedding(7, 5, padding_idx=0)),
        ids(7, "b", "t"),
        i32("b", fill="0..6"),
    ),
    # repeat, repeat_interleave, flip, roll
    case(
        "repeat",
        lambda x: (
            x.repeat(1, 2, 3),
            x.repeat(2, 1, 1, 1),
            x.repeat(x.shape[0], 1, 2),
            x.repeat(3, x.shape[1], 1, 1, 2),
            x.tile(2),
            x.tile(2, 1),
            x.tile(2, 1, 1, 3),
            torch.tile(x, (1, 2, 1)),
        ),
        f(*bt7),
    ),
    case(
        "repeat ints", lambda x, y: (x.repeat(2, 1), y.repeat(1, 3), x[None].repeat(2, 1, 1)), i64("b", 7), flag("b", 7)
    ),
    case(
        "repeat_interleave",
        lambda x: (
            x.repeat_interleave(2, 1),
            x.repeat_interleave(3, dim=-1),
            x.repeat_interleave(2, 0),
            x.repeat_interleave(2),
            x.repeat_interleave(3),
        ),
        f(*bt7),
    ),
    case("flip", lambda x: (x.flip(1), x.flip(-1, 0), x.flip((0, 1, 2))), f(*bt7)),
    case(
        "roll",
        lambda x: (
            x.roll(1, 1),
            x.roll(-2, -1),
            x.roll((1, -1), (1, 2)),
            x.roll(9, 2),
            x.roll(-16, -1),
            x.roll(0, 1),
            x.roll(x.shape[1] // 2, 1),
        ),
        f(*bt7),
    ),
    case("roll further", lambda x: (x.roll(3, 1), x.roll(-4, 0), x.roll(5), x.roll((3, -3), (0, 1))), f(*bt7)),
)

PADS = (
    case(
        "pad",
        lambda x: (
            F.pad(x, (1, 2)),
            F.pad(x, (0, 1, 2, 0)),
            F.pad(x, (1, 1, 1, 1, 1, 1), value=-2.5),
            F.pad(x, (-1, -2)),
            F.pad(x, (1, -1, -1, 2)),
            F.pad(x, (0, 0, 0, x.shape[0])),
            F.pad(x, (0, 64 - x.shape[1])),
            A.constant_pad_nd(x, [1, 2], 3.0),
            A.constant_pad_nd(x, [1, 2]),
        ),
        f("b", "n", 7),
    ),
    case(
        "pad kinds",
        lambda x, y, z: (
            F.pad(x, (1, 2)),
            F.pad(x, (1, 2), value=-1),
            F.pad(y, (1, 0), value=True),
            F.pad(y, (1, 0)),
            F.pad(z, (0, 3), value=7),
        ),
        i64("b", 7),
        flag("b", 7),
        i32("b", 7),
    ),
    case(
        "pad reflect",
        lambda x: (F.pad(x, (2, 3), "reflect"), F.pad(x, (3, 1), "replicate"), F.pad(x, (0, 2), "replicate")),
        f("b", 3, "n"),
        opsets=(18, 23),
    ),
    case(
        "pad reflect images",
        lambda x: (F.pad(x, (2, 3, 1, 0), "reflect"), F.pad(x, (3, 1, 0, 2), "replicate")),
        f("b", 2, "n", 7),
        opsets=(18, 23),
    ),
    case("pad replicate volume", lambda x: F.pad(x, (3, 1, 0, 2, 1, 1), "replicate"), f("b", 2, "n", 7, 3)),
    case(
        "pad circular",
        lambda x: (F.pad(x, (2, 3, 1, 0), "circular"), F.pad(x[:, 0], (2, 4), "circular")),
        f("b", 2, "n", 7),
        opsets=(20, 23),
    ),
    case("pad to a multiple", lambda x: F.pad(x, ((-x.shape[2]) % 8, 0)), f("b", 3, "n")),
)

CREATION = (
    case(
        "triangle",
        lambda x: (
            x.triu(),
            x.tril(),
            x.triu(1),
            x.tril(-1),
            x.triu(-2),
            x.tril(x.shape[1] - 2),
            x.triu(diagonal=x.shape[0]),
        ),
        f("b", "t", 7),
    ),
    case(
        "triangle kinds",
        lambda x, y, z: (x.triu(1), y.tril(), z.triu(), z.tril(1)),
        i64("t", 7),
        flag("t", "t"),
        i32(7, "t"),
    ),
    case(
        "causal mask",
        lambda x: (
            torch.ones(x.shape[1], x.shape[1]).tril(),
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1),
            torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1),
        ),
        f("b", "t"),
    ),
    case(
        "meshgrid",
        lambda x, y: (
            *torch.meshgrid(x, y, indexing="ij"),
            *torch.meshgrid(x, y, indexing="xy"),
            *torch.meshgrid(torch.arange(3.0), y, indexing="ij"),
            *torch.meshgrid(torch.arange(y.shape[0]), torch.arange(5), indexing="xy"),
            *torch.meshgrid(x, y, x, indexing="xy"),
            *torch.meshgrid(x, y),
        ),
        f("b"),
        f("t"),
    ),
    case(
        "ones",
        lambda x: (
            torch.ones(x.shape[1], 3) + x[0, :, :1],
            x.new_ones(x.shape[0], 2),
            torch.ones_like(x),
            torch.ones_like(x, dtype=torch.int64),
            torch.zeros(x.shape),
            x.new_zeros(x.shape[1], dtype=torch.bool),
            torch.zeros_like(x),
            torch.zeros(2, 3) + x[0, 0, 0],
            torch.ones(x.shape[0], dtype=torch.bool),
        ),
        f(*bt7),
    ),
    case(
        "full",
        lambda x: (
            torch.full((x.shape[0], 2), 7),
            torch.full((x.shape[1],), 0.5),
            x.new_full((x.shape[0],), -3),
            torch.full_like(x, 2.5),
            torch.full_like(x, 3, dtype=torch.int32),
            torch.full((x.shape[0],), x.shape[1]),
            torch.full((2,), x.shape[1]),
            torch.full((x.shape[0], 1), True),
            torch.full_like(x, float("-inf")),
            A.scalar_tensor(2.5) + x,
            A.scalar_tensor(x.shape[0]) + x,
        ),
        f(*bt7),
    ),
    case(
        "arange",
        lambda x: (
            torch.arange(x.shape[1]),
            torch.arange(1, x.shape[1] + 1),
            torch.arange(0, 2 * x.shape[1], 2),
            torch.arange(x.shape[1], 0, -1),
            torch.arange(x.shape[1], dtype=torch.float32),
            torch.arange(x.shape[1] * 1.0),
            torch.arange(0, x.shape[1], 0.5),
            torch.arange(x.shape[1], dtype=torch.int32),
            torch.arange(0.5, x.shape[0]),
            torch.arange(3) + x.shape[0],
            torch.arange(-x.shape[0], x.shape[1]),
        ),
        f("b", "t"),
    ),
    case(
        "arange fp16",
        lambda x: (torch.arange(x.shape[1], dtype=x.dtype) * x, torch.arange(x.shape[1]).to(x.dtype) + x),
        f("b", "t"),
        precision="fp16",
    ),
    case(
        "positions",
        lambda x: (
            (torch.arange(x.shape[1]) / x.shape[1])[None] + x,
            torch.arange(x.shape[1]).float() / (x.shape[1] + 1) + x,
            torch.linspace(0, 1, 7)[None] + x[:, :1],
            x * (x.shape[1] ** 0.5),
            x * x.shape[1] ** -0.5,
        ),
        f("b", "t"),
    ),
    case(
        "sizes",
        lambda x: (
            x * (x.shape[0] + 2 * x.shape[1]),
            x + max(x.shape[0], 3),
            x + min(x.shape[1], x.shape[0]),
            x + (x.shape[1] ** 2 - 1) // 2,
            x * ((x.shape[1] + 7) // 8 * 8),
            x * 1.0 * x.numel(),
        ),
        f("b", "t"),
    ),
)

PRODUCTS = (
    case(
        "matmul",
        lambda x, y, v: (
            x @ y,
            x @ v,
            v @ y,
            torch.matmul(x, y[0]),
            x[0] @ y[0],
            torch.mm(x[0], y[0]),
            torch.bmm(x, y),
            v @ v,
            y.mT @ x.mT,
        ),
        f("b", "t", 7),
        f("b", 7, 5),
        f(7),
    ),
    case("matmul ranks", lambda x, y: (x @ y, x[:, 0] @ y[0], x[..., :1, :] @ y), f("b", 3, "t", 7), f(3, 7, 63)),
    case("matmul ints", lambda x, y: (x @ y, torch.bmm(x, y)), i64("b", 3, 7), i64("b", 7, 2)),
    case(
        "addmm",
        lambda m, a, b, v: (
            torch.addmm(m, a, b),
            torch.addmm(v, a, b, beta=0.5, alpha=2),
            torch.addmm(m[:, :1], a, b),
            A.addmm(v, a, b, beta=0),
        ),
        f("b", 5),
        f("b", 7),
        f(7, 5),
        f(5),
    ),
    case(
        "baddbmm",
        lambda m, a, b: (
            torch.baddbmm(m, a, b),
            torch.baddbmm(m, a, b, beta=0, alpha=0.5),
            torch.baddbmm(m[:1, :1], a, b, beta=2, alpha=3),
        ),
        f("b", "t", 5),
        f("b", "t", 7),
        f("b", 7, 5),
    ),
    case(
        "baddbmm fp16",
        lambda m, a, b: (torch.baddbmm(m, a, b, alpha=0.3), a @ b),
        f("b", "t", 5),
        f("b", "t", 7),
        f("b", 7, 5),
        precision="fp16",
    ),
    case(
        "products",
        lambda a, b: (
            torch.mv(a, b),
            torch.dot(b, b),
            torch.outer(b, a[:, 0]),
            A.outer(a[:, 1], b),
            torch.einsum("i,j->ij", b, b),
        ),
        f("t", 7),
        f(7),
    ),
    case("outer kinds", lambda a, b: (torch.outer(a, b), torch.outer(b, a)), i64("t"), f(7)),
    case("linear", Fn(lambda x, y, z, m: (m(x), m(y), m(z)), nn.Linear(7, 5)), f("b", "t", 7), f("b", 7), f(7)),
    case(
        "linear without bias",
        Fn(lambda x, y, z, m: (m(x), m(y), m(z)), nn.Linear(7, 5, bias=False)),
        f("b", "t", 3, 7),
        f("b", 7),
        f(7),
    ),
    case(
        "linear of inputs",
        lambda x, w, b: (F.linear(x, w, b), F.linear(x, w), F.linear(x[0], w, b), A.linear(x, w, b)),
        f("b", "t", 7),
        f(5, 7),
        f(5),
    ),
    case("linear of a vector", lambda x, v: (F.linear(x, v), F.linear(x[0], v)), f("b", "t", 7), f(7)),
    case(
        "linear scaled weight",
        Fn(lambda x, w, b: F.linear(x, w * 0.5, b * 2), nn.Parameter(torch.ones(5, 7)), nn.Parameter(torch.ones(5))),
        f("b", 7),
    ),
    case("linear fp16", Fn(lambda x, m: m(x), nn.Linear(63, 5)), f("b", "t", 63), precision="fp16"),
    case(
        "einsum",
        lambda q, k: (
            torch.einsum("bhid,bhjd->bhij", q, k),
            torch.einsum("bhid, bhjd -> b h i j", q, k) * 2,
            torch.einsum("...id,...jd->...ij", q, k) + 1,
            torch.einsum("bhid->bdhi", q),
            torch.einsum("bhid->bi", q),
            torch.einsum("bhid,d->bhi", q, k[0, 0, 0]),
            torch.einsum("bhii->bhi", q[..., :2, :2]),
            torch.einsum("bhid,bhjd", q, k),
            torch.einsum("ab,cd->abcd", q[0, 0], k[0, 0]),
        ),
        f("b", 2, "n", 7),
        f("b", 2, 5, 7),
    ),
    case(
        "einsum of three",
        lambda a, b, c: (torch.einsum("bi,ij,bj->b", a, b, c), torch.einsum("bi,ij,bj->bij", a, b, c)),
        f("t", 7),
        f(7, 3),
        f("t", 3),
    ),
    case("einsum ints", lambda a, b: torch.einsum("bi,ij->bj", a, b), i64("b", 7), i64(7, 3)),
)


def conv(kind, *arguments, **options):
    return seeded(getattr(nn, kind)(*arguments, **options))


CONVOLUTIONS = (
    case(
        "conv1d",
        Fn(
            lambda x, *m: tuple(c(x) for c in m),
            conv("Conv1d", 6, 4, 3),
            conv("Conv1d", 6, 4, 3, stride=2, padding=1, bias=False),
            conv("Conv1d", 6, 6, 5, padding=4, dilation=2, groups=3),
            conv("Conv1d", 6, 4, 4, padding="same"),
            conv("Conv1d", 6, 4, 3, padding="same", dilation=2),
            conv("Conv1d", 6, 4, 3, padding="valid"),
            conv("Conv1d", 6, 4, 3, padding=1, padding_mode="circular"),
            conv("Conv1d", 6, 4, 3, padding=2, padding_mode="reflect"),
        ),
        f("b", 6, "n"),
    ),
    case(
        "conv2d",
        Fn(
            lambda x, *m: tuple(c(x) for c in m),
            conv("Conv2d", 6, 4, 3),
            conv("Conv2d", 6, 4, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
            conv("Conv2d", 6, 6, 3, padding=2, dilation=2, groups=3),
            conv("Conv2d", 6, 12, 3, padding=1, groups=6),
            conv("Conv2d", 6, 4, 1),
            conv("Conv2d", 6, 4, (4, 3), padding="same"),
            conv("Conv2d", 6, 4, (2, 4), padding="same", dilation=(1, 3)),
            conv("Conv2d", 6, 4, 3, padding="valid"),
            conv("Conv2d", 6, 4, 3, padding=1, padding_mode="replicate"),
        ),
        f("b", 6, "n", 9),
    ),
    case(
        "conv3d",
        Fn(
            lambda x, *m: tuple(c(x) for c in m),
            conv("Conv3d", 4, 2, 3),
            conv("Conv3d", 4, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), bias=False),
            conv("Conv3d", 4, 4, 2, groups=2, dilation=(1, 2, 1)),
            conv("Conv3d", 4, 2, (2, 3, 2), padding="same"),
        ),
        f("b", 4, "n", 7, 5),
    ),
    case(
        "conv one image",
        Fn(
            lambda x, y, c2, c1, t2: (c2(x), c1(y), t2(x)),
            conv("Conv2d", 3, 4, 3),
            conv("Conv1d", 3, 4, 3),
            conv("ConvTranspose2d", 3, 4, 3),
        ),
        f(3, "n", 7),
        f(3, "n"),
    ),
    case(
        "conv of inputs",
        lambda x, w: (F.conv2d(x, w, padding=1), F.conv2d(x, w * 2, stride=(1, 2)), F.conv1d(x[:, :, 0], w[:, :, 0])),
        f("b", 3, "n", 7),
        f(2, 3, 3, 3),
    ),
    case(
        "conv transpose",
        Fn(
            lambda x, *m: tuple(c(x) for c in m),
            conv("ConvTranspose2d", 6, 4, 3),
            conv("ConvTranspose2d", 6, 4, 4, stride=2, padding=1),
            conv("ConvTranspose2d", 6, 4, 3, stride=2, padding=1, output_padding=1),
            conv("ConvTranspose2d", 6, 6, (3, 2), stride=(2, 1), groups=3, bias=False),
            conv("ConvTranspose2d", 6, 4, 3, dilation=2),
        ),
        f("b", 6, "n", 7),
    ),
    case(
        "conv transpose 1d",
        Fn(
            lambda x, *m: tuple(c(x) for c in m),
            conv("ConvTranspose1d", 6, 4, 3),
            conv("ConvTranspose1d", 6, 4, 4, stride=2, padding=1),
            conv("ConvTranspose1d", 6, 6, 5, stride=3, padding=1, output_padding=2, groups=2, dilation=2),
        ),
        f("b", 6, "n"),
    ),
    case(
        "conv transpose 3d",
        Fn(lambda x, c: c(x), conv("ConvTranspose3d", 4, 2, (1, 2, 3), stride=2, padding=(0, 1, 0))),
        f("b", 4, "n", 3, 2),
    ),
    case(
        "conv fp16",
        Fn(
            lambda x, *m: tuple(c(x) for c in m),
            conv("Conv2d", 6, 4, 3, padding=1),
            conv("ConvTranspose2d", 6, 4, 2, stride=2),
        ),
        f("b", 6, "n", 7),
        precision="fp16",
    ),
    # pool, adaptive_pool
    case(
        "avg pool",
        lambda x: (
            F.avg_pool2d(x, 2),
            F.avg_pool2d(x, 3, 2, 1),
            F.avg_pool2d(x, (3, 2), stride=(2, 1), padding=1, count_include_pad=False),
            F.avg_pool2d(x, (1, 3), (1, 2)),
        ),
        f("b", 3, "n", 9),
    ),
    case(
        "avg pool ceil",
        lambda x: (
            F.avg_pool2d(x, 2, ceil_mode=True),
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            F.avg_pool2d(x, 3, 2, 0, ceil_mode=True),
            F.avg_pool2d(x, 2, 3, 1, ceil_mode=True),
        ),
        f("b", 3, 8, 9),
    ),
    case(
        "max pool",
        lambda x: (
            F.max_pool2d(x, 2),
            F.max_pool2d(x, 3, 2, 1),
            F.max_pool2d(x, (3, 2), stride=(2, 1), padding=1),
            F.max_pool2d(x, 2, dilation=2),
        ),
        f("b", 3, "n", 9),
    ),
    case(
        "max pool ceil",
        lambda x: (
            F.max_pool2d(x, 2, ceil_mode=True),
            F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            F.max_pool2d(x, 2, 3, 1, ceil_mode=True),
        ),
        f("b", 3, 8, 9),
    ),
    case(
        "pool 1d and 3d",
        lambda x, y: (F.avg_pool1d(x, 3, 2, 1), F.max_pool1d(x, 3, 2, 1), F.avg_pool3d(y, 2), F.max_pool3d(y, 3, 2, 1)),
        f("b", 3, 9),
        f("b", 2, 5, 6, 4),
    ),
    case("pool one image", lambda x: (F.avg_pool2d(x, 2), F.max_pool2d(x, 2)), f(3, "n", 9)),
    case(
        "adaptive pool",
        lambda x: (
            F.adaptive_avg_pool2d(x, 1),
            F.adaptive_avg_pool2d(x, (1, 1)),
            F.adaptive_avg_pool1d(x[:, :, 0], 1),
            F.adaptive_avg_pool3d(x[:, None], 1),
        ),
        f("b", 3, "n", 9),
    ),
    case(
        "adaptive pool evenly",
        lambda x: (
            F.adaptive_avg_pool2d(x, (4, 3)),
            F.adaptive_avg_pool2d(x, (8, 9)),
            F.interpolate(x, (2, 3), mode="area"),
        ),
        f("b", 3, 8, 9),
    ),
    # pixel_shuffle, resize, upsample
    case("pixel shuffle", lambda x: (F.pixel_shuffle(x, 2), F.pixel_shuffle(x, 1)), f("b", 8, "n", 5)),
    case(
        "resize nearest to a neighbour",
        lambda x: (F.interpolate(x, (16, 16)), F.interpolate(x, (9, 28))),
        f("b", 3, 14, 14),
    ),
    case(
        "resize nearest",
        lambda x: (
            F.interpolate(x, scale_factor=2),
            F.interpolate(x, scale_factor=(3, 1)),
            F.interpolate(x, (5, 63)),
            F.interpolate(x, (x.shape[2] * 2, x.shape[3] + 1)),
            F.interpolate(x, (1, 1)),
            F.interpolate(x, scale_factor=0.5),
            F.interpolate(x, scale_factor=1.5),
            F.interpolate(x, scale_factor=0.7),
            F.interpolate(x, scale_factor=0.7, recompute_scale_factor=True),
            F.interpolate(x, (77, 13)),
        ),
        f("b", 3, "n", 9),
        opsets=(18, 23),
    ),
    case(
        "resize bilinear",
        lambda x: (
            F.interpolate(x, scale_factor=2, mode="bilinear"),
            F.interpolate(x, (5, 63), mode="bilinear"),
            F.interpolate(x, (5, 13), mode="bilinear", align_corners=True),
            F.interpolate(x, (1, 1), mode="bilinear"),
            F.interpolate(x, (1, 4), mode="bilinear", align_corners=True),
            F.interpolate(x, scale_factor=1.5, mode="bilinear"),
            F.interpolate(x, scale_factor=0.7, mode="bilinear"),
            F.interpolate(x, (x.shape[2] * 2, x.shape[3] * 2), mode="bilinear", align_corners=True),
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
            F.interpolate(x, scale_factor=1.5, mode="bilinear", align_corners=True),
        ),
        f("b", 3, "n", 9),
        opsets=(18, 23),
    ),
    case(
        "resize bicubic",
        lambda x: (
            F.interpolate(x, scale_factor=2, mode="bicubic"),
            F.interpolate(x, (5, 63), mode="bicubic"),
            F.interpolate(x, (5, 13), mode="bicubic", align_corners=True),
            F.interpolate(x, (1, 1), mode="bicubic"),
            F.interpolate(x, scale_factor=1.5, mode="bicubic"),
            F.interpolate(x, scale_factor=0.7, mode="bicubic"),
            F.interpolate(x, (x.shape[2] * 2, x.shape[3] * 2), mode="bicubic", align_corners=True),
        ),
        f("b", 3, "n", 9),
        opsets=(18, 23),
    ),
    case(
        "upsample aten",
        lambda x: (
            A.upsample_nearest2d(x, [5, 13]),
            A.upsample_bilinear2d(x, [5, 13], False),
            A.upsample_bilinear2d(x, [5, 13], True),
            A.upsample_bicubic2d(x, [5, 13], False),
            A.upsample_bicubic2d(x, [5, 13], True),
            A.upsample_nearest2d.vec(x, [5, 13], None),
            A.upsample_bilinear2d.vec(x, [5, 13], True, None),
            A.upsample_bicubic2d.vec(x, None, False, [1.5, 2.0]),
            A.upsample_nearest2d(x, [14, 18], 2.0, 2.0),
            A.upsample_nearest2d.vec(x, None, [1.5, 2.0]),
        ),
        f("b", 3, 7, 9),
    ),
    case(
        "resize 1d and 3d",
        lambda x, y: (
            F.interpolate(x, scale_factor=2),
            F.interpolate(y, scale_factor=2),
            F.interpolate(x, 13, mode="linear"),
            F.interpolate(y, (3, 4, 5), mode="trilinear"),
            A.upsample_nearest1d(x, [13]),
            A.upsample_linear1d(x, [13], True),
            A.upsample_nearest3d(y, [5, 2, 7]),
            A.upsample_trilinear3d(y, [5, 2, 7], False),
            F.interpolate(x, 13),
        ),
        f("b", 3, "n"),
        f("b", 2, "n", 3, 5),
    ),
    case(
        "resize by fractions",
        lambda x: tuple(
            F.interpolate(x, scale_factor=s, mode=mode)
            for s in (1.3, 0.6, (1.05, 1.7))
            for mode in ("nearest", "bilinear")
        ),
        f(1, 2, 10, 9),
    ),
    case(
        "resize fp16",
        lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, (5, 13), mode="bilinear")),
        f("b", 3, "n", 9),
        precision="fp16",
    ),
)

NORMALIZATION = (
    case(
        "group norm",
        Fn(
            lambda x, y, a, b, c: (
                a(x),
                b(x),
                c(x),
                F.group_norm(x, 2, c.weight),
                F.group_norm(x, 3, eps=0.1),
                a(y),
                A.group_norm(x, 2, c.weight, c.bias, 1e-3),
            ),
            seeded(nn.GroupNorm(3, 6)),
            nn.GroupNorm(6, 6, affine=False),
            seeded(nn.GroupNorm(1, 6, eps=1e-2)),
        ),
        f("b", 6, "n", 5),
        f("b", 6, "n"),
        opsets=NORMS,
    ),
    case(
        "group norm of vectors",
        Fn(lambda x, y, m: (m(x), m(y)), seeded(nn.GroupNorm(3, 12))),
        f("b", 12),
        f("b", 12, 2, 3, "n"),
        opsets=NORMS,
    ),
    case(
        "group norm fp16",
        Fn(lambda x, m: m(x), seeded(nn.GroupNorm(3, 6))),
        f("b", 6, "n", 5),
        opsets=NORMS,
        precision="fp16",
    ),
    case(
        "layer norm",
        Fn(
            lambda x, a, b, c, d: (
                a(x),
                b(x),
                c(x),
                d(x),
                F.layer_norm(x, (7,), None, a.bias),
                F.layer_norm(x, x.shape[1:]),
                A.layer_norm(x, [7], a.weight, a.bias, 1e-3),
            ),
            seeded(nn.LayerNorm(7)),
            nn.LayerNorm(7, elementwise_affine=False),
            seeded(nn.LayerNorm((3, 7), eps=0.1)),
            seeded(nn.LayerNorm(7, bias=False)),
        ),
        f("b", "t", 3, 7),
        opsets=(18, 23),
    ),
    case(
        "layer norm fp16",
        Fn(lambda x, a: a(x), seeded(nn.LayerNorm(63))),
        f("b", "t", 63),
        precision="fp16",
        opsets=(18, 23),
    ),
    case(
        "rms norm",
        Fn(
            lambda x, a, b, c: (
                a(x),
                b(x),
                c(x),
                F.rms_norm(x, (7,)),
                F.rms_norm(x, (7,), eps=0.5),
                F.rms_norm(x * 1e-3, (7,)),
                F.rms_norm(x, x.shape[1:]),
            ),
            seeded(nn.RMSNorm(7)),
            seeded(nn.RMSNorm((3, 7), eps=0.1)),
            nn.RMSNorm(7, elementwise_affine=False, eps=1e-6),
        ),
        f("b", "t", 3, 7),
        opsets=(18, 21, 23),
    ),
    case(
        "rms norm fp16",
        Fn(
            lambda x, a: (a(x), F.rms_norm(x, (63,), eps=1e-6), F.rms_norm(x * 0.01, (63,))),
            seeded(nn.RMSNorm(63, eps=1e-5)),
        ),
        f("b", "t", 63),
        precision="fp16",
        opsets=(18, 23),
    ),
    case(
        "batch norm",
        Fn(
            lambda x, y, a, b, c: (a(x), c(x), b(y)),
            seeded(nn.BatchNorm2d(6)),
            seeded(nn.BatchNorm1d(6, eps=0.1)),
            seeded(nn.BatchNorm2d(6, affine=False)),
        ),
        f("b", 6, "n", 5),
        f("b", 6),
    ),
    case(
        "instance norm",
        Fn(lambda x, a, b: (a(x), b(x)), nn.InstanceNorm2d(6), seeded(nn.InstanceNorm2d(6, affine=True))),
        f("b", 6, "n", 5),
        sizes=("traced", "untraced"),
    ),
)


def sdpa(q, k, v, mask=None, *, causal=False, scale=None, gqa=False):
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)


def open_rows(mask):
    """No row of the mask is closed entirely."""
    return mask | (torch.arange(mask.shape[-1]) == 0)


Q, K = f("b", 4, "t", 8), f("b", 4, 7, 8)
ATTENTIONS = (
    case(
        "attention",
        lambda q, k, v: (
            sdpa(q, k, v),
            sdpa(q, k, v, scale=0.3),
            sdpa(q, k, v[..., :5]),
            sdpa(q, q, q),
            sdpa(q, q, q, scale=1.0),
        ),
        Q,
        K,
        K,
        opsets=NORMS,
    ),
    case(
        "attention causal",
        lambda q, k: (sdpa(q, q, q, causal=True), sdpa(q, k, k, causal=True), sdpa(k, q, q, causal=True)),
        Q,
        K,
        opsets=ATTENTION,
    ),
    case(
        "attention bool mask",
        lambda q, k, m: (
            sdpa(q, k, k, open_rows(m)),
            sdpa(q, k, k, open_rows(m)[:, :, -1:]),
            sdpa(q, k, k, open_rows(m)[:, :, -1:].expand(-1, 1, q.shape[2], -1)),
            sdpa(q, k, k, open_rows(m)[0, 0]),
            sdpa(q, k, k, open_rows(m)[0]),
        ),
        Q,
        K,
        flag("b", 1, "t", 7),
        opsets=ATTENTION,
    ),
    case(
        "attention float mask",
        lambda q, k, m: (
            sdpa(q, k, k, m),
            sdpa(q, k, k, m[:, :, -1:]),
            sdpa(q, k, k, m[0]),
            sdpa(q, k, k, m[0, 0]),
            sdpa(q, k, k, m.expand(-1, 4, -1, -1)),
            sdpa(q, k, k, m[..., :1]),
        ),
        Q,
        K,
        f("b", 1, "t", 7),
        opsets=ATTENTION,
    ),
    case(
        "attention key mask",
        lambda q, m: (
            sdpa(q, q, q, open_rows(m)[:, None, None, :]),
            sdpa(q, q, q, torch.where(open_rows(m), 0.0, -1e4)[:, None, None, :]),
            sdpa(q, q, q, torch.where(open_rows(m), 0.0, float("-inf"))[:, None, None, :]),
        ),
        Q,
        flag("b", "t"),
        opsets=ATTENTION,
    ),
    case("attention closed rows", lambda q, k, m: sdpa(q, k, k, m), Q, K, flag("b", 1, "t", 1), opsets=ATTENTION),
    case(
        "attention grouped",
        lambda q, k, m: (
            sdpa(q, k, k, gqa=True),
            sdpa(q, k[:, :1], k[:, :1], gqa=True),
            sdpa(q, k, k, open_rows(m), gqa=True),
        ),
        Q,
        f("b", 2, 7, 8),
        flag("b", 1, "t", 7),
        opsets=ATTENTION,
    ),
    case(
        "attention past",
        lambda q, k: (
            sdpa(q, torch.cat([k, q], 2), torch.cat([k, q], 2)),
            sdpa(
                q,
                torch.cat([k, q], 2),
                torch.cat([k, q], 2),
                torch.ones(q.shape[2], k.shape[2] + q.shape[2], dtype=torch.bool).tril(k.shape[2]),
            ),
        ),
        Q,
        f("b", 4, "p", 8),
        opsets=ATTENTION,
    ),
    case(
        "attention of empty past",
        lambda q, k: sdpa(q, torch.cat([k, q[:, :2]], 2), torch.cat([k, q[:, :2]], 2), gqa=True),
        Q,
        f("b", 2, "p", 8),
        opsets=ATTENTION,
    ),
    case(
        "attention three",
        lambda q, k, m: (
            sdpa(q, k, k),
            sdpa(q, k, k, m),
            sdpa(q, k, k, causal=True),
            A.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None], scale=0.2),
        ),
        f("b", "t", 8),
        f("b", 7, 8),
        f("t", 7),
        opsets=ATTENTION,
    ),
    case("attention five", lambda q, k: sdpa(q, k, k), f("b", 2, 3, "t", 8), f("b", 2, 3, 7, 8), opsets=ATTENTION),
    case(
        "attention fp16",
        lambda q, k, m: (
            sdpa(q, k, k),
            sdpa(q, k, k, open_rows(m)),
            sdpa(q, q, q, causal=True),
            sdpa(q, k, k, torch.where(m, 0.0, -1e4).to(q.dtype)),
        ),
        Q,
        K,
        flag("b", 1, "t", 7),
        precision="fp16",
        opsets=ATTENTION,
    ),
    case(
        "attention packed",
        Fn(
            lambda x, a, b, c, d: d(
                sdpa(*(m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (a, b, c))).transpose(1, 2).flatten(2)
            ),
            *(nn.Linear(8, 8) for _ in range(4)),
        ),
        f("b", "t", 8),
        opsets=ATTENTION,
    ),
    case(
        "attention module",
        Fn(lambda x, m: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(8, 2, batch_first=True)),
        f("b", "t", 8),
        opsets=(23,),
    ),
)


def written_view(x):
    y = x + 1
    y[:, 0] = 5
    y[..., 1:3] *= 2
    y.view(-1)[0] = 9
    return y


def written_parts(x):
    y = x * 2
    left, right = y.chunk(2, -1)
    left.add_(1)
    right.mul_(3)
    return y, left + right


def written_twice(x):
    y = x + 1
    z = y.add_(1)
    w = z.mul_(2)
    return y, z, w


def written_after_a_view(x):
    y = x + 1
    z = y.add_(1)
    flat = z.reshape(-1)
    y.mul_(2)
    return flat, y


def written_masked(x):
    y = x.clone()
    y.masked_fill_(x > 0, 3)
    y[x < -1] = -7
    return y


def written_buffer(x):
    y = torch.zeros(x.shape[0], 9, 7)
    y[:, 1:8] = x[:, :1].expand(-1, 7, -1)
    y[:, 8] += 2
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2].sin()
    out[..., 1::2] = x[..., 1::2].cos()
    fresh = x.new_empty(x.shape[0], 7)
    fresh[:, ::3] = x[:, 0, ::3]
    fresh[:, 1::3] = 1.5
    fresh[:, 2::3] = x.sum()
    fresh[-1] = 4
    fresh[:, -1] = 8
    return y, out, fresh


def written_input(x):
    x.mul_(2)
    x[:, 0] = 1
    return x + 1


class Stateful(nn.Module):
    """Counts its calls in a buffer, as nobody's exported model should have to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.zeros(7), persistent=False)

    def forward(self, x):
        self.count.add_(0)
        self.table[0] = 3
        return x + self.count + self.table


IN_PLACE = (
    case("write into a view", written_view, f("b", "t", 7)),
    case("write into parts", written_parts, f("b", "t", 6)),
    case("write twice", written_twice, f("b", 7)),
    case("write after a view", written_after_a_view, f("b", 7)),
    case("write where", written_masked, f("b", 7)),
    case("write into new ones", written_buffer, f("b", "t", 7)),
    case("write into an input", written_input, f("b", 7)),
    case("write into a buffer", Stateful(), f("b", 7)),
    case(
        "in place others",
        lambda x: (
            (x + 1).clamp_(0, 1),
            (x + 1).sigmoid_(),
            (x + 1).fill_(2),
            A.fill.Tensor(x, x.sum()),
            A.fill.Scalar(x, 3),
            torch.empty(x.shape[0], 3).fill_(1.5),
            (x * 1).copy_(x[:1]),
            (x + 1).zero_(),
            (x + 1).exp_(),
            (x + 1).neg_().unsqueeze_(0),
        ),
        f("b", 7),
    ),
)


# --- the tests -------------------------------------------------------------------------------------------------------

CASES = (
    *ARITHMETIC,
    *COMPARISON,
    *UNARY,
    *KINDS,
    *REDUCTIONS,
    *SHAPES,
    *PADS,
    *CREATION,
    *PRODUCTS,
    *CONVOLUTIONS,
    *NORMALIZATION,
    *ATTENTIONS,
    *IN_PLACE,
)


def rows() -> Iterator[object]:
    for c in CASES:
        for opset in c.opsets:
            yield pytest.param(c, opset, id=f"{c.name}-{opset}" if len(c.opsets) > 1 else c.name)


@pytest.mark.parametrize(("c", "opset"), rows())
def test_an_export_gives_what_eager_gives(c, opset, tmp_path):
    model, component, _ = exported(c, opset)
    path = written(model, tmp_path)
    module = loaded_module(component, c.precision)
    with OnnxRuntimeRunner(path, threads=1) as runner, torch.no_grad():
        for name in c.sizes:
            feeds = feeds_of(c, component.shape_sets()[name], c.precision)
            want = dict(zip(component.outputs, module(*(t.clone() for t in feeds.values())), strict=True))
            got = runner.infer(feeds)
            for output in component.outputs:
                compare(c, got[output], want[output], f"{output} at the {name} sizes")


def test_every_emitter_is_exercised():
    used = frozenset().union(*(exported(c, opset)[2] for c in CASES for opset in c.opsets))
    assert set(emitters.EMITTERS) - used == set()


def test_every_emitter_is_of_an_operator_that_torch_has():
    for name in emitters.EMITTERS:
        namespace, operator, overload = name.split(".")
        assert hasattr(getattr(getattr(torch.ops, namespace), operator), overload), name


@pytest.mark.parametrize(
    ("name", "opset", "there", "absent"),
    [
        ("attention", 23, {"Attention"}, {"Softmax"}),
        ("attention", 21, {"Softmax", "MatMul"}, {"Attention"}),
        ("group norm", 21, {"GroupNormalization"}, {"InstanceNormalization"}),
        ("group norm", 20, {"InstanceNormalization"}, {"GroupNormalization"}),
        ("rms norm", 23, {"RMSNormalization"}, {"Sqrt"}),
        ("rms norm", 21, {"Sqrt", "ReduceMean"}, {"RMSNormalization"}),
        ("activation", 20, {"Gelu"}, {"Erf", "Tanh"}),
        ("activation", 18, {"Erf", "Tanh"}, {"Gelu"}),
        ("layer norm", 18, {"LayerNormalization"}, {"ReduceMean"}),
        ("conv2d", 18, {"Conv", "Pad"}, set()),
        ("expand", 23, {"Expand"}, {"Tile", "Where"}),
        ("slice", 23, {"Slice", "Gather"}, {"Where", "If"}),
    ],
)
def test_what_an_opset_has_is_used(name, opset, there, absent):
    model, _, _ = exported(next(c for c in CASES if c.name == name), opset)
    kinds = {node.op_type for node in model.graph}
    assert there <= kinds and not kinds & absent


@pytest.mark.parametrize(
    ("fn", "inputs", "words"),
    [
        (lambda x: x.topk(2)[0], [f("b", 7)], "aten.topk.default"),
        (lambda x: x.sort(-1)[0], [f("b", 7)], "aten.sort.default"),
        (lambda x: x.nonzero(), [f("b", 7)], "aten.nonzero.default"),
        (lambda x, m: x[m], [f("b", 7), flag("b")], "index with a boolean mask"),
        (lambda x: x + torch.rand_like(x), [f("b", 7)], "aten.rand_like.default"),
        (lambda x: F.dropout(x, 0.5, True), [f("b", 7)], "dropout in training"),
        (
            lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
            [Q],
            "scaled_dot_product_attention with dropout",
        ),
        (lambda x: torch.linalg.vector_norm(x, 3), [f("b", 7)], "linalg_vector_norm of order 3"),
        (
            lambda x: F.adaptive_avg_pool2d(x, 3),
            [f("b", 3, 7, 7)],
            r"adaptive average pooling from \[7, 7\] to \[3, 3\]",
        ),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), [f("b", 3, 8, 8)], "average pooling with divisor_override"),
        (
            lambda x: F.interpolate(x, (3, 3), mode="bilinear", antialias=True),
            [f("b", 3, 7, 7)],
            "_upsample_bilinear2d_aa",
        ),
        (
            lambda x: F.interpolate(x, scale_factor=1.1, mode="bicubic"),
            [f(1, 1, 5, 5)],
            "a scale that leaves the size as it is",
        ),
        (lambda x: torch.fft.rfft(x).abs(), [f("b", 7)], "aten._fft_r2c.default"),
        (lambda x: torch.polar(x, x).abs(), [f("b", 7)], "aten.polar.default"),
        (lambda x: torch.view_as_complex(x).abs(), [f("b", 7, 2)], "aten.view_as_complex.default"),
        (
            lambda x, i: A.index_put(x, [i], x[:1]),
            [f("b", 7), ids(1, "t")],
            "aten.index_put.default other than of one number under a mask",
        ),
        (lambda q: sdpa(q, q[:, :1], q[:, :1]), [f("b", 2, 2, "t", 8)], "5 dimensions with leading ones that differ"),
        (lambda x: x * int(x.sum()), [f("b", 7)], "could not be traced"),
    ],
)
def test_what_has_no_form_is_refused_by_its_name(fn, inputs, words):
    with pytest.raises(GateError, match=words):
        exported(case("refused", fn, *inputs), 23)


@pytest.mark.parametrize(
    ("name", "words"), [("pad circular", "circular .from opset 19 on"), ("max pool ceil", "from opset 22 on")]
)
def test_what_an_old_opset_lacks_is_refused(name, words):
    with pytest.raises(GateError, match=words):
        exported(next(c for c in CASES if c.name == name), 18)


def test_outputs_that_are_not_named_are_refused():
    component = Component.from_module(nn.LSTM(7, 3, batch_first=True), [TensorSpec("x", (2, 5, 7))], ["y", "state"])
    with pytest.raises(GateError, match=r"3 tensors\n  expected: y, state"):
        graph_from_component(component, "fp32", 23, Clock(lambda s: None))


def test_a_failing_emitter_is_our_bug_and_says_where(monkeypatch):
    def broken(*_):
        raise TypeError("two operands")

    monkeypatch.setattr(emitters, "EMITTERS", {**emitters.EMITTERS, "leaf.linear.default": broken})
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(7, 5)))
    component = Component.from_module(model, [TensorSpec("x", (2, 7))], ["y"])
    with pytest.raises(InternalError, match=r"emitter of leaf.linear.default failed in 1.0: two operands"):
        graph_from_component(component, "fp32", 23, Clock(lambda s: None))


@pytest.mark.parametrize("size", [7, 41, 49])
def test_nearest_steps_are_a_quotient(size, tmp_path) -> None:
    """1/41 in fp32 times 41 is below one: a dynamic size of 41 would take each pixel's neighbour."""

    def both(x, y):
        return F.interpolate(x, (41, 41)), F.interpolate(x, y.shape[2:])

    c = case("nearest to 41 and to the double", both, f("b", 1, "n", "n"), f("b", 1, "t", "t"))
    model, component, _ = exported(c, 23)
    feeds = feeds_of(c, {"b": 1, "n": size, "t": 2 * size})
    with OnnxRuntimeRunner(written(model, tmp_path)) as runner:
        got = runner.infer(feeds)
    wanted = loaded_module(component, "fp32")(*feeds.values())
    for name, want in zip(component.outputs, wanted, strict=True):
        assert torch.equal(got[name], want), name
