"""`optimize.load`, `optimize.verify`, `optimize.build`: what is done with a bundle that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError, InputError, MissingError
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact, ComponentRecord
    from optimize.compile.runners import Runner
    from optimize.compile.spec import Component

BACKENDS = ("onnxruntime", "eager")


@dataclass(frozen=True)
class LoadedComponent:
    """One component of a bundle: `record` says its inputs, outputs and axes; `runner(...)` runs an artifact of it."""

    bundle: Bundle
    record: ComponentRecord

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        return self.bundle.artifacts(self.record.name, kind)

    def runner(self, backend: str = "onnxruntime", precision: str | None = None) -> Runner:
        """A runner of this component: `onnxruntime` of the ONNX artifact, `eager` of the source itself.

        Without `precision` the only one that the bundle has, else fp32. The artifact's digest is checked first.
        Raises InputError for an unknown backend or precision, GateError for a file that is not the proved one.
        """
        from optimize.compile.runners import BACKENDS as RUNNERS
        from optimize.compile.runners import EagerRunner

        if backend not in BACKENDS:
            raise InputError(f"unknown backend {backend}", expected="one of " + ", ".join(BACKENDS))
        artifact = self.onnx(precision)
        if backend == "eager":
            return EagerRunner(component_of(self.bundle, self.record.name), str(artifact.spec["precision"]))
        if artifact.spec["precision"] == "bf16":
            raise MissingError("ONNX Runtime's CPU provider has no bf16 kernels", mend="use fp32 or fp16, or an engine on a GPU")
        for parent in artifact.parents:
            self.bundle.check(self.bundle.manifest.artifacts[parent])
        self.bundle.check(artifact)
        return RUNNERS[backend](self.bundle.path(artifact))

    def onnx(self, precision: str | None = None) -> Artifact:
        """The ONNX artifact of a precision."""
        found = {str(a.spec["precision"]): a for a in reversed(self.artifacts("onnx"))}
        wanted = precision or (next(iter(found)) if len(found) == 1 else "fp32")
        if wanted not in found:
            raise InputError(f"{self.record.name} has no ONNX artifact in {wanted}", got=", ".join(found) or "none",
                             mend=f"optimize export {self.bundle.manifest.source} --out {self.bundle.root} --precision {wanted}")
        return found[wanted]


class LoadedBundle(Mapping[str, LoadedComponent]):
    """A bundle as a mapping from component names: `optimize.load(DIR)["unet"].runner("onnxruntime")`."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def __getitem__(self, name: str) -> LoadedComponent:
        return LoadedComponent(self.bundle, self.bundle.component(name))

    def __iter__(self) -> Any:
        return iter(self.bundle.manifest.components)

    def __len__(self) -> int:
        return len(self.bundle.manifest.components)


def load(folder: Path | str) -> LoadedBundle:
    """Opens a bundle for use. Raises InputError for a folder that is none."""
    from optimize.compile.bundle import Bundle

    return LoadedBundle(Bundle.read(Path(folder)))


def component_of(bundle: Bundle, name: str) -> Component:
    """The component from the bundle's own source, with the axes that it was exported with."""
    from optimize.compile.sources import Trust, source_from_text
    from optimize.compile.spec import Axis

    trust = bundle.manifest.trust
    source = source_from_text(bundle.manifest.source, Trust("pickle" in trust, "remote code" in trust))
    record = bundle.component(name)
    found = next((c for c in source.components if c.name == name), None)
    if found is None:
        raise InputError(f"the source {bundle.manifest.source} has no component {name} any more")
    axes = {n: Axis(n, a.min, a.opt, a.max, a.step) for n, a in record.axes.items()}
    return found.with_axes(axes)


@dataclass(frozen=True)
class Verification:
    """What verifying one artifact gave. `state` is "passed", "failed" or "skipped"; `detail` is figures or reason."""

    artifact: str
    state: str
    detail: str


