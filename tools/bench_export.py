"""What our export costs and gives beside torch's two exporters and optimum-onnx, in interleaved rounds.

    python tools/bench_export.py --case unet-220m --rounds 5 --optimum-python ENV/bin/python
    python tools/bench_export.py --table

Every export is a process of its own. A figure is kept only where the round's graph agreed with eager fp32.
"""

from __future__ import annotations

import argparse
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimize.errors import InputError, MissingError, OptimizeError
from optimize.tools import bench_machine, bench_record
from optimize.tools.bench_cases import ALL, CASES, Case
from optimize.tools.bench_machine import WORKER, WorkerFailed, run_worker

ROOT = WORKER.parents[1]
HELP_RUNS = 10  # of each command, in each round


@dataclass
class Bench:
    """One run of one case: its words, its folder for files in the making, and what the workers said of themselves."""

    case: Case
    name: str
    sides: tuple[str, ...]
    rounds: int
    seed: int
    work: Path
    optimum: Path | None = None
    versions: dict[str, Any] = field(default_factory=dict)

    def worker(self, side: str, folder: Path, **words: Any) -> dict[str, Any]:
        """Runs one job in a process of its own. Raises WorkerFailed."""
        python = self.optimum if side == "optimum" and self.optimum else Path(sys.executable)
        job = {"side": side, "folder": str(folder), "precision": self.case.precision, **words}
        result = run_worker(job, python, self.work)
        self.versions["optimum" if side == "optimum" else "ours"] = result.pop("versions")
        return result


# --- rounds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """What every round uses: the model's folder, what is known of it, and the file with eager's answer."""

    model: Path
    facts: Mapping[str, Any]
    sizes: Mapping[str, Any]
    reference: str


def ready(bench: Bench) -> Ready:
    """Makes the model's folder where it is not there, and eager's answer where somebody will ask for it."""
    model = bench.work / f"model-{bench.name}" / "network"
    facts = bench.worker(
        "prepare", bench.work / "prepare", model=str(model), class_name=bench.case.class_name, config=bench.case.config
    )
    sizes = {"untraced": facts["sizes"]["untraced"], "latency": bench.case.latency}
    reference = ""
    if bench.case.latency:
        made = bench.worker("reference", bench.work / "reference", model=str(model), sizes=sizes)
        reference = made["reference"]
    return Ready(model, facts, sizes, reference)


def exported(bench: Bench, side: str, folder: Path, known: Ready) -> dict[str, Any]:
    """One side's export in one round; of our whole command, also the second run on the same bundle."""
    words = dict(
        model=str(known.model), inputs=known.facts["inputs"], outputs=known.facts["outputs"], memory=bench.case.memory
    )
    try:
        result = bench.worker(side, folder, **words)
        if side == "ours-gated":
            again = bench.worker(side, folder, **words)
            result |= {"again_s": again["seconds"], "again_process_s": again["process_s"]}
    except WorkerFailed as e:
        return {"error": str(e)}
    return result


def judged(bench: Bench, results: dict[str, dict[str, Any]], folder: Path, known: Ready, order: Sequence[str]) -> None:
    """Adds what each graph is, and parity and latency to each result that has no parity of its own."""
    graphs = {side: r["graph"] for side, r in results.items() if "graph" in r}
    open_ones = [side for side in order if side in graphs and "parity" not in results[side]]
    answer = bench.worker(
        "judge",
        folder,
        model=known.reference,
        graphs=graphs,
        sizes=known.sizes,
        runs=bench.case.runs,
        order=open_ones if bench.case.latency else (),
    )
    for side, said in answer["sides"].items():
        results[side] |= said
    if not bench.case.latency:  # too large for the judge: the gate's parity holds for the same nodes and weights
        gated = results.get("ours-gated", {})
        for side in open_ones:
            if results[side]["digest"] == gated.get("digest"):
                results[side]["parity"] = {**gated["parity"], "by": "our gate, on an export with the same digest"}


def run_rounds(bench: Bench, known: Ready) -> list[dict[str, Any]]:
    """Each round's results by side, in the order in which they ran."""
    rng, rounds = random.Random(bench.seed), []
    for number in range(1, bench.rounds + 1):
        order = rng.sample(bench.sides, len(bench.sides))
        folder = bench.work / f"round-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        results = {}
        for side in order:
            results[side] = exported(bench, side, folder / side, known)
            took = f"{results[side].get('seconds', 0):.1f} s"
            bench_machine.say(f"round {number} of {bench.rounds}: {side}: {results[side].get('error', took)}")
        judged(bench, results, folder / "judge", known, rng.sample(order, len(order)))
        shutil.rmtree(folder)
        rounds.append(results)
    return rounds


def run_commands(bench: Bench) -> list[dict[str, Any]]:
    """Wall time of `optimize --help` and of a Python that does nothing, in turns."""
    ours = str(Path(sys.executable).with_name("optimize"))
    commands = {"help": [ours, "--help"], "pass": [sys.executable, "-c", "pass"]}
    if not Path(ours).exists():
        raise MissingError("the `optimize` command is not beside this Python", mend="pip install -e .")
    rounds: list[dict[str, Any]] = []
    for _ in range(bench.rounds * HELP_RUNS):
        found = {}
        for name in random.Random(bench.seed + len(rounds)).sample(list(commands), 2):
            start = time.perf_counter()
            subprocess.run(commands[name], check=True, stdout=subprocess.DEVNULL)
            found[name] = time.perf_counter() - start
        rounds.append(found)
    return rounds


