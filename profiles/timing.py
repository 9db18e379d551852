"""Latencies that can be trusted: candidates take turns in random order, until the rounds agree, or it is said that they
do not.

A round gives each candidate one burst of runs, after a short warm-up of its own that brings caches and clocks back. On
a CPU the burst is made in short turns, and a fixed piece of work is timed right before and after each: where it takes
longer than at its best, others slow the machine down (its host's other guests do it unseen), and the turn is put off or
made again. The rule of `stable` asks whether the last rounds are as fast as the first ones and how far the rounds lie
apart; a measurement that breaks it is made again, all candidates together, and in the end called inconclusive.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from optimize.errors import GateError, OptimizeError

from .schema import Ratio, RowParity, Settings, Timing

Say = Callable[[str], None]
MOST_RUNS = 2000
"""Of a burst: more tell nothing more."""
PACE_SIDE, PACE_TIMES, PACE_PAUSE_S = 192, 6, 0.03
"""The side of square matrices that are multiplied to see the machine's pace, how often, and how long it is left alone
between."""
CACHE_BYTES = 256 << 20
"""Written between runs where caches are to be cold: more than any GPU's L2 and most CPUs' last cache."""


class SideFailedError(OptimizeError):
    """A candidate that can go on no more: its process died, or its backend raised. The others go on."""


@dataclass(frozen=True)
class Burst:
    """Runs in a row: milliseconds of each, processor milliseconds and joules per run; the slower pace beside it."""

    times_ms: Sequence[float]
    cpu_ms: float | None = None
    energy_j: float | None = None
    pace_ms: float | None = None


class Side(Protocol):
    """A candidate that is ready to run, in this process or in one of its own. Raises SideFailedError."""

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst: ...


@dataclass
class Pace:
    """The machine's own speed, by what a fixed piece of work takes (`read`, milliseconds) before and after each burst.
    It is waited for, and bursts beside a slower one are made again, for `patience_s` seconds in all."""

    slower: float
    patience_s: float
    read: Callable[[], float]
    best_ms: float = math.inf

    def disturbed(self, ms: float | None) -> bool:
        return ms is not None and ms > self.best_ms * (1 + self.slower)

    def now(self) -> float:
        found = self.read()
        self.best_ms = min(self.best_ms, found)
        return found

    def burst(self, make: Callable[[], Burst]) -> Burst:
        """The calmest of as many bursts as it takes."""
        found: Burst | None = None
        while found is None or (self.disturbed(found.pace_ms) and self.patience_s > 0):
            start = time.monotonic()
            while self.disturbed(before := self.now()) and time.monotonic() - start < self.patience_s:
                time.sleep(PACE_PAUSE_S)
            waited = time.monotonic() - start
            burst = make()
            ms = max(before, self.now())
            if found is None or ms < (found.pace_ms or 0.0):
                found = replace(burst, pace_ms=ms)
            self.patience_s -= time.monotonic() - start if self.disturbed(ms) else waited
        return found


@dataclass
class Measured:
    """What was found of each candidate. `failed` says why one has no figures."""

    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    energy_j: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    sides: Mapping[str, Side],
    parity: Mapping[str, RowParity],
    settings: Settings,
    *,
    device: str = "cpu",
    reference: str | None = None,
    say: Say = lambda _: None,
    after_round: Callable[[], None] = lambda: None,
    pace: Callable[[], float] | None = None,
) -> Measured:
    """Latencies of all sides, and their ratios to `reference` round by round. `pace` tells the machine's (see `Pace`).

    Raises GateError for a side without a passed parity: nothing is timed that was not seen to be right.
    """
    for name in sides:
        if name not in parity or not parity[name].passed:
            raise GateError(
                f"{name} is not timed: its outputs were not seen to be right",
                got="no parity" if name not in parity else f"{parity[name].output} off by {parity[name].relative:.2g}",
                expected="a passed parity",
                mend="compare its outputs with the reference's first",
            )
    order, failed = random.Random(settings.seed), dict[str, str]()
    planned_s = settings.rounds * len(sides) * (settings.burst_ms + settings.warmup_ms) / 1e3
    beside = Pace(settings.pace, settings.patience * planned_s, pace) if pace else None
    best: dict[str, list[Burst]] = {}
    for attempt in range(1, settings.attempts + 1):
        rounds = rounds_of(
            {n: s for n, s in sides.items() if n not in failed}, settings, order, failed, beside, say, after_round
        )
        better = not best or wobbly(rounds, settings) <= wobbly({n: best[n] for n in rounds}, settings)
        best = rounds if better else {n: best[n] for n in rounds}
        if not wobbly(best, settings):
            break
        say(f"the rounds do not agree: again ({attempt} of {settings.attempts})")
    found = Measured(failed=failed)
    for name, bursts in best.items():
        disturbed = sum(beside.disturbed(b.pace_ms) for b in bursts) if beside else 0
        found.timings[name] = timing_of(bursts, settings, device, attempt, disturbed)
        if joules := [b.energy_j for b in bursts if b.energy_j is not None]:
            found.energy_j[name] = float(np.median(joules))
    for name in found.timings if reference in found.timings else ():
        found.ratios[name] = ratio_of(found.timings[name], found.timings[str(reference)], str(reference))
    return found


def rounds_of(
    sides: Mapping[str, Side],
    settings: Settings,
    order: random.Random,
    failed: dict[str, str],
    pace: Pace | None,
    say: Say,
    after_round: Callable[[], None],
) -> dict[str, list[Burst]]:
    """`settings.rounds` bursts of each side, in a new order in each turn. A side that fails goes to `failed`."""
    found: dict[str, list[Burst]] = {name: [] for name in sides}
    turns = max(1, round(settings.burst_ms / settings.turn_ms)) if settings.turn_ms else 1
    for i in range(settings.rounds):
        say(f"round {i + 1} of {settings.rounds}")
        parts: dict[str, list[Burst]] = {name: [] for name in found}
        for turn in range(turns):
            waiting = [n for n in parts if sum(sum(b.times_ms) for b in parts[n]) < settings.burst_ms]
            for name in order.sample(waiting, len(waiting)):
                warmup_ms = 0.0 if turn else settings.warmup_ms  # later ones are warmed up by a single run
                make = partial(sides[name].burst, settings.burst_ms / turns, warmup_ms, settings.cold_cache)
                try:
                    parts[name].append(pace.burst(make) if pace else make())
                except OptimizeError as e:
                    failed[name] = str(e)
                    del parts[name], found[name]
        for name, bursts in parts.items():
            found[name].append(joined(bursts))
        after_round()
    return found


def joined(bursts: Sequence[Burst]) -> Burst:
    """The turns of a round, as one burst."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            return None
        return float(np.average(known, weights=[len(b.times_ms) for b in bursts]))

    paces = [b.pace_ms for b in bursts if b.pace_ms is not None]
    return Burst(
        [t for b in bursts for t in b.times_ms],
        mean([b.cpu_ms for b in bursts]),
        mean([b.energy_j for b in bursts]),
        float(np.median(paces)) if paces else None,
    )


