"""`optimize inspect`: what is in a bundle, or in any ONNX file: sizes, precisions, axes, operators, fusions.

Reads graphs alone: no weight's data is touched, so graphs whose weights are missing are read too. `--json` prints
`dataclasses.asdict` of the `Inspection`: its keys are the fields below, and stay.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact, ComponentRecord
    from optimize.tools.fusions import Site
    from optimize.tools.graphs import Graph


@dataclass(frozen=True)
class ComponentInfo:
    """A component of a bundle; `axes` as `min:opt:max`, with `:step` where it is not one."""

    name: str
    role: str
    class_name: str
    axes: Mapping[str, str]


@dataclass(frozen=True)
class ArtifactInfo:
    """A graph (`kind` "onnx"), an engine or an AOTInductor package ("aoti") of a bundle. `bytes` with its weights;
    `nodes` and `parameters` are those of graphs, `parity` (the worst output's relative error; `proof` says how it was
    measured) of graphs and packages, `target` of engines and packages, `downgrades` of engines."""

    id: str
    component: str
    kind: str
    precision: str
    bytes: int
    nodes: int | None
    parameters: int | None
    parity: float | None
    proof: str
    target: str
    downgrades: Sequence[str]
    fp32: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Inspection:
    """What was found at `path`. For a bundle `source` is what it was made of, and `components` and `artifacts` are what
    it holds; for a file they are empty. `graphs`: the chosen graphs, one for a file."""

    path: str
    source: str | None
    components: Sequence[ComponentInfo]
    artifacts: Sequence[ArtifactInfo]
    graphs: Sequence[Graph]


def inspect(path: Path | str, *, component: str | None = None, precision: str | None = None) -> Inspection:
    """Looks into a bundle, or into an ONNX file of any exporter.

    Args:
        path: a bundle's folder, or a file.
        component: only this component of a bundle, and of its graphs the one in `precision` (or the only one, or fp32).
        precision: without a component, the graphs and engines of this precision.

    Raises:
        InputError: nothing there, no bundle, no ONNX, or no such component or precision.
    """
    path = Path(path)
    if not path.is_dir():
        from optimize.tools.graphs import graph_from_file

        check_file(path, component, precision)
        return Inspection(str(path), None, (), (), (graph_from_file(path, path.name),))
    from optimize.compile.bundle import Bundle

    bundle = Bundle.read(path)
    return inspection_of(bundle, chosen_graphs(bundle, component, precision), component, precision)


def check_file(path: Path, component: str | None, precision: str | None) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist", expected="a bundle, or an ONNX file")
    if component or precision:
        raise InputError(
            "--component and --precision choose in a bundle", got=f"the file {path}", expected="a bundle's folder"
        )


def chosen_graphs(bundle: Bundle, component: str | None, precision: str | None) -> list[Artifact]:
    """The ONNX artifacts asked for: one of the component, or all of the precision."""
    from optimize.loading import LoadedBundle

    if component:
        return [LoadedBundle(bundle)[component].onnx(precision)]
    graphs = bundle.artifacts(kind="onnx")
    found = [a for a in graphs if precision in (None, a.spec["precision"])]
    if graphs and not found:
        known = ", ".join(sorted({str(a.spec["precision"]) for a in graphs}))
        raise InputError(f"the bundle has nothing in {precision}", expected=f"one of {known}")
    return found


def inspection_of(
    bundle: Bundle, graphs: Sequence[Artifact], component: str | None, precision: str | None
) -> Inspection:
    from optimize.tools.graphs import graph_from_file

    read = {a.id: graph_from_file(bundle.path(a), a.id, a.spec) for a in graphs}
    records = [r for r in bundle.manifest.components.values() if component in (None, r.name)]
    shown = [
        a
        for a in bundle.artifacts(component)
        if a.id in read or (a.kind in ("engine", "aoti") and precision in (None, a.spec["precision"]))
    ]
    return Inspection(
        str(bundle.root),
        bundle.manifest.source,
        tuple(map(component_info, records)),
        tuple(artifact_info(bundle, a, read.get(a.id)) for a in shown),
        tuple(read.values()),
    )


def component_info(record: ComponentRecord) -> ComponentInfo:
    axes = {n: f"{a.min}:{a.opt}:{a.max}" + (f":{a.step}" if a.step != 1 else "") for n, a in record.axes.items()}
    return ComponentInfo(record.name, record.role, record.class_name, axes)


def artifact_info(bundle: Bundle, artifact: Artifact, graph: Graph | None) -> ArtifactInfo:
    """`graph` is None for an engine and for a package."""
    weights = sum(bundle.manifest.artifacts[p].bytes for p in artifact.parents) if graph else 0
    return ArtifactInfo(
        id=artifact.id,
        component=artifact.component,
        kind=artifact.kind,
        precision=str(artifact.spec["precision"]),
        bytes=artifact.bytes + weights,
        nodes=graph.nodes if graph else None,
        parameters=graph.parameters if graph else None,
        parity=artifact.parity.worst if artifact.parity else None,
        proof=artifact.parity.how if artifact.parity else f"of {artifact.parents[0]}",
        target="" if graph else target_of(artifact),
        downgrades=tuple(artifact.downgrades),
        fp32=tuple(artifact.spec.get("fp32", ())),
    )


def target_of(artifact: Artifact) -> str:
    """What an engine or a package was made for."""
    if artifact.kind == "aoti":
        return (
            f"SM{artifact.spec['sm']}" if artifact.spec["sm"] else f"{artifact.spec['machine']} {artifact.spec['isa']}"
        )
    return f"{artifact.spec['target']} (SM{artifact.spec['sm']})"


# --- the command -----------------------------------------------------------------------------------------------------


def run(
    path: Path,
    *,
    component: str | None,
    precision: str | None,
    fusions: bool,
    serve: bool,
    port: int,
    as_json: bool,
    block: Path | None = None,
) -> int:
    """What `optimize inspect` does with its words; gives the exit code."""
    if serve or block:
        from optimize.tools import netron

        view = view_at(path, component, precision)
        if block:
            made = netron.block_of(view, block)
            print(f"{made.file}: {made.path}, {made.nodes} nodes, one of {made.alike} alike")
            view = made.file
        if serve:
            netron.serve(view, port)
        return 0
    found = inspect(path, component=component, precision=precision)
    for graph in found.graphs:
        for warning in graph.warnings:
            print(f"optimize: {graph.name}: {warning}", file=sys.stderr)
    if as_json:
        json.dump(dataclasses.asdict(found), sys.stdout, indent=1)
        print()
    elif fusions:
        show_fusions(found.graphs)
    elif component or not found.artifacts:
        for graph in found.graphs:
            show_graph(graph)
            show_kept(next((a.fp32 for a in found.artifacts if a.id == graph.name), ()))
    else:
        show_bundle(found)
    return 0


def view_at(path: Path, component: str | None, precision: str | None) -> Path:
    """The one file to draw: of a bundle the weight-stripped view of a graph, else the file itself."""
    if not path.is_dir():
        check_file(path, component, precision)
        return path
    from optimize.compile.bundle import Bundle

    bundle = Bundle.read(path)
    graphs = chosen_graphs(bundle, component, precision)
    if len({a.component for a in graphs}) > 1 or not graphs:
        raise InputError("which graph?", expected="--component with one of " + ", ".join(bundle.manifest.components))
    views = [a for a in bundle.artifacts(graphs[0].component, "view") if graphs[0].id in a.parents]
    file = bundle.path(views[0] if views else graphs[0])
    if not file.is_file():
        raise InputError(f"{file} is missing", mend="run the same `optimize export` again: it makes what is missing")
    return file


def show_bundle(found: Inspection) -> None:
    from optimize.tools.tables import show

    print(f"{found.path}: {found.source}\n")
    show(
        [
            {
                "component": c.name,
                "role": c.role,
                "class": c.class_name,
                "axes": ", ".join(f"{n}={r}" for n, r in c.axes.items()),
            }
            for c in found.components
        ],
        False,
    )
    print()
    show(
        [
            {
                "artifact": a.id,
                "kind": a.kind,
                "precision": a.precision,
                "nodes": a.nodes,
                "parameters": a.parameters,
                "MB": round(a.bytes / 1e6, 2),
                "parity": a.proof if a.parity is None else f"{a.parity:.1e} ({a.proof})",
                "target": a.target,
                "downgrades": "; ".join(a.downgrades),
            }
            for a in found.artifacts
        ],
        False,
    )


def show_graph(graph: Graph) -> None:
    from optimize.tools.fusions import totals_of
    from optimize.tools.tables import show

    print(
        f"{graph.name}: opset {graph.opset}, {graph.nodes} nodes, {graph.parameters:,} parameters, "
        f"{graph.weight_bytes / 1e6:.2f} MB of weights; by {graph.producer or 'an unknown exporter'}"
    )
    for name, text in graph.metadata.items():
        print(f"  {name}: {text}")
    for what, table in tables_of(graph):
        if table:
            print(f"\n{what}")
            show(table, False)
    print("\nattention, norms, activations (--fusions lists each)")
    show(totals_of(graph.sites), False)


def show_kept(kept: Sequence[Mapping[str, Any]]) -> None:
    """The nodes of a 16-bit graph that stay in fp32, with the reason of each."""
    from optimize.tools.tables import show

    if kept:
        print("\nin fp32")
        show([{"node": k["node"], "why": k["why"]} for k in kept], False)


def tables_of(graph: Graph) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    def shares(of: Mapping[str, float]) -> str:
        return ", ".join(f"{share:.1%} {dtype}" if share >= 0.0005 else f"<0.1% {dtype}" for dtype, share in of.items())

    yield "precision", [{"of": what, "share": shares(of)} for what, of in graph.precision.items()]
    yield (
        "inputs and outputs",
        [
            {"side": side, "name": t.name, "type": t.dtype, "dims": dims_text(t.dims)}
            for side, tensors in (("in", graph.inputs), ("out", graph.outputs))
            for t in tensors
        ],
    )
    yield "axes that may vary", [{"axis": a.name, "min:opt:max": a.range, "in": ", ".join(a.where)} for a in graph.axes]
    yield "operators", [{"operator": name, "nodes": count} for name, count in graph.operators.items()]
    yield (
        "largest weights",
        [
            {"weight": w.name, "type": w.dtype, "dims": dims_text(w.dims), "kB": round(w.bytes / 1e3)}
            for w in graph.largest
        ],
    )


def dims_text(dims: Sequence[int | str]) -> str:
    return " x ".join(map(str, dims)) or "scalar"


def show_fusions(graphs: Sequence[Graph]) -> None:
    from optimize.tools.fusions import totals_of
    from optimize.tools.tables import show

    for graph in graphs:
        print(f"{graph.name}: opset {graph.opset}")
        show([row_of(site) for site in graph.sites], False)
        print("\ntotals")
        show(totals_of(graph.sites), False)
        print()


def row_of(site: Site) -> dict[str, Any]:
    return {
        "module": site.path or site.node,
        "kind": site.kind,
        "standard": site.standard,
        "as": site.into,
        "why": site.reason,
    }
