"""Q and DQ go into a graph, where the runtime that will run it needs them; weights become numbers of few bits.

ONNX Runtime's CPU kernels: a quantizer of its own for every MatMul, and a convolution's output quantized as well. A
bias must not be added after a MatMul: where sizes are static ONNX Runtime would merge the two into a Gemm, for which
there is no int8 kernel (20 times slower than fp32, or a session that does not load). Its negative is subtracted.
TensorRT: inputs and weights, nothing else; it finds the rest by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from optimize.compile.onnx_model import drop_unused_initializers
from optimize.errors import InputError

from .calibrate import Calibration
from .scales import Array, Grid, grid_of, held, quantize, spread, weight_scale
from .schemes import FORMATS, Format, Scheme
from .sites import Site, initializer, turned
from .smooth import Smoothing


@dataclass(frozen=True)
class Placement:
    """All that decides where Q and DQ go and with which scales."""

    scheme: Scheme
    runtime: str
    method: str
    sites: Sequence[Site]
    calibration: Calibration | None = None
    smoothing: Mapping[str, Smoothing] = field(default_factory=dict)
    outliers: Mapping[str, Array] = field(default_factory=dict)
    """Activation -> which of its channels are not quantized, truth values."""

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme.weights]

    @property
    def activations(self) -> Format:
        """Of static activations. For ONNX Runtime uint8, whose zero is anywhere at no cost: int8 it turns into that on
        x86 anyway, by a pass that in 1.31 breaks graphs (a QuantizeLinear moved over a Transpose)."""
        return FORMATS["uint8"] if self.format.name == "int8" and self.runtime == "onnxruntime" else self.format

    def chosen(self) -> list[Site]:
        return [s for s in self.sites if not s.stays]

    def block(self, s: Site) -> int:
        """How many of a site's weights along the reduction share a scale; 0: all of a channel."""
        return self.scheme.block if s.kind == "linear" else 0

    def axis(self, s: Site) -> int:
        """The weight's axis of output channels. Linear ones are `[in, out]` once a Gemm has become a MatMul."""
        return 1 if s.kind == "linear" else 0

    def outliers_of(self, s: Site) -> Array:
        """The channels of a site's input that are not quantized, ascending."""
        found = self.outliers.get(s.activation) if s.kind == "linear" else None
        return np.flatnonzero(found) if found is not None else np.zeros(0, np.int64)

    def divisor(self, s: Site) -> Array | None:
        """What each channel of a site's input is divided by where it is smoothed."""
        found = self.smoothing.get(s.activation) if s.kind == "linear" else None
        return found.divisor if found is not None else None

    def divisors(self) -> dict[str, Array]:
        """Activation -> what each channel is divided by before it is quantized; infinity where it is not quantized."""
        found = {name: smoothing.divisor for name, smoothing in self.smoothing.items()}
        never, same = np.float32(np.inf), np.float32(1)
        return found | {name: np.where(m, never, found.get(name, same)) for name, m in self.outliers.items()}

    def taps(self) -> list[str]:
        """The values whose ranges this needs."""
        if self.scheme.activations != "static":
            return []
        outputs = [s.output for s in self.chosen() if quantizes_output(self, s)]
        return list(dict.fromkeys([name for s in self.chosen() for name in s.reads] + outputs))

    def grid(self, value: str) -> Grid:
        """Scale and zero point of an activation. Raises InputError where calibration has not seen it."""
        seen = self.calibration.seen.get(value) if self.calibration else None
        if seen is None or not seen.histogram.counts.any():
            raise InputError(f"{value} was not calibrated", mend="calibrate again without the cache")
        return grid_of(seen.histogram, self.method, self.activations)


def quantizes_output(p: Placement, s: Site) -> bool:
    return p.scheme.activations == "static" and p.runtime == "onnxruntime" and s.kind == "conv"


INT32 = 2.0**30
"""What a bias may come to as an int32; half of what there is, so that the sums have room."""


