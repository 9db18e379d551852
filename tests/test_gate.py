"""The gate holds: a sabotaged export is refused, the guilty node is named, and the printed command shows the miss."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optimize
from optimize import Axis, Component, TensorSpec
from optimize.compile import emitters
from optimize.compile.bundle import Bundle
from optimize.compile.onnx_model import Clock, graph_from_component
from optimize.compile.records import OutputError
from optimize.errors import GateError
from optimize.profiles.parity import distance, within


def sabotage_norm(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """The `which`-th group norm that is written gets another epsilon."""
    honest = emitters.EMITTERS["leaf.group_norm.default"]
    seen = iter(range(10_000))

    def wrong(g, out, x, groups, weight, bias, eps):  # type: ignore[no-untyped-def]
        return honest(g, out, x, groups, weight, bias, 0.5 if next(seen) == which else eps)

    monkeypatch.setitem(emitters.EMITTERS, "leaf.group_norm.default", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_wrong_node_is_refused_and_named(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage_norm(monkeypatch, 3)
    with pytest.raises(GateError) as caught:
        optimize.export("demo", tmp_path / "b", components=["vae_decoder"], precisions=[precision])
    text = str(caught.value)
    assert text.startswith(f"parity missed: vae_decoder {precision}, output sample at the ")
    assert "first node that departs: decoder.mid_block.resnets.1.norm1/GroupNormalization" in text
    assert caught.value.exit_code == 1
    claimed = tmp_path / "b" / "manifest.json"
    assert not claimed.exists() or not Bundle.read(tmp_path / "b").manifest.artifacts
    command = shlex.split(text.partition("reproduce: ")[2].splitlines()[0])
    assert command[:2] == ["polygraphy", "run"]
    shown = subprocess.run(
        [str(Path(sys.executable).with_name("polygraphy")), *command[1:]], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 1 and "FAILED" in shown.stdout + shown.stderr


def test_distance_takes_no_bad_values_for_good() -> None:
    a = torch.tensor([1.0, 2.0, 3.0])
    assert distance([a], [a]) == (0.0, 0.0)
    assert distance([torch.tensor([1.0, math.nan, 3.0])], [a]) == (math.inf, math.inf)
    assert distance([a[:2]], [a]) == (math.inf, math.inf)
    masked = torch.tensor([-math.inf, 2.0])
    assert distance([masked], [masked]) == (0.0, 0.0)
    assert distance([torch.tensor([5.0, 2.0])], [masked])[0] == math.inf
    assert distance([torch.empty(0)], [torch.empty(0)]) == (0.0, 0.0)
    relative, worst = distance([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])])
    assert relative == pytest.approx(0.1) and worst == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("relative", "eager", "precision", "passes"),
    [
        (9e-5, None, "fp32", True),
        (2e-4, None, "fp32", False),
        (1.04e-2, 1e-2, "bf16", True),
        (1.06e-2, 1e-2, "bf16", False),
        (1e-3, None, "fp16", False),
        (math.inf, math.inf, "fp16", False),
    ],
)
def test_rule_by_precision(relative: float, eager: float | None, precision: str, passes: bool) -> None:
    error = OutputError(name="y", relative=relative, worst=relative, finite=True, eager=eager)
    assert within(error, precision) is passes


class Autocast(torch.nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled, self.linear = enabled, torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.linear(x)


def autocast_component(enabled: bool) -> Component:
    axes = [Axis("batch", 1, 2, 8)]
    return Component.from_module(Autocast(enabled), [TensorSpec("x", ("batch", 16))], ["y"], axes)


def test_autocast_inside_a_forward_is_refused() -> None:
    """Its types are not in the torch graph: what would be exported is something else than what eager computes."""
    with pytest.raises(GateError, match=r"torch\.autocast\('cpu', torch\.bfloat16\) inside a forward"):
        graph_from_component(autocast_component(True), "fp32", 23, Clock(lambda s: None))
    model, _, _ = graph_from_component(autocast_component(False), "fp32", 23, Clock(lambda s: None))
    origins = [node.metadata_props["optimize.torch_node"] for node in model.graph]
    assert origins and all(origin.startswith("submod_") for origin in origins)
