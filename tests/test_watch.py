"""Watching running pipelines: what is attributed to whom, that nothing is left behind, and what it costs."""

from __future__ import annotations

import gc
import time
from functools import cache
from typing import Any

import pytest
import torch

import optimize
from optimize.compile.sources import demo_folder
from optimize.errors import InputError
from optimize.profiles.seen import OUTSIDE, CallSize, Part, Seen
from optimize.quantize.pipelines import load_pipeline


@cache
def demo() -> Any:
    return load_pipeline(demo_folder())


def run(steps: int = 3, guidance: float = 3.0, prompts: int = 1, **words: Any) -> torch.Tensor:
    found: torch.Tensor = demo()(
        ["a handwritten seven"] * prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=32,
        width=32,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **words,
    ).images
    return found


def state_of(pipe: Any) -> list[dict[str, Any]]:
    """What every module looks up in itself first, and the pipeline's class."""
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    return [{"class": type(pipe)}, *(dict(vars(m)) for m in modules)]


def part(seen: Seen, name: str) -> Part:
    return next(p for p in seen.parts if p.component == name)


class Slow(torch.nn.Module):
    """Sleeps so many seconds, then computes."""

    def __init__(self, seconds: float, inner: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.seconds, self.inner = seconds, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x if self.inner is None else self.inner(x)


# --- calls and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "guidance", "batch", "texts"), [(1, 3.0, 2, 2), (7, 3.0, 2, 2), (7, 1.0, 1, 1)])
def test_calls_are_those_of_the_steps(steps: int, guidance: float, batch: int, texts: int) -> None:
    """Guidance doubles the U-Net's batch and encodes the empty prompt too. The images are not touched."""
    plain = run(steps, guidance)
    with optimize.watch(demo()) as seen:
        assert torch.equal(run(steps, guidance), plain)
    assert {p.component: p.calls for p in seen.parts} == {"text_encoder": texts, "unet": steps, "vae_decoder": 1}
    shapes = f"sample {batch}x4x8x8, timestep scalar, encoder_hidden_states {batch}x16x64"
    assert part(seen, "unet").sizes == (CallSize(batch, shapes, steps),)
    assert part(seen, "vae_decoder").sizes == (CallSize(1, "z 1x4x8x8", 1),)
    assert seen.never_called == [] and len(seen.runs_ms) == 1


def test_several_runs_in_one_block() -> None:
    """Of different sizes, with time between them that is no pipeline's, and the VAE called from two places."""
    with optimize.watch(demo()) as seen:
        run(2, prompts=3)
        time.sleep(0.3)
        run(5, 1.0)
        with torch.no_grad():
            demo().vae.encode(torch.zeros(7, 1, 32, 32))
    assert len(seen.runs_ms) == 2 and seen.runs_ms[0] != seen.runs_ms[1]
    assert [(s.batch, s.calls) for s in part(seen, "unet").sizes] == [(6, 2), (1, 5)]
    assert [s.batch for s in part(seen, "vae_encoder").sizes] == [7]
    assert seen.wall_ms == pytest.approx(sum(seen.runs_ms) + part(seen, "vae_encoder").total_ms)


def test_networks_that_nobody_called_are_named() -> None:
    with optimize.watch(demo()) as seen:
        demo().encode_prompt("a", torch.device("cpu"), 1, False)
    assert seen.never_called == ["vae", "unet"] and seen.runs_ms == []
    assert "never called: vae, unet" in str(seen)


# --- time -------------------------------------------------------------------------------------------------------------


def test_parts_and_what_is_outside_make_the_wall_time() -> None:
    """By a clock of our own around the same call."""
    run()
    with optimize.watch(demo()) as seen:
        begin = time.perf_counter()
        run(20)
        wall = (time.perf_counter() - begin) * 1e3
    assert seen.wall_ms == pytest.approx(wall, rel=0.02)
    assert sum(p.own_ms for p in seen.parts) + seen.outside_ms == pytest.approx(wall, rel=0.02)
    assert 0 < seen.outside_ms < wall / 2 and part(seen, "unet").share > 0.5
    unet = part(seen, "unet")
    assert unet.total_ms == unet.own_ms and unet.mean_ms * 19 + unet.first_ms == pytest.approx(unet.total_ms)
    assert unet.median_ms <= unet.p90_ms and unet.cpu_ms > 0


@pytest.mark.parametrize("where", ["unet", "vae_decoder", OUTSIDE])
def test_a_sleep_is_attributed_to_where_it_is(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 ms in all, in the calls of one network, of its method, or of the scheduler."""
    owner, name = {
        "unet": (demo().unet, "forward"),
        "vae_decoder": (demo().vae, "decode"),
        OUTSIDE: (demo().scheduler, "step"),
    }[where]
    inner, each = getattr(owner, name), 0.6 if where == "vae_decoder" else 0.1

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(each)
        return inner(*args, **kwargs)

    run()
    rows = []
    for sleeps in (False, True):
        if sleeps:
            monkeypatch.setitem(vars(owner), name, slow)
        with optimize.watch(demo()) as seen:
            run(6)
        rows.append({row["component"]: row for row in seen.rows()})
    for component, row in rows[1].items():
        more = row["own_ms"] - rows[0][component]["own_ms"]
        slept = 600.0 if component == where else 0.0
        assert abs(more - slept) <= 290, component  # the rest is other processes' doing
    if where == "unet":  # sleeping is no work
        assert rows[1]["unet"]["median_ms"] > 100 > rows[1]["unet"]["cpu_ms"] / 6


def test_the_first_call_stands_apart() -> None:
    slow = Slow(0.1)
    with optimize.watch({"net": slow}) as seen:
        slow(torch.zeros(1))
        slow.seconds = 0.001
        for _ in range(9):
            slow(torch.zeros(7, 63))
    net = part(seen, "net")
    assert net.first_ms > 100 and 50 > net.p90_ms >= net.median_ms >= 1
    assert net.total_ms > 100 and seen.wall_ms >= net.total_ms
    assert [(s.batch, s.calls) for s in net.sizes] == [(1, 1), (7, 9)]


def test_nested_networks_are_not_counted_twice() -> None:
    inner = Slow(0.02)
    outer = Slow(0.03, inner)
    with optimize.watch({"outer": outer, "inner": inner, "again": inner}) as seen:
        for _ in range(3):
            outer(torch.zeros(1, 77))
        inner(torch.zeros(1, 77))  # from elsewhere
    one, two = part(seen, "outer"), part(seen, "inner")
    assert (one.calls, two.calls) == (3, 4)
    assert one.total_ms >= 150 and 90 <= one.own_ms < 150 and two.own_ms == two.total_ms >= 80
    assert one.own_ms + two.own_ms + seen.outside_ms == pytest.approx(seen.wall_ms)
    assert seen.never_called == ["again"]  # it goes by its first name


def test_old_garbage_is_not_collected_in_the_middle() -> None:
    """A collection over all that was there before falls into no component; afterwards all is as it was."""
    assert gc.get_freeze_count() == 0
    old = [[i] for i in range(1000)]
    with optimize.watch(demo()):
        assert not any(tracked is old for tracked in gc.get_objects())
        with optimize.watch({"unet": demo().unet}):
            pass
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_it_costs_less_than_a_hundredth() -> None:
    """The U-Net's call is watched as one of nothing is: what that takes, beside the network's own time."""
    nothing = torch.nn.Identity()
    words = {"x": torch.zeros(2, 4, 8, 8), "timestep": torch.zeros(()), "text": torch.zeros(2, 16, 64)}

    class Takes(torch.nn.Module):
        def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
            return nothing(kwargs["x"])

    def seconds(net: torch.nn.Module) -> float:
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            net(**words)
            times.append(time.perf_counter() - begin)
        return sorted(times)[150]

    net = Takes()
    plain = seconds(net)
    with optimize.watch({"net": net}):
        watched = seconds(net)
    run()
    with optimize.watch(demo()) as seen:
        run(5)
    assert (watched - plain) * 1e3 < 0.01 * part(seen, "unet").median_ms


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind_and_keeps_what_was_seen(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = demo().unet.forward, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error("enough")
        return forward(*args, **kwargs)

    monkeypatch.setitem(vars(demo().unet), "forward", fails)
    before = state_of(demo())
    with pytest.raises(error, match="enough"), optimize.watch(demo()) as seen:
        run(7)
    assert state_of(demo()) == before
    assert (part(seen, "unet").calls, part(seen, "unet").raised) == (3, 1)
    assert part(seen, "text_encoder").raised == 0 and len(seen.runs_ms) == 1
    assert sum(p.own_ms for p in seen.parts) + seen.outside_ms == pytest.approx(seen.wall_ms)
    assert "vae_decoder" not in {p.component for p in seen.parts}
    run(2)
    assert part(seen, "unet").calls == 3  # it looks no more
    with seen:  # and again, from the start
        run(2)
    assert part(seen, "unet").calls == 2 and part(seen, "unet").raised == 0
    assert state_of(demo()) == before


def test_figures_can_be_read_in_the_block() -> None:
    with optimize.watch(demo()) as seen:
        assert seen.parts == [] and seen.rows()[0]["component"] == OUTSIDE
        run(2)
        assert part(seen, "unet").calls == 2
        run(2)
    assert part(seen, "unet").calls == 4


def test_the_pipeline_is_still_of_its_class_in_the_block() -> None:
    import inspect

    cls = type(demo())
    signature = inspect.signature(demo().__call__)
    with optimize.watch(demo()):
        assert isinstance(demo(), cls) and type(demo()).__name__ == cls.__name__
        assert inspect.signature(demo().__call__) == signature
        assert demo().components.keys() >= {"unet", "vae"}
    assert type(demo()) is cls


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_networks_are_seen_and_not_compiled_again(in_place: bool) -> None:
    from torch._dynamo.utils import counters

    class Net(torch.nn.Module):  # torch does not compile its own Sequential in place
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(7, 63)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.linear(input).relu()

    torch._dynamo.reset()
    counters.clear()
    net = Net()
    if in_place:
        net.compile(backend="eager", fullgraph=True)
    compiled = net if in_place else torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(1, 7)
    plain, before = compiled(x), counters["stats"]["unique_graphs"]
    slot = vars(compiled).get("_compiled_call_impl")
    with optimize.watch({"net": compiled}) as seen:
        for _ in range(3):
            assert torch.equal(compiled(x), plain)
    assert part(seen, "net").calls == 3
    assert part(seen, "net").sizes == (CallSize(1, "input 1x7", 3),)
    assert counters["stats"]["unique_graphs"] == before > 0
    assert vars(compiled).get("_compiled_call_impl") is slot


# --- how it is told ---------------------------------------------------------------------------------------------------


def test_rows_and_table() -> None:
    with optimize.watch(demo()) as seen:
        run(4)
    rows = seen.rows()
    assert [r["component"] for r in rows] == ["text_encoder", "unet", "vae_decoder", OUTSIDE]
    assert len({tuple(r) for r in rows}) == 1 and sum(r["share"] for r in rows) == pytest.approx(1)
    frame = seen.as_pandas()
    assert frame.loc[frame.component == "unet", "calls"].item() == 4
    text = str(seen)
    assert "StableDiffusionPipeline: 1 run, " in text and all(r["component"] in text for r in rows)
    assert "4 of sample 2x4x8x8" in " ".join(text.split())


@pytest.mark.parametrize("wrong", [torch.nn.Linear(1, 1), {}, {"a": 3}])
def test_what_cannot_be_watched_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"no diffusers pipeline|nothing to watch"):
        optimize.watch(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="skipped: needs a GPU")
def test_on_a_gpu_the_devices_time_counts() -> None:
    """Kernels outlast the calls that launch them; their time by events is that of a clock that waits for them."""
    net = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(20))).cuda()
    x = torch.randn(4096, 4096, device="cuda")
    with torch.inference_mode():
        net(x)
        torch.cuda.synchronize()
        with optimize.watch({"net": net}) as seen:
            begin = time.perf_counter()
            for _ in range(5):
                net(x)
            torch.cuda.synchronize()
            waited = (time.perf_counter() - begin) * 1e3
    net_part = part(seen, "net")
    assert net_part.total_ms == pytest.approx(waited, rel=0.1) and net_part.host_ms < net_part.total_ms
