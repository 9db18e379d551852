"""`optimize evaluate`: its words, and what was measured as tables."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimize.tools.tables import Row, show

if TYPE_CHECKING:
    from optimize.evaluating import Evaluation
    from optimize.profiles.quality import Quality
    from optimize.progress import Progress


def words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--against", default="fp32", metavar="P", help="the reference: a precision (default: fp32), or eager"
    )
    verb.add_argument(
        "--precision", action="append", default=[], metavar="P", help="only this precision (repeat for more)"
    )
    verb.add_argument(
        "--calibration", type=Path, metavar="FILE", help="measure on these feeds: safetensors, npz, or a folder of them"
    )
    verb.add_argument("--samples", type=int, default=16, metavar="N", help="sets of feeds per network (default: 16)")
    verb.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images drawn through the whole pipeline (default: as --samples for the demo, else none)",
    )
    verb.add_argument("--seed", type=int, default=1, metavar="N", help="of data and images (default: 1)")
    verb.add_argument(
        "--features",
        metavar="FOLDER|MODULE:FACTORY",
        help="network for LPIPS, FID, KID, IS and CLIP score: a transformers vision model, or code that gives a module",
    )
    verb.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="FIGURE>=NUMBER",
        help="a gate, in quotes: 'cosine>=0.999', 'points-lost<=2' (repeat for more)",
    )
    verb.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that the bundle's source is"
    )


def measured(args: argparse.Namespace, progress: Progress) -> Evaluation:
    from optimize.evaluating import evaluate

    return evaluate(
        args.dir,
        against=args.against,
        components=args.component,
        precisions=args.precision,
        calibration=args.calibration,
        samples=args.samples,
        images=args.images,
        seed=args.seed,
        features=args.features,
        budgets=args.budget,
        trust_remote_code=args.trust_remote_code,
        progress=progress,
    )


def report(found: Evaluation, as_json: bool) -> int:
    """Prints it all and gives the exit code."""
    show_all(found, as_json)
    for text in found.missed:
        print(f"optimize: budget not met: {text}", file=sys.stderr)
    return 1 if found.missed else 0


# --- tables ----------------------------------------------------------------------------------------------------------


def show_all(found: Evaluation, as_json: bool) -> None:
    """What was measured on, figures by artifact, by timestep and of images; or all of it as JSON."""
    if as_json:
        json.dump(found.as_data(), sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    for rows in (data_rows(found), quality_rows(found), timestep_rows(found), image_rows(found)):
        if rows:
            show(rows, False)
            print()


def data_rows(found: Evaluation) -> list[Row]:
    known = {a.artifact.partition("/")[0]: a.data for a in found.artifacts}
    return [{"component": name, "measured on": data} for name, data in known.items()]


def quality_rows(found: Evaluation) -> list[Row]:
    """One row per output of an artifact, the mean and the worst sample's figure."""
    empty = {"output": "", "samples": "", **dict.fromkeys(MEANS.values(), "")}
    return [
        row
        for a in found.artifacts
        for row in (
            [{"artifact": a.artifact, "against": a.against, **empty, "note": f"skipped: {a.skipped}"}]
            if a.skipped
            else [
                {
                    "artifact": a.artifact,
                    "against": a.against,
                    "output": o.output,
                    "samples": o.samples,
                    **{
                        title: f"{short(o.figures[name])} ({short(o.worst[name])})" if name in o.figures else ""
                        for name, title in MEANS.items()
                    },
                    "note": "",
                }
                for o in worst_outputs(a.outputs)
            ]
        )
    ]


MEANS = {"cosine": "cosine (worst)", "snr": "SNR dB", "psnr": "PSNR dB", "ssim": "SSIM"}
SHOWN_OUTPUTS = 3


def worst_outputs(outputs: Sequence[Quality]) -> list[Quality]:
    """All where they are few; else those of the least SNR, with a word on the others in the name."""
    if len(outputs) <= SHOWN_OUTPUTS:
        return list(outputs)
    worst = min(outputs, key=lambda o: -math.inf if math.isnan(o.figures["snr"]) else o.figures["snr"])
    return [replace(worst, output=f"{worst.output} (worst of {len(outputs)})")]


def short(value: float) -> str:
    """Six figures, but of a cosine near one those that differ from it."""
    return f"{value:.9f}" if 0.999 < value < 1 else f"{value:.6g}"


def timestep_rows(found: Evaluation) -> list[Row]:
    return [
        {
            "artifact": a.artifact,
            "output": o.output,
            "timestep": timestep,
            **{title.removesuffix(" (worst)"): short(figures[n]) if n in figures else "" for n, title in MEANS.items()},
        }
        for a in found.artifacts
        for o in a.outputs
        for timestep, figures in o.by_timestep.items()
    ]


def image_rows(found: Evaluation) -> list[Row]:
    """One row per figure, the reference's own beside it where there is one."""
    rows: list[Row] = []
    for i in found.images:
        what = {"variant": i.variant, "images": len(i.drawing.prompts) if i.drawing else 0}
        if i.figures is None:
            rows.append({**what, "figure": "", "value": "", "reference": "", "note": f"skipped: {i.skipped}"})
            continue
        for name, value in i.figures.figures.items():
            reference = i.figures.reference.get(name)
            rows.append(
                {
                    **what,
                    "figure": name,
                    "value": short(value),
                    "reference": "" if reference is None else short(reference),
                    "note": "",
                }
            )
        for name, why in i.figures.skipped.items():
            rows.append({**what, "figure": name, "value": "", "reference": "", "note": f"skipped: {why}"})
    return rows