def scales_of(p: Placement, s: Site, node: ir.Node, weight: Array) -> Array:
    """The scales of a site's weight (smoothed, turned as it will lie), as the file's type holds them.

    ONNX Runtime keeps a convolution's bias as an int32 in units of the input's scale times these: in a channel of
    (nearly) no weight they are made large enough for that, else the bias would be lost."""
    scale, value = weight_scale(weight, p.format, p.axis(s), p.block(s)), node.inputs[1]
    if quantizes_output(p, s):
        scale = np.maximum(scale, np.abs(bias_of(node)) / np.float32(p.grid(s.activation).scale * INT32))
    assert value is not None
    return held(scale, base_of(value).numpy())


def bias_of(node: ir.Node) -> Array:
    """The constant bias of a convolution in fp32, one number per channel; zero where there is none."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = value.const_value if value is not None else None
    return np.zeros(1, np.float32) if tensor is None else np.asarray(tensor.numpy(), np.float32)


def quantized_part(p: Placement, s: Site, weight: Array) -> Array:
    """What is quantized of a weight: a linear site's turned to `[in, out]` and smoothed, its outliers' rows zero."""
    if s.kind != "linear":
        return weight
    divisor, outliers = p.divisor(s), p.outliers_of(s)
    whole = turned(s, weight)
    whole = whole * divisor[:, None] if divisor is not None else whole
    if outliers.size:
        whole = whole.copy() if divisor is None else whole
        whole[outliers] = 0
    return whole


def outliers_part(p: Placement, s: Site, weight: Array) -> Array:
    """The rest of a linear site's weight, `[outliers, out]`."""
    divisor, outliers = p.divisor(s), p.outliers_of(s)
    rows = turned(s, weight)[outliers]
    return rows * divisor[outliers, None] if divisor is not None else rows


def smoothed_in(p: Placement) -> dict[str, Smoothing]:
    """The vectors of activations that a quantized site reads; where all stay high there is nothing to smooth."""
    read = {s.activation for s in p.chosen() if s.kind == "linear"}
    return {name: s for name, s in p.smoothing.items() if name in read}


class QuantizedWeight(ir.LazyTensor):
    """A weight of few bits: read, smoothed and rounded when it is written."""

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], Array]) -> None:
        super().__init__(
            lambda: ir.tensor(stored(make(), dtype), dtype=dtype),
            dtype=dtype,
            shape=ir.Shape(list(shape)),
            name=name,
            cache=False,
        )


def stored(numbers: Array, dtype: ir.DataType) -> Array:
    if dtype == ir.DataType.INT4:
        import ml_dtypes

        return numbers.astype(ml_dtypes.int4)
    return numbers


def placed(model: ir.Model, p: Placement) -> ir.Model:
    """The graph with the placement's Q and DQ in it; `model` itself is changed. Weights are made when it is written."""
    builder = Builder(model, p)
    nodes = {str(n.name): n for n in model.graph}
    for smoothing in smoothed_in(p).values():
        builder.fold(smoothing)
    for s in p.sites:
        if not s.stays:
            builder.site(nodes[s.name], s)
        elif builder.smoothed(s) is not None:
            builder.compensate(nodes[s.name], s)
    if p.runtime == "onnxruntime":
        builder.instance_norms()
        builder.sums()
    drop_unused_initializers(model)
    return model


