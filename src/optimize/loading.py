"""`optimize.load`, `optimize.verify`, `optimize.build`: what is done with a bundle that is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError, InputError, OptimizeError
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact, ComponentRecord
    from optimize.compile.runners import Runner
    from optimize.compile.sources import Source
    from optimize.compile.spec import Axis, Component
    from optimize.profiles.plan import Plan


@dataclass(frozen=True)
class LoadedComponent:
    """One component of a bundle: `record` says its inputs, outputs and axes; `runner(...)` runs an artifact of it."""

    bundle: Bundle
    record: ComponentRecord
    trust_remote_code: bool = False
    plan: Plan | None = None

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        return self.bundle.artifacts(self.record.name, kind)

    def runner(
        self,
        backend: str | None = None,
        precision: str | None = None,
        *,
        device: str | None = None,
        threads: int = 0,
    ) -> Runner:
        """A runner of this component on a backend of `compile.backends`: `onnxruntime` of the ONNX artifact, `aoti` of
        the AOTInductor package, `tensorrt` of this GPU's engine, `eager` and `torch.compile` of the source itself.

        Without words what the plan chose, where the bundle was loaded with one; else ONNX Runtime's. Without
        `precision` the only one that the bundle has, else fp32. `device` is `cpu` or `cuda`, for backends that run on
        both; `threads` of a CPU, 0 for all. The artifact's digest is checked first. A package or an engine is native
        code that runs here: load one of a bundle that you trust.
        Raises InputError for an unknown backend or precision, GateError for a file that is not the proved one,
        MissingError for a backend that is not here, and for a package that was compiled for another machine.
        """
        from optimize.deploying import planned_runner, runner_on

        if self.plan is not None and backend is None and precision is None:
            part = self.plan.parts.get(self.record.name)
            if part is None:
                raise InputError(
                    f"the plan says nothing of {self.record.name}",
                    got=", ".join(self.plan.parts),
                    mend="name a backend, or profile all components",
                )
            return planned_runner(self, part, self.plan)
        return runner_on(self, backend or "onnxruntime", precision, device, threads)

    def runner_of(self, artifact: Artifact) -> Runner:
        """ONNX Runtime of one ONNX artifact, whose digest is checked first."""
        from optimize.deploying import runner_of_artifact

        return runner_of_artifact(self.bundle, artifact, "onnxruntime", "cpu")

    def onnx(self, precision: str | None = None) -> Artifact:
        """The ONNX artifact of a precision."""
        found: dict[str, Artifact] = {}
        for artifact in self.artifacts("onnx"):
            if artifact.spec.get("runtime") == "onnxruntime":  # placed for the runtime that runners use
                found[str(artifact.spec["precision"])] = artifact
            found.setdefault(str(artifact.spec["precision"]), artifact)
        export = f"optimize export {self.bundle.manifest.source} --out {self.bundle.root}"
        return in_precision(found, precision, f"{self.record.name} has no ONNX artifact", export)


def in_precision(found: Mapping[str, Artifact], precision: str | None, lacking: str, mend: str) -> Artifact:
    """The artifact of a precision; without one the only one that there is, else that in fp32. Raises InputError."""
    wanted = precision or (next(iter(found)) if len(found) == 1 else "fp32")
    if wanted not in found:
        raise InputError(f"{lacking} in {wanted}", got=", ".join(found) or "none", mend=f"{mend} --precision {wanted}")
    return found[wanted]


class LoadedBundle(Mapping[str, LoadedComponent]):
    """A bundle as a mapping from component names: `optimize.load(DIR)["unet"].runner("onnxruntime")`."""

    def __init__(self, bundle: Bundle, trust_remote_code: bool = False, plan: Plan | None = None) -> None:
        self.bundle, self.trust_remote_code, self.plan = bundle, trust_remote_code, plan

    def __getitem__(self, name: str) -> LoadedComponent:
        return LoadedComponent(self.bundle, self.bundle.component(name), self.trust_remote_code, self.plan)

    def __iter__(self) -> Any:
        return iter(self.bundle.manifest.components)

    def __len__(self) -> int:
        return len(self.bundle.manifest.components)


def load(folder: Path | str, *, plan: Any = None, trust_remote_code: bool = False) -> LoadedBundle:
    """Opens a bundle for use. Raises InputError for a folder that is none.

    `plan` is the answer of a profile (the file that `optimize profile --plan FILE` wrote, or the record itself): each
    component's `runner()` is what it chose then. It is refused where the bundle, the kind of device or a backend is not
    what it was measured with (`deploying.check_plan`).
    `trust_remote_code` allows the `eager` runner of a bundle whose source is Python code (see `component_of`).
    """
    from optimize.compile.bundle import Bundle

    loaded = LoadedBundle(Bundle.read(Path(folder)), trust_remote_code)
    if plan is not None:
        from optimize.deploying import check_plan
        from optimize.profiles.plan import plan_from

        loaded.plan = plan_from(plan)
        check_plan(loaded, loaded.plan)
    return loaded


def component_of(bundle: Bundle, name: str, trust_remote_code: bool = False) -> Component:
    """The component from the bundle's own source, with the axes that it was exported with."""
    source = source_of(bundle, (name,), trust_remote_code)
    found = next((c for c in source.components if c.name == name), None)
    if found is None:
        raise InputError(
            f"the source {bundle.manifest.source} has no component {name} any more",
            got=", ".join(c.name for c in source.components),
            expected=name,
            mend="export again",
        )
    return found.with_axes(axes_of(bundle, name))


