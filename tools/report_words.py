"""Figures of a record as words for people, and the colours that stand for backends and kinds of work everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10

from optimize.profiles.ranking import latency
from optimize.profiles.schema import Profile, Row

BACKEND_COLOURS: Mapping[str, str] = {
    "eager": "#868e96",
    "torch.compile": "#e69f00",
    "torch.compile-max-autotune": "#d55e00",
    "torch.compile-regional": "#c9a227",
    "torch.compile-cudagraphs": "#a34700",
    "fused": "#5b6770",
    "torch.compile-fused": "#f0b84a",
    "torch.compile-max-autotune-fused": "#b33c00",
    "aoti": "#cc79a7",
    "onnxruntime": "#2f7fd1",
    "onnxruntime-cuda": "#56b4e9",
    "onnxruntime-tensorrt": "#7a86e0",
    "tensorrt": "#009e73",
    "tensorrt-cudagraphs": "#4fc3a1",
}
"""A family per maker (greys, oranges, blues, greens) from the palette of Okabe and Ito, which colour-blind people tell
apart; each is legible on white and on near black."""
OTHER_COLOUR = "#8d7bb5"
NONE = "\N{EN DASH}"
"""Stands where there is no figure."""

OPERATOR_COLOURS: Mapping[str, str] = {
    "convolution": "#2f7fd1",
    "matmul": "#e69f00",
    "attention": "#009e73",
    "norm": "#cc79a7",
    "elementwise": "#56b4e9",
    "activation": "#4fc3a1",
    "layout": "#c9a227",
    "resize": "#d55e00",
    "reduction": "#7a86e0",
    "softmax": "#a34700",
    "view": "#a0a6ad",
}
SERIES = ("#2f7fd1", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a86e0", "#c9a227", "#4fc3a1", "#a34700")
SYMBOLS: Mapping[str, str] = {
    "fp32": "circle",
    "tf32": "circle-dot",
    "fp16": "square",
    "bf16": "diamond",
    "fp8": "star",
    "int8": "triangle-up",
    "int8-dynamic": "triangle-right",
    "int8-weight": "triangle-left",
    "int4-weight": "triangle-down",
}
"""Precision -> plotly's marker: what colour does not say, shape does."""


def colour_of(backend: str) -> str:
    return BACKEND_COLOURS.get(backend, OTHER_COLOUR)


def operator_colours(kinds: Iterable[str]) -> dict[str, str]:
    """Kinds of work -> colours: the fixed ones, and for others those of the series that are left, in order."""
    names = list(dict.fromkeys(kinds))
    free = [c for c in SERIES if c not in {OPERATOR_COLOURS.get(n) for n in names}] or list(SERIES)
    unknown = [n for n in names if n not in OPERATOR_COLOURS]
    return {n: OPERATOR_COLOURS.get(n) or free[unknown.index(n) % len(free)] for n in names}


def series_colours(names: Iterable[str]) -> dict[str, str]:
    return {n: SERIES[i % len(SERIES)] for i, n in enumerate(dict.fromkeys(names))}


def components_of(profile: Profile) -> list[str]:
    return list(dict.fromkeys(r.component for r in profile.rows))


def shapes_of(profile: Profile) -> list[str]:
    named = [r.shape for r in profile.rows] + [p.shape for p in profile.pipelines]
    return list(dict.fromkeys(named + [b.shape for b in profile.breakdowns]))


def timed(rows: Iterable[Row]) -> list[Row]:
    """Those with a figure, the fastest first."""
    return sorted((r for r in rows if r.timing), key=lambda r: r.timing.median_ms if r.timing else 0.0)


def groups(profile: Profile) -> list[tuple[str, str, list[Row]]]:
    """(component, shape, its rows) in the record's order, those without rows left out."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in profile.rows:
        found.setdefault((row.component, row.shape), []).append(row)
    order = components_of(profile)
    return [(c, s, rows) for (c, s), rows in sorted(found.items(), key=lambda item: order.index(item[0][0]))]


def fastest(rows: Sequence[Row]) -> Row | None:
    """The fastest as the answer ranks them: an inconclusive one counts as its slow rounds."""
    return min(timed(rows), key=latency, default=None)


# --- figures ---------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """`digits` significant ones, but whole numbers are never cut: 0.0123, 1.23, 12.3, 1234."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def milliseconds(ms: float | None) -> str:
    """With its unit: microseconds below a tenth of one, seconds from a thousand."""
    if ms is None:
        return NONE
    if abs(ms) < 0.1:
        return f"{number(ms * 1e3)} µs"
    return f"{number(ms / 1e3)} s" if abs(ms) >= 1e3 else f"{number(ms)} ms"


def seconds(s: float | None) -> str:
    return NONE if s is None else milliseconds(s * 1e3) if s < 1 else f"{number(s)} s"


def size(count: float | None) -> str:
    if count is None:
        return NONE
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} B"


def times(ratio: float | None) -> str:
    """A ratio of latencies as people say it: 0.25 of eager is 4 times as fast."""
    if ratio is None or ratio <= 0:
        return NONE
    return f"{number(1 / ratio)}x"


def percent(share: float | None) -> str:
    """To a tenth of a percent."""
    return NONE if share is None else f"{100 * share:.1f}".removesuffix(".0") + " %"


def cosine(value: float | None) -> str:
    """Six digits where it is near to one."""
    if value is None:
        return NONE
    if value > 1 - 1e-12:
        return "1"
    return f"{value:.6f}" if value > 0.999 else f"{value:.4f}"


def decibels(value: float | None) -> str:
    return NONE if value is None else "exact" if value >= EXACT_DB else f"{value:.1f} dB"


EXACT_DB = 199.0
"""From here on it is the record's stand-in for infinity: nothing differs."""


def snr_of(row: Row) -> float | None:
    """dB beside eager fp32: on samples where there are some, else from the parity at these sizes."""
    if row.quality is not None:
        return row.quality.snr_db
    if row.parity is None:
        return None
    return -20 * log10(row.parity.relative) if row.parity.relative > 1e-10 else EXACT_DB + 1


def sizes_words(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sizes.items())


def money(value: float, currency: str) -> str:
    """To the hundredth, and two digits of what is less than one."""
    return f"{value:,.2f} {currency}".strip() if value >= 1 or not value else f"{number(value, 2)} {currency}".strip()


def wait_s(row: Row) -> float | None:
    """Seconds of compiling or building."""
    ready = row.preparation
    if ready is None:
        return None
    return ready.compile_s if ready.compile_s is not None else ready.build_s
