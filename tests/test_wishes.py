"""Wishes: words become limits, and words that say nothing, or nothing that could be met, are refused with the mend."""

from __future__ import annotations

import math
from typing import Any

import pytest
from profile_records import a_row, timing

from optimize.errors import InputError
from optimize.profiles.schema import Row, RowQuality
from optimize.profiles.wishes import (
    Slo,
    bytes_from_text,
    load_from_text,
    memory_misses,
    quality_misses,
    slo_from_text,
    slo_misses,
    wishes_from_words,
)


@pytest.mark.parametrize(
    ("text", "figure", "sign", "ms"),
    [
        ("p95<100ms", "p95", "<", 100.0),
        (" p50 <= 1.5 s ", "p50", "<=", 1500.0),
        ("median<63us", "median", "<", 0.063),
        ("p99<1e-1s", "p99", "<", 100.0),
    ],
)
def test_a_latency_is_read_in_its_unit(text: str, figure: str, sign: str, ms: float) -> None:
    found = slo_from_text(text)
    assert (found.figure, found.sign) == (figure, sign) and found.limit_ms == pytest.approx(ms)
    assert slo_from_text(str(found)) == found


def test_less_is_not_at_most() -> None:
    assert not Slo("p95", "<", 7.0).met(7.0) and Slo("p95", "<=", 7.0).met(7.0)


@pytest.mark.parametrize(
    "text",
    ["", "p95", "p95>100ms", "p95<100", "p95<ms", "p95<1.2.3ms", "mean<9ms", "p95<0ms", "p95<-1ms", "p95<9e999s"],
)
def test_other_latencies_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--slo[\s\S]*got[\s\S]*expected[\s\S]*median") as e:
        slo_from_text(text)
    assert e.value.got == text


@pytest.mark.parametrize(
    ("text", "rate"),
    [("3/s", 3.0), ("200000/day", 200000 / 86400), ("7/min", 7 / 60), ("1.5e6 / month", 1.5e6 / 2628e3)],
)
def test_a_load_is_runs_per_second(text: str, rate: float) -> None:
    assert load_from_text(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "3", "3/fortnight", "/s", "0/s", "-1/s", "9e999/s", "1.2.3/s"])
def test_other_loads_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--load[\s\S]*expected"):
        load_from_text(text)


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 << 30), ("800MB", 800_000_000), ("1.5kib", 1536), ("77", 77), ("63B", 63)]
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_from_text(text) == size
    assert wishes_from_words(memory=text) == wishes_from_words(memory=size)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"memory": "lots"}, "lots is no size"),
        ({"memory": "-1GB"}, "below zero"),
        ({"memory": 0}, "--memory"),
        ({"price_per_hour": 0.0}, "--price-per-hour"),
        ({"price_per_hour": math.nan}, "--price-per-hour"),
        ({"load": "3/s"}, "--load needs a price"),
        ({"quality": ["cosine<=0.9"]}, "--quality"),
        ({"quality": ["fid>=3"]}, "--quality"),
        ({"quality": ["cosine>=nan"]}, "--quality"),
    ],
)
def test_words_that_ask_for_nothing_are_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as e:
        wishes_from_words(**words)
    assert e.value.got is not None and e.value.expected is not None


def test_all_wishes_in_words() -> None:
    wishes = wishes_from_words(slo=["p95<0.1s"], quality=["cosine>=0.999", "snr>=30"], memory="16GiB")
    assert wishes.texts() == ["p95<100ms", "cosine>=0.999", "snr>=30", "memory<=16GiB"]
    assert wishes_from_words().texts() == []


def row(cosine: float, snr_db: float = 40.0) -> Row:
    quality = RowQuality(output="y", cosine=cosine, lowest=cosine, snr_db=snr_db, psnr_db=snr_db, samples=7, data="")
    return a_row(quality=quality, timing=timing(7.0))


def test_what_is_missed_and_how_far() -> None:
    wishes = wishes_from_words(slo=["p95<100ms"], quality=["cosine>=0.999", "snr>=30"], memory=100 << 20)
    assert quality_misses(row(0.999, 30.0), wishes) == []
    (far, text), (farther, _) = quality_misses(row(0.99, 15.0), wishes)
    assert far == pytest.approx(0.009 / 0.999) and farther == pytest.approx(0.5) and "cosine 0.99, not >=0.999" in text
    late = slo_misses({"p95": 150.0}, "an image: ", wishes)
    assert late[0][0] == pytest.approx(0.5) and late[0][1] == "an image: p95 150 ms, not p95<100ms"
    assert slo_misses({"p95": 99.9}, "", wishes) == memory_misses(100 << 20, wishes) == []
    assert memory_misses(163 << 20, wishes) == [(pytest.approx(0.63), "memory 163 MiB, not <=100 MiB")]


@pytest.mark.parametrize("quality", [None, row(math.nan).quality])
def test_a_quality_that_nobody_measured_meets_no_wish(quality: RowQuality | None) -> None:
    found = quality_misses(a_row(quality=quality), wishes_from_words(quality=["cosine>=-1"]))
    assert found[0][0] == 1.0 and "not measured" in found[0][1]
