"""Whether the profiler's numbers can be trusted: the same answer in processes one after another, and by other clocks.

    python tools/bench_profiler.py --out profiles/records/profiler-cpu.json

Goals G13 (the pick over the true best) and G14 (spread of a ratio over three processes), on this machine's device; one
thread rules, for how two share their cores with what else runs is luck. The true best is the one with the least median
over all processes together. Independent clocks time the same bound work in turn with ours: `torch.utils.benchmark` for
every backend, and ONNX Runtime's own profile of the very same runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from optimize.profiles.schema import Settings, Timing
from optimize.profiles.timing import ratio_of
from optimize.tools import bench_machine
from optimize.tools.bench_machine import WorkerFailed

SOURCE, PRECISIONS = "demo", ("fp32", "int8")
BACKENDS = ("eager", "torch.compile", "onnxruntime")
SHAPE = "large=height:64,width:64,batch:4,tokens:16"
AGREE, SPREAD_GOAL, PICK_GOAL = 0.05, 0.05, 1.05
"""Clocks; the floors of G14 and G13."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--component", action="append", default=[], metavar="NAME", help="default: all of the demo")
    found.add_argument("--backend", action="append", default=[], metavar="B", help="default: " + ", ".join(BACKENDS))
    found.add_argument("--processes", type=int, default=3, metavar="N")
    found.add_argument("--rounds", type=int, default=9, metavar="N")
    found.add_argument("--burst", type=float, default=200, metavar="MS")
    found.add_argument("--patience", type=float, default=10, metavar="X", help="of each profile (default: 10)")
    found.add_argument("--threads", type=int, default=1, metavar="N", help="0: as many as torch takes")
    found.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of the demo (default: exported for this)")
    found.add_argument("--shape", default=SHAPE, metavar="NAME=AXIS:SIZE,...")
    found.add_argument("--out", type=Path, metavar="FILE", help="write the record here")
    return found


def main(words: Sequence[str] | None = None) -> int:
    args = parser().parse_args(words)
    load = bench_machine.Load()
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or exported(Path(folder) / "demo")
        records = [profiled(bundle, args, i) for i in range(args.processes)]
        clocks = list(other_clocks(bundle, args, records[0]))
    record = {
        "schema": 1,
        "device": records[0]["machine"],
        "commit": bench_machine.commit(Path(__file__).parent.parent),
        "load": load.so_far(),
        "settings": records[0]["settings"],
        "shape": args.shape,
        "threads": args.threads,
        "processes": [summary(r) for r in records],
        "agreement": agreement(records),
        "clocks": clocks,
    }
    show(record)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def exported(folder: Path) -> Path:
    from optimize.exporting import export

    bench_machine.say("export the demo")
    export(SOURCE, folder, precisions=PRECISIONS)
    return folder


def profiled(bundle: Path, args: argparse.Namespace, index: int) -> dict[str, Any]:
    """`optimize profile`, in a process of its own, as a user runs it."""
    words = [
        str(bundle),
        "--shape",
        args.shape,
        "--operators",
        "none",
        "--samples",
        "0",
        "--seed",
        str(index),
    ]
    words += ["--rounds", str(args.rounds), "--burst", str(args.burst), "--threads", str(args.threads)]
    words += ["--patience", str(args.patience)]
    for name in args.component:
        words += ["--component", name]
    for name in args.backend or BACKENDS:
        words += ["--backend", name]
    bench_machine.say(f"process {index + 1}: optimize profile {' '.join(words[1:])}")
    try:
        return run_profile(words)
    except WorkerFailed as e:
        raise SystemExit(f"bench_profiler: {e}") from e


