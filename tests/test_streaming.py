"""Streamed eager runs: in lockstep they give what each gives alone, weights are read once, failures end them all."""

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from optimize import Axis, Component, TensorSpec
from optimize.compile import streaming
from optimize.compile.feeds import feeds_for
from optimize.compile.runners import EagerRunner
from optimize.compile.streaming import DivergedError, groups_of, run_together
from optimize.compile.weights import MemoryWeights


class Net(torch.nn.Module):
    """Two layers and a table beside them; the second layer is called twice; a branch on the number of tokens."""

    def __init__(self, branch: int = 0, limit: int = 0) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(77, 16))
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.branch, self.limit = branch, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.limit and x.shape[1] > self.limit:
            raise ValueError(f"{x.shape[1]} tokens are too many")
        y = self.first(x + self.table[: x.shape[1]])
        if x.shape[1] > self.branch:
            y = self.second(torch.relu(y))
        return self.second(y) + self.table[: x.shape[1]]


def component_of(module: torch.nn.Module) -> Component:
    axes = [Axis("batch", 1, 1, 8), Axis("tokens", 1, 7, 77)]
    return Component.from_module(module, [TensorSpec("x", ("batch", "tokens", 16))], ["y"], axes)


def feeds(component: Component, *tokens: int) -> list[dict[str, torch.Tensor]]:
    return [feeds_for(component.inputs, {"batch": 1 + i, "tokens": t}, "fp32", i) for i, t in enumerate(tokens)]


def test_together_as_alone_and_each_weight_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    component = component_of(Net())
    reads: Counter[str] = Counter()
    tensor = MemoryWeights.tensor

    def counted(self: MemoryWeights, name: str) -> torch.Tensor:
        reads[name] += 1
        return tensor(self, name)

    monkeypatch.setattr(MemoryWeights, "tensor", counted)
    given = feeds(component, 1, 7, 63, 77)
    with EagerRunner(component, streamed=True) as streamed:
        together = streamed.infer_all(given)
    # the root is entered twice, by the adapter's forward and by its own
    assert reads == {"table": 2, "first.weight": 1, "first.bias": 1, "second.weight": 2, "second.bias": 2}
    with EagerRunner(component) as whole:
        for got, feed in zip(together, given, strict=True):
            torch.testing.assert_close(got["y"], whole.infer(feed)["y"], rtol=1e-6, atol=1e-6)


def test_runs_that_part_ways_go_one_after_another() -> None:
    """At 1 token another path is taken than at 7: noticed, not waited for."""
    component = component_of(Net(branch=3))
    given = feeds(component, 1, 7)
    calls = [lambda m, f=f: m(*f.values()) for f in given]
    with torch.inference_mode(), pytest.raises(DivergedError, match="second and the end"):
        run_together(component, "fp32", calls)
    with EagerRunner(component, streamed=True) as streamed, EagerRunner(component) as whole:
        for got, feed in zip(streamed.infer_all(given), given, strict=True):
            torch.testing.assert_close(got["y"], whole.infer(feed)["y"], rtol=1e-6, atol=1e-6)


def test_an_error_in_one_run_is_raised_and_leaves_no_thread() -> None:
    component = component_of(Net(limit=63))
    before = threading.active_count()
    with (
        EagerRunner(component, streamed=True) as streamed,
        pytest.raises(ValueError, match="77 tokens are too many"),
    ):
        streamed.infer_all(feeds(component, 1, 77, 7))
    assert threading.active_count() == before


def test_weights_that_cannot_be_read_end_every_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    component = component_of(Net())

    def broken(self: MemoryWeights, name: str) -> torch.Tensor:
        raise OSError(f"{name}: input/output error")

    monkeypatch.setattr(MemoryWeights, "tensor", broken)
    with EagerRunner(component, streamed=True) as streamed, pytest.raises(OSError, match="table: input/output error"):
        streamed.infer_all(feeds(component, 1, 7, 63))


def test_groups_keep_order_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "TOGETHER", 10)
    given = [{"x": torch.zeros(n)} for n in (4, 6, 1, 20, 3)]
    assert [[f["x"].numel() for f in g] for g in groups_of(given)] == [[4, 6], [1], [20], [3]]


def test_attention_that_reads_its_childs_weights() -> None:
    """torch's MultiheadAttention takes `out_proj.weight` itself and never calls `out_proj`."""
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    component = component_of(layer)
    feeds = feeds_for(component.inputs, {"batch": 2, "tokens": 7}, "fp32")
    with EagerRunner(component, streamed=True) as streamed, EagerRunner(component) as whole:
        torch.testing.assert_close(streamed.infer(feeds)["y"], whole.infer(feeds)["y"])
