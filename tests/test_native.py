"""The native library's CPU kernels, through ONNX Runtime, against the references in float64.

Error budget: at most twice the error of torch's own operation in the same precision, both against float64.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from optimize.errors import MissingError
from optimize.kernels import native_library, ort_library, reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bool: TensorProto.BOOL,
}
FLOOR = 1e-7
"""Relative error that is granted beside the budget: torch's own is 0 where a sum has one term."""


def model(op: str, inputs: Sequence[Tensor], outputs: int, attributes: dict[str, Any]) -> onnx.ModelProto:
    """A graph of the one node; sizes are left open, types are the inputs'."""
    names = [f"i{n}" for n in range(len(inputs))]
    results = [f"o{n}" for n in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, domain="ai.optimize", **attributes)],
        op,
        [
            helper.make_tensor_value_info(n, TYPES[x.dtype], [f"{n}_{d}" for d in range(x.dim())])
            for n, x in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info(n, TYPES[inputs[0].dtype], None) for n in results],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ai.optimize", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(proto: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(ort_library()))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def native(op: str, inputs: Sequence[Tensor], outputs: int = 1, threads: int = 1, **attributes: Any) -> list[Tensor]:
    made = session(model(op, inputs, outputs, attributes), threads)
    feeds = {f"i{n}": x.contiguous().numpy() for n, x in enumerate(inputs)}
    return [torch.from_numpy(y) for y in made.run(None, feeds)]


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def error(got: Tensor, truth: Tensor) -> float:
    norm = truth.norm().item()
    return (got.double() - truth).norm().item() / (norm or 1.0)


def check(got: Sequence[Tensor], operation: Callable[..., Any], *args: Any) -> None:
    """`operation` with the same arguments, in float64 and in the inputs' own precision."""
    truth, own = operation(*map(double, args)), operation(*args)
    pairs = [(truth, own)] if isinstance(truth, Tensor) else list(zip(truth, own, strict=True))
    for result, (exact, torchs) in zip(got, pairs, strict=True):
        assert result.shape == exact.shape and result.dtype == torchs.dtype
        assert not result.isnan().any()
        assert error(result, exact) <= 2 * error(torchs, exact) + FLOOR


def draw(dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes) + sum(map(sum, shapes)))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


# --- attention -------------------------------------------------------------------------------------------------------

ATTENTION = {  # batch, heads, kv_heads, queries, keys, head_dim
    "one": (1, 1, 1, 1, 1, 40),
    "seven": (2, 3, 3, 7, 7, 72),
    "odd": (1, 2, 2, 63, 199, 40),
    "cross": (2, 4, 4, 199, 77, 40),
    "long": (1, 2, 2, 199, 777, 80),
    "gqa": (2, 6, 2, 77, 77, 64),
    "multi-query": (1, 4, 1, 63, 63, 160),
    "vae": (1, 1, 1, 199, 199, 512),
    "narrow": (1, 2, 2, 77, 77, 1),
    "odd head": (1, 2, 2, 33, 65, 37),
    "decode": (2, 4, 2, 1, 199, 128),
    "few": (1, 4, 4, 3, 400, 72),
}


CAUSAL = [name for name, (_, _, _, queries, keys, _) in ATTENTION.items() if queries <= keys]


@pytest.mark.parametrize(("case", "causal"), [(c, False) for c in ATTENTION] + [(c, True) for c in CAUSAL])
def test_attention(case: str, causal: bool, dtype: torch.dtype) -> None:
    batch, heads, kv_heads, queries, keys, head_dim = ATTENTION[case]
    q, k, v = draw(
        dtype, (batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, head_dim)
    )
    scale = head_dim**-0.5
    got = native("Attention", [q, k, v], causal=int(causal), scale=scale)
    check(got, reference.attention, q, k, v, None, causal, got_scale(scale))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("case", "causal"), [(c, False) for c in ATTENTION] + [(c, True) for c in CAUSAL])
