"""What a profile measures: components at named sets of sizes, and for each the candidates, backend by precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimize.errors import InputError, OptimizeError
from optimize.seats import Job

if TYPE_CHECKING:
    from optimize.compile.backends import Backend
    from optimize.compile.records import Artifact
    from optimize.compile.spec import Component
    from optimize.loading import LoadedBundle

AXES_WORDS = ("min", "opt", "max")
"""Shapes that every component has: the ends and the middle of its axes."""
REFERENCE = "eager fp32"


@dataclass(frozen=True)
class Candidate:
    """One backend in one precision. `why` says why it cannot be measured; `sha256`, `bytes` and `seconds` (of
    making it) are those of its file."""

    job: Job
    sha256: str | None = None
    bytes: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.job.backend} {self.job.precision}"


@dataclass(frozen=True)
class Subject:
    """What is profiled: a bundle (`loaded`) or a source alone, its components, and why one's source cannot be run."""

    source: str
    components: Mapping[str, Component]
    loaded: LoadedBundle | None = None
    trust: tuple[str, ...] = ()
    no_module: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        return self.loaded.bundle.root if self.loaded else None


def subject_from(what: Path | str, components: Sequence[str], axes: Sequence[str], trust: tuple[str, ...]) -> Subject:
    """A bundle's folder, or any source that `optimize export` takes, which is run without being exported.

    Raises InputError where it is neither.
    """
    from optimize.compile.bundle import MANIFEST
    from optimize.exporting import components_for, request_from_words
    from optimize.loading import load

    if (Path(what) / MANIFEST).is_file():
        if axes:
            raise InputError(
                "a bundle has its axes already", got=", ".join(axes), mend="--shape NAME=AXIS:SIZE,... is within them"
            )
        return subject_of_bundle(load(what, trust_remote_code="remote code" in trust), components, trust)
    request = request_from_words(
        str(what),
        Path(),
        components=components,
        axes=axes,
        allow_pickle="pickle" in trust,
        trust_remote_code="remote code" in trust,
    )
    return Subject(request.source, {c.name: c for c in components_for(request)}, trust=trust)


def subject_of_bundle(loaded: LoadedBundle, names: Sequence[str], trust: tuple[str, ...]) -> Subject:
    from optimize.loading import component_of, recorded_component

    found: dict[str, Component] = {}
    lacking: dict[str, str] = {}
    for name in names or loaded:
        loaded.bundle.component(name)
        try:
            found[name] = component_of(loaded.bundle, name, loaded.trust_remote_code)
        except OptimizeError as e:  # the artifacts can be measured without what they were made of
            found[name], lacking[name] = recorded_component(loaded.bundle, name), e.what
    return Subject(loaded.bundle.manifest.source, found, loaded, trust, lacking)


# --- candidates ------------------------------------------------------------------------------------------------------


def candidates_of(
    subject: Subject, name: str, backends: Sequence[str], precisions: Sequence[str], device: str, threads: int
) -> list[Candidate]:
    """All candidates of a component. Of backends that were not asked for only those that are there; a backend that was
    asked for and cannot be used is a candidate with a reason."""
    from optimize.compile.backends import BACKENDS, backend_from_name

    named = [backend_from_name(b) for b in dict.fromkeys(backends)]
    found: list[Candidate] = []
    for backend in named or [b for b in BACKENDS.values() if b.default and not b.why_not(device)]:
        jobs = jobs_of(subject, name, backend, precisions, device, threads)
        if why := backend.why_not(device):
            jobs = [replace(c, why=why) for c in jobs[:1] or [lone(subject, name, backend, "fp32", device, threads)]]
        elif not jobs and named:
            why = f"{name} has no artifact that {backend.name} takes"
            jobs = [replace(lone(subject, name, backend, "fp32", device, threads), why=why)]
        found += jobs
    return found


def jobs_of(
    subject: Subject, name: str, backend: Backend, precisions: Sequence[str], device: str, threads: int
) -> list[Candidate]:
    if backend.takes in ("module", "aoti"):
        made = packages_of(subject, name, device) if backend.takes == "aoti" else {}
        wanted = [p for p in precisions if p in FLOATS] if precisions else defaults_of(subject, name, device)
        lone_ones = [lone(subject, name, backend, p, device, threads) for p in wanted]
        return [of_artifact(c, made[c.job.precision]) if c.job.precision in made else c for c in lone_ones]
    found = []
    for artifact in subject.loaded.bundle.artifacts(name) if subject.loaded else ():
        if artifact.kind == {"onnx": "onnx", "engine": "engine"}[backend.takes]:
            label = label_of(artifact)
            if not precisions or label.partition("+")[0] in precisions:
                job = lone(subject, name, backend, label, device, threads)
                found.append(
                    replace(of_artifact(job, artifact), why=why_not_run(artifact, backend, device, precisions))
                )
    return found


FLOATS = ("fp32", "fp16", "bf16")


def lone(subject: Subject, name: str, backend: Backend, precision: str, device: str, threads: int) -> Candidate:
    """A candidate that runs the source's own module, or a package made of it."""
    component = subject.components[name]
    axes = None if subject.loaded else {n: (a.min, a.opt, a.max) for n, a in component.axes.items()}
    folder = str(subject.folder) if subject.folder else None
    job = Job(
        name,
        backend.name,
        precision,
        folder,
        subject.source,
        axes=axes,
        device=device,
        threads=threads,
        trust=subject.trust,
    )
    why = subject.no_module.get(name, "") if backend.takes != "onnx" else ""
    return Candidate(job, why=why)


