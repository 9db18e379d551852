"""What an export's plan is made by: graphs and engines, each written, proved and then claimed by the bundle."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError, MissingError
from optimize.exporting import BESIDE, Plan, Request, Step, engine_step, source_of, versions
from optimize.narrowing import narrowed
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact
    from optimize.compile.spec import Component


def run_plan(plan: Plan, bundle: Bundle, progress: Progress) -> Bundle:
    """Makes what the plan says is missing. Every artifact is proved before the manifest claims it."""
    from optimize.packaging import FORMAT, make_package

    for step in plan.steps:
        if step.hit and step.artifact in bundle.manifest.artifacts:  # what was made of something made anew is gone
            continue
        if step.kind == FORMAT:
            make_package(step, plan.request, bundle, progress)
        elif step.target is None:
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
        beside = {"opset", "kernels"}  # constants that were folded lie in the file too, and depend on all the rest
        same = artifact.spec.get("precision") == step.precision and all(
            artifact.key.get(k) == step.key.get(k) for k in (artifact.key.keys() | step.key.keys()) - beside
        )
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


def need_disk(root: Path, component: Component, precision: str, copies: int = 1) -> None:
    """Raises MissingError before the work where the weights cannot fit on the disk, so many times."""
    module = component.build()
    need = sum(p.numel() for p in module.parameters()) * (4 if precision == "fp32" else 2) * copies
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


def build_engines(bundle: Bundle, artifacts: Iterable[Artifact], request: Request, progress: Progress) -> None:
    """Engines of ONNX artifacts for the request's targets; what is there and unchanged is kept."""
    from optimize.loading import axes_of_artifact, recorded_component

    for artifact in artifacts:
        component = recorded_component(bundle, artifact.component).with_axes(axes_of_artifact(artifact))
        precision = str(artifact.spec["precision"])
        for target in request.targets:
            step = engine_step(bundle, artifact.id, component, precision, artifact.key, target, request)
            if not step.hit:
                make_engine(step, request, bundle, progress, artifact)
