"""How far apart is measured, what passes, and that the first wrong node is named: in branches, before other outputs,
beside operators that torch decomposed, and in every precision."""

import math

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optimize
from optimize.compile import emitters
from optimize.compile.onnx_model import Clock, graph_from_component
from optimize.compile.records import OutputError, Parity, ShapeParity
from optimize.compile.runners import OnnxRuntimeRunner
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.errors import GateError, InputError
from optimize.gate import Plan, parity_of_onnx
from optimize.profiles.bisect import first_departure
from optimize.profiles.parity import ROUNDING, distance, marginal, references, within, worst_miss

INF, NAN = math.inf, math.nan
PRECISIONS = ("fp32", "fp16", "bf16")


def t(*numbers, **options):
    return torch.tensor(numbers, **options)


# --- distance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "exact", "expected"),
    [
        (t(3.0, 4.5), t(3.0, 4.0), (0.1, 0.125)),
        (t(0.0, 0.0), t(0.0, 0.0), (0.0, 0.0)),
        (t(-INF, 2.0), t(-INF, 2.0), (0.0, 0.0)),  # a mask that agrees
        (t(-INF, -INF), t(-INF, -INF), (0.0, 0.0)),
        (t(-INF, 3.0), t(-INF, 2.0), (0.5, 0.5)),  # and is not part of the size
        (t(-INF, 2.0), t(INF, 2.0), (INF, INF)),
        (t(1.0, 2.0), t(-INF, 2.0), (INF, INF)),
        (t(-INF, 2.0), t(1.0, 2.0), (INF, INF)),
        (t(NAN, 2.0), t(1.0, 2.0), (INF, INF)),
        (t(1.0, 2.0), t(NAN, 2.0), (INF, INF)),
        (t(NAN, 2.0), t(NAN, 2.0), (INF, INF)),  # nothing is proved by it
        (t(1.0, 2.0), t(1.0, 2.0, 3.0), (INF, INF)),
        (t(1.0, 2.0)[None], t(1.0, 2.0), (INF, INF)),  # no broadcasting
        (t(1.0, 2.0)[:, None], t(1.0, 2.0)[None], (INF, INF)),
        (torch.tensor(1.0), t(1.0), (INF, INF)),
        (torch.empty(0, 3), torch.empty(0, 3), (0.0, 0.0)),
        (torch.empty(0, 3), torch.empty(3, 0), (INF, INF)),
        (t(1, 2, 3), t(1, 2, 3), (0.0, 0.0)),
        (t(1, 2, 4), t(1, 2, 2), (1 / 3, 1 / 3)),  # ids have no size: the share that differs
        (t(50_001, 7), t(50_000, 7), (0.5, 0.5)),
        (t(True, False), t(True, True), (0.5, 0.5)),
        (t(-1e9, 3.0), t(-1e9, 2.0), (0.5, 0.5)),  # a mask's number is not the output's size
        (t(-1e9, -1e9), t(-1e9, -1e9), (0.0, 0.0)),
        (t(-1e9, 2.0), t(2.0, 2.0), (353553391.3, 500000001.0)),
        (t(1e5, 3e4), t(1e5, 2e4), (1e4 / (1e10 + 4e8) ** 0.5, 0.1)),  # large numbers of an output are its own
        (t(1.0, 2.0, dtype=torch.float16), t(1.0, 2.0), (0.0, 0.0)),
        (t(1.5, dtype=torch.bfloat16), t(1.0), (0.5, 0.5)),
        (t(1e200, dtype=torch.float64), t(1.0, dtype=torch.float64), (1e200, 1e200)),
    ],
)
def test_distance(got, exact, expected):
    assert distance([got], [exact]) == pytest.approx(expected, rel=1e-6)


def test_a_mask_of_another_precision_does_not_hide_errors_either():
    """Eager fp16 and the artifact have -65504 where fp32 has its own lowest number."""
    exact, low = t(torch.finfo(torch.float32).min, 2.0), t(-65504.0, 2.5)
    assert distance([low], [exact], [t(-65504.0, 2.0)]) == pytest.approx((0.25, 0.25))
    assert distance([low], [exact])[0] == pytest.approx(1.0)


def test_distance_over_a_reference_of_zeros_is_huge_but_finite():
    relative, worst = distance([t(1e-6)], [t(0.0)])
    assert 1e20 < relative < INF and 1e20 < worst < INF


