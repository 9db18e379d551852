"""`optimize.export`: the pipeline from a source to a bundle of proved artifacts. `STEPS` is what `--dry-run` prints."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError, InputError, MissingError
from optimize.kernels.functions import LEAST_OPSET
from optimize.narrowing import Words, narrowed, words_from
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact
    from optimize.compile.sources import Source
    from optimize.compile.spec import Component

STEPS = (
    "trace on meta tensors",
    "translate to ONNX",
    "clean up",
    "stream weights",
    "probe fp16's range on real data, keep in fp32 what would overflow",
    "check with onnx.checker",
    "prove parity against eager fp32",
    "build engines",
    "record in the manifest",
)
FORMATS = ("onnx", "tensorrt")
BESIDE = ("view", "probe")
"""Kinds of files that come with a graph."""


@dataclass(frozen=True)
class Request:
    """What was asked for, in typed values: the words of the command line, checked."""

    source: str
    out: Path
    components: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32",)
    formats: tuple[str, ...] = ("onnx",)
    targets: tuple[tuple[str, int], ...] = ()
    axes: tuple[str, ...] = ()
    opset: int = 23
    trust: tuple[str, ...] = ()
    weight_streaming: bool = False
    timing_cache: Path | None = None
    memory: int | None = None
    kernels: bool = False
    narrowing: Words = field(default_factory=Words)
    bases: tuple[str, ...] = ()
    """Precisions that are made only to be quantized: no engines are built of them."""


@dataclass(frozen=True)
class Step:
    """One thing to make: an ONNX artifact or an engine, and why it is made or kept."""

    artifact: str
    component: Component
    precision: str
    key: Mapping[str, str]
    why: str
    hit: bool
    target: tuple[str, int] | None = None


@dataclass
class Plan:
    """What an export will do, in order."""

    request: Request
    components: tuple[Component, ...]
    steps: list[Step] = field(default_factory=list)


def request_from_words(
    source: str,
    out: Path | str,
    *,
    components: Sequence[str] = (),
    precisions: Sequence[str] = ("fp32",),
    formats: Sequence[str] = ("onnx",),
    targets: Sequence[str] = (),
    axes: Sequence[str] = (),
    opset: int = 23,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    weight_streaming: bool = False,
    timing_cache: Path | None = None,
    memory: int | None = None,
    kernels: bool = False,
    keep_fp32: Sequence[str] = (),
    probe_steps: int | None = None,
    no_probe: bool = False,
) -> Request:
    """Checks words that need no model. Raises InputError for unknown precisions, formats, targets and opsets, and
    MissingError for targets that nothing here builds for."""
    from optimize.compile.spec import PRECISIONS
    from optimize.profiles.targets import sm_from_target

    choose("precision", precisions, PRECISIONS)
    choose("format", formats, FORMATS)
    if not 18 <= opset <= 25:
        raise InputError(
            f"opset {opset} is not served",
            got=opset,
            expected="18 to 25",
            mend="--opset 23, the default, has the standard Attention and norm nodes",
        )
    if kernels and opset < LEAST_OPSET:
        raise InputError(
            f"our own operators have bodies from opset {LEAST_OPSET} on",
            got=f"--kernels with --opset {opset}",
            expected=f"--opset {LEAST_OPSET} or later",
            mend="leave out one of the two",
        )
    if targets and "tensorrt" not in formats:
        formats = (*formats, "tensorrt")
    if "tensorrt" in formats and not targets:
        targets = ("current",)
    found = tuple(sm_from_target(t) for t in targets)
    for _, sm in found:
        flavour_text(sm)  # raises where nothing here builds for it
    trust = (*(["pickle"] if allow_pickle else []), *(["remote code"] if trust_remote_code else []))
    return Request(
        source_text(source),
        Path(out),
        tuple(components),
        tuple(dict.fromkeys(precisions)),
        tuple(dict.fromkeys(formats)),
        found,
        tuple(axes),
        opset,
        trust,
        weight_streaming,
        timing_cache,
        memory,
        kernels,
        words_from(precisions, keep_fp32, probe_steps, no_probe),
    )


def source_text(text: str) -> str:
    """A local folder by its absolute path, so that its bundle can be verified from anywhere."""
    from optimize.compile.sources import is_local

    return str(Path(text).resolve()) if is_local(text) else text


def choose(what: str, words: Iterable[str], known: Iterable[str]) -> None:
    for word in words:
        if word not in known:
            raise InputError(
                f"unknown {what} {word}", expected="one of " + ", ".join(known), mend=f"--{what} takes these words"
            )


# --- planning --------------------------------------------------------------------------------------------------------


def components_for(request: Request) -> tuple[Component, ...]:
    """The source's components, chosen and with the axes asked for."""
    from optimize.compile.spec import axis_from_text

    source = source_of(request)
    known = {c.name: c for c in source.components}
    choose("component", request.components, known)
    chosen = [known[name] for name in request.components] or list(source.components)
    names = [text.partition("=")[0] for text in request.axes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"axis {twice[0]} is given more than once",
            got=", ".join(request.axes),
            expected="one size or range",
            mend=f"--axis {twice[0]}=MIN:OPT:MAX covers several sizes",
        )
    for text in request.axes:
        takers = [c for c in chosen if text.partition("=")[0] in c.axes]
        everywhere = {name: axis for c in chosen for name, axis in c.axes.items()}
        if not takers:
            axis_from_text(text, everywhere)  # raises: the axis is unknown
        for c in takers:
            axis = axis_from_text(text, c.axes)
            chosen[chosen.index(c)] = c.with_axes({axis.name: axis})
    if request.narrowing.keep:
        from optimize.quantize.islands import check_patterns

        check_patterns(request.narrowing.keep, [name for c in chosen for name, _ in c.build().named_modules()])
    return tuple(replace(c, kernels=request.kernels) for c in chosen)


