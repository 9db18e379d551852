"""`optimize.quantize`: proved artifacts of a bundle become artifacts of fewer bits, each with a receipt."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError, InputError, MissingError
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact, Layer, Quality
    from optimize.compile.spec import Component
    from optimize.exporting import Plan, Step
    from optimize.quantize.measures import Budget
    from optimize.quantize.place import Placement
    from optimize.quantize.sensitivity import Effect
    from optimize.quantize.sets import CalibrationSet
    from optimize.quantize.sites import Site

BUDGETS: Mapping[str, str] = {"int4-weight": "cosine>=0.99"}
DEFAULT_BUDGET = "cosine>=0.999"
"""What a scheme has to keep of the base artifact's outputs where the user names nothing."""
BASES: Mapping[str, tuple[str, ...]] = {"onnxruntime": ("fp32",), "tensorrt": ("fp16", "fp32")}
"""Runtime -> precisions of the artifact that is quantized, the first that the bundle has: what stays, stays in it."""
FIGURES = ("cosine", "snr", "psnr")
"""What a budget can be of: what every output has."""
FLOATS_OPSET = 19
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
    outliers: bool = True
    keep: tuple[str, ...] = ()
    block: int | None = None
    budgets: tuple[str, ...] = ()
    sensitivity: bool = False
    trust_remote_code: bool = False
    opset: int | None = None

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
    outliers: bool = True,
    keep: Sequence[str] = (),
    block: int | None = None,
    budgets: Sequence[str] = (),
    sensitivity: bool = False,
    targets: Sequence[str] = (),
    trust_remote_code: bool = False,
    opset: int | None = None,
) -> Request:
    """Checks words that need no model. Raises InputError for unknown schemes, runtimes, methods and budgets, and for a
    scheme that the runtime or a target cannot run."""
    from optimize.profiles.targets import sm_from_target
    from optimize.quantize.measures import budget_from_text
    from optimize.quantize.schemes import METHODS, SCHEMES, scheme_for
    from optimize.quantize.texts import check_seed

    check_seed(seed)
    if scheme in SCHEMES and runtime is None:
        runtime = "tensorrt" if targets else next(iter(SCHEMES[scheme].kinds))
    scheme_for(scheme, runtime or "onnxruntime", 23, tuple(sm_from_target(t)[1] for t in targets), block)
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
        outliers,
        tuple(keep),
        block,
        tuple(budgets),
        sensitivity,
        trust_remote_code,
        opset,
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

    @property
    def graph(self) -> str:
        """Names the graph and the weights, which lie in another file."""
        return hashlib.sha256(json.dumps([self.base.sha256, dict(self.base.key)], sort_keys=True).encode()).hexdigest()

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

    if dry_run:
        return plan(folder, **words)
    request = request_from_words(folder, **words)
    shown = progress or Progress(enabled=False)
    there = Bundle.read(request.folder)
    with Bundle.create(request.folder, there.manifest.source, []) as bundle:
        quantize_all(bundle, request, shown)
        return bundle


def quantize_all(bundle: Bundle, request: Request, progress: Progress) -> None:
    for name in chosen_components(bundle, request):
        with progress.step(artifact_id(request, name)):
            quantize_component(bundle, name, request, progress)


def plan(folder: Path | str, **words: Any) -> dict[str, list[Layer]]:
    """What `quantize` would do by rule, before anything is measured: component -> its layers. Writes nothing."""
    from optimize.compile.bundle import Bundle

    request = request_from_words(folder, **words)
    bundle = Bundle.read(request.folder)
    return {name: plan_of(bundle, name, request) for name in chosen_components(bundle, request)}