def wobbly(rounds: Mapping[str, Sequence[Burst]], settings: Settings) -> int:
    """How many sides break the rule of stability."""
    return sum(not stable(medians_of(bursts), settings) for bursts in rounds.values())


def medians_of(bursts: Sequence[Burst]) -> list[float]:
    return [float(np.median(b.times_ms)) for b in bursts]


def drift_of(medians: Sequence[float]) -> float:
    """The median of the last third of the rounds over that of the first, less one."""
    third = max(1, len(medians) // 3)
    return float(np.median(medians[-third:]) / np.median(medians[:third])) - 1


def spread_of(medians: Sequence[float]) -> float:
    low, middle, high = np.percentile(medians, (10, 50, 90))
    return float((high - low) / middle)


def stable(medians: Sequence[float], settings: Settings) -> bool:
    return abs(drift_of(medians)) <= settings.drift and spread_of(medians) <= settings.spread


def timing_of(bursts: Sequence[Burst], settings: Settings, device: str, attempts: int, disturbed: int = 0) -> Timing:
    medians, every = medians_of(bursts), np.concatenate([np.asarray(b.times_ms) for b in bursts])
    p10, p90, p95, p99 = (float(p) for p in np.percentile(every, (10, 90, 95, 99)))
    cpu = [b.cpu_ms for b in bursts if b.cpu_ms is not None]
    return Timing(
        median_ms=float(np.median(medians)),
        p10_ms=p10,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        runs=len(every),
        rounds_ms=medians,
        spread=spread_of(medians),
        drift=drift_of(medians),
        attempts=attempts,
        stable=stable(medians, settings),
        disturbed=disturbed,
        clock="cuda events" if device == "cuda" else "monotonic",
        cpu_ms=float(np.median(cpu)) if cpu else None,
    )


def ratio_of(timing: Timing, reference: Timing, name: str) -> Ratio:
    """Round by round, so that what slowed both sides down cancels."""
    each = np.asarray(timing.rounds_ms) / np.asarray(reference.rounds_ms)
    low, value, high = (float(p) for p in np.percentile(each, (10, 50, 90)))
    return Ratio(to=name, value=value, low=low, high=high)


# --- the machine's pace ----------------------------------------------------------------------------------------------


def pace_of(device: str, threads: int = 0) -> Callable[[], float] | None:
    """What `measure` wants of a CPU; a GPU's clocks are on record."""
    return partial(cpu_pace, threads) if device == "cpu" else None


def cpu_pace(threads: int = 0) -> float:
    """Milliseconds of a fixed piece of work on a CPU, by as many threads of torch's on the cores that candidates have,
    on data that stay in a core's own cache. The least of a few: what does not last for all is no change of pace."""
    import torch

    times = list[float]()
    a, out = torch.full((PACE_SIDE, PACE_SIDE), 0.63), torch.empty(PACE_SIDE, PACE_SIDE)
    with on_cores(threads):
        for _ in range(PACE_TIMES):
            start = time.perf_counter()
            for _ in range(4):
                torch.mm(a, a, out=out)
            times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def cores_for(threads: int) -> set[int]:
    """Where so many threads run: each on a core, always the same ones; 0 for all that there are."""
    return set(sorted(os.sched_getaffinity(0))[: threads or None])


@contextlib.contextmanager
def on_cores(threads: int) -> Iterator[None]:
    """torch with so many threads, and this thread on their cores; 0 changes nothing."""
    import torch

    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(threads or before)
    os.sched_setaffinity(0, cores_for(threads))
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)


