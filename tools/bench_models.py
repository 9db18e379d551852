"""The profiler on full-size networks with random weights, over what is installed here: goals G9 to G14.

    python tools/bench_models.py --seconds 540
    python tools/bench_models.py --table

Each case is profiled in a process of its own and its record written at once, under `profiles/records/models-GPU.json`.
What that file holds already, of this machine and in these versions, is not measured again: run it until nothing is
left. When all cases are there, the contenders of each are profiled twice more, the first time longer, for G13 and G14.
`--case NAME --bundle NAME=DIR` profiles a bundle of a case's component, with its ONNX graphs and engines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.errors import InputError, OptimizeError
from optimize.tools.bench_kernels import ROOT, write_json
from optimize.tools.bench_machine import WorkerFailed, say
from optimize.tools.bench_profiler import label, run_profile, timed
from optimize.tools.model_cases import BACKENDS, CASES, Case
from optimize.tools.model_goals import AGAIN, goals_of, line_of, picks_of, table, values_of

SCHEMA = 1
QUANTIZED = ("int8", "fp8")
NEAR = 1.25
"""Times the fastest one's latency within which a candidate is measured again: others cannot be the best one."""
LONGER = 2
"""Times the rounds of the first measurement that the second one has: what its pick is held to."""
SPARE = 15.0
"""Seconds kept to write the record and end."""
KEPT = ("machine", "load", "settings", "limits", "rows", "choice", "notes")
"""Parts of a profile's record that this one keeps."""


@dataclass(frozen=True)
class Plan:
    """How it is measured: `machine` as records have it, `end` by the monotonic clock."""

    machine: Mapping[str, Any]
    end: float
    rounds: int
    burst: float
    backends: tuple[str, ...]
    bundles: Mapping[str, str]
    tiny: bool = False

    @property
    def left(self) -> float:
        return self.end - time.monotonic() - SPARE

    def words(self, case: Case) -> list[str]:
        """Of `optimize profile`, without what differs from one process to the next."""
        found = [self.bundles.get(case.name, case.source_at(self.tiny)), "--component", case.component]
        for precision in (case.precision, *(QUANTIZED if case.name in self.bundles else ())):
            found += ["--precision", precision]
        found += ["--shape", case.shape(self.tiny), "--device", self.machine["device"]]
        return [*found, "--samples", "0", "--operators", "none", "--burst", str(self.burst)]

    def key(self, case: Case) -> str:
        """Of all that a case's figures depend on, but for our own revision, which the entry names."""
        said = [self.words(case), self.backends, self.rounds, self.machine["key"], self.machine["versions"]]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


# --- one case --------------------------------------------------------------------------------------------------------


def entry_of(case: Case, plan: Plan) -> dict[str, Any]:
    """The case's first profile, or why there is none."""
    known = {"case": case.name, "what": case.what, "precision": case.precision, "key": plan.key(case)}
    if plan.left < case.seconds:
        why = f"not begun: {plan.left:.0f} s were left, and it takes about {case.seconds:.0f}"
        return {**known, "state": "left", "why": why}
    words = [*plan.words(case), *(w for b in plan.backends for w in ("--backend", b)), "--rounds", str(plan.rounds)]
    say(f"{case.name}: optimize profile {' '.join(words)}")
    start = time.monotonic()
    try:
        record = run_profile(words, plan.left)
    except WorkerFailed as e:
        return {**known, "state": "failed", "why": str(e)}
    found = {**known, "made": record["made"], "commit": record["machine"]["commit"], "words": words}
    found |= {"seconds": time.monotonic() - start, "profile": {k: record[k] for k in KEPT}, "again": []}
    if not timed(record):
        return {**found, "state": "failed", "why": "nothing was measured: " + whys(record)}
    return {**found, "state": "measured"}


def whys(record: Mapping[str, Any]) -> str:
    return "; ".join(f"{label(r)}: {r['why']}" for r in record["rows"] if r["why"])


def measured_again(entry: dict[str, Any], plan: Plan) -> str:
    """Profiles the case's contenders in one more process; or gives why not."""
    case, index = CASES[entry["case"]], len(entry["again"])
    backends, rounds = contenders(entry), plan.rounds * (LONGER if index == 0 else 1)
    need = entry["seconds"] * len(backends) / max(1, len(timed(entry["profile"])))
    if plan.left < need:
        return f"not measured again: {plan.left:.0f} s were left, and it takes about {need:.0f}"
    words = [*plan.words(case), *(w for b in backends for w in ("--backend", b))]
    words += ["--rounds", str(rounds), "--seed", str(index + 1)]
    say(f"{case.name}: again, {', '.join(backends)}")
    try:
        record = run_profile(words, plan.left)
    except WorkerFailed as e:
        return f"not measured again: {e}"
    entry["again"].append({k: record[k] for k in KEPT})
    return ""


def contenders(entry: Mapping[str, Any]) -> list[str]:
    """Backends of the candidates that are near the fastest one, of the pick, and eager, which ratios are to."""
    rows = timed(entry["profile"]).values()
    each = sorted(r["timing"]["median_ms"] for r in rows)
    most = max(NEAR * each[0], *each[1:2])  # two at least: a single one has no ratio
    near = {r["backend"] for r in rows if r["timing"]["median_ms"] <= most}
    chosen = {p["backend"] for p in picks_of(entry["profile"])} | {"eager"} | near
    return [b for b in dict.fromkeys(r["backend"] for r in rows) if b in chosen]


