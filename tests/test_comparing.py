"""Two records: what got slower is found, noise is not, and records that say nothing about each other are refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from profile_records import MACHINE, SETTINGS, a_profile, a_row

from optimize.errors import InputError
from optimize.profiles.comparing import PRACTICAL, compare, differs, regressions, threshold
from optimize.profiles.schema import Change, Comparison, Load, Profile, Row, Timing
from optimize.profiles.timing import Burst, burst_of, drift_of, spread_of, timing_of


def timing(rounds: Any) -> Timing:
    rounds = [float(r) for r in rounds]
    middle = float(np.median(rounds))
    return Timing(
        median_ms=middle,
        p10_ms=middle,
        p90_ms=middle,
        p95_ms=middle,
        p99_ms=middle,
        runs=63,
        rounds_ms=rounds,
        spread=spread_of(rounds),
        drift=drift_of(rounds),
        attempts=1,
        stable=True,
        clock="monotonic",
    )


def around(ms: float, noise: float = 0.01, seed: int = 0) -> Timing:
    """Nine rounds that scatter by so much of themselves."""
    return timing(ms * (1 + noise * np.random.default_rng(seed).standard_normal(9)))


def record(*rows: Row, **changes: Any) -> Profile:
    return a_profile(rows=rows, **changes)


def one(after: Timing, before: Timing, **changes: Any) -> Change:
    compared = compare(record(a_row(timing=after), **changes), record(a_row(timing=before)))
    (change,) = compared.changes
    return change


# --- significance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "slower"), (0.8, "faster")])
def test_a_real_difference_is_significant(factor: float, verdict: str) -> None:
    change = one(around(77 * factor, seed=1), around(77))
    assert change.significant and change.verdict == verdict and not change.why
    assert change.ratio == pytest.approx(factor, rel=0.02)
    assert (change.before_ms, change.after_ms) == (pytest.approx(77, rel=0.01), pytest.approx(77 * factor, rel=0.01))


def test_noise_is_not_and_a_tenth_is_over_many_records() -> None:
    """200 pairs of records of the same code, and 200 of code that is a tenth slower."""
    pairs = [(around(77, 0.015, 2 * s), around(77, 0.015, 2 * s + 1)) for s in range(200)]
    assert sum(one(a, b).significant for a, b in pairs) <= 2
    slower = [(around(84.7, 0.015, 2 * s), b) for s, (_, b) in enumerate(pairs)]
    assert sum(one(a, b).verdict == "slower" for a, b in slower) >= 190


def test_a_difference_that_nobody_cares_for_is_none_however_sure() -> None:
    change = one(around(77 * 1.02, 0.0001), around(77, 0.0001))
    assert differs(around(77, 0.0001).rounds_ms, around(77 * 1.02, 0.0001).rounds_ms)
    assert not change.significant and change.verdict == "same" and change.why == "within 3%"


def test_a_record_that_wandered_by_more_than_the_difference_settles_nothing() -> None:
    """All nine rounds are slower, but each record drifted by as much within itself."""
    before, after = timing(np.linspace(77, 84, 9)), timing(np.linspace(84, 91, 9) * 1.001)
    assert differs(before.rounds_ms, after.rounds_ms) and threshold(before, after) > 0.08
    assert one(after, before).why.startswith("within the rounds' own")
    steady = timing([77.0] * 9)
    assert threshold(steady, steady) == PRACTICAL


def test_rounds_that_overlap_settle_nothing() -> None:
    """The medians are 7 % apart while every other round says the opposite; spread and drift do not show it."""
    before, after = (
        timing([77, 77, 77, 77, 77, 100, 77, 100, 77]),
        timing([77, 82.4, 77, 82.4, 77, 82.4, 77, 82.4, 82.4]),
    )
    forced = {"spread": 0.0, "drift": 0.0}
    change = one(after.model_copy(update=forced), before.model_copy(update=forced))
    assert not change.significant and change.why == "the rounds overlap"


def test_measured_sleeps_are_told_apart() -> None:
    """The rounds of real bursts, interleaved: of 5 ms, again of 5 ms, and of 10 ms."""
    bursts: dict[str, list[Burst]] = {"first": [], "again": [], "slower": []}
    for _ in range(9):
        for name, found in bursts.items():
            found.append(burst_of(lambda s=0.01 if name == "slower" else 0.005: time.sleep(s), "cpu", 30, 0, False))
    first, again, slower = (timing_of(b, SETTINGS, "cpu", 1) for b in bursts.values())
    assert one(slower, first).verdict == "slower"
    assert one(again, first).verdict == "same"


# --- rows -------------------------------------------------------------------------------------------------------------


def compared(old: list[Row], new: list[Row]) -> dict[str, Change]:
    return {c.candidate: c for c in compare(record(*new), record(*old)).changes}


def test_new_and_gone_rows_say_why_and_rows_that_never_ran_are_left_out() -> None:
    failed: Callable[..., Row] = lambda backend, why: a_row(backend=backend, state="failed", why=why)  # noqa: E731
    old = [a_row(), a_row(backend="aoti"), a_row(backend="tensorrt", state="skipped", why="no GPU"), failed("t", "no")]
    new = [a_row(), failed("aoti", "out of memory"), a_row(backend="onnxruntime"), failed("t", "still no")]
    found = compared(old, new)
    assert {c: x.verdict for c, x in found.items()} == {
        "eager fp32": "same",
        "aoti fp32": "gone",
        "onnxruntime fp32": "new",
    }
    assert found["aoti fp32"].why == "out of memory" and found["aoti fp32"].before_ms == 77
    assert not any(x.significant for x in found.values())


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({"state": "inconclusive", "why": "x"}, {}, "inconclusive before"),
        ({}, {"state": "inconclusive", "why": "x"}, "inconclusive now"),
        ({"sizes": {"batch": 7, "height": 63}}, {}, "other sizes before: batch 7, height 63"),
    ],
)
def test_rows_that_say_nothing_about_each_other(before: dict[str, Any], after: dict[str, Any], why: str) -> None:
    (change,) = compared(
        [a_row(**{"timing": around(77), **before})], [a_row(**{"timing": around(163), **after})]
    ).values()
    assert not change.significant and change.verdict == "undecided" and change.why == why


def test_regressions_are_what_is_slower_for_sure_the_worst_first() -> None:
    steady, names = around(77), ("eager", "aoti", "onnxruntime", "torch.compile")
    old = [a_row(backend=b, timing=steady) for b in names]
    new = [a_row(backend=b, timing=around(ms, seed=3)) for b, ms in zip(names, (78, 97, 163, 31), strict=True)]
    comparison = compare(record(*new), record(*old))
    assert [c.candidate for c in regressions(comparison)] == ["onnxruntime fp32", "aoti fp32"]
    assert regressions(Comparison(against="", made="", changes=[])) == []


def test_a_reference_that_changed_says_that_it_is_not_the_candidates() -> None:
    comparison = compare(record(a_row(timing=around(163))), record(a_row(timing=around(77))))
    assert any("eager fp32 itself is slower (2.12x): the machine or torch changed" in n for n in comparison.notes)
    assert compare(record(a_row()), record(a_row())).notes == ()


# --- records ----------------------------------------------------------------------------------------------------------

OTHER = MACHINE.model_copy(update={"key": "another-cpu"})
SLOW, FAST = a_row(timing=around(163)), a_row(timing=around(77))


def test_another_machine_is_refused_unless_allowed_and_settles_nothing_then() -> None:
    with pytest.raises(InputError, match=r"another machine\n  got: another-cpu\n  expected: cpu-7-test") as e:
        compare(record(SLOW), record(FAST, machine=OTHER))
    assert e.value.exit_code == 2
    allowed = compare(record(SLOW), record(FAST, machine=OTHER), other_machine=True)
    assert allowed.notes[0] == "another machine: another-cpu before, cpu-7-test now"
    assert not allowed.changes[0].significant and allowed.changes[0].why == allowed.notes[0]


def test_allowing_another_machine_changes_nothing_on_the_same_one() -> None:
    older = MACHINE.model_copy(update={"versions": {"torch": "2.12.0"}})
    comparison = compare(record(SLOW), record(FAST, machine=older), other_machine=True)
    assert comparison.changes[0].significant
    assert "torch 2.12.0 -> 2.13.0" in comparison.notes[0] and "onnxruntime none -> 1.31.0" in comparison.notes[0]


@pytest.mark.parametrize("which", ["before", "now"])
def test_a_busy_machine_settles_nothing(which: str) -> None:
    busy = {"load": Load(seconds=7, others=0.63, stolen=0.0, busy=True)}
    new, old = (record(row, **(busy if when == which else {})) for row, when in ((SLOW, "now"), (FAST, "before")))
    comparison = compare(new, old)
    assert comparison.notes == (f"a busy machine {which}",)
    assert comparison.changes[0].why == comparison.notes[0] and not comparison.changes[0].significant


def test_cold_caches_are_not_compared_with_warm_ones() -> None:
    cold = SETTINGS.model_copy(update={"cold_cache": True})
    comparison = compare(record(SLOW, settings=cold), record(FAST))
    assert comparison.changes[0].why == "caches were warm before, and are not now"
    assert not comparison.changes[0].significant


def test_another_schema_and_records_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(InputError, match=r"older record is of another schema\n  got: schema_version 7\n  expected"):
        compare(record(SLOW), record(FAST, schema_version=7))
    with pytest.raises(InputError, match=r"no row in common\n  got: demo: vae at default\n  expected: demo: unet at"):
        compare(record(SLOW), record(a_row("vae")))