# --- a burst in this process ------------------------------------------------------------------------------------------


def burst_of(run: Callable[[], Any], device: str, ms: float, warmup_ms: float, cold: bool) -> Burst:
    """Runs for about `ms` milliseconds after `warmup_ms` (each at least once); the collector rests meanwhile."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return (cuda_burst if device == "cuda" else cpu_burst)(run, ms, warmup_ms, cold)
    finally:
        if collecting:
            gc.enable()


def cpu_burst(run: Callable[[], Any], ms: float, warmup_ms: float, cold: bool) -> Burst:
    flush, clock = flusher("cpu") if cold else None, time.perf_counter
    end = clock() + warmup_ms / 1e3
    run()
    while clock() < end:
        run()
    times: list[float] = []
    cpu, end = 0.0, clock() + ms / 1e3
    while not times or (clock() < end and len(times) < MOST_RUNS):
        if flush:
            flush()
        spent, start = time.process_time(), clock()
        run()
        stop = clock()
        times.append(1e3 * (stop - start))
        cpu += time.process_time() - spent
    return Burst(times, 1e3 * cpu / len(times))


def cuda_burst(run: Callable[[], Any], ms: float, warmup_ms: float, cold: bool) -> Burst:
    """By CUDA events on torch's stream. Runs are queued without waiting, as a loop of a pipeline does."""
    import torch

    from .machine import gpu_joules

    flush = flusher("cuda") if cold else None
    begin, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - begin < warmup_ms / 1e3:
        run()
        torch.cuda.synchronize()
        runs += 1
    each = (time.perf_counter() - begin) / runs
    count = max(1, min(MOST_RUNS, int(ms / 1e3 / max(each, 1e-6))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    joules, spent = gpu_joules(), time.process_time()
    for start, stop in events:
        if flush:
            flush()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    used, cpu = gpu_joules(), time.process_time() - spent
    energy = (used - joules) / count if used is not None and joules is not None and not cold else None
    return Burst([start.elapsed_time(stop) for start, stop in events], 1e3 * cpu / count, energy)


def flusher(device: str) -> Callable[[], Any]:
    """Writes more than the caches hold."""
    import torch

    buffer = torch.zeros(CACHE_BYTES // 4, dtype=torch.float32, device=device)
    return lambda: buffer.add_(1.0)
