"""ONNX becomes a TensorRT engine: one path over `tensorrt` (10 and 11) and `tensorrt_rtx`.

Precision comes from the graph alone: networks are strongly typed, and the typed tensors and Q/DQ nodes of the ONNX file
decide. `tensorrt` builds for the GPU of the machine that it runs on; `tensorrt_rtx` needs no GPU to build and names its
targets. What TensorRT-RTX 1.7.1 builds and what it refuses, operator by operator, is held by `tests/test_tensorrt.py`.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optimize.errors import GateError, InputError, MissingError, OptimizeError
from optimize.kernels.functions import DOMAIN, texts

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]
"""Smallest, best and largest shape of one input; for an input that is a shape tensor, its values."""

RTX_SMS = (75, 80, 86, 89, 120, 121)  # TensorRT-RTX 1.7.1; a test holds this against the installed one


@dataclass(frozen=True)
class Flavour:
    """One of the TensorRT products. `sms`: what it can build for on this machine; empty together with `why_not`."""

    module: str
    version: str
    sms: tuple[int, ...]
    why_not: str | None = None


@dataclass(frozen=True)
class EngineSpec:
    """What to build. `sm` is a compute capability such as 89, or None for the GPU of this machine.

    `tf32` allows fp32 matrix products in TF32 (10 bits of mantissa): off, because precision comes from the graph.
    `timing_cache` is read where it exists and written after the build; TensorRT-RTX times nothing when it builds, so
    its cache stays empty.
    """

    sm: int | None = None
    tf32: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine. `reads` (weights too) and `writes`: TensorRT's names of types, such as Half, Int8, FP8.

    `onnx` names the ONNX nodes that it computes; `name` of a fused attention contains "mha".
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    onnx: tuple[str, ...]


@dataclass(frozen=True)
class EngineBuild:
    """An engine on disk, and what it took. `downgrades` says what it does otherwise than the graph asks.

    `layers` is TensorRT's own list, taken while it builds: it takes no GPU to see what was fused and what is in int8.
    """

    path: Path
    flavour: str
    version: str
    sm: int
    seconds: float
    bytes: int
    profile: Mapping[str, Profile]
    layers: tuple[EngineLayer, ...]
    downgrades: tuple[str, ...]


def current_gpu() -> tuple[str, int]:
    """Name and SM (89 for 8.9) of the first visible GPU, from the driver itself. MissingError: no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise MissingError("no NVIDIA driver here", got=error, mend="name a target, such as --target sm89") from error
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    status = (
        cuda.cuInit(0)
        or cuda.cuDeviceGetName(name, len(name), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)  # ..._MINOR
    )
    if status:
        raise MissingError("the NVIDIA driver shows no GPU", got=f"CUDA error {status}", mend="look at nvidia-smi")
    return name.value.decode(), 10 * major.value + minor.value


def flavours() -> list[Flavour]:
    """Both products, each with what it can build for here or why it cannot. The preferred one comes first."""
    return [_flavour("tensorrt"), _flavour("tensorrt_rtx")]


def flavour_for(sm: int) -> Flavour:
    """The installed product that builds for `sm`; `MissingError` says what would."""
    found = flavours()
    for flavour in found:
        if sm in flavour.sms:
            return flavour
    on_target = f"`pip install tensorrt` on a machine with an sm{sm} GPU, and build there"
    raise MissingError(
        f"nothing here builds TensorRT engines for sm{sm}",
        got="; ".join(f"{f.module}: {f.why_not or 'only ' + _sm_list(f.sms)}" for f in found),
        expected=f"`tensorrt` with that GPU, or `tensorrt_rtx`, which serves {_sm_list(RTX_SMS)}",
        mend=f"`pip install tensorrt-rtx`, or {on_target}" if sm in RTX_SMS else on_target,
    )