def source_of(request: Request) -> Source:
    from optimize.compile.sources import Trust, source_from_text

    trust = Trust("pickle" in request.trust, "remote code" in request.trust)
    return source_from_text(request.source, trust, request.components)


def plan_from_request(request: Request, components: tuple[Component, ...], bundle: Bundle | None) -> Plan:
    """What there is to do, and for each step whether the bundle has it already."""
    plan = Plan(request, components)
    for component in plan.components:
        for precision in request.precisions:
            key = key_of(component, precision, request)
            onnx = onnx_id(component, precision, request.opset)
            step = step_for(bundle, onnx, component, precision, key, None)
            plan.steps.append(step)
            for target in request.targets if precision not in request.bases else ():
                plan.steps.append(engine_step(bundle, onnx, component, precision, key, target, request))
    return plan


def engine_step(
    bundle: Bundle | None,
    onnx: str,
    component: Component,
    precision: str,
    key: Mapping[str, str],
    target: tuple[str, int],
    request: Request,
) -> Step:
    """The step for an engine of the artifact `onnx`, whose key is `key`."""
    sm = target[1]
    more = {"sm": str(sm), "weight streaming": str(request.weight_streaming), "tensorrt": flavour_text(sm)}
    return step_for(bundle, f"{onnx}/sm{sm}", component, precision, {**key, **more}, target)


def step_for(
    bundle: Bundle | None,
    id_: str,
    component: Component,
    precision: str,
    key: Mapping[str, str],
    target: tuple[str, int] | None,
) -> Step:
    """A step with the cache's answer: `hit`, or what differs from what the bundle has."""
    old = bundle.manifest.artifacts.get(id_) if bundle else None
    if bundle is None or old is None:
        return Step(id_, component, precision, key, "new", False, target)
    changed = sorted(k for k in {*key, *old.key} if key.get(k) != old.key.get(k))
    if changed:
        return Step(id_, component, precision, key, "changed: " + ", ".join(changed), False, target)
    family = (*old.parents, id_, *(a.id for a in bundle.artifacts() if a.kind in BESIDE and id_ in a.parents))
    broken = [i for i in family if i not in bundle.manifest.artifacts or not bundle.whole(bundle.manifest.artifacts[i])]
    if broken:
        return Step(id_, component, precision, key, "file missing or changed: " + ", ".join(broken), False, target)
    return Step(id_, component, precision, key, "unchanged", True, target)


