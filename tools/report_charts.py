"""Plotly figures of a record, as plain data: latency against quality, and the roofline.

Names come from outside and plotly reads tags in texts, so they are escaped here. Colours of text, grid and paper are
not: the page knows whether it is light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from optimize.profiles.composing import IMAGE, PICKED, image_rows
from optimize.profiles.schema import Limits, Profile, Row

from .report_words import (
    SYMBOLS,
    colour_of,
    cosine,
    decibels,
    groups,
    milliseconds,
    number,
    percent,
    snr_of,
    timed,
)

Figure = dict[str, Any]
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, lower, right and upper edge."""

TOP_DB = 100.0
"""A relative error of 1e-5. What is nearer is drawn here: in fp32 the order of the sums makes the rest."""
PLOT = (340.0, 250.0)
"""Pixels that a chart's texts are placed for; where there are more, they lie further apart."""


def figure(data: list[Any], **layout: Any) -> Figure:
    return {"data": data, "layout": {"margin": {"l": 62, "r": 16, "t": 12, "b": 48}, **layout}}


# --- latency and quality ---------------------------------------------------------------------------------------------


def pareto_figures(profile: Profile) -> list[tuple[str, str, Figure]]:
    """(component, shape, figure), one for each with two candidates or more."""
    found = []
    for component, shape, rows in groups(profile):
        shown = [r for r in timed(rows) if (snr := snr_of(r)) is not None and math.isfinite(snr)]
        if len(shown) > 1:
            found.append((component, shape, pareto(shown, picks_of(profile, component, shape))))
    images = image_rows(profile.rows, profile.pipelines)
    for shape in dict.fromkeys(r.shape for r in images):
        shown = timed(r for r in images if r.shape == shape)
        if len(shown) > 1:
            found.append((f"{IMAGE} (composed)", shape, pareto(shown, {PICKED})))
    return found


def picks_of(profile: Profile, component: str, shape: str) -> set[str]:
    picks = profile.choice.picks if profile.choice else []
    return {f"{p.backend} {p.precision}" for p in picks if (p.component, p.shape) == (component, shape)}


def place(row: Row) -> Point:
    """(latency in ms, quality in dB), as drawn."""
    assert row.timing is not None
    return row.timing.median_ms, min(snr_of(row) or 0.0, TOP_DB)


def front(rows: Iterable[Row]) -> list[Row]:
    """Measured rows that no other beats in both, the fastest first; quality rises along it."""
    kept: list[Row] = []
    for row in sorted((r for r in rows if r.state == "measured"), key=lambda r: (place(r)[0], -place(r)[1])):
        if not kept or place(row)[1] > place(kept[-1])[1]:
            kept.append(row)
    return kept


def pareto(rows: Sequence[Row], picked: set[str]) -> Figure:
    best = front(rows)
    xs, ys = zip(*(place(r) for r in rows), strict=True)
    log = max(xs) / min(xs) > 12
    across = padded([math.log10(x) for x in xs] if log else xs, 0.16)
    up = padded(ys, 0.18)
    line = {"color": "rgba(128,128,128,.65)", "width": 1.5, "dash": "dot"}
    data: list[Any] = [
        {
            "type": "scatter", "mode": "lines", "x": [place(r)[0] for r in best], "y": [place(r)[1] for r in best],
            "line": line, "hoverinfo": "skip",
        }
    ]  # fmt: skip
    named = {r.candidate: r for r in sorted(rows, key=lambda r: r.candidate not in picked)}
    pixels = {
        name: pixel((math.log10(place(r)[0]) if log else place(r)[0], place(r)[1]), across, up)
        for name, r in named.items()
    }
    wanted = [name for name, r in named.items() if r in best or name in picked]
    sides = text_sides(pixels, wanted)
    data += [marked(r, sides.get(r.candidate), r in best, r.candidate in picked) for r in rows]
    return figure(
        data,
        height=330,
        showlegend=False,
        xaxis={"title": {"text": "median latency, ms"}, "type": "log" if log else "linear", "range": across,
               "nticks": 6, **({"tickvals": ticks(min(xs) / 2, max(xs) * 2)} if log else {})},
        yaxis={"title": {"text": "SNR beside eager fp32, dB"}, "range": up},
    )  # fmt: skip


def ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between the two, in ratios that a logarithmic axis is read by."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**d for d in decades for step in (1, 2, 5) if low <= step * 10.0**d <= high]


