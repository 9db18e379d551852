"""Our Triton kernels beside cuDNN, FlashAttention, FlexAttention, torch.compile and eager on a GPU, in one run.

    python tools/bench_kernels.py --family attention --tune
    python tools/bench_kernels.py --table

Wants only torch and triton. Each side is compared with float64 arithmetic before it is timed; a side that is wrong has
no figure. Every sample has a cold L2; the sides of a case take turns in random order; CUDA graphs keep launches out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optimize.errors import InputError, MissingError, OptimizeError
from optimize.tools import bench_machine
from optimize.tools.kernel_cases import FAMILIES, GOALS, Call, Case, Goal

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
BUDGET = 2.0  # a side's error may be this many times that of torch's own, both against float64
FLUSH_BYTES = 512 << 20  # several times any L2; writing it also hides what it costs to launch the sample
COPY_BYTES = 2 << 30
WARM_S = 0.15
QUANTILES = {"p10_ms": 0.1, "median_ms": 0.5, "p90_ms": 0.9}


# --- time ------------------------------------------------------------------------------------------------------------


class GpuTimer:
    """Milliseconds of one call on the GPU, its L2 cold, between two events."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ready(self, call: Call) -> Call:
        """The call as a CUDA graph, warm: one launch whatever it is made of."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            until = time.perf_counter() + WARM_S
            while time.perf_counter() < until:
                call()
                stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def __call__(self, call: Call) -> float:
        self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end))


class CpuTimer:
    """Milliseconds of one call on the CPU: for trying this benchmark out, not for figures."""

    def ready(self, call: Call) -> Call:
        call()
        return call

    def __call__(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)


Timer = GpuTimer | CpuTimer


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def copy_rate(timer: Timer, device: torch.device, rounds: int) -> float:
    """GB/s of a large copy on this device, bytes read plus bytes written: the limit of what is bound by memory."""
    size = COPY_BYTES if device.type == "cuda" else 1 << 24
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median([timer(lambda: target.copy_(source)) for _ in range(rounds)]) / 1e6


def product_rate(timer: Timer, device: torch.device, rounds: int) -> float:
    """TFLOP/s of a large bf16 matrix product on random numbers: the limit of what is bound by arithmetic."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median([timer(lambda: a @ b) for _ in range(rounds)]) / 1e9


# --- one case --------------------------------------------------------------------------------------------------------


def measured_case(case: Case, timer: Timer, device: torch.device, rounds: int, limits: Mapping[str, float]) -> Any:
    """Checks every side, then times those that are right, in turns."""
    torch.manual_seed(0)
    calls, error = case.sides(device)
    sides: dict[str, dict[str, Any]] = {}
    ready: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            sides[name] = {"error": error(call())}
            ready[name] = timer.ready(call)
        except Exception as e:  # a backend that does not serve this shape says so; Triton's errors have no common type
            sides[name] = {"state": "declined", "why": " ".join(str(e).split())[:300]}
    torchs = [s["error"] for n, s in sides.items() if n in ("default", "eager") and "error" in s]
    for name in list(ready):
        if not sides[name]["error"] <= BUDGET * max(torchs, default=0.0):
            sides[name] |= {"state": "wrong", "why": f"error over {BUDGET} times torch's own {torchs}"}
            del ready[name]
    samples: dict[str, list[float]] = {name: [] for name in ready}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(ready), len(ready)):
            samples[name].append(timer(ready[name]))
    for name, values in samples.items():
        sides[name] |= {"state": "measured", **figures(case, values, limits)}
    return {
        "case": case.name,
        "goal": case.goal,
        "against": case.against,
        "operation": case.operation,
        "size": list(case.size),
        "sides": sides,
        **ratio_of(case, sides, limits),
    }


def figures(case: Case, values: Sequence[float], limits: Mapping[str, float]) -> dict[str, Any]:
    """Quantiles, spread, achieved rate and its share of this device's measured limit."""
    found: dict[str, Any] = {name: quantile(values, share) for name, share in QUANTILES.items()}
    found["spread"] = (found["p90_ms"] - found["p10_ms"]) / found["median_ms"]
    if case.flops:
        found["tflops"] = case.flops / found["median_ms"] / 1e9
        found["share_of_product"] = found["tflops"] / limits["product_tflops"]
    if case.least_bytes:
        found["gbps"] = case.least_bytes / found["median_ms"] / 1e6
        found["share_of_copy"] = found["gbps"] / limits["copy_gbps"]
    return found


