"""The answer: for each component the fastest candidate that meets the wishes, and why; what a pipeline of them costs.

A component's candidates are ranked at the sizes that its pipeline calls it with. A pipeline's latency and the memory
are wished for all picks together, so combinations are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from optimize.errors import InputError

from .composing import IMAGE, PICKED, image_rows
from .ranking import Option, decided, front_of, latency, median, ranked, tied
from .schema import Choice, Cost, Pick, PipelinePart, PipelineTime, Profile
from .wishes import PERCENTILES, Miss, Wishes, memory_misses, quality_misses, slo_misses

GUIDED = "+guided"
"""End of the name of sizes at which a guided pipeline calls its denoiser."""
MANY = 20_000
"""Combinations that are tried at most."""
RARELY = 1e-6
"""Calls per run of what a run does not call: its own speed still decides."""
HOURS_OF_MONTH = 730


# --- one component ----------------------------------------------------------------------------------------------------


def options_of(profile: Profile, component: str, shape: str) -> list[Option]:
    """What ran at these sizes and, in a guided pipeline, at those of its calls too."""
    rows = [r for r in profile.rows if r.component == component]
    pipelines = [p for p in profile.pipelines if p.shape == shape] or profile.pipelines
    # where some candidate had no row at the guided sizes, its pipeline counts each pair as two calls
    counts = [part.calls for p in pipelines for part in p.parts if part.component == component]
    calls = min(counts) if counts else 0.0 if pipelines else 1.0  # none of a VAE's encoder in a pipeline from text
    guided = {r.candidate: r for r in rows if r.shape == shape + GUIDED and r.timing is not None}
    timed = [r for r in rows if r.shape == shape and r.timing is not None]
    called = [r for r in timed if not guided or r.candidate in guided]
    return [Option(r, guided.get(r.candidate, r), calls) for r in called]


def nearest(options: Sequence[Option], misses: Mapping[str, Sequence[Miss]]) -> list[Option]:
    """Those that meet the wishes, or where none does those that come nearest."""
    far = {o.row.candidate: sum(f for f, _ in misses[o.row.candidate]) for o in options}
    return [o for o in options if far[o.row.candidate] <= min(far.values()) * (1 + 1e-9)]


# --- all together -----------------------------------------------------------------------------------------------------


def choose(profile: Profile, wishes: Wishes, shape: str | None = None) -> Choice | None:
    """The answer at the sizes named `shape`, else at the first ones of each component; None where nothing was timed.

    A pipeline's percentile is the sum of its components': no more than that is known before it is run.
    Raises InputError for a shape that no component has.
    """
    options, silent = options_by_component(profile, shape)
    if not options:
        return None
    together = bool(profile.pipelines)
    misses = {c: {o.row.candidate: own_misses(o, wishes, together) for o in found} for c, found in options.items()}
    rankings = {c: ranked(nearest(found, misses[c])) for c, found in options.items()}
    chosen, joint = best_together(rankings, wishes, together)
    missed = [f"{c}: {text}" for c, o in chosen.items() for _, text in misses[c][o.row.candidate]]
    missed += [*joint, *(f"{c}: nothing was measured that could be deployed" for c in silent)]
    run_ms = sum(o.calls * median(o.at) for o in chosen.values())
    return Choice(
        wishes=wishes.texts(),
        met=not missed,
        missed=tuple(missed),
        picks=[pick_of(chosen[c], options[c], misses[c], rankings[c]) for c in options],
        front=fronts_of(options, profile),
        pipeline=time_of(chosen, profile.pipelines[0]) if together else None,
        cost=cost_of(run_ms, wishes) if wishes.price_per_hour is not None else None,
    )


def fronts_of(options: Mapping[str, Sequence[Option]], profile: Profile) -> dict[str, list[str]]:
    """Of each component, and of the pipeline's variants."""
    found = {c: [r.candidate for r in front_of(o.row for o in every)] for c, every in options.items()}
    images = image_rows(profile.rows, profile.pipelines)
    shape = images[0].shape if images else ""
    return {
        **found,
        **({IMAGE: [r.candidate for r in front_of(r for r in images if r.shape == shape)]} if images else {}),
    }


def options_by_component(profile: Profile, shape: str | None) -> tuple[dict[str, list[Option]], list[str]]:
    """Options of each component at its sizes, and the components that have none."""
    if shape is not None and shape not in {r.shape for r in profile.rows}:
        shapes = ", ".join(dict.fromkeys(r.shape for r in profile.rows))
        raise InputError(f"the profile has no shape {shape}", got=shape, expected=shapes or "none: it has no rows")
    names: dict[str, str] = {}
    for row in profile.rows:
        if shape in (None, row.shape):
            names.setdefault(row.component, row.shape)
    found = {c: options_of(profile, c, name) for c, name in names.items()}
    return {c: options for c, options in found.items() if options}, [c for c in found if not found[c]]


def own_misses(option: Option, wishes: Wishes, together: bool) -> list[Miss]:
    """What one component misses by itself; a pipeline's latency is wished for its components together."""
    return quality_misses(option.row, wishes) + ([] if together else slo_misses(option.times(), "", wishes))


