"""`optimize.export`: the pipeline from a source to a bundle of proved artifacts. `STEPS` is what `--dry-run` prints."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError
from optimize.kernels.functions import LEAST_OPSET
from optimize.narrowing import Words, words_from
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
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
    "compile packages with AOTInductor, prove them likewise",
    "record in the manifest",
)
FORMATS = ("onnx", "tensorrt", "aoti")
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
    device: str = "cpu"
    """Where AOTInductor packages are to run: cpu or cuda."""
    bases: tuple[str, ...] = ()
    """Precisions that are made only to be quantized: no engines are built of them."""


@dataclass(frozen=True)
class Step:
    """One thing to make: an ONNX artifact, an engine or an AOTInductor package, and why it is made or kept."""

    artifact: str
    component: Component
    precision: str
    key: Mapping[str, str]
    why: str
    hit: bool
    target: tuple[str, int] | None = None
    kind: str = "onnx"


@dataclass
class Plan:
    """What an export will do, in order."""

    request: Request
    components: tuple[Component, ...]
    steps: list[Step] = field(default_factory=list)


def request_from_words(
    source: str | os.PathLike[str],
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
    device: str | None = None,
) -> Request:
    """Checks words that need no model. Raises InputError for unknown precisions, formats, targets and opsets, and
    MissingError for targets that nothing here builds for."""
    from optimize.compile.spec import PRECISIONS
    from optimize.packaging import check_words, device_of
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
    check_words(formats, keep_fp32, probe_steps)
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
        device_of(formats, device),
    )


def source_text(text: str | os.PathLike[str]) -> str:
    """A local folder by its absolute path, so that its bundle can be verified from anywhere. Raises InputError for what
    is no text."""
    from optimize.compile.sources import is_local

    if isinstance(text, os.PathLike):
        return str(Path(text).resolve())
    if not isinstance(text, str):
        raise InputError(
            "the source is no text",
            got=type(text).__name__,
            expected="a folder, a repository, arch:NAME or python:MODULE:FACTORY",
            mend="for a module of your own: a function that gives it (or a Component), named python:MODULE:FUNCTION",
        )
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
    from optimize.packaging import step_of_package

    plan = Plan(request, components)
    for component in plan.components:
        for precision in request.precisions:
            if "aoti" in request.formats:
                plan.steps.append(step_of_package(bundle, component, precision, request))
            if set(request.formats) == {"aoti"}:
                continue
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
    source = key_of_source(component, precision)
    return {**source, "opset": str(request.opset), **request.narrowing.key(precision)}


def key_of_source(component: Component, precision: str) -> dict[str, str]:
    """What every artifact of a component in a precision depends on: the model, and what turns it into files."""
    config = json.dumps(component.config, sort_keys=True, default=str)
    return {
        "weights": component.weights.digest(),
        "config": digest(config),
        "precision": precision,
        "axes": json.dumps({n: asdict(a) for n, a in component.axes.items()}, sort_keys=True),
        "exporter": exporter_digest(),
        **({"kernels": kernels_digest()} if component.kernels else {}),
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


def export(
    source: str | os.PathLike[str],
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
    from optimize import making, quantizing
    from optimize.compile.bundle import Bundle
    from optimize.compile.spec import PRECISIONS, QUANTIZED
    from optimize.packaging import check_precisions

    choose("precision", precisions, (*PRECISIONS, *QUANTIZED))
    check_precisions(precisions, words.get("formats", ()))
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
        making.run_plan(plan_from_request(request, components, bundle), bundle, shown)
        for wanted in fewer:
            quantizing.quantize_all(bundle, wanted, shown)
            made = [quantizing.artifact_id(wanted, c.name) for c in components]
            making.build_engines(bundle, [bundle.manifest.artifacts[i] for i in made], request, shown)
        return bundle
