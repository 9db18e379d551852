"""A record beside an older one: what got slower, and whether that is more than noise.

A difference is significant where a bootstrap of the rounds' medians puts nearly all ratios on one side of one, and the
ratio is also beyond what either record's own rounds wandered: rounds of one process say nothing about the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from optimize.errors import InputError

from .schema import SCHEMA, Change, Comparison, Profile, Row, Timing

PRACTICAL = 0.03
"""Differences below this are nobody's concern, however sure."""
DRAWS, SEED, SURE = 2000, 7, 0.99
"""Of the bootstrap, and the share of its ratios that have to lie on one side of one."""
REFERENCE = "eager fp32"

Key = tuple[str, str, str]
"""Component, shape, candidate."""


def compare(new: Profile, old: Profile, *, other_machine: bool = False) -> Comparison:
    """Row by row, by component, sizes and candidate; rows that neither record timed are left out.

    Raises InputError for a record of another schema, for one that has no row in common, and for one of another machine
    unless `other_machine` allows it: a note says so then, and nothing is significant.
    """
    check_schema(new, old)
    doubts = [*doubts_of_machines(new, old, other_machine), *doubts_of_load(new, old)]
    before, after = by_key(old), by_key(new)
    if not before.keys() & after.keys():
        raise InputError(
            "the records have no row in common",
            got=f"{old.source}: " + words_of(before),
            expected=f"{new.source}: " + words_of(after),
            mend="compare with a record of the same components and sizes",
        )
    keys = [k for k in {**before, **after} if any(r is not None and r.timing for r in (before.get(k), after.get(k)))]
    changes = [change_of(k, before.get(k), after.get(k), doubts[0] if doubts else "") for k in keys]
    return Comparison(
        against=old.source,
        made=old.made,
        changes=changes,
        notes=(*doubts, *versions_changed(new, old), *reference_changed(changes)),
    )


def regressions(comparison: Comparison) -> list[Change]:
    """What got slower for sure, the worst first."""
    slower = [c for c in comparison.changes if c.significant and c.verdict == "slower"]
    return sorted(slower, key=lambda c: -(c.ratio or 0.0))


# --- two records ------------------------------------------------------------------------------------------------------


def check_schema(new: Profile, old: Profile) -> None:
    for record, which in ((old, "older"), (new, "new")):
        if record.schema_version != SCHEMA:
            raise InputError(
                f"the {which} record is of another schema",
                got=f"schema_version {record.schema_version}",
                expected=f"schema_version {SCHEMA}",
                mend="measure again, or compare with the version of optimize that wrote it",
            )


def doubts_of_machines(new: Profile, old: Profile, allowed: bool) -> list[str]:
    """Why milliseconds of the two say nothing about a change. Raises InputError for another machine."""
    if new.machine.key != old.machine.key:
        if not allowed:
            raise InputError(
                "the older record is of another machine",
                got=old.machine.key,
                expected=new.machine.key,
                mend="compare records of one machine: milliseconds of two say nothing about a change",
            )
        return [f"another machine: {old.machine.key} before, {new.machine.key} now"]
    if new.settings.cold_cache != old.settings.cold_cache:
        return [f"caches were {'cold' if old.settings.cold_cache else 'warm'} before, and are not now"]
    return []


def doubts_of_load(new: Profile, old: Profile) -> list[str]:
    return [f"a busy machine {when}" for record, when in ((old, "before"), (new, "now")) if record.load.busy]


def versions_changed(new: Profile, old: Profile) -> list[str]:
    versions = old.machine.versions, new.machine.versions
    changed = [
        f"{name} {versions[0].get(name, 'none')} -> {versions[1].get(name, 'none')}"
        for name in sorted({*versions[0], *versions[1]})
        if versions[0].get(name) != versions[1].get(name)
    ]
    return ["versions: " + ", ".join(changed)] if changed else []


def reference_changed(changes: Iterable[Change]) -> list[str]:
    """Where the reference itself changed, the machine or torch did."""
    return [
        f"{c.component} at {c.shape}: {REFERENCE} itself is {c.verdict} ({c.ratio:.2f}x): the machine or torch changed"
        for c in changes
        if c.candidate == REFERENCE and c.significant
    ]


def by_key(profile: Profile) -> dict[Key, Row]:
    return {(r.component, r.shape, r.candidate): r for r in profile.rows}


def words_of(rows: Mapping[Key, Row]) -> str:
    pairs = dict.fromkeys(f"{component} at {shape}" for component, shape, _ in rows)
    return ", ".join(list(pairs)[:4]) + (" ..." if len(pairs) > 4 else "") if pairs else "no rows"


# --- one row ----------------------------------------------------------------------------------------------------------


def change_of(key: Key, before: Row | None, after: Row | None, doubt: str) -> Change:
    """`doubt` is why no difference of these records can be significant."""
    component, shape, candidate = key
    then, now = (row.timing if row is not None else None for row in (before, after))
    base: dict[str, Any] = {
        "component": component,
        "shape": shape,
        "candidate": candidate,
        "before_ms": then.median_ms if then else None,
        "after_ms": now.median_ms if now else None,
        "ratio": None,
        "significant": False,
    }
    if now is None:
        return Change(**base, verdict="gone", why=after.why if after is not None else "not measured now")
    if then is None:
        return Change(**base, verdict="new", why=f"before: {before.why}" if before is not None else "")
    assert before is not None and after is not None
    unknown = why_not(before, after) or doubt
    why = unknown or why_noise(then, now)
    ratio = now.median_ms / then.median_ms
    sign: Literal["slower", "faster"] = "slower" if ratio > 1 else "faster"
    verdict: Any = "undecided" if unknown else "same" if why else sign
    return Change(**{**base, "ratio": ratio, "significant": not why}, verdict=verdict, why=why)


def why_not(before: Row, after: Row) -> str:
    """Why these two rows cannot be told apart, whatever the difference."""
    if before.sizes != after.sizes:
        return f"other sizes before: {', '.join(f'{n} {s}' for n, s in before.sizes.items())}"
    for row, when in ((before, "before"), (after, "now")):
        if row.state == "inconclusive":
            return f"inconclusive {when}"
    return ""


def why_noise(before: Timing, after: Timing) -> str:
    """Why the difference is no more than noise; nothing where it is more."""
    off, limit = abs(math.log(after.median_ms / before.median_ms)), threshold(before, after)
    if off <= math.log1p(PRACTICAL):
        return f"within {PRACTICAL:.0%}"
    if off <= math.log1p(limit):
        return f"within the rounds' own {limit:.1%}"
    return "" if differs(before.rounds_ms, after.rounds_ms) else "the rounds overlap"


def threshold(before: Timing, after: Timing) -> float:
    """The least relative difference that counts: how far the rounds of both wandered, and what is of any concern."""
    return max(PRACTICAL, math.hypot(*(max(abs(t.drift), t.spread / 2) for t in (before, after))))


def differs(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether nearly all ratios of medians of resampled rounds lie on one side of one (Efron 1979, the bootstrap)."""
    draw = np.random.default_rng(SEED)
    resampled = (np.median(draw.choice(np.asarray(r), (DRAWS, len(r))), axis=1) for r in (after, before))
    ratios = np.divide(*resampled)
    return bool(max((ratios > 1).mean(), (ratios < 1).mean()) >= SURE)