def requests_for_export(
    out: Path | str, precisions: Iterable[str], words: Mapping[str, Any], quantization: Mapping[str, Any]
) -> list[Request]:
    """What `optimize export --precision int8 ...` asks of this verb: one request per scheme among the precisions."""
    from optimize.compile.spec import QUANTIZED
    from optimize.quantize.schemes import scheme_for

    shared = {k: words[k] for k in ("components", "targets", "trust_remote_code", "opset") if k in words}
    found = [request_from_words(out, scheme=p, **shared, **quantization) for p in precisions if p in QUANTIZED]
    for request in found:
        scheme_for(request.scheme, request.runtime, words.get("opset", 23), block=request.block)
        if words.get("kernels"):
            raise InputError(
                "graphs of our own operators are not quantized",
                got=f"--kernels with --precision {request.scheme}",
                expected="one of the two",
                mend="export twice, into the same bundle",
            )
    return found


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
    known = bundle.artifacts(name, "onnx")
    for precision in BASES[request.runtime]:
        for artifact in known:
            able = not artifact.spec.get("kernels") and request.opset in (None, artifact.spec["opset"])
            if able and artifact.spec["precision"] == precision:
                return [artifact]
    if not required:
        return []
    opset = "" if request.opset is None else f", of opset {request.opset}"
    raise InputError(
        f"{name} has no artifact to quantize",
        got=", ".join(a.id for a in known) or "none",
        expected=f"one in {' or '.join(BASES[request.runtime])}, without --kernels{opset}",
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

    model, opset = ir.load(bundle.path(base)), int(base.spec["opset"])
    scheme = scheme_for(request.scheme, request.runtime, opset, block=request.block)
    if base.spec["precision"] != "fp32" and opset < FLOATS_OPSET:
        raise InputError(
            f"opset {opset} has QuantizeLinear for fp32 alone",
            got=f"{base.id}, of opset {opset}",
            expected=f"opset {FLOATS_OPSET} or later",
            mend="export with --opset 23",
        )
    return planned(sites_of(model), scheme, request.runtime, request.keep)


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
        "outliers": str(request.outliers),
        "keep": ", ".join(request.keep),
        "block": str(request.block),
        "budget": ", ".join(request.budget),
        "quantizer": quantizer_digest(),
    }


@cache
def quantizer_digest() -> str:
    """Digest of the code that quantizes."""
    from optimize.exporting import digest
    from optimize.quantize import schemes

    folder = Path(str(schemes.__file__)).parent
    beside = [Path(__file__), Path(__file__).with_name("receipts.py")]
    return digest("".join(p.read_text() for p in [*sorted(folder.glob("*.py")), *beside]))


