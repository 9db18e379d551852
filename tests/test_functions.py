"""The ONNX functions of `ai.optimize`: each body, run by ONNX Runtime, gives what the torch operation gives."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from optimize import kernels as K
from optimize.kernels import functions

TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bool: TensorProto.BOOL}
Feeds = Mapping[str, torch.Tensor]


def model_of(name: str, feeds: Feeds, outputs: int, opset: int = 23, **attributes: Any) -> onnx.ModelProto:
    """One node of ours, with its function."""
    names = [f"out{i}" for i in range(outputs)]
    first = next(iter(feeds.values()))
    sizes = [f"size{i}" for i in range(first.dim())]
    graph = helper.make_graph(
        [helper.make_node(name, list(feeds), names, name="node", domain=functions.DOMAIN, **attributes)],
        name,
        [helper.make_tensor_value_info(k, TYPES[t.dtype], list(t.shape)) for k, t in feeds.items()],
        [helper.make_tensor_value_info(n, TYPES[first.dtype], sizes) for n in names],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(functions.DOMAIN, functions.VERSION)]
    return helper.make_model(graph, opset_imports=imports, functions=[functions.function(name, opset)], ir_version=11)


def run(model: onnx.ModelProto, feeds: Feeds) -> list[torch.Tensor]:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.asarray(v)) for v in session.run(None, {k: t.numpy() for k, t in feeds.items()})]


def drawn(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def agree(got: list[torch.Tensor], expected: Any, dtype: torch.dtype) -> None:
    wanted = expected if isinstance(expected, tuple) else (expected,)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        difference = torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())
        assert difference < (1e-6 if dtype == torch.float32 else 2e-3)


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@BOTH
@pytest.mark.parametrize(("sums", "kind", "suffix"), [
    (sums, kind, suffix) for sums in functions.SUMS for kind in functions.NORM_KINDS for suffix in ("", "Modulated")
])  # fmt: skip
@pytest.mark.parametrize("per_token", [False, True])
def test_norms(sums: str, kind: str, suffix: str, per_token: bool, dtype: torch.dtype) -> None:
    batch, tokens, channels = 3, 7, 72
    vector = (batch, tokens if per_token else 1, channels)
    feeds = drawn(dtype, x=(batch, tokens, channels))
    if sums:
        feeds |= drawn(dtype, residual=(batch, tokens, channels))
    if sums == "GatedAdd":
        feeds |= drawn(dtype, gate=vector)
    feeds |= drawn(dtype, weight=(channels,))
    if kind == "LayerNorm":
        feeds |= drawn(dtype, bias=(channels,))
    if suffix:
        feeds |= drawn(dtype, scale=vector, shift=vector)
    call: Callable[..., Any] = K.layer_norm if kind == "LayerNorm" else K.rms_norm
    got = run(model_of(sums + kind + suffix, feeds, 2 if sums else 1, epsilon=1e-4), feeds)
    agree(got, call(**feeds, eps=1e-4), dtype)


@BOTH
@pytest.mark.parametrize("name", ["GroupNorm", "GroupNormSiLU"])
@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (6, 6), (40, 8)])
def test_group_norms(name: str, channels: int, groups: int, dtype: torch.dtype) -> None:
    feeds = drawn(dtype, x=(3, channels, 7, 9), weight=(channels,), bias=(channels,))
    got = run(model_of(name, feeds, 1, groups=groups, epsilon=1e-5), feeds)
    activation: Any = "silu" if name.endswith("SiLU") else None
    agree(got, K.group_norm(feeds["x"], groups, feeds["weight"], feeds["bias"], activation=activation), dtype)


@BOTH
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys", "head"), [(7, 77, 40), (63, 63, 72), (1, 199, 80)])
def test_attention(queries: int, keys: int, head: int, heads: int, dtype: torch.dtype) -> None:
    feeds = drawn(dtype, q=(2, 4, queries, head), k=(2, heads, keys, head), v=(2, heads, keys, head))
    got = run(model_of("Attention", feeds, 1, causal=0, scale=0.3), feeds)
    agree(got, K.attention(*feeds.values(), scale=0.3), dtype)


def test_mixed_types_are_cast_by_autocast_and_refused_without() -> None:
    q, k, v = torch.randn(1, 2, 7, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert K.attention(q, k, v).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="expected"):
        K.attention(q, k, v)


@BOTH
def test_causal_attention(dtype: torch.dtype) -> None:
    feeds = drawn(dtype, q=(2, 4, 63, 40), k=(2, 2, 63, 40), v=(2, 2, 63, 40))
    got = run(model_of("Attention", feeds, 1, causal=1, scale=0.3), feeds)
    agree(got, K.attention(*feeds.values(), scale=0.3, causal=True), dtype)


def packed(*heads: torch.Tensor) -> list[torch.Tensor]:
    """[batch, heads, tokens, head_dim] as [batch, tokens, heads * head_dim]."""
    return [x.transpose(1, 2).flatten(2).contiguous() for x in heads]


@BOTH
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_with_packed_heads(causal: bool, biased: bool, dtype: torch.dtype) -> None:
    heads = drawn(dtype, q=(2, 6, 63, 40), k=(2, 2, 63, 40), v=(2, 2, 63, 40))
    bias = drawn(dtype, bias=(2, 1, 63, 63))["bias"] if biased else None
    feeds = dict(zip("qkv", packed(*heads.values()), strict=True)) | ({} if bias is None else {"bias": bias})
    name, attributes = ("PackedAttentionBias", {}) if biased else ("PackedAttention", {"causal": int(causal)})
    got = run(model_of(name, feeds, 1, scale=0.3, heads=6, kv_heads=2, **attributes), feeds)
    (wanted,) = packed(K.attention(*heads.values(), bias=bias, scale=0.3, causal=causal and not biased))
    agree(got, wanted, dtype)


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1, 77), (2, 1, 7, 77), (2, 4, 1, 77), (1, 4, 7, 77)])
@pytest.mark.parametrize("boolean", [False, True])
def test_attention_with_a_bias(shape: tuple[int, ...], boolean: bool, dtype: torch.dtype) -> None:
    feeds = drawn(dtype, q=(2, 4, 7, 40), k=(2, 4, 77, 40), v=(2, 4, 77, 40), bias=shape)
    if boolean:
        feeds["bias"] = feeds["bias"] > -1.0
    got = run(model_of("AttentionBias", feeds, 1, scale=0.2), feeds)
    agree(got, K.attention(feeds["q"], feeds["k"], feeds["v"], bias=feeds["bias"], scale=0.2), dtype)


@BOTH
@pytest.mark.parametrize("name", ["QKNormRope", "QKNorm", "RotaryQK"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("angles", [1, 3])
def test_qk_norm_rope(name: str, interleaved: bool, angles: int, dtype: torch.dtype) -> None:
    feeds = drawn(dtype, q=(3, 4, 7, 40), k=(3, 2, 7, 40))
    weights = drawn(dtype, q_weight=(40,), k_weight=(40,)) if "Norm" in name else {}
    turns = drawn(torch.float32, cos=(angles, 7, 20), sin=(angles, 7, 20)) if name != "QKNorm" else {}
    attributes = ({"epsilon": 1e-6} if weights else {}) | ({"interleaved": int(interleaved)} if turns else {})
    feeds |= weights | turns
    got = run(model_of(name, feeds, 2, **attributes), feeds)
    agree(got, K.qk_norm_rope(**feeds, interleaved=interleaved), dtype)


@BOTH
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu(approximate: Any, dtype: torch.dtype) -> None:
    feeds = drawn(dtype, value=(3, 7, 40), gate=(3, 7, 40))
    got = run(model_of("GeGLU", feeds, 1, approximate=approximate), feeds)
    agree(got, K.geglu(feeds["value"], feeds["gate"], approximate=approximate), dtype)


@BOTH
def test_swiglu(dtype: torch.dtype) -> None:
    feeds = drawn(dtype, value=(3, 7, 40), gate=(3, 7, 40))
    agree(run(model_of("SwiGLU", feeds, 1), feeds), K.swiglu(feeds["value"], feeds["gate"]), dtype)


@pytest.mark.parametrize("name", sorted(functions.texts()))
@pytest.mark.parametrize("opset", [23, 24, 25])
def test_every_function_is_accepted_by_the_checker(name: str, opset: int) -> None:
    function = functions.function(name, opset)
    assert (function.domain, function.name) == (functions.DOMAIN, name)
    context = onnx.checker.DEFAULT_CONTEXT
    context.ir_version, context.opset_imports = 11, {"": opset}
    onnx.checker.check_function(function, context)


def test_a_name_that_is_none() -> None:
    with pytest.raises(KeyError, match="Conv"):
        functions.function("Conv")