def ratio_of(case: Case, sides: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """Ours against the case's rival: a speed ratio, a share of the copy, or for blocks a ratio of latencies."""
    times = {name: s["median_ms"] for name, s in sides.items() if s["state"] == "measured"}
    if "ours" not in times:
        return {"value": None, "why": sides["ours"]["why"]}
    if case.against == "copy":
        return {"value": sides["ours"]["share_of_copy"], "rival": "copy"}
    others = {n: t for n, t in times.items() if n != "ours"}
    rival = min(others, key=others.__getitem__, default=None) if case.against == "best" else case.against
    if rival not in others:
        return {"value": None, "why": f"{rival} was not measured"}
    speed = others[rival] / times["ours"]
    return {"value": 1 / speed if case.goal in GOALS and not GOALS[case.goal].least else speed, "rival": rival}


# --- the record ------------------------------------------------------------------------------------------------------


def gpu_state(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: name, driver, clocks, power, temperature; on a CPU what bench_machine knows."""
    if device.type != "cuda":
        return {"name": "cpu", **bench_machine.device()}
    import subprocess

    fields = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.total"
    )
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]
    major, minor = torch.cuda.get_device_capability(device)
    found = dict(zip(fields.split(","), (v.strip() for v in said.split(",")), strict=False))
    return {"name": torch.cuda.get_device_name(device), "sm": 10 * major + minor, **found}


def versions() -> dict[str, str]:
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def goal_rows(cases: Sequence[Mapping[str, Any]], goals: Mapping[str, Goal] = GOALS) -> list[dict[str, Any]]:
    """For each goal its worst case: a mean would hide a shape that lost."""
    rows = []
    for id_, goal in goals.items():
        found = [c for c in cases if c["goal"] == id_]
        values = [c["value"] for c in found if c["value"] is not None]
        if not values:
            continue
        worst = min(values) if goal.least else max(values)
        best = max(values) if goal.least else min(values)
        missing = len(found) - len(values)
        rows.append({"id": id_, "what": goal.what, "worst": worst, "best": best, "mark": goal.mark(worst),
                     "floor": goal.floor, "goal": goal.goal, "moon": goal.moon, "not_measured": missing})  # fmt: skip
    return rows


def measured_family(family: str, device: torch.device, rounds: int, *, slow: bool = True, tune: bool = False) -> Any:
    """Every case of a family on this device, and the record of it."""
    timer: Timer = GpuTimer(device) if device.type == "cuda" else CpuTimer()
    before = gpu_state(device)
    limits = {"copy_gbps": copy_rate(timer, device, rounds), "product_tflops": product_rate(timer, device, rounds)}
    bench_machine.say(f"copy {limits['copy_gbps']:.0f} GB/s, product {limits['product_tflops']:.0f} TFLOP/s")
    cases = []
    for case in FAMILIES[family]:
        if case.slow and not slow:
            continue
        with torch.no_grad():
            why = tuned_case(case, device) if tune else ""
            cases.append({**measured_case(case, timer, device, rounds, limits), **({"untuned": why} if why else {})})
        bench_machine.say(line_of(cases[-1]))
    return {
        "schema": SCHEMA,
        "case": f"kernels-{family}-{device.type}",
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": bench_machine.commit(ROOT),
        "device": before,
        "device_after": gpu_state(device),
        "versions": versions(),
        "rounds": rounds,
        "limits": limits,
        "cases": cases,
        "goals": goal_rows(cases),
    }


def tuned_case(case: Case, device: torch.device) -> str:
    """Runs ours once with tuning on: each kernel measures its search space for the problem that it meets. Gives why it
    could not be: the other cases go on."""
    from optimize.kernels import tuning

    try:
        with tuning.tuning_on(device):
            case.sides(device).calls["ours"]()
    except Exception as e:
        return " ".join(f"{type(e).__name__}: {e}".split())[:300]
    return ""


def line_of(row: Mapping[str, Any]) -> str:
    sides = ", ".join(
        f"{n} {s['median_ms']:.3f} ms" if s["state"] == "measured" else f"{n} {s['state']}"
        for n, s in row["sides"].items()
    )
    value = "none" if row["value"] is None else f"{row['value']:.3f} of {row['rival']}"
    return f"{row['case']}: {value} ({sides})"


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Writes the record whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['case']}.json"
    write_json(record, path)
    return path


def write_json(what: Any, path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(what, indent=1) + "\n")
    temporary.replace(path)


def table(folder: Path) -> str:
    """The records' goals and cases as markdown."""
    paths = sorted(folder.glob("kernels-*-cuda.json"))
    if not paths:
        raise InputError(
            f"no kernel records in {folder}", expected="kernels-FAMILY-cuda.json", mend="make gpu, on a GPU"
        )
    lines: list[str] = []
    for path in paths:
        record = json.loads(path.read_text())
        lines += [
            f"**{record['case']}** on {record['device']['name']}, {record['rounds']} rounds, medians, cold L2.",
            "",
        ]
        lines += ["| # | goal | worst case | best case | reached |", "|---|---|---|---|---|"]
        lines += [
            f"| {g['id']} | {g['what']} | {g['worst']:.3g} | {g['best']:.3g} | {g['mark']} |" for g in record["goals"]
        ]
        lines += ["", *(f"- {line_of(row)}" for row in record["cases"]), ""]
    return "\n".join(lines)


# --- the tables of the kernels room ----------------------------------------------------------------------------------


def threshold_of(rows: Sequence[tuple[int, int, bool]]) -> dict[str, int] | None:
    """From (work, width, whether ours was faster than torch's own): the rule that takes in most cases and no loss."""
    rules = []
    for least, most in itertools.product({r[0] for r in rows}, {r[1] for r in rows}):
        taken = [won for work, width, won in rows if work >= least and width <= most]
        if taken and all(taken):
            rules.append((len(taken), -least, most))
    if not rules:
        return None
    _, least, most = max(rules)
    return {"min_work": -least, "max_width": most}


OWN = ("reference", "default", "eager")
"""What `auto` runs where it does not take Triton, and where that is no side of a case what stands for it."""


def thresholds_from(cases: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Operation -> where `auto` takes Triton. An operation that nowhere won has none."""
    rows: dict[str, list[tuple[int, int, bool]]] = {}
    for case in cases:
        sides = case["sides"]
        own = next((sides[n] for n in OWN if sides.get(n, {}).get("state") == "measured"), None)
        if case["operation"] and own is not None:
            won = sides["ours"]["state"] == "measured" and sides["ours"]["median_ms"] < own["median_ms"]
            rows.setdefault(case["operation"], []).append((*case["size"], won))
    found = {operation: threshold_of(of) for operation, of in rows.items()}
    return {operation: rule for operation, rule in found.items() if rule is not None}


def write_tables(records: Sequence[Mapping[str, Any]]) -> None:
    """`thresholds.json` from this run's records, and `tuned.json` from what tuning measured on this device."""
    from optimize.kernels import select, tuning

    name = records[0]["device"]["name"]
    said = {
        "made": records[-1]["made"],
        "commit": records[-1]["commit"]["revision"],
        "records": [r["case"] for r in records],
        "operations": thresholds_from(case for r in records for case in r["cases"]),
    }
    write_json({**select.thresholds(), name: said}, select.THRESHOLDS)
    measured = tuning.table_of(tuning.cache_path()).get(name)
    if measured:
        write_json({**tuning.table_of(tuning.SHIPPED), name: measured}, tuning.SHIPPED)


# --- the words -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--family", action="append", default=[], choices=list(FAMILIES), help="repeat for more")
    words.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only to try this out")
    words.add_argument("--rounds", type=int, default=30, metavar="N")
    words.add_argument("--no-slow", action="store_true", help="leave out what compiles for long")
    words.add_argument("--tune", action="store_true", help="measure each kernel's search space first")
    words.add_argument("--write-tables", action="store_true", help="tuned.json and thresholds.json of the kernels room")
    words.add_argument("--records", type=Path, default=ROOT / "profiles" / "records", metavar="DIR")
    words.add_argument("--table", action="store_true", help="print the records as markdown")
    return words


def run(args: argparse.Namespace) -> None:
    if args.rounds < 1:
        raise InputError("no rounds", got=args.rounds, expected="--rounds 1 or more")
    if args.family and args.device == "cuda" and not torch.cuda.is_available():
        raise MissingError("skipped: needs a GPU", got="torch sees none", mend="run it where there is one")
    device, records = torch.device(args.device), []
    for family in args.family:
        records.append(measured_family(family, device, args.rounds, slow=not args.no_slow, tune=args.tune))
        bench_machine.say(f"{family}: {write_record(records[-1], args.records)}")
    if args.write_tables and records and device.type == "cuda":
        write_tables(records)
    if args.table:
        print(table(args.records))


def main(words: Sequence[str] | None = None) -> int:
    args = parser().parse_args(words)
    if not (args.family or args.table):
        parser().error("nothing to do: --family or --table")
    try:
        run(args)
    except OptimizeError as e:
        print(f"bench_kernels: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
