"""The words of `optimize profile`, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimize.profiles.schema import Profile
    from optimize.progress import Progress


def words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("what", metavar="DIR|SOURCE", help="a bundle, or a source to run without exporting it")
    what_words(verb)
    how_words(verb.add_argument_group("how it is measured"))
    answer_words(verb.add_argument_group("the answer"))
    verb.add_argument("--dry-run", action="store_true", help="list the candidates and measure nothing")
    verb.add_argument("--allow-pickle", action="store_true", help="read pickled weights (reading one can run its code)")
    verb.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    verb.add_argument("--json", action="store_true", help="the whole record on stdout")


def what_words(verb: argparse.ArgumentParser) -> None:
    repeated: dict[str, Any] = {"action": "append", "default": []}
    verb.add_argument("--component", **repeated, metavar="NAME", help="only this component (repeat for more)")
    verb.add_argument(
        "--backend",
        **repeated,
        metavar="B",
        help="eager, torch.compile (also -max-autotune, -regional, -cudagraphs), fused (our kernels; also "
        "torch.compile-fused), aoti, onnxruntime (also -cuda, -tensorrt), tensorrt (also -cudagraphs); repeat for more "
        "(default: what is there)",
    )
    verb.add_argument("--precision", **repeated, metavar="P", help="fp32, fp16, bf16, int8, ...; repeat for more")
    verb.add_argument(
        "--shape",
        **repeated,
        metavar="NAME=AXIS:SIZE,...",
        help="sizes by name, such as big=height:1024,width:1024; or min, opt, max of the axes; repeat for more",
    )
    verb.add_argument("--axis", **repeated, metavar="NAME=MIN:OPT:MAX", help="axes of a source, as for export")
    verb.add_argument("--steps", type=int, metavar="N", help="denoising steps of an image (default: 25)")
    verb.add_argument("--guidance", type=float, metavar="S", help="guidance scale (default: the pipeline's own)")
    verb.add_argument(
        "--target", **repeated, metavar="GPU", help="an ESTIMATE for a GPU that is not here, from its roofline; repeat"
    )


def how_words(verb: argparse._ActionsContainer) -> None:
    verb.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda")
    verb.add_argument("--threads", type=int, default=0, metavar="N", help="of a CPU (default: all cores)")
    verb.add_argument("--rounds", type=int, default=9, metavar="N", help="interleaved rounds (default: 9)")
    verb.add_argument("--burst", type=float, default=200, metavar="MS", help="of each candidate in a round (200)")
    verb.add_argument("--attempts", type=int, default=3, metavar="N", help="until the rounds agree (default: 3)")
    verb.add_argument(
        "--patience", type=float, default=3, metavar="X", help="wait X times as long for a calm machine (default: 3)"
    )
    verb.add_argument("--cold-cache", action="store_true", help="caches are overwritten before each run")
    verb.add_argument("--samples", type=int, default=8, metavar="N", help="real feeds for the quality (default: 8)")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of feeds and of the order (default: 0)")
    verb.add_argument("--operators", default="picks", metavar="W", help="where time goes: none, picks (default), all")


def answer_words(verb: argparse._ActionsContainer) -> None:
    repeated: dict[str, Any] = {"action": "append", "default": []}
    verb.add_argument("--slo", **repeated, metavar="P<T", help="p95<100ms: of an image, or of each component")
    verb.add_argument("--quality", **repeated, metavar="FIGURE>=N", help="cosine>=0.999, snr>=30, psnr>=30")
    verb.add_argument("--memory", metavar="SIZE", help="at most so much (16GiB)")
    verb.add_argument("--price-per-hour", type=float, metavar="P", help="of this machine: gives the cost of 1000 runs")
    verb.add_argument("--load", metavar="N/UNIT", help="3/s or 200000/day: gives machines and cost per month")
    verb.add_argument("--plan", type=Path, metavar="FILE", help="write the answer for optimize.load(DIR, plan=FILE)")
    verb.add_argument("--report", type=Path, metavar="DIR", help="write report.html and profile.json there")
    verb.add_argument("--against", type=Path, metavar="RECORD", help="compare with an older profile.json")
    verb.add_argument("--fail-on", choices=["slower"], help="with --against: exit 1 where something got slower")
    verb.add_argument("--log", choices=["wandb"], help="log the record to Weights & Biases")


def measured(args: argparse.Namespace, progress: Progress) -> Any:
    """What the words ask for: a record, or with --dry-run the rows of the plan."""
    from optimize.errors import InputError
    from optimize.profiling import profile

    if args.fail_on and args.against is None:
        raise InputError("--fail-on compares", got="no --against", expected="--against RECORD", mend="name a record")
    if args.log and args.report is None:
        raise InputError("--log logs the report", got="no --report", expected="--report DIR", mend="name a folder")
    return profile(
        args.what,
        backends=args.backend,
        precisions=args.precision,
        components=args.component,
        shapes=args.shape,
        axes=args.axis,
        device=args.device,
        threads=args.threads,
        samples=args.samples,
        rounds=args.rounds,
        burst_ms=args.burst,
        attempts=args.attempts,
        patience=args.patience,
        cold_cache=args.cold_cache,
        seed=args.seed,
        operators=args.operators,
        steps=args.steps,
        guidance=args.guidance,
        targets=args.target,
        slo=args.slo,
        quality=args.quality,
        memory=args.memory,
        price_per_hour=args.price_per_hour,
        load=args.load,
        against=args.against,
        report=args.report,
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
        dry_run=args.dry_run,
        progress=progress,
    )


def show(record: Any, args: argparse.Namespace) -> int:
    """Prints the record, and writes what else was asked for. 1 where the wishes are not met."""
    from optimize.tools import profile_tables, tables

    if args.dry_run:
        from optimize.measuring import STEPS

        tables.show(record, args.json, steps=STEPS)
        return 0

    met = record.choice is not None and record.choice.met
    if args.plan is not None and met:
        from optimize.profiles.plan import write_plan

        write_plan(record, args.plan)
    if args.report is not None:
        from optimize.tools.report import write_report

        page = write_report(record, args.report)
        print(f"optimize: the report is {page}", file=sys.stderr)
    if args.log == "wandb":
        from optimize.tools.tracking import log_to_wandb

        print(f"optimize: logged to {log_to_wandb(record, args.report)}", file=sys.stderr)
    if args.json:
        print(json.dumps(record.model_dump(mode="json"), indent=1))
    else:
        profile_tables.show_profile(record)
    if args.plan is not None and not met:
        print(f"optimize: {args.plan} is not written: nobody meets the wishes", file=sys.stderr)
    return code_of(record, args.fail_on)


def code_of(record: Profile, fail_on: str | None) -> int:
    """1 where nobody meets the wishes, and with `fail_on` where something got slower or nothing could be compared;
    3 where all that was asked for is missing here."""
    if all(row.state == "skipped" for row in record.rows):
        print("optimize: nothing that was asked for can run here", file=sys.stderr)
        return 3
    if record.choice is None or not record.choice.met:
        return 1
    return 1 if fail_on and slower_than_before(record) else 0


def slower_than_before(record: Profile) -> bool:
    """Whether the gate fails; says why, and what could not be told."""
    from optimize.profiles.comparing import regressions

    assert record.comparison is not None
    slower, changes = regressions(record.comparison), record.comparison.changes
    for c in slower:
        print(f"optimize: {c.component} {c.candidate} at {c.shape}: {c.ratio:.3g}x as slow as before", file=sys.stderr)
    undecided = [c for c in changes if c.verdict == "undecided"]
    decided = [c for c in changes if c.verdict in ("slower", "faster", "same")]
    if undecided:
        whys = ", ".join(dict.fromkeys(c.why for c in undecided))
        print(f"optimize: {len(undecided)} of {len(changes)} rows could not be compared: {whys}", file=sys.stderr)
    return bool(slower) or not decided