def run_profile(words: Sequence[str], seconds: float | None = None) -> dict[str, Any]:
    """The record of `optimize profile WORDS`, in a process of its own, as a user runs it.

    Raises WorkerFailed where it breaks, or takes longer than `seconds`: it and all that it started are ended then.
    """
    command = [sys.executable, "-m", "optimize.tools.cli", "profile", *words, "--json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=out, stderr=said, process_group=0)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise WorkerFailed(f"it took more than {seconds:.0f} s; last: {last_line(said)}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code not in (0, 1):
            raise WorkerFailed(f"exit code {code}: {last_line(said)}")
        out.seek(0)
        found: dict[str, Any] = json.load(out)
    return found


def last_line(file: IO[bytes]) -> str:
    """What it said last; of an error what, got and expected stand on a line each."""
    file.seek(0)
    return bench_machine.last_words(file.read().decode(errors="replace") or "silent")[:400]


def label(row: Mapping[str, Any]) -> str:
    return f"{row['backend']} {row['precision']}"


def timed(record: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """(component, candidate) -> its row, at the shape that was asked for."""
    first: dict[str, str] = {}
    for row in record["rows"]:
        first.setdefault(row["component"], row["shape"])
    return {
        (r["component"], label(r)): r for r in record["rows"] if r["timing"] and r["shape"] == first[r["component"]]
    }


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    rows = timed(record)
    return {
        "load": record["load"],
        "picks": {p["component"]: f"{p['backend']} {p['precision']}" for p in record["choice"]["picks"]},
        "medians_ms": {f"{c} {n}": r["timing"]["median_ms"] for (c, n), r in rows.items()},
        "ratios": {f"{c} {n}": r["ratio"]["value"] for (c, n), r in rows.items() if r["ratio"]},
        "states": {f"{c} {n}": r["state"] for (c, n), r in rows.items()},
    }


def ratio(row: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """A row's latency over that of another one of the same record, round by round."""
    ours, theirs = (Timing.model_validate(r["timing"]) for r in (row, reference))
    return ratio_of(ours, theirs, label(reference)).value


def agreement(records: Sequence[Mapping[str, Any]], to: str = "eager fp32") -> list[dict[str, Any]]:
    """Per component: the picks, the spread of every ratio (to the candidate `to`), and what the picks cost beside the
    true best. Only candidates that every record has count."""
    every, found = [timed(r) for r in records], []
    for component in dict.fromkeys(c for rows in every for c, _ in rows):
        names = [n for c, n in every[0] if c == component and all((component, n) in rows for rows in every)]
        pooled = {n: statistics.median(rows[component, n]["timing"]["median_ms"] for rows in every) for n in names}
        held = names if to in names else []
        ratios = {n: [ratio(rows[component, n], rows[component, to]) for rows in every] for n in held}
        spreads = {n: (max(r) - min(r)) / statistics.median(r) for n, r in ratios.items()}
        picks = [
            f"{p['backend']} {p['precision']}"
            for r in records
            for p in r["choice"]["picks"]
            if p["component"] == component
        ]
        if not names:
            continue
        best = min(pooled, key=lambda n: pooled[n])
        found.append(
            {
                "component": component,
                "picks": picks,
                "same_pick": len(set(picks)) == 1,
                "best": best,
                "pooled_ms": pooled,
                "pick_over_best": max(pooled[p] for p in picks) / pooled[best] if {*picks} <= {*pooled} else None,
                "ratios": ratios,
                "spreads": spreads,
                "worst_spread": max(spreads.values(), default=None),
            }
        )
    return found


# --- other clocks -----------------------------------------------------------------------------------------------------


def other_clocks(bundle: Path, args: argparse.Namespace, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same bound work, by our bursts and by others' clocks in turn, in this process."""
    from optimize.candidates import candidates_of, subject_from
    from optimize.compile.feeds import feeds_for
    from optimize.profiles.timing import on_cores
    from optimize.seats import runner_of_job

    subject = subject_from(bundle, args.component, (), ())
    for component, name in timed(record):
        found = candidates_of(
            subject, component, args.backend or BACKENDS, (), record["machine"]["device"], args.threads
        )
        job = next(c.job for c in found if c.name == name)
        sizes = next(r["sizes"] for r in record["rows"] if r["component"] == component)
        bench_machine.say(f"other clocks: {component} {name}")
        runner: Any = runner_of_job(job)
        feeds = feeds_for(subject.components[component].inputs, sizes, "fp32")
        with tempfile.TemporaryDirectory() as folder:
            if job.backend.startswith("onnxruntime"):
                runner.trace = Path(folder) / "ort"
            with on_cores(args.threads), runner:
                yield {
                    "component": component,
                    "candidate": name,
                    **by_clocks(runner, feeds, args.threads, Settings(**record["settings"])),
                }


def by_clocks(runner: Any, feeds: Any, threads: int, settings: Settings) -> dict[str, Any]:
    """Medians in milliseconds of each clock, and ours over theirs. Clocks take the profile's turns; those beside a pace
    slower than the best tell nothing of them."""
    from torch.utils.benchmark import Timer

    from optimize.profiles.timing import burst_of, pace_of

    run, device = runner.bind(feeds), getattr(runner, "device", "cpu")
    run()
    burst_of(run, device, settings.burst_ms, settings.burst_ms, False)
    timer, rounds = (
        Timer("run()", globals={"run": run}, num_threads=torch_threads()),
        list[tuple[float, float, float]](),
    )
    pace, turn_ms = pace_of(device, threads) or (lambda: 0.0), settings.turn_ms or settings.burst_ms
    for _ in range(settings.rounds * round(settings.burst_ms / turn_ms)):
        before, burst = pace(), burst_of(run, device, turn_ms, 0, False)
        theirs = 1e3 * timer.blocked_autorange(min_run_time=turn_ms / 1e3).median
        rounds.append((max(before, pace()), statistics.median(burst.times_ms), theirs))
    calm_ms = (1 + settings.pace) * min(ms for ms, _, _ in rounds)
    calm = [(ours, theirs) for ms, ours, theirs in rounds if ms <= calm_ms]
    found: dict[str, Any] = {"turns": len(rounds), "calm_turns": len(calm)}
    found |= {
        "ours_ms": statistics.median(a for a, _ in calm),
        "torch_benchmark_ms": statistics.median(b for _, b in calm),
    }
    ratios = {"torch_benchmark": statistics.median(a / b for a, b in calm)}
    if getattr(runner, "trace", None) is not None:
        burst = burst_of(run, device, settings.burst_ms, 20, False)
        own = model_runs_ms(runner)[-len(burst.times_ms) :]
        found["onnxruntime_ms"] = statistics.median(own)
        ratios["onnxruntime"] = statistics.median(a / b for a, b in zip(burst.times_ms, own, strict=True))
    return {**found, "ours_over": ratios}


def torch_threads() -> int:
    import torch

    return int(torch.get_num_threads())


def model_runs_ms(runner: Any) -> list[float]:
    """What ONNX Runtime's own profile says of every run, in order."""
    events = json.loads(Path(runner._session.end_profiling()).read_text())
    return [e["dur"] / 1e3 for e in events if e.get("name") == "model_run"]


def show(record: Mapping[str, Any]) -> None:
    states = [state for p in record["processes"] for state in p["states"].values()]
    print(f"{states.count('inconclusive')} of {len(states)} latencies are inconclusive by their own account")
    busy = record["load"]["busy"]
    if busy:
        print(f"the machine was busy: others took {record['load']['others']:.0%} of it")
    for row in record["agreement"]:
        print(
            f"{row['component']}: picks {', '.join(row['picks'])} ({'same' if row['same_pick'] else 'NOT THE SAME'}); "
            f"best {row['best']}; G13 pick/best {row['pick_over_best'] or 0:.3f} (floor {PICK_GOAL}); "
            f"G14 worst spread of a ratio {row['worst_spread'] or 0:.1%} (floor {SPREAD_GOAL:.0%})"
        )
    for row in record["clocks"]:
        said = ", ".join(f"{k} {v:.3f}" for k, v in row["ours_over"].items())
        mark = "agree" if all(abs(v - 1) <= AGREE for v in row["ours_over"].values()) else "DO NOT AGREE"
        print(f"{row['component']} {row['candidate']}: {row['ours_ms']:.3f} ms; ours over theirs: {said} ({mark})")


if __name__ == "__main__":
    sys.exit(main())
