"""ONNX Runtime's session profile, mapped back to torch modules.

Its events name the nodes of the optimized graph, in the order in which they ran, which is the order of the file that it
writes of that graph: so each event finds its node. Most nodes keep our names (`module/Operator`), fused ones that of
one of their parts. A node without a name belongs to the call of a function that it is inlined from (all of whose values
have one prefix), to the module whose weights it reads, or to the node before it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.compile.runners import OnnxRuntimeRunner

from .counts import COUNTS, PRODUCTS
from .operators import WARM, Piece, Profiled, Run, median_ms, wait_for
from .work import module_of

if TYPE_CHECKING:
    import onnx

    from optimize.compile.runners import Feeds

KINDS: Mapping[str, str] = {
    **{op: kind for op, (kind, _) in COUNTS.items()},
    **dict.fromkeys(("FusedConv", "NhwcFusedConv", "NhwcQLinearConv", "QLinearConvTranspose"), "convolution"),
    **dict.fromkeys(("FusedMatMul", "FusedGemm", "QGemm", "MatMulNBits", "GemmFloat8"), "matmul"),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QOrderedMatMul"), "matmul"),
    **dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention"), "attention"),
    **dict.fromkeys(("AttentionBias", "PackedAttentionBias"), "attention"),
    **dict.fromkeys(("SkipLayerNormalization", "SimplifiedLayerNormalization", "GroupNorm", "GroupNormSiLU"), "norm"),
    **dict.fromkeys(("SkipSimplifiedLayerNormalization", "EmbedLayerNormalization", "SkipGroupNorm"), "norm"),
    **dict.fromkeys(("BiasGelu", "FastGelu", "QuickGelu", "GeGLU", "SwiGLU", "QLinearAdd"), "elementwise"),
    **dict.fromkeys(("QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "BiasSplitGelu"), "elementwise"),
    **dict.fromkeys(("ReorderInput", "ReorderOutput", "Reshape", "Squeeze", "Unsqueeze", "QLinearConcat"), "layout"),
    **dict.fromkeys(("Shape", "Size", "Identity", "Flatten", "MemcpyToHost", "MemcpyFromHost"), "layout"),
    "QLinearSoftmax": "softmax",
}
"""Operator of an optimized graph -> kind of work, in the words of `counts`."""
NORMS = re.compile(r"(Layer|RMS|Group|Instance)?Norm")
CALL = re.compile(r"_inlfunc_([A-Za-z0-9]+?)(_token_\d+)?_")
"""ONNX Runtime's prefix of all values of an inlined function call."""