def quantize_component(bundle: Bundle, name: str, request: Request, progress: Progress) -> None:
    """Calibrate, place, prove, count, adopt. What the bundle has already and nothing changed is kept."""
    from optimize.exporting import step_for
    from optimize.loading import axes_of_artifact, component_of
    from optimize.making import adopt
    from optimize.receipts import proof, receipt_of

    base = base_of(bundle, name, request)[0]
    bundle.check(base)
    for parent in base.parents:
        bundle.check(bundle.manifest.artifacts[parent])
    component = component_of(bundle, name, request.trust_remote_code).with_axes(axes_of_artifact(base))
    key = key_of(base, request)
    step = step_for(bundle, artifact_id(request, name), component, request.scheme, key, None)
    old = bundle.manifest.artifacts.get(step.artifact)
    told = old is not None and old.receipt is not None and any(x.error is not None for x in old.receipt.layers)
    if step.hit and (told or not request.sensitivity):
        return
    sites = planned_sites(bundle, base, request)
    if all(s.stays for s in sites):
        raise GateError(
            f"{base.id}: nothing to quantize with {request.scheme} for {request.runtime}",
            got=f"{len(sites)} layers, all of which stay",
            expected="one at least",
            mend="--dry-run shows why each stays",
        )
    need_memory(bundle, base)
    with bundle.workspace(step.artifact) as folder:
        work = Work(request, bundle, base, component, sites, folder, progress.say)
        load_samples(work)
        placement = calibrated(work)
        found, quality = within_budget(work, placement)
        parity = proof(folder / f"{work.stem}.onnx", work.path, base, request.scheme, request.runtime, component)
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
    from optimize.quantize.texts import HELD

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

    work.held_out = made("held-out", min(HELD_OUT, max(2, request.samples // 4)), HELD + request.seed)
    work.samples = made("samples", request.samples, request.seed)
    work.samples, work.held_out = apart(work.samples, work.held_out)


def apart(given: CalibrationSet, held: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """The same without what is in both: figures are of samples that calibration has not seen."""
    from optimize.quantize.sets import content_digest

    seen = {content_digest(feeds) for feeds in given}
    fresh = tuple(s for s, feeds in zip(held.samples, held, strict=True) if content_digest(feeds) not in seen)
    return (given, replace(held, samples=fresh)) if fresh else halves(given)


def halves(given: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Every fourth sample is held out for the figures; a single one has to serve for both."""
    held = given.samples[3::4] or given.samples[-1:]
    kept = tuple(s for s in given.samples if s not in held) or given.samples
    return replace(given, samples=kept), replace(given, samples=held)


def calibrated(work: Work) -> Placement:
    """The placement with scales, SmoothQuant's vectors where the scheme has static activations, and for ONNX Runtime
    the channels that stand apart. What these change is calibrated again."""
    import onnx_ir as ir

    from optimize.quantize.calibrate import calibrate
    from optimize.quantize.outliers import outliers
    from optimize.quantize.place import Placement
    from optimize.quantize.schemes import SCHEMES, with_block
    from optimize.quantize.smooth import candidates, smoothings

    request, start = work.request, time.perf_counter()
    scheme = with_block(SCHEMES[request.scheme], request.block)
    placement = Placement(scheme, request.runtime, request.method, tuple(work.sites))
    model = ir.load(work.path)
    groups = candidates(model, work.sites) if request.smooth and scheme.activations == "static" else {}
    parted = request.outliers and request.runtime == "onnxruntime" and scheme.activations != ""
    linear = [s.activation for s in placement.chosen() if s.kind == "linear"] if parted else list(groups)
    if taps := list(dict.fromkeys([*placement.taps(), *linear])):
        assert work.samples is not None
        calibrate_on = partial(calibrate, model, work.path.parent, graph=work.graph, say=work.say)
        first = calibrate_on(taps, work.samples, by_channel=frozenset(linear), cache=work.cache("ranges.npz"))
        channels = {name: s.channels for name, s in first.seen.items() if s.channels is not None}
        smoothing = smoothings(model, groups, channels)
        found = outliers(work.sites, channels, smoothing) if parted else {}
        placement = replace(placement, calibration=first, smoothing=smoothing, outliers=found)
        changed = {name: vector for name, vector in placement.divisors().items() if name in placement.taps()}
        if changed:
            again = calibrate_on(list(changed), work.samples, divided=changed, cache=work.cache("changed.npz"))
            placement = replace(placement, calibration=replace(first, seen={**first.seen, **again.seen}))
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
    from optimize.receipts import quality_of

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

    def nearest() -> tuple[Placement, list[Quality]]:
        return max((t for t in tried.values() if t[0].chosen()), key=lambda t: margin(t[1], budgets))

    start = time.perf_counter()
    value = trial(())
    if value < 0 or work.request.sensitivity:
        work.effects = measured_effects(work, placement)
    found = sensitivity.Found((), value, True, 1)
    if value < 0:
        attention = [sensitivity.Effect(s.name, math.inf, 0.0) for s in placement.chosen() if not s.weight]
        found = sensitivity.largest_set([*attention, *work.effects], trial, lambda v: v >= 0, value)
    if not found.met or not tried[found.high][0].chosen():
        raise blocked(work, budgets, *nearest())
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
        ir.load(work.path),
        work.path.parent,
        placement,
        feeds,
        graph=work.graph,
        cache=work.cache("sensitivity.json"),
        say=work.say,
    )
    work.seconds["sensitivity"] = round(time.perf_counter() - start, 3)
    return found


def blocked(work: Work, budgets: Sequence[Budget], placement: Placement, quality: Sequence[Quality]) -> GateError:
    """The error for a budget that no set of layers meets, with the figures of the one that came nearest."""
    near = "; ".join(f"{q.output}: cosine {q.cosine:.5f}, snr {q.snr:.1f} dB, psnr {q.psnr:.1f} dB" for q in quality)
    worst = ", ".join(f"{e.site.rpartition('/')[0]} ({e.error:.2g})" for e in work.effects[:3])
    return GateError(
        f"{work.base.component}: {work.request.scheme} cannot meet {' and '.join(map(str, budgets))}",
        got=f"{near}, with {len(placement.chosen())} of {len(placement.sites)} layers quantized",
        expected="a set of layers that keeps it",
        mend=f"a budget that can be met, or another scheme; the layers that cost most: {worst}",
    )


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
