"""A quantized artifact's receipt: its figures against the base artifact, and the count of its layers at each stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError

if TYPE_CHECKING:
    import torch

    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact, Latency, Parity, Quality, Receipt
    from optimize.compile.runners import Feeds
    from optimize.compile.spec import Component
    from optimize.quantize.place import Placement
    from optimize.quantize.sites import Site
    from optimize.quantizing import Work

    Infer = Callable[[Feeds], dict[str, torch.Tensor]]

FLOOR_DB = 10.0
"""Random feeds lie outside of what was calibrated. A right graph is far above this there, a wrong one below 0."""
ROUNDS, SECONDS = 15, 6.0


def session(work_path: Path, **entries: str) -> Any:
    import onnx_ir as ir

    from optimize.quantize.running import GraphSession, session_options

    return GraphSession(ir.load(work_path), work_path.parent, options=session_options(None, 0, **entries))


def simulation(scheme: str, runtime: str) -> dict[str, str]:
    """ONNX Runtime's CPU has no fp8 kernels, and cannot load some graphs that are placed for TensorRT: Q and DQ are run
    as they stand there, and the rest in floating point."""
    from optimize.quantize.running import NO_QDQ

    return {NO_QDQ: "1"} if scheme == "fp8" or runtime == "tensorrt" else {}


def quality_of(work: Work, path: Path) -> list[Quality]:
    """Every output that is a float against the base artifact's, over the held-out samples."""
    assert work.held_out is not None
    base, few = session(work.path), session(path, **simulation(work.request.scheme, work.request.runtime))
    return compared(base.run, few.run, work.held_out)


def compared(base: Infer, few: Infer, samples: Iterable[Feeds]) -> list[Quality]:
    """Every output of `base` that is a float, and the same of `few`, over the samples."""
    from optimize.compile.records import Quality
    from optimize.profiles.quality import mean, worst
    from optimize.quantize.measures import cosine, psnr, snr

    figures: dict[str, list[tuple[float, float, float]]] = {}
    for feeds in samples:
        exact, got = base(feeds), few(feeds)
        for name, tensor in exact.items():
            if tensor.is_floating_point() and tensor.numel():
                pair = got[name], tensor
                figures.setdefault(name, []).append((cosine(*pair), snr(*pair), psnr(*pair)))
    return [
        Quality(
            output=name,
            cosine=statistics.fmean(c for c, _, _ in rows),
            lowest=worst(c for c, _, _ in rows),
            snr=mean([s for _, s, _ in rows]),
            psnr=mean([p for _, _, p in rows]),
            samples=len(rows),
        )
        for name, rows in figures.items()
    ]


def proof(path: Path, base_path: Path, base: Artifact, scheme: str, runtime: str, component: Component) -> Parity:
    """The quantized graph at the three sets of sizes against the base artifact, on random feeds."""
    from optimize.compile.feeds import feeds_for
    from optimize.compile.records import OutputError, Parity, ShapeParity
    from optimize.profiles.parity import distance

    few, exact_session = session(path, **simulation(scheme, runtime)), session(base_path)
    limit = 10 ** (-FLOOR_DB / 20)
    shapes = []
    for name, sizes in component.shape_sets().items():
        feeds = feeds_for(component.inputs, sizes, str(base.spec["precision"]))
        exact, got = exact_session.run(feeds), few.run(feeds)
        errors = []
        for output, tensor in exact.items():
            relative, worst = distance([got[output]], [tensor])
            finite = bool(got[output].float().isfinite().all())
            errors.append(OutputError(name=output, relative=relative, worst=worst, finite=finite))
        shapes.append(
            ShapeParity(name=name, sizes=sizes, outputs=errors, passed=all(e.relative <= limit for e in errors))
        )
    parity = Parity(
        backend="onnxruntime CPU",
        reference=base.id,
        how="whole",
        rule=f"SNR >= {FLOOR_DB:g} dB on random feeds at each set of sizes; the receipt has the figures on real ones",
        shapes=shapes,
        passed=all(s.passed for s in shapes),
    )
    if not parity.passed:
        shape = next(s for s in shapes if not s.passed)
        error = max(shape.outputs, key=lambda e: e.relative)
        raise GateError(
            f"{base.component} in {scheme} is far off at the {shape.name} sizes",
            got=f"{error.name} is off by {error.relative:.2g} at {dict(shape.sizes)}",
            expected=parity.rule,
            mend="calibrate with samples of such sizes (--calibration), or leave layers high (--keep-high)",
        )
    return parity


