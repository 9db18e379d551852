"""Runners of what a bundle has, on any backend; and a plan's choice of them, held to what it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimize.errors import GateError, InputError, MissingError

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact
    from optimize.compile.runners import Runner
    from optimize.loading import LoadedBundle, LoadedComponent
    from optimize.profiles.plan import Part, Plan


def runner_on(
    loaded: LoadedComponent, backend: str, precision: str | None, device: str | None, threads: int = 0
) -> Runner:
    """A runner of a component on a backend; `device` is what the backend runs on, where there is one alone, else the
    CPU. Raises as `LoadedComponent.runner` says."""
    from optimize.compile.backends import Subject, backend_from_name, runner_of
    from optimize.loading import component_of

    found = backend_from_name(backend)
    device = device or ("cpu" if "cpu" in found.devices else "cuda")
    artifact = artifact_for(loaded, found.takes, precision)
    if found.takes != "module":
        return runner_of_artifact(loaded.bundle, artifact, backend, device, threads)
    component = component_of(loaded.bundle, loaded.record.name, loaded.trust_remote_code)
    made_of = str(artifact.spec.get("base", artifact.id))  # a quantized one is eager in its base's precision
    return runner_of(backend, Subject(component, made_of.split("/")[1], None, device, threads))


def artifact_for(loaded: LoadedComponent, takes: str, precision: str | None) -> Artifact:
    """The artifact of a precision that a backend takes; for the module itself the one that names the precision."""
    from optimize.packaging import package_in

    only_packages = loaded.artifacts("aoti") and not loaded.artifacts("onnx")
    if takes == "aoti" or (takes == "module" and only_packages):
        return package_in(loaded.bundle, loaded.record.name, precision)
    return engine_in(loaded, precision) if takes == "engine" else loaded.onnx(precision)


def engine_in(loaded: LoadedComponent, precision: str | None) -> Artifact:
    """The engine for this machine's GPU."""
    from optimize.compile.tensorrt import current_gpu
    from optimize.loading import in_precision

    device, sm = current_gpu()
    here = {str(a.spec["precision"]): a for a in loaded.artifacts("engine") if a.spec["sm"] == sm}
    build = f"optimize build {loaded.bundle.root} --target current"
    return in_precision(here, precision, f"{loaded.record.name} has no engine for {device} (SM{sm})", build)


def runner_of_artifact(bundle: Bundle, artifact: Artifact, backend: str, device: str, threads: int = 0) -> Runner:
    """A file of the bundle on a backend; its digest, and those of what it reads, are checked first."""
    from optimize.compile.backends import Subject, runner_of
    from optimize.loading import axes_of_artifact, recorded_component
    from optimize.receipts import simulation

    precision = str(artifact.spec["precision"])
    if precision == "bf16" and backend == "onnxruntime":
        raise MissingError(
            "ONNX Runtime's CPU provider has no bf16 kernels", mend="use fp32 or fp16, or an engine on a GPU"
        )
    for parent in artifact.parents:
        bundle.check(bundle.manifest.artifacts[parent])
    bundle.check(artifact)
    subject = Subject(
        recorded_component(bundle, artifact.component).with_axes(axes_of_artifact(artifact)),
        precision,
        bundle.path(artifact),
        str(artifact.spec.get("device", device)),
        threads,
        str(artifact.spec.get("flavour", "tensorrt")),
        simulation(precision, str(artifact.spec.get("runtime", ""))),
    )
    return runner_of(backend, subject)


# --- plans -----------------------------------------------------------------------------------------------------------


