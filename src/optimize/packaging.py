"""AOTInductor packages in a bundle: planned, made, proved, loaded and verified as ONNX artifacts are."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimize.errors import GateError, InputError, MissingError
from optimize.exporting import Request, Step, key_of_source, step_for, versions
from optimize.making import memory_errors, need_disk
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact, Parity
    from optimize.compile.spec import Component
    from optimize.gate import Plan
    from optimize.loading import Verification

FORMAT = "aoti"
MEMORY, DISK = 3.5, 2
"""What compiling takes, in times the weights: measured with 200 MB of them; on disk the code stands twice."""
MOST_DRAWS = 512
"""Inductor rounds less often than eager does, so that their errors have nothing in common, and the ratio of two such
norms over N numbers scatters by 1 / sqrt(N): with 160 numbers 1.15 was seen where 1000 give 0.96."""


def check_precisions(precisions: Sequence[str], formats: Sequence[str]) -> None:
    """Raises InputError for quantized precisions: a package is compiled of the torch module, which has none."""
    from optimize.compile.spec import PRECISIONS

    quantized = [p for p in precisions if p not in PRECISIONS]
    if quantized and FORMAT in formats:
        raise InputError(
            "AOTInductor packages are made of the torch module, which has no quantized form",
            got=f"--format {FORMAT} with --precision {', '.join(quantized)}",
            expected="one of " + ", ".join(PRECISIONS),
            mend=f"export {', '.join(quantized)} as ONNX, in a command of its own",
        )


def check_words(formats: Sequence[str], keep_fp32: Sequence[str], probe_steps: int | None) -> None:
    """Raises InputError for words about parts of a graph in fp32 where a package is made: it has no such parts."""
    if FORMAT in formats and (keep_fp32 or probe_steps is not None):
        raise InputError(
            "an AOTInductor package is in one precision throughout",
            got=f"--format {FORMAT} with " + ("--keep-fp32" if keep_fp32 else "--probe-steps"),
            expected="words that every format asked for can heed",
            mend="leave them out, or export the graph in a command of its own",
        )


def device_of(formats: Sequence[str], device: str | None) -> str:
    """Where packages are to run. Raises InputError for a device that no asked format is made for."""
    from optimize.compile.backends import device_from_word

    if FORMAT in formats:
        return device_from_word(device or "auto")
    if device is not None:
        raise InputError(
            "--device is for AOTInductor packages",
            got=f"--device {device} with " + ", ".join(f"--format {f}" for f in formats),
            expected="--format aoti",
            mend="leave it out: an ONNX graph runs on both, and engines have --target",
        )
    return "cpu"


def step_of_package(bundle: Bundle | None, component: Component, precision: str, request: Request) -> Step:
    """The step for `unet/fp32/aoti`, on a GPU `unet/fp32/aoti-sm90`."""
    from optimize.compile.aoti import built_here

    built = built_here(component, precision, request.device)
    words = [f"aoti-sm{built.sm}" if built.sm else "aoti", *(["kernels"] if component.kernels else [])]
    key = {**key_of_source(component, precision), **built.key()}
    step = step_for(bundle, "/".join([component.name, precision, *words]), component, precision, key, None)
    return replace(step, kind=FORMAT)


def make_package(step: Step, request: Request, bundle: Bundle, progress: Progress) -> None:
    """Export, compile, prove, adopt."""
    from optimize.compile.aoti import package_from_component
    from optimize.compile.digests import digest_of_file
    from optimize.compile.onnx_model import Clock
    from optimize.compile.records import Artifact
    from optimize.gate import plan_for

    component, precision = step.component, step.precision
    stem = step.artifact.replace("/", ".")
    need_disk(bundle.root, component, precision, DISK)
    need_memory(component, precision, request.memory)
    with bundle.workspace(step.artifact) as folder, progress.step(step.artifact):
        clock, how = Clock(progress.say), plan_for(component, request.memory)
        with memory_errors(component.name):
            made = package_from_component(component, precision, folder / f"{stem}.pt2", request.device, clock)
            with clock("parity"):
                parity = parity_of_package(made.path, component, precision, request.device, how, progress.say)
        if not parity.passed:
            raise miss(made.path, component, precision, parity, bundle.root, stem)
        relative = f"{component.name}/{stem}.pt2"
        path = bundle.adopt(made.path, relative)
    artifact = Artifact(
        id=step.artifact,
        component=component.name,
        kind="aoti",
        path=relative,
        bytes=path.stat().st_size,
        sha256=digest_of_file(path),
        spec={**asdict(made.built), **({"fusions": dict(made.fusions)} if made.fusions else {})},
        key=dict(step.key),
        versions=versions(),
        seconds=dict(clock.seconds),
        parity=parity,
        notes=["native code: it runs on processors that have all of its spec's instructions, under the same torch"],
    )
    bundle.record(artifact, component=component)


def need_memory(component: Component, precision: str, memory: int | None) -> None:
    """Raises MissingError before the work where it cannot fit: a package's weights are in memory, all of them."""
    from optimize.gate import available_bytes

    weights = sum(p.numel() for p in component.build().parameters()) * (4 if precision == "fp32" else 2)
    free = available_bytes() if memory is None else memory
    if weights * MEMORY > free:
        raise MissingError(
            f"not enough memory to compile {component.name} {precision}",
            got=f"{free / 1e9:.2f} GB",
            expected=f"{weights * MEMORY / 1e9:.2f} GB, {MEMORY:g} times its weights",
            mend="a machine with more, or --format onnx, which streams them",
        )