def of_artifact(candidate: Candidate, artifact: Artifact) -> Candidate:
    job = replace(candidate.job, artifact=artifact.id)
    return Candidate(job, artifact.sha256, artifact.bytes, dict(artifact.seconds))


def label_of(artifact: Artifact) -> str:
    """`unet/fp32/kernels` -> `fp32+kernels`; an engine's target is no part of it."""
    words = artifact.id.split("/")[1:]
    return "+".join(w for w in words if not re.fullmatch(r"sm\d+", w))


def packages_of(subject: Subject, name: str, device: str) -> dict[str, Artifact]:
    """Precision -> an AOTInductor package of the bundle for this device."""
    packages = subject.loaded.bundle.artifacts(name, "aoti") if subject.loaded else []
    return {str(a.spec["precision"]): a for a in packages if str(a.spec.get("device", "cpu")).startswith(device)}


def defaults_of(subject: Subject, name: str, device: str) -> list[str]:
    """Floating-point precisions that the bundle has, and fp32. Not fp16 on a CPU: torch has slow kernels only."""
    here = subject.loaded.bundle.artifacts(name, "onnx") if subject.loaded else []
    known = {str(a.spec["precision"]) for a in here}
    return [p for p in FLOATS if p == "fp32" or (p in known and not (p == "fp16" and device == "cpu"))]


def why_not_run(artifact: Artifact, backend: Backend, device: str, asked: Sequence[str]) -> str:
    """Why an artifact is no candidate for a backend here; nothing where it is one."""
    precision, runtime = str(artifact.spec["precision"]), artifact.spec.get("runtime", "onnxruntime")
    if artifact.kind == "engine":
        from optimize.compile.tensorrt import current_gpu

        sm = current_gpu()[1] if device == "cuda" else None
        return "" if sm == artifact.spec["sm"] else f"the engine is for SM{artifact.spec['sm']}"
    if precision == "bf16" and backend.name == "onnxruntime":
        return "ONNX Runtime's CPU provider has no bf16 kernels"
    if precision == "fp8" and device == "cpu":
        return "a CPU has no fp8: ONNX Runtime only simulates it"
    if precision == "fp16" and device == "cpu" and precision not in asked:
        return "fp16 on a CPU is slow and for GPUs: --precision fp16 measures it"
    if runtime == "tensorrt" and device == "cpu":
        return "its Q and DQ are placed for TensorRT, and would run in floating point here"
    return ""


# --- sizes -----------------------------------------------------------------------------------------------------------


def shapes_from_words(
    words: Sequence[str], components: Mapping[str, Component]
) -> dict[str, dict[str, dict[str, int]]]:
    """Component -> name of a shape -> size of each of its axes.

    `512=height:512,width:512` names sizes, the other axes are at their middle; `min`, `opt` and `max` are of the axes.
    Raises InputError for an axis that no component has, and for sizes outside of a component's axes.
    """
    found: dict[str, dict[str, dict[str, int]]] = {name: {} for name in components}
    encoded = encoded_sizes(components)
    for text in words or ("opt",):
        name, given = shape_from_text(text)
        used = {axis for c in components.values() for axis in c.axes}
        if unknown := [axis for axis in given if axis not in used]:
            raise InputError(
                f"shape {name}: no component has the axis {unknown[0]}",
                got=text,
                expected="axes among " + ", ".join(sorted(used)),
                mend="`optimize export SOURCE --out DIR --dry-run` lists the axes of each component",
            )
        for c in components.values():
            which = name if name in AXES_WORDS and not given else "opt"
            usual = {n: encoded.get(n, a.opt) if which == "opt" else getattr(a, which) for n, a in c.axes.items()}
            sizes = {**usual, **{n: size for n, size in given.items() if n in c.axes}}
            check_sizes(name, sizes, c)
            if name in found[c.name]:
                raise InputError(f"shape {name} is given twice", got=", ".join(words), expected="a name for each")
            found[c.name][name] = sizes
    return found


def encoded_sizes(components: Mapping[str, Component]) -> dict[str, int]:
    """How many tokens the pipeline's encoders give, where they agree: it is what a denoiser is called with."""
    tokens = {c.axes["tokens"].opt for c in components.values() if c.role == "text_encoder" and "tokens" in c.axes}
    takers = [c.axes["tokens"] for c in components.values() if "tokens" in c.axes]
    size = next(iter(tokens), 0)
    return {"tokens": size} if len(tokens) == 1 and all(a.min <= size <= a.max for a in takers) else {}


def shape_from_text(text: str) -> tuple[str, dict[str, int]]:
    name, equals, sizes = text.partition("=")
    if not equals and name in AXES_WORDS:
        return name, {}
    pairs = [re.fullmatch(r"\s*(\w+)\s*[:=]\s*(\d+)\s*", part, re.ASCII) for part in sizes.split(",")]
    found = {m[1]: int(m[2]) for m in pairs if m}
    if not name or not equals or len(found) != len(pairs):
        raise InputError(
            "--shape was not understood",
            got=text,
            expected="NAME=AXIS:SIZE,AXIS:SIZE or one of min, opt, max",
            mend="such as --shape 512=height:512,width:512,batch:2",
        )
    return name, found


def check_sizes(name: str, sizes: Mapping[str, int], component: Component) -> None:
    for axis in component.axes.values():
        size = sizes[axis.name]
        if not axis.min <= size <= axis.max or size % axis.step:
            raise InputError(
                f"shape {name}: {component.name} does not take {axis.name} of {size}",
                got=size,
                expected=f"{axis.min} to {axis.max}" + (f" in steps of {axis.step}" if axis.step > 1 else ""),
                mend=f"another size, or export with --axis {axis.name}=MIN:OPT:MAX that holds it",
            )