# --- the record ------------------------------------------------------------------------------------------------------


def record_of(bench: Bench, skipped: Mapping[str, str]) -> dict[str, Any]:
    """Runs the case and composes its record."""
    load = bench_machine.Load()
    record: dict[str, Any] = {"schema": bench_record.SCHEMA, "case": bench.name, "what": bench.case.what}
    if bench.sides or skipped:
        known = ready(bench)
        rounds: list[dict[str, Any]] = run_rounds(bench, known)
        record["model"] = model_record(bench, known)
        sides = {s: bench_record.side_from_rounds([r[s] for r in rounds]) for s in bench.sides}
    else:
        rounds = run_commands(bench)
        sides = {n: {"state": "measured", "wall_s": bench_record.figure([r[n] for r in rounds])} for n in rounds[0]}
    sides |= {side: {"state": "skipped", "why": f"skipped: {why}"} for side, why in skipped.items()}
    record |= {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": bench_machine.commit(ROOT),
        "device": bench_machine.device(),
        "load": load.so_far(),
        "versions": bench.versions or {"ours": {"python": platform.python_version()}},
        "rounds": bench.rounds,
        "seed": bench.seed,
        "order": [list(r) for r in rounds],
        "measures": bench_record.MEASURES,
        "sides": sides,
    }
    return record | {"ratios": [bench_record.ratio_row(record, r) for r in bench.case.ratios]}


def model_record(bench: Bench, known: Ready) -> dict[str, Any]:
    return {
        "class": bench.case.class_name,
        "config": bench.case.config,
        "precision": bench.case.precision,
        "parameters": known.facts["parameters"],
        "weights_bytes": known.facts["weights_bytes"],
        "axes": {name: spec["axes"] for name, spec in known.facts["inputs"].items()},
        "sizes": {**known.facts["sizes"], "latency": bench.case.latency},
    }


# --- the words -------------------------------------------------------------------------------------------------------


def run_case(
    name: str,
    *,
    rounds: int,
    seed: int,
    work: Path,
    records: Path,
    optimum: Path | None = None,
    sides: Sequence[str] = (),
) -> Path:
    """Runs one case and writes its record; gives the record's path."""
    case = CASES[name]
    chosen = [s for s in case.sides if not sides or s in sides]
    skipped = {
        s: "needs --optimum-python (make its environment with --make-optimum-env)"
        for s in chosen
        if s == "optimum" and optimum is None
    }
    bench = Bench(case, name, tuple(s for s in chosen if s not in skipped), rounds, seed, work, optimum)
    path = bench_record.write_record(record_of(bench, skipped), records)
    bench_machine.say(f"{name}: {path}")
    return path


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--case", action="append", default=[], choices=list(CASES), help="repeat for more")
    words.add_argument("--rounds", type=int, default=3, metavar="N")
    words.add_argument("--seed", type=int, default=0, metavar="N", help="of the order in each round")
    words.add_argument("--side", action="append", default=[], choices=ALL, help="only this side (repeat for more)")
    words.add_argument("--work", type=Path, metavar="DIR", help="keeps the models made (default: a temporary folder)")
    words.add_argument("--records", type=Path, default=ROOT / "profiles" / "records", metavar="DIR")
    words.add_argument("--optimum-python", type=Path, metavar="PATH", help="python of an environment with optimum-onnx")
    words.add_argument("--make-optimum-env", type=Path, metavar="DIR", help="make that environment there, then use it")
    words.add_argument("--table", action="store_true", help="print all records as markdown")
    return words


def run(args: argparse.Namespace) -> None:
    if args.rounds < 1:
        raise InputError("no rounds", got=args.rounds, expected="--rounds 1 or more")
    optimum = args.optimum_python
    if args.make_optimum_env:
        optimum = bench_machine.make_env(args.make_optimum_env, bench_machine.OPTIMUM_ENV)
    if optimum is not None and not optimum.exists():
        raise MissingError("--optimum-python is not there", got=optimum, mend="make it: --make-optimum-env DIR")
    with tempfile.TemporaryDirectory(prefix="bench-export-") as temporary:
        for name in args.case:
            run_case(
                name,
                rounds=args.rounds,
                seed=args.seed,
                work=args.work or Path(temporary),
                records=args.records,
                optimum=optimum,
                sides=args.side,
            )
    if args.table:
        print(bench_record.table(args.records))


def main(words: Sequence[str] | None = None) -> int:
    args = parser().parse_args(words)
    if not (args.case or args.table or args.make_optimum_env):
        parser().error("nothing to do: --case, --make-optimum-env or --table")
    try:
        run(args)
    except (OptimizeError, WorkerFailed) as e:
        print(f"bench_export: {e}", file=sys.stderr)
        return getattr(e, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
