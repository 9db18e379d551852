"""Which candidate of a component is the better one: latency and quality, and when a difference is none.

Differences within both sides' noise are ties: better quality decides, then memory, then the order of the table of
backends. An inconclusive candidate counts as its slow rounds (their upper quartile): it wins only where those are
faster, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from optimize.compile.backends import BACKENDS

from .schema import Row
from .wishes import PERCENTILES

LEAST_MARGIN, MOST_MARGIN = 0.01, 0.05
"""Of a tie. Processes that run the same code differ by about a hundredth, which no round sees; where the rounds tell
less than a twentieth, the faster median decides."""
SLOW_ROUNDS = 75
"""The percentile of its rounds that an inconclusive candidate counts as. Not the slowest: others' work on the machine
hit one round in nine of whatever ran then, and decided."""
NINES, SHOWN = 4, 7
"""Digits of a cosine that count in a tie, and in a front: those after the seventh are fp32's own rounding."""


@dataclass(frozen=True)
class Option:
    """A row that could be deployed, `at` the sizes where it is called, `calls` times per run."""

    row: Row
    at: Row
    calls: float

    @property
    def sure(self) -> bool:
        return self.row.state == self.at.state == "measured"

    @property
    def memory(self) -> int:
        found = self.at.memory or self.row.memory
        return (found.device if found.device is not None else found.host or 0) if found else 0

    def times(self) -> dict[str, float]:
        """Milliseconds of one call, by the figures of --slo."""
        return {figure: float(getattr(self.at.timing, field)) for figure, field in PERCENTILES.items()}


def quality_of(row: Row) -> float:
    """Cosine; for outputs that are no floats, what parity says of it."""
    if row.quality is not None:
        return row.quality.cosine
    return 1 - (row.parity.relative**2 / 2 if row.parity else 1.0)


def front_of(rows: Iterable[Row]) -> list[Row]:
    """Rows that no other one beats in latency and quality at once, the fastest first."""
    timed = [r for r in rows if r.timing is not None]
    best, found = -math.inf, []
    for row in sorted(timed, key=lambda r: (latency(r), -quality_of(r))):
        if (quality := round(quality_of(row), SHOWN)) > best:
            best = quality
            found.append(row)
    return found


def median(row: Row) -> float:
    assert row.timing is not None
    return row.timing.median_ms


def latency(row: Row) -> float:
    """Milliseconds that count when rows are ranked."""
    if row.state == "measured" or row.timing is None:
        return median(row)
    return float(np.percentile(row.timing.rounds_ms, SLOW_ROUNDS))


def error_of_median(row: Row) -> float:
    """Standard error of the median of the rounds, relative."""
    assert row.timing is not None
    rounds = np.asarray(row.timing.rounds_ms)
    return float(1.2533 * rounds.std(ddof=1) / math.sqrt(len(rounds)) / np.median(rounds)) if len(rounds) > 1 else 0.0


def tied(fast: Row, slow: Row) -> bool:
    """Whether the difference is within the noise of both."""
    noise = 2 * math.hypot(error_of_median(fast), error_of_median(slow))
    return latency(slow) <= latency(fast) * (1 + min(MOST_MARGIN, max(LEAST_MARGIN, noise)))


MERITS = ("the better quality", "less memory", "the simpler backend", "its median")
"""What `merits` compares, in words."""


def merits(option: Option) -> tuple[float, float, int, float]:
    """What decides a tie, less is better."""
    order, backend = list(BACKENDS), option.row.backend
    return (
        -round(quality_of(option.row), NINES),
        round(math.log1p(option.memory), 1),  # steps of a tenth
        order.index(backend) if backend in order else len(order),
        latency(option.at),
    )


def ranked(options: Sequence[Option]) -> list[Option]:
    """The best first: of the fastest and those tied with it the one with most merits; then the rest by latency."""
    by_time = sorted(options, key=lambda o: latency(o.at))
    first = min((o for o in by_time if tied(by_time[0].at, o.at)), key=merits)
    return [first, *(o for o in by_time if o is not first)]


def decided(option: Option, other: Option) -> str:
    """What a tie was decided by."""
    pairs = zip(MERITS, merits(option), merits(other), strict=True)
    return next((word for word, ours, theirs in pairs if ours < theirs), MERITS[-1])