# --- proof -----------------------------------------------------------------------------------------------------------


def parity_of_package(
    path: Path, component: Component, precision: str, device: str, plan: Plan, say: Callable[[str], None]
) -> Parity:
    """Runs eager on the CPU, then the package where it belongs; a miss by a hair is drawn more often."""
    from optimize.profiles import parity

    result = parity_by_draws(path, component, precision, device, plan, say, parity.FEW_DRAWS)
    for draws in (parity.MANY_DRAWS, MOST_DRAWS):
        if result.passed or not parity.marginal(result):
            break
        result = parity_by_draws(path, component, precision, device, plan, say, draws)
    return result


def parity_by_draws(
    path: Path,
    component: Component,
    precision: str,
    device: str,
    plan: Plan,
    say: Callable[[str], None],
    draws: int,
) -> Parity:
    from optimize.compile.aoti import AotiRunner
    from optimize.gate import check_references
    from optimize.profiles import parity

    known = parity.references(component, precision, streamed=plan.streamed, say=say, draws=draws)
    check_references(component, known)
    say("AOTInductor")
    with AotiRunner(path, component, device=device) as runner:
        outputs = [{n: t.cpu() for n, t in runner.infer(r.feeds).items()} for r in known]
    return parity.parity_of(outputs, component, precision, known, backend=f"AOTInductor {device}")


def miss(path: Path, component: Component, precision: str, result: Parity, root: Path, stem: str) -> GateError:
    """The error for a missed gate; the package is kept."""
    from optimize.compile.bundle import FAILED
    from optimize.profiles import parity

    shape, output = parity.worst_miss(result, precision)
    kept = root / FAILED / stem
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    shutil.move(str(path), kept / path.name)
    overflows = precision == "fp16" and math.isinf(output.eager or 0.0)
    own = "" if output.eager is None else f"; eager {precision} itself: {output.eager:.3g}"
    return GateError(
        f"parity missed: {component.name} {precision} as a package, output {output.name} at the {shape.name} sizes "
        f"({', '.join(f'{k}={v}' for k, v in shape.sizes.items())})",
        got=f"relative error {output.relative:.3g}, largest difference {output.worst:.3g} of the largest value"
        + ("" if output.finite else ", with values that are not finite")
        + ("; eager fp16 itself overflows" if overflows else own),
        expected=result.rule,
        mend="bf16 (--precision bf16), or --format onnx, which keeps in fp32 what overflows"
        if overflows
        else f"the package is kept in {kept}; --format onnx makes of the same module what can be bisected",
    )


# --- what is there ---------------------------------------------------------------------------------------------------


def package_in(bundle: Bundle, name: str, precision: str | None) -> Artifact:
    """The package of a component in a precision, one for this machine's GPU before one for its CPU."""
    from optimize.compile.aoti import sm_here
    from optimize.compile.backends import device_from_word
    from optimize.loading import in_precision

    found: dict[str, Artifact] = {}
    sm = sm_here() if device_from_word("auto") == "cuda" else 0
    for artifact in sorted(bundle.artifacts(name, "aoti"), key=lambda a: a.spec["sm"] != sm):
        found.setdefault(str(artifact.spec["precision"]), artifact)
    export = f"optimize export {bundle.manifest.source} --out {bundle.root} --format aoti"
    return in_precision(found, precision, f"{name} has no AOTInductor package", export)


def verify_package(
    bundle: Bundle, artifact: Artifact, component: Component, memory: int | None, progress: Progress
) -> Verification:
    """Parity measured anew, where this machine can run the package.

    Raises GateError where the source is another one by now; the caller has checked the digest.
    """
    from optimize.compile.aoti import built_of, check_machine
    from optimize.gate import plan_for
    from optimize.loading import Verification, check_weights
    from optimize.profiles import parity

    check_weights(artifact, component)
    path, precision, device = bundle.path(artifact), str(artifact.spec["precision"]), str(artifact.spec["device"])
    try:
        check_machine(built_of(path), path)
    except MissingError as e:
        return Verification(artifact.id, "skipped", f"digest; not run: needs {e.expected}, here is {e.got}")
    with memory_errors(component.name):
        result = parity_of_package(path, component, precision, device, plan_for(component, memory), progress.say)
    if not result.passed:
        shape, output = parity.worst_miss(result, precision)
        return Verification(
            artifact.id,
            "failed",
            f"parity: {output.name} at the {shape.name} sizes is off by {output.relative:.3g}; rule: {result.rule}",
        )
    return Verification(artifact.id, "passed", f"parity {result.worst:.1e} ({result.how})")