def padded(values: Sequence[float], share: float) -> list[float]:
    span = max(values) - min(values) or abs(max(values)) or 1.0
    return [min(values) - share * span, max(values) + share * span]


def pixel(at: Point, across: Sequence[float], up: Sequence[float]) -> Point:
    return (
        (at[0] - across[0]) / (across[1] - across[0]) * PLOT[0],
        (at[1] - up[0]) / (up[1] - up[0]) * PLOT[1],
    )


TEXT = (6.3, 13.0)
"""Width of a letter and height of a line, in pixels."""
SIDES: Mapping[str, Point] = {
    "top center": (-0.5, 9),
    "bottom center": (-0.5, -22),
    "middle right": (0, -6),
    "middle left": (-1, -6),
    "top left": (-1, 9),
    "bottom right": (0, -22),
    "bottom left": (-1, -22),
    "top right": (0, 9),
}
"""Where a text stands: its left edge from the point in widths of the text, its lower edge in pixels."""


def text_sides(points: Mapping[str, Point], wanted: Sequence[str]) -> dict[str, str]:
    """Name -> the first side where its text covers no point, no other text and no border; without one it has none."""
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in points.values()]
    found = {}
    for name in wanted:
        for side in SIDES:
            box = text_box(points[name], name, side)
            inside = box[0] >= 0 and box[2] <= PLOT[0] + 14 and box[1] >= 0 and box[3] <= PLOT[1]
            if inside and not any(overlap(box, other) for other in taken):
                found[name] = side
                taken.append(box)
                break
    return found


def text_box(at: Point, text: str, side: str) -> Box:
    left, low = SIDES[side]
    gap = {0.0: 11, -1.0: -11}.get(left, 0)
    wide = TEXT[0] * (len(text) + 2)  # a star may follow
    return at[0] + left * wide + gap, at[1] + low, at[0] + (left + 1) * wide + gap, at[1] + low + TEXT[1]


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def marked(row: Row, side: str | None, on_front: bool, picked: bool) -> Any:
    x, y = place(row)
    sure = row.state == "measured"
    colour = colour_of(row.backend)
    return {
        "type": "scatter", "mode": "markers+text" if side else "markers", "x": [x], "y": [y],
        "text": [escape(row.candidate) + (" ★" if picked else "")], "textposition": side or "top center",
        "textfont": {"size": 11}, "cliponaxis": False,
        "marker": {"symbol": SYMBOLS.get(row.precision, "cross") + ("" if sure else "-open"),
                   "size": 16 if picked else 11, "color": colour, "opacity": 1 if on_front or picked else 0.7,
                   "line": {"width": 2.5 if picked else 1 if sure else 2,
                            "color": "rgba(128,128,128,.9)" if picked else colour}},
        "hovertemplate": told(row, "picked" if picked else "") + "<extra></extra>",
    }  # fmt: skip


def told(row: Row, mark: str = "") -> str:
    assert row.timing is not None
    t = row.timing
    lines = [f"<b>{escape(row.candidate)}</b>{f' · {mark}' if mark else ''}"]
    lines += [f"{milliseconds(t.median_ms)}  (p10 {milliseconds(t.p10_ms)}, p90 {milliseconds(t.p90_ms)})"]
    if row.quality:
        lines.append(f"SNR {decibels(row.quality.snr_db)}, cosine {cosine(row.quality.cosine)}")
    else:
        lines.append(f"SNR {decibels(snr_of(row))} by parity")
    if row.state != "measured":
        lines.append(f"<i>{escape(row.state)}</i>")
    return "<br>".join(lines).replace("%{", "%&#123;")  # plotly would put values into it


# --- the roofline ----------------------------------------------------------------------------------------------------


def roofline_figures(profile: Profile) -> list[tuple[str, str, Figure]]:
    """("", shape, figure): all components of a shape under one roof."""
    limits = profile.limits
    if limits is None or not limits.peak_gflops:
        return []
    shapes = dict.fromkeys(r.shape for r in profile.rows)
    pairs = [(s, [r for r in profile.rows if r.shape == s and r.roofline and r.timing]) for s in shapes]
    return [("", s, roofline(rows, limits)) for s, rows in pairs if rows]


