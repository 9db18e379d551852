"""What each layer's quantization alone costs at the component's output, and the largest set that a budget allows.

One session of the fp32 graph serves all layers: each layer's output has an error added to it, zero unless it is fed.
The error of quantizing a layer is computed apart, from its real input, and fed; what arrives at the output is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from .place import Placement, bias_of, outliers_part, quantized_part, quantizes_output, scales_of
from .running import GraphSession
from .scales import dequantize, quantize, spread
from .sets import write_whole
from .sites import Site, turned


@dataclass(frozen=True)
class Effect:
    """`error`: the relative L2 error at the component's outputs (the worst one, over all samples) when this site alone
    is quantized. `gain`: its products per sample, in millions."""

    site: str
    error: float
    gain: float

    @property
    def rank(self) -> float:
        """What is left high first: squared errors of layers add up, so this is harm per work saved."""
        return self.error**2 / max(self.gain, 1e-9)


def effects(
    model: ir.Model,
    folder: Path,
    p: Placement,
    feeds: Sequence[Mapping[str, torch.Tensor]],
    *,
    graph: str = "",
    cache: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Effect]:
    """The effect of each weighted site of the placement, the worst first. `model` is changed; `cache` is a file that
    is gone on from and written, where it is of `graph`, which names the model and its weights."""
    measured = [s for s in p.chosen() if s.weight]
    key = digest_of(graph, p, measured, feeds)
    known = read_cache(cache, key)
    missing = [s for s in measured if s.name not in known]
    if missing:
        weights = {s.weight: model.graph.initializers[s.weight].const_value for s in missing}
        nodes = {str(n.name): n for n in model.graph}
        makers = {s.name: error_maker(nodes[s.name], s, p) for s in missing}
        inject(model, missing)
        session = GraphSession(model, folder, [s.activation for s in missing])
        outputs = [str(o.name) for o in model.graph.outputs]
        totals = {s.name: np.zeros((len(outputs), 2)) for s in missing}
        gains: dict[str, float] = {}
        for n, feed in enumerate(feeds):
            inputs = session.run(feed, list(dict.fromkeys(s.activation for s in missing)))
            exact = session.run(feed, outputs)
            for i, s in enumerate(missing):
                say(f"sensitivity: layer {i + 1} of {len(missing)}, sample {n + 1} of {len(feeds)}")
                tensor = weights[s.weight]
                assert tensor is not None
                error, gains[s.name] = makers[s.name](inputs[s.activation], np.array(tensor.numpy(), np.float32))
                got = session.run(feed, outputs, {f"{s.output}>error": error.numpy()})
                for k, name in enumerate(outputs):
                    if exact[name].is_floating_point():
                        totals[s.name][k] += [
                            float(((got[name] - exact[name]).double() ** 2).sum()),
                            float((exact[name].double() ** 2).sum()),
                        ]
        for s in missing:
            ratio = totals[s.name][:, 0] / np.maximum(totals[s.name][:, 1], 1e-30)
            worst = float(np.sqrt(ratio.max())) if np.isfinite(ratio).all() else math.inf
            known[s.name] = Effect(s.name, worst, gains[s.name])
        write_cache(cache, key, known)
    return sorted((known[s.name] for s in measured), key=lambda e: -e.rank)


def inject(model: ir.Model, sites: Sequence[Site]) -> None:
    """Adds `NAME>error` to each site's output: an input of the graph with zero as its default."""
    nodes = {str(n.name): n for n in model.graph}
    for s in sites:
        node = nodes[s.name]
        out = node.outputs[0]
        name = f"{s.output}>error"
        kind = out.dtype or ir.DataType.FLOAT
        error = ir.Value(
            name=name, type=ir.TensorType(kind), const_value=ir.tensor(np.zeros((), kind.numpy()), name=name)
        )
        model.graph.register_initializer(error)
        model.graph.inputs.append(error)
        add = ir.node("Add", [out, error], name=f"{s.name}>error")
        both = add.outputs[0]
        both.type, both.shape = out.type, out.shape
        both.name = f"{s.output}>with error"
        final = out.is_graph_output()
        out.replace_all_uses_with(both, replace_graph_outputs=True)
        add.replace_input_with(0, out)
        model.graph.insert_after(node, add)
        if final:
            out.name, both.name = f"{s.output}>raw", s.output