def test_distance_takes_several_draws_as_one_tensor():
    assert distance([t(1.0), t(2.0)], [t(1.0), t(2.0)]) == (0.0, 0.0)
    assert distance([t(3.0), t(4.5)], [t(3.0), t(4.0)]) == distance([t(3.0, 4.5)], [t(3.0, 4.0)])
    assert distance([t(3.0), t(NAN)], [t(3.0), t(4.0)]) == (INF, INF)
    assert distance([t(3.0), t(4.0, 5.0)], [t(3.0), t(4.0)]) == (INF, INF)
    with pytest.raises(ValueError, match="zip"):
        distance([t(3.0)], [t(3.0), t(4.0)])


# --- the rule --------------------------------------------------------------------------------------------------------


def error(relative, eager=None, worst=None, finite=True):
    return OutputError(
        name="y", relative=relative, worst=worst if worst is not None else relative, finite=finite, eager=eager
    )


@pytest.mark.parametrize(
    ("precision", "relative", "worst", "eager", "passes"),
    [
        ("fp32", 1e-4, 1e-3, None, True),
        ("fp32", 1.01e-4, 1e-4, None, False),
        ("fp32", 1e-5, 1.01e-3, None, False),  # one number that is off, among many
        ("fp32", INF, INF, None, False),
        ("fp16", 1.05e-3, 1.0, 1e-3, True),
        ("fp16", 1.051e-3, 0.0, 1e-3, False),
        ("fp16", ROUNDING["fp16"], 0.0, 0.0, True),  # eager is exact by luck
        ("fp16", 1.01 * ROUNDING["fp16"], 0.0, 0.0, False),
        ("bf16", ROUNDING["bf16"], 0.0, 1e-6, True),
        ("bf16", 1.01 * ROUNDING["bf16"], 0.0, 1e-6, False),
        ("fp16", 0.0, 0.0, None, False),  # without eager's own error nothing is proved
        ("fp16", 0.0, 0.0, INF, False),
        ("bf16", INF, INF, INF, False),
    ],
)
def test_what_passes(precision, relative, worst, eager, passes):
    assert within(error(relative, eager, worst), precision) is passes


def parity(*errors, name="traced"):
    shapes = [ShapeParity(name=f"{name}{i}", sizes={}, outputs=[e], passed=False) for i, e in enumerate(errors)]
    return Parity(backend="b", reference="r", how="whole", rule="", shapes=shapes, passed=False)


def test_the_worst_miss_is_the_one_furthest_over_its_own_limit():
    shape, output = worst_miss(parity(error(5e-2, 4e-2), error(3e-2, 1e-2), error(1e-2, 1e-2)), "fp16")
    assert (shape.name, output.relative) == ("traced1", 3e-2)
    shape, _ = worst_miss(parity(error(2e-4), error(INF), error(9.0)), "fp32")
    assert shape.name == "traced1"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([error(1.2e-3, 1e-3), error(1e-3, 1e-3)], True),
        ([error(1.2e-3, 1e-3), error(1.4e-3, 1e-3)], False),
        ([error(1.2e-3, 1e-3), error(1e-3, 1e-3, finite=False)], False),
        ([error(1e-3)], False),
    ],
)
def test_a_miss_by_a_hair_is_marginal(errors, expected):
    assert marginal(parity(*errors)) is expected


# --- a component's references ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Blocks of a norm, a side input and a gate that torch decomposes; an early output, and one that stays right."""

    def __init__(self, blocks=4):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(blocks))
        self.sides = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.mixes = nn.ModuleList(nn.Conv1d(8, 16, 1) for _ in range(blocks))

    def forward(self, x, side):
        outputs = []
        for norm, mix, linear in zip(self.norms, self.mixes, self.sides, strict=True):
            x = x * 0.5 + F.glu(mix(norm(x)), 1) + linear(F.silu(side * 2) * 3)[:, :, None]
            outputs.append(x)
        return outputs[1] * 2, outputs[-1], F.silu(side).softmax(-1) + 1


@pytest.fixture
def component() -> Component:
    torch.manual_seed(0)
    specs = [TensorSpec("x", ("b", 8, "t")), TensorSpec("side", ("b", 8))]
    return Component.from_module(Net(), specs, ["early", "late", "other"], [Axis("b", 1, 2, 8), Axis("t", 2, 5, 64)])


def sabotage(monkeypatch, which, name="leaf.group_norm.default"):
    """The `which`-th norm that this emitter writes into a graph gets another epsilon."""
    honest = emitters.EMITTERS[name]

    def wrong(g, out, x, *rest):
        g.seen = getattr(g, "seen", -1) + 1
        rest = (*rest[:-1], 99.0) if g.seen == which else rest
        return honest(g, out, x, *rest)

    monkeypatch.setattr(emitters, "EMITTERS", {**emitters.EMITTERS, name: wrong})