def roofline(rows: Sequence[Row], limits: Limits) -> Figure:
    places = [(r.roofline.intensity, r.roofline.gflops) for r in rows if r.roofline]
    knees = [peak / limits.bandwidth_gbs for peak in limits.peak_gflops.values()]
    low = min(x for x, _ in places if x > 0) / 3 if any(x > 0 for x, _ in places) else min(knees) / 10
    left, right = min(low, min(knees) / 3), max(max(x for x, _ in places) * 4, max(knees) * 6)
    used = {r.roofline.precision for r in rows if r.roofline}
    data = roofs(limits, left, right, used) + [on_roofline(r) for r in rows]
    bottom = min(min(y for _, y in places) / 2, limits.bandwidth_gbs * left)
    top = max(limits.peak_gflops.values()) * 1.7
    low_rate = max(bottom, top / 1e4)
    return figure(
        data,
        height=460,
        showlegend=False,
        annotations=roof_words(limits, right) + component_words(rows),
        xaxis={"title": {"text": "operations per byte"}, "type": "log",
               "range": [math.log10(left), math.log10(right)], "tickvals": ticks(left, right)},
        yaxis={"title": {"text": "GFLOP/s"}, "type": "log",
               "range": [math.log10(low_rate), math.log10(top)], "tickvals": ticks(low_rate, top)},
    )  # fmt: skip


def roofs(limits: Limits, left: float, right: float, used: set[str]) -> list[Any]:
    """The slope of the bandwidth, and a flat roof from where it meets each precision's peak."""
    slope, found = limits.bandwidth_gbs, []
    for precision, peak in limits.peak_gflops.items():
        knee = peak / slope
        found.append(
            {
                "type": "scatter", "mode": "lines", "x": [left, knee, right], "y": [slope * left, peak, peak],
                "line": {"width": 2 if precision in used else 1, "color": "rgba(128,128,128,.8)",
                         "dash": "solid" if precision in used else "dot"},
                "hovertemplate": f"<b>{escape(precision)}</b> {number(peak)} GFLOP/s<br>"
                f"{number(slope)} GB/s, {escape(limits.how)}<extra></extra>",
            }
        )  # fmt: skip
    return found


def roof_words(limits: Limits, right: float) -> list[Any]:
    """One text for roofs that lie too near to each other for two."""
    merged: list[tuple[float, list[str]]] = []
    for precision, peak in sorted(limits.peak_gflops.items(), key=lambda item: item[1]):
        words = f"{escape(precision)} {number(peak)}"
        if merged and peak / merged[-1][0] < 1.35:
            merged[-1] = (peak, [*merged[-1][1], words])
        else:
            merged.append((peak, [words]))
    return [
        {"x": math.log10(right), "y": math.log10(peak), "xref": "x", "yref": "y", "text": " · ".join(words),
         "showarrow": False, "xanchor": "right", "yanchor": "bottom", "font": {"size": 11}}
        for peak, words in merged
    ]  # fmt: skip


def component_words(rows: Sequence[Row]) -> list[Any]:
    """The components' names under their points; those that stand near to each other on lines of their own."""
    lowest: dict[str, Point] = {}
    for row in rows:
        if row.roofline and row.roofline.intensity > 0:
            here = (row.roofline.intensity, row.roofline.gflops)
            lowest[row.component] = min(lowest.get(row.component, here), here, key=lambda p: p[1])
    placed: list[tuple[float, int]] = []
    found = []
    for name, (x, y) in sorted(lowest.items(), key=lambda item: item[1]):
        line = sum(abs(math.log10(x / other)) < 0.35 for other, _ in placed)
        placed.append((x, line))
        found.append(
            {"x": math.log10(x), "y": math.log10(y), "text": escape(name), "showarrow": line > 0, "arrowwidth": 0.6,
             "arrowhead": 0, "ax": 0, "ay": 18 + 15 * line, "yshift": -14 if line == 0 else 0, "standoff": 7,
             "font": {"size": 11}}
        )  # fmt: skip
    return found


def on_roofline(row: Row) -> Any:
    roof = row.roofline
    assert roof is not None
    words = (
        f"<b>{escape(row.component)}</b> · {escape(row.candidate)}<br>{number(roof.gflops)} GFLOP/s, "
        f"{number(roof.gbs)} GB/s<br>{percent(roof.share)} of what {escape(roof.precision)} allows, bound by "
        f"{roof.bound}<extra></extra>"
    )
    return {
        "type": "scatter", "mode": "markers", "x": [roof.intensity], "y": [roof.gflops],
        "marker": {"symbol": SYMBOLS.get(row.precision, "cross"), "size": 10, "color": colour_of(row.backend),
                   "opacity": 0.9, "line": {"width": 0.5, "color": "rgba(255,255,255,.5)"}},
        "hovertemplate": words.replace("%{", "%&#123;"),
    }  # fmt: skip
