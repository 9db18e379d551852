"""Views of the report on everything in one table, where and how it was measured, and how to measure it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optimize.profiles.schema import Profile, Row

from .report_views import View
from .report_words import (
    NONE,
    colour_of,
    cosine,
    decibels,
    milliseconds,
    number,
    percent,
    seconds,
    size,
    sizes_words,
)

Cell = tuple[str, float | None]
"""A text, and the number to sort by."""


def table(profile: Profile) -> View | None:
    if not profile.rows:
        return None
    cells = [(row, {name: column.of(row) for name, column in COLUMNS.items()}) for row in profile.rows]
    names = [n for n in COLUMNS if any(c[n][0] != NONE for _, c in cells)]  # a column that nobody fills is left out
    return {
        "names": names,
        "rows": [
            {
                "component": row.component,
                "shape": row.shape,
                "sizes": sizes_words(row.sizes),
                "backend": row.backend,
                "precision": row.precision,
                "colour": colour_of(row.backend),
                "state": row.state,
                "why": " · ".join(filter(None, (row.why, *row.notes))),
                "cells": [c[n] for n in names],
            }
            for row, c in cells
        ],
    }


@dataclass(frozen=True)
class Column:
    """`paths` lead from a row to its figure, the first that is there: "timing.median_ms"."""

    paths: tuple[str, ...]
    text: Callable[[float], str] = milliseconds

    def of(self, row: Row) -> Cell:
        for path in self.paths:
            value: Any = row
            for name in path.split("."):
                value = None if value is None else getattr(value, name)
            if value is not None:
                return self.text(value), float(f"{value:.6g}")
        return NONE, None


COLUMNS: Mapping[str, Column] = {
    "median": Column(("timing.median_ms",)),
    "p10": Column(("timing.p10_ms",)),
    "p90": Column(("timing.p90_ms",)),
    "p95": Column(("timing.p95_ms",)),
    "p99": Column(("timing.p99_ms",)),
    "runs": Column(("timing.runs",), str),
    "spread": Column(("timing.spread",), percent),
    "drift": Column(("timing.drift",), percent),
    "ratio": Column(("ratio.value",), number),
    "per second": Column(("throughput_per_s",), number),
    "CPU time": Column(("timing.cpu_ms",)),
    "off by": Column(("parity.relative",), "{:.1e}".format),
    "limit": Column(("parity.limit",), "{:.1e}".format),
    "cosine": Column(("quality.cosine",), cosine),
    "SNR": Column(("quality.snr_db",), decibels),
    "load": Column(("preparation.load_s",), seconds),
    "compile": Column(("preparation.compile_s", "preparation.build_s"), seconds),
    "first run": Column(("preparation.first_ms",)),
    "artifact": Column(("preparation.artifact_bytes",), size),
    "host memory": Column(("memory.host",), size),
    "device memory": Column(("memory.device",), size),
    "energy": Column(("energy_j",), lambda joules: f"{number(joules)} J"),
    "GFLOP/s": Column(("roofline.gflops",), number),
    "GB/s": Column(("roofline.gbs",), number),
    "of limit": Column(("roofline.share",), percent),
}


# --- where and how ---------------------------------------------------------------------------------------------------


def environment(profile: Profile) -> View:
    m, load = profile.machine, profile.load
    machine = [
        ("processor", m.cpu),
        ("cores, threads used", f"{m.cores}, {m.threads}"),
        ("vector units", ", ".join(m.vector)),
        ("memory", size(m.memory_bytes)),
        ("system", m.system),
        ("device", m.device),
        ("key", m.key),
    ]
    during = [
        ("measured for", seconds(load.seconds)),
        ("cores taken by others", percent(load.others)),
        ("stolen by the host", percent(load.stolen)),
        ("busy", "yes: figures are suspect" if load.busy else "no"),
    ]
    if load.gpu_clock_sm_mhz:
        during.append(("GPU clock", "{:.0f} to {:.0f} MHz".format(*load.gpu_clock_sm_mhz)))
    if load.gpu_temperature_c:
        during.append(("GPU temperature", "{:.0f} to {:.0f} °C".format(*load.gpu_temperature_c)))
    if load.gpu_throttled:
        during.append(("GPU throttled", ", ".join(load.gpu_throttled)))
    versions = sorted(m.versions.items())
    made = [("made", profile.made), ("source", profile.source), ("commit", m.commit or NONE)]
    parts = [("Record", made), ("Machine", machine), ("GPU", gpu_facts(profile)), ("While it ran", during)]
    if profile.limits:
        parts.append(("Limits", limit_facts(profile)))
    return {"parts": [p for p in [*parts, ("Versions", versions)] if p[1]]}


def gpu_facts(profile: Profile) -> list[tuple[str, str]]:
    g = profile.machine.gpu
    if g is None:
        return []
    known = [
        ("name", g.name),
        ("SM", str(g.sm)),
        ("memory", size(g.memory_bytes)),
        ("driver", g.driver),
        ("power limit", f"{number(g.power_limit_w)} W" if g.power_limit_w else ""),
        ("SM clock", f"{g.clock_sm_mhz:.0f} MHz" if g.clock_sm_mhz else ""),
        ("highest SM clock", f"{g.clock_sm_max_mhz:.0f} MHz" if g.clock_sm_max_mhz else ""),
        ("memory clock", f"{g.clock_memory_mhz:.0f} MHz" if g.clock_memory_mhz else ""),
        ("temperature", f"{g.temperature_c:.0f} °C" if g.temperature_c else ""),
        ("persistence", {True: "on", False: "off", None: ""}[g.persistence]),
    ]
    return [(name, value) for name, value in known if value]


def limit_facts(profile: Profile) -> list[tuple[str, str]]:
    limits = profile.limits
    assert limits is not None
    facts = [("of", f"{limits.target}, {limits.how}"), ("bandwidth", f"{number(limits.bandwidth_gbs)} GB/s")]
    facts += [(f"peak {name}", f"{number(peak)} GFLOP/s") for name, peak in limits.peak_gflops.items()]
    return facts + [("source", s) for s in limits.sources]


def method(profile: Profile) -> View:
    s = profile.settings
    clocks = sorted({r.timing.clock for r in profile.rows if r.timing})
    facts = [
        ("rounds", f"{s.rounds}, over all candidates of a component, in random order (seed {s.seed})"),
        ("in each round", f"a burst of {milliseconds(s.burst_ms)} per candidate after {milliseconds(s.warmup_ms)} of "
         "warming up"),
        ("clock", ", ".join(clocks) or NONE),
        ("stable", f"first and last rounds agree within {percent(s.drift)}, and the rounds' medians spread by at most "
         f"{percent(s.spread)}"),
        *([("turns", f"of {milliseconds(s.turn_ms)}; one beside which a fixed piece of work is over {percent(s.pace)} "
            "slower than its best is put off or made again")] if s.turn_ms else []),
        ("else", f"measured again, at most {s.attempts} times; then the row is inconclusive"),
        ("cache", "cold: flushed before each run" if s.cold_cache else "warm, as in a loop"),
        ("quality", f"{s.samples} samples" if s.samples else "no samples: parity on the measured feeds alone"),
    ]  # fmt: skip
    rules = list(dict.fromkeys(f"{r.precision}: {r.parity.rule}" for r in profile.rows if r.parity))
    data = list(dict.fromkeys(r.quality.data for r in profile.rows if r.quality))
    return {"facts": facts, "rules": rules, "data": data}


def reproduce(profile: Profile) -> View | None:
    return {"command": profile.command} if profile.command else None