# --- the record ------------------------------------------------------------------------------------------------------


def path_of(folder: Path, machine: Mapping[str, Any], tiny: bool) -> Path:
    name = machine["gpu"]["name"] if machine["gpu"] else "cpu"
    return folder / f"models-{re.sub('[^a-z0-9]+', '-', name.lower())}{'-tiny' if tiny else ''}.json"


def entries_in(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured before. A broken file is refused: it is somebody's record."""
    if not path.exists():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())["cases"]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is no record of this tool", got=e, mend="move it away to begin anew") from e
    return found


def write(entries: Mapping[str, Mapping[str, Any]], plan: Plan, path: Path) -> dict[str, Any]:
    from optimize.kernels.select import thresholds

    values = list(values_of(entries))
    measured = thresholds().get(plan.machine["gpu"]["name"] if plan.machine["gpu"] else "cpu", {})
    record = {
        "schema": SCHEMA,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": plan.machine,
        "tiny": plan.tiny,
        "kernels": sorted(measured.get("operations", {})),  # which of ours "fused" runs here: those measured to win
        "goals": goals_of(values),
        "values": values,
        "cases": {name: entries[name] for name in CASES if name in entries},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, path)
    return record


def run_cases(names: Sequence[str], plan: Plan, path: Path, fresh: bool, again: int) -> dict[str, Any]:
    """First every case once, then the second and third processes; what is there already is kept."""
    entries = entries_in(path)
    for name in names:
        known = entries.get(name)
        if fresh or known is None or known["state"] != "measured" or known["key"] != plan.key(CASES[name]):
            found = entry_of(CASES[name], plan)
            if known is None or found["state"] != "left":
                entries[name] = found
            write(entries, plan, path)
            say(line_of(entries[name]))
        else:
            say(f"{name}: measured before, and kept")
    for index in range(again):
        for entry in (entries[n] for n in names if entries[n]["state"] == "measured"):
            if entry["key"] == plan.key(CASES[entry["case"]]) and len(entry["again"]) == index:
                entry["why_again"] = measured_again(entry, plan)
                write(entries, plan, path)
    return write(entries, plan, path)


# --- the words -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    repeated: dict[str, Any] = {"action": "append", "default": []}
    words.add_argument("--case", **repeated, choices=list(CASES), help="only this one; repeat for more")
    words.add_argument("--seconds", type=float, default=540, metavar="S", help="to be done in so long (default: 540)")
    words.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only to try this out")
    words.add_argument("--tiny", action="store_true", help="small networks of the same kinds, to try this out")
    words.add_argument("--rounds", type=int, default=9, metavar="N")
    words.add_argument("--burst", type=float, default=200, metavar="MS")
    words.add_argument("--again", type=int, default=AGAIN, metavar="N", help=f"more processes (default: {AGAIN})")
    words.add_argument("--backend", **repeated, metavar="B", help="only this one; repeat for more")
    words.add_argument("--without", **repeated, metavar="B", help="leave this backend out; repeat for more")
    words.add_argument("--bundle", **repeated, metavar="CASE=DIR", help="profile this bundle of the case's component")
    words.add_argument("--fresh", action="store_true", help="measure again what the record has")
    words.add_argument("--records", type=Path, default=ROOT / "profiles" / "records", metavar="DIR")
    words.add_argument("--table", action="store_true", help="print the records and measure nothing")
    return words


def plan_from(args: argparse.Namespace) -> Plan:
    from optimize.compile.backends import backend_from_name, device_from_word
    from optimize.profiles.machine import machine_here

    device = device_from_word(args.device)
    backends = [backend_from_name(b).name for b in args.backend or BACKENDS]
    bundles = dict(word.split("=", 1) for word in args.bundle if "=" in word)
    if unknown := [n for n in bundles if n not in CASES] or [w for w in args.bundle if "=" not in w]:
        raise InputError(
            "--bundle was not understood", got=unknown[0], expected="CASE=DIR, a case of " + ", ".join(CASES)
        )
    if args.rounds < 3:
        raise InputError("too few rounds", got=args.rounds, expected="--rounds 3 or more")
    return Plan(
        machine_here(device).model_dump(mode="json"),
        time.monotonic() + args.seconds,
        args.rounds,
        args.burst,
        tuple(b for b in backends if b not in args.without),
        bundles,
        args.tiny,
    )


def run(args: argparse.Namespace) -> None:
    if args.table:
        paths = sorted(args.records.glob("models-*.json"))
        if not paths:
            raise InputError(f"no records in {args.records}", expected="models-GPU.json", mend="make gpu, on a GPU")
        print("\n\n".join(table(json.loads(path.read_text())) for path in paths))
        return
    plan = plan_from(args)
    path = path_of(args.records, plan.machine, args.tiny)
    names = [n for n in CASES if not args.case or n in args.case]
    record = run_cases(names, plan, path, args.fresh, args.again)
    say(f"{path}")
    print(table(record))


def main(words: Sequence[str] | None = None) -> int:
    try:
        run(parser().parse_args(words))
    except OptimizeError as e:
        print(f"bench_models: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
