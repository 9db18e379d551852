"""What each section of the report's page shows, as words and shares that a template lays out. None: nothing to show."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from optimize.profiles.schema import Pick, Profile, Row

from .report_charts import pareto_figures, roofline_figures
from .report_words import (
    colour_of,
    cosine,
    decibels,
    fastest,
    groups,
    milliseconds,
    money,
    number,
    percent,
    shapes_of,
    size,
    sizes_words,
    snr_of,
    timed,
    times,
)

View = dict[str, Any]


# --- the answer ------------------------------------------------------------------------------------------------------


def answer(profile: Profile) -> View | None:
    choice = profile.choice
    cards = [pick_card(profile, p) for p in choice.picks] if choice else fastest_cards(profile)
    if not cards and choice is None:
        return None
    return {
        "cards": cards,
        "by_shape": len({c["shape"] for c in cards}) > 1,  # else it stays, whatever sizes are shown
        "chosen": choice is not None,
        "wishes": choice.wishes if choice else [],
        "met": choice.met if choice else True,
        "missed": choice.missed if choice else (),
        "pipeline": pipeline_fact(profile),
        "cost": cost_facts(profile),
    }


def pick_card(profile: Profile, pick: Pick) -> View:
    row = row_of(profile, pick)
    return {
        "component": pick.component,
        "shape": pick.shape,
        "measured_at": row.shape if row else pick.shape,
        "backend": pick.backend,
        "precision": pick.precision,
        "colour": colour_of(pick.backend),
        "latency": milliseconds(pick.latency_ms),
        "speed": speed_words(row),
        "quality": quality_words(row, pick.cosine),
        "memory": size(pick.memory_bytes) if pick.memory_bytes is not None else "",
        "why": pick.why,
        "runner_up": pick.runner_up,
        "state": row.state if row else "",
    }


def row_of(profile: Profile, pick: Pick) -> Row | None:
    """The row that a pick's figures are of: that of its sizes, or of those at which the pipeline calls it (a batch that
    guidance doubles), which has its latency."""
    named = (pick.component, pick.backend, pick.precision)
    rows = [r for r in timed(profile.rows) if (r.component, r.backend, r.precision) == named]
    rows.sort(key=lambda r: (r.timing is None or r.timing.median_ms != pick.latency_ms, r.shape != pick.shape))
    return rows[0] if rows else None


def fastest_cards(profile: Profile) -> list[View]:
    """Nothing was asked for: the fastest measured candidate of each, called so."""
    winners = [(w, rows) for _, _, rows in groups(profile) if (w := fastest(rows))]
    cards = []
    for row, rows in winners:
        after = [r for r in timed(rows) if r.state == "measured" and r is not row]
        memory = (row.memory.device or row.memory.host) if row.memory else None
        pick = Pick(
            component=row.component,
            shape=row.shape,
            backend=row.backend,
            precision=row.precision,
            latency_ms=row.timing.median_ms if row.timing else 0,
            cosine=row.quality.cosine if row.quality else None,
            memory_bytes=memory,
            why="the fastest that was measured; no wish for quality or memory was given",
            runner_up=f"{after[0].candidate}, {milliseconds(after[0].timing.median_ms)}"
            if after and after[0].timing
            else "",
        )
        cards.append(pick_card(profile, pick))
    return cards


def speed_words(row: Row | None) -> str:
    """Against the reference of its ratio, which names itself."""
    if row is None or row.ratio is None or row.candidate == row.ratio.to:
        return ""
    ratio, to = row.ratio.value, row.ratio.to
    return f"{number(1 / ratio)}x faster than {to}" if ratio < 1 else f"{number(ratio)}x slower than {to}"


def quality_words(row: Row | None, value: float | None) -> str:
    if value is None:
        return f"SNR {decibels(snr_of(row))}" if row is not None and snr_of(row) is not None else ""
    return f"cosine {cosine(value)}" + (f" · SNR {decibels(snr_of(row))}" if row is not None else "")


def pipeline_fact(profile: Profile) -> View | None:
    time = profile.choice.pipeline if profile.choice else None
    if time is None:
        return None
    per = f"{time.steps} steps, {'with' if time.guidance else 'without'} guidance, {time.shape}"
    measured = f"{milliseconds(time.measured_ms)} measured end to end" if time.measured_ms else ""
    return {"time": milliseconds(time.composed_ms), "per": per, "measured": measured}


def cost_facts(profile: Profile) -> list[tuple[str, str]]:
    cost = profile.choice.cost if profile.choice else None
    if cost is None or profile.choice is None:
        return []
    what = "images" if profile.choice.pipeline else "runs"
    facts = [(money(cost.per_1000, cost.currency), f"per 1000 {what} at {money(cost.price_per_hour, cost.currency)}/h")]
    if cost.per_month is not None:
        load = f" for {cost.load_per_second:g} {what} a second" if cost.load_per_second else ""
        machines = f" on {cost.machines} machine{'s' * (cost.machines != 1)}" if cost.machines else ""
        facts.append((money(cost.per_month, cost.currency), f"per month{load}{machines}"))
    return facts


# --- what to know before believing it --------------------------------------------------------------------------------


def notes(profile: Profile) -> View | None:
    load, found = profile.load, []
    if load.busy:
        found.append(("bad", "The machine was busy", f"{percent(load.others)} of its cores went to other processes and "
                      f"{percent(load.stolen)} to other guests of the host: figures are suspect."))  # fmt: skip
    if load.gpu_throttled:
        found.append(("bad", "The GPU was throttled", ", ".join(load.gpu_throttled)))
    total = len(profile.rows)
    for state, title, words in (
        (
            "inconclusive",
            f"of {total} inconclusive",
            "their rounds do not agree. Each counts as its slow rounds (the upper quartile) in the ranking.",
        ),
        ("failed", "failed", "the reasons stand with the latencies."),
    ):
        rows = [r for r in profile.rows if r.state == state]
        if rows:
            found.append(("warn", f"{len(rows)} {title}", f"{names_of(rows)}: {words}"))
    found += [("note", "Note", text) for text in profile.notes]
    return {"notes": found} if found else None


MOST_NAMES = 4


def names_of(rows: Sequence[Row]) -> str:
    names = [f"{r.component} {r.candidate} ({r.shape})" for r in rows]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


# --- latency ---------------------------------------------------------------------------------------------------------


def latency(profile: Profile) -> View | None:
    charts = []
    for component, shape, rows in groups(profile):
        shown = timed(rows)
        most = max((r.timing.p90_ms for r in shown if r.timing), default=0.0) or 1.0
        charts.append(
            {
                "component": component,
                "shape": shape,
                "sizes": sizes_words(rows[0].sizes),
                "bars": [latency_bar(r, most, r is fastest(rows)) for r in shown],
                "without": [r for r in rows if r.timing is None],
            }
        )
    reference = ", ".join(dict.fromkeys(r.ratio.to for r in profile.rows if r.ratio))
    return {"charts": charts, "reference": reference} if charts else None


def latency_bar(row: Row, most: float, wins: bool) -> View:
    t = row.timing
    assert t is not None
    lines = [
        f"{row.component} · {row.candidate}",
        f"median {milliseconds(t.median_ms)} of {t.runs} runs ({t.clock})",
        f"p10 {milliseconds(t.p10_ms)} · p90 {milliseconds(t.p90_ms)} · p99 {milliseconds(t.p99_ms)}",
        f"spread of rounds {percent(t.spread)} · drift {percent(t.drift)}",
    ]
    if row.ratio:
        ratio = row.ratio
        lines.append(f"{number(ratio.value)} of {ratio.to} ({number(ratio.low)} to {number(ratio.high)})")
    if row.throughput_per_s:
        lines.append(f"{number(row.throughput_per_s)} per second")
    if row.state != "measured":
        lines.append(f"{row.state}: {row.why}" if row.why else row.state)
    lines += row.notes
    return {
        "backend": row.backend,
        "precision": row.precision,
        "colour": colour_of(row.backend),
        "width": share(t.median_ms, most),
        "low": share(t.p10_ms, most),
        "high": share(t.p90_ms, most),
        "text": milliseconds(t.median_ms),
        "speed": times(row.ratio.value) if row.ratio else "",
        "wins": wins,
        "unsure": row.state != "measured",
        "tip": "\n".join(lines),
    }


def share(value: float, most: float) -> float:
    """Percent of a bar's room."""
    return round(min(max(100 * value / most, 0.0), 100.0), 3) if most > 0 else 0.0


# --- charts ----------------------------------------------------------------------------------------------------------


def charts_of(kind: str, figures: Callable[[Profile], list[tuple[str, str, Any]]]) -> Callable[[Profile], View | None]:
    def view(profile: Profile) -> View | None:
        charts = [
            {"id": f"{kind}-{i}", "component": component, "shape": shape, "figure": made}
            for i, (component, shape, made) in enumerate(figures(profile))
        ]
        return {"charts": charts, "limits": profile.limits} if charts else None

    return view


pareto = charts_of("pareto", pareto_figures)
roofline = charts_of("roofline", roofline_figures)


def shape_pills(profile: Profile) -> list[str]:
    shapes = shapes_of(profile)
    return shapes if len(shapes) > 1 else []


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)