def test_packed_heads_give_the_same(case: str, causal: bool, biased: bool, dtype: torch.dtype) -> None:
    """[batch, tokens, heads * head_dim]: every number in its place is that of the heads apart, to the bit."""
    batch, heads, kv_heads, queries, keys, head_dim = ATTENTION[case]
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    q, k, v = draw(dtype, *((batch, n, tokens, head_dim) for n, tokens in sizes))
    flat = [x.transpose(1, 2).flatten(2).contiguous() for x in (q, k, v)]
    counts = {"heads": heads, "kv_heads": kv_heads}
    if biased:
        bias = draw(dtype, (1, 1, queries, keys))
        (got,) = native("PackedAttentionBias", [*flat, *bias], scale=0.2, **counts)
        (apart,) = native("AttentionBias", [q, k, v, *bias], scale=0.2)
    else:
        (got,) = native("PackedAttention", flat, causal=int(causal), scale=0.2, **counts)
        (apart,) = native("Attention", [q, k, v], causal=int(causal), scale=0.2)
    assert got.shape == flat[0].shape
    assert torch.equal(got, apart.transpose(1, 2).flatten(2))


def got_scale(scale: float) -> float:
    """An attribute is an fp32 number."""
    return float(np.float32(scale))


@pytest.mark.parametrize("dims", ["bhqk", "b11k", "1h1k", "11qk", "bhq1", "1111"])
@pytest.mark.parametrize("queries", [2, 63])
@pytest.mark.parametrize("boolean", [False, True])
def test_bias_broadcasts(dims: str, queries: int, boolean: bool, dtype: torch.dtype) -> None:
    sizes = {"b": 2, "h": 3, "q": queries, "k": 400, "1": 1}
    q, k, v, bias = draw(dtype, (2, 3, queries, 40), (2, 3, 400, 40), (2, 3, 400, 40), [sizes[d] for d in dims])
    mask = bias > -0.5 if boolean else bias
    got = native("AttentionBias", [q, k, v, mask], scale=0.2)
    check(got, reference.attention, q, k, v, mask, False, got_scale(0.2))


@pytest.mark.parametrize("queries", [2, 63])
def test_a_query_that_sees_nothing_gives_zeros(queries: int, dtype: torch.dtype) -> None:
    q, k, v = draw(dtype, (1, 2, queries, 40), (1, 2, 77, 40), (1, 2, 77, 40))
    seen = torch.ones(1, 1, queries, 77, dtype=torch.bool)
    seen[:, :, 1] = False
    for mask in (seen, torch.zeros(1, 1, queries, 77).masked_fill(~seen, -torch.inf).to(dtype)):
        (got,) = native("AttentionBias", [q, k, v, mask], scale=0.2)
        assert (got[:, :, 1] == 0).all()
        check([got], reference.attention, q, k, v, mask, False, got_scale(0.2))


def test_the_least_number_as_mask_keeps_rows_alive() -> None:
    """transformers masks with the type's least number: a row of nothing else is a mean over all keys."""
    q, k, v = draw(torch.float32, (1, 1, 8, 40), (1, 1, 77, 40), (1, 1, 77, 40))
    mask = torch.full((1, 1, 8, 77), torch.finfo(torch.float32).min)
    (got,) = native("AttentionBias", [q, k, v, mask], scale=0.2)
    assert error(got, v.double().mean(2, keepdim=True).expand(1, 1, 8, 40)) < 1e-6


def test_large_scores_and_nan(dtype: torch.dtype) -> None:
    q, k, v = draw(dtype, (1, 2, 63, 40), (1, 2, 199, 40), (1, 2, 199, 40))
    check(native("Attention", [q * 30, k, v], causal=0, scale=1.0), reference.attention, q * 30, k, v, None, False, 1.0)
    k[0, 1, 17, 3] = torch.nan
    (got,) = native("Attention", [q, k, v], causal=0, scale=1.0)
    assert got[0, 1].isnan().all() and not got[0, 0].isnan().any()