def engine_from_onnx(
    onnx_path: Path,
    out: Path,
    shapes: Mapping[str, Profile],
    spec: EngineSpec | None = None,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> EngineBuild:
    """Build the engine of the graph in `onnx_path` for the shapes (min, opt, max) of its inputs, and write it to `out`.

    `shapes` names every input that has a dynamic axis or is a shape tensor; 0 is a good smallest size for an axis such
    as `past`. External data are read in place, a .safetensors file among them. Nothing is left behind on failure.

    InputError: the file or the shapes are wrong. GateError: TensorRT cannot parse or build this graph; the text carries
    its own. MissingError: nothing here builds for this target.
    """
    spec = spec or EngineSpec()
    sm = spec.sm or current_gpu()[1]
    flavour = flavour_for(sm)
    trt, log, started = import_module(flavour.module), _log(flavour.module), time.perf_counter()
    log.clear()
    builder = trt.Builder(log)
    progress(f"{onnx_path.name}: parsing with {flavour.module} {flavour.version}")
    network, _parser = _network_from_onnx(trt, builder, onnx_path)  # the parser owns weights that the network reads
    if flavour.module == "tensorrt_rtx":
        _refuse_shared_queries(onnx_path)
    config = _config_from_spec(trt, builder, spec, sm, flavour)
    profile = _profile_from_shapes(builder, network, config, shapes)
    attentions = _decomposable_attentions(trt, network)
    progress(f"{onnx_path.name}: building the engine for sm{sm}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise GateError(
            f"{onnx_path.name}: {flavour.module} {flavour.version} built no engine for sm{sm}",
            got="\n    ".join(log.errors) or "no reason given",
        )
    layers = _layers_from_text(log.layers)
    size = _write(out, memoryview(plan))
    if spec.timing_cache:
        _write(spec.timing_cache, memoryview(config.get_timing_cache().serialize()))
    seconds = time.perf_counter() - started
    progress(f"{out.name}: {size / 2**20:.1f} MiB in {seconds:.1f} s")
    downgrades = _decomposed(attentions, layers)
    return EngineBuild(out, flavour.module, flavour.version, sm, seconds, size, profile, layers, downgrades)


def _flavour(module: str) -> Flavour:
    if find_spec(module) is None:
        return Flavour(module, "", (), "not installed")
    try:
        trt = import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a wheel without its libraries raises any of the three
        return Flavour(module, "", (), f"cannot be imported: {error}")
    if module == "tensorrt_rtx":
        sms = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        return Flavour(module, trt.__version__, tuple(sms))
    try:
        return Flavour(module, trt.__version__, (current_gpu()[1],))
    except MissingError as error:
        return Flavour(module, trt.__version__, (), f"builds only for the GPU of its machine, and {error.what}")


def _sm_list(sms: tuple[int, ...]) -> str:
    return ", ".join(f"sm{sm}" for sm in sms)


@lru_cache(maxsize=2)
def _log(module: str) -> Any:
    """The logger of a product; one for the whole process, as TensorRT ignores a second. Keeps errors and the layers."""
    base: Any = import_module(module).ILogger

    class Log(base):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            base.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.errors: deque[str] = deque(maxlen=6)
            self.layers = ""

        def log(self, severity: Any, text: str) -> None:
            if text.startswith("Layers:"):
                self.layers = text
            elif severity <= base.ERROR and "cudaError 35" not in text:  # 35: no driver, which RTX does not need here
                self.errors.append(" ".join(text.split()))

    return Log()


def _network_from_onnx(trt: Any, builder: Any, onnx_path: Path) -> tuple[Any, Any]:
    if not onnx_path.is_file() or not onnx_path.stat().st_size:
        raise InputError("no ONNX file, or an empty one", got=onnx_path)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, _log(trt.__name__))
    if parser.parse_from_file(str(onnx_path)):
        return network, parser
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    unreadable = any(e.code() == trt.ErrorCode.MODEL_DESERIALIZE_FAILED for e in errors)
    kind: type[OptimizeError] = InputError if unreadable else GateError
    raise kind(
        f"{onnx_path.name}: {trt.__name__} {trt.__version__} cannot parse this graph",
        got="\n    ".join(dict.fromkeys(_parser_error(e) for e in errors)) or "no reason given",
    )


def _parser_error(error: Any) -> str:
    """`Det node "det_3": not supported`. For a known operator that it lacks the parser itself says only `false`."""
    text = " ".join(error.desc().split())
    if text in {"", "false"}:
        text = f"not supported ({error.code().name})"
    if not error.node_operator():
        return text
    functions = [f"inside {function}" for function in error.local_function_stack()]
    return " ".join([f'{error.node_operator()} node "{error.node_name() or error.node()}"', *functions]) + f": {text}"


ATTENTIONS = {("", "Attention"), *((DOMAIN, name) for name in texts() if "Attention" in name)}


