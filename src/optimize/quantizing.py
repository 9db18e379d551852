"""`optimize.quantize`: proved artifacts of a bundle become artifacts of fewer bits, each with a receipt."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError, InputError, MissingError
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact, Latency, Layer, Parity, Quality, Receipt
    from optimize.compile.spec import Component
    from optimize.exporting import Plan, Step
    from optimize.quantize.data import CalibrationSet
    from optimize.quantize.measures import Budget
    from optimize.quantize.place import Placement
    from optimize.quantize.sensitivity import Effect
    from optimize.quantize.sites import Site

BUDGETS: Mapping[str, str] = {"int4-weight": "cosine>=0.99"}
DEFAULT_BUDGET = "cosine>=0.999"
"""What a scheme has to keep of the base artifact's outputs where the user names nothing."""
BASES: Mapping[str, tuple[str, ...]] = {"onnxruntime": ("fp32",), "tensorrt": ("fp16", "fp32")}
"""Runtime -> precisions of the artifact that is quantized, the first that the bundle has: what stays, stays in it."""
FLOOR_DB = 10.0
"""Random feeds lie outside of what was calibrated. A right graph is far above this there, a wrong one below 0."""
FIGURES = ("cosine", "snr", "psnr")
"""What a budget can be of: what every output has."""
ROUNDS, SECONDS = 15, 6.0
HELD_OUT = 8
SENSITIVITY_SAMPLES = 2


@dataclass(frozen=True)
class Request:
    """What was asked for, checked."""

    folder: Path
    scheme: str = "int8"
    runtime: str = "onnxruntime"
    components: tuple[str, ...] = ()
    calibration: Path | None = None
    samples: int = 32
    seed: int = 0
    method: str = "mse"
    smooth: bool = True
    keep: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    sensitivity: bool = False
    trust_remote_code: bool = False

    @property
    def budget(self) -> tuple[str, ...]:
        return self.budgets or (BUDGETS.get(self.scheme, DEFAULT_BUDGET),)