def test_no_keys_gives_zeros() -> None:
    q, k = torch.ones(1, 2, 8, 40), torch.ones(1, 2, 0, 40)
    (got,) = native("Attention", [q, k, k], causal=0, scale=1.0)
    assert got.shape == q.shape and (got == 0).all()


def test_threads_change_nothing() -> None:
    q, k, v = draw(torch.float32, (2, 4, 199, 64), (2, 4, 199, 64), (2, 4, 199, 64))
    one, two = (native("Attention", [q, k, v], threads=n, causal=0, scale=0.125)[0] for n in (1, 2))
    assert torch.equal(one, two)


# --- norms -----------------------------------------------------------------------------------------------------------

NORMS = [
    (sums, kind, suffix, per)
    for sums, kind, suffix, per in itertools.product(
        ("", "Add", "GatedAdd"), ("LayerNorm", "RMSNorm"), ("", "Modulated"), ("batch", "token")
    )
    if per == "batch" or suffix or sums == "GatedAdd"  # else nothing is per token
]


@pytest.mark.parametrize(("sums", "kind", "suffix", "per"), NORMS, ids=["".join(n) for n in NORMS])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (7, 63), (77, 320), (5, 9000)])
def test_norms(sums: str, kind: str, suffix: str, per: str, tokens: int, channels: int, dtype: torch.dtype) -> None:
    each = (2, 1 if per == "batch" else tokens, channels)
    x, residual, gate, weight, bias, scale, shift = draw(
        dtype, (2, tokens, channels), (2, tokens, channels), each, (channels,), (channels,), each, (1, *each[1:])
    )
    modulation = [scale, shift] if suffix else []
    affine = [weight] if kind == "RMSNorm" else [weight, bias]
    added = {"": [], "Add": [residual], "GatedAdd": [residual, gate]}[sums]
    got = native(f"{sums}{kind}{suffix}", [x, *added, *affine, *modulation], 2 if sums else 1, epsilon=1e-5)
    operation = {
        "LayerNorm": reference.add_layer_norm if sums else reference.layer_norm,
        "RMSNorm": reference.add_rms_norm if sums else reference.rms_norm,
    }[kind]
    before = [residual, gate if sums == "GatedAdd" else None] if sums else []
    after = [got_scale(1e-5), *(modulation or [None, None])]
    check(got, rounded_total(operation) if sums else operation, x, *before, *affine, *after)


def rounded_total(operation: Callable[..., Any]) -> Callable[..., Any]:
    """In float64 too the norm is of the total as it was rounded: that rounding is the operation's, no error of it."""

    def run(x: Tensor, residual: Tensor, gate: Tensor | None, *rest: Any) -> Any:
        if x.dtype != torch.float64:
            return operation(x, residual, gate, *rest)
        total = operation(x, residual, gate, *rest)[1]
        near = total.to(ROUNDED[0]).double()
        return operation(torch.zeros_like(near), near, None, *rest)[0], total

    return run


ROUNDED = [torch.float32]


@pytest.fixture(autouse=True)
def _rounded_to(request: pytest.FixtureRequest) -> None:
    if "dtype" in request.fixturenames:
        ROUNDED[0] = request.getfixturevalue("dtype")


@pytest.mark.parametrize("shape", [(5, 63), (63,), (2, 3, 4, 40)])
def test_layer_norm_of_any_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = draw(dtype, shape, shape[-1:], shape[-1:])
    check(
        native("LayerNorm", [x, weight, bias], epsilon=1e-6),
        reference.layer_norm, x, weight, bias, got_scale(1e-6), None, None,
    )  # fmt: skip


GROUP_NORMS = {  # shape, groups; the last two are cut into pieces
    "one group": ((2, 6, 7, 9), 1),
    "one channel": ((1, 5, 63), 5),
    "no space": ((3, 40), 4),
    "odd": ((2, 30, 7, 11), 3),
    "unet": ((1, 320, 32, 32), 32),
    "exact": ((1, 2, 256, 256), 1),
    "vae": ((1, 6, 199, 331), 2),
}


