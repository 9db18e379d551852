"""Measurement: what is timed was right, candidates take turns, rounds that disagree are measured again, then said."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.errors import GateError
from optimize.profiles import timing
from optimize.profiles.schema import RowParity, Settings
from optimize.profiles.timing import (
    Burst,
    SideFailedError,
    burst_of,
    drift_of,
    measure,
    pace_of,
    ratio_of,
    spread_of,
    stable,
    timing_of,
)

SETTINGS = Settings(
    rounds=6, burst_ms=3.0, warmup_ms=0.5, attempts=2, drift=0.03, spread=0.10, seed=0, pace=0.04, patience=63
)
RIGHT = RowParity(output="x", relative=0.0, limit=1e-4, rule="relative error <= 0.0001", passed=True)
WRONG = RIGHT.model_copy(update={"relative": 0.5, "passed": False})


class Scripted:
    """A side that gives the bursts it is told to, and writes down when it was asked."""

    def __init__(self, name: str, medians: Sequence[float], asked: list[str] | None = None) -> None:
        self.name, self.medians, self.asked = name, list(medians), asked if asked is not None else []

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst:
        self.asked.append(self.name)
        return Burst([self.medians.pop(0)] * 3, 1.0)


class Broken(Scripted):
    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst:
        if len(self.medians) == 1:
            raise SideFailedError("its process died", got="signal 9 (out of memory?)")
        return super().burst(ms, warmup_ms, cold)


class Running:
    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst:
        return burst_of(self.run, "cpu", ms, warmup_ms, cold)


@pytest.mark.parametrize("parity", [{}, {"a": WRONG}], ids=["none", "failed"])
def test_nothing_is_timed_that_was_not_seen_to_be_right(parity: dict[str, RowParity]) -> None:
    side = Scripted("a", [1.0] * 6)
    with pytest.raises(GateError, match="not seen to be right"):
        measure({"a": side}, parity, SETTINGS)
    assert not side.asked


def test_candidates_take_turns_in_an_order_that_changes() -> None:
    asked: list[str] = []
    sides = {n: Scripted(n, [1.0] * 6, asked) for n in "abc"}
    measure(sides, dict.fromkeys("abc", RIGHT), SETTINGS)
    rounds = [asked[i : i + 3] for i in range(0, len(asked), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(rounds) == 6
    assert len({tuple(r) for r in rounds}) > 1


def test_rounds_that_disagree_are_measured_again_all_together() -> None:
    slow_start = [2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    sides = {"a": Scripted("a", [*slow_start, *[1.0] * 6]), "b": Scripted("b", [3.0] * 12)}
    found = measure(sides, dict.fromkeys("ab", RIGHT), SETTINGS, reference="b")
    assert found.timings["a"].stable and found.timings["a"].attempts == 2
    assert found.timings["a"].median_ms == 1.0 and found.ratios["a"].value == pytest.approx(1 / 3)
    assert len(sides["b"].asked) == 12  # its ratio needs rounds of the same time


def test_what_never_agrees_is_inconclusive_and_keeps_the_better_attempt() -> None:
    wild = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    sides = {"a": Scripted("a", wild * 2), "b": Scripted("b", [3.0] * 6 + wild)}
    found = measure(sides, dict.fromkeys("ab", RIGHT), SETTINGS)
    assert not found.timings["a"].stable
    assert found.timings["b"].stable  # the first attempt had one wobbly side, the second two


CALM, SLOW = 0.63, 0.77


class Turning:
    """A side whose runs take `run_ms`; it writes down what it was asked for."""

    def __init__(self, name: str, run_ms: float, asked: list[tuple[str, float, float]]) -> None:
        self.name, self.run_ms, self.asked = name, run_ms, asked

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst:
        self.asked.append((self.name, ms, warmup_ms))
        return Burst([self.run_ms] * max(1, int(ms / self.run_ms)), 2.0)


def test_a_burst_on_a_cpu_is_made_in_turns() -> None:
    """What one turn's neighbours suffer from, all do. Who needs a whole burst for a run has one turn."""
    asked: list[tuple[str, float, float]] = []
    sides = {
        "quick": Turning("quick", 7.0, asked),
        "slow": Turning("slow", 630.0, asked),
        "b": Turning("b", 25.0, asked),
    }
    long = SETTINGS.model_copy(update={"burst_ms": 100.0, "rounds": 3, "turn_ms": 25.0})
    found = measure(sides, dict.fromkeys(sides, RIGHT), long, pace=lambda: CALM)
    first = asked[: len(asked) // 3]
    assert sorted(n for n, _, _ in first) == ["b"] * 4 + ["quick"] * 4 + ["slow"]
    assert {n for n, _, _ in first[:3]} == set(sides) and all(w == 0.5 for _, _, w in first[:3])
    assert all((ms, warmup) == (25.0, 0.0) for _, ms, warmup in first[3:])
    assert (found.timings["quick"].runs, found.timings["slow"].runs) == (36, 3)
    assert found.timings["quick"].median_ms == 7.0 and found.timings["quick"].cpu_ms == 2.0
    asked.clear()
    measure(sides, dict.fromkeys(sides, RIGHT), long.model_copy(update={"turn_ms": 0.0}))
    assert len(asked) == 9 and {ms for _, ms, _ in asked} == {100.0}, "a GPU's bursts are whole"


def test_a_slower_machine_is_waited_for() -> None:
    """Before a burst: nothing is timed until the pace is back. After one: it is made again."""
    side = Scripted("a", [1.0, 1.0, 1.6, *[1.0] * 4])
    paces = [CALM, CALM, SLOW, SLOW, CALM, CALM, CALM, SLOW, *[CALM] * 8]
    found = measure({"a": side}, {"a": RIGHT}, SETTINGS, pace=lambda: paces.pop(0)).timings["a"]
    assert found.rounds_ms == [1.0] * 6 and (found.stable, found.disturbed) == (True, 0)
    assert len(side.asked) == 7 and not paces


def test_a_machine_that_is_never_calm_again_is_given_up_and_said() -> None:
    side, paces = Scripted("a", [1.0, *[1.6] * 63]), [CALM, CALM]
    once = SETTINGS.model_copy(update={"attempts": 1, "patience": 7.0})
    begin = time.monotonic()
    found = measure({"a": side}, {"a": RIGHT}, once, pace=lambda: paces.pop(0) if paces else SLOW).timings["a"]
    assert found.rounds_ms == [1.0, *[1.6] * 5] and found.disturbed == 5
    assert 0.1 < time.monotonic() - begin < 1  # 7 times 6 rounds of 3.5 ms


def test_the_pace_is_not_that_of_what_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that filled all caches change nothing; more work does; threads and cores are as they were."""
    read, threads, cores = pace_of("cpu", 1), torch.get_num_threads(), os.sched_getaffinity(0)
    assert read is not None and pace_of("cuda") is None
    torch.set_num_threads(2)
    try:
        alone = read()
        torch.zeros(1 << 26).add_(1.0)
        assert 0.2 < read() / alone < 5 and torch.get_num_threads() == 2 and os.sched_getaffinity(0) == cores
        monkeypatch.setattr(timing, "PACE_SIDE", 4 * timing.PACE_SIDE)
        assert read() > 8 * alone  # 64 times the work
    finally:
        torch.set_num_threads(threads)


def test_a_side_that_dies_is_named_and_the_others_go_on() -> None:
    sides = {"a": Broken("a", [1.0, 1.0, 1.0]), "b": Scripted("b", [3.0] * 6)}
    found = measure(sides, dict.fromkeys("ab", RIGHT), SETTINGS, reference="a")
    assert "signal 9" in found.failed["a"] and set(found.timings) == {"b"}
    assert found.ratios == {}  # the reference is gone: no ratio stands in for it


def test_a_sleep_is_found_to_the_millisecond() -> None:
    sides = {"fast": Running(lambda: None), "slow": Running(lambda: time.sleep(0.004))}
    found = measure(sides, dict.fromkeys(sides, RIGHT), SETTINGS)
    slow = found.timings["slow"]
    assert 4.0 <= slow.median_ms < 8.0 and found.timings["fast"].median_ms < 0.1
    assert slow.cpu_ms is not None and slow.cpu_ms < 2.0  # sleeping is no work
    assert slow.clock == "monotonic" and slow.p10_ms <= slow.median_ms <= slow.p99_ms


def test_a_burst_lasts_as_long_as_it_is_told_and_runs_at_least_once() -> None:
    begin = time.perf_counter()
    many = burst_of(lambda: time.sleep(0.001), "cpu", 20.0, 5.0, False)
    assert 5 < len(many.times_ms) <= 20 and time.perf_counter() - begin >= 0.024
    assert len(burst_of(lambda: time.sleep(0.01), "cpu", 1.0, 0.0, False).times_ms) == 1


def test_cold_caches_cost_time_outside_of_what_is_measured() -> None:
    data = np.ones(300_000)
    warm = burst_of(data.sum, "cpu", 20.0, 5.0, False)
    begin = time.perf_counter()
    cold = burst_of(data.sum, "cpu", 20.0, 5.0, True)
    wall_ms = 1e3 * (time.perf_counter() - begin)
    assert np.median(cold.times_ms) > np.median(warm.times_ms)
    assert wall_ms > 3 * sum(cold.times_ms)  # writing 256 MB is not counted


def test_rounds_ratio_cancels_what_slows_both() -> None:
    steps = [1.0, 1.5, 2.0, 1.0, 1.2, 3.0]
    a, b = (timing_of([Burst([f * s]) for s in steps], SETTINGS, "cpu", 1) for f in (2.0, 4.0))
    ratio = ratio_of(a, b, "b")
    assert ratio.value == ratio.low == ratio.high == pytest.approx(0.5)


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=30))
@settings(max_examples=60, deadline=None)
def test_stability_is_about_shape_not_size(medians: list[float]) -> None:
    assert stable(medians, SETTINGS) == (abs(drift_of(medians)) <= 0.03 and spread_of(medians) <= 0.10)
    thousand = [1000 * m for m in medians]
    assert drift_of(thousand) == pytest.approx(drift_of(medians), abs=1e-9)
    assert spread_of(thousand) == pytest.approx(spread_of(medians), abs=1e-9)
    assert stable([medians[0]] * len(medians), SETTINGS)
