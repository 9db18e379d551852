"""Cosine, SNR, PSNR and SSIM against their definitions in NumPy, at odd shapes; NaN and infinity in them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.errors import InputError
from optimize.quantize.measures import budget_from_text, cosine, psnr, snr, ssim

ALL = (cosine, snr, psnr, ssim)
VECTOR = (cosine, snr, psnr)
SHAPES = ((1, 1, 7, 7), (2, 3, 63, 3), (1, 4, 77, 12), (3, 1, 4, 5))
pairs = st.builds(
    lambda shape, seed, noise, scale: (shape, seed, noise, scale),
    st.sampled_from(SHAPES),
    st.integers(0, 2**31),
    st.floats(1e-6, 10),
    st.floats(1e-20, 1e20),
)


def drawn(shape: tuple[int, ...], seed: int, noise: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(off by noise, exact), fp32."""
    rng = torch.Generator().manual_seed(seed)
    exact = torch.randn(shape, generator=rng)
    return (exact + noise * torch.randn(shape, generator=rng)) * scale, exact * scale


def by_definition(got: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    a, b = (t.numpy().astype(np.float64) for t in (got, exact))
    mse = np.mean((a - b) ** 2)
    return {
        "cosine": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
        "snr": float(10 * np.log10((b * b).sum() / ((a - b) ** 2).sum())),
        "psnr": float(20 * np.log10(np.ptp(b)) - 10 * np.log10(mse)),
        "ssim": ssim_by_definition(a, b),
    }


def ssim_by_definition(a: Any, b: Any) -> float:
    """Equation 13 of the paper at each place, edges mirrored."""
    size = min(11, (min(a.shape[-2:]) - 1) // 2 * 2 + 1)
    line = np.arange(size) - size // 2
    line = np.exp(-0.5 * (line / (1.5 * (size // 2) / 5)) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * np.ptp(b)) ** 2, (0.03 * np.ptp(b)) ** 2
    pad = [(0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)]
    a, b = (np.pad(t, pad, mode="reflect") for t in (a, b))
    x, y = (np.lib.stride_tricks.sliding_window_view(t, (size, size), axis=(-2, -1)) for t in (a, b))
    mx, my = (x * window).sum((-2, -1)), (y * window).sum((-2, -1))
    vx, vy = (x * x * window).sum((-2, -1)) - mx**2, (y * y * window).sum((-2, -1)) - my**2
    vxy = (x * y * window).sum((-2, -1)) - mx * my
    return float(np.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_each_is_its_definition(case: Any) -> None:
    got, exact = drawn(*case)
    expected = by_definition(got, exact)
    for measure in ALL:
        assert measure(got, exact) == pytest.approx(expected[measure.__name__], rel=1e-9, abs=1e-9), measure.__name__


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_what_is_equal_is_perfect(case: Any) -> None:
    _, exact = drawn(*case)
    assert (cosine(exact, exact), ssim(exact, exact)) == (pytest.approx(1, abs=1e-12), 1)
    assert snr(exact, exact) == psnr(exact, exact) == math.inf


@settings(deadline=None, max_examples=50)
@given(pairs, st.integers(-60, 60))
def test_scale_changes_only_what_it_should(case: Any, power: int) -> None:
    """By a power of two, which fp64 takes exactly: cosine of one side scaled, the ratios of both sides scaled."""
    got, exact = (t.double() for t in drawn(*case))
    assert cosine(got * 2.0**power, exact) == pytest.approx(cosine(got, exact), rel=1e-12, abs=1e-12)
    for measure in VECTOR:
        assert measure(got * 2.0**power, exact * 2.0**power) == pytest.approx(measure(got, exact), rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_which_sides_may_change_places(case: Any) -> None:
    got, exact = drawn(*case)
    assert cosine(got, exact) == pytest.approx(cosine(exact, got), rel=1e-12, abs=1e-12)
    for measure in (psnr, ssim):
        assert measure(got, exact, span=2.0) == pytest.approx(measure(exact, got, span=2.0), rel=1e-12, abs=1e-12)
    assert cosine(-got, exact) == pytest.approx(-cosine(got, exact), abs=1e-12)


@pytest.mark.parametrize("measure", ALL)
def test_more_noise_is_worse(measure: Callable[..., float]) -> None:
    figures = [measure(*drawn((2, 3, 63, 77), 7, noise, 1.0)) for noise in (1e-4, 1e-2, 1.0, 100.0)]
    assert figures == sorted(figures, reverse=True) and len(set(figures)) == 4


@pytest.mark.parametrize("measure", ALL)
def test_not_a_number_meets_no_budget(measure: Callable[..., float]) -> None:
    for bad in (0, 1):
        sides = list(drawn((1, 1, 7, 7), 0, 0.1, 1.0))
        sides[bad][0, 0, 3, 3] = math.nan
        assert math.isnan(measure(*sides))
    got, exact = drawn((1, 1, 7, 7), 0, 0.1, 1.0)
    got[0, 0, 3, 3] = math.inf
    assert not measure(got, exact) >= -1e9


def test_infinities_that_agree_are_no_difference() -> None:
    exact = torch.tensor([1.0, -math.inf, 2.0])
    assert (cosine(exact, exact), snr(exact, exact)) == (pytest.approx(1), math.inf)
    assert snr(torch.tensor([1.0, -math.inf, 1.0]), exact) == pytest.approx(10 * math.log10(5))
    assert snr(torch.tensor([1.0, math.inf, 2.0]), exact) == -math.inf or math.isnan(
        snr(torch.tensor([1.0, math.inf, 2.0]), exact)
    )


def test_zeros_and_nothing() -> None:
    zeros, ones, none = torch.zeros(3), torch.ones(3), torch.zeros(0)
    assert [cosine(zeros, zeros), cosine(zeros, ones), cosine(ones, zeros)] == [1, 0, 0]
    assert [snr(zeros, zeros), snr(ones, zeros)] == [math.inf, -math.inf]
    assert [cosine(none, none), snr(none, none), psnr(none, none)] == [1, math.inf, math.inf]
    assert psnr(ones, zeros) == -math.inf and psnr(ones, zeros, span=1.0) == 0


def test_small_differences_of_integers_and_halves_are_not_rounded_away() -> None:
    exact = torch.full((77,), 1000, dtype=torch.float16)
    got = exact.clone()
    got[0] += 1
    assert snr(got, exact) == pytest.approx(10 * math.log10(77e6))
    assert snr(torch.tensor([255, 255], dtype=torch.uint8), torch.tensor([0, 255], dtype=torch.uint8)) == 0


@pytest.mark.parametrize("measure", ALL)
def test_other_shapes_are_refused(measure: Callable[..., float]) -> None:
    with pytest.raises(InputError, match="different shapes") as raised:
        measure(torch.zeros(1, 1, 7, 7), torch.zeros(1, 1, 7, 1))
    assert "[1, 1, 7, 1]" in str(raised.value)


@pytest.mark.parametrize("shape", [(63, 77), (1, 1, 2, 77), (0, 1, 7, 7)])
def test_ssim_of_no_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="SSIM needs images"):
        ssim(torch.zeros(shape), torch.ones(shape))


def test_budgets() -> None:
    budget = budget_from_text("cosine>=0.999")
    assert [budget.met(v) for v in (1.0, 0.999, 0.998, math.nan)] == [True, True, False, False]
    assert str(budget) == "cosine>=0.999"
    less = budget_from_text(" fid <= 2e1 ", {"fid": "<="})
    assert (less.met(20), less.met(21), less.met(math.nan)) == (True, False, False)


@pytest.mark.parametrize("text", ["cosine", "cosine>0.9", "cosine>=", "cosine>=many", "cosine<=0.9", "shine>=1", ""])
def test_budgets_that_say_nothing(text: str) -> None:
    with pytest.raises(InputError, match="--budget") as raised:
        budget_from_text(text)
    assert text in str(raised.value)


def test_an_output_that_is_not_finite_is_the_worst_wherever_it_stands() -> None:
    """Outputs come in the order of their names, and NaN is below nothing."""
    from optimize.profiles.judging import MOST_DB, quality_of_row

    one, nan = torch.linspace(-1, 1, 63), torch.full((63,), float("nan"))
    for names in (("a", "b"), ("b", "a")):
        exact = dict.fromkeys(names, one)
        found = quality_of_row([(exact, exact), ({names[0]: one, names[1]: nan}, exact)], "")
        assert found is not None and found.output == names[1]
        assert found.cosine != found.cosine and found.lowest != found.lowest
    far = quality_of_row([({"a": one}, {"a": one}), ({"a": one + 0.5}, {"a": one})], "")
    assert far is not None and far.snr_db < 20 < MOST_DB