def verify(folder: Path | str, *, components: Sequence[str] = (), memory: int | None = None,
           progress: Progress | None = None) -> list[Verification]:
    """Every artifact's digest, read anew, and every ONNX artifact's parity against its source, measured again.

    Raises InputError for a broken bundle; failures of single artifacts are in the result, not raised.
    """
    from optimize.compile.bundle import Bundle

    bundle = Bundle.read(Path(folder))
    shown = progress or Progress(enabled=False)
    for name in components:
        bundle.component(name)
    chosen = [a for a in bundle.artifacts() if not components or a.component in components]
    results = []
    for artifact in chosen:
        with shown.step(f"verify {artifact.id}"):
            results.append(verify_artifact(bundle, artifact, memory, shown))
    return results


def verify_artifact(bundle: Bundle, artifact: Artifact, memory: int | None, progress: Progress) -> Verification:
    try:
        for parent in artifact.parents:
            if parent not in bundle.manifest.artifacts:
                raise GateError(f"{artifact.id} was made of {parent}, which the bundle does not have")
            bundle.check(bundle.manifest.artifacts[parent])
        bundle.check(artifact, fresh=True)
        if artifact.kind == "onnx":
            return verify_onnx(bundle, artifact, memory, progress)
    except GateError as e:
        return Verification(artifact.id, "failed", str(e))
    if artifact.kind == "engine":
        return Verification(artifact.id, "passed", f"digest and parents; not run: needs a GPU of SM{artifact.spec['sm']}")
    return Verification(artifact.id, "passed", "digest")


def verify_onnx(bundle: Bundle, artifact: Artifact, memory: int | None, progress: Progress) -> Verification:
    import onnx

    from optimize.gate import parity_of_onnx, plan_for
    from optimize.profiles import parity

    component = component_of(bundle, artifact.component)
    precision = str(artifact.spec["precision"])
    if component.weights.digest() != artifact.key["weights"]:
        raise GateError(f"the source's weights are not those that {artifact.id} was made of", got=component.weights.digest(),
                        expected=artifact.key["weights"], mend="export again")
    path = bundle.path(artifact)
    onnx.checker.check_model(str(path), full_check=True)
    result = parity_of_onnx(path, component, precision, plan_for(component, memory), progress.say)
    if not result.passed:
        shape, output = parity.worst_miss(result, precision)
        return Verification(artifact.id, "failed", f"parity: {output.name} at the {shape.name} sizes is off by "
                            f"{output.relative:.3g}; rule: {result.rule}")
    return Verification(artifact.id, "passed", f"parity {result.worst:.1e} ({result.how})")


def build(folder: Path | str, *, targets: Sequence[str], components: Sequence[str] = (), precisions: Sequence[str] = (),
          weight_streaming: bool = False, timing_cache: Path | None = None, progress: Progress | None = None) -> Bundle:
    """Engines for targets from ONNX artifacts that the bundle has and that are proved; nothing is exported again.

    Raises InputError for unknown targets and components, MissingError where no TensorRT serves a target.
    """
    from optimize.compile.bundle import Bundle
    from optimize.exporting import Step, choose, flavour_text, make_engine, request_from_words, step_for

    old = Bundle.read(Path(folder))
    bundle = Bundle.create(Path(folder), old.manifest.source, old.manifest.trust)
    choose("component", components, bundle.manifest.components)
    request = request_from_words(bundle.manifest.source, folder, formats=("tensorrt",), targets=targets,
                                 weight_streaming=weight_streaming, timing_cache=timing_cache)
    shown = progress or Progress(enabled=False)
    chosen = [a for a in bundle.artifacts(kind="onnx") if (not components or a.component in components)
              and (not precisions or a.spec["precision"] in precisions)]
    if not chosen:
        raise InputError("the bundle has no ONNX artifact to build from", mend="optimize export first")
    for artifact in chosen:
        for target in request.targets:
            precision = str(artifact.spec["precision"])
            key = {**artifact.key, "sm": str(target[1]), "weight streaming": str(weight_streaming), "tensorrt": flavour_text(target[1])}
            step: Step = step_for(bundle, f"{artifact.id}/sm{target[1]}", component_of(bundle, artifact.component), precision, key, target)
            if not step.hit:
                make_engine(step, request, bundle, shown, artifact)
    return bundle
