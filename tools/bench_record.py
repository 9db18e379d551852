"""The record of a benchmark: figures from rounds, ratios against the goals, the JSON file, and the README's table.

A figure exists only where every round's graph passed parity; what has none says why.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optimize.errors import InputError

SCHEMA = 1


class Goal(NamedTuple):
    """A row of the goal table; all are `<=`."""

    floor: float
    goal: float
    moon: float

    def mark(self, value: float) -> str:
        return next((name for name in ("moon", "goal", "floor") if value <= getattr(self, name)), "missed")


GOALS: Mapping[str, Goal] = {
    "C1": Goal(0.50, 0.33, 0.28),
    "C2": Goal(0.80, 0.40, 0.33),
    "C3": Goal(0.50, 0.36, 0.33),
    "C4": Goal(1.02, 0.95, 0.85),
    "C5": Goal(0.8, 0.40, 0.25),
    "C6": Goal(1.5, 0.9, 0.6),
    "C7": Goal(1.1, 0.25, 0.15),
    "C8": Goal(1.05, 1.00, 0.90),
    "C9": Goal(0.2, 0.05, 0.02),
    "C10": Goal(1e-4, 2e-5, 1e-5),
    "C11": Goal(20, 10, 5),
}


class Ratio(NamedTuple):
    """`ours` over `theirs`, each a path into the record; no `theirs`: the figure itself; no `goal`: for the reader."""

    text: str
    ours: str
    theirs: str
    goal: str = ""


EXPORTS = (
    Ratio("ONNX Runtime latency, 1 pinned thread: ours / dynamo", "ours.latency_ms.1", "dynamo.latency_ms.1", "C4"),
    Ratio("ONNX Runtime latency, 2 pinned threads: ours / dynamo", "ours.latency_ms.2", "dynamo.latency_ms.2", "C4"),
    Ratio("the same in processor time, 1 thread: ours / dynamo", "ours.latency_cpu_ms.1", "dynamo.latency_cpu_ms.1"),
    Ratio("the same, 1 thread: ours / dynamo at our opset", "ours.latency_ms.1", "dynamo-opset23.latency_ms.1"),
    Ratio("the same, 1 thread: ours / optimum-onnx", "ours.latency_ms.1", "optimum.latency_ms.1"),
    Ratio("export wall: ours / dynamo", "ours.export_s", "dynamo.export_s", "C5"),
    Ratio("export in processor time: ours / dynamo", "ours.cpu_s", "dynamo.cpu_s"),
    Ratio("export in processor time: ours / optimum-onnx", "ours.cpu_s", "optimum.cpu_s"),
    Ratio(
        "export wall: ours with its digests, check and parity gate / dynamo, which has none",
        "ours-gated.export_s",
        "dynamo.export_s",
    ),
    Ratio("export wall: ours / TorchScript", "ours.export_s", "torchscript.export_s"),
    Ratio("export wall: ours / optimum-onnx", "ours.export_s", "optimum.export_s", "C6"),
    Ratio("nodes: ours / dynamo", "ours.nodes", "dynamo.nodes", "C8"),
    Ratio("second export with the cache / first", "ours-gated.again_s", "ours-gated.export_s", "C9"),
    Ratio("relative error to eager fp32, at sizes not traced: ours", "ours.parity.relative", "", "C10"),
    Ratio("peak memory over the imports / weights: ours", "ours.memory.peak_over_imports", "model.weights_bytes"),
    Ratio(
        "peak memory over the loaded model / weights: dynamo", "dynamo.memory.peak_over_loaded", "model.weights_bytes"
    ),
    Ratio(
        "peak memory over the loaded model / weights: TorchScript",
        "torchscript.memory.peak_over_loaded",
        "model.weights_bytes",
    ),
    Ratio(
        "peak memory over the loaded model / weights: optimum-onnx",
        "optimum.memory.peak_over_loaded",
        "model.weights_bytes",
    ),
)
MEMORY = (
    Ratio(
        "peak memory of the export over the imports / weights",
        "ours.memory.peak_over_imports",
        "model.weights_bytes",
        "C7",
    ),
    Ratio(
        "the same with our parity gate, told to keep within its memory",
        "ours-gated.memory.peak_over_imports",
        "model.weights_bytes",
        "C7",
    ),
    Ratio("peak memory of the whole process (VmHWM) / weights", "ours.memory.peak_rss", "model.weights_bytes"),
    Ratio("second export with the cache / first", "ours-gated.again_s", "ours-gated.export_s", "C9"),
)
FLUX = tuple(r._replace(goal="") for r in MEMORY)  # the goals are for SDXL's U-Net
COMMAND = (Ratio("`optimize --help` / `python -c pass`", "help.wall_s", "pass.wall_s", "C11"),)


MEASURES: Mapping[str, str] = {
    "export_s": "seconds from the source folder (ours) or the loaded model (others) to files on disk; imports are done "
    "before; ours reads the weights inside it, the others' load_s stands apart",
    "cpu_s": "processor time of the same stretch, all threads: what is left to compare on a machine that was busy",
    "ours-gated": "`optimize.export`: the same with digests of source and artifacts, onnx.checker and the parity gate",
    "again_s": "the same call in a new process, on the same bundle and with the same cache",
    "memory.peak_rss": "VmHWM, reset when the export begins; includes pages of mapped files, also of libraries",
    "memory.peak_over_imports": "peak_rss less VmRSS when the imports were done",
    "memory.peak_over_loaded": "peak_rss less VmRSS when the model was loaded and read (ours loads none)",
    "memory.peak_anon_sampled": "RssAnon, sampled every 20 ms: memory that cannot be dropped; may miss short peaks",
    "latency_cpu_ms": "processor time of the same runs, all threads",
    "latency_ms": "median of each round's runs, by number of pinned threads, at sizes.latency; one session at a time",
    "nodes": "nodes of graph, subgraphs and functions, Constant nodes included; those are also given apart",
}


# --- figures ---------------------------------------------------------------------------------------------------------


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Median, spread ((largest - smallest) / median) and the rounds themselves."""
    median = statistics.median(values)
    return {"median": median, "spread": (max(values) - min(values)) / median if median else 0.0, "rounds": list(values)}