class Builder:
    """One graph being quantized. Values of a site are named after it: `path/MatMul/x.q`, `.../x.dq`, `weight.q`."""

    def __init__(self, model: ir.Model, p: Placement) -> None:
        self.model, self.graph, self.p = model, model.graph, p
        self.shared: dict[str, ir.Value] = {}
        self.smoothing = smoothed_in(p)

    def fold(self, smoothing: Smoothing) -> None:
        for name in smoothing.folded:
            value = self.graph.initializers[name]
            tensor = value.const_value
            assert tensor is not None
            array = tensor.numpy()
            value.const_value = ir.tensor(
                (array.astype(np.float32) / smoothing.divisor).astype(array.dtype), dtype=tensor.dtype, name=name
            )

    def site(self, node: ir.Node, s: Site) -> None:
        if s.kind == "attention":
            for i, name in enumerate(s.reads):
                self.through(node, i, name)
            return
        if node.op_type == "Gemm":
            node = self.as_matmul(node, s)
        x = node.inputs[0]
        assert x is not None
        rest = self.outliers_product(node, s, x) if self.p.outliers_of(s).size else None
        if self.p.scheme.activations == "dynamic":
            self.subtract(with_bias(self.dynamic(node, s, x)), rest)
            return
        if self.p.scheme.activations == "static":
            self.through(node, 0, s.activation)
        turn = node.inputs[1].producer() if node.inputs[1] is not None else None
        node.replace_input_with(1, self.weight(node, s))
        if turn is not None and not any(o.uses() for o in turn.outputs):
            self.graph.remove(turn, safe=True)  # of a tied table
        if quantizes_output(self.p, s):
            self.after(node, s)
        self.subtract(node, rest)
        if self.p.scheme.activations and self.p.runtime == "onnxruntime" and s.kind == "linear":
            self.unmerge_bias(node)

    def outliers_product(self, node: ir.Node, s: Site, x: ir.Value) -> ir.Value:
        """The negative product of the channels that are not quantized, in the base precision."""
        outliers, weight = self.p.outliers_of(s), self.graph.initializers[s.weight].const_value
        assert weight is not None
        kind, name = base_of(x), f"{s.name}/outliers"
        shape = ir.Shape([*x.shape[:-1], outliers.size]) if x.shape is not None else None
        channels = self.constant(f"{name}.channels", outliers)
        few = self.before(node, s, "outliers", "Gather", [x, channels], shape, axis=-1)
        rows = -outliers_part(self.p, s, np.asarray(weight.numpy(), np.float32))
        weights = self.constant(f"{name}.weight", rows.astype(kind.numpy()))
        (product,) = self.make("MatMul", [few, weights], f"{name}.y", [kind], node.outputs[0].shape)
        self.graph.insert_before(node, self.made)
        return product

    def before(
        self, node: ir.Node, s: Site, what: str, op: str, inputs: Sequence[ir.Value], shape: Any, **attrs: Any
    ) -> ir.Value:
        """A node before this one that all sites with the same input share."""
        key = f"{s.activation}|{what}"
        if key not in self.shared:
            (self.shared[key],) = self.make(op, inputs, f"{s.name}/{what}.x", [base_of(inputs[0])], shape, **attrs)
            self.graph.insert_before(node, self.made)
        return self.shared[key]

    def subtract(self, node: ir.Node, product: ir.Value | None) -> None:
        """Takes the negative product of the outliers from the node's output: an addition ONNX Runtime might make a
        Gemm's."""
        if product is None:
            return
        few = node.outputs[0]
        name = str(few.name)
        (whole,) = self.make("Sub", [few, product], f"{product.name}.sum", [base_of(few)], few.shape)
        few.replace_all_uses_with(whole, replace_graph_outputs=True)
        self.made.replace_input_with(0, few)
        few.name, whole.name = f"{name}.few", name
        self.graph.insert_after(node, self.made)

    # --- pieces ---

    def constant(self, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        tensor = ir.tensor(array, dtype=dtype, name=name)
        return self.register(name, tensor)

    def register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def make(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        kinds: Sequence[ir.DataType],
        like: Any,
        **attrs: Any,
    ) -> list[ir.Value]:
        node = ir.node(op, list(inputs), attrs or None, num_outputs=len(kinds), name=name)
        for i, (value, kind) in enumerate(zip(node.outputs, kinds, strict=True)):
            value.name = name if i == 0 else f"{name}.{i}"
            value.type = ir.TensorType(kind)
            value.shape = like if i == 0 else ir.Shape([])
        self.made = node
        return list(node.outputs)

    def pair(self, x: ir.Value, seen: str, name: str, anchor: ir.Node, before: bool) -> ir.Value:
        """Q and DQ of a value that was calibrated as `seen`, with a static scale and zero point."""
        kind, few, grid = base_of(x), ir.DataType[self.p.activations.onnx], self.p.grid(seen)
        scale = self.constant(f"{name}.scale", held(np.array(grid.scale), kind.numpy()).astype(kind.numpy()))
        zero = self.constant(f"{name}.zero", np.array(grid.zero, few.numpy()), few)
        (q,) = self.make("QuantizeLinear", [x, scale, zero], f"{name}.q", [few], x.shape)
        nodes = [self.made]
        (dq,) = self.make("DequantizeLinear", [q, scale, zero], f"{name}.dq", [kind], x.shape)
        nodes.append(self.made)
        (self.graph.insert_before if before else self.graph.insert_after)(anchor, nodes)
        return dq

    def through(self, node: ir.Node, index: int, seen: str) -> None:
        """Sends an input of the node through Q and DQ; for TensorRT all readers of a value share them.

        What comes from a quantized output already has the same scale: it is read as it is."""
        x = node.inputs[index]
        assert x is not None
        maker = x.producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            return
        if self.p.runtime == "onnxruntime":
            node.replace_input_with(index, self.pair(x, seen, f"{node.name}/x", node, True))
            return
        if seen not in self.shared:
            self.shared[seen] = self.pair(x, seen, f"{seen}/shared", node, True)
        node.replace_input_with(index, self.shared[seen])

    def after(self, node: ir.Node, s: Site) -> None:
        """Q and DQ of the node's output. A graph output keeps its name."""
        out = node.outputs[0]
        users, final = list(out.uses()), out.is_graph_output()
        dq = self.pair(out, s.output, f"{s.name}/y", node, False)
        for use in users:
            use.node.replace_input_with(use.idx, dq)
        if final:
            index = list(self.graph.outputs).index(out)
            name = str(out.name)
            out.name, dq.name = f"{name}.raw", name
            self.graph.outputs[index] = dq

    def weight(self, node: ir.Node, s: Site) -> ir.Value:
        """The dequantized weight; for TensorRT one that several nodes read alike is made once."""
        numbers, scale, shape = self.numbers(node, s)
        value = node.inputs[1]
        assert value is not None
        kind = base_of(value)
        few = ir.DataType[self.p.format.onnx]
        block = self.p.block(s)
        key = f"{s.weight}|{s.axis}|{s.activation if self.smoothed(s) is not None else ''}"
        if key in self.shared and self.p.runtime == "tensorrt":
            return self.shared[key]
        name = self.fresh(s.weight)
        q = self.register(f"{name}.{self.p.format.name}", QuantizedWeight(name, few, shape, numbers))
        scales = self.constant(f"{name}.scale", scale.astype(kind.numpy()))
        attrs = {"axis": 0, "block_size": block} if block else {"axis": self.p.axis(s)}
        (dq,) = self.make("DequantizeLinear", [q, scales], f"{name}.dq", [kind], ir.Shape(list(shape)), **attrs)
        self.graph.insert_before(node, self.made)
        self.shared[key] = dq
        return dq

    def fresh(self, name: str) -> str:
        names, i = self.graph.initializers, 1
        wanted = name
        while {f"{wanted}.scale", f"{wanted}.smoothed"} & set(names):
            i += 1
            wanted = f"{name}.{i}"
        return wanted

    def smoothed(self, s: Site) -> Array | None:
        found = self.smoothing.get(s.activation)
        return None if found is None or s.kind != "linear" else found.divisor

    def numbers(self, node: ir.Node, s: Site) -> tuple[Callable[[], Array], Array, tuple[int, ...]]:
        """(what makes the numbers, their scales, their shape) of a site's weight."""
        tensor = self.graph.initializers[s.weight].const_value
        assert tensor is not None
        fmt, axis, block = self.p.format, self.p.axis(s), self.p.block(s)

        def floats() -> Array:
            return quantized_part(self.p, s, np.asarray(tensor.numpy(), np.float32))

        whole = floats()
        scale, shape = scales_of(self.p, s, node, whole), whole.shape

        def make() -> Array:
            return quantize(floats(), spread(scale, shape, axis, block), fmt)

        return make, scale, shape

    def compensate(self, node: ir.Node, s: Site) -> None:
        """A layer that stays high beside quantized ones: its weights take up what its smoothed input lost."""
        value, divisor = node.inputs[1], self.smoothed(s)
        tensor = self.graph.initializers[s.weight].const_value
        assert value is not None and tensor is not None and divisor is not None
        vector, turned = divisor if s.axis == 0 else divisor[:, None], not initializer(value)
        dtype, name = tensor.dtype, f"{self.fresh(s.weight)}.smoothed"

        def make() -> Array:
            array = tensor.numpy()
            made = (array.astype(np.float32) * vector).astype(array.dtype)
            return made.T if turned else made

        shape = [int(d) for d in tensor.shape.numpy()][:: -1 if turned else 1]
        node.replace_input_with(1, self.register(name, QuantizedWeight(name, dtype, shape, make)))

    def as_matmul(self, node: ir.Node, s: Site) -> ir.Node:
        """A Gemm as MatMul and Add: DQ's axis is then the same for all linear sites."""
        x, w = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        out = node.outputs[0]
        assert x is not None and w is not None
        name = str(out.name)
        product = ir.node("MatMul", [x, w], name=str(node.name), metadata_props=dict(node.metadata_props))
        last = product.outputs[0]
        last.type, last.shape = out.type, out.shape
        nodes = [product]
        if bias is not None:
            last.name = f"{name}.product"
            add = ir.node("Add", [last, bias], name=f"{node.name}/Add", metadata_props=dict(node.metadata_props))
            nodes.append(add)
            last = add.outputs[0]
            last.type, last.shape = out.type, out.shape
        out.replace_all_uses_with(last, replace_graph_outputs=True)
        self.graph.insert_before(node, nodes)
        self.graph.remove(node, safe=True)
        last.name = name
        return product

    def unmerge_bias(self, node: ir.Node) -> None:
        """`m + b` as `m - (-b)`, which ONNX Runtime does not make a Gemm of."""
        product = node.outputs[0]
        for use in list(product.uses()):
            bias = use.node.inputs[1 - use.idx] if use.node.op_type == "Add" else None
            tensor = bias.const_value if bias is not None else None
            if bias is None or tensor is None:
                continue
            negated = self.once(f"{bias.name}.negated", -tensor.numpy())
            use.node.op_type = "Sub"
            use.node.replace_input_with(0, product)
            use.node.replace_input_with(1, negated)

    def instance_norms(self) -> None:
        """GroupNormalization by InstanceNormalization, for which ONNX Runtime has a kernel on the CPU. The former it
        takes apart into 29 nodes, twice as slow; beside integer convolutions that would be most of the time."""
        for node in [n for n in self.graph if n.op_type == "GroupNormalization"]:
            x, weight, bias, out = *node.inputs, node.outputs[0]
            assert x is not None and weight is not None and bias is not None and x.shape is not None
            if base_of(x) != ir.DataType.FLOAT:
                continue
            groups, name, kind = node.attributes["num_groups"].as_int(), str(node.name), ir.DataType.FLOAT
            ones = self.once(f"ones.{groups}", np.ones(groups, np.float32))
            zeros = self.once(f"zeros.{groups}", np.zeros(groups, np.float32))
            rows = self.once(f"rows.{groups}", np.array([0, groups, -1], np.int64))
            factors = [self.lifted(v, len(x.shape) - 1) for v in (weight, bias)]
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            steps: list[tuple[str, list[Any], dict[str, Any], ir.DataType, Any]] = [
                ("Reshape", [x, rows], {}, kind, None),
                ("InstanceNormalization", [0, ones, zeros], {"epsilon": epsilon}, kind, None),
                ("Shape", [x], {}, ir.DataType.INT64, ir.Shape([len(x.shape)])),
                ("Reshape", [1, 2], {}, kind, x.shape),
                ("Mul", [3, factors[0]], {}, kind, x.shape),
                ("Add", [4, factors[1]], {}, kind, x.shape),
            ]
            made: list[ir.Value] = []
            for i, (op, inputs, attributes, dtype, shape) in enumerate(steps):
                values = [made[v] if isinstance(v, int) else v for v in inputs]
                made += self.make(op, values, f"{name}/{i}", [dtype], shape, **attributes)
                self.made.metadata_props.update(node.metadata_props)
                self.graph.insert_before(node, self.made)
            final = str(out.name)
            out.replace_all_uses_with(made[-1], replace_graph_outputs=True)
            self.graph.remove(node, safe=True)
            made[-1].name = final

    def sums(self) -> None:
        """An Add before a LayerNormalization as Sum. Of an Add ONNX Runtime makes one SkipLayerNormalization of both,
        whose CPU kernel takes six times as long as the two apart (1.31); not where others read the Add too."""
        for norm in [n for n in self.graph if n.op_type == "LayerNormalization"]:
            x = norm.inputs[0]
            add = x.producer() if x is not None else None
            if x is None or add is None or add.op_type != "Add" or base_of(x) != ir.DataType.FLOAT:
                continue
            alike = all(v is not None and v.shape is not None and v.shape == x.shape for v in add.inputs)
            if alike and len(x.uses()) == 1 and not x.is_graph_output():
                add.op_type = "Sum"

    def once(self, name: str, array: Array) -> ir.Value:
        return self.graph.initializers.get(name) or self.constant(name, array)

    def lifted(self, value: ir.Value, rank: int) -> ir.Value:
        """A vector of channels as `[channels, 1, ...]`, of that rank."""
        tensor = value.const_value
        assert tensor is not None
        return self.once(f"{value.name}.channels", tensor.numpy().reshape(-1, *[1] * (rank - 1)))

    def dynamic(self, node: ir.Node, s: Site, x: ir.Value) -> ir.Node:
        """The pattern that ONNX Runtime runs as one DynamicQuantizeMatMul: scale and zero point of x at run time."""
        make, scale, shape = self.numbers(node, s)
        out, outliers = node.outputs[0], self.p.outliers.get(s.activation)
        if outliers is not None:
            mask = self.constant(f"{s.name}/rest.mask", (~outliers).astype(base_of(x).numpy()))
            x = self.before(node, s, "rest", "Mul", [x, mask], x.shape)
        name, few, fp32 = self.fresh(s.weight), ir.DataType.INT8, ir.DataType.FLOAT
        weight = self.register(f"{name}.int8", QuantizedWeight(name, few, shape, make))
        scales = self.constant(f"{name}.scale", scale.astype(np.float32))
        kinds, site = [ir.DataType.UINT8, fp32, ir.DataType.UINT8], s.name
        q, sx, zx = self.make("DynamicQuantizeLinear", [x], f"{site}/x.q", kinds, x.shape)
        nodes = [self.made]
        (product,) = self.make("MatMulInteger", [q, weight, zx], f"{site}/int32", [ir.DataType.INT32], out.shape)
        nodes.append(self.made)
        (wide,) = self.make("Cast", [product], f"{site}/fp32", [fp32], out.shape, to=int(fp32))
        nodes.append(self.made)
        (both,) = self.make("Mul", [sx, scales], f"{site}/scale", [fp32], scales.shape)
        nodes.append(self.made)
        (y,) = self.make("Mul", [wide, both], f"{site}/y", [fp32], out.shape)
        nodes.append(self.made)
        name = str(out.name)
        out.replace_all_uses_with(y, replace_graph_outputs=True)
        self.graph.insert_before(node, nodes)
        self.graph.remove(node, safe=True)
        y.name = name
        return self.made


def with_bias(node: ir.Node) -> ir.Node:
    """The Add of a constant that is all that reads the node, which ONNX Runtime merges into it; else the node."""
    uses = list(node.outputs[0].uses())
    add = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    merged = add is not None and add.op_type == "Add" and initializer(add.inputs[1 - uses[0].idx])
    return add if add is not None and merged else node


def base_of(value: ir.Value) -> ir.DataType:
    return value.dtype or ir.DataType.FLOAT
