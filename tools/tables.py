"""Results as rows: a table for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Layer
    from optimize.exporting import Plan

Row = Mapping[str, Any]


def show(rows: Sequence[Row], as_json: bool, *, steps: Sequence[str] = (), stream: TextIO | None = None) -> None:
    """Prints rows on stdout (or `stream`). A terminal's width is kept to; a pipe gets every column whole."""
    out = stream or sys.stdout
    if as_json:
        json.dump({"rows": list(rows), "steps": list(steps)} if steps else list(rows), out, indent=1, default=str)
        out.write("\n")
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, width=None if out.isatty() else 240, highlight=False)
    for i, step in enumerate(steps, 1):
        console.print(f"{i}. {step}")
    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        right = all(isinstance(row[name], int | float) and not isinstance(row[name], bool) for row in rows)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(text_of(value) for value in row.values()))
    console.print(table)


def text_of(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape("" if value is None else str(value))


def plan_rows(plan: Plan) -> list[Row]:
    return [
        {
            "artifact": s.artifact,
            "class": s.component.class_name,
            "axes": ", ".join(f"{n}={a}" for n, a in s.component.axes.items()),
            "target": s.target[0] if s.target else "",
            "do": "keep" if s.hit else "make",
            "why": s.why,
        }
        for s in plan.steps
    ]


def plan_steps(plan: Plan) -> Sequence[str]:
    from optimize.exporting import STEPS

    return STEPS


def bundle_rows(bundle: Bundle) -> list[Row]:
    """One row per graph, engine and package."""
    rows: list[Row] = []
    for a in bundle.artifacts():
        if a.kind not in ("onnx", "engine", "aoti"):
            continue
        weights = sum(bundle.manifest.artifacts[p].bytes for p in a.parents if a.kind == "onnx")
        parity = f"{a.parity.worst:.1e} ({a.parity.how})" if a.parity else "of " + a.parents[0]
        rows.append(
            {
                "artifact": a.id,
                "file": a.path,
                "MB": round((a.bytes + weights) / 1e6, 2),
                "nodes": a.spec.get("nodes", ""),
                "seconds": round(sum(a.seconds.values()), 1),
                "parity": parity,
                "downgrades": f"{len(a.downgrades)}: {a.downgrades[0]}" if a.downgrades else "",
            }
        )
    return rows


def target_rows() -> list[Row]:
    from optimize.profiles.targets import TARGETS

    return [
        {
            "name": t.name,
            "device": t.device,
            "SM": t.sm,
            "GiB": t.memory_gib,
            "GB/s": t.bandwidth_gbs,
            "W": t.power_w,
            **{f"{p} TFLOP/s": v for p, v in vars(t.peak).items()},
            "source": f"{t.source.title} <{t.source.url}>",
        }
        for t in TARGETS.values()
    ]


def measured_rows() -> list[Row]:
    """What was measured here just now, in the columns of `target_rows`; figures that nobody measures are empty."""
    import torch

    from optimize.profiles.limits import limits_of_device
    from optimize.profiles.targets import TARGETS

    kinds = list(vars(next(iter(TARGETS.values())).peak))
    found = [limits_of_device("cpu"), *([limits_of_device("cuda")] if torch.cuda.is_available() else [])]
    return [
        {
            "name": "measured",
            "device": limits.target,
            "SM": None,
            "GiB": None,
            "GB/s": round(limits.bandwidth_gbs, 1),
            "W": None,
            **{f"{p} TFLOP/s": significant(limits.peak_gflops.get(p)) for p in kinds},
            "source": "measured: " + "; ".join(limits.sources),
        }
        for limits in found
    ]


def significant(gflops: float | None) -> float | None:
    """TFLOP/s with three digits."""
    return None if gflops is None else float(f"{gflops / 1e3:.3g}")


def layer_rows(plan: Mapping[str, Sequence[Layer]]) -> list[Row]:
    """What each layer would become, by component."""
    return [
        {"component": name, "layer": x.module, "kind": x.kind, "precision": x.precision, "why": x.why}
        for name, layers in plan.items()
        for x in layers
    ]


def show_receipts(bundle: Bundle, ids: Iterable[str], as_json: bool) -> None:
    """Each quantized artifact: its headline first, then the counts; with sensitivities, the layers that cost most."""
    from optimize.tools.plots import sensitivity_plot

    wanted = set(ids)
    made = [(a, a.receipt) for a in bundle.artifacts(kind="onnx") if a.id in wanted and a.receipt is not None]
    if as_json:
        show([{"artifact": a.id, "path": a.path, **r.model_dump(mode="json")} for a, r in made], True)
        return
    for artifact, receipt in made:
        print(f"{artifact.id}: {receipt.headline}")
    show(
        [
            {
                "artifact": a.id,
                "found": r.found,
                "chosen": r.chosen,
                "calibrated": "" if r.calibrated is None else r.calibrated,
                "exported": r.exported,
                "kernels": "" if r.kernels is None else r.kernels,
                "MB": f"{r.bytes_base / 1e6:.2f} -> {r.bytes_quantized / 1e6:.2f}",
                "ms": f"{r.latency.base:.2f} -> {r.latency.quantized:.2f}" if r.latency else "",
                "budget": r.budget,
            }
            for a, r in made
        ],
        False,
    )
    for artifact, receipt in made:
        ranked = sorted((x for x in receipt.layers if x.error is not None), key=lambda x: -(x.error or 0))
        if ranked:
            picture = bundle.root / "quality" / f"{artifact.id.replace('/', '.')}.sensitivity.svg"
            drawn = sensitivity_plot(artifact.id, receipt, picture)
            print(
                f"{artifact.id}: what each layer alone does to the output, the worst first"
                + (f"; all of them in {drawn}" if drawn else "")
            )
            show(
                [
                    {
                        "layer": x.module,
                        "error": f"{x.error:.2e}",
                        "M products": round(x.gain or 0, 2),
                        "now": x.precision,
                    }
                    for x in ranked[:12]
                ],
                False,
            )
