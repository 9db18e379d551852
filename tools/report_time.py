"""Views of the report on time per image, on operators and modules, on what is paid before the first result and in
memory, and on what was not measured or was before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from optimize.profiles.schema import Breakdown, PipelineTime, Profile

from .report_modules import treemap
from .report_views import View, share
from .report_words import (
    NONE,
    colour_of,
    groups,
    milliseconds,
    number,
    operator_colours,
    percent,
    seconds,
    series_colours,
    size,
    wait_s,
)

OUTSIDE = "outside of kernels"
MOST_ROWS = 40


# --- time per image --------------------------------------------------------------------------------------------------


def pipelines(profile: Profile) -> View | None:
    if not profile.pipelines:
        return None
    colours = series_colours(part.component for p in profile.pipelines for part in p.parts)
    charts = []
    for shape in dict.fromkeys(p.shape for p in profile.pipelines):
        here = [p for p in profile.pipelines if p.shape == shape]
        most = max(max(p.composed_ms, p.measured_ms or 0.0) for p in here)
        first = here[0]
        charts.append(
            {
                "shape": shape,
                "setting": f"{first.steps} steps, {'with' if first.guidance else 'without'} guidance",
                "bars": [pipeline_bar(p, most, colours) for p in sorted(here, key=lambda p: p.composed_ms)],
                "notes": list(dict.fromkeys(f"{p.variant}: {n}" for p in here for n in p.notes)),
            }
        )
    return {"charts": charts, "legend": colours}


def pipeline_bar(time: PipelineTime, most: float, colours: dict[str, str]) -> View:
    pieces = [
        {
            "width": share(part.ms, most),
            "colour": colours[part.component],
            "tip": f"{part.component} as {part.candidate}\n{milliseconds(part.ms)}: {number(part.calls)} calls of "
            f"{milliseconds(part.ms / part.calls if part.calls else None)}\n{percent(part.ms / time.composed_ms)} "
            "of the sum",
        }
        for part in time.parts
    ]
    measured = None
    if time.measured_ms is not None:
        off = time.measured_ms / time.composed_ms - 1
        measured = {
            "width": share(time.measured_ms, most),
            "text": f"{milliseconds(time.measured_ms)} measured ({off:+.1%})",
            "tip": f"{time.variant}\n{milliseconds(time.measured_ms)} from end to end, {off:+.1%} beside the sum",
        }
    return {
        "name": time.variant,
        "pieces": pieces,
        "text": f"{milliseconds(time.composed_ms)} composed",
        "measured": measured,
    }


# --- operators and modules -------------------------------------------------------------------------------------------


def breakdowns(profile: Profile) -> View | None:
    found = [b for b in profile.breakdowns if b.operators]
    if not found:
        return None
    charts = []
    for i, (component, shape) in enumerate(dict.fromkeys((b.component, b.shape) for b in found)):
        here = [b for b in found if (b.component, b.shape) == (component, shape)]
        colours = operator_colours(o.operator for b in here for o in b.operators)
        most = max(b.run_ms for b in here)
        charts.append(
            {
                "component": component,
                "shape": shape,
                "legend": {k: colours[k] for k in by_kind(here)} | {OUTSIDE: "hatch"},
                "bars": [operator_bar(b, most, colours) for b in here],
                "details": [detail(b, f"modules-{i}-{j}") for j, b in enumerate(here)],
            }
        )
    return {"charts": charts}


def by_kind(found: Iterable[Breakdown]) -> dict[str, float]:
    """Kind of work -> milliseconds, the longest first."""
    ms: dict[str, float] = defaultdict(float)
    for breakdown in found:
        for row in breakdown.operators:
            ms[row.operator] += row.ms
    return dict(sorted(ms.items(), key=lambda item: -item[1]))


def operator_bar(breakdown: Breakdown, most: float, colours: dict[str, str]) -> View:
    kinds = [(kind, ms, colours[kind]) for kind, ms in by_kind([breakdown]).items()]
    if breakdown.outside_ms > 0:
        kinds.append((OUTSIDE, breakdown.outside_ms, "hatch"))
    return {
        "backend": breakdown.backend,
        "precision": breakdown.precision,
        "colour": colour_of(breakdown.backend),
        "text": milliseconds(breakdown.run_ms),
        "pieces": [
            {
                "width": share(ms, most),
                "colour": colour,
                "tip": f"{kind}\n{milliseconds(ms)}, {percent(ms / breakdown.run_ms)} of the run",
            }
            for kind, ms, colour in kinds
        ],
    }


def detail(breakdown: Breakdown, id_: str) -> View:
    """The treemap and the longest operators of one candidate, behind a click."""
    return {
        "id": id_,
        "figure": treemap(breakdown),
        "candidate": f"{breakdown.backend} {breakdown.precision}",
        "colour": colour_of(breakdown.backend),
        "run": milliseconds(breakdown.run_ms),
        "how": breakdown.how,
        "trace": "./" + quote(breakdown.trace) if breakdown.trace else None,
        "left": max(0, len(breakdown.operators) - MOST_ROWS),
        "rows": [
            {
                "module": o.module or NONE,
                "operator": o.operator,
                "kernel": o.kernel + (f" ({o.provider})" if o.provider else ""),
                "ms": milliseconds(o.ms),
                "value": o.ms,
                "share": percent(o.ms / breakdown.run_ms),
                "bar": share(o.ms, breakdown.operators[0].ms),
                "calls": f"{o.calls:.3g}",
                "gflops": number(o.flops / o.ms / 1e6) if o.flops and o.ms else NONE,
                "bytes": size(o.bytes),
            }
            for o in sorted(breakdown.operators, key=lambda o: -o.ms)[:MOST_ROWS]
        ],
    }


# --- before the first run, memory ------------------------------------------------------------------------------------

STEPS: Mapping[str, str] = {"load": "#868e96", "compile or build": "#d55e00", "first run": "#56b4e9"}


def preparation(profile: Profile) -> View | None:
    charts = []
    for component, shape, rows in groups(profile):
        ready = [(r, r.preparation) for r in rows if r.preparation]
        parts = [(r, (p.load_s, wait_s(r) or 0.0, p.first_ms / 1e3), p) for r, p in ready]
        most = max((sum(times_) for _, times_, _ in parts), default=0.0)
        bars = []
        for row, took, ready_ in sorted(parts, key=lambda item: sum(item[1])):
            words = [f"{name} {seconds(s)}" for name, s in zip(STEPS, took, strict=True)]
            if ready_.artifact_bytes:
                words.append(f"artifact {size(ready_.artifact_bytes)}")
            if ready_.cached:
                words.append("a compiler's cache on disk was used")
            pieces = [
                {"width": share(s, most), "colour": colour} for s, colour in zip(took, STEPS.values(), strict=True)
            ]
            bars.append(
                {
                    "backend": row.backend, "precision": row.precision, "colour": colour_of(row.backend),
                    "pieces": pieces, "text": seconds(sum(took)) + (" cached" if ready_.cached else ""),
                    "tip": "\n".join([row.candidate, *words]),
                }
            )  # fmt: skip
        if bars:
            charts.append({"component": component, "shape": shape, "bars": bars})
    return {"charts": charts, "legend": STEPS} if charts else None


def memory(profile: Profile) -> View | None:
    charts = []
    for component, shape, rows in groups(profile):
        known = [(r, r.memory) for r in rows if r.memory and (r.memory.host or r.memory.device)]
        most = max((max(m.host or 0, m.device or 0) for _, m in known), default=0)
        bars = [
            {
                "backend": r.backend, "precision": r.precision, "colour": colour_of(r.backend),
                "pieces": [{"width": share(value, most), "colour": colour_of(r.backend)}],
                "text": f"{size(value)} {where}", "tip": f"{r.candidate}\npeak on the {where}: {size(value)}",
            }
            for r, m in sorted(known, key=lambda item: (item[1].device or 0, item[1].host or 0))
            for where, value in (("device", m.device), ("host", m.host))
            if value
        ]  # fmt: skip
        if bars:
            charts.append({"component": component, "shape": shape, "bars": bars})
    return {"charts": charts} if charts else None


# --- beside the measurements -----------------------------------------------------------------------------------------


def estimates(profile: Profile) -> View | None:
    if not profile.estimates:
        return None
    tables = []
    for target in dict.fromkeys(e.target for e in profile.estimates):
        here = [e for e in profile.estimates if e.target == target]
        tables.append(
            {
                "target": target,
                "rows": [
                    {
                        "component": e.component, "shape": e.shape, "precision": e.precision,
                        "latency": milliseconds(e.latency_ms), "value": e.latency_ms, "bound": e.bound,
                        "share": percent(e.share),
                    }
                    for e in here
                ],
                "assumptions": list(dict.fromkeys(a for e in here for a in e.assumptions)),
            }
        )  # fmt: skip
    return {"tables": tables}


VERDICTS = {"slower": 0, "faster": 1, "undecided": 2, "gone": 3, "new": 4, "same": 5}


def comparison(profile: Profile) -> View | None:
    compared = profile.comparison
    if compared is None:
        return None
    ordered = sorted(compared.changes, key=lambda c: (VERDICTS[c.verdict], -abs((c.ratio or 1) - 1)))
    counts = {v: sum(c.verdict == v for c in ordered) for v in VERDICTS}
    rows = [
        {
            "component": c.component, "shape": c.shape, "candidate": c.candidate, "before": milliseconds(c.before_ms),
            "before_value": c.before_ms, "after": milliseconds(c.after_ms), "after_value": c.after_ms,
            "change": f"{c.ratio - 1:+.1%}" if c.ratio is not None else NONE, "ratio": c.ratio,
            "bar": min(abs((c.ratio or 1) - 1), 0.5) * 100, "slower": (c.ratio or 1) > 1,
            "verdict": c.verdict, "significant": c.significant, "why": c.why,
        }
        for c in ordered
    ]  # fmt: skip
    return {
        "against": compared.against,
        "made": compared.made,
        "rows": rows,
        "counts": {k: n for k, n in counts.items() if n},
        "notes": compared.notes,
    }