def source_of(bundle: Bundle, names: Sequence[str] = (), trust_remote_code: bool = False) -> Source:
    """What the bundle was exported from, read again; of a pipeline the components `names` suffice.

    A manifest can name Python code as its source. Whoever made the bundle trusted that code; whoever opens it may be
    somebody else, and says so again.
    """
    from optimize.compile.sources import Trust, source_from_text

    manifest = bundle.manifest
    if (manifest.source.startswith("python:") or "remote code" in manifest.trust) and not trust_remote_code:
        raise InputError(
            f"the source of {bundle.root} is Python code, which would run",
            got=manifest.source,
            expected="your word that you trust it",
            mend="read that code, then --trust-remote-code (trust_remote_code=True)",
        )
    try:
        return source_from_text(manifest.source, Trust("pickle" in manifest.trust, trust_remote_code), names)
    except OptimizeError as e:
        raise type(e)(
            f"the source of {bundle.root} cannot be read any more: {e.what}",
            got=e.got or manifest.source,
            expected="what it was exported from",
            mend="put it back, or export again from where it is now",
        ) from e


def axes_of(bundle: Bundle, name: str) -> dict[str, Axis]:
    from optimize.compile.spec import Axis

    return {n: Axis(n, a.min, a.opt, a.max, a.step) for n, a in bundle.component(name).axes.items()}


def axes_of_artifact(artifact: Artifact) -> dict[str, Axis]:
    """The axes that it was made with: a later export of the component in another precision may have had others."""
    from optimize.compile.spec import Axis

    return {n: Axis(**a) for n, a in json.loads(artifact.key.get("axes", "{}")).items()}


def recorded_component(bundle: Bundle, name: str) -> Component:
    """The component as the manifest describes it, without its source: enough to build engines, not to run eager."""
    from optimize.compile.spec import Component, TensorSpec
    from optimize.compile.weights import RandomWeights

    record = bundle.component(name)
    inputs = tuple(TensorSpec(t.name, tuple(t.shape), t.dtype, t.fill) for t in record.inputs)
    return Component(
        record.name,
        record.role,
        record.class_name,
        axes_of(bundle, name),
        inputs,
        tuple(record.outputs),
        lambda: None,
        RandomWeights(),
        {},
    )


@dataclass(frozen=True)
class Verification:
    """What verifying one artifact gave. `state` is "passed", "failed" or "skipped"; `detail` is figures or reason."""

    artifact: str
    state: str
    detail: str


def verify(
    folder: Path | str,
    *,
    components: Sequence[str] = (),
    memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Verification]:
    """Every artifact's digest, read anew, and parity of every ONNX artifact and AOTInductor package against its source,
    measured again. A package is native code: it is run only with `trust_remote_code`, as a source in Python is.

    Raises InputError for a broken or empty bundle; failures of single artifacts are in the result, not raised.
    """
    from optimize.compile.bundle import Bundle

    bundle = Bundle.read(Path(folder))
    shown = progress or Progress(enabled=False)
    for name in components:
        bundle.component(name)
    chosen = [a for a in bundle.artifacts() if not components or a.component in components]
    if not chosen:
        raise InputError(
            f"{folder} has no artifact to verify",
            got="a bundle that claims nothing",
            expected="one that an export has finished",
            mend="run the `optimize export` again",
        )
    sources: dict[str, Component] = {}
    results = []
    for artifact in chosen:
        runs = artifact.kind == "onnx" or (artifact.kind == "aoti" and trust_remote_code)
        if runs and artifact.component not in sources:
            sources[artifact.component] = component_of(bundle, artifact.component, trust_remote_code)
        with shown.step(f"verify {artifact.id}"):
            source = sources[artifact.component] if runs else None
            results.append(verify_artifact(bundle, artifact, source, memory, shown))
    return results