def _refuse_shared_queries(onnx_path: Path) -> None:
    """TensorRT-RTX 1.7.1 kills the process where attentions scale one query or key tensor alike: say so instead."""
    import onnx

    users: dict[tuple[str, float | None], list[str]] = {}
    for node in onnx.load(onnx_path, load_external_data=False).graph.node:
        if (node.domain, node.op_type) in ATTENTIONS:
            scale = next((attribute.f for attribute in node.attribute if attribute.name == "scale"), None)
            for name in node.input[:2]:
                users.setdefault((name, scale), []).append(node.name)
    for (name, scale), nodes in users.items():
        if len(nodes) > 1 and scale != 1:
            raise GateError(
                f"{onnx_path.name}: TensorRT-RTX would crash",
                got=f"{name} is query or key of {' and '.join(nodes)}, scaled alike",
                mend="export this component with an opset below 23",
            )


def _config_from_spec(trt: Any, builder: Any, spec: EngineSpec, sm: int, flavour: Flavour) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # lists the layers; the engine grows by no byte
    if flavour.module == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    if not spec.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if spec.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if spec.timing_cache:
        known = spec.timing_cache.read_bytes() if spec.timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise InputError("the timing cache is of another TensorRT or GPU", got=spec.timing_cache, mend="delete it")
    return config


def _profile_from_shapes(builder: Any, network: Any, config: Any, shapes: Mapping[str, Profile]) -> dict[str, Profile]:
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    if unknown := sorted(set(shapes) - set(inputs)):
        raise InputError("shapes for inputs that the graph lacks", got=unknown, expected=sorted(inputs))
    profile, used = builder.create_optimization_profile(), {}
    for name, tensor in inputs.items():
        graph = tuple(tensor.shape)
        if name not in shapes and (tensor.is_shape_tensor or -1 in graph):
            raise InputError(f"input {name} is dynamic and has no shapes", got=graph, expected="(min, opt, max)")
        used[name] = shapes.get(name, (graph, graph, graph))
        if tensor.is_shape_tensor:
            profile.set_shape_input(name, *used[name])
            continue
        if not _fits(graph, used[name]):
            raise InputError(
                f"input {name}: the shapes do not fit the graph",
                got="min {}, opt {}, max {}".format(*used[name]),
                expected=f"0 <= min <= opt <= max along {graph}, where -1 is dynamic",
            )
        profile.set_shape(name, *used[name])
    config.add_optimization_profile(profile)
    return used


def _fits(graph: Shape, profile: Profile) -> bool:
    if any(len(shape) != len(graph) for shape in profile):
        return False
    sizes = zip(graph, *profile, strict=True)
    return all((0 <= low <= best <= high) if dim < 0 else dim == low == best == high for dim, low, best, high in sizes)


def _decomposable_attentions(trt: Any, network: Any) -> dict[str, str]:
    """Let TensorRT decompose each attention for which it lacks a kernel, where it would fail: ONNX node -> query."""
    queries = {}
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == getattr(trt.LayerType, "ATTENTION_OUTPUT", None):
            layer.__class__ = trt.IAttentionOutputLayer  # the binding gives a bare ILayer
            layer.attention.decomposable = True
            query = layer.attention.get_input(0)  # [batch, heads, tokens, head size]
            queries.update(dict.fromkeys(_onnx_nodes(layer.metadata), f"{query.dtype.name} {tuple(query.shape)}"))
    return queries


def _decomposed(attentions: Mapping[str, str], layers: tuple[EngineLayer, ...]) -> tuple[str, ...]:
    said = "decomposed" if layers else "perhaps decomposed, as TensorRT listed no layers"
    fused = {node for layer in layers if layer.kind == "kgen" and "mha" in layer.name for node in layer.onnx}
    return tuple(
        f"attention {node}: {said}: no fused kernel for a query of {query}"
        for node, query in attentions.items()
        if node not in fused
    )


def _layers_from_text(text: str) -> tuple[EngineLayer, ...]:
    """TensorRT's log, a layer a line: `Name: .., LayerType: .., Inputs: [..], Outputs: [..], [ONNX Layer: ..][..]`."""
    layers = []
    for line in text.partition("\n\n")[0].splitlines():
        if head := re.match(r"Name: (.*?), LayerType: (\w+)", line):
            reads, _, writes = (re.findall(r"Datatype: (\w+)", part) for part in line.partition("Outputs: ["))
            layers.append(EngineLayer(head[1], head[2], tuple(reads), tuple(writes), _onnx_nodes(line)))
    return tuple(layers)


def _onnx_nodes(metadata: str) -> tuple[str, ...]:
    r"""`[ONNX Layer: a]\x1f[ONNX Layer: b]` (the unit separator divides them, and terminals hide it) -> ("a", "b")."""
    return tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=\x1f|$)", metadata))


def _write(path: Path, data: memoryview) -> int:
    """Write a whole file or nothing; its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return data.nbytes
