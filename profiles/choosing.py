"""The answer: for each component the fastest candidate that meets the wishes, and why; what a pipeline of them costs.

A component's candidates are ranked at the sizes that its pipeline calls it with. Differences within both sides' noise
are ties: better quality decides, then memory, then the order of the table of backends. The wishes on a pipeline's
latency and on memory hold for all picks together, so combinations are tried, the fastest first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optimize.compile.backends import BACKENDS

from .schema import Choice, Cost, Pick, PipelineTime, Profile, Row
from .wishes import PERCENTILES, Wishes, quality_misses

GUIDED = "+guided"
"""End of the name of sizes at which a guided pipeline calls its denoiser."""
MOST_MARGIN = 0.05
"""Of a tie: where the rounds tell less than that, the faster median decides."""
NINES = 4
"""Digits of a cosine that count in a tie."""
MANY = 20_000
"""Combinations that are tried; of more, each component keeps its fastest."""
RARELY = 1e-6
"""Calls per run of what a run does not call: its own speed still decides."""
HOURS_OF_MONTH = 730


@dataclass(frozen=True)
class Option:
    """A row that could be deployed, `at` the sizes where it is called, `calls` times per run."""

    row: Row
    at: Row
    calls: float

    def ms(self, figure: str) -> float:
        assert self.at.timing is not None
        return float(getattr(self.at.timing, PERCENTILES[figure]))

    @property
    def memory(self) -> int:
        found = self.row.memory
        return (found.device if found.device is not None else found.host or 0) if found else 0


def quality_of(row: Row) -> float:
    """Cosine; for outputs that are no floats, what parity says of it."""
    if row.quality is not None:
        return row.quality.cosine
    return 1 - (row.parity.relative**2 / 2 if row.parity else 1.0)


def front_of(rows: Iterable[Row]) -> list[Row]:
    """Rows that no other one beats in latency and quality at once, the fastest first."""
    timed = sorted((r for r in rows if r.timing is not None), key=lambda r: (latency(r), -quality_of(r)))
    best, found = -math.inf, []
    for row in timed:
        if quality_of(row) > best:
            best = quality_of(row)
            found.append(row)
    return found


def latency(row: Row) -> float:
    assert row.timing is not None
    return row.timing.median_ms


def error_of_median(row: Row) -> float:
    """Standard error of the median of the rounds, relative."""
    assert row.timing is not None
    rounds = np.asarray(row.timing.rounds_ms)
    return float(1.2533 * rounds.std(ddof=1) / math.sqrt(len(rounds)) / np.median(rounds)) if len(rounds) > 1 else 0.0


def tied(fast: Row, slow: Row) -> bool:
    """Whether the difference is within the noise of both."""
    margin = min(MOST_MARGIN, 2 * math.hypot(error_of_median(fast), error_of_median(slow)))
    return latency(slow) <= latency(fast) * (1 + margin)


def ranked(options: Sequence[Option]) -> list[Option]:
    """The best first: the fastest, and among those tied with it the one of better quality, less memory, a simpler
    backend; then the rest by latency."""
    by_time = sorted(options, key=lambda o: latency(o.at))
    order = list(BACKENDS)

    def merits(option: Option) -> tuple[float, float, int]:
        backend = option.row.backend
        return (
            -round(quality_of(option.row), NINES),
            round(math.log1p(option.memory), 1),
            order.index(backend) if backend in order else len(order),
        )

    ties = [o for o in by_time if tied(by_time[0].at, o.at)]
    first = min(ties, key=merits)
    return [first, *(o for o in by_time if o is not first)]


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(profile: Profile, wishes: Wishes) -> Choice | None:
    """The answer for the first sizes of each component; None where nothing was timed."""
    shapes: dict[str, str] = {}
    for row in profile.rows:
        shapes.setdefault(row.component, row.shape)
    options = {c: found for c, shape in shapes.items() if (found := options_of(profile, c, shape))}
    if not options:
        return None
    together = bool(profile.pipelines)
    fitting = {
        c: [o for o in found if not quality_misses(o.row, wishes)] or nearest(found, wishes)
        for c, found in options.items()
    }
    chosen, missed = best_together({c: ranked(found) for c, found in fitting.items()}, wishes, together)
    picks = [pick_of(chosen[c], options[c], wishes) for c in options]
    run_ms = sum(o.calls * o.ms("median") for o in chosen.values())
    return Choice(
        wishes=wishes.texts(),
        met=not missed,
        missed=tuple(missed),
        picks=picks,
        front={c: [o.candidate for o in front_of(x.row for x in found)] for c, found in options.items()},
        pipeline=None,
        cost=cost_of(run_ms, wishes) if wishes.price_per_hour is not None else None,
    )


def options_of(profile: Profile, component: str, shape: str) -> list[Option]:
    """What could be deployed: measured rows; inconclusive ones only where there is nothing else."""
    here = [r for r in profile.rows if r.component == component and r.timing is not None]
    calls = calls_by_component(profile.pipelines)
    if profile.pipelines and component not in calls:
        calls[component] = 0.0  # a VAE's encoder, which a pipeline from text does not call
    guided = {r.candidate: r for r in here if r.shape == shape + GUIDED}
    found = [Option(r, guided.get(r.candidate, r), calls.get(component, 1.0)) for r in here if r.shape == shape]
    sure = [o for o in found if "measured" in (o.row.state, o.at.state)]
    return sure or found


def calls_by_component(pipelines: Sequence[PipelineTime]) -> dict[str, float]:
    return {part.component: part.calls for time in pipelines[:1] for part in time.parts}


def nearest(options: Sequence[Option], wishes: Wishes) -> list[Option]:
    """Where none is good enough: those that come nearest."""
    far = {o.row.candidate: sum(f for f, _ in quality_misses(o.row, wishes)) for o in options}
    least = min(far.values())
    return [o for o in options if far[o.row.candidate] <= least * (1 + 1e-9)]


def best_together(
    options: Mapping[str, Sequence[Option]], wishes: Wishes, together: bool
) -> tuple[dict[str, Option], list[str]]:
    """One option per component, and what they miss: nothing, or as little as can be."""
    names = list(options)
    each = max(1, int(MANY ** (1 / len(names))))
    best: tuple[float, float, dict[str, Option], list[str]] | None = None
    for combination in itertools.product(*(options[n][:each] for n in names)):
        chosen = dict(zip(names, combination, strict=True))
        misses = misses_of(chosen, wishes, together)
        far = sum(f for f, _ in misses)
        cost = sum(weight(o, options[n]) for n, o in chosen.items())
        if best is None or (far, cost) < best[:2]:
            best = (far, cost, chosen, [text for _, text in misses])
        if far == 0 and not (wishes.memory or wishes.slo):
            break  # rankings alone decide, and theirs came first
    assert best is not None
    return best[2], best[3]


def weight(option: Option, ranking: Sequence[Option]) -> float:
    """Milliseconds of a run. The first of a ranking counts as its fastest one: ties were decided there."""
    ms = min(latency(o.at) for o in ranking) if option is ranking[0] else latency(option.at)
    return (option.calls or RARELY) * ms


def misses_of(chosen: Mapping[str, Option], wishes: Wishes, together: bool) -> list[tuple[float, str]]:
    """(how far, in words) of every wish that these do not meet."""
    missed = [(far, f"{n}: {text}") for n, o in chosen.items() for far, text in quality_misses(o.row, wishes)]
    for slo in wishes.slo:
        times = {n: o.ms(slo.figure) for n, o in chosen.items()}
        if together:
            times = {"an image": sum(o.calls * times[n] for n, o in chosen.items())}
        missed += [
            (ms / slo.limit_ms - 1 + 1e-9, f"{what}: {slo.figure} {ms:.4g} ms, not {slo.sign}{slo.limit_ms:.4g} ms")
            for what, ms in times.items()
            if not slo.met(ms)
        ]
    memory = sum(o.memory for o in chosen.values())
    if wishes.memory is not None and memory > wishes.memory:
        text = f"memory {memory / 2**20:.0f} MiB, not <={wishes.memory / 2**20:.0f} MiB"
        missed.append((memory / wishes.memory - 1, text))
    return missed


def pick_of(option: Option, options: Sequence[Option], wishes: Wishes) -> Pick:
    others = sorted((o for o in options if o is not option), key=lambda o: latency(o.at))
    row = option.row
    return Pick(
        component=row.component,
        shape=row.shape,
        backend=row.backend,
        precision=row.precision,
        artifact=row.artifact,
        latency_ms=latency(option.at),
        cosine=row.quality.cosine if row.quality else None,
        memory_bytes=option.memory or None,
        why="; ".join(reasons(option, others, wishes)),
        runner_up=others[0].row.candidate if others else "",
    )


def reasons(option: Option, others: Sequence[Option], wishes: Wishes) -> Iterable[str]:
    if option.at is not option.row:
        yield f"at {option.at.shape}, as the pipeline calls it"
    if not others:
        yield "nothing else was measured"
    faster = [o for o in others if latency(o.at) < latency(option.at)]
    for other in faster[:3]:
        missed = quality_misses(other.row, wishes)
        ratio = latency(option.at) / latency(other.at)
        because = (
            missed[0][1]
            if missed
            else "within noise, a tie"
            if tied(other.at, option.at)
            else "for all wishes together"
        )
        yield f"{other.row.candidate} is {ratio:.2f}x faster: {because}"
    slower = [o for o in others if o not in faster]
    if slower:
        next_one = slower[0]
        tie = ", a tie decided by quality, memory, simplicity" if tied(option.at, next_one.at) else ""
        yield f"{latency(next_one.at) / latency(option.at):.2f}x faster than the next, {next_one.row.candidate}{tie}"
    if option.row.quality is not None:
        yield f"cosine {option.row.quality.cosine:.6f}"
    if "inconclusive" in (option.row.state, option.at.state):
        yield "INCONCLUSIVE: its rounds do not agree"


def cost_of(run_ms: float, wishes: Wishes) -> Cost:
    """Of runs (images, for a pipeline) on machines like this one, that are paid whole."""
    assert wishes.price_per_hour is not None
    seconds, load = run_ms / 1e3, wishes.load_per_second
    machines = max(1, math.ceil(load * seconds - 1e-9)) if load is not None else None
    return Cost(
        price_per_hour=wishes.price_per_hour,
        per_1000=wishes.price_per_hour * seconds * 1000 / 3600,
        load_per_second=load,
        machines=machines,
        per_month=machines * wishes.price_per_hour * HOURS_OF_MONTH if machines is not None else None,
    )