@pytest.mark.parametrize("case", GROUP_NORMS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_group_norm(case: str, silu: bool, mean: float, dtype: torch.dtype) -> None:
    shape, groups = GROUP_NORMS[case]
    x, weight, bias = draw(dtype, shape, shape[1:2], shape[1:2])
    x = x + mean
    got = native("GroupNormSiLU" if silu else "GroupNorm", [x, weight, bias], groups=groups, epsilon=1e-5)
    check(got, reference.group_norm, x, groups, weight, bias, got_scale(1e-5), "silu" if silu else "")


# --- rotation and gates ----------------------------------------------------------------------------------------------


QK = [*itertools.product(("QKNormRope", "RotaryQK"), (False, True), (1, 2)), ("QKNorm", False, 1)]


@pytest.mark.parametrize(("op", "interleaved", "angles"), QK)
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 40), (63, 72), (77, 128), (7, 2)])
def test_qk(op: str, interleaved: bool, tokens: int, head_dim: int, angles: int, dtype: torch.dtype) -> None:
    q, k, q_weight, k_weight = draw(dtype, (2, 4, tokens, head_dim), (2, 2, tokens, head_dim), (head_dim,), (head_dim,))
    cos, sin = draw(torch.float32, *[(angles, tokens, head_dim // 2)] * 2)
    weights = [q_weight, k_weight] if op != "RotaryQK" else []
    turn = [cos, sin] if op != "QKNorm" else []
    attributes = ({"epsilon": 1e-6} if weights else {}) | ({"interleaved": int(interleaved)} if turn else {})
    got = native(op, [q, k, *weights, *turn], 2, **attributes)
    both = [*(weights or [None, None]), *(turn or [None, None])]
    check(got, reference.qk_norm_rope, q, k, *both, got_scale(1e-6), interleaved)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("shape", [(1,), (7, 63), (2, 77, 1280)])
def test_gated(activation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value, gate = draw(dtype, shape, shape)
    gate = gate * 4
    op, attributes = {
        "gelu": ("GeGLU", {"approximate": "none"}),
        "gelu_tanh": ("GeGLU", {"approximate": "tanh"}),
        "silu": ("SwiGLU", {}),
    }[activation]
    check(native(op, [value, gate], **attributes), reference.gated, value, gate, activation)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_over_their_whole_range(activation: str) -> None:
    gate = torch.cat([torch.linspace(-30, 30, 100003), torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-30])])
    op, attributes = ("SwiGLU", {}) if activation == "silu" else ("GeGLU", {"approximate": activation[5:] or "none"})
    (got,) = native(op, [torch.ones_like(gate), gate], **attributes)
    truth = reference.gated(torch.ones_like(gate).double(), gate.double(), activation)
    assert ((got - truth).abs() <= 4e-7 * gate.abs().clamp(min=1)).all()


# --- what is not served ----------------------------------------------------------------------------------------------

ATTENDING, NORMING, TURNING = {"causal": 0, "scale": 1.0}, {"epsilon": 1e-5}, {"interleaved": 0}
Q = (1, 2, 8, 40)
BAD: dict[str, tuple[str, list[tuple[int, ...]], dict[str, Any], str]] = {
    "keys": ("Attention", [Q, (1, 2, 8, 41), (1, 2, 8, 41)], ATTENDING, "k: got [1, 2, 8, 41], expected batch 1 and"),
    "values": ("Attention", [Q, Q, (1, 2, 9, 40)], ATTENDING, "v: got [1, 2, 9, 40], expected [1, 2, 8, 40], as k"),
    "heads": ("Attention", [(1, 3, 8, 40), Q, Q], ATTENDING, "that divides the 3 heads"),
    "wide": ("Attention", [(1, 1, 8, 520)] * 3, ATTENDING, "a head_dim of 520, expected at most 512"),
    "bias": ("AttentionBias", [Q, Q, Q, (1, 1, 8, 7)], ATTENDING, "bias: got [1, 1, 8, 7], expected what broadcasts"),
    "packed": (
        "PackedAttention",
        [(1, 8, 40)] * 3,
        ATTENDING | {"heads": 3, "kv_heads": 3},
        "q: got 40 channels for 3 heads",
    ),
    "packed keys": (
        "PackedAttention",
        [(1, 8, 40)] * 3,
        ATTENDING | {"heads": 4, "kv_heads": 2},
        "and head_dim 10, as q",
    ),
    "no heads": ("PackedAttention", [(1, 8, 40)] * 3, ATTENDING | {"heads": 0, "kv_heads": 1}, "channels for 0 heads"),
    "groups": ("GroupNorm", [(1, 6, 4), (6,), (6,)], NORMING | {"groups": 4}, "groups: got 4, expected a number"),
    "weight": ("RMSNorm", [(2, 6), (5,)], NORMING, "weight: got [5], expected [6]"),
    "residual": ("AddRMSNorm", [(2, 6), (2, 5), (6,)], NORMING, "residual: got [2, 5]"),
    "shift": ("RMSNormModulated", [(2, 3, 6), (6,), (2, 1, 6), (2, 2, 6)], NORMING, "shift: got [2, 2, 6]"),
    "odd": ("RotaryQK", [(1, 1, 4, 5), (1, 1, 4, 5), (1, 4, 2), (1, 4, 2)], TURNING, "an even one to rotate"),
    "cos": ("RotaryQK", [(1, 1, 4, 6), (1, 1, 4, 6), (1, 5, 3), (1, 5, 3)], TURNING, "cos: got [1, 5, 3]"),
    "gate": ("SwiGLU", [(2, 6), (2, 5)], {}, "gate: got [2, 5], expected [2, 6], as value"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str) -> None:
    op, shapes, attributes, words = BAD[case]
    outputs = 2 if op.startswith(("Add", "Rotary")) else 1
    with pytest.raises(Exception, match=r"ai\.optimize") as caught:
        native(op, [torch.ones(s) for s in shapes], outputs, **attributes)
    assert words in str(caught.value)


def test_a_wrong_word_is_refused() -> None:
    with pytest.raises(Exception, match='approximate: got "fast", expected "none" or "tanh"'):
        native("GeGLU", [torch.ones(4), torch.ones(4)], approximate="fast")


def test_a_library_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "NAME", "never_built.so")
    with pytest.raises(MissingError, match=r"was not built(.|\n)*pip install"):
        ort_library()


def test_shapes_are_inferred() -> None:
    """A node's outputs have their inputs' sizes before anything runs."""
    q, k = torch.ones(1, 2, 8, 40), torch.ones(1, 2, 9, 40)
    made = session(model("Attention", [q, k, k], 1, {"causal": 0, "scale": 1.0}))
    assert made.get_outputs()[0].shape == ["i0_0", "i0_1", "i0_2", "i0_3"]


# --- each instruction set, in a process of its own -------------------------------------------------------------------

ISAS = """
import ctypes
from optimize.kernels import ort_library
library = ctypes.CDLL(str(ort_library()))
library.optimize_kernels_isa.restype = ctypes.c_char_p
print(library.optimize_kernels_isa().decode())
"""


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_an_instruction_set_can_be_asked_for(isa: str) -> None:
    env = os.environ | {"OPTIMIZE_NATIVE_ISA": isa}
    got = subprocess.run([sys.executable, "-c", ISAS], env=env, check=True, capture_output=True, text=True).stdout
    if got.strip() != isa:
        pytest.skip(f"needs a CPU with {isa}")
    narrow = "cross or gqa or decode or test_gated or unet or LayerNormModulated or test_qk"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        __file__,
        "-k",
        f"({narrow}) and not asked",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
