"""Real TensorRT-RTX builds of tiny graphs, without a GPU. The two tables at the end are its facts, held by building."""

import importlib.util
import json
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from optimize.compile import tensorrt
from optimize.compile.tensorrt import EngineBuild, EngineSpec, engine_from_onnx, flavour_for, flavours
from optimize.errors import GateError, InputError, MissingError, OptimizeError

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
SIZES = {"b": (1, 2, 4), "t": (1, 16, 64), "s": (1, 77, 128), "h": (8, 16, 32), "w": (8, 24, 32), "p": (0, 8, 64)}
LAYER_TYPE = {"float": "Float", "float16": "Half", "bfloat16": "BFloat16"}
SM89 = EngineSpec(sm=89)
ATTENTION = "(T[b,2,t,{d}] q, T[b,2,s,{d}] k, T[b,2,s,{d}] v) => (T y) {{ [attn] y = Attention(q, k, v) }}"


def model(graph: str, dtype: str = "float16", functions: str = "", **constants: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX's text: `T` is `dtype`, each symbolic axis a key of SIZES, `__` in a node's name a slash."""
    head = '<ir_version: 10, opset_import: ["": 23, "own": 1]>'
    body = graph.replace("T[", f"{dtype}[").replace("T ", f"{dtype} ")
    proto = onnx.parser.parse_model(f"{head} g {body} {functions}")
    for node in proto.graph.node:
        node.name = node.name.replace("__", "/")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return proto


def shapes_of(proto: onnx.ModelProto) -> dict[str, tensorrt.Profile]:
    def shape(value: onnx.ValueInfoProto, which: int) -> tuple[int, ...]:
        dims = value.type.tensor_type.shape.dim
        return tuple(SIZES[d.dim_param][which] if d.dim_param else d.dim_value for d in dims)

    return {v.name: (shape(v, 0), shape(v, 1), shape(v, 2)) for v in proto.graph.input}


Build = Callable[..., EngineBuild]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def run(proto: onnx.ModelProto, spec: EngineSpec = SM89, **kwargs: object) -> EngineBuild:
        onnx.save(proto, tmp_path / "graph.onnx")
        kwargs.setdefault("shapes", shapes_of(proto))
        return engine_from_onnx(tmp_path / "graph.onnx", tmp_path / "out" / "graph.engine", spec=spec, **kwargs)  # type: ignore[arg-type]

    return run


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


MLP = "(T[b,t,64] x, T[64,64] m) => (T y) { [fc] z = MatMul(x, m)  [act] y = Gelu(z) }"


@needs_rtx
@pytest.mark.parametrize("sm", [75, 80, 86, 89, 120])
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_an_engine_has_the_precision_of_its_graph(build: Build, tmp_path: Path, sm: int, dtype: str) -> None:
    proto = model(MLP, dtype)
    if sm == 75 and dtype != "float16":
        with pytest.raises(GateError, match=r"built no engine for sm75(.|\n)*(FP32 GEMM is not supported|b16)"):
            build(proto, EngineSpec(sm=sm))
        assert files(tmp_path) == {"graph.onnx"}
        return
    done = build(proto, EngineSpec(sm=sm))
    assert (done.sm, done.flavour, done.downgrades) == (sm, "tensorrt_rtx", ())
    assert done.path.stat().st_size == done.bytes > 1000
    assert done.profile["x"] == ((1, 1, 64), (2, 16, 64), (4, 64, 64))
    product = next(layer for layer in done.layers if layer.kind == "gemm")
    assert product.onnx == ("fc",)
    assert set(product.reads[:2] + product.writes) == {LAYER_TYPE[dtype]}
    assert files(tmp_path) == {"graph.onnx", "graph.engine"}


@needs_rtx
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_size", [16, 40, 64, 80, 128, 160, 256])
def test_attention_is_fused(build: Build, dtype: str, head_size: int) -> None:
    done = build(model(ATTENTION.format(d=head_size), dtype))
    assert done.downgrades == ()
    assert any("mha" in layer.name and layer.onnx == ("attn",) for layer in done.layers)


@needs_rtx
@pytest.mark.parametrize(
    ("dtype", "head_size", "query"),
    [
        ("float", 64, "FLOAT (-1, 2, -1, 64)"),
        ("float16", 8, "HALF (-1, 2, -1, 8)"),
        ("float16", 512, "HALF (-1, 2, -1, 512)"),
        ("bfloat16", 320, "BF16 (-1, 2, -1, 320)"),
    ],
)
def test_attention_without_a_kernel_is_decomposed_and_said(
    build: Build, dtype: str, head_size: int, query: str
) -> None:
    done = build(model(ATTENTION.format(d=head_size), dtype))
    assert done.downgrades == (f"attention attn: decomposed: no fused kernel for a query of {query}",)
    assert not any("mha" in layer.name for layer in done.layers)


@needs_rtx
def test_only_the_attention_that_was_decomposed_is_named(build: Build) -> None:
    inputs = ", ".join(f"T[b,2,t,64] {n}, T[b,2,t,512] {n}5" for n in "qkv")
    body = "[down__0__attn] y = Attention(q, k, v) [mid__attn] z = Attention(q5, k5, v5)"
    done = build(model(f"({inputs}) => (T y, T z) {{ {body} }}"))
    assert [text.split(":")[0] for text in done.downgrades] == ["attention mid/attn"]


@needs_rtx
def test_one_query_token_over_an_empty_past_builds(build: Build) -> None:
    """Decoding. TensorRT fails here unless the attention may be decomposed, and then finds a fused kernel after all."""
    past = "T[1,2,1,64] q, T[1,2,1,64] k, T[1,2,1,64] v, T[1,2,p,64] pk, T[1,2,p,64] pv"
    body = "kk = Concat<axis=2>(pk, k) vv = Concat<axis=2>(pv, v) [attn] y = Attention(q, kk, vv)"
    done = build(model(f"({past}) => (T y, T kk, T vv) {{ {body} }}"))
    assert done.profile["pk"][0] == (1, 2, 0, 64)
    assert done.downgrades == ()


@needs_rtx
def test_primitive_attention_fuses_without_the_copies_that_the_operator_needs(build: Build) -> None:
    """With a dynamic axis the Attention operator pads q, k, v and the output: four more kernels than its own pieces."""
    heads = " ".join(
        f"{n}0 = MatMul(x, w{n}) {n}1 = Reshape({n}0, split) {n} = Transpose<perm=[0,2,1,3]>({n}1)" for n in "qkv"
    )
    out = "o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, join) y = MatMul(o2, wo)"
    pieces = (
        "kt = Transpose<perm=[0,1,3,2]>(k) p = MatMul(q, kt) ps = Mul(p, c) m = Softmax<axis=-1>(ps) o = MatMul(m, v)"
    )
    inputs = "T[b,t,256] x, " + ", ".join(f"T[256,256] w{n}" for n in "qkvo")
    constants = {"split": np.array([0, 0, 4, 64]), "join": np.array([0, 0, 256]), "c": np.float16([0.125])}
    operator = build(model(f"({inputs}) => (T y) {{ {heads} o = Attention(q, k, v) {out} }}", **constants))
    primitive = build(model(f"({inputs}) => (T y) {{ {heads} {pieces} {out} }}", **constants))

    def count(done: EngineBuild, word: str) -> int:
        return sum(word in layer.name for layer in done.layers)

    assert count(operator, "mha") == count(primitive, "mha") == 1
    assert (count(operator, "Move"), count(primitive, "Move")) == (4, 0)


@needs_rtx
@pytest.mark.parametrize(("kind", "layer_type"), [(np.int8, "Int8"), (ml_dtypes.float8_e4m3fn, "FP8")])
def test_quantized_products_are_seen_in_the_engine(build: Build, kind: type, layer_type: str) -> None:
    qdq = (
        "xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wq = QuantizeLinear(m, s, z) "
        "wd = DequantizeLinear(wq, s, z) [fc] y = MatMul(xd, wd)"
    )
    constants = {"s": np.float16(0.1), "z": np.zeros((), kind), "m": np.ones((64, 64), np.float16)}
    proto = model(f"(T[b,64] x) => (T y) {{ {qdq} }}", **constants)
    product = next(layer for layer in build(proto).layers if "fc" in layer.onnx and layer.kind == "gemm")
    assert product.reads[:2] == (layer_type, layer_type)


def test_a_target_that_rtx_lacks_is_refused_with_what_would_serve_it() -> None:
    with pytest.raises(MissingError) as caught:
        flavour_for(90)
    text = str(caught.value)
    assert "nothing here builds TensorRT engines for sm90" in text
    assert "`pip install tensorrt` on a machine with an sm90 GPU" in text
    assert "pip install tensorrt-rtx" not in text.split("mend:")[1]
    assert "sm75, sm80, sm86, sm89, sm120, sm121" in text


@needs_rtx
def test_the_table_of_rtx_targets_is_that_of_the_installed_one() -> None:
    rtx = next(f for f in flavours() if f.module == "tensorrt_rtx")
    assert rtx.sms == tensorrt.RTX_SMS and rtx.why_not is None and rtx.version


def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("tensorrt")
    fake.__version__ = "11.0"  # type: ignore[attr-defined]
    fake.__spec__ = importlib.util.spec_from_loader("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)


def test_data_centre_tensorrt_serves_the_gpu_of_its_machine_and_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch)
    monkeypatch.setattr(tensorrt, "current_gpu", lambda: ("NVIDIA H200", 90))
    assert flavour_for(90) == tensorrt.Flavour("tensorrt", "11.0", (90,))


def test_each_product_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    assert [f.why_not for f in flavours()] == ["not installed", "not installed"]
    with pytest.raises(MissingError, match="mend: `pip install tensorrt-rtx`"):
        flavour_for(89)
    monkeypatch.undo()

    def no_driver() -> tuple[str, int]:
        raise MissingError("no NVIDIA driver here")

    fake_tensorrt(monkeypatch)
    monkeypatch.setattr(tensorrt, "current_gpu", no_driver)
    assert flavours()[0].why_not == "builds only for the GPU of its machine, and no NVIDIA driver here"

    def placeholder(name: str) -> None:
        raise RuntimeError("libnvinfer is on another index")

    monkeypatch.setattr(tensorrt, "import_module", placeholder)
    assert flavours()[0].why_not == "cannot be imported: libnvinfer is on another index"


REFUSED_GRAPHS = {
    "known but unsupported": (
        model("(T[4,4] x) => (T y) { [enc__det_3] y = Det(x) }"),
        'Det node "enc/det_3": not supported (UNSUPPORTED_NODE)',
    ),
    "unknown": (model("(T[4,4] x) => (T y) { [odd] y = own.Odd(x) }"), 'Odd node "odd": creator && "Plugin not found'),
    "mixed types": (
        model("(T[4] x, float[4] z) => (T y) { [sum] y = Add(x, z) }"),
        "must have same input types. But they are of types Half and Float",
    ),
    "inside a function": (
        model(
            "(T[4,4] x) => (T y) { [blk] y = own.Body(x) }",
            functions='<domain: "own", opset_import: ["": 23]> Body (a) => (b) { [deep] b = Det(a) }',
        ),
        'Det node "deep" inside',
    ),
}


@needs_rtx
@pytest.mark.parametrize("name", REFUSED_GRAPHS)
def test_what_the_parser_refuses_is_named(build: Build, tmp_path: Path, name: str) -> None:
    proto, words = REFUSED_GRAPHS[name]
    with pytest.raises(GateError) as caught:
        build(proto)
    assert "graph.onnx: tensorrt_rtx" in str(caught.value) and words in str(caught.value)
    assert files(tmp_path) == {"graph.onnx"}


SHARED = {
    "one query": "[one] y = Attention(q, k, v) [two] z = Attention(q, k5, v5)",
    "one key": "[one] y = Attention(q, k, v) [two] z = Attention(q5, k, v5)",
    "query is key": "[one] y = Attention(q, k, v) [two] z = Attention(q5, q5, v5)",
}


@needs_rtx
@pytest.mark.parametrize("name", SHARED)
def test_what_would_crash_the_process_is_refused(build: Build, name: str) -> None:
    inputs = ", ".join(f"T[2,2,64,64] {n}, T[2,2,64,64] {n}5" for n in "qkv")
    with pytest.raises(GateError, match=r"TensorRT-RTX would crash(.|\n)*(one and two|two and two), scaled alike"):
        build(model(f"({inputs}) => (T y, T z) {{ {SHARED[name]} }}"))
    unscaled = SHARED[name].replace("Attention(", "Attention<scale=1.0>(")
    assert build(model(f"({inputs}) => (T y, T z) {{ {unscaled} }}")).bytes


@needs_rtx
def test_a_broken_file_is_an_input_error(tmp_path: Path) -> None:
    proto = model(MLP)
    whole = proto.SerializeToString()
    for name, content in {"cut": whole[: len(whole) // 2], "junk": b"not a graph" * 9, "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"Failed to parse the ONNX model|no ONNX file, or an empty one"):
            engine_from_onnx(tmp_path / name, tmp_path / "x.engine", shapes_of(proto), SM89)
    with pytest.raises(InputError, match="no ONNX file"):
        engine_from_onnx(tmp_path / "absent", tmp_path / "x.engine", {}, SM89)
    assert files(tmp_path) == {"cut", "junk", "empty"}


def with_weight_in(folder: Path, location: str) -> onnx.ModelProto:
    """MLP whose matrix lies in a safetensors file, written by hand: 8 bytes of header size, JSON, data."""
    data = np.ones((64, 64), np.float16).tobytes()
    header = json.dumps({"m": {"dtype": "F16", "shape": [64, 64], "data_offsets": [0, len(data)]}}).encode()
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    proto = model(MLP)
    del proto.graph.input[1]
    tensor = proto.graph.initializer.add(name="m", dims=[64, 64], data_type=onnx.TensorProto.FLOAT16)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 8 + len(header), "length": len(data)}.items():
        tensor.external_data.add(key=key, value=str(value))
    return proto


@needs_rtx
def test_weights_are_read_from_safetensors_beside_the_graph(build: Build, tmp_path: Path) -> None:
    assert build(with_weight_in(tmp_path, "weights.safetensors")).bytes > 64 * 64 * 2


@needs_rtx
@pytest.mark.parametrize("location", ["absent.safetensors", "../weights.safetensors", "/etc/hostname"])
def test_weights_that_are_absent_or_outside_the_folder_are_refused(build: Build, tmp_path: Path, location: str) -> None:
    proto = with_weight_in(tmp_path, location)
    (tmp_path.parent / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes())
    with pytest.raises(GateError, match="Failed to import initializer: m"):
        build(proto)


@needs_rtx
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({}, "input x is dynamic and has no shapes"),
        ({"x": ((1, 64),) * 3}, "input x: the shapes do not fit the graph"),
        ({"x": ((1, 1, 32),) * 3}, "along (-1, -1, 64), where -1 is dynamic"),
        ({"x": ((4, 1, 64), (2, 1, 64), (1, 1, 64))}, "0 <= min <= opt <= max"),
        ({"x": ((1, 1, 64),) * 3, "y": ((1,),) * 3}, "shapes for inputs that the graph lacks\n  got: ['y']"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    build: Build, tmp_path: Path, shapes: dict[str, tensorrt.Profile], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        build(model(MLP), shapes=shapes)
    assert words in str(caught.value)
    assert files(tmp_path) == {"graph.onnx"}


@needs_rtx
def test_a_failed_build_leaves_the_older_engine_alone(build: Build, tmp_path: Path) -> None:
    before = build(model(MLP)).path.read_bytes()
    with pytest.raises(GateError):
        build(model(MLP, "bfloat16"), EngineSpec(sm=75))
    assert (tmp_path / "out" / "graph.engine").read_bytes() == before
    assert files(tmp_path) == {"graph.onnx", "graph.engine"}


@needs_rtx
def test_a_shape_tensor_takes_values_as_its_profile(build: Build) -> None:
    proto = model("(T[t] x, int64[2] s) => (T y) { y = Reshape(x, s) }")
    values = ((1, 1), (4, 4), (8, 8))
    assert build(proto, shapes={**shapes_of(proto), "s": values}).profile["s"] == values
    with pytest.raises(InputError, match="input s is dynamic and has no shapes"):
        build(proto, shapes={"x": shapes_of(proto)["x"]})


@needs_rtx
def test_static_inputs_need_no_shapes(build: Build) -> None:
    assert build(model("(T[1,8] x) => (T y) { y = Relu(x) }"), shapes={}).profile["x"] == ((1, 8),) * 3


@needs_rtx
def test_weight_streaming_and_a_timing_cache(build: Build, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "timing"
    spec = EngineSpec(sm=120, weight_streaming=True, tf32=True, timing_cache=cache)
    assert build(model(MLP), spec).bytes and cache.stat().st_size
    assert build(model(MLP), spec).bytes


@needs_rtx
def test_nothing_is_printed_and_progress_is_told(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    build(model(MLP), progress=lines.append)
    assert capfd.readouterr().out == ""
    assert len(lines) == 3
    assert "parsing with tensorrt_rtx" in lines[0] and "sm89" in lines[1] and lines[2].startswith("graph.engine: ")


def test_importing_the_module_imports_no_tensorrt() -> None:
    code = (
        "import sys, optimize.compile.tensorrt; print({'tensorrt', 'tensorrt_rtx', 'torch', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


I64 = "Constant<value = int64[1] {1}>()"
NORM = "(T[b,8,h,w] x, T[8] s, T[8] z) => (T y) "
ROTARY = "(T[b,2,t,16] x, T[b,t,8] c, T[b,t,8] s) => (T y) "
QKV = "T[b,t,128] q, T[b,s,128] k, T[b,s,128] v"
HEADS = "q_num_heads=2, kv_num_heads=2"
SCALES = "r = Constant<value = float[4] {1, 1, 2, 2}>()"
BUILDS = {
    "Attention 3D": f"({QKV}) => (T y) {{ y = Attention<{HEADS}>(q, k, v) }}",
    "Attention 3D, causal": f"({QKV}) => (T y) {{ y = Attention<{HEADS}, is_causal=1>(q, k, v) }}",
    "Attention 3D, added mask": f"({QKV}, T[b,1,t,s] m) => (T y) {{ y = Attention<{HEADS}>(q, k, v, m) }}",
    "Attention 3D, bool mask": f"({QKV}, bool[b,1,t,s] m) => (T y) {{ y = Attention<{HEADS}>(q, k, v, m) }}",
    "Attention 3D, grouped": "(T[b,t,256] q, T[b,s,128] k, T[b,s,128] v) => (T y) "
    "{ y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }",
    "RMSNormalization": "(T[b,t,64] x, T[64] s) => (T y) { y = RMSNormalization(x, s) }",
    "LayerNormalization": "(T[b,t,64] x, T[64] s, T[64] z) => (T y) { y = LayerNormalization(x, s, z) }",
    "GroupNormalization": NORM + "{ y = GroupNormalization<num_groups=4>(x, s, z) }",
    "InstanceNormalization": NORM + "{ y = InstanceNormalization(x, s, z) }",
    "RotaryEmbedding": ROTARY + "{ y = RotaryEmbedding(x, c, s) }",
    "RotaryEmbedding, interleaved": ROTARY + "{ y = RotaryEmbedding<interleaved=1>(x, c, s) }",
    "RotaryEmbedding, 3D": "(T[b,t,32] x, T[b,t,8] c, T[b,t,8] s) => (T y) "
    "{ y = RotaryEmbedding<num_heads=2>(x, c, s) }",
    "Resize, nearest": f'(T[b,8,h,w] x) => (T y) {{ {SCALES} y = Resize<mode="nearest", nearest_mode="floor", '
    'coordinate_transformation_mode="asymmetric">(x, , r) }',
    "Resize, linear": f'(T[b,8,h,w] x) => (T y) {{ {SCALES} y = Resize<mode="linear">(x, , r) }}',
    "Resize, cubic": f'(T[b,8,h,w] x) => (T y) {{ {SCALES} y = Resize<mode="cubic">(x, , r) }}',
    "Conv": "(T[b,8,h,w] x, T[8,8,3,3] k) => (T y) { y = Conv<pads=[1,1,1,1]>(x, k) }",
    "Pad, reflect": "(T[b,8,h,w] x) => (T y) { p = Constant<value = int64[8] {0,0,0,0,0,0,1,1}>() "
    'y = Pad<mode="reflect">(x, p) }',
    "Einsum": '(T[b,8,t] x, T[b,8,t] z) => (T y) { y = Einsum<equation="bhd,bhe->bde">(x, z) }',
    "ScatterND": "(T[4,8] x, T[1,8] u) => (T y) { i = Constant<value = int64[1,1] {0}>() y = ScatterND(x, i, u) }",
    "GatherElements": "(T[4,8] x, int64[4,8] i) => (T y) { y = GatherElements(x, i) }",
    "CumSum": f"(T[b,t] x) => (T y) {{ a = {I64} y = CumSum(x, a) }}",
    "CumSum, int64": f"(int64[b,t] x) => (int64 y) {{ a = {I64} y = CumSum(x, a) }}",
    "Mod, int64": f"(int64[b,t] x) => (int64 y) {{ a = {I64} y = Mod(x, a) }}",
    "Trilu": "(T[t,t] x) => (T y) { y = Trilu<upper=0>(x) }",
    "Trilu, int64": "(int64[t,t] x) => (int64 y) { y = Trilu(x) }",
    "Range, int64": "(T[b,t] x) => (int64 y) { z = Constant<value = int64 {0}>() o = Constant<value = int64 {1}>() "
    "n = Size(x) y = Range(z, n, o) }",
    "IsNaN and Where": "(T[b,t] x, T[1] z) => (T y) { n = IsNaN(x) y = Where(n, z, x) }",
    "ArgMax, int32": "(int32[b,t] x) => (int64 y) { y = ArgMax<axis=1>(x) }",
    "ArgMax, int64": "(int64[b,t] x) => (int64 y) { y = ArgMax<axis=1>(x) }",
    "fp32 timestep, cast": "(float[b] x) => (T y) { s = Sin(x) y = Cast<to=10>(s) }",
    "int64 timestep, cast": "(int64[b] x) => (T y) { f = Cast<to=1>(x) s = Sin(f) y = Cast<to=10>(s) }",
    "float64 constant": "(float[b] x) => (float y) { d = Cast<to=11>(x) s = Sin(d) y = Cast<to=1>(s) }",
}  # fmt: skip


@needs_rtx
@pytest.mark.parametrize("name", BUILDS)
def test_builds_in_every_precision(build: Build, name: str) -> None:
    graph = BUILDS[name]
    for dtype in LAYER_TYPE if "T[" in graph else ("float16",):
        done = build(model(graph, dtype))
        assert done.bytes and (not done.downgrades or dtype == "float")


REFUSES = {
    "Resize, antialias": (
        f'(T[b,8,h,w] x) => (T y) {{ {SCALES} y = Resize<mode="linear", antialias=1>(x, , r) }}',
        "Antialiasing is not supported",
    ),
    "Attention, softcap": (f"({QKV}) => (T y) {{ y = Attention<{HEADS}, softcap=5.0>(q, k, v) }}", "softcap"),
    "Attention, causal and masked": (
        f"({QKV}, T[b,1,t,s] m) => (T y) {{ y = Attention<{HEADS}, is_causal=1>(q, k, v, m) }}",
        "mask cannot be used together with CausalMaskKind",
    ),
    "Attention, past and present": (
        "(T[b,2,t,64] q, T[b,2,t,64] k, T[b,2,t,64] v, T[b,2,p,64] pk, T[b,2,p,64] pv) => (T y, T nk, T nv) "
        "{ y, nk, nv = Attention(q, k, v, , pk, pv) }",
        "only supports Attention nodes with one output",
    ),
    "Attention, fp32 mask in fp16": (
        f"({QKV}, float[b,1,t,s] m) => (T y) {{ y = Attention<{HEADS}>(q, k, v, m) }}",
        "differs from input 1's element type (float)",
    ),
    "LayerNormalization, fp32 scale in fp16": (
        "(T[b,t,64] x, float[64] s) => (T y) { y = LayerNormalization(x, s) }",
        "must have identical types",
    ),
    "RotaryEmbedding, fp32 tables in fp16": (
        "(T[b,2,t,16] x, float[b,t,8] c, float[b,t,8] s) => (T y) { y = RotaryEmbedding(x, c, s) }",
        "must have identical types",
    ),
    "ScatterND, reduction": (
        '(T[4,8] x, int64[1,1] i, T[1,8] u) => (T y) { y = ScatterND<reduction="add">(x, i, u) }',
        "ScatterND with reduction is not supported",
    ),
    "NonZero": ("(T[b,8] x) => (int64 y) { y = NonZero(x) }", "NonZero plugin creator version 1 was not found"),
    "BitwiseAnd": (
        "(int32[4] x, int32[4] z) => (int32 y) { y = BitwiseAnd(x, z) }",
        "not supported (UNSUPPORTED_NODE)",
    ),
}


@needs_rtx
@pytest.mark.parametrize("name", REFUSES)
def test_refuses_with_a_reason(build: Build, name: str) -> None:
    graph, words = REFUSES[name]
    with pytest.raises(OptimizeError) as caught:
        build(model(graph))
    assert words in str(caught.value)