def verify_artifact(
    bundle: Bundle, artifact: Artifact, source: Component | None, memory: int | None, progress: Progress
) -> Verification:
    from optimize.packaging import verify_package

    try:
        for parent in artifact.parents:
            if parent not in bundle.manifest.artifacts:
                raise GateError(f"{artifact.id} was made of {parent}, which the bundle does not have")
            bundle.check(bundle.manifest.artifacts[parent])
        bundle.check(artifact, fresh=True)
        source = source and source.with_axes(axes_of_artifact(artifact))
        if artifact.kind == "onnx" and source is not None:
            return verify_onnx(bundle, artifact, source, memory, progress)
        if artifact.kind == "aoti" and source is not None:
            return verify_package(bundle, artifact, source, memory, progress)
    except GateError as e:
        return Verification(artifact.id, "failed", str(e))
    if artifact.kind == "engine":
        return Verification(
            artifact.id, "passed", f"digest and parents; not run: needs a GPU of SM{artifact.spec['sm']}"
        )
    if artifact.kind == "aoti":
        return Verification(artifact.id, "skipped", "digest; not run: native code, which --trust-remote-code lets run")
    return Verification(artifact.id, "passed", "digest")


def check_weights(artifact: Artifact, component: Component) -> None:
    if component.weights.digest() != artifact.key.get("weights"):
        raise GateError(
            f"the source's weights are not those that {artifact.id} was made of",
            got=component.weights.digest(),
            expected=artifact.key.get("weights"),
            mend="export again",
        )


def verify_onnx(
    bundle: Bundle, artifact: Artifact, component: Component, memory: int | None, progress: Progress
) -> Verification:
    import onnx

    from optimize.gate import parity_of_onnx, plan_for, refusals
    from optimize.making import memory_errors
    from optimize.profiles import parity

    if artifact.receipt is not None:
        from optimize.receipts import verified

        return Verification(artifact.id, "passed", verified(bundle, artifact, component))
    precision = str(artifact.spec["precision"])
    component = replace(component, kernels=bool(artifact.spec.get("kernels")))
    check_weights(artifact, component)
    path = bundle.path(artifact)
    with refusals(path):
        onnx.checker.check_model(str(path), full_check=True)
    with memory_errors(component.name):
        islands = precision == "fp16" and bool(artifact.spec.get("fp32"))
        result = parity_of_onnx(path, component, precision, plan_for(component, memory), progress.say, islands=islands)
    if not result.passed:
        shape, output = parity.worst_miss(result, precision)
        return Verification(
            artifact.id,
            "failed",
            f"parity: {output.name} at the {shape.name} sizes is off by {output.relative:.3g}; rule: {result.rule}",
        )
    return Verification(artifact.id, "passed", f"parity {result.worst:.1e} ({result.how})")


def build(
    folder: Path | str,
    *,
    targets: Sequence[str],
    components: Sequence[str] = (),
    precisions: Sequence[str] = (),
    weight_streaming: bool = False,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Engines for targets from ONNX artifacts that the bundle has and that are proved; nothing is exported again.

    Raises InputError for unknown targets and components, MissingError where no TensorRT serves a target.
    """
    from optimize.compile.bundle import Bundle
    from optimize.exporting import choose, request_from_words
    from optimize.making import build_engines

    old = Bundle.read(Path(folder))
    choose("component", components, old.manifest.components)
    choose("precision", precisions, {str(a.spec["precision"]): a for a in old.artifacts(kind="onnx")})
    request = request_from_words(
        old.manifest.source,
        folder,
        formats=("tensorrt",),
        targets=targets,
        weight_streaming=weight_streaming,
        timing_cache=timing_cache,
    )
    shown = progress or Progress(enabled=False)
    with Bundle.create(Path(folder), old.manifest.source, []) as bundle:
        chosen = [
            a
            for a in bundle.artifacts(kind="onnx")
            if (not components or a.component in components)
            and (not precisions or a.spec["precision"] in precisions)
            and a.spec.get("runtime", "tensorrt") == "tensorrt"
        ]
        if not chosen:
            raise InputError(
                "the bundle has no ONNX artifact to build from",
                got=", ".join(a.id for a in bundle.artifacts(kind="onnx")) or "none",
                expected="one that `optimize export` proved; a quantized one has to be placed for TensorRT",
                mend="`optimize export`, or `optimize quantize DIR --for tensorrt`",
            )
        build_engines(bundle, chosen, request, shown)
        return bundle
