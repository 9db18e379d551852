"""The answer: the fastest that meets the wishes, ties by merit, combinations for a pipeline, and what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_records import a_profile, a_row

from optimize.compile.bundle import record_of
from optimize.compile.sources import source_from_text
from optimize.errors import InputError
from optimize.profiles.choosing import GUIDED, choose, cost_of, joint_misses, own_misses
from optimize.profiles.composing import pipeline_times
from optimize.profiles.ranking import MOST_MARGIN, Option, front_of, latency, quality_of
from optimize.profiles.schema import Choice, Memory, PipelinePart, PipelineTime, Row, RowQuality, Timing
from optimize.profiles.wishes import Wishes, wishes_from_words


def row(candidate: str, ms: float, cosine: float = 1.0, **changes: Any) -> Row:
    """`noise` is how far the rounds wander, `tail` p95 over the median, `mib` the peak."""
    noise, tail, mib = changes.pop("noise", 0.0), changes.pop("tail", 1.1), changes.pop("mib", 100)
    backend, _, precision = candidate.partition(" ")
    timing = Timing(
        median_ms=ms,
        p10_ms=ms,
        p90_ms=ms * tail,
        p95_ms=ms * tail,
        p99_ms=ms * tail,
        runs=63,
        rounds_ms=[ms * (1 + noise * step) for step in (-1, 1, -0.7, 0, 0.7, -0.3, 0.3)],
        spread=2 * noise,
        drift=0.0,
        attempts=1,
        stable=changes.get("state", "measured") == "measured",
        clock="monotonic",
    )
    quality = RowQuality(output="y", cosine=cosine, lowest=cosine, snr_db=30, psnr_db=30, samples=7, data="random")
    base: dict[str, Any] = {"timing": timing, "quality": quality, "memory": Memory(host=mib << 20)}
    return a_row(changes.pop("component", "unet"), backend, precision, ms, **{**base, **changes})


def answer(*rows: Row, shape: str | None = None, pipelines: Any = (), **words: Any) -> Choice:
    found = choose(a_profile(rows=rows, pipelines=tuple(pipelines)), wishes_from_words(**words), shape)
    assert found is not None
    return found


def picked(choice: Choice) -> list[str]:
    return [f"{p.backend} {p.precision}" for p in choice.picks]


EAGER, COMPILED = row("eager fp32", 100.0), row("torch.compile fp32", 77.0)
COARSE = row("onnxruntime int8", 31.0, cosine=0.9971)


# --- one component ----------------------------------------------------------------------------------------------------


def test_the_fastest_that_is_good_enough_and_why_not_a_faster_one() -> None:
    choice = answer(EAGER, COMPILED, COARSE, quality=["cosine>=0.999"])
    assert choice.met and picked(choice) == ["torch.compile fp32"] and not choice.missed
    (pick,) = choice.picks
    assert pick.runner_up == "eager fp32" and pick.latency_ms == 77.0
    assert "1.30x faster than the next, eager fp32" in pick.why
    assert "onnxruntime int8 left out: cosine 0.9971, not >=0.999 (2.48x faster)" in pick.why
    assert picked(answer(EAGER, COMPILED, COARSE)) == ["onnxruntime int8"], "without the wish it is the answer"


@pytest.mark.parametrize(
    ("other", "decided"),
    [
        ({"candidate": "onnxruntime fp32", "cosine": 1.0}, "the better quality"),
        ({"candidate": "onnxruntime bf16", "cosine": 0.99, "mib": 63}, "less memory"),
        ({"candidate": "eager bf16", "cosine": 0.99}, "the simpler backend"),
    ],
)
def test_ties_are_decided_by_quality_then_memory_then_simplicity(other: dict[str, Any], decided: str) -> None:
    """2 % apart where the rounds wander by 3 %; where they do not, the faster one is picked whatever its merits."""
    fast = {"candidate": "torch.compile bf16", "ms": 100.0, "cosine": 0.99}
    noisy = answer(row(**fast, noise=0.03), row(**other, ms=102.0, noise=0.03))
    assert picked(noisy) == [other["candidate"]]
    assert f"left out: a tie (1.02x faster), {decided} decided" in noisy.picks[0].why
    assert picked(answer(row(**fast), row(**other, ms=102.0))) == ["torch.compile bf16"]


def test_a_difference_of_less_than_a_hundredth_is_a_tie_however_quiet_the_rounds() -> None:
    assert picked(answer(row("torch.compile fp32", 100.0), row("eager fp32", 100.63))) == ["eager fp32"]


def test_a_great_noise_is_no_excuse_for_a_slow_one() -> None:
    choice = answer(row("torch.compile bf16", 100.0, 0.99, noise=0.63), row("eager fp32", 107.0, noise=0.63))
    assert picked(choice) == ["torch.compile bf16"]


def test_an_inconclusive_candidate_counts_as_its_slow_rounds() -> None:
    words = {"state": "inconclusive", "why": "its rounds do not agree"}
    sure = answer(EAGER, row("aoti fp32", 63.0, noise=0.2, **words))
    assert picked(sure) == ["aoti fp32"] and "INCONCLUSIVE" in sure.picks[0].why
    assert sure.picks[0].latency_ms == pytest.approx(63.0, rel=0.1)  # what is said is the median
    wobbly = row("aoti fp32", 63.0, noise=2.0, **words)
    choice = answer(EAGER, wobbly)
    assert picked(choice) == ["eager fp32"] and choice.front == {"unet": ["eager fp32"]}
    assert "aoti fp32 left out: inconclusive, its slow rounds are not faster" in choice.picks[0].why
    hit = [63.0, 65.0, 777.0, 63.7, 64.0, 63.3, 66.0]
    assert wobbly.timing is not None
    once = wobbly.model_copy(update={"timing": wobbly.timing.model_copy(update={"rounds_ms": hit})})
    assert picked(answer(EAGER, once)) == ["aoti fp32"], "one round that others' work slowed down decides nothing"
    alone = answer(wobbly)
    assert picked(alone) == ["aoti fp32"] and "INCONCLUSIVE" in alone.picks[0].why


def test_an_slo_is_for_the_percentile_that_it_names() -> None:
    """The candidate with the faster median has the longer tail."""
    ragged, even = row("onnxruntime fp32", 60.0, tail=2.0), row("torch.compile fp32", 77.0, tail=1.1)
    choice = answer(EAGER, ragged, even, slo=["p95<100ms"])
    assert picked(choice) == ["torch.compile fp32"] and "p95 120 ms, not p95<100ms" in choice.picks[0].why
    assert picked(answer(EAGER, ragged, even, slo=["p50<100ms"])) == ["onnxruntime fp32"]


def test_where_nobody_meets_the_wishes_the_nearest_is_said_and_how_far_it_is() -> None:
    choice = answer(EAGER, COMPILED, COARSE, slo=["median<20ms"], quality=["cosine>=0.99"])
    assert not choice.met and picked(choice) == ["onnxruntime int8"]
    assert choice.missed == ("unet: median 31 ms, not median<20ms",)
    coarse = answer(COARSE, row("onnxruntime int4", 21.0, cosine=0.9), quality=["cosine>=0.999"])
    assert picked(coarse) == ["onnxruntime int8"] and coarse.missed == ("unet: cosine 0.9971, not >=0.999",)


def test_a_component_of_which_nothing_runs_is_missed_and_not_forgotten() -> None:
    failed = a_row("vae_decoder", "eager", "fp32", state="failed", why="out of memory")
    choice = answer(EAGER, failed)
    assert picked(choice) == ["eager fp32"] and not choice.met
    assert choice.missed == ("vae_decoder: nothing was measured that could be deployed",)
    assert choose(a_profile(rows=(failed,)), Wishes()) is None


def test_other_sizes_have_another_answer() -> None:
    large = [row("eager fp32", 163.0, shape="large"), row("torch.compile fp32", 177.0, shape="large")]
    assert picked(answer(EAGER, COMPILED, *large)) == ["torch.compile fp32"]
    choice = answer(EAGER, COMPILED, *large, shape="large")
    assert [(p.shape, p.backend) for p in choice.picks] == [("large", "eager")]
    with pytest.raises(InputError, match=r"no shape huge[\s\S]*expected: default, large"):
        answer(EAGER, *large, shape="huge")


# --- a pipeline -------------------------------------------------------------------------------------------------------

CALLS = {"text_encoder": 2.0, "unet": 7.0, "vae_decoder": 1.0}


def drawn(calls: dict[str, float] = CALLS, shape: str = "default") -> PipelineTime:
    parts = [PipelinePart(component=c, candidate="eager fp32", calls=n, ms=1.0) for c, n in calls.items()]
    return PipelineTime(
        variant="eager fp32", shape=shape, steps=7, guidance=True, parts=parts, composed_ms=1.0, measured_ms=63.0
    )


def trio(candidate: str, text: float, unet: float, vae: float, **changes: Any) -> list[Row]:
    return [row(candidate, ms, component=c, **changes) for c, ms in zip(CALLS, (text, unet, vae), strict=True)]


def test_a_pipelines_latency_is_wished_for_the_image() -> None:
    """7 calls of 20 ms are 140 ms though no call is beyond 100 ms."""
    rows = [*trio("eager fp32", 7, 20, 63), *trio("torch.compile fp32", 6, 9, 50)]
    choice = answer(*rows, pipelines=[drawn()], slo=["median<130ms"])
    assert choice.met and picked(choice) == ["torch.compile fp32"] * 3
    assert choice.pipeline is not None and choice.pipeline.composed_ms == pytest.approx(2 * 6 + 7 * 9 + 50)
    assert choice.pipeline.measured_ms is None, "the picks were not run from end to end here"
    late = answer(*rows, pipelines=[drawn()], slo=["median<100ms"])
    assert late.missed == ("an image: median 125 ms, not median<100ms",)


def test_memory_is_wished_for_the_sum_and_given_where_it_costs_least() -> None:
    """One component has to go without its fast, fat candidate: the one that is called once."""
    rows = [*trio("eager fp32", 9, 20, 63, mib=100), *trio("torch.compile fp32", 6, 9, 50, mib=163)]
    choice = answer(*rows, pipelines=[drawn()], memory="430MiB")
    assert choice.met and picked(choice) == ["eager fp32", "torch.compile fp32", "torch.compile fp32"]
    assert "left out: the wishes on all together (1.50x faster)" in choice.picks[0].why
    nobody = answer(*rows, pipelines=[drawn()], memory="200MiB")
    assert not nobody.met and nobody.missed == ("memory 300 MiB, not <=200 MiB",)
    assert picked(nobody) == ["eager fp32"] * 3


def test_a_denoiser_is_ranked_at_the_batch_that_guidance_makes() -> None:
    """At the first sizes int8 is the fastest, at those of the calls it is not; who failed there is no candidate."""
    rows = [row("eager fp32", 100.0), row("onnxruntime int8", 60.0), row("aoti fp32", 31.0)]
    at = {"shape": "default" + GUIDED}
    rows += [row("eager fp32", 110.0, **at), row("onnxruntime int8", 120.0, **at)]
    rows += [a_row("unet", "aoti", "fp32", state="failed", why="out of memory", **at)]
    choice = answer(*rows, pipelines=[drawn({"unet": 7.0})])
    assert picked(choice) == ["eager fp32"]
    assert choice.picks[0].latency_ms == 110.0 and choice.picks[0].shape == "default"
    assert "at default+guided, as the pipeline calls it" in choice.picks[0].why
    assert picked(answer(*rows[:3])) == ["aoti fp32"], "without such rows it is called as it is"


def test_what_a_pipeline_does_not_call_is_picked_by_its_own_speed_and_counts_nothing() -> None:
    encoder = [row(c, ms, component="vae_encoder") for c, ms in (("eager fp32", 977.0), ("torch.compile fp32", 777.0))]
    choice = answer(*trio("eager fp32", 7, 7, 7), *encoder, pipelines=[drawn()], slo=["median<77ms"])
    assert choice.met and picked(choice)[-1] == "torch.compile fp32"
    assert choice.pipeline is not None and choice.pipeline.composed_ms == pytest.approx(70)


def test_the_picked_time_is_what_composing_says_of_the_same_picks() -> None:
    """The two count calls and sizes each in its own way."""
    records = {c.name: record_of(c) for c in source_from_text("demo").components}
    rows: list[Row] = []
    for (name, record), (candidate, ms) in itertools.product(
        records.items(), {"eager fp32": 77.0, "onnxruntime fp32": 63.0}.items()
    ):
        words = {"component": name, "role": record.role}
        rows.append(row(candidate, ms, **words, sizes={"batch": 1, "height": 32}))
        if record.role == "unet":
            rows.append(row(candidate, 1.7 * ms, **words, sizes={"batch": 2, "height": 32}, shape="default" + GUIDED))
    times, _ = pipeline_times(rows, records, 7, True)
    choice = answer(*rows, pipelines=times)
    again, _ = pipeline_times(rows, records, 7, True, picks=choice.picks)
    (composed,) = [t for t in again if t.variant == "picked"]
    assert choice.pipeline is not None and choice.pipeline.composed_ms == pytest.approx(composed.composed_ms)
    assert {p.component: p.calls for p in choice.pipeline.parts} == {p.component: p.calls for p in composed.parts}


# --- money ------------------------------------------------------------------------------------------------------------


def test_cost_by_hand() -> None:
    """1.8 s at 2.50 an hour; 200000 a day are 2.31 a second, which keep 4.17 machines busy: five are paid."""
    cost = cost_of(1800.0, wishes_from_words(price_per_hour=2.5, load="200000/day"))
    assert cost.per_1000 == pytest.approx(1.25)
    assert cost.machines == 5 and cost.per_month == pytest.approx(5 * 2.5 * 730)
    assert cost_of(1000.0, wishes_from_words(price_per_hour=1.0, load="7/s")).machines == 7, "no eighth for rounding"
    lone = cost_of(1800.0, wishes_from_words(price_per_hour=2.5))
    assert lone.machines is lone.per_month is None


def test_an_image_costs_all_of_its_calls() -> None:
    choice = answer(*trio("eager fp32", 7, 20, 63), pipelines=[drawn()], price_per_hour=3.6)
    assert choice.cost is not None and choice.cost.per_1000 == pytest.approx((2 * 7 + 7 * 20 + 63) / 1e3)
    assert answer(EAGER).cost is None


# --- for all records --------------------------------------------------------------------------------------------------

BACKENDS = ("eager", "torch.compile", "onnxruntime", "aoti")


@st.composite
def candidates(draw: Callable[..., Any], component: str = "unet") -> list[Row]:
    names = [f"{b} {p}" for b in BACKENDS for p in ("fp32", "int8")]
    return [
        row(
            name,
            draw(st.integers(10, 77)) / 7,
            draw(st.sampled_from([0.9, 0.99, 0.999, 1.0])),
            component=component,
            noise=draw(st.sampled_from([0.0, 0.01, 0.1])),
            tail=draw(st.sampled_from([1.0, 1.3, 3.0])),
            mib=draw(st.sampled_from([7, 63, 77])),
        )
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    ]


def test_fp32s_own_rounding_does_not_bring_a_slow_candidate_to_the_front() -> None:
    rows = [row("eager fp32", 100.0, 1.0), row("onnxruntime fp32", 21.0, 1 - 1.4e-14), row("aoti fp16", 7.0, 1 - 1e-6)]
    assert [r.candidate for r in front_of(rows)] == ["aoti fp16", "onnxruntime fp32"]


@settings(max_examples=100, deadline=None)
@given(candidates())
def test_the_front_is_what_no_other_beats(rows: list[Row]) -> None:
    front = front_of(rows)
    assert [latency(r) for r in front] == sorted({latency(r) for r in front})
    for r in rows:
        beaten = any(
            latency(o) <= latency(r)
            and quality_of(o) >= quality_of(r)
            and (latency(o), -quality_of(o)) != (latency(r), -quality_of(r))
            for o in rows
        )
        alike = any((latency(r), quality_of(r)) == (latency(f), quality_of(f)) for f in front)
        assert beaten != alike, "each row is beaten, or as good as one of the front"


@settings(max_examples=100, deadline=None)
@given(candidates(), st.sampled_from([0.9, 0.99, 0.999]), st.integers(2, 15))
def test_a_pick_is_never_beaten_and_loosening_a_wish_never_makes_it_slower(
    rows: list[Row], cosine: float, limit: int
) -> None:
    """But for ties, which are at most a twentieth."""
    strict = answer(*rows, quality=[f"cosine>={cosine}"], slo=[f"p95<={limit}ms"])
    fits = [r for r in rows if quality_of(r) >= cosine and r.timing and r.timing.p95_ms <= limit]
    assert strict.met == bool(fits)
    if not fits:
        return
    (pick,) = strict.picks
    assert pick.cosine is not None and pick.cosine >= cosine
    assert pick.latency_ms <= min(latency(r) for r in fits) * (1 + MOST_MARGIN)
    assert not any(latency(r) < pick.latency_ms / (1 + MOST_MARGIN) and quality_of(r) > pick.cosine for r in fits)
    for words in ({"quality": [f"cosine>={cosine - 0.05}"]}, {"slo": [f"p95<={2 * limit}ms"]}):
        loose = answer(*rows, **{"quality": [f"cosine>={cosine}"], "slo": [f"p95<={limit}ms"], **words})
        assert loose.met and loose.picks[0].latency_ms <= pick.latency_ms * (1 + MOST_MARGIN)


@settings(max_examples=100, deadline=None)
@given(
    candidates(component="text_encoder"),
    candidates(component="unet"),
    candidates(component="vae_decoder"),
    st.integers(21, 240),
    st.integers(30, 250),
)
def test_combinations_are_as_good_as_trying_all(
    text: list[Row], unet: list[Row], vae: list[Row], mib: int, limit: int
) -> None:
    """Against every combination: met where any meets both wishes, else as near as any; the fastest but for ties."""
    wishes = wishes_from_words(memory=f"{mib}MiB", slo=[f"p95<={limit}ms"])
    choice = answer(*text, *unet, *vae, pipelines=[drawn()], memory=f"{mib}MiB", slo=[f"p95<={limit}ms"])
    options = [[Option(r, r, CALLS[r.component]) for r in rows] for rows in (text, unet, vae)]
    assert not any(own_misses(o, wishes, True) for found in options for o in found)
    tried = [dict(zip(CALLS, combination, strict=True)) for combination in itertools.product(*options)]
    far = {i: sum(f for f, _ in joint_misses(chosen, wishes, True)) for i, chosen in enumerate(tried)}
    times = {i: sum(o.calls * latency(o.at) for o in chosen.values()) for i, chosen in enumerate(tried)}
    by_names = {tuple(o.row.candidate for o in chosen.values()): i for i, chosen in enumerate(tried)}
    mine = by_names[tuple(picked(choice))]
    assert far[mine] == pytest.approx(min(far.values())) and choice.met == (min(far.values()) == 0)
    least = min(times[i] for i in times if far[i] <= far[mine] + 1e-9)
    assert times[mine] <= least * (1 + MOST_MARGIN)
