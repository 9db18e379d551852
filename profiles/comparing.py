"""A record beside an older one: what got slower, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optimize.errors import InputError

from .schema import Change, Comparison, Profile, Row

PRACTICAL = 0.03
"""Differences below this are nobody's concern, however sure."""
DRAWS, SEED, SURE = 2000, 7, 0.99
"""Of the bootstrap, and the share of its ratios that have to lie on one side of one."""


def compare(new: Profile, old: Profile, *, other_machine: bool = False) -> Comparison:
    """Row by row, by component, sizes and candidate. Raises InputError for a record of another machine, unless
    `other_machine` allows it, which is noted then."""
    notes = []
    if new.machine.key != old.machine.key:
        if not other_machine:
            raise InputError(
                "the older record is of another machine",
                got=old.machine.key,
                expected=new.machine.key,
                mend="compare records of one machine: milliseconds of two say nothing about a change",
            )
        notes.append(f"another machine: {old.machine.key}")
    for name, record in (("older", old), ("new", new)):
        if record.load.busy:
            notes.append(f"the machine was busy for the {name} record: no difference counts as significant")
    changed = [
        f"{k} {old.machine.versions.get(k, 'none')} -> {new.machine.versions.get(k, 'none')}"
        for k in sorted({*old.machine.versions, *new.machine.versions})
        if old.machine.versions.get(k) != new.machine.versions.get(k)
    ]
    notes += ["versions: " + ", ".join(changed)] if changed else []
    before, after = by_key(old), by_key(new)
    quiet = not (new.load.busy or old.load.busy or (notes and other_machine))
    changes = [change(key, before.get(key), after.get(key), quiet) for key in {**before, **after}]
    return Comparison(against=old.source, made=old.made, changes=changes, notes=tuple(notes))


def regressions(comparison: Comparison) -> list[Change]:
    """What got slower for sure, the worst first."""
    slower = [c for c in comparison.changes if c.significant and c.verdict == "slower"]
    return sorted(slower, key=lambda c: -(c.ratio or 0.0))


Key = tuple[str, str, str]


def by_key(profile: Profile) -> dict[Key, Row]:
    return {(r.component, r.shape, r.candidate): r for r in profile.rows}


def change(key: Key, before: Row | None, after: Row | None, quiet: bool) -> Change:
    component, shape, candidate = key
    ms = [r.timing.median_ms if r is not None and r.timing is not None else None for r in (before, after)]
    if before is None or after is None or before.timing is None or after.timing is None:
        gone = after is None or after.timing is None
        return Change(
            component=component,
            shape=shape,
            candidate=candidate,
            before_ms=ms[0],
            after_ms=ms[1],
            ratio=None,
            significant=False,
            verdict="gone" if gone else "new",
            why=(after.why if after is not None else "not measured") if gone else "",
        )
    ratio = after.timing.median_ms / before.timing.median_ms
    why = why_not(before, after, quiet)
    sure = not why and abs(ratio - 1) > PRACTICAL and differs(before.timing.rounds_ms, after.timing.rounds_ms)
    return Change(
        component=component,
        shape=shape,
        candidate=candidate,
        before_ms=ms[0],
        after_ms=ms[1],
        ratio=ratio,
        significant=sure,
        verdict=("slower" if ratio > 1 else "faster") if sure else "same",
        why=why,
    )


def why_not(before: Row, after: Row, quiet: bool) -> str:
    """Why a difference cannot be significant, whatever its size."""
    if before.sizes != after.sizes:
        return f"other sizes: {before.sizes} before"
    for row, when in ((before, "before"), (after, "now")):
        if row.state == "inconclusive":
            return f"inconclusive {when}"
    return "" if quiet else "a busy machine"


def differs(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether nearly all ratios of medians of resampled rounds lie on one side of one (Efron's bootstrap)."""
    draw = np.random.default_rng(SEED)
    medians = [np.median(draw.choice(np.asarray(r), (DRAWS, len(r))), axis=1) for r in (after, before)]
    slower = float(np.mean(medians[0] / medians[1] > 1))
    return max(slower, 1 - slower) >= SURE