def memory_of(result: Mapping[str, Any]) -> dict[str, int]:
    """Peaks in bytes. RSS peaks are VmHWM's and count mapped files; the sampled anonymous ones do not."""
    m = result["memory_bytes"]
    return {
        "peak_rss": m["peak_rss"],
        "peak_over_imports": m["peak_rss"] - m["imports_rss"],
        "peak_over_loaded": m["peak_rss"] - m["loaded_rss"],
        "peak_anon_sampled": m["peak_anon_sampled"],
        "peak_anon_over_imports": m["peak_anon_sampled"] - m["imports_anon"],
        "peak_anon_over_loaded": m["peak_anon_sampled"] - m["loaded_anon"],
    }


def why_no_figure(result: Mapping[str, Any]) -> str | None:
    """What forbids figures from this round's result, or None."""
    if "error" in result:
        return str(result["error"])
    parity = result.get("parity")
    if parity is None:
        return "no parity was taken"
    if parity["passed"]:
        return None
    return "parity failed: " + (parity.get("error") or f"relative error {parity['relative']:.3g}, {parity['rule']}")


def side_from_rounds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One side over all rounds: its figures, or why it has none."""
    last = results[-1]
    parities = [r["parity"] for r in results if "parity" in r]
    worst = max(parities, key=lambda p: p.get("relative", math.inf), default=None)
    whys = [why for r in results if (why := why_no_figure(r))]
    if whys:
        return {"state": "failed", "why": whys[0], "parity": worst}
    found: dict[str, Any] = {"state": "measured", "parity": worst, "export_s": figure([r["seconds"] for r in results])}
    for name in ("cpu_s", "load_s", "process_s", "again_s", "again_process_s"):
        if name in last:
            found[name] = figure([r[name] for r in results])
    found["memory"] = {k: figure([memory_of(r)[k] for r in results]) for k in memory_of(last)}
    for name in ("latency_ms", "latency_cpu_ms", "steps_s"):
        if name in last:
            found[name] = {k: figure([r[name][k] for r in results]) for k in last[name]}
    return found | {k: last[k] for k in ("nodes", "constant_nodes", "opset", "files", "file_bytes")}


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The figure or number at a dotted path, from the measured sides or the model; None where there is none."""
    measured = {name: side for name, side in record["sides"].items() if side["state"] == "measured"}
    found: Any = {**measured, "model": record.get("model", {})}
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def ratio_row(record: Mapping[str, Any], ratio: Ratio) -> dict[str, Any]:
    """Value, range over the rounds and mark; or why there is no value."""
    row: dict[str, Any] = {"ratio": ratio.text, **({"id": ratio.goal} if ratio.goal else {})}
    paths = [p for p in (ratio.ours, ratio.theirs) if p]
    found = [value_at(record, p) for p in paths]
    for path, value in zip(paths, found, strict=True):
        if value is None:
            side = record["sides"].get(path.partition(".")[0], {"why": "not asked for"})
            return {**row, "value": None, "why": f"{path.partition('.')[0]}: {side.get('why', 'not measured')}"}
    medians = [v["median"] if isinstance(v, Mapping) else v for v in found]
    value = medians[0] / medians[1] if len(medians) > 1 else medians[0]
    rounds = [v["rounds"] if isinstance(v, Mapping) else [v] for v in found]
    long = max(len(r) for r in rounds)
    pairs = zip(*(r * long if len(r) == 1 else r for r in rounds), strict=True)
    each = [p[0] / p[1] if len(p) > 1 else p[0] for p in pairs]
    row |= {"value": value, "low": min(each), "high": max(each), "ours": medians[0]}
    if ratio.theirs:
        row["theirs"] = medians[1]
    if ratio.goal:
        goal = GOALS[ratio.goal]
        row |= {**goal._asdict(), "mark": goal.mark(value)}
    return row


# --- the file and the table ------------------------------------------------------------------------------------------


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Writes the record whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"export-{record['case']}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def table(folder: Path) -> str:
    """All records as markdown: for each case what it ran on, and its ratios."""
    paths = sorted(folder.glob("export-*.json"))
    if not paths:
        raise InputError(f"no records in {folder}", expected="export-CASE.json", mend="run a case: --case unet-220m")
    return "\n\n".join(section(json.loads(path.read_text())) for path in paths)


def section(record: Mapping[str, Any]) -> str:
    device, load = record["device"], record["load"]
    busy = f"; the machine was busy: {load['others']:.0%} of it went to others" if load["busy"] else ""
    lines = [
        f"**{record['case']}**: {record['what']}. {device['cpu']}, {device['cores']} cores, "
        f"{device['memory_gib']:.0f} GiB; {record['rounds']} interleaved rounds, medians{busy}.",
        "",
        "| # | ratio | value | rounds | floor | goal | moon | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["ratios"]:
        if row["value"] is None:
            lines.append(f"| {row.get('id', '')} | {row['ratio']} | none | {row['why']} | | | | |")
            continue
        goals = " | ".join(f"{row[k]:g}" if k in row else "" for k in ("floor", "goal", "moon"))
        lines.append(
            f"| {row.get('id', '')} | {row['ratio']} | {row['value']:.3g} | "
            f"{row['low']:.3g} to {row['high']:.3g} | {goals} | {row.get('mark', '')} |"
        )
    return "\n".join(lines)