def verified(bundle: Bundle, artifact: Artifact, component: Component) -> str:
    """Proves a quantized artifact again: near its base at every set of sizes, and its layers' counts as the receipt has
    them. Raises GateError where it is not so; gives the figures."""
    from optimize.quantize import receipt as counting
    from optimize.quantize.place import Placement
    from optimize.quantize.schemes import SCHEMES

    receipt = artifact.receipt
    assert receipt is not None
    base, path = bundle.manifest.artifacts[receipt.base], bundle.path(artifact)
    parity = proof(path, bundle.path(base), base, receipt.scheme, receipt.runtime, component)
    chosen = {x.name for x in receipt.layers if x.precision == receipt.scheme}
    sites = tuple(s for s in sites_in(bundle.path(base)) if s.name in chosen)
    placement = Placement(SCHEMES[receipt.scheme], receipt.runtime, receipt.method, sites)
    written, fused = counting.exported(path, placement), None
    if receipt.kernels is not None:
        with bundle.workspace(f"verify {artifact.id}") as folder:
            fused = len(counting.kernels(path, placement, folder))
    if (len(chosen), len(written), fused) != (receipt.chosen, receipt.exported, receipt.kernels):
        raise GateError(
            f"{artifact.id}: its layers are not those of its receipt",
            got=f"{len(chosen)} chosen, {len(written)} with Q and DQ, {fused} integer kernels",
            expected=f"{receipt.chosen}, {receipt.exported}, {receipt.kernels}",
            mend="quantize again",
        )
    return f"within {parity.worst:.1e} of {base.id}; {receipt.chosen} layers as the receipt says"


def sites_in(path: Path) -> list[Site]:
    import onnx_ir as ir

    from optimize.quantize.sites import sites_of

    return [replace(s, stays="") for s in sites_of(ir.load(path))]


def latency_of(work: Work, path: Path) -> Latency | None:
    """Base and quantized artifact in turn, in one process, on the first held-out sample."""
    from optimize.compile.records import Latency
    from optimize.quantize.running import session_options

    if work.request.runtime != "onnxruntime":
        return None
    assert work.held_out is not None
    feeds = next(iter(work.held_out))
    sides = [session(work.path), session(path)]
    times: list[list[float]] = [[], []]
    for side in sides:
        side.run(feeds)
    end = time.perf_counter() + SECONDS
    while len(times[0]) < 3 or (len(times[0]) < ROUNDS and time.perf_counter() < end):
        for i, side in enumerate(sides):
            start = time.perf_counter()
            side.run(feeds)
            times[i].append(1e3 * (time.perf_counter() - start))
    medians = [statistics.median(t) for t in times]
    spreads = [
        (sorted(t)[int(0.9 * len(t))] - sorted(t)[int(0.1 * len(t))]) / m for t, m in zip(times, medians, strict=True)
    ]
    sizes = {f"{k}.{i}": int(d) for k, t in feeds.items() for i, d in enumerate(t.shape)}
    threads = int(session_options().intra_op_num_threads)
    return Latency(
        base=medians[0], quantized=medians[1], rounds=len(times[0]), threads=threads, spread=max(spreads), sizes=sizes
    )


