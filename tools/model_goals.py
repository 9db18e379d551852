"""What `bench_models` holds its records to: each goal's ratio in each case, or why there is none, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimize.tools.bench_kernels import goal_rows
from optimize.tools.bench_profiler import agreement, label, ratio
from optimize.tools.model_cases import CASES, EVERY, GOALS, RULES, Case

AGAIN = 2
"""Processes beside the first one that G14 takes; the first of them is the longer measurement of G13."""


def values_of(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A ratio for each goal of each case, or why there is none."""
    for case in CASES.values():
        entry = entries.get(case.name, {"state": "left", "why": "not run yet"})
        for goal in (*case.goals, *EVERY):
            found = {"goal": goal, "case": case.name, "value": None}
            if entry["state"] != "measured":
                yield {**found, "why": entry["why"]}
            else:
                yield found | (of_rule(goal, case, entry) if goal in RULES else of_processes(goal, entry))


def of_rule(goal: str, case: Case, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fastest row that counts over the rival's, round by round. Inconclusive rows have no ratio."""
    rule, rows = RULES[goal], entry["profile"]["rows"]
    rival = next((r for r in rows if (r["backend"], r["precision"]) == (rule.theirs, case.precision)), None)
    if rival is None or rival["state"] != "measured":
        return {"why": f"{rule.theirs} {case.precision}: " + (rival["why"] if rival else "not asked for")}
    able = [r for r in rows if r["precision"].partition("+")[0] == (rule.ours or case.precision)]
    sure = [r for r in able if r["state"] == "measured"]
    if not sure:
        said = "; ".join(f"{label(r)}: {r['why']}" for r in able)
        return {"why": said or f"no backend here runs {rule.ours} without a bundle that has it (--bundle)"}
    best = min(sure, key=lambda r: float(r["timing"]["median_ms"]))
    return {"value": ratio(best, rival), "ours": label(best), "theirs": label(rival)}


def of_processes(goal: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """G13: what was picked first, in a second and longer measurement, over the best there. G14: the worst spread."""
    again, reference = entry["again"], f"eager {entry['precision']}"
    if len(again) < (1 if goal == "G13" else AGAIN):
        return {"why": entry.get("why_again") or f"measured in {1 + len(again)} processes so far"}
    if goal == "G13":
        return pick_over_best(entry["profile"], again[0], reference)
    every = agreement([entry["profile"], *again], reference)
    spreads = [(spread, name) for a in every for name, spread in a["spreads"].items() if name != reference]
    if not spreads:
        return {"why": f"nothing beside {reference} has a figure in every process"}
    return {"value": max(spreads)[0], "ours": max(spreads)[1], "theirs": reference}


def pick_over_best(first: Mapping[str, Any], truth: Mapping[str, Any], reference: str) -> dict[str, Any]:
    for found in agreement([truth], reference):
        medians, best = found["pooled_ms"], found["best"]
        for pick in (label(p) for p in picks_of(first)):
            if pick in medians:
                return {"value": medians[pick] / medians[best], "ours": pick, "theirs": best}
    return {"why": "what was picked had no figure in the second measurement"}


def picks_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return record["choice"]["picks"] if record["choice"] else []


# --- for people ------------------------------------------------------------------------------------------------------


def goals_of(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each goal its worst case, and whether that reaches it."""
    return goal_rows(values, GOALS)


def table(record: Mapping[str, Any]) -> str:
    """The goals, then every case's candidates, as markdown."""
    reached = {g["id"]: g for g in record["goals"]}
    lines = [
        f"**models** on {record['machine']['key']}{', tiny' if record['tiny'] else ''}; random weights.",
        "",
        "| # | ratio | worst | best | floor | goal | moon | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for id_, goal in GOALS.items():
        whys = [f"{v['case']}: {v['why']}" for v in record["values"] if v["goal"] == id_ and v["value"] is None]
        found = reached.get(id_, {"worst": None, "best": None, "mark": ""})
        figures = " | ".join("" if found[k] is None else f"{found[k]:.3g}" for k in ("worst", "best"))
        limits = f"{goal.floor:g} | {goal.goal:g} | {goal.moon:g}"
        told = "; ".join(filter(None, (found["mark"], f"not measured: {'; '.join(whys)}" if whys else "")))
        lines.append(f"| {id_} | {goal.what} | {figures} | {limits} | {told} |")
    return "\n".join([*lines, "", *(f"- {line_of(entry)}" for entry in record["cases"].values())])


def line_of(entry: Mapping[str, Any]) -> str:
    if "profile" not in entry:
        return f"{entry['case']}: {entry['state']}: {entry['why']}"
    rows = sorted(entry["profile"]["rows"], key=lambda r: r["timing"]["median_ms"] if r["timing"] else float("inf"))
    said = ", ".join(
        f"{label(r)} {r['timing']['median_ms']:.3g} ms" + (" (inconclusive)" if r["state"] != "measured" else "")
        if r["timing"]
        else f"{label(r)} {r['state']}: {r['why'][:120]}"
        for r in rows
    )
    return f"{entry['case']} ({entry['what']}): {said}"
