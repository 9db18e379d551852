"""Modules that call the kernels room's operators become nodes of `ai.optimize`, and those give what eager gives."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from optimize import Axis, Component, GateError, TensorSpec
from optimize import kernels as K
from optimize.compile import external
from optimize.compile.feeds import feeds_for
from optimize.compile.onnx_model import Clock, graph_from_component
from optimize.compile.runners import EagerRunner, OnnxRuntimeRunner
from optimize.kernels.functions import DOMAIN

AXES = {"batch": Axis("batch", 1, 2, 8), "tokens": Axis("tokens", 1, 7, 63), "past": Axis("past", 0, 3, 16)}
X = ("batch", "tokens", 24)
HEADS = ("batch", 4, "tokens", 12)
ALL = ("batch", 2, "past+tokens", 12)


def angles(x: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.arange(x.shape[2]).float()[:, None] * torch.logspace(0, -2, half)
    return turns.cos(), turns.sin()


class Calls(torch.nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.w, self.b, self.h = (torch.nn.Parameter(torch.rand(n) + 0.5) for n in (24, 24, 12))

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.fn(self, *tensors)


def mask_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (torch.arange(k.shape[2]) % 3 != 1)[None, None, None]


CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[Any, ...], ...], dict[str, int]]] = {
    "attention": (lambda m, q, k: K.attention(q, k, k, scale=0.4), (HEADS, ALL), {"Attention": 1}),
    "causal": (lambda m, q: K.attention(q, q, q, causal=True), (HEADS,), {"Attention": 1}),
    "causal with a past": (lambda m, q, k: K.attention(q, k, k, causal=True), (HEADS, ALL), {"AttentionBias": 1}),
    "one causal query": (lambda m, q, k: K.attention(q[:, :, -1:], k, k, causal=True), (HEADS, ALL), {"Attention": 1}),
    "boolean mask": (lambda m, q, k: K.attention(q, k, k, bias=mask_of(q, k)), (HEADS, ALL), {"AttentionBias": 1}),
    "bias of fewer dimensions": (
        lambda m, q, k: K.attention(q, k, k, bias=mask_of(q, k)[0, 0, 0] * 0.5),
        (HEADS, ALL),
        {"AttentionBias": 1},
    ),
    "causal mask with a past": (
        lambda m, q, k: K.attention(q, k, k, bias=mask_of(q, k) | (torch.arange(k.shape[2]) == 0), causal=True),
        (HEADS, ALL),
        {"AttentionBias": 1},
    ),
    "causal bias with a past": (
        lambda m, q, k: K.attention(q, k, k, bias=mask_of(q, k) * 2.0, causal=True),
        (HEADS, ALL),
        {"AttentionBias": 1},
    ),
    "group norms": (
        lambda m, x: (
            K.group_norm(x.transpose(1, 2), 4, m.w, m.b),
            K.group_norm(x.transpose(1, 2), 3, eps=1e-3, activation="silu"),
        ),
        (X,),
        {"GroupNorm": 1, "GroupNormSiLU": 1},
    ),
    "norms": (
        lambda m, x: (K.layer_norm(x, m.w, m.b), K.layer_norm(x), K.rms_norm(x, m.w), K.rms_norm(x, eps=1e-2)),
        (X,),
        {"LayerNorm": 2, "RMSNorm": 2},
    ),
    "modulated": (
        lambda m, x, c: (
            K.layer_norm(x, m.w, scale=c, shift=c * 2),
            K.rms_norm(x, scale=x),
            K.layer_norm(x, shift=c[:, None]),
        ),
        (X, ("batch", 24)),
        {"LayerNormModulated": 2, "RMSNormModulated": 1},
    ),
    "added": (
        lambda m, x, c: (
            *K.layer_norm(x, m.w, residual=x * 2),
            *K.rms_norm(x, residual=x, gate=c),
            *K.layer_norm(x, residual=x, gate=c, scale=c, shift=x),
        ),
        (X, ("batch", 24)),
        {"AddLayerNorm": 1, "GatedAddRMSNorm": 1, "GatedAddLayerNormModulated": 1},
    ),
    "interleaved": (
        lambda m, q: K.qk_norm_rope(q, q[:, :2], m.h, m.h * 2, *angles(q, 6)),
        (HEADS,),
        {"QKNormRope": 1},
    ),
    "half-split": (
        lambda m, q: K.qk_norm_rope(q, q[:, :2], None, None, *(t[None] for t in angles(q, 6)), interleaved=False),
        (HEADS,),
        {"RotaryQK": 1},
    ),
    "only normed": (lambda m, q: K.qk_norm_rope(q, q[:, :2], m.h, m.h, eps=1e-3), (HEADS,), {"QKNorm": 1}),
    "gated": (
        lambda m, x: (K.geglu(*x.chunk(2, -1)), K.geglu(x, x * 2, approximate="tanh"), K.swiglu(x + 1, x)),
        (X,),
        {"GeGLU": 2, "SwiGLU": 1},
    ),
}


def component_of(name: str) -> Component:
    fn, shapes, _ = CASES[name]
    torch.manual_seed(0)
    module = Calls(fn).eval()
    specs = [TensorSpec(f"in{i}", shape) for i, shape in enumerate(shapes)]
    axes = [AXES[n] for n in dict.fromkeys(n for s in specs for n in s.axis_names())]
    probe = Component.from_module(module, specs, ["y"], axes)
    with torch.no_grad():
        result = module(*feeds_for(probe.inputs, probe.shape_sets()["traced"], "fp32", 0).values())
    outputs = [f"y{i}" for i in range(len(result))] if isinstance(result, tuple) else ["y"]
    return Component.from_module(module, specs, outputs, axes)


def written(model: ir.Model, folder: Path) -> Path:
    path, weights = folder / "model.onnx", folder / "model.safetensors"
    external.write_weights(model, weights, {}, lambda done, total: None)
    external.inline_small(model)
    external.point_at(model, weights.name, external.header_bytes(weights))
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


@pytest.mark.parametrize("native", [False, True], ids=["body", "library"])
@pytest.mark.parametrize("name", CASES)
def test_each_operation_is_one_node_that_gives_what_eager_gives(name: str, native: bool, tmp_path: Path) -> None:
    component = component_of(name)
    model, _, _ = graph_from_component(component, "fp32", 23, Clock(lambda s: None))
    found = Counter(n.op_type for n in model.graph if n.domain == DOMAIN)
    assert found == CASES[name][2]
    assert {f.name for f in model.functions.values()} == set(found)
    assert all(n.metadata_props["optimize.torch_node"] for n in model.graph if n.domain == DOMAIN)
    with OnnxRuntimeRunner(written(model, tmp_path), native=native) as runner, EagerRunner(component) as eager:
        for what, sizes in component.shape_sets().items():
            feeds = feeds_for(component.inputs, sizes, "fp32", 1)
            got, wanted = runner.infer(feeds), eager.infer(feeds)
            for output, want in wanted.items():
                torch.testing.assert_close(got[output], want, rtol=1e-5, atol=2e-6, msg=lambda m, w=what: f"{w}: {m}")


def test_below_opset_23_it_is_refused_by_name() -> None:
    with pytest.raises(GateError, match=r"ai\.optimize::LayerNorm below opset 23"):
        graph_from_component(component_of("norms"), "fp32", 22, Clock(lambda s: None))