def receipt_of(work: Work, placement: Placement, quality: list[Quality]) -> Receipt:
    """Counts each site through all stages. Raises GateError where the counts do not agree."""
    from optimize.compile.records import Layer, Receipt
    from optimize.quantize import receipt as counting
    from optimize.quantize.scales import method_for

    request, path = work.request, work.folder / f"{work.stem}.onnx"
    chosen = [s.name for s in placement.chosen()]
    written = counting.exported(path, placement)
    static = placement.scheme.activations == "static"
    seen = placement.calibration.seen if placement.calibration else {}
    ranged = {s.name for s in placement.chosen() if all(name in seen for name in s.reads)}
    fused: set[str] | None = None
    if request.runtime == "onnxruntime":
        fused = counting.kernels(path, placement, work.folder)
    assert work.samples is not None
    lost = [f"{n}: not calibrated" for n in chosen if static and n not in ranged]
    if static and (placement.calibration is None or placement.calibration.digest != work.samples.digest()):
        lost.append("calibration: not of these samples")
    lost += [f"{n}: no Q/DQ in the file" for n in chosen if n not in written]
    lost += [f"{n}: ONNX Runtime computes it in floating point" for n in chosen if fused is not None and n not in fused]
    effects = {e.site: e for e in work.effects}
    layers = [
        Layer(
            name=s.name,
            module=s.module,
            kind=s.kind,
            precision=str(work.base.spec["precision"]) if s.stays else request.scheme,
            why=s.stays or split_of(placement, s),
            error=effects[s.name].error if s.name in effects else None,
            gain=effects[s.name].gain if s.name in effects else None,
        )
        for s in placement.sites
    ]
    weights = [f for f in work.folder.iterdir() if f.suffix == ".safetensors"]
    before = sum(work.bundle.manifest.artifacts[p].bytes for p in work.base.parents) + work.base.bytes
    receipt = Receipt(
        scheme=request.scheme,
        runtime=request.runtime,
        base=work.base.id,
        method=method_for(placement.activations, request.method) if static else "",
        data=work.samples.how,
        samples=len(work.samples) if placement.calibration else 0,
        budget=" and ".join(request.budget),
        found=len(placement.sites),
        chosen=len(chosen),
        calibrated=len(ranged) if static else None,
        exported=len(written),
        kernels=len(fused) if fused is not None else None,
        lost=lost,
        smoothed=len(placement.smoothing),
        split=sum(placement.outliers_of(s).size > 0 for s in placement.chosen()),
        checks=work.trials,
        bytes_base=before,
        bytes_quantized=sum(f.stat().st_size for f in weights) + path.stat().st_size,
        latency=latency_of(work, path),
        quality=quality,
        layers=layers,
    )
    if lost or not chosen:
        raise GateError(
            f"{work.base.component}: the receipt's counts do not agree",
            got=f"{receipt.chosen} chosen, {receipt.calibrated} calibrated, {receipt.exported} exported, "
            f"{receipt.kernels} as kernels; lost: {'; '.join(lost[:4])}" + (" ..." if len(lost) > 4 else ""),
            expected="the same count at every stage",
            mend="report it: a layer that was to be quantized would silently run in floating point",
        )
    return receipt.model_copy(update={"headline": headline(receipt)})


def split_of(placement: Placement, s: Site) -> str:
    """What of a quantized layer is not, in words."""
    count = placement.outliers_of(s).size
    return f"{count} outlier channels of its input stay in the base precision" if count else ""


def headline(receipt: Receipt) -> str:
    """The first line: what was gained, or that nothing was."""
    size = f"{receipt.bytes_quantized / receipt.bytes_base:.2f}x the size"
    worst = min(receipt.quality, key=lambda q: q.cosine)
    figures = f"cosine {worst.cosine:.5f} (lowest {worst.lowest:.5f}), SNR {worst.snr:.1f} dB ({worst.output})"
    if receipt.latency is None:
        return f"not timed here: needs a GPU; {size}; {figures}"
    base = receipt.base.split("/")[1]
    speed = f"{receipt.latency.ratio:.2f}x {base}'s latency"
    if receipt.latency.ratio > 1:
        return f"SLOWER than {base}: {speed}; {size}; {figures}"
    return f"{speed}; {size}; {figures}"