def graph_at(folder, component, precision):
    model, _, _ = graph_from_component(component, precision, 23, Clock(lambda s: None))
    ir.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_honest_graph_passes_at_three_sizes(precision, component, tmp_path):
    path = graph_at(tmp_path, component, precision)
    result = parity_of_onnx(path, component, precision, Plan(streamed=False), lambda s: None)
    assert result.passed and [s.name for s in result.shapes] == ["traced", "untraced", "smallest"]
    assert len({tuple(s.sizes.values()) for s in result.shapes}) == 3
    assert {o.name for s in result.shapes for o in s.outputs} == {"early", "late", "other"}
    assert (result.shapes[0].outputs[0].eager is None) == (precision == "fp32")
    assert bool(result.notes) == (precision == "bf16")
    departed = first_departure(path, component, precision, component.shape_sets()["untraced"])
    assert departed.startswith("none: each value is torch's within its precision")


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_wrong_node_is_found(precision, which, component, tmp_path, monkeypatch):
    sabotage(monkeypatch, which)
    path = graph_at(tmp_path, component, precision)
    result = parity_of_onnx(path, component, precision, Plan(streamed=False), lambda s: None)
    assert not result.passed
    shape, output = worst_miss(result, precision)
    assert output.name in (("early", "late") if which < 2 else ("late",))
    departed = first_departure(path, component, precision, dict(shape.sizes))
    assert departed.startswith(f"norms.{which}/GroupNormalization (GroupNormalization), relative error 0.")


def test_an_output_that_others_follow_is_looked_into(component, tmp_path, monkeypatch):
    """Only the first output is wrong: the last node of the graph is right."""
    honest = emitters.EMITTERS["aten.mul.Tensor"]

    def wrong(g, out, a, b):
        return honest(g, out, a, 2.5 if b == 2 and len(out.shape) == 3 else b)

    monkeypatch.setattr(emitters, "EMITTERS", {**emitters.EMITTERS, "aten.mul.Tensor": wrong})
    path = graph_at(tmp_path, component, "fp32")
    with OnnxRuntimeRunner(path) as runner:
        known = references(component, "fp32", streamed=False, say=lambda s: None)[0]
        got = runner.infer(known.feeds)
    assert distance([got["early"]], [known.exact["early"]])[0] == pytest.approx(0.25, rel=1e-4)
    assert distance([got["late"]], [known.exact["late"]])[0] < 1e-6
    departed = first_departure(path, component, "fp32", dict(known.sizes))
    assert departed.endswith("(Mul), relative error 0.25 in early")


@pytest.mark.parametrize("streamed", [False, True])
def test_references_are_drawn_until_there_are_many_numbers(streamed, component):
    known = references(component, "fp16", streamed=streamed, say=lambda s: None, draws=3)
    assert [r.name for r in known] == ["traced"] * 3 + ["untraced"] * 3 + ["smallest"] * 3
    assert len({r.feeds["x"].sum().item() for r in known}) == 9
    assert all(r.feeds["x"].dtype == torch.float16 and r.exact["late"].dtype == torch.float32 for r in known)
    assert all(0 < distance([r.own["late"]], [r.exact["late"]])[0] < 0.01 for r in known)
    assert all(r.own is None for r in references(component, "fp32", streamed=streamed, say=lambda s: None))


# --- a user's own module, end to end ---------------------------------------------------------------------------------

FACTORY = """
import torch
from optimize import Component
from optimize.compile.spec import Axis, TensorSpec

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)

    def forward(self, x):
        return self.second(self.first(x) * 0.01)

def make():
    return Component.from_module(Net(), [TensorSpec("x", ("b", 8))], ["y"], [Axis("b", 1, 2, 8)], name="net")
"""


def test_a_miss_keeps_the_evidence_and_claims_nothing(tmp_path, monkeypatch):
    (tmp_path / "sabotaged_net.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    sabotage(monkeypatch, 1, "leaf.layer_norm.default")
    with pytest.raises(
        GateError, match=r"first node that departs: second/LayerNormalization \(LayerNormalization\)"
    ) as e:
        optimize.export("python:sabotaged_net:make", tmp_path / "b")
    kept = tmp_path / "b" / "failed" / "net.fp32"
    assert {p.name for p in kept.iterdir()} >= {"net.fp32.onnx", "inputs.json", "reference.json"}
    assert "polygraphy run" in str(e.value)
    with pytest.raises(InputError, match="is no bundle"):
        optimize.load(tmp_path / "b")