def error_maker(node: ir.Node, s: Site, p: Placement) -> Callable[[Any, Any], tuple[torch.Tensor, float]]:
    """(input, weight) -> (the error that quantizing them makes at the node's output, millions of products)."""
    fmt, block, axis = p.format, p.block(s), p.axis(s)
    attributes = {k: v.value for k, v in node.attributes.items()}
    bias = torch.from_numpy(bias_of(node).reshape(-1, 1, 1)) if quantizes_output(p, s) else torch.zeros(())

    def few(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, zero = p.grid(name)
        return torch.from_numpy(dequantize(quantize(x.numpy(), scale, p.activations, zero), scale, zero))

    def make(x: torch.Tensor, weight: Any) -> tuple[torch.Tensor, float]:
        w = np.ascontiguousarray(turned(s, weight)) if s.kind == "linear" else weight
        whole = quantized_part(p, s, weight)
        scale = spread(scales_of(p, s, node, whole), whole.shape, axis, block)
        rounded = dequantize(quantize(whole, scale, fmt), scale)
        x, rest = x.float(), torch.zeros(())
        seen = x
        if s.kind == "linear":
            divisor, outliers = p.divisor(s), torch.from_numpy(p.outliers_of(s))
            seen = x / torch.from_numpy(divisor) if divisor is not None else x
            rest = seen[..., outliers] @ torch.from_numpy(outliers_part(p, s, weight))
            seen = seen.index_fill(-1, outliers, 0.0)
        if p.scheme.activations == "static":
            seen = few(seen, s.activation)
        elif p.scheme.activations == "dynamic":
            seen = dynamic(seen)
        exact, got = (product(s.kind, a, torch.from_numpy(b), attributes) for a, b in ((x, w), (seen, rounded)))
        if quantizes_output(p, s):
            got = few(got + bias, s.output) - bias
        return got + rest - exact, exact.numel() * float(np.prod(w.shape) / w.shape[axis]) / 1e6

    return make


def product(kind: str, x: torch.Tensor, w: torch.Tensor, attributes: Mapping[str, Any]) -> torch.Tensor:
    """Conv or MatMul as ONNX defines them, without a bias."""
    if kind == "linear":
        return x @ w
    top, left, bottom, right = attributes.get("pads") or (0, 0, 0, 0)
    x = torch.nn.functional.pad(x, (left, right, top, bottom))
    stride, dilation = attributes.get("strides") or (1, 1), attributes.get("dilations") or (1, 1)
    return torch.nn.functional.conv2d(x, w, None, tuple(stride), 0, tuple(dilation), attributes.get("group", 1))


def dynamic(x: torch.Tensor) -> torch.Tensor:
    """What DynamicQuantizeLinear makes of a tensor: uint8, its range widened to hold zero."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = min(max(round(-low / scale), 0), 255)
    return ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale


# --- the largest set within a budget ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """`high` are the sites that go back to the base precision; `value` is the whole's figure; `checks` how often the
    whole was measured. `met` is False where even with every layer high it is missed."""

    high: tuple[str, ...]
    value: float
    met: bool
    checks: int


def largest_set(
    ranked: Sequence[Effect], whole: Callable[[Sequence[str]], float], met: Callable[[float], bool], start: float
) -> Found:
    """Leaves the worst sites high, as few as meet the budget.

    Greedy: sites go back in the order of their harm per work saved. How many is found by bisection, and each trial is
    measured as a whole (`whole(names left high)`); `start` is the figure with none left high.
    """
    if met(start):
        return Found((), start, True, 1)
    names = [e.site for e in ranked]
    low, high, checks, value = 0, len(names), 2, whole(names)
    if not met(value):
        return Found(tuple(names), value, False, checks)
    while high - low > 1:  # the first `low` are too few, the first `high` are enough
        middle = (low + high) // 2
        figure = whole(names[:middle])
        checks += 1
        if met(figure):
            high, value = middle, figure
        else:
            low = middle
    return Found(tuple(names[:high]), value, True, checks)


# --- the cache --------------------------------------------------------------------------------------------------------


def digest_of(graph: str, p: Placement, sites: Sequence[Site], feeds: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Names all that the figures depend on: graph, scheme, runtime, scales, smoothing, feeds."""
    hasher = hashlib.sha256(json.dumps([graph, p.scheme.name, p.scheme.block, p.runtime, p.method]).encode())
    for name, smoothing in sorted(p.smoothing.items()):
        hasher.update(name.encode() + smoothing.divisor.tobytes())
    for name, outliers in sorted(p.outliers.items()):
        hasher.update(name.encode() + outliers.tobytes())
    for name in p.taps():
        hasher.update(f"{name}={p.grid(name)}".encode())
    for s in sites:
        hasher.update(s.name.encode())
    for feed in feeds:
        for name in sorted(feed):
            hasher.update(name.encode() + feed[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def write_cache(path: Path | None, key: str, known: Mapping[str, Effect]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key, "effects": [asdict(e) for e in known.values()]}, indent=1)
    write_whole(path, lambda partial: partial.write_text(text))


def read_cache(path: Path | None, key: str) -> dict[str, Effect]:
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        return {e["site"]: Effect(**e) for e in content["effects"]} if content["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
