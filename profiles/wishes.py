"""What an answer has to meet: latency, quality, memory; and the price and load that make money of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimize.errors import InputError

if TYPE_CHECKING:
    from optimize.quantize.measures import Budget

    from .schema import Row

PERCENTILES: Mapping[str, str] = {
    "median": "median_ms",
    "p50": "median_ms",
    "p90": "p90_ms",
    "p95": "p95_ms",
    "p99": "p99_ms",
}
"""Figure of --slo -> the field of a Timing."""
MS: Mapping[str, float] = {"us": 1e-3, "ms": 1.0, "s": 1e3}
QUALITY: Mapping[str, str] = {"cosine": "cosine", "snr": "snr_db", "psnr": "psnr_db"}
"""Figure of --quality -> the field of a RowQuality."""
SECONDS: Mapping[str, float] = {
    "s": 1.0,
    "second": 1.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
    "day": 86400.0,
    "month": 730 * 3600.0,
}
BYTES: Mapping[str, float] = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Slo:
    """`figure` of the latency has to be below `limit_ms` (with `sign` "<=" at most that)."""

    figure: str
    sign: str
    limit_ms: float

    def met(self, ms: float) -> bool:
        return ms < self.limit_ms if self.sign == "<" else ms <= self.limit_ms

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.limit_ms:.10g}ms"


@dataclass(frozen=True)
class Wishes:
    """`memory` in bytes. `price_per_hour` of this machine, in whatever money."""

    slo: tuple[Slo, ...] = ()
    quality: tuple[Budget, ...] = ()
    memory: int | None = None
    price_per_hour: float | None = None
    load_per_second: float | None = None

    def texts(self) -> list[str]:
        said = [str(w) for w in (*self.slo, *self.quality)]
        return said + ([f"memory<={self.memory / 2**30:.3g}GiB"] if self.memory is not None else [])


def wishes_from_words(
    *,
    slo: Sequence[str] = (),
    quality: Sequence[str] = (),
    memory: int | str | None = None,
    price_per_hour: float | None = None,
    load: str | None = None,
) -> Wishes:
    """Checks the words of the command line. `memory` is bytes, or words such as `16GiB`.

    Raises InputError for what cannot be understood or met by nothing.
    """
    memory = bytes_from_text(memory) if isinstance(memory, str) else memory
    for word, value in (("memory", memory), ("price-per-hour", price_per_hour)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{word} is no such thing", got=value, expected="a number above zero")
    per_second = load_from_text(load) if load is not None else None
    if load is not None and price_per_hour is None:
        raise InputError("--load needs a price", got=load, expected="--price-per-hour too", mend="give both")
    return Wishes(
        tuple(slo_from_text(text) for text in slo),
        tuple(quality_from_text(text) for text in quality),
        memory,
        price_per_hour,
        per_second,
    )


def slo_from_text(text: str) -> Slo:
    """`p95<100ms`."""
    match = re.fullmatch(r"\s*(\w+)\s*(<=?)\s*([\d.]+(?:e-?\d+)?)\s*(us|ms|s)\s*", text)
    try:
        figure, sign, number, unit = match.groups()  # type: ignore[union-attr]  # None is caught below
        limit = float(number) * MS[unit]
    except (AttributeError, ValueError) as e:
        raise InputError(
            "--slo was not understood",
            got=text,
            expected=f"{'|'.join(PERCENTILES)}, < or <=, a time in us, ms or s",
            mend="such as --slo 'p95<100ms'",
        ) from e
    if figure not in PERCENTILES or not 0 < limit < math.inf:
        raise InputError(
            "--slo asks for something else",
            got=text,
            expected=f"one of {', '.join(PERCENTILES)}, and a time above zero",
        )
    return Slo(figure, sign, limit)


def quality_from_text(text: str) -> Budget:
    """`cosine>=0.999`."""
    from optimize.quantize.measures import budget_from_text

    try:
        found = budget_from_text(text, dict.fromkeys(QUALITY, ">="))
    except InputError as e:
        raise InputError(
            "--quality was not understood",
            got=text,
            expected=", ".join(f"{f}>=NUMBER" for f in QUALITY),
            mend="such as --quality 'cosine>=0.999'",
        ) from e
    if found.figure == "cosine" and found.limit > 1:
        raise InputError("--quality asks for what cannot be", got=text, expected="a cosine of at most 1")
    return found


def load_from_text(text: str) -> float:
    """`200000/day` -> runs per second."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*/\s*(\w+)\s*", text)
    try:
        found = float(match.group(1)) / SECONDS[match.group(2)]  # type: ignore[union-attr]  # None is caught below
    except (AttributeError, ValueError, KeyError) as e:
        raise InputError(
            "--load was not understood", got=text, expected="N/" + "|".join(SECONDS), mend="such as --load 200000/day"
        ) from e
    if not 0 < found < math.inf:
        raise InputError("--load is no such thing", got=text, expected="a number above zero")
    return found


def bytes_from_text(text: str) -> int:
    """`1.5GiB` or `800MB` -> bytes; a bare number is bytes."""
    number = text.lower().removesuffix("b").rstrip("kmgi")
    try:
        size = int(float(number) * BYTES[text.lower().removesuffix("b")[len(number) :]])
    except (ValueError, KeyError, OverflowError) as e:
        raise InputError(f"{text} is no size", got=text, expected="such as 1.5GiB or 800MB") from e
    if size < 0:
        raise InputError(f"{text} is below zero", got=text, expected="such as 1.5GiB or 800MB")
    return size


Miss = tuple[float, str]
"""How far a wish is from being met, as a share of what it asks for; and that in words."""


def quality_misses(row: Row, wishes: Wishes) -> list[Miss]:
    """Every wish about quality that this row does not meet."""
    missed = []
    for budget in wishes.quality:
        value = getattr(row.quality, QUALITY[budget.figure]) if row.quality else math.nan
        if math.isnan(value):
            missed.append((1.0, f"{budget.figure} was not measured, or is not a number"))
        elif not budget.met(value):
            far = min(1.0, abs(budget.limit - value) / max(abs(budget.limit), 1e-9))
            missed.append((far, f"{budget.figure} {value:.6g}, not {budget.sign}{budget.limit:.10g}"))
    return missed


def slo_misses(times: Mapping[str, float], what: str, wishes: Wishes) -> list[Miss]:
    """Every wish about latency that these times, in milliseconds by figure, do not meet. `what` has them."""
    return [
        (times[slo.figure] / slo.limit_ms - 1 + 1e-9, f"{what}{slo.figure} {times[slo.figure]:.4g} ms, not {slo}")
        for slo in wishes.slo
        if not slo.met(times[slo.figure])
    ]


def memory_misses(peak: int, wishes: Wishes) -> list[Miss]:
    """The wish about memory, where a peak of so many bytes does not meet it."""
    if wishes.memory is None or peak <= wishes.memory:
        return []
    return [(peak / wishes.memory - 1, f"memory {peak / 2**20:.0f} MiB, not <={wishes.memory / 2**20:.0f} MiB")]