class TracedRunner(OnnxRuntimeRunner):
    """The same session as another runner's, which also writes its profile and the graph that it made."""

    def __init__(self, other: OnnxRuntimeRunner, folder: Path) -> None:
        super().__init__(
            other.path,
            other.provider,
            threads=other.threads,
            optimize=other.optimize,
            native=other.native,
            entries=other.entries,
            trace=folder / "profile",
        )
        self.optimized = folder / "optimized.onnx"

    def options(self, ort: Any) -> Any:
        options = super().options(ort)
        options.optimized_model_filepath = str(self.optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.log_severity_level = 4  # it warns that such a graph is for this machine alone, which it is
        return options

    def end(self) -> Path:
        return Path(self._session.end_profiling())


def profile_session(runner: OnnxRuntimeRunner, feeds: Feeds, runs: int, trace: Path | None) -> Profiled:
    """Runs it with and without its profiler, one session after the other."""
    with runner:
        unprofiled = median_ms(runner.bind(feeds), runs, wait_for(runner.device))
    with tempfile.TemporaryDirectory() as folder:
        with TracedRunner(runner, Path(folder)) as traced:
            run = traced.bind(feeds)
            for _ in range(WARM + runs):
                run()
            written = traced.end()
        import onnx

        graph = onnx.load(traced.optimized, load_external_data=False).graph
        nodes = list(graph.node)
        where = modules_of(nodes, {t.name for t in graph.initializer}, modules_in(runner.path))
        events = json.loads(written.read_text())
        if trace is not None:
            shutil.copy(written, trace)
    told = "ONNX Runtime's session profile"
    if runner.device != "cpu":
        told += " (host times: a GPU's kernels run after their nodes)"
    return Profiled(list(runs_from_events(events, nodes, where))[WARM:], told, unprofiled, trace)


def modules_in(path: Path) -> dict[str, str]:
    """Value -> the torch module that makes it, for all that the nodes of a file make."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    return {o: module for n in nodes if (module := module_of(n.name)) for o in n.output}


def runs_from_events(
    events: Sequence[Mapping[str, Any]], nodes: Sequence[onnx.NodeProto], where: Sequence[tuple[str, str]]
) -> Iterator[Run]:
    """Each `model_run` with the kernels before it. Times in the file are microseconds."""
    pieces: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            pieces.append(event)
        elif event["name"] == "model_run":
            yield Run(event["dur"] / 1e3, list(pieces_of(pieces, nodes, where)))
            pieces = []


def pieces_of(
    events: Sequence[Mapping[str, Any]], nodes: Sequence[onnx.NodeProto], where: Sequence[tuple[str, str]]
) -> Iterator[Piece]:
    """Events find their nodes by order where both lists are the same, else by name."""
    ran = [e["args"]["op_name"] for e in events]
    places = {n.name: place for n, place in zip(nodes, where, strict=True) if n.name}
    in_order = where if ran == [n.op_type for n in nodes] else [None] * len(events)
    for event, place in zip(events, in_order, strict=True):
        name, op = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
        module, kind = place or places.get(name) or (module_of(name), kind_of(op))
        yield Piece(module, kind, op, event["dur"] / 1e3, event["args"].get("provider", ""))


def kind_of(op: str) -> str:
    return KINDS.get(op) or ("norm" if NORMS.search(op) else "other")


def modules_of(nodes: Sequence[onnx.NodeProto], weights: set[str], makers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Module and kind of work of each node of an optimized graph; "" for what only computes sizes.

    `makers` tells which module makes a value in the graph before (`modules_in`)."""
    modules = set(makers.values())
    own = [own_module(n, weights, makers, modules) for n in nodes]
    calls: dict[str, Counter[str]] = defaultdict(Counter)
    for node, module in zip(nodes, own, strict=True):
        for prefix, _ in calls_in(node):
            told = [module] if module else [module_of(v) for v in (*node.output, *node.input)]
            calls[prefix].update(m for m in told if m in modules)
    reader = {i: module for n, module in zip(nodes, own, strict=True) if module for i in n.input}
    made: dict[str, str] = {}
    places = []
    for node, module in zip(nodes, own, strict=True):
        kind, call = kind_of(node.op_type), next(calls_in(node), None)
        if call is not None:  # the call's module, and what the function does
            place = next((m for m, _ in calls[call[0]].most_common(1)), module or "")
            kind = kind_of(call[1]) if kind_of(call[1]) != "other" else kind
        else:
            place = module if module is not None else neighbour(node, kind, made, reader)
        made |= dict.fromkeys(node.output, place)
        places.append((place, kind))
    return places


def neighbour(node: onnx.NodeProto, kind: str, made: Mapping[str, str], reader: Mapping[str, str]) -> str:
    """Where a node says nothing: the module before it, for a change of layout goes with the data; for a product, which
    lost its name to such a change behind it, the one after."""
    before = [made[i] for i in node.input if made.get(i)]
    after = [reader[o] for o in node.output if o in reader]
    return next(iter(after + before if kind in PRODUCTS else before + after), "")


def calls_in(node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """(prefix, function) of the inlined calls whose inner values a node makes, else reads."""
    for values in (node.output, node.input):
        found = [m for v in values if (m := CALL.match(v))]
        if found:
            yield from ((m[0], m[1]) for m in found)
            return


def own_module(node: onnx.NodeProto, weights: set[str], makers: Mapping[str, str], modules: set[str]) -> str | None:
    """What a node says itself: by its name, its outputs, its weights. "" is a node of sizes, None is silence."""
    if node.name.startswith("sizes/"):
        return ""
    found = next((m for name in (node.name, *node.output) if (m := module_of(name)) in modules), None)
    found = found or next((makers[o] for o in node.output if o in makers), None)
    return found or next((m for i in node.input if i in weights and (m := owner(i, modules))), None)


def owner(weight: str, modules: set[str]) -> str:
    """The module that a weight's name begins with: `norm2.weight.channels` is of `norm2`."""
    while weight and weight not in modules:
        weight = weight.rpartition(".")[0]
    return weight
