"""The range probe: its figures are those of torch's own fp32 values, in one piece or in many, of our operators too."""

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import nn

import optimize
from optimize import gate
from optimize.compile import external, sources
from optimize.compile.onnx_model import Clock, graph_from_component
from optimize.compile.runners import loaded_module
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.quantize.probe import (
    INFINITE,
    LEAST_RMS,
    LIMIT,
    Probe,
    Range,
    drawn_feeds,
    parity_feeds,
    probe_graph,
    tensor_range,
)

WHOLE = 1 << 62


class Net(nn.Module):
    """Values of every kind: ordinary, near the limit, beyond fp16, tiny, infinite by a mask, and empty."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(63, 63), nn.Linear(63, 63)

    def forward(self, x, past, timestep):
        h = torch.relu(self.first(x))
        near = h * 2e4
        over = near * near
        tiny = torch.sigmoid(h) * 1e-7
        masked = h.masked_fill(h == 0, -torch.inf).exp()
        h = torch.nn.functional.layer_norm(over, (63,)) + tiny + masked + timestep[:, None, None].to(h.dtype)
        return self.last(torch.cat([torch.sin(past), h], 1))


@pytest.fixture(scope="module")
def component():
    specs = [
        TensorSpec("x", ("b", "t", 63)),
        TensorSpec("past", ("b", "p", 63)),
        TensorSpec("timestep", ("b",), "float32", "timestep"),
    ]
    axes = [Axis("b", 1, 1, 7), Axis("t", 1, 7, 77), Axis("p", 0, 3, 9)]
    return Component.from_module(Net(), specs, ["y"], axes)


def graph_of(component, folder, precision="fp16"):
    model, _, _ = graph_from_component(component, precision, 23, Clock(lambda _: None))
    external.write_weights(model, folder / "w.safetensors", {}, lambda *_: None)
    external.inline_small(model)
    external.point_at(model, "w.safetensors", external.header_bytes(folder / "w.safetensors"))
    ir.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


@pytest.fixture(scope="module")
def path(component, tmp_path_factory):
    return graph_of(component, tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def feeds(component):
    return [*parity_feeds(component), *drawn_feeds(component, 3)]


@pytest.fixture(scope="module")
def probe(path, feeds):
    return probe_graph(path, feeds, WHOLE, lambda _: None, how="drawn")


def test_the_figures_are_torchs(component, probe, feeds):
    net = loaded_module(component, "fp16").float()
    near = [torch.relu(net.first(f["x"].float())) * 2e4 for f in feeds]
    largest = max(float(n.abs().max()) for n in near)
    seen = probe.ranges["Mul"]
    assert largest > LIMIT and seen.largest == pytest.approx(largest, rel=1e-4)
    assert seen.rms == pytest.approx(max(float(n.square().mean().sqrt()) for n in near), rel=1e-4)
    assert seen.near == pytest.approx(max(float((n.abs() > LIMIT).float().mean()) for n in near), abs=1e-6)
    over = probe.ranges["Mul_1"]
    assert over.largest == pytest.approx(largest**2, rel=1e-4) and over.overflows and not seen.overflows


def test_the_first_value_beyond_fp16_is_named(probe):
    assert probe.first_overflow == "Mul_1"
    summary = probe.summary()
    assert summary["feeds"] == 6 and summary["near"] == 2 and summary["largest"]["value"] == "Mul_1"
    assert set(probe.table()["ranges"]) == set(probe.ranges)


def test_infinities_by_design_are_counted_and_are_no_magnitude(probe):
    (masked,) = [r for n, r in probe.ranges.items() if r.nonfinite]
    assert masked.nonfinite > 0 and masked.largest < 100


def test_numbers_too_small_for_fp16_are_lost(probe):
    """1e-7 is none of fp16's normal numbers: the product is made in fp32 and lost when it is narrowed."""
    assert [n for n, r in probe.ranges.items() if r.lost] == ["Cast_1"]
    assert 0 < probe.ranges["Cast_1"].rms < LEAST_RMS
    assert not Range(0.0, 0.0).lost, "zeros are exact"


@pytest.mark.parametrize("budget", [1, 8000])
def test_in_pieces_it_sees_the_same(budget, path, feeds, probe):
    pieces = probe_graph(path, feeds, budget, lambda _: None)
    assert list(pieces.ranges) == list(probe.ranges)
    for name, seen in pieces.ranges.items():
        assert seen.largest == pytest.approx(probe.ranges[name].largest, rel=1e-4), name
        assert (seen.near, seen.nonfinite) == pytest.approx((probe.ranges[name].near, probe.ranges[name].nonfinite))
    assert sorted(p.name for p in path.parent.iterdir()) == ["graph.onnx", "w.safetensors"]


def test_all_values_in_fp16_are_measured_and_no_others(path, probe):
    kinds = {str(v.name): v.dtype for node in ir.load(path).graph for v in node.outputs}
    assert {n for n, d in kinds.items() if d == ir.DataType.FLOAT16} == set(probe.ranges)


def test_drawn_feeds_go_from_noise_to_image(component):
    assert [float(f["timestep"][0]) for f in drawn_feeds(component, 4)] == [999, 666, 333, 0]
    assert float(drawn_feeds(component, 1)[0]["timestep"][0]) == 999
    assert len({float(f["x"].sum()) for f in drawn_feeds(component, 4)}) == 4


def test_operators_of_ours_are_seen_from_outside_and_their_scores(tmp_path):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(32, 96)
            self.qkv.weight.data *= 600

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    specs = [TensorSpec("x", ("b", "t", 32))]
    plain = Component.from_module(Attend(), specs, ["y"], [Axis("b", 1, 1, 7), Axis("t", 1, 7, 77)])
    found = {}
    for kernels in (False, True):
        (tmp_path / str(kernels)).mkdir()
        path = graph_of(replace(plain, kernels=kernels), tmp_path / str(kernels))
        probe = probe_graph(path, parity_feeds(plain), WHOLE, lambda _: None)
        found[kernels] = [r.largest for n, r in probe.ranges.items() if n.endswith("/scores")]
        assert ("ai.optimize" in ir.load(path).graph.opset_imports) == kernels
    assert found[True] == pytest.approx(found[False]) and len(found[True]) == 1 and found[True][0] > LIMIT


def test_a_tensors_range():
    seen = tensor_range(torch.tensor([[3.0, -4.0]]))
    assert seen.largest == 4 and seen.rms == pytest.approx(12.5**0.5)
    assert Probe({"a": Range(INFINITE, 1.0), "b": Range(1e9, 1.0)}, 1).first_overflow == "a"
    assert Probe({}, 0).summary()["largest"] == {"value": "", "magnitude": 0.0}


def test_a_model_that_does_not_fit_is_probed_in_segments_on_drawn_data(tmp_path, component, monkeypatch):
    """Eager streamed, graph in pieces of few weights, islands found all the same."""
    source = sources.Source("python:net", (component,))
    monkeypatch.setattr(sources, "source_from_text", lambda *_: source)
    monkeypatch.setattr(gate, "plan_for", lambda *_: gate.Plan(streamed=True, segment_bytes=8000))
    bundle = optimize.export("python:net", tmp_path / "b", precisions=["fp16"], probe_steps=2)
    artifact = bundle.manifest.artifacts["model/fp16"]
    assert artifact.parity is not None and artifact.parity.how.endswith("segments")
    assert artifact.spec["probe"]["how"] == "drawn: the model does not fit into memory"
    assert "Mul_1" in {k["node"] for k in artifact.spec["fp32"]}