def check_plan(loaded: LoadedBundle, plan: Plan) -> None:
    """Raises InputError for the plan of another bundle, GateError where an artifact is another one by now, MissingError
    where this machine is not of the kind that the plan was measured on, or lacks a backend.

    On another machine of the same kind the plan runs, with a warning: its figures are not of there.
    """
    from optimize.compile.backends import backend_from_name, device_from_word

    bundle = loaded.bundle
    if plan.source != bundle.manifest.source:
        raise InputError(
            "the plan is of another bundle", got=plan.source, expected=bundle.manifest.source, mend="profile this one"
        )
    if not plan.met:
        raise GateError(
            "the plan does not meet the wishes that it was made for",
            got=", ".join(plan.wishes),
            expected="a plan that does",
            mend="profile again with wishes that can be met: the record says what comes nearest",
        )
    device_from_word(plan.device)
    for name, part in plan.parts.items():
        bundle.component(name)
        if why := backend_from_name(part.backend).why_not(plan.device):
            raise MissingError(
                f"the plan runs {name} on {part.backend}, which is not here",
                got=why,
                expected="what it was measured with",
                mend="install it, or profile on this machine: nothing stands in for it unasked",
            )
        planned_artifact(bundle, name, part, plan)
    warn_of_machine(plan)


def planned_artifact(bundle: Bundle, name: str, part: Part, plan: Plan) -> Artifact | None:
    """The very file that was measured; None where the part runs the source's own module. A package that was made for
    the profile alone is the bundle's own package."""
    from optimize.compile.backends import backend_from_name

    if part.artifact is None:
        return None if backend_from_name(part.backend).takes == "module" else package_for(bundle, name, part, plan)
    artifact = bundle.manifest.artifacts.get(part.artifact)
    if artifact is None or artifact.component != name or artifact.sha256 != part.sha256:
        raise GateError(
            f"the plan's artifact of {name} is not in the bundle any more",
            got=f"{part.artifact}: " + (f"sha256 {artifact.sha256}" if artifact else "none"),
            expected=f"sha256 {part.sha256}",
            mend="profile again: the figures that the plan stands on are of another file",
        )
    if part.precision.partition("+")[0] != artifact.spec["precision"]:
        raise InputError(
            f"the plan contradicts itself about {name}",
            got=f"{part.precision}, and {artifact.id} in {artifact.spec['precision']}",
            expected="one precision",
            mend="write it anew: optimize profile DIR --plan FILE",
        )
    if artifact.kind == "engine":
        check_engine(artifact)
    return artifact


def package_for(bundle: Bundle, name: str, part: Part, plan: Plan) -> Artifact:
    for artifact in bundle.artifacts(name, "aoti"):
        if artifact.spec["precision"] == part.precision and artifact.spec["device"] == plan.device:
            return artifact
    raise MissingError(
        f"the plan runs {name} as an AOTInductor package, which was made for the profile alone",
        got=", ".join(a.id for a in bundle.artifacts(name)) or "no artifact",
        expected=f"a package in {part.precision} for {plan.device}",
        mend=f"optimize export {bundle.manifest.source} --out {bundle.root} --component {name} "
        f"--precision {part.precision} --format aoti",
    )


def check_engine(artifact: Artifact) -> None:
    from optimize.compile.tensorrt import current_gpu

    gpu, sm = current_gpu()
    if artifact.spec["sm"] != sm:
        raise MissingError(
            f"the plan's engine {artifact.id} is for another GPU",
            got=f"{gpu} (SM{sm})",
            expected=f"SM{artifact.spec['sm']}",
            mend="optimize build DIR --target current, then profile here",
        )


def warn_of_machine(plan: Plan) -> None:
    import warnings

    from optimize.profiles.machine import gpu_here, processor

    here = gpu_here().name if plan.device == "cuda" else processor()
    if not plan.machine.startswith(here):
        warnings.warn(f"the plan's figures are of {plan.machine}, and this is {here}: profile here too", stacklevel=4)


def planned_runner(loaded: LoadedComponent, part: Part, plan: Plan) -> Runner:
    """What the plan chose for this component."""
    from optimize.compile.backends import Subject, runner_of
    from optimize.loading import component_of

    name, bundle = loaded.record.name, loaded.bundle
    artifact = planned_artifact(bundle, name, part, plan)
    if artifact is not None:
        return runner_of_artifact(bundle, artifact, part.backend, plan.device, plan.threads)
    component = component_of(bundle, name, loaded.trust_remote_code)
    return runner_of(part.backend, Subject(component, part.precision, None, plan.device, plan.threads))