def joint_misses(chosen: Mapping[str, Option], wishes: Wishes, together: bool) -> list[Miss]:
    """What all of these together miss."""
    image = {f: sum(o.calls * o.times()[f] for o in chosen.values()) for f in PERCENTILES} if together else {}
    late = slo_misses(image, "an image: ", wishes) if together else []
    return late + memory_misses(sum(o.memory for o in chosen.values()), wishes)


def best_together(
    rankings: Mapping[str, Sequence[Option]], wishes: Wishes, together: bool
) -> tuple[dict[str, Option], list[str]]:
    """One option per component, and what they miss together: nothing, or as little as can be."""
    best = {c: ranking[0] for c, ranking in rankings.items()}
    misses = joint_misses(best, wishes, together)
    if not misses:
        return best, []
    most = max(2, int(MANY ** (1 / len(rankings))))
    useful = {c: worth_trying(ranking, most) for c, ranking in rankings.items()}
    found = (math.inf, math.inf)
    for combination in itertools.product(*useful.values()):
        chosen = dict(zip(useful, combination, strict=True))
        tried = joint_misses(chosen, wishes, together)
        merit = sum(f for f, _ in tried), sum(max(o.calls, RARELY) * latency(o.at) for o in combination)
        if merit < found:
            found, best, misses = merit, chosen, tried
    return best, [text for _, text in misses]


def worth_trying(ranking: Sequence[Option], most: int) -> list[Option]:
    """Without what another one equals or beats in all latencies and in memory; at most so many, the smallest too."""
    kept: list[Option] = []
    for option in sorted(ranking, key=lambda o: (latency(o.at), o.memory)):
        has = (*option.times().values(), option.memory)
        if not any(all(a <= b for a, b in zip((*k.times().values(), k.memory), has, strict=True)) for k in kept):
            kept.append(option)
    return kept if len(kept) <= most else [*kept[: most - 1], min(kept, key=lambda o: o.memory)]


def time_of(chosen: Mapping[str, Option], like: PipelineTime) -> PipelineTime:
    """Time per image of the picks: the sum."""
    parts = [
        PipelinePart(component=c, candidate=o.row.candidate, calls=o.calls, ms=o.calls * median(o.at))
        for c, o in chosen.items()
        if o.calls
    ]
    return like.model_copy(
        update={
            "variant": PICKED,
            "shape": next((o.row.shape for o in chosen.values() if o.calls), like.shape),
            "parts": parts,
            "composed_ms": sum(part.ms for part in parts),
            "measured_ms": None,
            "rounds_ms": (),
            "notes": (),
        }
    )


# --- in words ---------------------------------------------------------------------------------------------------------


def pick_of(
    option: Option, options: Sequence[Option], misses: Mapping[str, Sequence[Miss]], ranking: Sequence[Option]
) -> Pick:
    row, slower = option.row, [o for o in ranking if o is not option and latency(o.at) >= latency(option.at)]
    return Pick(
        component=row.component,
        shape=row.shape,
        backend=row.backend,
        precision=row.precision,
        artifact=row.artifact,
        latency_ms=median(option.at),
        cosine=row.quality.cosine if row.quality else None,
        memory_bytes=option.memory or None,
        why="; ".join(reasons(option, options, slower[:1], misses)),
        runner_up=slower[0].row.candidate if slower else "",
    )


def reasons(
    option: Option, options: Sequence[Option], following: Sequence[Option], misses: Mapping[str, Sequence[Miss]]
) -> Iterable[str]:
    if option.at is not option.row:
        yield f"at {option.at.shape}, as the pipeline calls it"
    for other in following:
        tie = f", a tie: {decided(option, other)} decided" if tied(option.at, other.at) else ""
        unsure = "" if option.sure and other.sure else " (what is inconclusive by its slow rounds)"
        yield f"{latency(other.at) / latency(option.at):.2f}x faster than the next, {other.row.candidate}{unsure}{tie}"
    if option.row.quality is not None:
        yield f"cosine {option.row.quality.cosine:.6f}"
    if not option.sure:
        yield "INCONCLUSIVE: its rounds do not agree; it counts as the upper quartile of them"
    for other in sorted(options, key=lambda o: median(o.at)):
        if median(other.at) < median(option.at):
            yield f"{other.row.candidate} left out: {why_left(option, other, misses[other.row.candidate])}"


def why_left(option: Option, other: Option, missed: Sequence[Miss]) -> str:
    """Why a faster one was not picked."""
    faster = f"({median(option.at) / median(other.at):.2f}x faster)"
    if missed:
        return f"{missed[0][1]} {faster}"
    if not other.sure:
        return f"inconclusive, its slow rounds are not faster {faster}"
    tie = tied(other.at, option.at)
    return f"a tie {faster}, {decided(option, other)} decided" if tie else f"the wishes on all together {faster}"


def cost_of(run_ms: float, wishes: Wishes) -> Cost:
    """Of runs (images, for a pipeline) one after another, on machines like this one that are paid whole."""
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