def onnx_id(component: Component, precision: str, opset: int) -> str:
    """`unet/fp16`, and what is not the default after it."""
    words = [*([f"opset{opset}"] if opset != 23 else []), *(["kernels"] if component.kernels else [])]
    return "/".join([component.name, precision, *words])


def flavour_text(sm: int) -> str:
    from optimize.compile.tensorrt import flavour_for

    flavour = flavour_for(sm)
    return f"{flavour.module} {flavour.version}"


def key_of(component: Component, precision: str, request: Request) -> dict[str, str]:
    """Everything that an ONNX artifact depends on, by name."""
    config = json.dumps(component.config, sort_keys=True, default=str)
    return {
        "weights": component.weights.digest(),
        "config": digest(config),
        "precision": precision,
        "opset": str(request.opset),
        "axes": json.dumps({n: asdict(a) for n, a in component.axes.items()}, sort_keys=True),
        "exporter": exporter_digest(),
        **({"kernels": kernels_digest()} if component.kernels else {}),
        **request.narrowing.key(precision),
        **{f"version of {k}": v for k, v in versions().items()},
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def exporter_digest() -> str:
    """Digest of this product's own exporting code: a change in it is a change of what it writes."""
    import optimize.compile

    folder = Path(str(optimize.compile.__file__)).parent
    return digest("".join(p.read_text() for p in sorted(folder.glob("*.py"))))


@cache
def kernels_digest() -> str:
    """Digest of what rewrites a module and of the bodies of our operators; not of GPU kernels, which no graph holds."""
    import optimize.kernels

    folder = Path(str(optimize.kernels.__file__)).parent
    return digest("".join(p.read_text() for p in sorted(folder.glob("*.py")) if not p.name.startswith("triton_")))


@cache
def versions() -> dict[str, str]:
    found = {}
    for name in ("optimize", "torch", "onnx", "onnx-ir", "diffusers", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


# --- doing -----------------------------------------------------------------------------------------------------------


def run_plan(plan: Plan, bundle: Bundle, progress: Progress) -> Bundle:
    """Makes what the plan says is missing. Every artifact is proved before the manifest claims it."""
    for step in plan.steps:
        if step.hit and step.artifact in bundle.manifest.artifacts:  # what was made of something made anew is gone
            continue
        if step.target is None:
            make_onnx(step, plan.request, bundle, progress)
        else:
            parent = bundle.manifest.artifacts[step.artifact.rpartition("/")[0]]
            make_engine(step, plan.request, bundle, progress, parent)
    return bundle


def make_onnx(step: Step, request: Request, bundle: Bundle, progress: Progress) -> None:
    """Trace, translate, write, probe, check, prove, adopt."""
    import onnx

    from optimize.compile import onnx_model
    from optimize.compile.bundle import FAILED
    from optimize.gate import miss, parity_of_onnx, plan_for

    component, precision, words = step.component, step.precision, request.narrowing
    stem = step.artifact.replace("/", ".")
    need_disk(bundle.root, component, precision)
    with bundle.workspace(step.artifact) as folder, progress.step(step.artifact):
        clock = onnx_model.Clock(progress.say)
        model, traced, rules = onnx_model.graph_from_component(component, precision, request.opset, clock)
        model.metadata_props.update(metadata_of(step, request))
        onnx_model.drop_unused_initializers(model)
        graph_path, how = folder / f"{stem}.onnx", plan_for(component, request.memory)
        write = partial(write_graph, path=graph_path, step=step, bundle=bundle, progress=progress)
        with memory_errors(component.name):
            narrowing, shared = narrowed(
                model,
                graph_path,
                component,
                precision,
                words,
                how,
                clock,
                write=write,
                source=partial(source_of, request),
            )
        nodes, fusions = len(model.graph), traced.fusions
        del model, traced
        gc.collect()  # torch's graphs are full of cycles: hundreds of MB that the gate can use
        with clock("check"):
            onnx.checker.check_model(str(graph_path), full_check=True)
        islands = precision == "fp16" and bool(narrowing.kept)
        with clock("parity"), memory_errors(component.name):
            parity = parity_of_onnx(graph_path, component, precision, how, progress.say, islands=islands)
        if not parity.passed:
            kept = bundle.root / FAILED / stem
            raise miss(graph_path, component, precision, parity, kept, progress.say, islands=islands)
        spec = {
            "precision": precision,
            "opset": request.opset,
            "kernels": component.kernels,
            "nodes": nodes,
            "rules": {k: r.rewritten for k, r in rules.items() if r.rewritten},
            "declined": {k: r.declined for k, r in rules.items() if r.declined},
            **({"fusions": fusions} if fusions else {}),
            **narrowing.spec(),
        }
        adopt(
            step,
            bundle,
            folder,
            spec,
            clock.seconds,
            parity,
            shared,
            notes=words.notes(precision),
            downgrades=narrowing.downgrades(),
        )


def write_graph(model: Any, path: Path, step: Step, bundle: Bundle, progress: Progress) -> Artifact | None:
    """Writes the graph, its weights and its form for viewers; gives the weights' artifact where the bundle has them.

    The model's weights are references into their file afterwards."""
    import onnx_ir as ir

    from optimize.compile import external

    shared = shared_weights(model, step, bundle)
    weights_path = path.with_name(shared.path.rpartition("/")[2] if shared else f"{path.stem}.safetensors")
    if shared:
        shutil.copyfile(bundle.path(shared), weights_path)  # onnx.checker takes no links
    else:
        external.write_weights(model, weights_path, {"optimize": json.dumps(step.key["weights"])}, progress.part)
    external.inline_small(model)
    external.point_at(model, weights_path.name, external.header_bytes(weights_path))
    ir.save(model, path)
    ir.save(external.stripped(model), path.with_name(f"{path.stem}.view.onnx"))
    return shared


def metadata_of(step: Step, request: Request) -> dict[str, str]:
    """What the graph itself says of how it was made."""
    source = Path(request.source).name if Path(request.source).is_absolute() else request.source
    return {
        "optimize.source": source,
        "optimize.component": step.component.name,
        "optimize.class": step.component.class_name,
        "optimize.precision": step.precision,
        **{
            f"optimize.{k.replace(' ', '_')}": v
            for k, v in step.key.items()
            if k.startswith("version") or k == "weights"
        },
        "optimize.axes": json.dumps({n: str(a) for n, a in step.component.axes.items()}),
    }


def shared_weights(model: Any, step: Step, bundle: Bundle) -> Artifact | None:
    """A weights file that the bundle has already, of the same component and precision, and with the same tensors."""
    from optimize.compile import external

    header = external.header_of(model)
    for artifact in bundle.artifacts(step.component.name, "weights"):
        same = artifact.spec.get("precision") == step.precision and artifact.key.get("weights") == step.key["weights"]
        if same and artifact.id != f"{step.artifact}/weights" and bundle.whole(artifact):
            kept = external.header_bytes(bundle.path(artifact))
            if external.entries_of(kept) == external.entries_of(header):
                return artifact
    return None


def adopt(
    step: Step,
    bundle: Bundle,
    folder: Path,
    spec: Mapping[str, Any],
    seconds: Mapping[str, float],
    parity: Any,
    shared: Artifact | None,
    *,
    receipt: Any = None,
    base: Artifact | None = None,
    notes: Sequence[str] = (),
    downgrades: Sequence[str] = (),
) -> None:
    """Moves the files into the bundle and claims them, weights first. `base` is what a quantized graph was made of."""
    from optimize.compile.digests import digest_of_file
    from optimize.compile.records import Artifact, Kind

    name = step.component.name
    weights_id = shared.id if shared else f"{step.artifact}/weights"
    kinds: dict[str, tuple[Kind, str, list[str]]] = {
        ".safetensors": ("weights", weights_id, []),
        ".view.onnx": ("view", f"{step.artifact}/view", [step.artifact]),
        ".probe.json": ("probe", f"{step.artifact}/probe", [step.artifact]),
        ".onnx": ("onnx", step.artifact, [weights_id, *([base.id] if base else [])]),
    }
    made: list[Artifact] = []
    for file in sorted(folder.iterdir(), key=lambda f: (f.suffix != ".safetensors", f.name)):
        kind, id_, parents = next(v for end, v in kinds.items() if file.name.endswith(end))
        if kind == "weights" and shared:
            continue
        relative = f"{name}/{file.name}"
        path = bundle.adopt(file, relative)
        made.append(
            Artifact(
                id=id_,
                component=name,
                kind=kind,
                path=relative,
                bytes=path.stat().st_size,
                sha256=digest_of_file(path),
                parents=parents,
                spec=dict(spec) if kind == "onnx" else {"precision": step.precision},
                key=dict(step.key) if kind not in BESIDE else {},
                versions=versions() if kind == "onnx" else {},
                seconds=dict(seconds) if kind == "onnx" else {},
                parity=parity if kind == "onnx" else None,
                notes=list(notes) if kind == "onnx" else [],
                downgrades=list(downgrades) if kind == "onnx" else [],
                receipt=receipt if kind == "onnx" else None,
            )
        )
    bundle.record(*made, component=step.component)


@contextlib.contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turns an allocation that failed into a MissingError; torch has only a RuntimeError with words for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if (
            isinstance(e, RuntimeError)
            and "can't allocate memory" not in str(e)
            and "Invalid buffer size" not in str(e)
        ):
            raise
        raise MissingError(
            f"not enough memory to prove {what}",
            got=str(e).strip().splitlines()[0][-300:] if str(e) else "",
            expected="room for its largest tensors at the sizes of its axes",
            mend="smaller sizes (--axis NAME=MIN:OPT:MAX), or a machine with more memory",
        ) from e


def need_disk(root: Path, component: Component, precision: str) -> None:
    """Raises MissingError before the work where the weights cannot fit on the disk."""
    module = component.build()
    need = sum(p.numel() for p in module.parameters()) * (4 if precision == "fp32" else 2)
    free = shutil.disk_usage(root).free
    if free < need * 1.05 + (32 << 20):
        raise MissingError(
            f"not enough space for {component.name} {precision}",
            got=f"{free / 1e9:.2f} GB free",
            expected=f"{need / 1e9:.2f} GB",
            mend="free some, or choose an --out on another disk",
        )


def make_engine(step: Step, request: Request, bundle: Bundle, progress: Progress, parent: Artifact) -> None:
    """Builds the engine of a proved ONNX artifact (`parent`) for one target."""
    from optimize.compile.digests import digest_of_file
    from optimize.compile.records import Artifact
    from optimize.compile.tensorrt import EngineSpec, engine_from_onnx

    assert step.target is not None
    name, sm = step.target
    if parent.parity is None or not parent.parity.passed:
        raise GateError(f"{parent.id} has no passed parity: no engine is built from it", mend="export it again")
    bundle.check(parent)
    stem = step.artifact.replace("/", ".")
    with bundle.workspace(step.artifact) as folder, progress.step(f"{step.artifact} ({name})"):
        spec = EngineSpec(sm=sm, weight_streaming=request.weight_streaming, timing_cache=request.timing_cache)
        build = engine_from_onnx(
            bundle.path(parent), folder / f"{stem}.engine", profile_of(step.component), spec, progress=progress.say
        )
        quantized = count_in_engine(parent, build)
        relative = f"{step.component.name}/{stem}.engine"
        path = bundle.adopt(build.path, relative)
    artifact = Artifact(
        id=step.artifact,
        component=step.component.name,
        kind="engine",
        path=relative,
        bytes=path.stat().st_size,
        sha256=digest_of_file(path),
        parents=[parent.id],
        key=dict(step.key),
        downgrades=list(build.downgrades),
        spec={
            "precision": step.precision,
            "target": name,
            "sm": sm,
            "flavour": build.flavour,
            "version": build.version,
            "weight_streaming": request.weight_streaming,
            "profile": {k: [list(s) for s in v] for k, v in build.profile.items()},
            **quantized,
        },
        versions=versions(),
        seconds={"build": round(build.seconds, 3)},
        notes=["not run: needs a GPU of this target; its graph was proved as " + parent.id],
    )
    bundle.record(artifact)


def count_in_engine(parent: Artifact, build: Any) -> dict[str, int]:
    """The last count of a receipt: layers that the engine computes from numbers of few bits. Raises GateError where
    one that was quantized is not among them."""
    from optimize.quantize.receipt import layers_in_engine

    if parent.receipt is None:
        return {}
    wanted = [x.name for x in parent.receipt.layers if x.precision == parent.receipt.scheme and x.kind != "attention"]
    found = layers_in_engine(build.layers, wanted)
    if lost := [name for name in wanted if name not in found]:
        raise GateError(
            f"{parent.id}: the engine computes quantized layers in floating point",
            got=f"{len(found)} of {len(wanted)} in {parent.receipt.scheme}; lost: {', '.join(lost[:4])}",
            expected="all of them",
            mend="leave those layers high (--keep-high), so that nothing pretends to be what it is not",
        )
    return {"quantized": len(found)}


def profile_of(component: Component) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Input name -> (min, opt, max) shapes, from the axes."""
    sizes = [{n: getattr(a, which) for n, a in component.axes.items()} for which in ("min", "opt", "max")]
    return {t.name: (t.sizes(sizes[0]), t.sizes(sizes[1]), t.sizes(sizes[2])) for t in component.inputs}


def export(
    source: str,
    out: Path | str,
    *,
    precisions: Sequence[str] = ("fp32",),
    quantization: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **words: Any,
) -> Any:
    """Exports a source into a bundle; every artifact in it is proved. The words are those of the command line.

    Args:
        source: `demo`, a folder, a hub id, `arch:NAME[@tiny]`, or `python:package.module:factory`.
        out: the bundle's folder, new or a bundle of the same source (what is there and unchanged is kept).
        precisions: fp32, fp16, bf16; or a scheme of `optimize.quantize` (int8, ...), whose base is exported with it.
        quantization: words for `optimize.quantize`: calibration, samples, budgets, keep, ...
        dry_run: gives the `Plan` and writes nothing.
        words: see `request_from_words`: components, formats, targets, axes, opset, ...

    Returns:
        The `Bundle`, or with `dry_run` the `Plan`.

    Raises:
        InputError: the words or the source are wrong. GateError: parity, a receipt or a budget was missed.
        MissingError: a package or space.
    """
    from optimize import quantizing
    from optimize.compile.bundle import Bundle
    from optimize.compile.spec import PRECISIONS, QUANTIZED

    choose("precision", precisions, (*PRECISIONS, *QUANTIZED))
    floats = [p for p in precisions if p in PRECISIONS]
    fewer = quantizing.requests_for_export(out, precisions, words, quantization or {})
    bases = [p for p in quantizing.bases_for(fewer) if p not in floats]
    request = replace(request_from_words(source, out, precisions=[*floats, *bases], **words), bases=tuple(bases))
    there = Bundle.look(request.out, request.source)
    components = components_for(request)  # the words are checked against the source before anything is written
    plan = plan_from_request(request, components, there)
    if dry_run:
        plan.steps += quantizing.steps_for(plan, fewer, there)
        return plan
    shown = progress or Progress(enabled=False)
    with Bundle.create(request.out, request.source, list(request.trust)) as bundle:
        run_plan(plan_from_request(request, components, bundle), bundle, shown)
        for wanted in fewer:
            quantizing.quantize_all(bundle, wanted, shown)
            made = [quantizing.artifact_id(wanted, c.name) for c in components]
            build_engines(bundle, [bundle.manifest.artifacts[i] for i in made], request, shown)
        return bundle


def build_engines(bundle: Bundle, artifacts: Iterable[Artifact], request: Request, progress: Progress) -> None:
    """Engines of ONNX artifacts for the request's targets; what is there and unchanged is kept."""
    from optimize.loading import recorded_component

    for artifact in artifacts:
        component, precision = recorded_component(bundle, artifact.component), str(artifact.spec["precision"])
        for target in request.targets:
            step = engine_step(bundle, artifact.id, component, precision, artifact.key, target, request)
            if not step.hit:
                make_engine(step, request, bundle, progress, artifact)
