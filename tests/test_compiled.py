"""Torch backends as runners: our kernels in eager and in torch.compile, sizes beyond torch's own limit, weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from optimize.compile import backends, compiled, runners
from optimize.compile.backends import Subject, runner_of
from optimize.compile.compiled import CompiledRunner, Style
from optimize.compile.feeds import feeds_for
from optimize.compile.runners import EagerRunner, loaded_module
from optimize.compile.sources import source_from_text
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.kernels.fusing import recipe_of
from optimize.profiles.parity import distance

SIZES = {"batch": 3, "tokens": 7}


@pytest.fixture(scope="module")
def clip() -> Component:
    (component,) = source_from_text("arch:clip-l@tiny").components
    return component


def mixer() -> Component:
    net = torch.nn.Sequential(torch.nn.Linear(63, 7), torch.nn.SiLU())
    return Component.from_module(net, [TensorSpec("x", ("batch", 63))], ["y"], [Axis("batch", 1, 7, 199)])


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile whose code is torch's own operators: what dynamo does is the same, and no C++ is compiled."""
    monkeypatch.setattr(compiled, "STYLES", dict.fromkeys(compiled.STYLES, Style({"backend": "eager"})))
    yield
    torch._dynamo.reset()


def test_more_sets_of_sizes_than_torch_would_compile_are_compiled(traced_only: None) -> None:
    """Beyond 8 torch runs eager, and only logs it: a row would say torch.compile and measure eager."""
    component = mixer()
    with CompiledRunner(component, "fp32", "torch.compile") as runner:
        for batch in range(2, 13):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            runner.infer(feeds_for(component.inputs, {"batch": batch}, "fp32"))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_sizes_beyond_our_limit_raise(traced_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_CODES", 2)
    component = mixer()
    with CompiledRunner(component, "fp32", "torch.compile") as runner:
        for batch in (2, 3):
            runner.infer(feeds_for(component.inputs, {"batch": batch}, "fp32"))
        with pytest.raises(Exception, match="fail_on_recompile_limit_hit"):
            runner.infer(feeds_for(component.inputs, {"batch": 7}, "fp32"))
    assert torch._dynamo.config.recompile_limit == 8  # as it was


@pytest.mark.parametrize("name", ["fused", "torch.compile-fused"])
def test_fused_backends_run_our_operations_and_agree_with_eager(name: str, clip: Component, traced_only: None) -> None:
    feeds = feeds_for(clip.inputs, SIZES, "fp32")
    with EagerRunner(clip, "fp32") as eager:
        exact = eager.infer(feeds)
        assert not any(recipe_of(m) for m in eager._module.modules())  # the reference is never fused
    with runner_of(name, Subject(clip, "fp32")) as runner:
        ours = [m for m in runner._module.modules() if recipe_of(m) is not None]
        with torch.profiler.profile() as seen:
            got = runner.bind(feeds)()
    names = {event.key for event in seen.key_averages()}
    assert ours
    assert any(n.startswith("optimize::") for n in names), names
    assert distance([got[n] for n in exact], list(exact.values()))[0] < 1e-5


def test_fused_backends_are_asked_for_by_name() -> None:
    named = [b for b in backends.BACKENDS.values() if b.name.endswith("fused")]
    assert [b.name for b in named] == ["fused", "torch.compile-fused", "torch.compile-max-autotune-fused"]
    assert not any(b.default for b in named)
    assert [b.compiles for b in named] == [False, True, True]


def test_weights_drawn_by_many_cores_are_the_same(clip: Component, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of a profile has to hold the same network, whatever its number of cores."""
    found = []
    for cores in ({0}, {0, 1, 2, 3, 4}):
        monkeypatch.setattr(runners.os, "sched_getaffinity", lambda _, cores=cores: cores)
        found.append(loaded_module(clip, "bf16").state_dict())
    one, many = found
    bound = clip.weights.bind(clip.build())
    assert list(one) == list(many)
    for name, tensor in one.items():
        assert torch.equal(tensor, many[name])
        assert torch.equal(tensor, bound.tensor(name).to(tensor.dtype))


def test_the_reference_is_computed_without_tf32() -> None:
    """cuDNN takes TF32 by default; what is left afterwards is what was there."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    assert before[0]
    with runners.exact_arithmetic("cuda"):
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
        # and half products are the GPU's own: `HalfProducts` would give fp16 the error of fp32
        x = torch.full((1, 4097), 1.0, dtype=torch.float16)
        assert not math.isnan(float(torch.nn.functional.linear(x, x)))
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before