def request_from_words(
    folder: Path | str,
    *,
    scheme: str = "int8",
    runtime: str | None = None,
    components: Sequence[str] = (),
    calibration: Path | str | None = None,
    samples: int = 32,
    seed: int = 0,
    method: str = "mse",
    smooth: bool = True,
    keep: Sequence[str] = (),
    budgets: Sequence[str] = (),
    sensitivity: bool = False,
    targets: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Request:
    """Checks words that need no model. Raises InputError for unknown schemes, runtimes, methods and budgets, and for a
    scheme that the runtime or a target cannot run."""
    from optimize.profiles.targets import sm_from_target
    from optimize.quantize.measures import budget_from_text
    from optimize.quantize.schemes import METHODS, SCHEMES, scheme_for

    if scheme in SCHEMES and runtime is None:
        runtime = "tensorrt" if targets else next(iter(SCHEMES[scheme].kinds))
    scheme_for(scheme, runtime or "onnxruntime", 23, tuple(sm_from_target(t)[1] for t in targets))
    if method not in METHODS:
        raise InputError(f"unknown calibration method {method}", expected="one of " + ", ".join(METHODS))
    if samples < 1:
        raise InputError("calibration needs samples", got=f"--samples {samples}", expected="1 or more")
    for text in budgets:
        budget_from_text(text, dict.fromkeys(FIGURES, ">="))
    return Request(
        Path(folder),
        scheme,
        runtime or "onnxruntime",
        tuple(components),
        Path(calibration) if calibration is not None else None,
        samples,
        seed,
        method,
        smooth,
        tuple(keep),
        tuple(budgets),
        sensitivity,
        trust_remote_code,
    )


@dataclass
class Work:
    """One component being quantized."""

    request: Request
    bundle: Bundle
    base: Artifact
    component: Component
    sites: Sequence[Site]
    folder: Path
    say: Callable[[str], None]
    samples: CalibrationSet | None = None
    held_out: CalibrationSet | None = None
    effects: Sequence[Effect] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    trials: int = 0

    @property
    def path(self) -> Path:
        return self.bundle.path(self.base)

    @property
    def stem(self) -> str:
        return artifact_id(self.request, self.component.name).replace("/", ".")

    def cache(self, kind: str) -> Path:
        """Beside the calibration data, outside what the manifest claims."""
        name = f"{self.component.name}.{self.request.scheme}.{self.request.runtime}.{kind}"
        return self.bundle.root / "calibration" / name


def artifact_id(request: Request, component: str) -> str:
    """`unet/int8`, and `unet/int8/tensorrt` where it is placed for another runtime than the scheme's first."""
    from optimize.quantize.schemes import SCHEMES

    first = next(iter(SCHEMES[request.scheme].kinds))
    return f"{component}/{request.scheme}" + ("" if request.runtime == first else f"/{request.runtime}")


def quantize(
    folder: Path | str, *, dry_run: bool = False, progress: Progress | None = None, **words: Any
) -> Bundle | dict[str, list[Layer]]:
    """Quantizes components of a bundle; each new artifact has a `receipt`. The words are those of the command line.

    Args:
        folder: a bundle with proved fp32 artifacts (`--for tensorrt` takes fp16 ones where there are).
        dry_run: gives the plan, component -> `Layer`s with the precision that each would get, and writes nothing.
        words: see `request_from_words`: scheme, runtime, components, calibration, samples, budgets, keep, ...

    Returns:
        The `Bundle`, or with `dry_run` the plan.

    Raises:
        InputError: the words, the bundle or the calibration data are wrong. GateError: the receipt's counts do not
        agree or the budget cannot be met. MissingError: a package or memory is missing.
    """
    from optimize.compile.bundle import Bundle

    request = request_from_words(folder, **words)
    shown = progress or Progress(enabled=False)
    there = Bundle.read(request.folder)
    if dry_run:
        return {name: plan_of(there, name, request) for name in chosen_components(there, request)}
    with Bundle.create(request.folder, there.manifest.source, []) as bundle:
        quantize_all(bundle, request, shown)
        return bundle


def quantize_all(bundle: Bundle, request: Request, progress: Progress) -> None:
    for name in chosen_components(bundle, request):
        with progress.step(artifact_id(request, name)):
            quantize_component(bundle, name, request, progress)


def requests_for_export(
    out: Path | str, precisions: Iterable[str], words: Mapping[str, Any], quantization: Mapping[str, Any]
) -> list[Request]:
    """What `optimize export --precision int8 ...` asks of this verb: one request per scheme among the precisions."""
    from optimize.compile.spec import QUANTIZED

    shared = {k: words[k] for k in ("components", "targets", "trust_remote_code") if k in words}
    return [request_from_words(out, scheme=p, **shared, **quantization) for p in precisions if p in QUANTIZED]


def bases_for(requests: Iterable[Request]) -> list[str]:
    """The precisions that have to be exported first."""
    return list(dict.fromkeys(BASES[r.runtime][0] for r in requests))


def steps_for(plan: Plan, requests: Iterable[Request], bundle: Bundle | None) -> list[Step]:
    """The steps that an export's plan gets for the schemes asked for."""
    from optimize.exporting import Step, step_for

    steps = []
    for request in requests:
        for component in plan.components:
            id_ = artifact_id(request, component.name)
            stale = [s.artifact for s in plan.steps if s.component.name == component.name and not s.hit]
            base = base_of(bundle, component.name, request, required=False) if bundle and not stale else []
            if base:
                steps.append(step_for(bundle, id_, component, request.scheme, key_of(base[0], request), None))
            else:
                steps.append(Step(id_, component, request.scheme, {}, "its base is made first", False))
    return steps


def chosen_components(bundle: Bundle, request: Request) -> list[str]:
    from optimize.exporting import choose

    choose("component", request.components, bundle.manifest.components)
    return list(request.components) or [
        n for n in bundle.manifest.components if any(base_of(bundle, n, request, required=False))
    ]


def base_of(bundle: Bundle, name: str, request: Request, *, required: bool = True) -> list[Artifact]:
    """The artifact that is quantized, as a list of one. Raises InputError where the bundle has none."""
    known = {a.id: a for a in bundle.artifacts(name, "onnx")}
    for precision in BASES[request.runtime]:
        for id_, artifact in known.items():
            if artifact.spec["precision"] == precision and not artifact.spec.get("kernels"):
                del id_
                return [artifact]
    if not required:
        return []
    raise InputError(
        f"{name} has no artifact to quantize",
        got=", ".join(known) or "none",
        expected=f"one in {' or '.join(BASES[request.runtime])}, without --kernels",
        mend=f"optimize export {bundle.manifest.source} --out {bundle.root} --component {name}",
    )


def plan_of(bundle: Bundle, name: str, request: Request) -> list[Layer]:
    """What each site would become by rule, before anything is measured."""
    from optimize.compile.records import Layer

    base = base_of(bundle, name, request)[0]
    return [
        Layer(
            name=s.name,
            module=s.module,
            kind=s.kind,
            precision=str(base.spec["precision"]) if s.stays else request.scheme,
            why=s.stays,
        )
        for s in planned_sites(bundle, base, request)
    ]


def planned_sites(bundle: Bundle, base: Artifact, request: Request) -> list[Site]:
    import onnx_ir as ir

    from optimize.quantize.schemes import scheme_for
    from optimize.quantize.sites import planned, sites_of

    model = ir.load(bundle.path(base))
    scheme = scheme_for(request.scheme, request.runtime, int(base.spec["opset"]))
    found = planned(sites_of(model), scheme, request.runtime, request.keep)
    if not any(not s.stays for s in found):
        raise GateError(
            f"{base.id}: nothing to quantize with {request.scheme} for {request.runtime}",
            got=f"{len(found)} layers, all of which stay",
            expected="one at least",
            mend="--dry-run shows why each stays",
        )
    return found


def key_of(base: Artifact, request: Request) -> dict[str, str]:
    """Everything that a quantized artifact depends on, by name."""
    from optimize.compile.digests import digest_of_file

    def of_file(path: Path) -> str:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return hashlib.sha256("".join(digest_of_file(f) for f in files).encode()).hexdigest()[:16]

    data = of_file(request.calibration) if request.calibration else f"{request.samples} samples, seed {request.seed}"
    return {
        **base.key,
        "base": base.sha256[:16],
        "scheme": request.scheme,
        "runtime": request.runtime,
        "calibration": data,
        "method": request.method,
        "smooth": str(request.smooth),
        "keep": ", ".join(request.keep),
        "budget": ", ".join(request.budget),
        "quantizer": quantizer_digest(),
    }


@cache
def quantizer_digest() -> str:
    """Digest of the code that quantizes."""
    import optimize.quantize
    from optimize.exporting import digest

    folder = Path(str(optimize.quantize.__file__)).parent
    return digest("".join(p.read_text() for p in [*sorted(folder.glob("*.py")), Path(__file__)]))


def quantize_component(bundle: Bundle, name: str, request: Request, progress: Progress) -> None:
    """Calibrate, place, prove, count, adopt. What the bundle has already and nothing changed is kept."""
    from optimize.exporting import adopt, step_for
    from optimize.loading import component_of

    base = base_of(bundle, name, request)[0]
    bundle.check(base)
    for parent in base.parents:
        bundle.check(bundle.manifest.artifacts[parent])
    component = component_of(bundle, name, request.trust_remote_code)
    key = key_of(base, request)
    step = step_for(bundle, artifact_id(request, name), component, request.scheme, key, None)
    if step.hit:
        return
    sites = planned_sites(bundle, base, request)
    need_memory(bundle, base)
    with bundle.workspace(step.artifact) as folder:
        work = Work(request, bundle, base, component, sites, folder, progress.say)
        load_samples(work)
        placement = calibrated(work)
        found, quality = within_budget(work, placement)
        parity = proof(folder / f"{work.stem}.onnx", work.path, base, request.scheme, component)
        receipt = receipt_of(work, found, quality)
        adopt(step, bundle, folder, spec_of(work, found), work.seconds, parity, None, receipt=receipt, base=base)


def need_memory(bundle: Bundle, base: Artifact) -> None:
    from optimize.gate import available_bytes

    weights = sum(bundle.manifest.artifacts[p].bytes for p in base.parents)
    if 3 * weights > available_bytes():
        raise MissingError(
            f"not enough memory to quantize {base.component}",
            got=f"{available_bytes() / 1e9:.1f} GB free",
            expected=f"{3 * weights / 1e9:.1f} GB: the base graph's session, and that of the quantized one beside it",
            mend="a machine with more memory",
        )


def load_samples(work: Work) -> None:
    """Calibration samples, and others that were held out of it for the figures."""
    from optimize.compile.sources import Trust, source_from_text
    from optimize.quantize.data import feeds_from_file, feeds_of

    request, root = work.request, work.bundle.root / "calibration"
    if request.calibration is not None:
        work.samples, work.held_out = halves(feeds_from_file(work.component, request.calibration))
        return
    manifest = work.bundle.manifest
    trust = Trust("pickle" in manifest.trust, request.trust_remote_code)
    source = source_from_text(manifest.source, trust, (work.component.name,))

    def made(kind: str, samples: int, seed: int) -> CalibrationSet:
        folder = root / f"{work.component.name}.{kind}"
        return feeds_of(work.component, source, folder, samples=samples, seed=seed, say=work.say)

    work.held_out = made("held-out", min(HELD_OUT, max(2, request.samples // 4)), request.seed + 1)
    work.samples = made("samples", request.samples, request.seed)


def halves(given: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Every fourth sample is held out for the figures; a single one has to serve for both."""
    held = given.samples[3::4] or given.samples[-1:]
    kept = tuple(s for s in given.samples if s not in held) or given.samples
    return replace(given, samples=kept), replace(given, samples=held)


def calibrated(work: Work) -> Placement:
    """The placement with scales, and with SmoothQuant's vectors where the scheme has static activations."""
    import onnx_ir as ir

    from optimize.quantize.calibrate import calibrate
    from optimize.quantize.place import Placement
    from optimize.quantize.schemes import SCHEMES
    from optimize.quantize.smooth import candidates, smoothings

    request, start = work.request, time.perf_counter()
    placement = Placement(SCHEMES[request.scheme], request.runtime, request.method, tuple(work.sites))
    if placement.taps():
        assert work.samples is not None
        model = ir.load(work.path)
        groups = candidates(model, work.sites) if request.smooth else {}
        if groups:
            seen = calibrate(
                model,
                work.path.parent,
                list(groups),
                work.samples,
                by_channel=frozenset(groups),
                cache=work.cache("channels.npz"),
                say=work.say,
            ).seen
            channels = {name: s.channels for name, s in seen.items() if s.channels is not None}
            placement = replace(placement, smoothing=smoothings(model, groups, channels))
        smoothing = placement.smoothing or {}
        calibration = calibrate(
            model,
            work.path.parent,
            placement.taps(),
            work.samples,
            divided={name: s.divisor for name, s in smoothing.items()},
            cache=work.cache("ranges.npz"),
            say=work.say,
        )
        placement = replace(placement, calibration=calibration)
    work.seconds["calibrate"] = round(time.perf_counter() - start, 3)
    return placement


def write(work: Work, placement: Placement) -> Path:
    """The quantized graph, its weights and its view in the work's folder, checked."""
    import onnx
    import onnx_ir as ir

    from optimize.compile import external
    from optimize.quantize.place import placed

    for old in work.folder.iterdir():
        old.unlink()
    path = work.folder / f"{work.stem}.onnx"
    weights = work.folder / f"{work.stem}.safetensors"
    model = placed(ir.load(work.path), placement)
    model.metadata_props["optimize.precision"] = work.request.scheme
    model.metadata_props["optimize.base"] = f"{work.base.id} {work.base.sha256[:16]}"
    external.write_weights(model, weights, {"optimize": json.dumps(work.base.key.get("weights"))}, lambda *_: None)
    external.inline_small(model)
    external.point_at(model, weights.name, external.header_bytes(weights))
    ir.save(model, path)
    ir.save(external.stripped(model), path.with_suffix(".view.onnx"))
    onnx.checker.check_model(str(path), full_check=True)
    return path


def within_budget(work: Work, placement: Placement) -> tuple[Placement, list[Quality]]:
    """All sites where that meets the budget; else as many as meet it, by sensitivity. The last one written is the one.

    Raises GateError where no set meets it: how near it came, and which layers are in the way."""
    from optimize.quantize import sensitivity
    from optimize.quantize.measures import budget_from_text

    budgets = [budget_from_text(text) for text in work.request.budget]
    tried: dict[tuple[str, ...], tuple[Placement, list[Quality]]] = {}

    def trial(high: Sequence[str]) -> float:
        reason = f"sensitivity: left high to keep {' and '.join(map(str, budgets))}"
        sites = tuple(replace(s, stays=reason) if s.name in high else s for s in placement.sites)
        attempt = replace(placement, sites=sites)
        work.trials += 1
        work.say(f"measuring with {len(attempt.chosen())} layers in {work.request.scheme}")
        quality = quality_of(work, write(work, attempt))
        tried[tuple(high)] = attempt, quality
        return margin(quality, budgets)

    start = time.perf_counter()
    value = trial(())
    if value < 0 or work.request.sensitivity:
        work.effects = measured_effects(work, placement)
    found = sensitivity.Found((), value, True, 1)
    if value < 0:
        found = sensitivity.largest_set(work.effects, trial, lambda v: v >= 0, value)
    if not found.met or not tried[found.high][0].chosen():
        raise blocked(work, budgets, tried[()][1])
    work.seconds["budget"] = round(time.perf_counter() - start, 3)
    result = tried[found.high]
    if next(reversed(tried)) != found.high:
        write(work, result[0])
    return result


def margin(quality: Sequence[Quality], budgets: Sequence[Budget]) -> float:
    """How far the worst output is inside the budgets: at least 0 where all are met. NaN counts as missed."""
    margins = [getattr(q, b.figure) - b.limit for q in quality for b in budgets]
    return min((float("-inf") if math.isnan(m) else m for m in margins), default=float("-inf"))


def measured_effects(work: Work, placement: Placement) -> list[Effect]:
    import itertools

    import onnx_ir as ir

    from optimize.quantize import sensitivity

    assert work.held_out is not None
    feeds = list(itertools.islice(iter(work.held_out), SENSITIVITY_SAMPLES))
    start = time.perf_counter()
    found = sensitivity.effects(
        ir.load(work.path), work.path.parent, placement, feeds, cache=work.cache("sensitivity.json"), say=work.say
    )
    work.seconds["sensitivity"] = round(time.perf_counter() - start, 3)
    return found


def blocked(work: Work, budgets: Sequence[Budget], quality: Sequence[Quality]) -> GateError:
    """The error for a budget that no set of layers meets."""
    near = "; ".join(f"{q.output}: cosine {q.cosine:.5f}, snr {q.snr:.1f} dB, psnr {q.psnr:.1f} dB" for q in quality)
    worst = ", ".join(f"{e.site.rpartition('/')[0]} ({e.error:.2g})" for e in work.effects[:3])
    return GateError(
        f"{work.base.component}: {work.request.scheme} cannot meet {' and '.join(map(str, budgets))}",
        got=f"{near}, with every layer quantized",
        expected="a set of layers that keeps it",
        mend=f"a budget that can be met, or another scheme; the layers that cost most: {worst}",
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def session(work_path: Path, **entries: str) -> Any:
    import onnx_ir as ir

    from optimize.quantize.running import GraphSession, session_options

    return GraphSession(ir.load(work_path), work_path.parent, options=session_options(None, 0, **entries))


def runs_simulated(scheme: str) -> dict[str, str]:
    """ONNX Runtime's CPU has no fp8 kernels: Q and DQ are run as they stand, and the rest in floating point."""
    from optimize.quantize.running import NO_QDQ

    return {NO_QDQ: "1"} if scheme == "fp8" else {}


def quality_of(work: Work, path: Path) -> list[Quality]:
    """Every output that is a float against the base artifact's, over the held-out samples."""
    from optimize.compile.records import Quality
    from optimize.quantize.measures import cosine, psnr, snr

    assert work.held_out is not None
    base, few = session(work.path), session(path, **runs_simulated(work.request.scheme))
    figures: dict[str, list[tuple[float, float, float]]] = {}
    for feeds in work.held_out:
        exact, got = base.run(feeds), few.run(feeds)
        for name, tensor in exact.items():
            if tensor.is_floating_point() and tensor.numel():
                pair = got[name], tensor
                figures.setdefault(name, []).append((cosine(*pair), snr(*pair), psnr(*pair)))
    return [
        Quality(
            output=name,
            cosine=statistics.fmean(c for c, _, _ in rows),
            lowest=min(c for c, _, _ in rows),
            snr=statistics.fmean(s for _, s, _ in rows),
            psnr=statistics.fmean(p for _, _, p in rows),
            samples=len(rows),
        )
        for name, rows in figures.items()
    ]


def proof(path: Path, base_path: Path, base: Artifact, scheme: str, component: Component) -> Parity:
    """The quantized graph at the three sets of sizes against the base artifact, on random feeds."""
    from optimize.compile.feeds import feeds_for
    from optimize.compile.records import OutputError, Parity, ShapeParity
    from optimize.profiles.parity import distance

    few, exact_session = session(path, **runs_simulated(scheme)), session(base_path)
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
    parity = proof(path, bundle.path(base), base, receipt.scheme, component)
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

    request, path = work.request, work.folder / f"{work.stem}.onnx"
    chosen = [s.name for s in placement.chosen()]
    written = counting.exported(path, placement)
    static = placement.scheme.activations == "static"
    seen = placement.calibration.seen if placement.calibration else {}
    ranged = {s.name for s in placement.chosen() if all(name in seen for name in s.reads)}
    fused: set[str] | None = None
    if request.runtime == "onnxruntime":
        fused = counting.kernels(path, placement, work.folder)
    lost = [f"{n}: not calibrated" for n in chosen if static and n not in ranged]
    lost += [f"{n}: no Q/DQ in the file" for n in chosen if n not in written]
    lost += [f"{n}: ONNX Runtime computes it in floating point" for n in chosen if fused is not None and n not in fused]
    effects = {e.site: e for e in work.effects}
    layers = [
        Layer(
            name=s.name,
            module=s.module,
            kind=s.kind,
            precision=str(work.base.spec["precision"]) if s.stays else request.scheme,
            why=s.stays,
            error=effects[s.name].error if s.name in effects else None,
            gain=effects[s.name].gain if s.name in effects else None,
        )
        for s in placement.sites
    ]
    assert work.samples is not None
    weights = [f for f in work.folder.iterdir() if f.suffix == ".safetensors"]
    before = sum(work.bundle.manifest.artifacts[p].bytes for p in work.base.parents) + work.base.bytes
    receipt = Receipt(
        scheme=request.scheme,
        runtime=request.runtime,
        base=work.base.id,
        method=request.method if static else "",
        data=work.samples.how,
        samples=len(work.samples) if static else 0,
        budget=" and ".join(request.budget),
        found=len(placement.sites),
        chosen=len(chosen),
        calibrated=len(ranged) if static else None,
        exported=len(written),
        kernels=len(fused) if fused is not None else None,
        lost=lost,
        smoothed=len(placement.smoothing or {}),
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


def headline(receipt: Receipt) -> str:
    """The first line: what was gained, or that nothing was."""
    size = f"{receipt.bytes_quantized / receipt.bytes_base:.2f}x the size"
    worst = min(receipt.quality, key=lambda q: q.cosine)
    figures = f"cosine {worst.cosine:.5f}, SNR {worst.snr:.1f} dB ({worst.output})"
    if receipt.latency is None:
        return f"not timed here: needs a GPU; {size}; {figures}"
    base = receipt.base.split("/")[1]
    speed = f"{receipt.latency.ratio:.2f}x {base}'s latency"
    if receipt.latency.ratio > 1:
        return f"SLOWER than {base}: {speed}; {size}; {figures}"
    return f"{speed}; {size}; {figures}"


def spec_of(work: Work, placement: Placement) -> dict[str, Any]:
    import onnx

    path = work.folder / f"{work.stem}.onnx"
    return {
        "precision": work.request.scheme,
        "runtime": work.request.runtime,
        "opset": work.base.spec["opset"],
        "base": work.base.id,
        "nodes": len(onnx.load(path, load_external_data=False).graph.node),
        "quantized": len(placement.chosen()),
    }


def rows(bundle: Bundle, names: Iterable[str]) -> list[dict[str, Any]]:
    """One row per quantized artifact, for tables."""
    return [
        {
            "artifact": a.id,
            "layers": f"{r.chosen} of {r.found}",
            "exported": r.exported,
            "kernels": "" if r.kernels is None else r.kernels,
            "MB": round(r.bytes_quantized / 1e6, 2),
            "headline": r.headline,
        }
        for a in bundle.artifacts(kind="onnx")
        if (r := a.receipt) is not None and a.id in set(names)
    ]
